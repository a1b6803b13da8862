"""Encoders behind BERTScore by their names on the Hub: found on disk, and refused before a run rather than after it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_cache import put
from huggingface_hub import constants
from tiny_encoders import tiny_encoder

from prsl_kernels.experiments.attacks.store import SCHEMA
from prsl_kernels.experiments.config import EncoderConfig, EvaluateConfig, Recipe, load_recipe
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics.bertscore import BertScore
from prsl_kernels.experiments.metrics.evaluate import check_encoders, encoder_folders, evaluate
from prsl_kernels.experiments.metrics.outputs import COLUMNS
from prsl_kernels.experiments.pipeline import run_experiment

pytestmark = pytest.mark.usefixtures("_single_thread")

T5, DEBERTA = "google-t5/t5-base", "microsoft/deberta-v3-small"
SAID = {"one": "a dog runs", "two": "the cat"}
REFERENCES = {"one": ["the dog is running", "a dog"], "two": ["a cat"]}


@pytest.fixture(name="cache")
def cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache on a machine where both were downloaded."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    put(folder, tiny_encoder(tmp_path / "one", "t5", layers=12), T5)
    put(folder, tiny_encoder(tmp_path / "two", "deberta"), DEBERTA)
    return folder


def snapshot(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("a" * 40)


def outputs(path: Path) -> Path:
    """What an arm said of two images, clean and attacked, as far as it is read."""
    schema = pa.schema([pa.field(name, SCHEMA.field(name).type) for name in COLUMNS])
    rows = [
        dict.fromkeys(COLUMNS)
        | {"task": "captions", "arm": "ce", "seed": 0, "attack": "bim", "round": number, "role": "primary"}
        | {"id": name, "group": "", "references": REFERENCES[name], "text": text if number == 0 else "the dog"}
        for number in (0, 1)
        for name, text in SAID.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def test_each_encoder_gives_a_score_of_its_name(cache: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(("rouge_l", "bertscore_f1"), T5, encoders={"deberta": EncoderConfig(DEBERTA, 2)})
    check_encoders(config)
    evaluate([outputs(tmp_path / "outputs.parquet")], tmp_path / "out", config, primary_score="bertscore_f1")
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    found = {
        (row["metric"], row["id"]): row["value"]
        for row in scores
        if (row["attack"], row["round"], row["reference"]) == ("bim", 0, "primary")
    }
    # Named as bert-score's authors named it before it had an owner: the layer that they found best
    alone = {"bertscore_f1": BertScore(snapshot(cache, T5), 11), "bertscore_f1_deberta": BertScore(
        snapshot(cache, DEBERTA), 2
    )}  # fmt: skip
    for metric, scorer in alone.items():
        for name, text in SAID.items():
            assert found[metric, name] == pytest.approx(scorer.score(text, REFERENCES[name]), abs=1e-6)
    assert found["bertscore_f1", "one"] != pytest.approx(found["bertscore_f1_deberta", "one"], abs=1e-6)
    corpus = {row["metric"] for row in pq.read_table(tmp_path / "out" / "corpus.parquet").to_pylist()}
    assert corpus >= {"rouge_l", "bertscore_f1", "bertscore_f1_deberta"}
    versions = json.loads((tmp_path / "out" / "versions.json").read_text())
    for metric, scorer in alone.items():
        assert versions[metric] == scorer.version


def test_a_name_leads_to_the_download_and_a_folder_goes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(encoder=T5, num_layers=3, encoders={"other": EncoderConfig(DEBERTA)})
    assert encoder_folders(config) == {
        "encoder": snapshot(cache, T5), "num_layers": 3, "encoders": {"other": (snapshot(cache, DEBERTA), None)},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny_encoder(tmp_path / T5, "t5")
    assert encoder_folders(config)["encoder"] == Path(T5)
    assert encoder_folders(EvaluateConfig()) == {"encoder": None, "num_layers": None, "encoders": {}}


@pytest.fixture(name="recipe")
def recipe_fixture() -> Recipe:
    return load_recipe("demo")


def with_encoders(recipe: Recipe, **evaluate: Any) -> Recipe:
    """The second task is scored so: a stage would find out about it at the very end."""
    task = replace(recipe.tasks["vqa"], evaluate=EvaluateConfig(**evaluate))
    return replace(recipe, tasks={**recipe.tasks, "vqa": task})


def refused(recipe: Recipe, run: Path) -> str:
    with pytest.raises(UserError) as caught:
        run_experiment(recipe, run, device="cpu")
    assert not [path for path in run.rglob("*") if not path.name.startswith(".lock")]
    return str(caught.value)


@pytest.mark.parametrize("further", [False, True])
def test_one_that_was_not_downloaded_is_refused_before_anything_runs(
    further: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    name = "microsoft/deberta-xlarge-mnli"
    settings = {"encoders": {"deberta": EncoderConfig(name)}} if further else {"encoder": name}
    message = refused(with_encoders(recipe, **settings), tmp_path / "run")
    command = re.search(r"`(hf download [^`]*)`", message)
    assert command is not None
    assert shlex.split(command[1])[:3] == ["hf", "download", name]


def test_a_folder_that_is_none_is_refused_before_anything_runs(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    message = refused(with_encoders(recipe, encoder=str(tmp_path / "nowhere"), num_layers=1), tmp_path / "run")
    assert f"encoder {tmp_path / 'nowhere'}: no model folder" in message
    mine = tiny_encoder(tmp_path / "mine", "deberta")
    message = refused(with_encoders(recipe, encoders={"mine": EncoderConfig(str(mine))}), tmp_path / "run")
    assert "bert-score knows no best layer for a model of this name; say which layer" in message
    (mine / "model.safetensors").rename(mine / "pytorch_model.bin")
    settings = {"mine": EncoderConfig(str(mine), 1)}
    assert "no weights in safetensors" in refused(with_encoders(recipe, encoders=settings), tmp_path / "run")
    (snapshot(cache, T5) / "model.safetensors").unlink()
    assert "is not complete, it has no safetensors" in refused(with_encoders(recipe, encoder=T5), tmp_path / "run")


@pytest.mark.parametrize("name", ["paper-vitgpt2", "paper-blip2opt"])
def test_the_layers_of_the_paper_recipes_encoders_are_known(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = tiny_encoder(tmp_path / "source", "t5")
    for config in load_recipe(name).tasks.values():
        for encoder in {config.evaluate.encoder, *(other.folder for other in config.evaluate.encoders.values())}:
            assert encoder is not None
            if not snapshot(tmp_path / "hub", encoder).exists():
                put(tmp_path / "hub", source, encoder)
        check_encoders(config.evaluate)
