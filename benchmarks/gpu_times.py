"""What a step of the loss costs on the GPU beside what it replaces: a part of the GPU check.

As on the CPU (race.py): all contenders take turns in one process, in a new order each round, on logits that were just
written. CUDA events time them. Before each turn the L2 cache is overwritten, and the GPU is kept busy until the host
has queued the whole step, so that the events hold the GPU's time and not Python's; `wall_ms` is the time of a step with
everything that Python does, up to the GPU's last word.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prsl_kernels import prsl_cross_entropy

from .contenders import UPSTREAM, B, Step, naive_prsl, training_step
from .gpu_parts import Emit, Record, Setting, words
from .race import DTYPES, WARM_UP, check_losses
from .report import paired_ratio, quartiles

Loss = Callable[[Tensor, Tensor, int], Tensor]
PHASES = ("forward", "backward", "both")
AGAINST = ("cross-entropy", "liger", "copy")  # what ratios are taken to
# How often the logits' bytes cross the memory bus at the least, where backward computes the gradient anew from them.
PASSES = {"forward": 1, "backward": 2, "both": 3, "copy": 2}
BUSY_CYCLES = 4_000_000  # two milliseconds: longer than Python takes for a step
WALL_STEPS = 7
ALIGNED = 50_304  # GPT-2's vocabulary up to a multiple of 64

LEFT_OUT = {
    "cut-cross-entropy": "it takes hidden states and the vocabulary's matrix and never has logits, which are what is "
    "raced here; it is to be raced against a matrix product with the loss behind it, or a fused linear PRSL"
}
NOTES = {
    "bytes": "logits read once in forward, read and gradient written once in backward, copy read and write; gb_per_s "
    "is these bytes over the time, for every contender, whatever it moves in fact",
    "liger": "its forward computes the gradient in place of the logits, and waits for the GPU to count the targets; "
    "its backward multiplies by the upstream gradient, which is never 1 here",
    "copy": "copy_() of the logits into a buffer that exists",
    "wall_ms": "median of a forward and backward with the host's work, from an idle GPU to an idle GPU",
    "peak_extra_mib": "torch's allocations at their peak in forward and backward, beyond what is there before",
}


@dataclass(frozen=True)
class Contender:
    """What is raced; ``losses`` makes its loss, or raises where it cannot run."""

    what: str
    losses: Callable[[Setting], Loss]
    prsl: bool = False  # its loss must be that of the others
    main_only: bool = False
    few_points: bool = False  # takes half a minute to compile


def _prsl(backend: str, *, inplace: bool = False) -> Callable[[Setting], Loss]:
    def loss(logits: Tensor, target: Tensor, k: int) -> Tensor:
        return prsl_cross_entropy(logits, target, k=k, b=B, backend=backend, inplace_backward=inplace)

    return lambda setting: loss


def _cross_entropy(setting: Setting) -> Loss:
    return lambda logits, target, k: F.cross_entropy(logits, target)


def _compiled(setting: Setting) -> Loss:
    torch.compiler.reset()  # after a few configurations the compiler would take the next one for a reason to stop
    # Without a GPU only that it is called: a C++ compiler's half minute would say nothing.
    compiled: Loss = torch.compile(
        naive_prsl, fullgraph=True, dynamic=False, backend="aot_eager" if setting.dry else "inductor"
    )
    return compiled


def _liger(setting: Setting) -> Loss:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def loss(logits: Tensor, target: Tensor, k: int) -> Tensor:
        result = LigerCrossEntropyFunction.apply(logits, target, None)
        return result[0] if isinstance(result, tuple) else result

    return loss


CONTENDERS: dict[str, Contender] = {
    "prsl": Contender("the Triton kernels, a gradient of its own", _prsl("triton"), prsl=True),
    "prsl-inplace": Contender(
        "the Triton kernels, the gradient in the logits' storage", _prsl("triton", inplace=True), prsl=True
    ),
    "native": Contender("the compiled extension", _prsl("native"), prsl=True),
    "cross-entropy": Contender("F.cross_entropy", _cross_entropy),
    "liger": Contender("Liger-Kernel's cross entropy", _liger),
    "naive": Contender("PRSL in plain PyTorch", lambda setting: naive_prsl, prsl=True, main_only=True),
    "naive-compiled": Contender("torch.compile of it", _compiled, prsl=True, main_only=True, few_points=True),
}


@dataclass(frozen=True)
class Point:
    """One race."""

    sweep: str  # main, k, vocab or rows
    dtype: str
    tokens: int
    vocab: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.sweep}: {self.dtype} {self.tokens:,} x {self.vocab:,}, k = {self.k}"


def points(dry: bool) -> list[Point]:
    """What is raced, the most important first."""
    if dry:
        main = [Point("main", "bfloat16", 3, 1000, 20), Point("main", "float32", 3, 1000, 20)]
        return [*main, Point("k", "bfloat16", 3, 1000, 6), Point("vocab", "bfloat16", 2, 1500, 20)]
    shape = (4096, 50_257)
    elements = shape[0] * shape[1]
    main = [
        Point("main", "bfloat16", *shape, 20),
        Point("main", "float32", *shape, 20),
        Point("main", "bfloat16", 4096, ALIGNED, 20),
    ]
    vocab = [2048, 32_000, 50_257, 128_256, 262_144]
    return [
        *main,
        *(Point("vocab", "bfloat16", elements // v, v, 20) for v in vocab),
        *(Point("rows", "bfloat16", rows, 262_144, 20) for rows in (1, 8, 64)),
        *(Point("k", "bfloat16", *shape, k) for k in (1, 6, 20, 50, 100, 128, 500)),
    ]


# ---- clocks ----------------------------------------------------------------------------------------------------------


class _Clock:
    """Wall time, for a dry run."""

    def time(self, step: Callable[[], object]) -> Callable[[], float]:
        """Run a step; the function gives its milliseconds, once `wait` has returned."""
        start = perf_counter()
        step()
        took = (perf_counter() - start) * 1e3
        return lambda: took

    def wait(self) -> None:
        """Until all that was timed has run."""


class _EventClock(_Clock):
    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 1 << 26
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device="cuda")

    def time(self, step: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        step()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


# ---- a race ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One entry in a race; only ``step`` is timed, and takes what ``prepare`` has given."""

    prepare: Callable[[], Any]
    step: Callable[[Any], object]


