"""The two ends of an axis raced against each other: how the kernel's time depends on V, k, threads and the rows.

The contenders of both ends take turns in one process, on the same memory, and with as many logits as the other end, so
that what the machine does meanwhile, and which pages the logits got, slows both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine, race, report
from .cli import note_waiting, print_left_out
from .contenders import CONTENDERS
from .report import BenchmarkError, Configuration

CSV = report.CSV.with_name("axes.csv")
# N, V, k, threads and rows are those with the value; with the other one, V, k, threads or rows is as in `against`, and
# N such that N * V stays. The ratio is that of the times per element.
COLUMNS = (
    *report.COMMON,
    *("dtype", "axis", "value", "against", "N", "V", "k", "threads", "rows", "contender", "rounds"),
    *("median_ms", "p25_ms", "p75_ms", "against_median_ms", "against_p25_ms", "against_p75_ms"),
    *("ratio", "ratio_p25", "ratio_p75", "target", "waited"),
)


@dataclass(frozen=True)
class Pair:
    """Two values of one axis, and the most that the first may take, as a multiple of the second, per element."""

    axis: str
    value: Any
    against: Any
    limit: float | None = None

    def __str__(self) -> str:
        return f"{self.axis} {_text(self.value)} / {_text(self.against)}"

    def ends(self, base: Configuration) -> tuple[Configuration, Configuration]:
        """The two configurations around ``base``, with equally many logits where whole rows allow it."""
        here, there = (replace(base, **{self.axis: end}) for end in (self.value, self.against))
        if self.axis == "vocab":
            here = replace(here, tokens=max(1, round(base.tokens * base.vocab / here.vocab)))
            there = replace(there, tokens=max(1, round(here.tokens * here.vocab / there.vocab)))
        return here, there


PAIRS = (
    Pair("vocab", 262_144, 32_768, 1.4),
    Pair("k", 100, 6, 1.2),
    Pair("threads", 2, 1, 1 / 1.7),
    Pair("rows", "ascending", "random", 2.0),
    Pair("rows", "equal", "random", 2.0),
    Pair("rows", "two-values", "random", 2.0),
    Pair("rows", "period-64", "random", 2.0),
)

Times = Mapping[tuple[str, str], float]  # by the contender and the end, "here" or "there"


def run(ends: Sequence[Configuration], names: Sequence[str], rounds: int, seed: int) -> race.Outcome:
    """Race the contenders at both ends."""
    threads = torch.get_num_threads()
    # Both ends have the same memory: the pages would be other ones, and stay so throughout the race.
    buffer = torch.empty(max(end.tokens * end.vocab for end in ends), dtype=race.DTYPES[ends[0].dtype])
    turns: dict[tuple[str, str], race.Turn] = {}
    try:
        for place, end in zip(("here", "there"), ends, strict=True):
            pristine, target = race.make_logits(end, seed)
            logits = buffer[: pristine.numel()].view(pristine.shape).requires_grad_()
            prepare = _prepare(end.threads, logits, pristine)
            steps, _ = race.warm_up(names, logits, target, end.k, prepare)
            turns |= {(name, place): race.Turn(prepare, step) for name, step in steps.items()}
        return race.race(turns, rounds, seed, f"{ends[0]} / {ends[1]}")
    finally:
        torch.set_num_threads(threads)


def _prepare(threads: int, logits: Tensor, pristine: Tensor) -> Callable[[int], None]:
    def prepare(_: int) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            logits.copy_(pristine)  # which wakes the threads, too

    return prepare


def summarize(
    common: Mapping[str, Any], base: Configuration, pair: Pair, names: Sequence[str], rounds: Sequence[Times]
) -> list[dict[str, Any]]:
    """The rows of the CSV for one pair, one a contender."""
    here, there = pair.ends(base)
    elements = there.tokens * there.vocab / (here.tokens * here.vocab)
    where = {"dtype": here.dtype, "N": here.tokens, "V": here.vocab, "k": here.k, "threads": here.threads}
    where |= {"rows": here.rows, "axis": pair.axis, "value": pair.value, "against": pair.against}
    rows = []
    for name in names:
        row = {**common, **where, "contender": name, "rounds": len(rounds)}
        for place, prefix in (("here", ""), ("there", "against_")):
            low, median, high = report.quartiles(times[name, place] for times in rounds)
            row |= {f"{prefix}p25_ms": low, f"{prefix}median_ms": median, f"{prefix}p75_ms": high}
        ratios = (times[name, "here"] / times[name, "there"] for times in rounds)
        low, median, high = report.quartiles(elements * ratio for ratio in ratios)
        row |= {"ratio": median, "ratio_p25": low, "ratio_p75": high}
        rows.append(row | {"target": pair.limit if CONTENDERS[name].native else None})
    return rows


def axes_table(base: Configuration, rows: Sequence[Mapping[str, Any]]) -> str:
    """The ratios of all pairs around one base, against their targets."""
    cells = [
        (
            str(Pair(row["axis"], row["value"], row["against"])),
            row["contender"],
            f"{row['median_ms']:.2f}",
            f"{row['against_median_ms']:.2f}",
            *report.judge((row["ratio_p25"], row["ratio"], row["ratio_p75"]), row["target"], row["waited"]),
            "" if row["waited"] is None else f"{row['waited']:.0%}",
        )
        for row in rows
    ]
    header = ("time per element", "contender", "median ms", "against ms", "ratio", *report.JUDGED[1:], "waited")
    return report.table(f"along the axes, else {base}, {rows[0]['rounds']} rounds:", header, cells)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def measure(
    bases: Sequence[Configuration], names: Sequence[str], rounds: int, seed: int, csv: Path, common: Mapping[str, Any]
) -> int:
    """Race all pairs around each base, append to the CSV as they finish, print a table for each; the exit status."""
    if compiled := [name for name in names if CONTENDERS[name].may_fail]:
        raise BenchmarkError(f"--axes changes the configuration at every step, for which {compiled} would be compiled")
    for end in (end for base in bases for pair in PAIRS for end in pair.ends(base)):
        race.check_k(end)
    appended, interrupted = 0, False
    for base in bases:
        rows: list[dict[str, Any]] = []
        print(flush=True)
        for pair in PAIRS:
            ends = pair.ends(base)
            if pair.axis == "threads" and max(pair.value, pair.against) > machine.CORES:
                print(f"left out: {pair} (it takes more cores than the {machine.CORES} here)")
                continue
            able, left_out = race.choose(names, max(ends, key=lambda end: end.tokens * end.vocab), held=3)
            print_left_out({f"{name} at {pair}": why for name, why in left_out.items()})
            outcome = run(ends, able, rounds, seed) if able else race.Outcome([])
            if outcome.rounds:
                dated = {"date": machine.now(), **common, "waited": outcome.waited}
                rows += (new := summarize(dated, base, pair, able, outcome.rounds))
                report.append(csv, new, COLUMNS)
            if interrupted := outcome.interrupted:
                break
        if rows:
            print(axes_table(base, rows))
            note_waiting(max((row["waited"] or 0) for row in rows))
        if interrupted:
            raise KeyboardInterrupt
        appended += len(rows)
    if not appended:
        raise BenchmarkError("none of the contenders can run here; choose others with --contenders")
    print(f"\n{appended} rows appended to {csv}")
    return 0
