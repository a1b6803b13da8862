"""What the person at the terminal sees while long work runs. All of it goes to stderr; stdout is for results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from prsl_kernels.experiments import ranks

T = TypeVar("T")


def printable(text: str) -> str:
    """`text` as one line that does nothing to a terminal: names of files and texts of others may hold its commands."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def say(message: str) -> None:
    """Prints one line of information without tearing a running progress bar. Of several ranks, the first speaks."""
    if ranks.is_main():
        tqdm.write(printable(message), file=sys.stderr)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterates with a progress bar that counts `items`; a log file gets a line every half minute instead.

    Of several ranks, only the first shows one.
    """
    interactive = sys.stderr.isatty()
    return iter(
        tqdm(
            items,
            desc=description,
            total=total,
            disable=not ranks.is_main(),
            leave=False,
            file=sys.stderr,
            dynamic_ncols=interactive,
            mininterval=0.2 if interactive else 30.0,
            maxinterval=10.0 if interactive else 60.0,
        )
    )
