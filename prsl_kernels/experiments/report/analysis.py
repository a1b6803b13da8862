"""From tables to findings: effects, curves, shares, controls, convergence, language. No words, no drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report.statistics import Interval, holm, paired_bootstrap, sign_flip_test, wilson
from prsl_kernels.experiments.report.tables import SECONDARY_REFERENCE, TaskTables
from prsl_kernels.experiments.report.text import percent, pixels

ALPHA = 0.05
THRESHOLDS = (0.90, 0.80, 0.75, 0.70)  # the paper's Fig. 2 and 5
_LARGEST_GROUPS = 8
_MASKING_SHARE = 0.10  # of exactly zero input gradients, above which an attack is not to be trusted


@dataclass(frozen=True)
class Effect:
    """One PRSL arm against cross entropy at the primary endpoint; differences are arm minus cross entropy."""

    arm: str
    attacked: Interval
    clean: Interval
    drop: Interval  # the attacked difference minus the clean one: what the attack itself did differently
    p: float
    p_holm: float
    images: int
    differing: int  # images on which the two arms score differently

    @property
    def detected(self) -> bool:
        """Whether the interval excludes zero and the adjusted p-value agrees."""
        return self.attacked.excludes_zero and self.p_holm < ALPHA

    @property
    def borderline(self) -> bool:
        """The interval excludes zero, but not after counting how many arms were tried."""
        return self.attacked.excludes_zero and not self.detected


@dataclass(frozen=True)
class Check:
    """A control: what was expected, what was found; `passed` None where the run does not hold it."""

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Curve:
    """A score against the attack's rounds for every arm; `band` is the interval of cross entropy's mean, by round."""

    metric: str
    corpus: bool  # corpus scores where the run has them, else means over images
    rounds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    band: tuple[Interval, ...]
    blank: float | None
    random_pair: float | None


@dataclass(frozen=True)
class Shares:
    """Per arm, the share of outputs scoring below each threshold with Wilson bounds, and all scores, sorted."""

    metric: str
    round: int
    images: int
    below: Mapping[str, tuple[Interval, ...]]
    scores: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Findings:
    """All that the report says of one task, except its pictures and examples."""

    tables: TaskTables
    images: int
    effects: tuple[Effect, ...]
    exploratory: Mapping[str, Mapping[str, Interval]]  # metric -> arm -> arm minus cross entropy
    secondary: Mapping[str, Interval]  # arm -> the same for the primary score against the arm's own clean output
    levels: Mapping[str, tuple[Interval, Interval]]  # arm -> primary score clean, attacked
    attack_effects: Mapping[str, Interval]  # arm -> primary score attacked minus clean
    last_change: Mapping[str, Interval]  # arm -> change of the primary score from the last but one recorded round
    curves: tuple[Curve, ...]
    shares: tuple[Shares, ...]
    checks: tuple[Check, ...]
    groups: pd.DataFrame
    language: pd.DataFrame
    gradients: pd.DataFrame

    @property
    def attack_effect(self) -> Interval:
        """What the attack did to cross entropy: attacked minus clean."""
        return self.attack_effects[self.tables.baseline]

    @property
    def attack_worked(self) -> bool:
        return self.attack_effect.high < 0


def analyse(tables: TaskTables) -> Findings:
    """Computes every finding of a task from its tables."""
    end = tables.endpoint
    scores, ids = _clean_and_attacked(tables, end.score, end.round)
    clean, attacked = scores
    means = paired_bootstrap(np.concatenate([clean, attacked, attacked - clean], axis=2))
    count = len(tables.arms)
    return Findings(
        tables=tables,
        images=len(ids),
        effects=_effects(tables, clean, attacked),
        exploratory={
            metric: _differences(tables, metric) for metric in tables.metrics if metric != end.score
        },
        secondary=_differences(tables, end.score, SECONDARY_REFERENCE),
        levels={arm: (means[i], means[count + i]) for i, arm in enumerate(tables.arms)},
        attack_effects={arm: means[2 * count + i] for i, arm in enumerate(tables.arms)},
        last_change=_last_change(tables),
        curves=tuple(_curve(tables, metric) for metric in tables.metrics),
        shares=_shares(tables),
        checks=tuple(_checks(tables)),
        groups=_groups(tables),
        language=_language(tables),
        gradients=_gradients(tables),
    )  # fmt: skip


def _clean_and_attacked(tables: TaskTables, metric: str, number: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The primary attack's clean round and round `number`, on the images that both have under all arms and seeds."""
    found = [tables.cube(metric, tables.endpoint.attack, wanted) for wanted in (0, number)]
    shared = sorted(set(found[0][1]) & set(found[1][1]))
    if not shared:
        raise UserError(
            f"{tables.folder / 'evaluate' / 'scores.parquet'}: no image has {metric} at rounds 0 and {number} under "
            f"all of {', '.join(tables.arms)}, so nothing can be paired; run `prsl attack` and `prsl evaluate` again"
        )
    picked = [values[:, [ids.index(name) for name in shared], :] for values, ids in found]
    return picked, tuple(shared)


