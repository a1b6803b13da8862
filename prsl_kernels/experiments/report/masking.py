"""Evidence on gradient masking: transfer, attacks without gradients, the gradients, the loss surface.

A model whose gradients are masked resists attacks that follow them without being robust. Images made elsewhere, or
found without gradients, then lower its score further than its own white box does. Sources: Athalye et al., "Obfuscated
Gradients Give a False Sense of Security" (2018); Carlini et al., "On Evaluating Adversarial Robustness" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prsl_kernels.experiments.report.scepticism import (
    GradientHealth,
    Masking,
    MaskingTest,
    Probe,
    Query,
    Surface,
    Transfer,
)
from prsl_kernels.experiments.report.statistics import (
    ALPHA,
    RESAMPLES,
    Floats,
    Interval,
    max_statistic_test,
    paired_bootstrap,
)
from prsl_kernels.experiments.report.sweeps import attack_table, candidates, levels_and_effects
from prsl_kernels.experiments.report.tables import TaskTables

_PARABOLA = 5  # points at which a parabola no longer passes through all of them


@dataclass(frozen=True)
class Comparison:
    """A score of one arm beside its white box's, (S, n) each, on `ids`."""

    kind: str
    arm: str
    source: str
    ids: tuple[str, ...]
    asked: Floats
    white_box: Floats
    same_attack: Floats | None


def masking(tables: TaskTables) -> Masking:
    """Everything that the run holds on masked gradients."""
    table = attack_table(tables)
    gradient = table["role"].isin(["primary", "ensemble"]) & (table["method"] != "square")
    white_box = {str(row["attack"]): int(row["round"]) for _, row in table[gradient].iterrows()}
    shown = _shown(tables)
    name = str(((tables.config.get("attack") or {}).get("transfer") or {}).get("attack") or tables.main_attack)
    queries = {str(row["attack"]): int(row["round"]) for _, row in table[table["role"] == "query"].iterrows()}
    comparisons = [*_transfers(tables, shown, name, white_box), *_queries(tables, queries, white_box)]
    tests = masking_tests(comparisons)
    return Masking(
        white_box=tuple(sorted(white_box)),
        transfer=_transfer(tables, shown, name, [test for test in tests if test.kind == "transfer"]),
        queries=tuple(
            query
            for attack, number in queries.items()
            if (query := _query(tables, attack, number, [test for test in tests if test.source == attack])) is not None
        ),
        comparisons=len(tests),
        gradients=_gradient_health(tables),
        surfaces=tuple(surface for arm in tables.arms if (surface := _surface(tables, arm)) is not None),
        suspected={
            arm: tuple(test for test in tests if test.arm == arm and test.suspicious)
            for arm in tables.arms
        },
    )  # fmt: skip


def _shown(tables: TaskTables) -> dict[str, tuple[str, int]]:
    """source -> (attack's name in the scores, round) of the images that were made on it."""
    rows = tables.transferred[["source", "attack", "round"]].drop_duplicates("source")
    return {str(source): (str(attack), int(number)) for source, attack, number in rows.itertuples(index=False)}


def _transfers(
    tables: TaskTables, shown: Mapping[str, tuple[str, int]], attack: str, white_box: Mapping[str, int]
) -> list[Comparison]:
    found = []
    for source, (name, number) in shown.items():
        for arm in tables.arms:
            if arm == source:
                continue
            cells = [(name, number, [arm]), (attack, _last(tables, attack), [arm])]
            values, ids = tables.aligned([*cells, *((each, last, [arm]) for each, last in white_box.items())])
            if ids:
                columns = [value[:, :, 0] for value in values]
                lowest = np.minimum.reduce(columns[2:])
                found.append(Comparison("transfer", arm, source, ids, columns[0], lowest, columns[1]))
    return found


def _queries(tables: TaskTables, queries: Mapping[str, int], white_box: Mapping[str, int]) -> list[Comparison]:
    found = []
    for attack, number in queries.items():
        for arm in tables.arms:
            values, ids = tables.aligned([(each, last, [arm]) for each, last in [(attack, number), *white_box.items()]])
            if ids:
                columns = [value[:, :, 0] for value in values]
                lowest = np.minimum.reduce(columns[1:])
                found.append(Comparison("query", arm, attack, ids, columns[0], lowest, None))
    return found