def interleave(turns: Mapping[str, Turn], rounds: int, seed: int, clock: _Clock, setting: Setting) -> list[Any]:
    """Milliseconds of each turn, one mapping a round; fewer rounds where the time is up."""
    order, shuffle = list(turns), random.Random(seed).shuffle
    times: list[dict[str, float]] = []
    gc.collect()
    gc.disable()
    try:
        while len(times) < rounds and (not times or setting.left() > 0):
            shuffle(order)
            readings = {}
            for name in order:
                prepared = turns[name].prepare()
                readings[name] = clock.time(partial(turns[name].step, prepared))
                del prepared
            clock.wait()
            times.append({name: reading() for name, reading in readings.items()})
    finally:
        gc.enable()
    return times


@dataclass
class Race:
    """A point, its logits, and the contenders that can run it."""

    setting: Setting
    point: Point

    def __post_init__(self) -> None:
        device = self.setting.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.point.tokens, self.point.vocab)
        dtype = DTYPES[self.point.dtype]
        self.pristine = torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(3)
        self.target = torch.randint(shape[1], shape[:1], device=device, generator=generator)
        self.logits = self.pristine.clone().requires_grad_()
        self.steps: dict[str, Step] = {}
        self.losses: dict[str, Loss] = {}
        self.left_out: dict[str, str] = {}
        self.values: dict[str, float] = {}

    def restore(self) -> None:
        """Logits as they were: the contenders in place destroy them."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)

    def warm_up(self) -> None:
        """Run each contender, which compiles; whoever cannot run is left out with the reason."""
        for name, contender in CONTENDERS.items():
            if contender.main_only and self.point.sweep != "main":
                continue
            if contender.few_points and self.point.vocab == ALIGNED:
                continue
            if self.setting.left() <= 0:
                self.left_out[name] = "the time of this part was up"
                continue
            try:
                loss = contender.losses(self.setting)
                step = training_step(loss, self.logits, self.target, self.point.k)
                for _ in range(WARM_UP):
                    self.restore()
                    value = step()
                self.setting.wait()
            except Exception as error:  # whatever another library may raise; a broken device shows in the next turn
                self.logits.grad = None
                self.left_out[name] = words(error)
                continue
            self.steps[name], self.losses[name] = step, loss
            if contender.prsl and value is not None:
                self.values[name] = float(value)
            if not self.setting.dry:
                torch.cuda.empty_cache()

    def turns(self) -> dict[str, Turn]:
        """Forward, backward and both of each contender, and the copy."""
        buffer = torch.empty_like(self.pristine)
        turns = {"copy copy": Turn(self.restore, lambda _: buffer.copy_(self.pristine))}
        for name in self.steps:
            turns |= {f"{name} {phase}": turn for phase, turn in self._phases(name).items()}
        return turns

    def _phases(self, name: str) -> dict[str, Turn]:
        logits, target, k = self.logits, self.target, self.point.k
        loss, step = self.losses[name], self.steps[name]

        def forward(_: object = None) -> Tensor:
            return loss(logits, target, k)

        def restore_and_forward() -> Tensor:
            self.restore()
            return forward()

        def backward(value: Tensor) -> None:
            value.backward(torch.full_like(value, UPSTREAM))
            logits.grad = None

        both = Turn(self.restore, lambda _: step())
        phases = (Turn(self.restore, forward), Turn(restore_and_forward, backward), both)
        return dict(zip(PHASES, phases, strict=True))

    def wall_ms(self, name: str) -> float:
        """The median time of a step with what Python does in it."""
        times = []
        for _ in range(1 if self.setting.dry else WALL_STEPS):
            self.restore()
            self.setting.wait()
            start = perf_counter()
            self.steps[name]()
            self.setting.wait()
            times.append((perf_counter() - start) * 1e3)
        return quartiles(times)[1]

    def peak_extra_mib(self, name: str) -> float | None:
        """What a step allocates at its peak."""
        if self.setting.dry:
            return None
        self.restore()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.steps[name]()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def summarize(point: Point, rounds: Sequence[Mapping[str, float]]) -> list[Record]:
    """A record of each turn: quartiles, bandwidth, and the ratios within the rounds."""
    size = point.tokens * point.vocab * DTYPES[point.dtype].itemsize
    copied = PASSES["copy"] * size / quartiles(times["copy copy"] for times in rounds)[1]
    records = []
    for turn in rounds[0]:
        name, phase = turn.split(" ")
        low, median, high = quartiles(times[turn] for times in rounds)
        moved = PASSES[phase] * size
        against = {other: f"{other} copy" if other == "copy" else f"{other} {phase}" for other in AGAINST}
        ratios = {other: paired_ratio(rounds, turn, key) for other, key in against.items()}
        records.append(
            {
                "contender": name,
                "phase": phase,
                "median_ms": median,
                "p25_ms": low,
                "p75_ms": high,
                "bytes": moved,
                "gb_per_s": moved / median / 1e6,
                "share_of_copy": moved / median / copied,
                **{f"ratio_to_{other}": ratio and ratio[1] for other, ratio in ratios.items()},
            }
        )
    names, phases = ["copy", *CONTENDERS], ["copy", *PHASES]
    return sorted(records, key=lambda one: (names.index(one["contender"]), phases.index(one["phase"])))


def race(setting: Setting, point: Point, clock: _Clock) -> Record:
    """The record of a point; its "passed" says whether the PRSL contenders compute the same loss."""
    entry = Race(setting, point)
    entry.warm_up()
    rounds = 2 if setting.dry else 31 if point.sweep == "main" else 15
    times = interleave(entry.turns(), rounds, 0, clock, setting)
    results = summarize(point, times)
    for record in results:
        if record["phase"] == "both":
            record["wall_ms"] = entry.wall_ms(record["contender"])
            record["peak_extra_mib"] = entry.peak_extra_mib(record["contender"])
    record = {**asdict(point), "rounds": len(times), "left_out": entry.left_out, "results": results}
    try:
        check_losses(entry.values, 1e-4)
    except Exception as error:
        return record | {"passed": False, "reason": str(error)}
    return record | {"passed": True}


def run(setting: Setting, emit: Emit) -> None:
    """Race the points and emit a record of each."""
    clock = _Clock() if setting.dry else _EventClock()
    for point in points(setting.dry):
        if setting.left() <= 0:
            return
        emit({"begin": point.name})
        try:
            emit({"point": point.name, **race(setting, point, clock)})
        except torch.OutOfMemoryError as error:
            left_out = {name: words(error) for name in CONTENDERS}
            emit({"point": point.name, **asdict(point), "results": [], "left_out": left_out, "passed": None})
        if not setting.dry:
            torch.cuda.synchronize()  # raises for good where a kernel has broken the context
            torch.cuda.empty_cache()
