"""`report_to`: what trackers are given, and that they change nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_finetune import CONFIG, PRSL, bases, drawings, interrupt_step, record, rows, runs

from prsl_kernels.experiments.config import load_recipe
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.pipeline import Experiment, run_experiment

pytestmark = pytest.mark.usefixtures("_single_thread")

TRACKED = replace(CONFIG, report_to=("tensorboard",))


@pytest.fixture(scope="module", name="base")
def base_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", name="data")
def data_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    return drawings(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", name="run")
def run_fixture(base: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return runs(base, data, tmp_path_factory.mktemp("run"))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard's event files in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {scalar.step: scalar.value for scalar in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_curves_of_the_log_beside_the_model(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = run("vqa", PRSL, TRACKED, out=tmp_path / "tracked")
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    assert not (out / "training").exists()
    found = curves(out / "tensorboard")
    logged = {row["step"]: row for row in rows(out)}
    for tag, column in (
        ("train/loss", "loss"),
        ("train/cross_entropy", "cross_entropy"),
        ("train/penalty", "penalty"),
        ("train/learning_rate", "learning_rate"),
        ("eval/cross_entropy", "eval_cross_entropy"),
    ):
        # The base's own row is measured before the tracker's first
        expected = {step: row[column] for step, row in logged.items() if step and row[column] is not None}
        assert found[tag] == pytest.approx(expected, rel=1e-6), tag
        assert len(expected) == (2 if tag.startswith("eval") else 4)
    assert rows(out) == rows(run("vqa", PRSL)), "who looks on changes nothing"
    assert record(out) == record(run("vqa", PRSL))


def test_without_a_tracker_there_is_no_folder_for_it(run: Any) -> None:
    assert not (run("vqa", PRSL) / "tensorboard").exists()


def test_a_tracker_that_comes_later_does_not_begin_the_training_anew(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_step(3)(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run("vqa", PRSL, out=out)
    run("vqa", PRSL, TRACKED, out=out)
    assert sorted(curves(out / "tensorboard")["train/loss"]) == [3, 4], "it went on from the checkpoint of step 2"
    assert rows(out) == rows(run("vqa", PRSL))


def test_a_tracker_is_no_part_of_a_stages_key(tmp_path: Path) -> None:
    def keys(*overrides: str) -> dict[str, str]:
        return {stage.name: stage.key for stage in Experiment(load_recipe("demo", overrides), tmp_path, "cpu").stages}

    before, after = keys(), keys("tasks.vqa.finetune.report_to=[tensorboard]")
    assert {name for name, key in after.items() if before[name] != key} == {"report"}  # which prints the recipe


def test_an_unknown_tracker_is_refused_with_the_recipe() -> None:
    with pytest.raises(UserError, match=r"tasks\.vqa\.finetune\.report_to\.0: .*tensorboard.*mlflow"):
        load_recipe("demo", ("tasks.vqa.finetune.report_to=[mlflow]",))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"finetune\.report_to: trackio is not installed; `pip install trackio`"):
        run("vqa", PRSL, replace(CONFIG, report_to=("trackio",)), out=tmp_path / "out")
    # And not after the hours of another task
    recipe = load_recipe("demo", ("tasks.vqa.finetune.report_to=[trackio]",))
    with pytest.raises(UserError, match=r"tasks\.vqa\.finetune\.report_to: trackio is not installed"):
        run_experiment(recipe, tmp_path / "run", device="cpu")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
