"""What the programs' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .machine import CORES
from .report import BenchmarkError, disturbed


def positive(text: str) -> int:
    """The type of a whole number of at least 1; underscores are allowed."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return value


def exit_status(program: Callable[[], int], csv: Path) -> int:
    """Run a program; its failures in words on stderr, and as an exit status."""
    try:
        return program()
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
    except OSError as error:
        print(f"benchmarks: {error.filename or csv}: {error.strerror or error}; name another --csv", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"benchmarks: interrupted; what was measured is in {csv}", file=sys.stderr)
        return 130
    return 1


def print_left_out(left_out: Mapping[str, str]) -> None:
    """Who does not run, with the reason, a line for each reason."""
    for reason in dict.fromkeys(left_out.values()):
        print(f"left out: {', '.join(name for name, why in left_out.items() if why == reason)} ({reason})")


def note_threads(threads: Iterable[int]) -> None:
    """Say so where more threads are asked for than there are cores."""
    if too_many := [number for number in threads if number > CORES]:
        print(f"note: --threads {too_many} is more than the {CORES} cores here; they will wait for each other")


def announce(description: Mapping[str, Any]) -> None:
    """The first lines of a program's output."""
    print(
        f"{description['machine']}, {description['cores']} cores, torch {description['torch']}, "
        f"huge pages {description['huge_pages']}"
    )
    if description["huge_pages"] == "on" and description["thp_system"] == "never":
        print("note: this system never gives huge pages, so asking for them has no effect")


def note_waiting(waited: float | None) -> None:
    """Say so where a race was disturbed: threads wait for the slowest at their barrier, whatever they compute."""
    if disturbed(waited):
        print(
            f"note: threads waited for a core {waited:.0%} of the time (other processes, or more threads than cores); "
            "repeat the race"
        )
