"""How many rows take the exact, slow path of the Triton kernels: ``python -m benchmarks.slow_path``.

The selection of the fast path is done over in PyTorch, for thousands of rows at a time, with the kernels' constants. A
test compares the marks with those of the kernels themselves. Random logits are independent, and real ones are not:
neighbouring classes of a vocabulary resemble each other, and the groups of the kernels are of neighbours.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ahead_of_time, machine, report
from .ahead_of_time import DTYPES
from .cli import exit_status, positive, print_left_out
from .report import BenchmarkError

LOWEST = -1e37  # what the kernels take for -inf; rows without a larger logit go the slow way
DEVIATION = 3.0  # of a row's logits: that of language models is 2 to 4
BLOCK = 256  # rows at a time


@dataclass(frozen=True)
class Selection:
    """The constants of the fast path.

    A row's classes, from the first one at a multiple of 16 bytes, are cut into groups of ``vec``, and these go round
    over ``slots``, in ``parts`` of ``span`` groups. A slot keeps the ``keep`` largest group maxima, with the number of
    the round in their lowest ``bits``; a list has places for ``capacity`` groups.
    """

    vec: int
    slots: int
    keep: int
    capacity: int
    bits: int
    parts: int
    span: int

    @classmethod
    def of_kernels(cls, rows: int, classes: int, dtype: torch.dtype, k: int, processors: int = 132) -> Selection:
        """What the kernels take on a GPU with so many multiprocessors (132: an H100)."""
        ahead_of_time.needs_triton()
        from prsl_kernels.backends.triton import Hardware, choices

        c = choices(rows, classes, dtype, k, Hardware(processors))
        if c.exact:
            raise BenchmarkError(f"with k = {k} and {dtype} every row takes the exact path")
        return cls(c.vec, c.unroll * c.lanes, c.keep, c.capacity, c.bits, c.parts, c.span)


@dataclass
class Marks:
    """Why rows are slow, a mark for each row."""

    dropped: Tensor  # a slot may have lost a member
    tied: Tensor  # no cut leaves a list of the right length
    lowest: Tensor  # no logit is above LOWEST

    @property
    def slow(self) -> Tensor:
        return self.dropped | self.tied | self.lowest


def slow_rows(logits: Tensor, target: Tensor, k: int, selection: Selection, start: int = 0) -> Marks:
    """Which rows of contiguous logits (N, V) the kernels would mark; the first one begins ``start`` rows in memory."""
    rows, classes = logits.shape
    offset = (torch.arange(rows) + start) * classes % selection.vec
    first = (selection.vec - offset) % selection.vec
    marks = Marks(*(torch.zeros(rows, dtype=torch.bool) for _ in range(3)))
    for begin in first.unique().tolist():
        for chosen in (first == begin).nonzero().squeeze(1).split(BLOCK):
            found = _marks(logits[chosen], target[chosen], k, selection, begin)
            for name, mark in zip(("dropped", "tied", "lowest"), found, strict=True):
                getattr(marks, name)[chosen] = mark
    return marks


def _marks(logits: Tensor, target: Tensor, k: int, selection: Selection, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The marks of rows whose group 0 begins at class ``first``."""
    bits = selection.bits
    whole = (logits.shape[1] - first) // selection.vec
    groups = logits[:, first : first + whole * selection.vec].unflatten(1, (whole, selection.vec)).amax(2).float()
    groups = groups.clamp_min(LOWEST)
    dropped = torch.full((len(logits),), -torch.inf)
    tied = torch.zeros(len(logits), dtype=torch.bool)
    for part in range(selection.parts):
        best = _best(groups[:, part * selection.span : (part + 1) * selection.span], selection)
        dropped = torch.maximum(dropped, best[:, -1].amax(1))
        kept = best.flatten(1).sort(1, descending=True).values
        limit = selection.capacity - 2
        if kept.shape[1] > limit:
            # A cut between two buckets leaves k + 1 to `limit` groups, or there is no such cut.
            too_many = kept[:, limit] > LOWEST * 0.99
            tied |= too_many & (_bucket(kept[:, k], bits) == _bucket(kept[:, limit], bits))
    others = logits.float().scatter(1, target.unsqueeze(1), -torch.inf)
    threshold = others.topk(k, dim=1).values[:, -1]
    top = logits.float().amax(1)
    return _bucket(dropped, bits) >= _bucket(threshold, bits), tied, top <= LOWEST


