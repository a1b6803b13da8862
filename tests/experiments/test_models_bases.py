"""The shipped bases: whole, small, and worth attacking, which means that they look at the image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.models import BASES, SHIPPED, VisionLanguageModel

DATA = {"captions": "openmoji", "vqa": "easy-vqa"}


@pytest.fixture(scope="module")
def bases() -> dict[str, VisionLanguageModel]:
    return {name: VisionLanguageModel.from_pretrained(name) for name in SHIPPED}


def card_scores(name: str) -> dict[tuple[str, str], tuple[float, float]]:
    """{(split, score): (of the image, of a grey image)} out of the model card."""
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", card(name), flags=re.M)
    return {(split, score): (float(value), float(blank)) for split, score, value, blank in rows}


def card(name: str) -> str:
    return (BASES / name / "README.md").read_text(encoding="utf-8")


def test_they_are_small_and_hold_no_pickle() -> None:
    files = [file for file in BASES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12_000_000
    assert {file.suffix for file in files} == {".json", ".jsonl", ".md", ".safetensors"}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_belongs_to_the_weights(name: str) -> None:
    assert sha256(BASES / name / "model.safetensors") in card(name)
    steps = int(re.search(r"--steps (\d+)", card(name))[1])  # type: ignore[index]
    log = [json.loads(line) for line in (BASES / name / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == steps
    assert log[-1]["loss"] < log[0]["loss"] / 3
    assert load_dataset(DATA[name], "train").fingerprint in card(name), "trained on the data that is loaded here"
    assert {split for split, _ in card_scores(name)} == {"train", "select", "test"}


def test_they_reached_what_an_experiment_needs() -> None:
    captions = {score: values for (split, score), values in card_scores("captions").items() if split == "test"}
    assert captions["exact match, all"][0] >= 0.5
    assert captions["word F1"][0] >= 0.9
    assert captions["exact match, all"][1] < 0.02
    assert captions["word F1"][1] < captions["word F1"][0] - 0.4
    vqa = {score: values for (split, score), values in card_scores("vqa").items() if split == "test"}
    for kind, least in (("color", 0.8), ("shape", 0.8), ("yes/no", 0.92)):
        assert vqa[f"accuracy, {kind}"][0] >= least
    for kind in ("color", "shape"):
        assert vqa[f"accuracy, {kind}"][1] < 0.5


def test_both_share_one_vocabulary(bases: dict[str, VisionLanguageModel]) -> None:
    captions, vqa = bases["captions"], bases["vqa"]
    assert captions.vocab_size == vqa.vocab_size >= 2000
    assert captions.tokenizer.get_vocab() == vqa.tokenizer.get_vocab()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_scores_of_the_card_are_reached_and_need_the_image(
    name: str, bases: dict[str, VisionLanguageModel]
) -> None:
    wrapper = bases[name]
    examples = load_dataset(DATA[name], "test", limit=96).examples
    questions = [example.question or "" for example in examples] if name == "vqa" else None
    pixels = wrapper.load_pixels([Path(example.image) for example in examples])
    shares = []
    for shown in (pixels, torch.full_like(pixels, 0.5)):
        texts = wrapper.generate(shown, questions)
        shares.append(sum(t in e.references for t, e in zip(texts, examples, strict=True)) / len(examples))
    # The sample is a third of each question type, while the card weighs them by their number
    least = 0.8 if name == "vqa" else card_scores(name)["test", "exact match, all"][0] - 0.15
    assert shares[0] >= least
    assert shares[1] < shares[0] - 0.3
