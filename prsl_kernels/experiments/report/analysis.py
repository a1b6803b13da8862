"""From tables to findings: effects, curves, shares, controls, convergence, language. No words, no drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report.checks import Check, gradient_shares, run_checks
from prsl_kernels.experiments.report.masking import masking, probes
from prsl_kernels.experiments.report.scepticism import Scepticism
from prsl_kernels.experiments.report.statistics import (
    ALPHA,
    RESAMPLES,
    Interval,
    holm,
    paired_bootstrap,
    seeds_interval,
    seeds_test,
    sign_flip_test,
    wilson,
)
from prsl_kernels.experiments.report.sweeps import (
    attack_scores,
    candidates,
    convergence,
    eps_sweep,
    floors,
    language,
    seed_rows,
)
from prsl_kernels.experiments.report.tables import SECONDARY_REFERENCE, WORST, TaskTables

FEW_SEEDS = 3  # with fewer, nothing is said of the loss, only of these checkpoints
THRESHOLDS = (0.90, 0.80, 0.75, 0.70)  # the paper's Fig. 2 and 5
_LARGEST_GROUPS = 8


@dataclass(frozen=True)
class Effect:
    """One arm against cross entropy at the primary endpoint; differences are arm minus cross entropy."""

    arm: str
    attacked: Interval
    clean: Interval
    drop: Interval  # the attacked difference minus the clean one: what the attack itself did differently
    p: float
    p_holm: float
    images: int
    differing: int  # images on which the two arms score differently
    by_seed: tuple[float, ...]  # mean of `attacked` under each training seed
    across_seeds: Interval | None  # t interval over those means; None for one seed
    p_seeds: float  # Student's t test over those means, Holm over arms; 1 for one seed

    @property
    def detected(self) -> bool:
        """Whether the interval excludes zero and the adjusted p-value agrees: a change between these checkpoints."""
        return self.attacked.excludes_zero and self.p_holm < ALPHA

    @property
    def holds_across_seeds(self) -> bool | None:
        """Whether the seeds' means alone show a change; None with fewer than three seeds.

        p is over images, given these seeds, and the bootstrap takes few seeds for more than they are: neither sees
        the luck of training. This does, and asks much of three seeds.
        """
        return None if len(self.by_seed) < FEW_SEEDS else self.p_seeds < ALPHA

    @property
    def borderline(self) -> bool:
        """The interval excludes zero, but not after counting how many arms were tried."""
        return self.attacked.excludes_zero and not self.detected

    @property
    def half_width(self) -> float:
        """Half the interval's width: changes much smaller than that go unseen."""
        return (self.attacked.high - self.attacked.low) / 2


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
    attack: str
    round: int
    at_endpoint: bool
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
    last_change: Mapping[str, Interval]  # arm -> change from the last but one recorded round of the main attack
    curves: tuple[Curve, ...]
    shares: tuple[Shares, ...]
    checks: tuple[Check, ...]
    groups: pd.DataFrame
    language: pd.DataFrame
    gradients: pd.DataFrame
    scepticism: Scepticism

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
    (clean, attacked), ids = _clean_and_attacked(tables)
    means = paired_bootstrap(np.concatenate([clean, attacked, attacked - clean], axis=2))
    count = len(tables.arms)
    return Findings(
        tables=tables,
        images=len(ids),
        effects=effects(tables.others, clean, attacked),
        exploratory={
            metric: _differences(tables, metric) for metric in tables.metrics if metric != end.score
        },
        secondary=_differences(tables, end.score, SECONDARY_REFERENCE),
        levels={arm: (means[i], means[count + i]) for i, arm in enumerate(tables.arms)},
        attack_effects={arm: means[2 * count + i] for i, arm in enumerate(tables.arms)},
        last_change=_last_change(tables),
        curves=tuple(_curve(tables, metric) for metric in tables.metrics),
        shares=_shares(tables),
        checks=tuple(run_checks(tables)),
        groups=_groups(tables),
        language=_language(tables),
        gradients=gradient_shares(tables),
        scepticism=Scepticism(
            attacks=attack_scores(tables),
            ensemble=candidates(tables),
            convergence=convergence(tables),
            sweep=eps_sweep(tables),
            floors=floors(tables),
            masking=masking(tables),
            probes=probes(tables),
            seeds=seed_rows(tables, clean, attacked),
            language=language(tables),
        ),
    )  # fmt: skip