def _best(groups: Tensor, selection: Selection) -> Tensor:
    """The maxima (N, keep, slots) that the slots keep of groups (N, ...), the largest first."""
    rounds = max(1, math.ceil(groups.shape[1] / selection.slots))
    numbers = torch.arange(groups.shape[1], dtype=torch.int32) // selection.slots
    keys = (groups.view(torch.int32) & (-1 << selection.bits) | numbers).view(torch.float32)
    keys = torch.nn.functional.pad(keys, (0, rounds * selection.slots - keys.shape[1]), value=LOWEST)
    keys = keys.unflatten(1, (rounds, selection.slots))
    missing = max(0, selection.keep - rounds)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=LOWEST)
    return keys.topk(selection.keep, dim=1).values


def _bucket(value: Tensor, bits: int) -> Tensor:
    """Integers in the order of float32 numbers, one for all that differ in their lowest bits alone."""
    integers = value.view(torch.int32)
    return (integers ^ ((integers >> 31) & 0x7FFFFFFF)) >> bits


# ---- logits ----------------------------------------------------------------------------------------------------------

Blocks = Iterator[tuple[Tensor, Tensor]]  # logits (n, V) in float32, and the targets


def random_rows(rows: int, classes: int, seed: int) -> Blocks:
    """Independent normal logits, and any class for the target."""
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, rows, BLOCK):
        size = min(BLOCK, rows - begin)
        logits = DEVIATION * torch.randn(size, classes, generator=generator)
        yield logits, torch.randint(classes, (size,), generator=generator)


def minilm_rows(rows: int, seed: int) -> Blocks:
    """Hidden states of captions in MiniLM against its embeddings of 30,522 words, scaled to a usual deviation.

    Its output layer was not trained, so these are no predictions; but neighbouring words are as alike as in any
    WordPiece vocabulary, whose order is that of frequency. The target is the next word of the caption.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    from prsl_kernels.experiments.data.openmoji import captions
    from prsl_kernels.experiments.data.packages import encoder_directory
    from prsl_kernels.experiments.errors import UserError

    try:
        folder = encoder_directory()
    except UserError as error:
        raise BenchmarkError(f"MiniLM is not in the cache: {error}") from None
    logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = model.get_input_embeddings().weight
    texts = sorted(set(captions().values()))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    left = rows
    for begin in range(0, len(order), 32):
        inputs = tokenizer([texts[i] for i in order[begin : begin + 32]], padding=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        next_word = inputs["input_ids"].roll(-1, 1)
        real = inputs["attention_mask"].bool() & inputs["attention_mask"].roll(-1, 1).bool()
        real[:, -1] = False
        logits = hidden[real][:left] @ embeddings.T
        yield logits * (DEVIATION / logits.std(1, keepdim=True)), next_word[real][:left]
        left -= len(logits)
        if left <= 0:
            return


def base_rows(task: str, rows: int, seed: int) -> Blocks:
    """The logits of a shipped base, 2,048 words, on the demo's data, with the words of the references as targets."""
    from transformers.utils import logging

    from .step import demo

    logging.set_verbosity_error()  # a decoder's padding needs no mask here
    logging.disable_progress_bar()
    subject = demo(task, argparse.Namespace(batch=None, seed=seed))
    left = rows
    for batch in subject.batches:
        labels = batch["labels"]
        logits = subject.model(**batch).logits[labels != -100][:left]
        yield logits, labels[labels != -100][:left]
        left -= len(logits)
        if left <= 0:
            return