def _effects(tables: TaskTables, clean: np.ndarray, attacked: np.ndarray) -> tuple[Effect, ...]:
    """Arm minus cross entropy for (S, n, arms) clean and attacked scores, cross entropy in column 0."""
    at_attack = attacked[:, :, 1:] - attacked[:, :, :1]
    at_clean = clean[:, :, 1:] - clean[:, :, :1]
    count = at_attack.shape[2]
    if not count:
        return ()
    intervals = paired_bootstrap(np.concatenate([at_attack, at_clean, at_attack - at_clean], axis=2))
    by_image = at_attack.mean(axis=0)
    p_values = [sign_flip_test(by_image[:, column]) for column in range(count)]
    adjusted = holm(p_values)
    return tuple(
        Effect(
            arm=arm,
            attacked=intervals[i],
            clean=intervals[count + i],
            drop=intervals[2 * count + i],
            p=p_values[i],
            p_holm=adjusted[i],
            images=len(by_image),
            differing=int((at_attack[:, :, i] != 0).any(axis=0).sum()),
        )
        for i, arm in enumerate(tables.others)
    )


def _differences(tables: TaskTables, metric: str, reference: str = "primary") -> dict[str, Interval]:
    values, ids = tables.cube(metric, tables.endpoint.attack, tables.endpoint.round, reference)
    if not ids or not tables.others:
        return {}
    intervals = paired_bootstrap(values[:, :, 1:] - values[:, :, :1])
    return dict(zip(tables.others, intervals, strict=True))


def _last_change(tables: TaskTables) -> dict[str, Interval]:
    rounds = [number for number in tables.rounds(tables.endpoint.attack) if number <= tables.endpoint.round]
    if len(rounds) < 2:
        return {}
    before, before_ids = tables.cube(tables.endpoint.score, tables.endpoint.attack, rounds[-2])
    after, after_ids = tables.cube(tables.endpoint.score, tables.endpoint.attack, rounds[-1])
    if not before_ids or before_ids != after_ids:
        return {}
    return dict(zip(tables.arms, paired_bootstrap(after - before), strict=True))


def _curve(tables: TaskTables, metric: str) -> Curve:
    """Corpus scores where they are complete, since for BLEU they are the score's definition; else item means."""
    attack = tables.endpoint.attack
    rounds = tables.rounds(attack)
    cubes = [tables.cube(metric, attack, number)[0] for number in rounds]
    kept = [i for i, cube in enumerate(cubes) if cube.shape[1]]
    rounds, cubes = tuple(rounds[i] for i in kept), [cubes[i] for i in kept]
    items = {
        arm: [float(cube[:, :, column].mean()) for cube in cubes] for column, arm in enumerate(tables.arms)
    }  # fmt: skip
    whole = {arm: [tables.corpus_value(arm, attack, number, metric) for number in rounds] for arm in tables.arms}
    corpus = all(value is not None for values in whole.values() for value in values)
    values = {
        arm: tuple(value for value in (whole if corpus else items)[arm] if value is not None) for arm in tables.arms
    }
    base = tables.baseline
    band: tuple[Interval, ...] = ()
    if np.allclose(values[base], items[base], atol=1e-6):
        shared = {cube.shape[1] for cube in cubes}
        if len(shared) == 1:
            band = tuple(paired_bootstrap(np.concatenate([cube[:, :, :1] for cube in cubes], axis=2)))
    blank_rounds = tables.rounds("blank")[-1:]
    blanks = [tables.corpus_value(arm, "blank", number, metric) for arm in tables.arms for number in blank_rounds]
    known = [value for value in blanks if value is not None]
    return Curve(
        metric=metric,
        corpus=corpus,
        rounds=rounds,
        values=values,
        band=band,
        blank=float(np.mean(known)) if known else None,
        random_pair=tables.random_pair_value(metric),
    )


