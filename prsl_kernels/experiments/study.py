"""A recipe with a grid: first a coarse look at many arms on the selection split, then a few of them in earnest.

The grid is an experiment of its own, in `<run>/grid`; what it names, and by which numbers, is in
`<run>/<task>/choice.json`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import ArmConfig, GridConfig, PrimaryConfig, Recipe, Task
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.files import write_json

GRID = "grid"
CHOICE = "choice.json"


def grid_recipe(recipe: Recipe) -> Recipe:
    """The coarse look as an experiment: all arms, one seed, the primary attack alone, on the selection split."""
    grid = recipe.grid
    assert grid is not None
    tasks = {}
    for task, config in recipe.tasks.items():
        data = replace(config.data, attacked="select")
        attack = replace(
            config.attack, rounds=grid.rounds, controls=("blank",), keep_images=0, extra=(), transfer=None, surface=None
        )
        primary = PrimaryConfig(score=config.primary.score)
        tasks[task] = replace(config, data=data, attack=attack, primary=primary, arms=None, tests={})
    return replace(
        recipe,
        name=f"{recipe.name}-grid",
        tasks=tasks,
        arms=(*own_arms(recipe), *grid.candidates),
        seeds=(grid.seed,),
        grid=None,
    )


def own_arms(recipe: Recipe) -> tuple[ArmConfig, ...]:
    """The arms that the recipe names itself: a saved recipe also holds those that its grid has named."""
    candidates = set() if recipe.grid is None else {arm.name for arm in recipe.grid.candidates}
    return tuple(arm for arm in recipe.arms if arm.name not in candidates)


def family(arm: ArmConfig, by_k: bool = False) -> str:
    """What an arm competes with for a place: PRSL in the same space (and of the same k), or whatever is not PRSL."""
    if arm.loss != "prsl" or arm.b == 0:
        return "other losses"
    return f"PRSL, {arm.space}, k {arm.k}" if by_k else f"PRSL, {arm.space}"


def choose(scores: pd.DataFrame, recipe: Recipe, task: Task) -> dict[str, Any]:
    """The arms that a task goes on with, by the rule of `GridConfig`.

    Args:
        scores: the grid's `scores.parquet` of the task.
        recipe: with its grid.
        task: "captions" or "vqa".

    Returns:
        For each family the arm, or None where it has none; and every arm's clean and attacked mean score.
    """
    grid = recipe.grid
    assert grid is not None
    rows = scores[(scores["reference"] == "primary") & (scores["metric"] == recipe.tasks[task].primary.score)]
    method = recipe.tasks[task].attack.method
    clean, attacked = (
        rows[(rows["attack"] == method) & (rows["round"] == number)].groupby("arm")["value"].mean()
        for number in (0, grid.rounds[-1])
    )
    arms = (*own_arms(recipe), *grid.candidates)
    baseline = next(arm.name for arm in arms if arm.is_cross_entropy)
    chosen: dict[str, str | None] = {}
    families = {arm.name: family(arm, grid.each_k) for arm in arms}
    for name in dict.fromkeys(families[arm.name] for arm in grid.candidates):
        members = [arm.name for arm in grid.candidates if families[arm.name] == name]
        fair = [arm for arm in members if clean[arm] >= clean[baseline] - grid.clean_tolerance]
        # Equal scores are frequent where a penalty is inert: the stronger clean score decides, then the grid's order.
        chosen[name] = max(fair, key=lambda arm: (attacked[arm], clean[arm])) if fair else None
    return {
        "score": recipe.tasks[task].primary.score,
        "clean_tolerance": grid.clean_tolerance,
        "chosen": chosen,
        "arms": {
            name: {"family": found, "clean": float(clean[name]), "attacked": float(attacked[name])}
            for name, found in families.items()
        },
    }


def confirmed_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the arms that its finished grid in `run` names; writes `run/<task>/choice.json`."""
    grid: GridConfig | None = recipe.grid
    assert grid is not None
    own = own_arms(recipe)
    tasks = {}
    for task, config in recipe.tasks.items():
        scores = run / GRID / task / "evaluate" / "scores.parquet"
        ranks.await_path(scores)
        choice = choose(pd.read_parquet(scores), recipe, task)
        if ranks.is_main():
            write_json(run / task / CHOICE, choice)
        names = [name for name in choice["chosen"].values() if name is not None]
        say(f"{task}: the grid names {', '.join(names) or 'no arm'}")
        tasks[task] = replace(config, arms=(*(arm.name for arm in own), *names))
    named = {name for config in tasks.values() for name in config.arms or ()}
    return replace(recipe, tasks=tasks, arms=(*own, *(arm for arm in grid.candidates if arm.name in named)))
