"""How contenders race: they take turns in one process, in a new order each round, on logits that were just written."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import machine
from .contenders import CONTENDERS, Step, native_unavailable
from .report import BenchmarkError, Configuration

WARM_UP = 2  # steps of each contender before the first round
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ROWS = ("random", "ascending", "equal", "two-values", "period-64")


class Turn(NamedTuple):
    """One contender in a race: ``prepare`` takes the number of the round and is not timed; ``step`` is."""

    prepare: Callable[[int], None]
    step: Callable[[], object]


@dataclass
class Outcome:
    """What a race gave: milliseconds, one list entry a complete round."""

    rounds: list[dict[Any, float]]
    waited: float | None = None  # seconds per second that threads waited for a core, which makes any time doubtful
    interrupted: bool = False


def race(
    turns: Mapping[Any, Turn],
    rounds: int,
    seed: int,
    description: str,
    parts: Callable[[], Mapping[Any, float]] = dict,
) -> Outcome:
    """Let the contenders take turns, ``rounds`` times each; an interrupt ends the race and keeps complete rounds.

    ``parts`` is asked after each round for further times to keep beside those of the steps.
    """
    order, shuffle = list(turns), random.Random(seed).shuffle
    outcome = Outcome([])
    gc.collect()
    gc.disable()  # a full collection takes a tenth of a second, and would hit whoever is running
    began, waited = perf_counter(), machine.waited()
    try:
        for number in tqdm(range(rounds), desc=description, unit="round", disable=None, leave=False):
            gc.collect(1)
            shuffle(order)
            times = {}
            for name in order:
                prepare, step = turns[name]
                prepare(number)
                start = perf_counter_ns()
                step()
                times[name] = (perf_counter_ns() - start) / 1e6
            outcome.rounds.append({**times, **parts()})
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        gc.enable()
    if waited is not None and (now := machine.waited()) is not None:
        outcome.waited = (now - waited) / (perf_counter() - began)
    return outcome


def make_logits(configuration: Configuration, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (N, V) in the configuration's dtype with the rows it asks for, and class indices (N,)."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = (configuration.tokens, configuration.vocab), DTYPES[configuration.dtype]
    target = torch.randint(configuration.vocab, shape[:1], generator=generator)
    if configuration.rows == "ascending":  # every class is a new maximum
        return torch.linspace(-10, 10, shape[1]).to(dtype).expand(shape).contiguous(), target
    if configuration.rows == "equal":
        return torch.ones(shape, dtype=dtype), target
    if configuration.rows == "two-values":
        return torch.randint(2, shape, generator=generator, dtype=torch.uint8).to(dtype), target
    logits = torch.randn(shape, generator=generator, dtype=dtype)
    if configuration.rows == "period-64":  # all large logits share few positions modulo a vector's length
        return logits.add_((torch.arange(shape[1]) % 64 < 10).to(dtype), alpha=10), target
    return logits.mul_(3), target


def choose(names: Sequence[str], configuration: Configuration, held: int = 2) -> tuple[list[str], dict[str, str]]:
    """Those of the contenders that can run the configuration here, and why the others cannot.

    ``held`` is how many copies of the logits there are throughout: themselves, and what they are restored from.
    """
    left_out: dict[str, str] = {}
    no_native = native_unavailable() if any(CONTENDERS[name].native for name in names) else None
    elements = configuration.tokens * configuration.vocab
    logits = elements * DTYPES[configuration.dtype].itemsize
    available = machine.available_memory()
    for name in names:
        copies = CONTENDERS[name].float32_copies * (1 + (configuration.dtype == "float64"))
        needed = held * logits + 4 * elements * copies
        if CONTENDERS[name].native and no_native is not None:
            left_out[name] = no_native
        elif available is not None and needed > available:
            left_out[name] = (
                f"needs about {needed / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB are available; "
                "use a smaller --tokens or --vocab"
            )
    return [name for name in names if name not in left_out], left_out


def warm_up(
    names: Sequence[str], logits: Tensor, target: Tensor, k: int, prepare: Callable[[int], None]
) -> tuple[dict[str, Step], dict[str, str]]:
    """The contenders' steps, run before they are timed; and whoever cannot run, with the reason."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    losses: dict[str, float] = {}
    for name in names:
        try:
            step = CONTENDERS[name].prepare(logits, target, k)
            for number in range(WARM_UP):
                prepare(number)
                loss = step()
        except Exception as error:
            if not CONTENDERS[name].may_fail:
                raise
            left_out[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            continue
        steps[name] = step
        if CONTENDERS[name].prsl and loss is not None:
            losses[name] = float(loss)
    check_losses(losses, 1e-5)
    return steps, left_out


def check_losses(losses: Mapping[str, float], tolerance: float) -> None:
    """Raise where contenders differ in what they compute: a race between them would mean nothing.

    This sees gross errors alone, since the penalty is small; NaN as well.
    """
    first = next(iter(losses.values()), 0.0)
    if not all(abs(loss - first) <= tolerance * max(1, abs(first)) for loss in losses.values()):
        raise BenchmarkError(
            f"the contenders do not compute the same loss: {dict(losses)}; mend that before timing them"
        )


def check_k(configuration: Configuration) -> None:
    """Raise where the vocabulary has too few classes for k."""
    if configuration.k >= configuration.vocab:
        raise BenchmarkError(
            f"--k {configuration.k} does not go with --vocab {configuration.vocab}: k must be between 1 and V - 1; "
            "choose a smaller k or a larger vocabulary"
        )
