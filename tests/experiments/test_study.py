"""A recipe with a grid: what the coarse look is made of, what it names, and that the test split stays out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prsl_kernels.experiments import pipeline, study
from prsl_kernels.experiments.config import ArmConfig, ExtraAttack, GridConfig, Recipe, load_recipe, save_recipe
from prsl_kernels.experiments.errors import UserError

GRID = GridConfig(
    space=("prob", "log_prob"),
    k=(6, 20),
    b=(1e-4, 1.0),
    arms=(ArmConfig("smooth", b=0, label_smoothing=0.1), ArmConfig("drsl", loss="drsl", b=1e-4)),
    rounds=(1, 5),
    seed=3,
)


@pytest.fixture
def recipe() -> Recipe:
    demo = load_recipe("demo")
    return replace(demo, name="small", arms=demo.arms[:2], seeds=(0, 1), grid=GRID)


def scores(recipe: Recipe, attacked: dict[str, float], clean: dict[str, float] | None = None) -> pd.DataFrame:
    """Rows of three images as the grid's evaluation writes them; other metrics and references lead astray."""
    assert recipe.grid is not None
    rows: list[dict[str, Any]] = []
    for arm in (*study.own_arms(recipe), *recipe.grid.candidates):
        for number, means in ((0, clean or {}), (1, {}), (5, attacked)):
            for image, offset in (("x", -0.1), ("y", 0.0), ("z", 0.1)):
                value = means.get(arm.name, 0.5) + offset
                key = {"arm": arm.name, "attack": "bim", "round": number, "id": image}
                rows.append({**key, "reference": "primary", "metric": "bertscore_f1", "value": value})
                rows.append({**key, "reference": "secondary", "metric": "bertscore_f1", "value": 1 - value})
                rows.append({**key, "reference": "primary", "metric": "cider", "value": 1 - value})
                rows.append({**key, "attack": "blank", "reference": "primary", "metric": "bertscore_f1", "value": 9.0})
    return pd.DataFrame(rows)


def test_the_grid_is_every_combination_and_never_sees_the_test_split(recipe: Recipe) -> None:
    grid = study.grid_recipe(recipe)
    assert [arm.name for arm in grid.arms] == [
        "ce", "prsl-printed",
        "prsl-prob-k6-b0.0001", "prsl-prob-k6-b1", "prsl-prob-k20-b0.0001", "prsl-prob-k20-b1",
        "prsl-logprob-k6-b0.0001", "prsl-logprob-k6-b1", "prsl-logprob-k20-b0.0001", "prsl-logprob-k20-b1",
        "smooth", "drsl",
    ]  # fmt: skip
    assert (grid.seeds, grid.grid) == ((3,), None)
    for task, config in grid.tasks.items():
        assert config.data.attacked == "select"
        assert (config.attack.rounds, config.attack.extra, config.attack.transfer) == ((1, 5), (), None)
        assert config.finetune == recipe.tasks[task].finetune
        experiment = pipeline.Experiment(grid, Path("nowhere"), "cpu")
        attacks = [stage for stage in experiment.stages if (stage.kind, stage.task) == ("attack", task)]
        assert {stage.depends["data"] for stage in attacks} == {experiment.dataset(task, "select").fingerprint}


def test_each_family_sends_its_best_arm_of_a_similar_clean_score(recipe: Recipe) -> None:
    table = scores(
        recipe,
        attacked={"prsl-prob-k6-b1": 0.9, "prsl-prob-k20-b1": 0.8, "prsl-logprob-k6-b0.0001": 0.6, "drsl": 0.55},
        clean={"prsl-prob-k6-b1": 0.47, "prsl-prob-k20-b1": 0.481},  # 0.03 and 0.019 below cross entropy's 0.5
    )
    found = study.choose(table, recipe, "captions")
    assert found["chosen"] == {
        "PRSL, prob": "prsl-prob-k20-b1", "PRSL, log_prob": "prsl-logprob-k6-b0.0001", "other losses": "drsl",
    }  # fmt: skip
    assert found["arms"]["prsl-prob-k6-b1"] == {
        "family": "PRSL, prob", "clean": pytest.approx(0.47), "attacked": pytest.approx(0.9),
    }  # fmt: skip
    nothing = study.choose(scores(recipe, {}, {"smooth": 0.1, "drsl": 0.2}), recipe, "captions")
    assert nothing["chosen"]["other losses"] is None
    assert nothing["chosen"]["PRSL, prob"] == "prsl-prob-k6-b0.0001"  # all alike: the first