def _last(tables: TaskTables, attack: str) -> int:
    rounds = tables.rounds(attack)
    return rounds[-1] if rounds else -1


def masking_tests(comparisons: Sequence[Comparison], *, resamples: int = RESAMPLES) -> list[MaskingTest]:
    """Intervals, and p-values adjusted over all comparisons: an arm is not accused for having been asked often."""
    if not comparisons:
        return []
    ids = sorted({name for comparison in comparisons for name in comparison.ids})
    place = {name: row for row, name in enumerate(ids)}
    differences = np.full((len(ids), len(comparisons)), np.nan)
    for column, comparison in enumerate(comparisons):
        rows = [place[name] for name in comparison.ids]
        differences[rows, column] = (comparison.asked - comparison.white_box).mean(axis=0)
    tests = []
    for comparison, p in zip(comparisons, max_statistic_test(differences, resamples=resamples), strict=True):
        same = comparison.same_attack
        columns = [comparison.asked, comparison.white_box, comparison.asked - comparison.white_box]
        columns += [] if same is None else [comparison.asked - same]
        intervals = paired_bootstrap(np.stack(columns, axis=2), resamples=resamples)
        difference = intervals[2]
        tests.append(
            MaskingTest(
                kind=comparison.kind,
                arm=comparison.arm,
                source=comparison.source,
                images=len(comparison.ids),
                level=intervals[0],
                white_box=intervals[1],
                difference=difference,
                same_attack=intervals[3] if same is not None else None,
                p=p,
                suspicious=difference.high < 0 and p < ALPHA,
            )
        )
    return tests


def _transfer(
    tables: TaskTables, shown: Mapping[str, tuple[str, int]], attack: str, tests: Sequence[MaskingTest]
) -> Transfer | None:
    if not tests:
        return None
    by_pair = {(test.source, test.arm): test for test in tests}
    own = (attack, _last(tables, attack))
    matrix = {pair: test.level for pair, test in by_pair.items()}
    pools = []
    for arm in tables.arms:
        others = [shown[source] for source in shown if source != arm]
        values, ids = tables.aligned([(name, number, [arm]) for name, number in [own, *others]])
        if ids:
            matrix[arm, arm] = paired_bootstrap(values[0])[0]
            pools.append((ids, np.minimum.reduce(values)))
    effects: Mapping[str, Interval] = {}
    complete = set(shown) == set(tables.arms) and len(pools) == len(tables.arms)
    if complete and len({ids for ids, _ in pools}) == 1:
        _, effects = levels_and_effects(tables, np.concatenate([pool for _, pool in pools], axis=2))
    return Transfer(attack, max(test.images for test in tests), matrix, by_pair, effects)


def _query(tables: TaskTables, attack: str, number: int, tests: Sequence[MaskingTest]) -> Query | None:
    values, ids = tables.cube(tables.endpoint.score, attack, number)
    if not ids or not tests:
        return None
    levels, effects = levels_and_effects(tables, values)
    return Query(attack, number, len(ids), levels, {test.arm: test for test in tests}, effects)


def probes(tables: TaskTables) -> tuple[Probe, ...]:
    """Attacks of the role "probe" that keep to the primary budget and norm: did the ensemble leave something undone?"""
    table = attack_table(tables)
    budget = tables.main_budget() * (1 + 1e-6)
    kept = table[(table["role"] == "probe") & (table["norm"] == "linf") & (table["eps"].astype(float) <= budget)]
    cells = [(name, tables.rounds(name)[-1], None) for name in candidates(tables)]
    found = []
    for _, row in kept.iterrows():
        name, number = str(row["attack"]), int(row["round"])
        values, ids = tables.aligned([(name, number, None), *cells])
        if ids:
            difference = values[0] - np.minimum.reduce(values[1:])
            strict = paired_bootstrap(difference, level=1 - ALPHA / (len(kept) * len(tables.arms)))
            lower = tuple(arm for arm, interval in zip(tables.arms, strict, strict=True) if interval.high < 0)
            levels = dict(zip(tables.arms, paired_bootstrap(difference), strict=True))
            found.append(Probe(name, number, len(ids), levels, lower))
    return tuple(found)


