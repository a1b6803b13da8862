"""Race the loss from hidden states against the ones with whole logits: ``python -m benchmarks.linear``.

A step is the loss from hidden states (N, H) and a vocabulary matrix (V, H), and its backward with an upstream gradient
that is not 1, to both. The gradients are given back at its end. The contenders take turns in one process, in a new
order each round. Peak memory is what a step needs beyond what is there before it, its gradients included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prsl_kernels import linear_prsl_cross_entropy, prsl_cross_entropy

from . import machine, race, report
from .cli import announce, exit_status, note_threads, note_waiting, positive
from .contenders import UPSTREAM, B, Step
from .loss import measure_memory

CSV = report.CSV.with_name("linear.csv")
COLUMNS = (
    *report.COMMON,
    *("dtype", "N", "H", "V", "k", "threads", "contender", "rounds", "median_ms", "p25_ms", "p75_ms"),
    *("ratio_to_cross_entropy", "ratio_p25", "ratio_p75", "peak_extra_mib", "peak_share_of_logits", "waited"),
)
REFERENCE = "linear + cross-entropy"

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _torch_chunked(x: Tensor, matrix: Tensor, target: Tensor, k: int) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    return F.linear_cross_entropy(x, matrix, target, options=LinearCrossEntropyOptions())


LOSSES: dict[str, Loss] = {
    REFERENCE: lambda x, matrix, target, k: F.cross_entropy(F.linear(x, matrix), target),
    "torch, chunked": _torch_chunked,
    "linear + prsl": lambda x, matrix, target, k: prsl_cross_entropy(F.linear(x, matrix), target, k=k, b=B),
    "linear-prsl": lambda x, matrix, target, k: linear_prsl_cross_entropy(x, matrix, target, k=k, b=B),
    "linear-prsl, per token": lambda x, matrix, target, k: linear_prsl_cross_entropy(
        x, matrix, target, k=k, b=B, reduction="none"
    ).mean(),
    "linear-prsl, eager": lambda x, matrix, target, k: linear_prsl_cross_entropy(
        x, matrix, target, k=k, b=B, backend="eager"
    ),
}


def step_of(loss_of: Loss, x: Tensor, matrix: Tensor, target: Tensor, k: int) -> Step:
    """Forward, backward, and the gradients given back."""

    def step() -> Tensor:
        loss = loss_of(x, matrix, target, k)
        loss.backward(torch.full_like(loss, UPSTREAM))
        x.grad = matrix.grad = None
        return loss.detach()

    return step


def run(options: argparse.Namespace, dtype: str) -> tuple[race.Outcome, dict[str, float]]:
    """The race, and the MiB that each contender needs beyond what is there."""
    generator = torch.Generator().manual_seed(options.seed)
    of = race.DTYPES[dtype]
    x = torch.randn(options.tokens, options.width, generator=generator).to(of).requires_grad_()
    # Logits with a standard deviation of 3, as in the race of the losses.
    matrix = torch.randn(options.vocab, options.width, generator=generator).mul_(3 / options.width**0.5)
    matrix = matrix.to(of).requires_grad_()
    target = torch.randint(options.vocab, (options.tokens,), generator=generator)
    steps, losses = {}, {}
    for name in options.contenders or LOSSES:
        if name == "torch, chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            print(f"left out: {name} (torch {torch.__version__} has none)")
            continue
        steps[name] = step_of(LOSSES[name], x, matrix, target, options.k)
        loss = steps[name]()
        if "prsl" in name and loss is not None:  # torch's loss of bfloat16 has three digits
            losses[name] = float(loss)
    race.check_losses(losses, 1e-5)
    turns = {name: race.Turn(lambda _: None, step) for name, step in steps.items()}
    outcome = race.race(turns, options.rounds, options.seed, dtype)
    return outcome, {} if outcome.interrupted else measure_memory(steps, lambda _: None)


def summarize(
    common: Mapping[str, Any],
    options: argparse.Namespace,
    dtype: str,
    rounds: Sequence[Mapping[str, float]],
    peaks: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The rows of the CSV, one a contender."""
    where = {"dtype": dtype, "N": options.tokens, "H": options.width, "V": options.vocab, "k": options.k}
    itemsize = race.DTYPES[dtype].itemsize
    gradients = (options.tokens + options.vocab) * options.width * itemsize
    logits = options.tokens * options.vocab * itemsize
    rows = []
    for name in (name for name in LOSSES if name in rounds[0]):
        low, median, high = report.quartiles(times[name] for times in rounds)
        row = {**common, **where, "threads": torch.get_num_threads(), "contender": name, "rounds": len(rounds)}
        row |= {"median_ms": median, "p25_ms": low, "p75_ms": high}
        ratio = report.paired_ratio(rounds, name, REFERENCE) or (None, None, None)
        row |= {"ratio_to_cross_entropy": ratio[1], "ratio_p25": ratio[0], "ratio_p75": ratio[2]}
        if name in peaks:
            row |= {"peak_extra_mib": peaks[name], "peak_share_of_logits": (peaks[name] * 2**20 - gradients) / logits}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times, ratios within rounds, and memory beyond the gradients as a share of the logits."""
    cells = []
    for row in rows:
        ratio, share = row["ratio_to_cross_entropy"], row.get("peak_share_of_logits")
        cells.append(
            (
                row["contender"],
                f"{row['median_ms']:.0f}",
                "" if ratio is None else f"{ratio:.2f} ({row['ratio_p25']:.2f}-{row['ratio_p75']:.2f})",
                "" if share is None else f"{row['peak_extra_mib']:.0f}",
                "" if share is None else f"{share:.2f}",
            )
        )
    header = ("contender", "median ms", f"ratio to {REFERENCE}", "peak MiB", "beyond gradients / logits")
    return report.table("", header, cells)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear",
        description="Race the loss from hidden states against the ones with whole logits, interleaved in one process; "
        "append medians and quartiles to a CSV. Every backward has an upstream gradient that is not 1.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dtype", nargs="+", metavar="X", choices=race.DTYPES, default=["float32", "bfloat16"], help="(both of these)")
    add("--tokens", metavar="X", type=positive, default=2048, help="rows N (2048)")
    add("--width", metavar="X", type=positive, default=256, help="of the hidden states, H (256)")
    add("--vocab", metavar="X", type=positive, default=50_257, help="classes V (50257)")
    add("--k", metavar="X", type=positive, default=20, help="(20)")
    add("--threads", metavar="X", type=positive, default=min(2, machine.CORES), help="(2, or 1 on one core)")
    add("--contenders", nargs="+", metavar="X", choices=LOSSES, help=f"of {', '.join(map(repr, LOSSES))} (all)")
    add("--rounds", metavar="X", type=positive, default=9, help="steps of each contender (9)")
    add("--seed", metavar="X", type=int, default=0, help="of the numbers and of the order in each round (0)")
    add("--csv", metavar="PATH", type=Path, default=CSV, help="where to append (benchmarks/results/linear.csv)")
    return parser


def measure(options: argparse.Namespace) -> int:
    """Race in every dtype, append to the CSV, print tables; the exit status."""
    if options.k >= options.vocab:
        raise report.BenchmarkError(f"--k {options.k} does not go with --vocab {options.vocab}: choose a smaller k")
    report.check_csv(options.csv, COLUMNS)
    common = machine.describe_machine()
    announce(common)
    note_threads([options.threads])
    torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        outcome, peaks = run(options, dtype)
        if outcome.rounds:
            dated = {"date": machine.now(), **common, "waited": outcome.waited}
            rows = summarize(dated, options, dtype, outcome.rounds, peaks)
            report.append(options.csv, rows, COLUMNS)
            sizes = f"{options.tokens} x {options.width} x {options.vocab:,}, k = {options.k}"
            print(f"\n{dtype} {sizes}, {options.threads} threads, {len(outcome.rounds)} rounds\n{table(rows)}")
            note_waiting(outcome.waited)
        if outcome.interrupted:
            raise KeyboardInterrupt
    print(f"\nappended to {options.csv}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        return exit_status(lambda: measure(options), options.csv)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
