"""The check on a real GPU, in ten minutes and unattended: ``python -m benchmarks.gpu``, or ``make gpu-check``.

Correctness at real sizes, the price of the first call, races against what the loss replaces, the test-suite on the
device, and compute-sanitizer. Each runs in processes of its own with a time of its own, and what they find is written
as it comes. ``--dry-run`` goes through all of it without a GPU, at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, perf_counter

import torch

from . import gpu_checks, gpu_results, gpu_times
from .gpu_parts import GRACE, Emit, Record, Setting, records, why_no_gpu
from .gpu_sections import SECTIONS, Context, gpu_description

LIMIT = 570  # seconds for everything
NO_GPU = 2  # exit status


# ---- parts -----------------------------------------------------------------------------------------------------------


def first_call(setting: Setting, emit: Emit) -> None:
    """How long the first step of a process takes, and the next one. Importing is in neither."""
    sizes = gpu_checks.DRY if setting.dry else gpu_checks.REAL
    logits, target, upstream = gpu_checks.batch(setting, sizes.rows, sizes.classes, torch.bfloat16)
    setting.wait()
    took = []
    for _ in range(2):
        start = perf_counter()
        gpu_checks.call(logits, target, upstream, fill=False)
        setting.wait()
        took.append(perf_counter() - start)
    emit({"first_s": took[0], "next_s": took[1], "dtype": "bfloat16", "shape": list(logits.shape), "k": 20})


PARTS = {
    "correctness": gpu_checks.run,
    "first-call": first_call,
    "times": gpu_times.run,
    "small": gpu_checks.run_small,
}


# ---- the program -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the kernels on a GPU and time them, and write gpu.json, gpu.csv and plots. The exit status "
        f"is 1 where a check failed, and {NO_GPU} where there is no GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="without a GPU: tiny logits on the CPU, in Triton's interpreter")
    add("--output", metavar="PATH", type=Path, help="folder of the results (benchmarks/results; needed by --dry-run)")
    add("--only", metavar="X", nargs="+", choices=SECTIONS, default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    add("--limit", metavar="S", type=float, default=LIMIT, help=f"seconds for everything ({LIMIT})")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    add("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    add("--worker", type=int, default=0, help=argparse.SUPPRESS)
    add("--workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser


def run_part(options: argparse.Namespace) -> int:
    """In a process of its own: what `gpu_sections` starts."""
    if options.dry_run:
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of the interpreter
    setting = Setting(options.dry_run, monotonic() + options.seconds, options.worker, options.workers)
    with records() as emit:
        PARTS[options.part](setting, emit)
    return 0


def allowance(name: str, asked: Sequence[str], left: float, limit: float) -> float:
    """The seconds a section has: all that is left but for what the later ones may count on."""
    later = list(asked)[list(asked).index(name) + 1 :]
    whole = sum(SECTIONS[other][1] for other in asked)
    return left - sum(SECTIONS[other][1] for other in later) * limit / whole - GRACE


def check(options: argparse.Namespace) -> int:
    """Run the sections, write what they find as it comes, and say how it went; the exit status."""
    deadline = monotonic() + options.limit
    folder: Path = options.output or gpu_results.FOLDER
    document: Record = {
        "dry_run": options.dry_run,
        "about": "a dry run on the CPU: no figure here says anything about speed" if options.dry_run else "a GPU check",
        "status": "running",
        "passed": None,
        "environment": gpu_description(options.dry_run),
        "sections": {name: {"status": "not asked for", "passed": None} for name in SECTIONS},
    }
    asked = [name for name in SECTIONS if name in options.only]
    sections = document["sections"]
    for name in asked:
        sections[name]["status"] = "not begun"

    def save() -> None:
        gpu_results.write(document, folder)

    # Ended by SIGTERM, as by `timeout`, it takes its parts with it and writes the plots, as by Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    save()  # at once: what an earlier run has written is out of date
    environment = document["environment"]
    print(f"{environment['gpu']}, torch {environment['torch']}, triton {environment['triton']}", flush=True)
    try:
        for name in asked:
            seconds = allowance(name, asked, deadline - monotonic(), options.limit)
            if seconds < GRACE:
                sections[name]["reason"] = "the time was up"
                continue
            print(f"\n{name}, for {seconds:.0f} s at most", flush=True)
            sections[name]["status"] = "running"
            context = Context(
                options.dry_run, seconds, sections[name], save, lambda line: print(f"  {line}", flush=True)
            )
            SECTIONS[name][0](context)
            save()
        document["status"] = "complete"
    except KeyboardInterrupt:
        document["status"] = "interrupted"
    document["passed"] = not any(section["passed"] is False for section in sections.values())
    document["seconds"] = round(options.limit - (deadline - monotonic()), 1)
    save()
    paths = gpu_results.plot(document, folder)
    print(f"\n{gpu_results.summary(document)}\n")
    print("\n".join(str(path) for path in (folder / "gpu.json", folder / "gpu.csv", *paths)))
    if document["status"] == "interrupted":
        print("benchmarks: interrupted; what was measured is written", file=sys.stderr)
        return 130
    return 0 if document["passed"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.part:
        return run_part(options)
    if options.dry_run and options.output is None:
        parser.error("--dry-run needs --output, so that the results of a GPU stay what they are")
    if not options.dry_run and (missing := why_no_gpu()) is not None:
        print(f"benchmarks: {missing}; --dry-run --output PATH goes through it all without a GPU", file=sys.stderr)
        return NO_GPU
    try:
        return check(options)
    except OSError as error:
        print(f"benchmarks: {error.filename}: {error.strerror or error}; name another --output", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