def test_the_confirmed_recipe_holds_the_named_arms_task_by_task(recipe: Recipe, tmp_path: Path) -> None:
    wins = {"captions": {"prsl-prob-k20-b1": 0.9, "drsl": 0.7}, "vqa": {"prsl-prob-k6-b1": 0.9, "smooth": 0.7}}
    for task, attacked in wins.items():
        folder = tmp_path / "grid" / task / "evaluate"
        folder.mkdir(parents=True)
        table = scores(recipe, attacked).replace({"bertscore_f1": recipe.tasks[task].primary.score})  # type: ignore[index]
        table.to_parquet(folder / "scores.parquet")
    confirmed = study.confirmed_recipe(recipe, tmp_path)
    names = {task: [arm.name for arm in confirmed.arms_of(task)] for task in confirmed.tasks}
    assert names == {
        "captions": ["ce", "prsl-printed", "prsl-prob-k20-b1", "prsl-logprob-k6-b0.0001", "drsl"],
        "vqa": ["ce", "prsl-printed", "prsl-prob-k6-b1", "prsl-logprob-k6-b0.0001", "smooth"],
    }
    choice = json.loads((tmp_path / "vqa" / "choice.json").read_text())
    assert choice["chosen"]["other losses"] == "smooth"
    # The saved recipe, run again, makes the same of itself.
    (tmp_path / "recipe.yaml").write_text(save_recipe(confirmed))
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert study.own_arms(again) == recipe.arms
    assert study.confirmed_recipe(again, tmp_path) == confirmed
    assert study.grid_recipe(again) == study.grid_recipe(recipe)
    # Each task has stages for its own arms alone.
    stages = pipeline.Experiment(confirmed, tmp_path, "cpu").stages
    finetuned = {stage.arm for stage in stages if (stage.kind, stage.task) == ("finetune", "vqa")}
    assert finetuned == set(names["vqa"])


def test_the_shipped_study_is_declared_in_full() -> None:
    recipe = load_recipe("study")
    assert recipe.grid is not None
    assert len(recipe.seeds) >= 3
    assert {arm.k for arm in recipe.grid.candidates if arm.loss == "prsl" and arm.b != 0} == {6, 20, 100}
    weights = sorted({arm.b for arm in recipe.grid.candidates if arm.loss == "prsl" and arm.b})
    assert (weights[0], weights[-1]) == (1e-6, 1e2)
    for config in recipe.tasks.values():
        assert config.primary.attack == "worst"
        methods = {attack.method for attack in config.attack.extra}
        assert methods >= {"fgsm", "pgd", "mi-fgsm", "apgd", "square"}
        assert {attack.objective for attack in config.attack.extra} >= {
            "ce",
            "margin",
            "dlr",
            "ce+bd",
            "ce-bd",
            "target",
        }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("grid.b=[1, 1]",), "names must differ"),
        (("grid.k=[]", "grid.arms=[]"), "grid: names no arm"),
        (("grid.arms=[{name: plain, b: 0}]",), "'plain' is cross entropy"),
        (("arms.prsl-printed.name=prsl-prob-k6-b1",), "another arm of this name"),
        (("grid.rounds=[5, 1]",), "ascend"),
        (("tasks.vqa.attack.extra.eps-1.norm=l2",), "primary attack's norm"),
        (("tasks.vqa.attack.extra.square.method=apgd",), "role query"),
        (("tasks.vqa.primary.attack=square",), "role ensemble"),
    ],
)
def test_unusable_grids_and_attacks_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("study", overrides)


def test_a_refused_recipe_leaves_nothing_and_replaces_nothing(recipe: Recipe, tmp_path: Path) -> None:
    wrong = replace(recipe.tasks["vqa"].attack, extra=(ExtraAttack("apgd", method="apgd", rounds=(5,), restarts=2),))
    bad = replace(recipe, tasks={**recipe.tasks, "vqa": replace(recipe.tasks["vqa"], attack=wrong)})
    for grid in (bad.grid, None):
        with pytest.raises(UserError, match=r"tasks\.vqa\.attack: attack 'apgd'"):
            pipeline.run_experiment(replace(bad, grid=grid), tmp_path, device="cpu")
        assert [path.name for path in tmp_path.rglob("*") if not path.name.startswith(".lock")] == []
