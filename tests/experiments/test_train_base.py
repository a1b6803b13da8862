"""`train-base`: it writes a whole model folder, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prsl_kernels.experiments.data import Dataset, load_dataset
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.training import base, base_tasks
from prsl_kernels.experiments.training.base import learning_rate_factor, train_base
from prsl_kernels.experiments.training.base_tasks import TASKS, jitter, word_f1

STEPS = 4

# Each loading verifies the checksums of 5,000 images
vocabulary = functools.cache(build_tokenizer)


@functools.cache
def few(name: str, split: Any, *, limit: int | None = None, seed: int = 0) -> Dataset:
    return load_dataset(name, split, limit=min(limit or 40, 40), seed=seed)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real data, a little of it, and tiny models, saved after each step."""

    monkeypatch.setattr(base_tasks, "load_dataset", few)
    monkeypatch.setattr(base, "build_tokenizer", vocabulary)
    for builder in ("tiny_vit_gpt2", "tiny_blip2"):
        original = getattr(base_tasks, builder)
        monkeypatch.setattr(
            base_tasks, builder, lambda t, original=original: original(t, width=64, vision_layers=1, text_layers=1)
        )
    for task in TASKS.values():
        monkeypatch.setitem(task.recipe, "batch" if task.task == "captions" else "images per step", 8)
    for name, value in (("SAVE_EVERY", 1), ("LOG_EVERY", 1), ("SCORE_EVERY", 2), ("VOCABULARY", 400)):
        monkeypatch.setattr(base, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("task", ["captions", "vqa"])
def test_a_killed_training_goes_on_to_the_same_weights(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_base(task, tmp_path / "whole", steps=STEPS)

    loss = TASKS[task].loss

    def dies(self: base_tasks.BaseTask, step: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return loss(self, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TASKS[task], "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train_base(task, tmp_path / "killed", steps=STEPS)
    assert not (tmp_path / "killed").exists(), "a model folder is whole or not there"
    with pytest.raises(UserError, match="other settings"):
        train_base(task, tmp_path / "killed", steps=STEPS + 1)
    steps_run = []
    with monkeypatch.context() as patch:
        patch.setattr(TASKS[task], "loss", lambda self, step: (steps_run.append(step), loss(self, step))[1])
        killed = train_base(task, tmp_path / "killed", steps=STEPS)
    assert steps_run == [2, 3]
    assert not (tmp_path / "killed-training").exists()

    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    logs = [
        [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    ]
    for rows in logs:
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row in rows:
            row.pop("seconds")
    assert logs[0] == logs[1]
    check_folder(task, whole)


def check_folder(task: str, folder: Path) -> None:
    present = {file.name for file in folder.iterdir()}
    assert present == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "train_log.jsonl",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    for text in ("CC BY-SA 4.0" if task == "captions" else "MIT", "grey image", "| test |", "--seed 0 --steps 4"):
        assert text in card
    wrapper = VisionLanguageModel.from_pretrained(folder)
    assert wrapper.task == task
    questions = ["what color is the shape?"] if task == "vqa" else None
    assert len(wrapper.generate(torch.rand(1, 3, 64, 64), questions)) == 1


@pytest.mark.usefixtures("small")
def test_damaged_progress_and_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'chess' does not exist"):
        train_base("chess", tmp_path / "a")
    with pytest.raises(UserError, match="steps is 0"):
        train_base("captions", tmp_path / "a", steps=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        train_base("captions", tmp_path / "full", steps=1)
    (tmp_path / "a-training").mkdir()
    (tmp_path / "a-training" / "state.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"truncated or damaged.*delete"):
        train_base("captions", tmp_path / "a", steps=1)


def test_each_phase_warms_up_and_decays_to_zero() -> None:
    class Two:
        recipe = {"warm-up steps": 10}  # noqa: RUF012

        def phases(self) -> list[int]:
            return [100, 300]

    factors = [learning_rate_factor(step, Two()) for step in range(400)]  # type: ignore[arg-type]
    for begin, end in ((0, 100), (100, 400)):
        assert factors[begin] < 0.1
        assert max(factors[begin : begin + 20]) > 0.9
        assert 0 < factors[end - 1] < 0.001
        assert factors[begin + 10 : end] == sorted(factors[begin + 10 : end], reverse=True)


def test_jitter_keeps_colours_and_fills_with_the_background() -> None:
    torch.manual_seed(0)
    pixels = torch.full((8, 3, 64, 64), 0.7)
    torch.testing.assert_close(jitter(pixels), pixels)
    pixels[:, :, 20:40, 20:40] = torch.tensor([0.1, 0.2, 0.9]).view(3, 1, 1)
    moved = jitter(pixels)
    assert moved.shape == pixels.shape
    assert not torch.equal(moved[0], moved[1])
    torch.testing.assert_close(moved[:, :, 30, 30], pixels[:, :, 30, 30])
    torch.testing.assert_close(jitter(pixels, scale=0.0, shift=0.0), pixels, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("candidate", "reference", "value"),
    [("a b", "a b", 1.0), ("a", "b", 0.0), ("", "a", 0.0), ("a a", "a", 2 / 3), ("a b c", "c a d", 2 / 3)],
)
def test_word_f1(candidate: str, reference: str, value: float) -> None:
    assert word_f1(candidate, reference) == pytest.approx(value)