def _shares(tables: TaskTables) -> tuple[Shares, ...]:
    """After two rounds, as in the paper, and at the endpoint; of BERTScore F1. Empty where the run has none."""
    metric = "bertscore_f1"
    rounds = tables.rounds(tables.endpoint.attack)
    found = []
    for number in dict.fromkeys((2, tables.endpoint.round)):
        values, ids = tables.cube(metric, tables.endpoint.attack, number) if number in rounds else (np.empty(0), ())
        if not ids:
            continue
        below = {}
        for column, arm in enumerate(tables.arms):
            share = np.array([(values[:, :, column] < bound).mean() for bound in THRESHOLDS])
            low, high = wilson(share, len(ids))
            below[arm] = tuple(Interval(*map(float, ends)) for ends in zip(share, low, high, strict=True))
        scores = {arm: np.sort(values[:, :, column].ravel()) for column, arm in enumerate(tables.arms)}
        found.append(Shares(metric, number, len(ids), below, scores))
    return tuple(found)


def _checks(tables: TaskTables) -> list[Check]:
    return [_zero_step(tables), _budget(tables), *_beats(tables), _finite_gradients(tables)]


def _zero_step(tables: TaskTables) -> Check:
    name = "A step of 0 changes nothing"
    rows = tables.outputs
    control = rows[rows["attack"] == "zero-step"]
    if control.empty:
        return Check(name, None, "the run has no zero-step control")
    keys = ["arm", "seed", "id"]
    clean = rows[(rows["attack"] == tables.endpoint.attack) & (rows["round"] == 0)][[*keys, "text"]]
    pairs = control.merge(clean, on=keys, suffixes=("", "_clean"))
    changed = int((pairs["text"] != pairs["text_clean"]).sum())
    moved = float(control["linf"].max())
    found = (
        f"{changed:,} of {len(pairs):,} outputs differ from those of the clean images; largest change of a pixel "
        f"{pixels(moved)}"
    )
    return Check(name, len(pairs) == len(control) and changed == 0 and moved == 0, found)


def _budget(tables: TaskTables) -> Check:
    rows = tables.outputs[(tables.outputs["round"] > 0) & tables.outputs["eps"].notna()]
    excess = float((rows["linf"] - rows["eps"]).max()) if len(rows) else 0.0
    largest = float(rows["linf"].max()) if len(rows) else 0.0
    allowed = pixels(float(tables.outputs["eps"].max()))
    found = f"largest change of a pixel {pixels(largest)}, allowed {allowed}, after rounding to 8 bits"
    return Check("No image leaves the budget", excess <= 1e-6, found)


def _beats(tables: TaskTables) -> list[Check]:
    """The attack must lower the score further than coin flips of the same size do, and than one step alone."""
    end = tables.endpoint
    rounds = [number for number in tables.rounds(end.attack) if number > 0]
    rivals = [("The attack beats random signs of the same size", "random-sign", tables.rounds("random-sign")[-1:])]
    rivals.append(("Many rounds beat one", end.attack, tuple(rounds[:1]) if rounds[:1] != [end.round] else ()))
    checks = []
    for name, attack, numbers in rivals:
        mine, my_ids = tables.cube(end.score, end.attack, end.round)
        other, ids = tables.cube(end.score, attack, numbers[0]) if numbers else (mine, ())
        if not ids or ids != my_ids:
            checks.append(Check(name, None, "the run does not hold both on the same images"))
            continue
        intervals = dict(zip(tables.arms, paired_bootstrap(mine - other), strict=True))
        failed = [arm for arm, interval in intervals.items() if interval.high >= 0]
        base = intervals[tables.baseline]
        found = f"cross entropy: {base.text}"
        found += f"; not so for {', '.join(failed)}" if failed else "; so for every arm"
        checks.append(Check(name, not failed, found))
    return checks