SOURCES: dict[str, Callable[[argparse.Namespace], Blocks]] = {
    "random": lambda options: random_rows(options.rows, options.vocab, options.seed),
    "minilm": lambda options: minilm_rows(options.rows, options.seed),
    "captions": lambda options: base_rows("captions", options.rows, options.seed),
    "vqa": lambda options: base_rows("vqa", options.rows, options.seed),
}


@torch.no_grad()
def count(blocks: Blocks, dtypes: Sequence[str], ks: Sequence[int]) -> list[dict[str, Any]]:
    """How many of the rows are slow, for each dtype and k."""
    totals: dict[tuple[str, int], dict[str, Any]] = {}
    seen = 0
    for logits, target in blocks:
        for dtype in dtypes:
            rounded = logits.to(DTYPES[dtype])
            for k in (k for k in ks if k < logits.shape[1]):
                # As for a large batch: of few rows, each is split over programs, whose slots are then less crowded.
                selection = Selection.of_kernels(8192, logits.shape[1], rounded.dtype, k)
                marks = slow_rows(rounded, target, k, selection, seen)
                about = {"dtype": dtype, "k": k, "V": logits.shape[1], "selection": selection}
                total = totals.setdefault((dtype, k), about | {"rows": 0, "slow": 0, "tied": 0})
                total["rows"] += len(target)
                total["slow"] += int(marks.slow.sum())
                total["tied"] += int(marks.tied.sum())
        seen += len(target)
    return list(totals.values())


def random_share(dtype: str, classes: int, k: int, rows: int = 1024, seed: int = 0) -> float:
    """The share of random rows that are slow; all are where there is no other path."""
    try:
        Selection.of_kernels(rows, classes, DTYPES[dtype], k)
    except BenchmarkError:
        return 1.0
    (total,) = count(random_rows(rows, classes, seed), [dtype], [k])
    return total["slow"] / total["rows"]


# ---- the program -----------------------------------------------------------------------------------------------------


def slow_table(name: str, totals: Sequence[Mapping[str, Any]]) -> str:
    """A line for each dtype and k."""
    rows = []
    for total in totals:
        selection = total["selection"]
        numbers = (selection.vec, selection.slots, selection.keep, selection.capacity)
        share = f"{total['slow'] / total['rows']:.2%}"
        counts = (f"{total['rows']:,}", f"{total['slow']:,}", share, f"{total['tied']:,}")
        rows.append((total["dtype"], str(total["k"]), f"{total['V']:,}", *map(str, numbers), *counts))
    header = ("dtype", "k", "V", "vec", "slots", "keep", "capacity", "rows", "slow", "share", "of them by ties")
    return report.table(f"{name} logits:", header, rows)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_path",
        description="Count the rows that the Triton kernels would do over on their exact path, on random logits and on "
        "those of real models.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--logits", nargs="+", choices=SOURCES, default=list(SOURCES), help="random or of these models (all)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="(bf16 and fp32)")
    add("--k", nargs="+", metavar="X", type=positive, default=[6, 20, 100], help="(6 20 100)")
    add("--rows", metavar="X", type=positive, default=4096, help="of each, at most (4096)")
    add("--vocab", metavar="X", type=positive, default=50_257, help="classes of random logits (50257)")
    add("--seed", metavar="X", type=int, default=0, help="(0)")
    return parser


def measure(options: argparse.Namespace) -> int:
    """Count and print; the exit status."""
    ahead_of_time.needs_triton()
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(options.logits):
        try:
            totals = count(SOURCES[name](options), options.dtype, options.k)
        except BenchmarkError as error:
            left_out[name] = str(error)
            continue
        print(slow_table(name, totals), flush=True)
    print_left_out(left_out)
    return 1 if len(left_out) == len(set(options.logits)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: measure(options), machine.ROOT)


if __name__ == "__main__":
    sys.exit(main())
