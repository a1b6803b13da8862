"""A plan against what the run then takes, by the processor time of each stage: other work on the machine is not in it.

Libraries are imported beforehand, since a plan counts them once for each process.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from prsl_kernels.experiments.config import Recipe, load_recipe, save_recipe
from prsl_kernels.experiments.pipeline import Experiment, execute
from prsl_kernels.experiments.planning import make_plan, render

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_single_thread")]

_HEAVY = ("training.finetune", "attacks.run", "attacks.transfer", "metrics.evaluate", "metrics.bertscore", "report")


@pytest.fixture(name="recipe")
def recipe_fixture(tmp_path: Path) -> Recipe:
    """The demo, cut to two arms and a few images, with further attacks."""
    raw = yaml.safe_load(save_recipe(load_recipe("demo")))
    raw["arms"] = [arm for arm in raw["arms"] if arm["name"] in ("ce", "prsl-k20")]
    for task in raw["tasks"].values():
        task["data"].update(train_limit=64, select_limit=16, test_limit=12)
        task["finetune"].update(steps=6, batch_size=8, evaluate_every=3, log_every=3, calibration_batches=1)
        task["attack"].update(
            rounds=[1, 2, 3],
            keep_images=2,
            extra=[
                {"name": "pgd", "method": "pgd", "rounds": [2, 4], "restarts": 2},
                {"name": "square", "method": "square", "role": "query", "rounds": [6], "images": 6},
            ],
            transfer={"attack": "pgd", "images": 6},
            surface={"images": 2, "points": 3},
        )
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_recipe(str(path))


def _spent() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_a_run_takes_what_was_planned_within_a_factor_of_two(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    planned = make_plan(recipe, run, device="cpu")
    assert not run.exists()
    for name in _HEAVY:
        importlib.import_module(f"prsl_kernels.experiments.{name}")
    run.mkdir()
    (run / "recipe.yaml").write_text(save_recipe(recipe))  # for the report's first lines
    took: Counter[tuple[str, str]] = Counter()
    for stage in Experiment(recipe, run, "cpu").stages:
        before = _spent()
        execute(run, stage)
        took[stage.task or "", stage.kind] += _spent() - before
    print(render(planned))
    ratios = {(row.task, row.kind): row.seconds * row.number / took[row.task, row.kind] for row in planned.rows}
    print({key: (round(took[key], 1), round(ratio, 2)) for key, ratio in ratios.items()})
    disk = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    assert 0.5 < sum(row.disk * row.number for row in planned.rows) / disk < 2
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    again = make_plan(recipe, run, device="cpu")
    assert all(row.cached == row.number and row.left == 0 for row in again.rows)