def _clean_and_attacked(tables: TaskTables) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Clean images and the endpoint, (S, n, arms) each, on the images that both have under all arms and seeds."""
    end = tables.endpoint
    values, shared = tables.aligned([(tables.main_attack, 0, None), (end.attack, end.round, None)])
    if not shared:
        raise UserError(
            f"{tables.folder / 'evaluate' / 'scores.parquet'}: no image has {end.score} at rounds 0 and {end.round} "
            f"under all of {', '.join(tables.arms)}, so nothing can be paired; run `prsl attack` and `prsl evaluate` "
            "again"
        )
    return values, shared


def effects(
    arms: Sequence[str], clean: np.ndarray, attacked: np.ndarray, *, resamples: int = RESAMPLES
) -> tuple[Effect, ...]:
    """Arm minus cross entropy for (S, n, 1 + arms) clean and attacked scores, cross entropy in column 0."""
    at_attack = attacked[:, :, 1:] - attacked[:, :, :1]
    at_clean = clean[:, :, 1:] - clean[:, :, :1]
    count = at_attack.shape[2]
    if not count:
        return ()
    intervals = paired_bootstrap(
        np.concatenate([at_attack, at_clean, at_attack - at_clean], axis=2), resamples=resamples
    )
    by_image = at_attack.mean(axis=0)
    p_values = [sign_flip_test(by_image[:, column], resamples=resamples) for column in range(count)]
    adjusted = holm(p_values)
    by_seed = at_attack.mean(axis=1)
    p_seeds = holm([seeds_test(by_seed[:, column]) for column in range(count)])
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
            by_seed=tuple(map(float, by_seed[:, i])),
            across_seeds=seeds_interval(by_seed[:, i]),
            p_seeds=p_seeds[i],
        )
        for i, arm in enumerate(arms)
    )


def _differences(tables: TaskTables, metric: str, reference: str = "primary") -> dict[str, Interval]:
    values, ids = tables.cube(metric, tables.endpoint.attack, tables.endpoint.round, reference)
    if not ids or not tables.others:
        return {}
    intervals = paired_bootstrap(values[:, :, 1:] - values[:, :, :1])
    return dict(zip(tables.others, intervals, strict=True))


def _last_change(tables: TaskTables) -> dict[str, Interval]:
    rounds = [number for number in tables.rounds(tables.main_attack) if number <= tables.main_round]
    if len(rounds) < 2:
        return {}
    values, ids = tables.aligned([(tables.main_attack, rounds[-2], None), (tables.main_attack, rounds[-1], None)])
    return dict(zip(tables.arms, paired_bootstrap(values[1] - values[0]), strict=True)) if ids else {}


def _curve(tables: TaskTables, metric: str) -> Curve:
    """Corpus scores where they are complete, since for BLEU they are the score's definition; else item means."""
    attack = tables.main_attack
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
    end = (tables.endpoint.attack, tables.endpoint.round)
    found = []
    for attack, number in dict.fromkeys(((tables.main_attack, 2), end)):
        values, ids = tables.cube(metric, attack, number)
        if not ids:
            continue
        below = {}
        for column, arm in enumerate(tables.arms):
            share = np.array([(values[:, :, column] < bound).mean() for bound in THRESHOLDS])
            low, high = wilson(share, len(ids))
            below[arm] = tuple(Interval(*map(float, ends)) for ends in zip(share, low, high, strict=True))
        scores = {arm: np.sort(values[:, :, column].ravel()) for column, arm in enumerate(tables.arms)}
        found.append(Shares(metric, attack, number, (attack, number) == end, len(ids), below, scores))
    return tuple(found)


def endpoint_outputs(tables: TaskTables) -> pd.DataFrame:
    """The outputs that the endpoint is about, one per arm, seed and image; for the worst case those chosen."""
    rows, end = tables.outputs, tables.endpoint
    if end.attack != WORST:
        return rows[(rows["attack"] == end.attack) & (rows["round"] == end.round)]
    if tables.worst.empty:  # then there was nothing to choose from
        return rows[(rows["attack"] == tables.main_attack) & (rows["round"] == tables.main_round)]
    keys = ["arm", "seed", "id", "attack", "round"]
    return rows.merge(tables.worst[keys].drop_duplicates(keys[:3]), on=keys)


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
    cells = {"clean": (tables.main_attack, 0), "attacked": (end.attack, end.round)}
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
    rows = tables.outputs
    clean = rows[(rows["attack"] == tables.main_attack) & (rows["round"] == 0)]
    blanks = rows[rows["attack"] == "blank"]
    table = []
    for arm in tables.arms:
        blank = blanks[blanks["arm"] == arm][["seed", "id", "text"]]
        line: dict[str, object] = {"arm": arm}
        for when, spoken in (("clean", clean), ("attacked", endpoint_outputs(tables))):
            texts = spoken[spoken["arm"] == arm]
            said = texts["text"].fillna("").str.strip()
            line[f"words_{when}"] = said.str.split().str.len().mean()
            line[f"distinct_{when}"] = texts.groupby("seed")["text"].nunique().mean()
            line[f"empty_{when}"] = float((said == "").mean())
            pairs = texts.merge(blank, on=["seed", "id"], suffixes=("", "_blank"))
            line[f"blank_{when}"] = float((pairs["text"] == pairs["text_blank"]).mean()) if len(pairs) else None
        table.append(line)
    return pd.DataFrame(table)
