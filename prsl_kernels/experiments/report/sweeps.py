"""Scores by attack, by round, by budget and by seed: see `scepticism` for what each finding means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from prsl_kernels.experiments.report.scepticism import (
    AttackScore,
    Convergence,
    Doubling,
    EpsPoint,
    EpsSweep,
    Floor,
    Language,
    RoundsCurve,
    SeedRow,
)
from prsl_kernels.experiments.report.statistics import ALPHA, Floats, Interval, paired_bootstrap
from prsl_kernels.experiments.report.tables import BLANK_REFERENCE, WORST, TaskTables

_ROLES = ("worst", "primary", "ensemble", "query", "eps", "unbounded", "probe", "control")
_CONVERGED = 0.1  # share of what the attack did in all, that the last doubling may still have changed


def attack_table(tables: TaskTables) -> pd.DataFrame:
    """One row per attack, at its last round: attack, role, method, objective, norm, eps, round, restarts."""
    rows = tables.outputs
    last = rows[rows["round"] == rows.groupby("attack")["round"].transform("max")]
    columns = ["attack", "role", "method", "objective", "norm", "eps", "round", "restarts"]
    return last.drop_duplicates("attack")[columns].reset_index(drop=True)


def candidates(tables: TaskTables) -> tuple[str, ...]:
    """The attacks over which the worst case is taken, by name."""
    table = attack_table(tables)
    return tuple(sorted(table.loc[table["role"].isin(["primary", "ensemble"]), "attack"]))


def levels_and_effects(tables: TaskTables, values: Floats) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Mean by arm, and by other arm the mean of arm minus cross entropy, for (S, n, all arms) scores."""
    found = paired_bootstrap(np.concatenate([values, values[:, :, 1:] - values[:, :, :1]], axis=2))
    count = len(tables.arms)
    return dict(zip(tables.arms, found[:count], strict=True)), dict(zip(tables.others, found[count:], strict=True))


def attack_scores(tables: TaskTables) -> tuple[AttackScore, ...]:
    """Mean score per attack and arm at the attack's last round."""
    ensemble = candidates(tables)
    rows = attack_table(tables).to_dict("records")
    if WORST in tables.scores.index.unique("attack"):
        number = int(tables.scores.xs(WORST, level="attack").index.get_level_values("round").max())
        rows.append({"attack": WORST, "role": WORST, "method": WORST, "objective": "", "norm": "linf",
                     "eps": tables.main_budget(), "round": number, "restarts": None})  # fmt: skip
    rows.sort(key=lambda row: (*_place(row), row["attack"]))
    found = []
    for row in rows:
        values, ids = tables.cube(tables.endpoint.score, row["attack"], int(row["round"]))
        if not ids:
            continue
        levels, effects = levels_and_effects(tables, values)
        known = len(tables.worst) and row["attack"] in ensemble
        counts = tables.worst[tables.worst["attack"] == row["attack"]]["arm"].value_counts() if known else None
        found.append(
            AttackScore(
                attack=str(row["attack"]),
                role=str(row["role"]),
                method=str(row["method"]),
                objective=str(row["objective"]),
                norm=None if pd.isna(row["norm"]) else str(row["norm"]),
                eps=None if pd.isna(row["eps"]) else float(row["eps"]),
                round=int(row["round"]),
                restarts=None if pd.isna(row["restarts"]) else int(row["restarts"]),
                images=len(ids),
                levels=levels,
                effects=effects,
                chosen=None if counts is None else {arm: int(counts.get(arm, 0)) for arm in tables.arms},
            )
        )
    return tuple(found)


def _place(row: Mapping[Any, Any]) -> tuple[int, float]:
    """Roles in their order, the sweep by its budgets."""
    role = _ROLES.index(row["role"]) if row["role"] in _ROLES else len(_ROLES)
    return role, float(row["eps"]) if row["role"] == "eps" else 0.0


