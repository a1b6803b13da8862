"""A stand-in for the attacked model, images to attack it with, and the attack stage on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prsl_kernels.experiments.attacks import record, run
from prsl_kernels.experiments.attacks.store import SCHEMA
from prsl_kernels.experiments.config import AttackConfig, DecodingConfig
from prsl_kernels.experiments.data import Dataset, Example, load_pixels

WORDS = ["red", "blue", "cat", "dog", "sun", "tree", "a", "the"]
SIZE = 8
CONFIG = AttackConfig(eps=8, step=2, rounds=(1, 2, 4), batch_size=4, keep_images=3)


class StandIn:
    """Says three words of an image, each from logits that are smooth in the pixels; the real model's interface."""

    def __init__(self, seed: int = 0, task: str = "captions") -> None:
        self.task = task
        self.image_size = SIZE
        self.image_mean, self.image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.25)
        self.device = torch.device("cpu")
        self.decoding = DecodingConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 36, 3 * len(WORDS))
            )
        self.model[4].weight.data *= 3
        self.model.config = self.model.generation_config = SimpleNamespace(to_dict=dict)
        self.tokenizer = SimpleNamespace(get_vocab=lambda: {word: index for index, word in enumerate(WORDS)})
        self.calls: list[int] = []
        self.interrupt_at: int | None = None
        self.mute = False

    def eval(self) -> StandIn:
        self.model.eval()
        return self

    def load_pixels(self, paths: Sequence[Path]) -> Tensor:
        return load_pixels(paths, SIZE)

    def encode(self, references: Sequence[str], questions: Sequence[str] | None = None) -> dict[str, Tensor]:
        assert (questions is None) == (self.task == "captions")
        labels = torch.full((len(references), 3), -100)
        for row, reference in enumerate(references):
            for place, word in enumerate(reference.split()):
                labels[row, place] = WORDS.index(word)
        shift = torch.tensor([[len(question)] for question in questions]) if questions else torch.zeros(1, 1)
        return {"labels": labels, "shift": shift}

    def logits(self, pixels: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        logits = self.model((pixels - mean) / std).view(-1, 3, len(WORDS))
        return logits + text["shift"][..., None].sin(), text["labels"]

    def generate(self, pixels: Tensor, questions: Sequence[str] | None = None) -> list[str]:
        self.calls.append(len(pixels))
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        if self.mute:
            return [""] * len(pixels)
        words = self.logits(pixels, self.encode([""] * len(pixels), questions))[0].argmax(-1)
        return [" ".join(WORDS[word] for word in row) for row in words]


def make_dataset(folder: Path, count: int = 10, *, references: bool = True, task: str = "captions") -> Dataset:
    generator = torch.Generator().manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for index in range(count):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator).to(torch.uint8)
        path = folder / f"{index}.png"
        Image.fromarray(pixels.numpy()).save(path)
        texts = (f"{WORDS[index % 8]} {WORDS[index % 3]}", "the tree") if references else ()
        question = f"what is {index}?" if task == "vqa" else None
        examples.append(
            Example(id=f"e-{index}", image=path, references=texts, question=question, group=f"g{index % 2}")
        )
    return Dataset("made-up", task, "test", tuple(examples), "CC0", "nobody", f"print-{count}")  # type: ignore[arg-type]


def pick(rows: list[dict[str, Any]], attack: str, round_index: int) -> list[dict[str, Any]]:
    return sorted(
        (row for row in rows if (row["attack"], row["round"]) == (attack, round_index)), key=lambda row: row["id"]
    )


def without_noise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(name="models")
def models_fixture(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    """What paths lead to, in place of checkpoints on disk."""
    known = {"arm": StandIn(0), "base": StandIn(1), "other": StandIn(2)}
    loader = SimpleNamespace(from_pretrained=lambda path, *, device, dtype, decoding=None: known[path])
    monkeypatch.setattr(record, "VisionLanguageModel", loader)
    return known


@pytest.fixture(name="dataset")
def dataset_fixture(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data")


@pytest.fixture(name="attack")
def attack_fixture(models: dict[str, StandIn], dataset: Dataset, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the stage and returns its rows."""

    def call(
        path: str = "arm", test: Dataset = dataset, config: AttackConfig = CONFIG, **changes: Any
    ) -> list[dict[str, Any]]:
        arguments: dict[str, Any] = {
            "out": tmp_path / "out",
            "task": test.task,
            "arm": "ce",
            "seed": 7,
            "base_path": "base",
        }
        table = pq.read_table(run.attack(path, test, config, **(arguments | changes)))
        assert table.schema.remove_metadata() == SCHEMA
        return table.to_pylist()

    return call
