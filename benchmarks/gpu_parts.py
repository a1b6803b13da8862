"""What a part of the GPU check is: a process of its own, whose records the program keeps as they come.

A kernel that reads where it must not takes the whole process's GPU context with it, and one that hangs never returns.
So no part runs in the process that writes the results, and each has a time of its own, after which it is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from . import machine

Record = dict[str, Any]
Emit = Callable[[Record], None]

GRACE = 8.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Setting:
    """What a part has to know."""

    dry: bool
    deadline: float  # of `monotonic`, after which it begins nothing new
    worker: int = 0  # which of the workers that share the part
    workers: int = 1

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - monotonic()

    def wait(self) -> None:
        """Until the device has done all it was given; raises what went wrong there."""
        if not self.dry:
            torch.cuda.synchronize()


def why_no_gpu() -> str | None:
    """What is missing to run the kernels on a GPU here, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA and ROCm: install one that has it"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU here: look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    from prsl_kernels.backends import triton

    if triton.interpreted:
        return "TRITON_INTERPRET is set, with which Triton runs no kernel on a GPU: unset it"
    return triton.why_missing()


def words(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


# ---- in the process of a part ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def records() -> Iterator[Emit]:
    """A function that hands a record to the program; whatever libraries print goes to stderr meanwhile."""
    sys.stdout.flush()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(record: Record) -> None:
        channel.write(json.dumps(record, allow_nan=False) + "\n")
        channel.flush()

    try:
        yield emit
    finally:
        channel.close()


# ---- in the process of the program -----------------------------------------------------------------------------------


def part_command(name: str, seconds: float, dry: bool, worker: int = 0, workers: int = 1) -> list[str]:
    """The command line of a part."""
    flags = ["--dry-run"] if dry else []
    share = ["--worker", str(worker), "--workers", str(workers)]
    return [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--seconds", f"{seconds:.1f}", *share, *flags]


def environment(dry: bool, **more: str) -> dict[str, str]:
    """The variables of a part: without a GPU, Triton interprets its kernels."""
    path = os.pathsep.join(filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH"))))
    dry_only = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dry_only | more


@dataclass
class Ended:
    """How a process ended."""

    status: int
    timed_out: bool
    seconds: float

    @property
    def reason(self) -> str | None:
        if self.timed_out:
            return f"not through after {self.seconds:.0f} s, and ended"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return None if self.status == 0 else f"exit status {self.status}"


Take = Callable[[str], None]


def run(command: Sequence[str], seconds: float, variables: Mapping[str, str], take: Take | None = None) -> Ended:
    """Run a command for so long at most; ``take`` gets each line of its stdout as it comes."""
    (ended,) = run_together([(command, take)], seconds, variables)
    return ended


def run_together(
    commands: Sequence[tuple[Sequence[str], Take | None]], seconds: float, variables: Mapping[str, str]
) -> list[Ended]:
    """Run commands at the same time, as `run` does each.

    Each is a process group of its own, so that its children (compilers, test workers) end with it; and whatever happens
    here, none of them stays.
    """
    began = monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    ended: list[Ended] = []
    try:
        for command, take in commands:
            out = None if take is None else subprocess.PIPE
            # Not text=True: what a process writes as it dies need not be UTF-8.
            process = subprocess.Popen(
                command, stdout=out, env=dict(variables), cwd=machine.ROOT, start_new_session=True
            )
            processes.append(process)
            if take is not None:
                readers.append(threading.Thread(target=_read, args=(process, take), daemon=True))
                readers[-1].start()
        for process in processes:
            timed_out = False
            try:
                process.wait(max(0, began + seconds - monotonic()))
            except subprocess.TimeoutExpired:
                timed_out = True
                _ask_to_end(process)
            _kill_group(process)
            ended.append(Ended(process.returncode, timed_out, monotonic() - began))
    finally:
        for process in processes[len(ended) :]:
            _kill_group(process)
        for reader in readers:
            reader.join(GRACE)
    return ended


def _read(process: subprocess.Popen[bytes], take: Take) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        take(line.decode(errors="replace").rstrip("\n"))


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """By SIGINT, at which pytest writes down what it has."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
