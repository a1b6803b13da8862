"""Race the loss against what it replaces, on this machine's CPU: ``python -m benchmarks.loss``.

A step is what training does with the logits: the loss, its backward with an upstream gradient that is not 1 (the
Trainer divides by the number of tokens, AMP scales), and setting ``logits.grad`` to None, as
``zero_grad(set_to_none=True)`` does; so the pages of the gradient are fresh in every step, and giving them back is part
of it. The contenders take turns in one process, in a new order each round, each on logits that were just written, as a
model's last layer would have. See NOTES.md for the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import axes, machine, race, report
from .cli import announce, exit_status, note_threads, note_waiting, positive, print_left_out
from .contenders import CONTENDERS, Step
from .machine import CORES, HUGE_PAGES, ROOT, huge_pages
from .report import BenchmarkError, Configuration

# What --grid varies, one axis at a time, around the configuration that the other options give.
GRID: dict[str, tuple[Any, ...]] = {
    "tokens": (128, 512, 2048),
    "vocab": (32_000, 50_257, 128_256, 262_144),
    "k": (6, 20, 100),
    "threads": tuple(sorted({1, 2, CORES})) if CORES > 1 else (1,),
    "rows": race.ROWS,
}


def run(
    configuration: Configuration, names: Sequence[str], rounds: int, seed: int, *, memory: bool
) -> tuple[race.Outcome, dict[str, float], dict[str, str]]:
    """Race the contenders; also the MiB that each needs beyond what is there, and why the others are left out."""
    names, left_out = race.choose(names, configuration)
    if not names:
        return race.Outcome([]), {}, left_out
    threads = torch.get_num_threads()
    torch.set_num_threads(configuration.threads)
    try:
        pristine, target = race.make_logits(configuration, seed)
        logits = pristine.clone().requires_grad_()

        def restore(_: int) -> None:
            # Before every step, not only after those that overwrite the logits: all find the same caches.
            with torch.no_grad():
                logits.copy_(pristine)

        steps, failed = race.warm_up(names, logits, target, configuration.k, restore)
        turns = {name: race.Turn(restore, step) for name, step in steps.items()}
        outcome = race.race(turns, rounds, seed, str(configuration))
        peak_extra: dict[str, float] = {}
        if memory and not outcome.interrupted:
            try:
                peak_extra = measure_memory(steps, restore)
            except KeyboardInterrupt:
                outcome.interrupted = True
        return outcome, peak_extra, left_out | failed
    finally:
        torch.set_num_threads(threads)


def measure_memory(steps: Mapping[str, Step], restore: Callable[[int], None]) -> dict[str, float]:
    """MiB that each step needs at its peak beyond what is there before it; empty where the system cannot say."""
    peaks = {}
    for name, step in steps.items():
        restore(0)
        gc.collect(1)
        # What the C library keeps for itself would hide the small allocations. Others than glibc have no such call.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            before = _status("VmHWM")
            step()
            peaks[name] = max(0, _status("VmHWM") - before) / 1024
        except (OSError, KeyError):
            return {}
    return peaks


def _status(key: str) -> int:
    """A size in KiB from /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def configurations(base: Mapping[str, Sequence[Any]], grid: bool, given: Iterable[str]) -> list[Configuration]:
    """Every combination of the values in ``base``; with ``grid``, the axes not ``given`` vary one at a time, too."""
    points = [Configuration(**dict(zip(base, values, strict=True))) for values in itertools.product(*base.values())]
    axes = {axis: values for axis, values in GRID.items() if grid and axis not in given}
    varied = [replace(point, **{axis: value}) for point in points for axis, values in axes.items() for value in values]
    for point in (unique := list(dict.fromkeys(points + varied))):
        race.check_k(point)
    return unique


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss",
        description="Race the loss against what it replaces, interleaved in one process; append medians and quartiles "
        "to a CSV, and plot it. Every backward has an upstream gradient that is not 1. Without options: the standard "
        f"configuration ({report.STANDARD}, and the same in bfloat16), in one to two minutes.",
        epilog="Several values of several options are raced in every combination, with --grid along each axis alone. "
        "Contenders: " + "; ".join(f"{name} ({c.what})" for name, c in CONTENDERS.items()),
        allow_abbrev=False,
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add = parser.add_argument
    add("--dtype", **several, choices=race.DTYPES, help=f"of {', '.join(race.DTYPES)} (float32 bfloat16)")
    add("--tokens", **several, type=positive, help="the rows N of the logits (512)")
    add("--vocab", **several, type=positive, help="the classes V (50257)")
    add("--k", **several, type=positive, help="(20)")
    add("--threads", **several, type=positive, help="(2, or 1 on a machine with one core)")
    add("--rows", **several, choices=GRID["rows"], help=f"what is in the logits: {', '.join(GRID['rows'])} (random)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="vary each axis that no option names, one at a time")
    kind.add_argument("--axes", action="store_true", help="race the two ends of each axis against each other instead")
    kind.add_argument("--plot-only", action="store_true", help="draw the plot, measure nothing")
    add("--contenders", **several, choices=CONTENDERS, help=f"see below (all but {', '.join(_on_request())})")
    add("--rounds", metavar="X", type=positive, default=21, help="steps of each contender (21)")
    add("--seed", metavar="X", type=int, default=0, help="of the logits and of the order in each round (0)")
    add("--huge-pages", choices=("off", "on", "both"), help=f"set {HUGE_PAGES} in a new process; default: as it is")
    add("--csv", metavar="PATH", type=Path, help="where to append (benchmarks/results/loss.csv, with --axes axes.csv)")
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory after the race")
    add("--no-plot", dest="plot", action="store_false", help="do not draw the plot beside the CSV")
    return parser


def _on_request() -> list[str]:
    return [name for name, contender in CONTENDERS.items() if contender.asked_for]


def measure(options: argparse.Namespace) -> int:
    """Race all configurations in this process, append to the CSV as they finish, print tables; the exit status."""
    given = {axis for axis in ("dtype", *GRID) if getattr(options, axis) is not None}
    standard = asdict(report.STANDARD) | {"dtype": None, "threads": min(report.STANDARD.threads, CORES)}
    base = {axis: getattr(options, axis) if axis in given else [value] for axis, value in standard.items()}
    if "dtype" not in given:
        base["dtype"] = ["float32", "bfloat16"]
    todo = configurations(base, options.grid, given)
    report.check_csv(options.csv, axes.COLUMNS if options.axes else report.COLUMNS)
    common = machine.describe_machine()
    announce(common)
    note_threads(base["threads"])
    default = [name for name in CONTENDERS if (CONTENDERS[name].native if options.axes else name not in _on_request())]
    names = list(dict.fromkeys(options.contenders or default))
    if options.axes:
        return axes.measure(todo, names, options.rounds, options.seed, options.csv, common)

    appended = 0
    for number, configuration in enumerate(todo, 1):
        outcome, peak_extra, left_out = run(configuration, names, options.rounds, options.seed, memory=options.memory)
        print(f"\n[{number}/{len(todo)}] {configuration}, {len(outcome.rounds)} rounds")
        print_left_out(left_out)
        if outcome.rounds:
            dated = {"date": machine.now(), **common, "waited": outcome.waited}
            measured = report.summarize(dated, configuration, outcome.rounds, peak_extra, list(CONTENDERS))
            report.append(options.csv, measured, report.COLUMNS)
            appended += len(measured)
            print(report.race_table(measured))
            targets = report.target_table(configuration, common["huge_pages"], outcome.rounds, outcome.waited)
            if targets:
                print(targets)
            note_waiting(outcome.waited)
        if outcome.interrupted:
            raise KeyboardInterrupt
    if not appended:
        raise BenchmarkError("none of the contenders can run here; choose others with --contenders")
    print(f"\n{appended} rows appended to {options.csv}")
    return 0


def measure_elsewhere(arguments: Sequence[str], setting: str) -> int:
    """The same command in a new process with the setting of huge pages, which torch reads only once."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {HUGE_PAGES: "1" if setting == "on" else "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "benchmarks.loss", *arguments, "--huge-pages", setting, "--no-plot"]
    sys.stdout.flush()
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the new process has it too, and saves what it measured
            continue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(arguments)
    options.csv = options.csv or (axes.CSV if options.axes else report.CSV)
    settings = {None: [huge_pages()], "both": ["off", "on"]}.get(options.huge_pages, [options.huge_pages])

    def program() -> int:
        for setting in [] if options.plot_only else settings:
            here = setting == huge_pages()
            if status := measure(options) if here else measure_elsewhere(arguments, setting):
                return status
        if options.plot_only or (options.plot and not options.axes):
            try:
                print("\n".join(str(path) for path in report.plot(options.csv)))
            except report.NothingToPlot as error:
                print(f"no plot: {error}")
                return int(options.plot_only)
        return 0

    return exit_status(program, options.csv)


if __name__ == "__main__":
    sys.exit(main())
