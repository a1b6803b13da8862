"""The attack stage on real classes of both families, small and untrained."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from prsl_kernels import apply_prsl
from prsl_kernels.experiments.attacks import BIM, Budget, TextObjective
from prsl_kernels.experiments.attacks.run import attack, fingerprint
from prsl_kernels.experiments.config import AttackConfig
from prsl_kernels.experiments.data import Dataset, Example
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.models.tiny import tiny_blip2, tiny_vit_gpt2

ANSWERS = ["red", "yes", "red circle", "blue", "no"]


pytestmark = pytest.mark.usefixtures("_single_thread")


@pytest.fixture(scope="module", params=["captions", "vqa"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        make = {"captions": tiny_vit_gpt2, "vqa": tiny_blip2}[request.param]
        model = make(tokenizer, width=64, vision_layers=2, text_layers=1)
        for name, parameter in model.named_parameters():
            if "embed" not in name and parameter.dim() > 1:
                parameter.data.mul_(4)  # untrained models of this size hardly look at the image
    preprocessing = Preprocessing(size=64, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    path = tmp_path_factory.mktemp(request.param) / "model"
    VisionLanguageModel(model, tokenizer, preprocessing).save_pretrained(path, dtype=torch.float32)
    return path


@pytest.fixture
def dataset(checkpoint: Path, tmp_path: Path) -> Dataset:
    task = checkpoint.parent.name.removesuffix("0")
    generator = torch.Generator().manual_seed(5)
    examples = []
    for index, answer in enumerate(ANSWERS):
        path = tmp_path / f"{index}.png"
        size = 64 if index else 40  # the first must be resized
        Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator).to(torch.uint8).numpy()).save(path)
        question = f"what {'color ' * index}is this?" if task == "vqa" else None
        examples.append(Example(id=f"e{index}", image=path, references=(answer,), question=question))
    return Dataset("noise", task, "test", tuple(examples), "CC0", "nobody", "print")  # type: ignore[arg-type]


def test_recorded_rows_are_what_the_model_says_of_the_saved_images(
    checkpoint: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = AttackConfig(eps=6.5, step=2, rounds=(1, 4), batch_size=2, keep_images=5)
    outputs = attack(
        checkpoint, dataset, config, tmp_path / "out", task=dataset.task, arm="ce", seed=0, base_path=checkpoint
    )
    rows = pq.read_table(outputs).to_pylist()
    vlm = VisionLanguageModel.from_pretrained(checkpoint)
    for row in rows:
        pixels = vlm.load_pixels([tmp_path / "out" / row["image"]])
        questions = None if row["question"] is None else [row["question"]]
        assert vlm.generate(pixels, questions) == [row["text"]]
        value = TextObjective(vlm, vlm.encode(row["references"], questions))(pixels)
        assert value.item() == pytest.approx(row["objective_value"], rel=1e-4)
    by_place = {(row["attack"], row["round"], row["id"]): row for row in rows}
    for example in dataset.examples:
        clean = by_place["bim", 0, example.id]
        still = by_place["zero-step", 2, example.id]
        last = by_place["bim", 4, example.id]
        assert (still["text"], still["objective_value"], still["linf"]) == (clean["text"], clean["objective_value"], 0)
        assert last["objective_value"] > clean["objective_value"]
        assert last["linf"] == 6 / 255
        assert last["nonfinite_gradient_share"] == 0
        assert last["zero_gradient_share"] < 0.05


def test_a_loss_put_into_the_model_does_not_change_the_attack(checkpoint: Path, dataset: Dataset) -> None:
    vlm = VisionLanguageModel.from_pretrained(checkpoint)
    pixels = vlm.load_pixels([example.image for example in dataset.examples])
    questions = None if vlm.task == "captions" else [str(example.question) for example in dataset.examples]
    objective = TextObjective(vlm, vlm.encode([example.references[0] for example in dataset.examples], questions))
    bim = BIM(Budget.from_config(8, 2, "pixels255", std=vlm.image_std), 2)
    plain = bim(objective, pixels)
    with apply_prsl(vlm.model, k=5, b=100.0):
        assert torch.equal(bim(objective, pixels), plain)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(checkpoint: Path, tmp_path: Path) -> None:
    vlm = VisionLanguageModel.from_pretrained(checkpoint)
    vlm.save_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert fingerprint(VisionLanguageModel.from_pretrained(tmp_path / "copy")) == fingerprint(vlm)
    next(vlm.parameters()).data.view(-1)[0] += 1e-3
    assert fingerprint(VisionLanguageModel.from_pretrained(tmp_path / "copy")) != fingerprint(vlm)