def _gradient_health(tables: TaskTables) -> tuple[GradientHealth, ...]:
    rows = tables.main_rows
    last = rows[rows["round"] == tables.main_round]
    logs = {arm: _log_norms(last[last["arm"] == arm], tables.seeds) for arm in tables.arms}
    base = logs[tables.baseline]
    recorded = bool(last["gradient_norm"].notna().any())
    found = []
    for arm in tables.arms:
        means = rows[rows["arm"] == arm].groupby("round")[["zero_gradient_share", "nonfinite_gradient_share"]].mean()
        zero, broken = (None if means[name].isna().all() else float(means[name].max()) for name in means)
        mine, ratio = logs[arm], None
        pairs = (mine - base).dropna()
        if arm != tables.baseline and len(pairs):
            logarithm = paired_bootstrap(pairs.to_numpy(dtype=np.float64).T[:, :, None])[0]
            ratio = Interval(*(float(np.exp(end)) for end in (logarithm.estimate, logarithm.low, logarithm.high)))
        norm = float(np.exp(np.nanmean(mine.to_numpy()))) if mine.notna().to_numpy().any() else None
        asked = int((last["arm"] == arm).sum()) if recorded else 0
        found.append(GradientHealth(arm, zero, broken, norm, ratio, int(mine.notna().to_numpy().sum()), asked))
    return tuple(found)


def _log_norms(rows: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Logarithms of the gradients' norms, a row per image and a column per seed; NaN where not positive and finite."""
    norms = rows.assign(norm=rows["gradient_norm"].astype(float)).groupby(["id", "seed"])["norm"].mean().unstack("seed")
    norms = norms.reindex(columns=list(seeds))
    return np.log(norms.where((norms > 0) & np.isfinite(norms)))


def _surface(tables: TaskTables, arm: str) -> Surface | None:
    """One arm's slices; images whose grid is not complete and finite under all seeds are left out."""
    rows = tables.surface[tables.surface["arm"] == arm]
    if rows.empty:
        return None
    a, b = (np.array(sorted(rows[name].unique()), dtype=np.float64) for name in ("a", "b"))
    grids = rows.set_index(["id", "seed", "b", "a"])["value"].unstack(["seed", "b", "a"]).sort_index(axis=1)
    grids = grids[np.isfinite(grids.astype(float)).all(axis=1)]
    if grids.empty or grids.shape[1] != len(tables.seeds) * len(b) * len(a):
        return None
    values = grids.to_numpy(dtype=np.float64).reshape(len(grids), len(tables.seeds), len(b), len(a)).swapaxes(0, 1)
    central_a, central_b = (np.isclose(np.abs(axis), np.abs(axis).min()) for axis in (a, b))
    along_a, along_b = values[:, :, central_b, :].mean(axis=2), values[:, :, :, central_a].mean(axis=3)
    centre = along_a[:, :, central_a].mean(axis=2)
    gradient, random = along_a[:, :, -1] - centre, along_b[:, :, -1] - centre
    rises = paired_bootstrap(np.stack([gradient, random, gradient - random], axis=2))
    mean = values.mean(axis=(0, 1))
    return Surface(
        arm=arm,
        images=values.shape[0] * values.shape[1],
        along_gradient=rises[0],
        along_random=rises[1],
        difference=rises[2],
        roughness=_roughness(a, along_a.reshape(-1, len(a))),
        a=tuple(map(float, a)),
        b=tuple(map(float, b)),
        values=tuple(tuple(map(float, row)) for row in mean),
    )


def _roughness(a: Floats, profiles: Floats) -> float | None:
    """Mean over (n, points) profiles of the RMS residual of a parabola over the profile's range; 0 where flat."""
    if len(a) < _PARABOLA:
        return None
    fitted = np.polynomial.polynomial.polyval(a, np.polynomial.polynomial.polyfit(a, profiles.T, 2))
    residual = np.sqrt(((profiles - fitted) ** 2).mean(axis=1))
    extent = np.ptp(profiles, axis=1)
    return float(np.divide(residual, extent, out=np.zeros_like(residual), where=extent > 0).mean())
