"""Fine-tunings that take a second: tiny models with random weights, drawn images, and what comes out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prsl_kernels.experiments.config import ArmConfig, FinetuneConfig
from prsl_kernels.experiments.data import Dataset, Example, save_png
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_blip2, tiny_vit_gpt2
from prsl_kernels.experiments.training.finetune import finetune
from prsl_kernels.experiments.training.trainer import ArmTrainer

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "large black": (0, 0, 0)}
CE = ArmConfig(name="ce", b=0.0)
PRSL = ArmConfig(name="prsl", k=6, gradient_ratio=0.25)
CONFIG = FinetuneConfig(
    steps=4, batch_size=4, learning_rate=1e-3, evaluate_every=2, log_every=1, calibration_batches=3, warmup_steps=1
)


def bases(folder: Path) -> Callable[[str], Path]:
    """Folders with a tiny model of each task, made when asked for."""

    def make(task: str) -> Path:
        if not (folder / task).exists():
            tokenizer = VisionLanguageModel.from_pretrained(task).tokenizer
            torch.manual_seed(0)
            small: dict[str, Any] = {"width": 32, "vision_layers": 1, "text_layers": 1}
            model = tiny_vit_gpt2(tokenizer, **small) if task == "captions" else tiny_blip2(tokenizer, **small)
            preprocessing = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)
            VisionLanguageModel(model, tokenizer, preprocessing).save_pretrained(folder / task, dtype=torch.float32)
        return folder / task

    return make


def drawings(folder: Path) -> Callable[..., Dataset]:
    """Data sets of a task, a split and a number of images up to 24."""
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        colour = torch.tensor(list(COLOURS.values())[number % 5]).view(3, 1, 1)
        save_png((colour * torch.rand(3, 64, 64, generator=generator)).float(), folder / f"{number}.png")

    def make(task: str, split: str, count: int) -> Dataset:
        names = [list(COLOURS)[number % 5] for number in range(count)]
        offset = 0 if split == "train" else 24 - count
        examples = tuple(
            Example(
                id=f"{split}-{number}",
                image=folder / f"{number + offset}.png",
                references=(f"{name} square", f"a {name} picture") if task == "captions" else (name,),
                question=None if task == "captions" else "what color is it?",
            )
            for number, name in enumerate(names)
        )
        return Dataset("drawn", task, split, examples, "none", "none", f"{task}-{split}-{count}")  # type: ignore[arg-type]

    return make


def runs(base: Callable[[str], Path], data: Callable[..., Dataset], folder: Path) -> Callable[..., Path]:
    """`finetune` with small defaults; returns the output folder. Runs without other options are shared."""
    shared: dict[Any, Path] = {}

    def go(task: str = "vqa", arm: ArmConfig = PRSL, config: FinetuneConfig = CONFIG, **other: Any) -> Path:
        key = (task, arm, config) if not other else None
        if key not in shared or key is None:
            out = other.pop("out", None) or folder / str(len(shared)) / arm.name
            options: dict[str, Any] = {"seed": 3, "device": "cpu", **other}
            finetune(base(task), data(task, "train", 12), data(task, "select", 7), arm, config, out, **options)
            shared[key] = out
        return shared[key]

    return go


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "arm.json").read_text())  # type: ignore[no-any-return]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(VisionLanguageModel.from_pretrained(out).model.state_dict())


def cross_entropy_on(out: Path, dataset: Dataset) -> float:
    """The CE term on a split, from the definition."""
    vlm = VisionLanguageModel.from_pretrained(out)
    questions = [e.question or "" for e in dataset.examples] if dataset.task == "vqa" else None
    text = vlm.encode([e.references[0] for e in dataset.examples], questions)
    with torch.no_grad():
        logits, target = vlm.logits(vlm.load_pixels([e.image for e in dataset.examples]), text)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).item()


def interrupt_step(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """As Ctrl-C in the step after this number of them."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        step = ArmTrainer.training_step

        def interrupted(self: ArmTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == number:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ArmTrainer, "training_step", interrupted)

    return patch
