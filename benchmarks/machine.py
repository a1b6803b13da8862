"""Where the times are taken: what each row of a CSV says of the machine, and what memory there is."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from prsl_kernels import __version__
from prsl_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it once, at its first allocation


def describe_machine() -> dict[str, Any]:
    """The columns that all rows of a run have in common, but for the date."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    try:
        system = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        thp_system = system[system.index("[") + 1 : system.index("]")]
    except (OSError, ValueError):
        thp_system = ""
    return {
        "machine": models[0] if models else platform.processor() or platform.machine(),
        "cores": CORES,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "prsl": __version__,
        "commit": _commit(),
        "level": native.level() or "",  # the instruction set that the compiled extension uses
        "huge_pages": huge_pages(),
        "thp_system": thp_system,
    }


def now() -> str:
    """The date of a row, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def huge_pages() -> str:
    """Whether torch asks for huge pages in this process."""
    return "on" if os.environ.get(HUGE_PAGES) == "1" else "off"


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def waited() -> float | None:
    """Seconds that this process's threads have been ready to run and had no core; None where the system does not say.

    It grows when other processes want the cores, or when there are more threads than cores.
    """
    try:
        tasks = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:
        return None
    return sum(int(fields[1]) for fields in tasks) / 1e9 if tasks else None


def _commit() -> str:
    """The commit of the checkout, with a plus if the sources differ from it; empty outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