def convergence(tables: TaskTables) -> Convergence:
    """Score against rounds, and what the last doubling of rounds, or more restarts, still changed."""
    main = tables.main_attack
    rounds = [number for number in tables.rounds(main) if number <= tables.main_round]
    table = attack_table(tables).set_index("attack")
    doubling = _doubling(tables, main, *_halfway(rounds))
    others, restarts = [], []
    for attack, row in table.iterrows():
        name, numbers = str(attack), tables.rounds(str(attack))
        if name == main or row["role"] == "control":
            continue
        times = 1 if pd.isna(row["restarts"]) else int(row["restarts"])
        first, remainder = divmod(numbers[-1], times)
        if times > 1 and not remainder and first in numbers:
            restarts.append(_doubling(tables, name, first, numbers[-1]))
        elif times == 1:
            others.append(_doubling(tables, name, *_halfway(numbers)))
    values, ids = tables.aligned([(main, 0, None), (main, rounds[-1], None)])
    whole = levels_and_effects(tables, values[1] - values[0])[0] if ids else {}
    tolerance = {arm: _CONVERGED * abs(whole[arm].estimate) if ids else 0.0 for arm in tables.arms}
    idle = tuple(arm for arm in tables.arms if not ids or whole[arm].high >= 0)
    ensemble = candidates(tables)
    queries = tuple(table.index[table["role"] == "query"])

    def still(doublings: Sequence[Doubling | None], wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        known = [found for found in doublings if found is not None and found.attack in wanted]
        return {
            arm: tuple(found.attack for found in known if found.changes[arm].low < -tolerance[arm])
            for arm in tables.arms
        }

    asked = {main, *(found.attack for found in (*others, *restarts) if found)}
    unasked = tuple(name for name in ensemble if name not in asked and tables.rounds(name)[-1] > 1)
    return Convergence(
        curve=_rounds_curve(tables, main, rounds),
        doubling=doubling,
        others=tuple(found for found in others if found),
        restarts=tuple(found for found in restarts if found),
        states={arm: "absent" if arm in idle else _state(doubling, arm, tolerance[arm]) for arm in tables.arms},
        tolerance=tolerance,
        idle=idle,
        rounds_open=still(others, ensemble),
        restarts_open=still(restarts, (*ensemble, *queries)),
        unasked=unasked,
    )


def _halfway(rounds: Sequence[int]) -> tuple[int, int]:
    """The recorded round nearest (by ratio) to half of the last one, and the last; twice 0 where there is none."""
    attacked = [number for number in rounds if number > 0]
    if len(attacked) < 2:
        return 0, 0
    return min(attacked[:-1], key=lambda number: abs(np.log(2 * number / attacked[-1]))), attacked[-1]


def _doubling(tables: TaskTables, attack: str, before: int, after: int) -> Doubling | None:
    values, ids = tables.aligned([(attack, before, None), (attack, after, None)]) if after else ([], ())
    if not ids:
        return None
    changes, effects = levels_and_effects(tables, values[1] - values[0])
    return Doubling(attack, before, after, len(ids), changes, effects)


def _state(doubling: Doubling | None, arm: str, tolerance: float) -> str:
    if doubling is None:
        return "absent"
    change = doubling.changes[arm]
    if -tolerance <= change.low and change.high <= tolerance:
        return "converged"
    return "moving" if change.excludes_zero else "unclear"


def _rounds_curve(tables: TaskTables, attack: str, rounds: Sequence[int]) -> RoundsCurve:
    scored = [number for number in rounds if tables.cube(tables.endpoint.score, attack, number)[1]]
    values, ids = tables.aligned([(attack, number, None) for number in scored])
    found = [levels_and_effects(tables, value) for value in values] if ids else []
    return RoundsCurve(
        attack=attack,
        rounds=tuple(scored) if ids else (),
        images=len(ids),
        levels={arm: tuple(levels[arm] for levels, _ in found) for arm in tables.arms},
        effects={arm: tuple(effects[arm] for _, effects in found) for arm in tables.others},
    )


def eps_sweep(tables: TaskTables) -> EpsSweep | None:
    """Score against the budget; None where no attack has the role "eps"."""
    table = attack_table(tables)
    swept = table[(table["role"] == "eps") & (table["norm"] == "linf")]
    points = [EpsPoint(float(row["eps"]), str(row["attack"]), int(row["round"])) for _, row in swept.iterrows()]
    if not points:
        return None
    main = EpsPoint(tables.main_budget(), tables.main_attack, tables.main_round)
    if not any(np.isclose(point.eps, main.eps, rtol=1e-6, atol=0) for point in points):
        points.append(main)
    points.append(EpsPoint(0.0, tables.main_attack, 0))
    points.sort(key=lambda point: (point.eps, point.attack))
    values, ids = tables.aligned([(point.attack, point.round, None) for point in points])
    if not ids:
        return None
    found = [levels_and_effects(tables, value) for value in values]
    changes = np.concatenate([after - before for before, after in pairwise(values)], axis=2)
    steps = paired_bootstrap(changes)
    strict = paired_bootstrap(changes, level=1 - ALPHA / (len(points) - 1))
    count = len(tables.arms)
    return EpsSweep(
        images=len(ids),
        points=tuple(points),
        levels={arm: tuple(levels[arm] for levels, _ in found) for arm in tables.arms},
        effects={arm: tuple(effects[arm] for _, effects in found) for arm in tables.others},
        steps={arm: tuple(steps[column::count]) for column, arm in enumerate(tables.arms)},
        monotone={arm: all(step.low <= 0 for step in strict[column::count]) for column, arm in enumerate(tables.arms)},
    )


def floors(tables: TaskTables) -> tuple[Floor, ...]:
    """Attacks without a bound against the score of references paired at random; empty where either is missing."""
    table = attack_table(tables)
    score = tables.endpoint.score
    rows = tables.random_pairs
    by_image = {str(name): float(value) for name, value in rows[rows["metric"] == score][["id", "value"]].to_numpy()}
    corpus = tables.random_pair_value(score)
    found = []
    for _, row in table[table["role"] == "unbounded"].iterrows():
        values, ids = tables.cube(score, str(row["attack"]), int(row["round"]))
        whole = set(ids) <= set(by_image)
        if not ids or (not whole and corpus is None):
            continue
        unrelated = np.array([by_image[name] if whole else corpus for name in ids], dtype=np.float64)
        above, _ = levels_and_effects(tables, values - unrelated[None, :, None])
        found.append(
            Floor(
                attack=str(row["attack"]),
                eps=None if pd.isna(row["eps"]) else float(row["eps"]),
                round=int(row["round"]),
                images=len(ids),
                unrelated=float(unrelated.mean()),
                by_image=whole,
                levels=levels_and_effects(tables, values)[0],
                above=above,
                reached={arm: interval.low <= 0 for arm, interval in above.items()},
            )
        )
    return tuple(found)


def seed_rows(tables: TaskTables, clean: Floats, attacked: Floats) -> tuple[SeedRow, ...]:
    """Means over images of (S, n, arms) clean and attacked scores, by arm and seed."""
    rows = []
    for column, arm in enumerate(tables.arms):
        for place, seed in enumerate(tables.seeds):
            after = attacked[place, :, column]
            effect = float((after - attacked[place, :, 0]).mean()) if column else None
            rows.append(SeedRow(arm, seed, float(clean[place, :, column].mean()), float(after.mean()), effect))
    return tuple(rows)


def blank_metric(tables: TaskTables) -> str:
    """The score that measures likeness to the blank image's output: the primary one, where that is scored so."""
    against = tables.scores.index.get_level_values("reference") == BLANK_REFERENCE
    found = set(tables.scores.index[against].unique("metric"))
    return tables.endpoint.score if tables.endpoint.score in found else "exact_match"


def language(tables: TaskTables) -> tuple[Language, ...]:
    """Length, diversity and likeness to the blank image's output, clean and attacked, by arm."""
    end = tables.endpoint
    settings = {"clean": (tables.main_attack, 0), "attacked": (end.attack, end.round)}
    metric = blank_metric(tables)
    found = []
    for setting, (attack, number) in settings.items():
        lengths, length_ids = tables.cube("length", attack, number)
        blanks, blank_ids = tables.cube(metric, attack, number, BLANK_REFERENCE)
        nothing: tuple[Mapping[str, Interval], Mapping[str, Interval]] = ({}, {})
        words = levels_and_effects(tables, lengths) if length_ids else nothing
        blank = levels_and_effects(tables, blanks) if blank_ids else nothing
        for arm in tables.arms:
            corpus = {
                name: tables.corpus_value(arm, attack, number, name)
                for name in ("distinct", "distinct_1", "distinct_2", "empty")
            }
            found.append(
                Language(
                    arm=arm,
                    setting=setting,
                    blank_metric=metric,
                    words=words[0].get(arm),
                    words_effect=words[1].get(arm),
                    blank=blank[0].get(arm),
                    blank_effect=blank[1].get(arm),
                    **corpus,
                )
            )
    return tuple(found)