def _finite_gradients(tables: TaskTables) -> Check:
    name = "Input gradients are healthy"
    table = _gradients(tables)
    if table.empty:
        return Check(name, None, "the run records no shares of zero and non-finite gradients")
    zero, broken = float(table["zero_max"].max()), float(table["nonfinite_max"].max())
    found = f"at most {percent(zero, 2)} exactly zero and {percent(broken, 2)} not finite, in any arm and round"
    return Check(name, broken == 0 and zero <= _MASKING_SHARE, found)


def _gradients(tables: TaskTables) -> pd.DataFrame:
    """Per arm: mean share of zero gradients in the first and last attacked round, and the largest round means."""
    rows = tables.outputs[(tables.outputs["attack"] == tables.endpoint.attack) & (tables.outputs["round"] > 0)]
    rows = rows.dropna(subset=["zero_gradient_share", "nonfinite_gradient_share"])
    table = []
    for arm in tables.arms:
        means = rows[rows["arm"] == arm].groupby("round")[["zero_gradient_share", "nonfinite_gradient_share"]].mean()
        if len(means):
            zero, broken = means["zero_gradient_share"], means["nonfinite_gradient_share"]
            table.append({"arm": arm, "zero_first": zero.iloc[0], "zero_last": zero.iloc[-1], "zero_max": zero.max(),
                          "nonfinite_max": broken.max()})  # fmt: skip
    return pd.DataFrame(table)


def _groups(tables: TaskTables) -> pd.DataFrame:
    """Mean primary score per group and arm: columns group, images, arm, clean, attacked, blank. Small groups lumped."""
    end = tables.endpoint
    names = tables.outputs.drop_duplicates("id").set_index("id")["group"].fillna("").astype(str)
    sizes = names.value_counts()
    if len(sizes) < 2:
        return pd.DataFrame()
    large = set(sizes.index[: _LARGEST_GROUPS - (len(sizes) > _LARGEST_GROUPS)])
    names = names.where(names.isin(large), "all others")
    blank_rounds = tables.rounds("blank")
    cells = {"clean": (end.attack, 0), "attacked": (end.attack, end.round)}
    if blank_rounds:
        cells["blank"] = ("blank", blank_rounds[-1])
    parts = []
    for column, (attack, number) in cells.items():
        values, ids = tables.cube(end.score, attack, number)
        if ids:
            wide = pd.DataFrame(values.mean(axis=0), index=list(ids), columns=list(tables.arms))
            means = wide.groupby(names.reindex(wide.index)).mean().stack()
            parts.append(means.rename(column))
    table = pd.concat(parts, axis=1).rename_axis(["group", "arm"]).reset_index()
    table["images"] = table["group"].map(names.value_counts())
    return table


def _language(tables: TaskTables) -> pd.DataFrame:
    """Per arm, clean and attacked: words per output, distinct outputs, shares of empty ones and of the blank's."""
    end = tables.endpoint
    rows = tables.outputs
    settings = {"clean": (end.attack, 0), "attacked": (end.attack, end.round)}
    table = []
    for arm in tables.arms:
        of_arm = rows[rows["arm"] == arm]
        blank = of_arm[of_arm["attack"] == "blank"][["seed", "id", "text"]]
        line: dict[str, object] = {"arm": arm}
        for when, (attack, number) in settings.items():
            texts = of_arm[(of_arm["attack"] == attack) & (of_arm["round"] == number)]
            said = texts["text"].fillna("").str.strip()
            line[f"words_{when}"] = said.str.split().str.len().mean()
            line[f"distinct_{when}"] = texts.groupby("seed")["text"].nunique().mean()
            line[f"empty_{when}"] = float((said == "").mean())
            pairs = texts.merge(blank, on=["seed", "id"], suffixes=("", "_blank"))
            line[f"blank_{when}"] = float((pairs["text"] == pairs["text_blank"]).mean()) if len(pairs) else None
        table.append(line)
    return pd.DataFrame(table)
