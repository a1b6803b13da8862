"""Seconds of a call, measured: the real base checkpoint, a few calls of each kind on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from prsl_kernels import apply_prsl
from prsl_kernels.experiments.attacks.iterate import input_gradient
from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.attacks.record import fingerprint
from prsl_kernels.experiments.config import Task, TaskConfig
from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import cache_root
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.planning.work import Operation
from prsl_kernels.experiments.training.trainable import load_trainable

LARGEST = 100_000_000  # parameters of a model that is measured; a larger one is modelled
_CALLS = 3
_LONG = 1.0  # seconds; a call that takes longer is made once


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call on an idle machine.

    On a CPU the smaller of what the clock and the process's own time say: the first counts what others take away, the
    second all threads, waiting or not. On a GPU the clock, once the GPU has finished.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, busy = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - wall
    return min(time.perf_counter() - wall, time.process_time() - busy)


@dataclass
class Measured:
    """Seconds of calls on a task's base checkpoint, between and beyond the sizes measured on a straight line."""

    config: TaskConfig
    task: Task
    device: str
    basis = "measured here"
    _lines: dict[Operation, tuple[float, float]] = field(default_factory=dict)
    _load: float = 0.0

    def measure(self, calls: Iterable[tuple[Operation, int]]) -> Measured:
        """Times each operation at the smallest and the largest batch that occurs."""
        sizes: dict[Operation, list[int]] = {}
        for operation, size in calls:
            sizes.setdefault(operation, []).append(size)
        for _ in range(2):  # the first time, libraries are read as well
            started = time.process_time()
            vlm = VisionLanguageModel.from_pretrained(
                self.config.base, device=self.device, decoding=self.config.decoding
            )
            fingerprint(vlm)
            self._load = time.process_time() - started
        largest = max((size for group in sizes.values() for size in group), default=1)
        pixels, texts, questions = _sample(vlm, self.config, self.task, largest)
        del vlm
        training = _Training(self.config, self.device, pixels, texts, questions)
        for operation in ("train", "update"):
            self._time(operation, sizes, training.calls(operation))
        del training
        dtype = getattr(torch, self.config.attack.dtype)
        vlm = VisionLanguageModel.from_pretrained(
            self.config.base, device=self.device, dtype=dtype, decoding=self.config.decoding
        )
        vlm.model.requires_grad_(False)

        def objective(count: int) -> TextObjective:
            return TextObjective(vlm, vlm.encode(texts[:count], questions and questions[:count]))

        def forward(count: int) -> Callable[[], Any]:
            part = objective(count)

            def call() -> Tensor:
                with torch.no_grad():
                    return part(pixels[:count])

            return call

        def gradient(count: int) -> Callable[[], Any]:
            part = objective(count)
            return lambda: input_gradient(part, pixels[:count])

        def generate(count: int) -> Callable[[], Any]:
            return lambda: vlm.generate(pixels[:count], questions and questions[:count])

        for operation, make in (("forward", forward), ("gradient", gradient), ("generate", generate)):
            self._time(operation, sizes, make)
        return self

    def _time(
        self, operation: Operation, sizes: dict[Operation, list[int]], make: Callable[[int], Callable[[], Any]]
    ) -> None:
        wanted = {"train": ("train", "ratio"), "generate": ("generate", "base")}.get(operation, (operation,))
        counts = sorted({size for name in wanted for size in sizes.get(name, [])})  # type: ignore[call-overload]
        if not counts:
            return
        device = torch.device(self.device)
        ends = list(dict.fromkeys((counts[0], counts[-1])))
        times = []
        for count in ends:
            call = make(count)
            first = clock(call, device)
            rest = [clock(call, device) for _ in range(_CALLS if first < _LONG else 1)]
            times.append(median(rest))
        slope = max((times[-1] - times[0]) / (ends[-1] - ends[0]), 0.0) if len(ends) > 1 else times[0] / ends[0]
        self._lines[operation] = (max(times[-1] - slope * ends[-1], 0.0), slope)

    def seconds(self, operation: Operation, images: int) -> float:
        """Of one call with so many images."""
        if operation == "ratio":  # one forward and two backwards, where training has one of each
            return 5 / 3 * self.seconds("train", images)
        fixed, slope = self._lines["generate" if operation == "base" else operation]
        return fixed + slope * images

    def load(self) -> float:
        """Of reading and hashing the checkpoint."""
        return self._load


class _Training:
    """One model made ready as the fine-tuning makes it."""

    def __init__(
        self, config: TaskConfig, device: str, pixels: Tensor, texts: list[str], questions: list[str] | None
    ) -> None:
        finetune = replace(config.finetune, compile=False)  # which is done once
        vlm = load_trainable(config.base, finetune, device=device, seed=0, decoding=config.decoding)
        self._vlm, self._config = vlm, config
        self._pixels, self._texts, self._questions = pixels, texts, questions
        if vlm.device.type == "cpu":
            vlm.model.set_attn_implementation("eager")
        self._parameters = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0)

    def calls(self, operation: str) -> Callable[[int], Callable[[], Any]]:
        """Count -> a call with so many images."""
        return self._train if operation == "train" else self._update

    def _train(self, count: int) -> Callable[[], Any]:
        vlm = self._vlm

        def call() -> None:
            questions = self._questions and self._questions[:count]
            pixels = (self._pixels[:count] * 255).byte().float() / 255
            text = vlm.encode(self._texts[:count], questions)
            vlm.train()
            with (
                apply_prsl(vlm.model),
                torch.autocast(vlm.device.type, torch.bfloat16, enabled=self._config.finetune.bf16),
            ):
                vlm.model(pixel_values=vlm.normalize(pixels), **text).loss.backward()

        return call

    def _update(self, count: int) -> Callable[[], Any]:
        def call() -> None:
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()

        return call


def _sample(
    vlm: VisionLanguageModel, config: TaskConfig, task: Task, count: int
) -> tuple[Tensor, list[str], list[str] | None]:
    """Images, references and questions: of the data set where that is at hand, else noise and the commonest of words.

    Nothing is rendered, unpacked or written for it.
    """
    examples: tuple[Any, ...] = ()
    name = _at_hand(config, task)
    if name is not None:
        with suppress(UserError):  # damaged or incomplete: a run would say so
            examples = tuple(load_dataset(name, config.data.attacked, limit=count).examples)
    if examples and all(example.references for example in examples):
        chosen = [examples[index % len(examples)] for index in range(count)]
        pixels = vlm.load_pixels([example.image for example in chosen]).to(vlm.device)
        questions = [example.question or "" for example in chosen] if task == "vqa" else None
        return pixels, [example.references[0] for example in chosen], questions
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, vlm.image_size, vlm.image_size, generator=generator).to(vlm.device)
    text = "a man in a red hat next to a tree" if task == "captions" else "red"
    return pixels, [text] * count, ["what color is the hat of the man?"] * count if task == "vqa" else None


def _at_hand(config: TaskConfig, task: Task) -> str | None:
    """The name of a data set that can be read at once; None where it would be rendered, unpacked or hashed first."""
    data = config.data
    name = {"captions": "openmoji", "vqa": "easy-vqa"}[task] if data.path == "embedded" else data.name
    if name == "openmoji":
        return name if any(cache_root().glob("openmoji-*px")) else None
    if name == "easy-vqa":
        return name if any((cache_root() / "packages").glob("easy-vqa-*/*")) else None
    return name if data.path is None and os.path.exists(name) else None
