"""The findings of a task as plain data: every number of the report, what each control says, and what to distrust."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from prsl_kernels.experiments.report.analysis import FEW_SEEDS, THRESHOLDS, Findings
from prsl_kernels.experiments.report.claims import (
    arm_verdicts,
    convergence_told,
    told,
    too_few,
    unexcluded_masking,
    unhealthy,
    unlike,
)
from prsl_kernels.experiments.report.scepticism import ZERO_SHARE
from prsl_kernels.experiments.report.statistics import ALPHA, LEVEL, RESAMPLES, Interval
from prsl_kernels.experiments.report.tables import WORST
from prsl_kernels.experiments.report.text import listing

FORMAT = 1  # of the JSON: raised when a key changes its meaning or goes
_SMALL_GRADIENT = 0.1  # of cross entropy's norm, below which the gradients of an arm are called small


@dataclasses.dataclass(frozen=True)
class Flag:
    """One piece of evidence. A "fail" of an arm, or of cross entropy, makes the arm's result one not to trust."""

    name: str
    state: str  # "ok", "warn", "fail" or "absent"
    reason: str
    numbers: Mapping[str, Any]
    arms: tuple[str, ...] = ()  # whom a warning or failure concerns; empty: all


def flags(findings: Findings) -> tuple[Flag, ...]:
    """Every control and question with its state, in a fixed order."""
    return (
        *_design(findings),
        *(
            Flag(
                "control: " + check.name,
                "absent" if check.passed is None else "ok" if check.passed else "fail",
                check.found,
                {"difference": _plain(check.intervals)},
                check.failing,
            )
            for check in findings.checks
        ),
        *_strength(findings),
        *_masking(findings),
        *_speech(findings),
    )


def _flag(name: str, concerned: list[str], bad: str, good: str, reason: str, numbers: Any) -> Flag:
    """`bad` and the arms concerned where there are any, else "ok" and `good`."""
    if concerned:
        return Flag(name, bad, f"{reason}: {listing(concerned)}", _plain(numbers), tuple(concerned))
    return Flag(name, "ok", good, _plain(numbers))


def _design(findings: Findings) -> Iterator[Flag]:
    tables, end = findings.tables, findings.tables.endpoint
    yield Flag(
        "endpoint declared",
        "ok" if end.declared else "warn",
        "in the recipe, so before the run" if end.declared else "not in the recipe: the default was taken",
        {"score": end.score, "attack": end.attack, "round": end.round},
    )
    seeds = len(tables.seeds)
    yield Flag(
        "training seeds",
        "ok" if seeds >= FEW_SEEDS else "warn",
        f"{seeds}; a change that the loss makes, and not these checkpoints, takes at least {FEW_SEEDS}",
        {"seeds": seeds},
    )
    split = tables.attacked_split
    yield Flag(
        "images that nothing was chosen on",
        "ok" if split == "test" else "warn",
        "the test split was attacked"
        if split == "test"
        else f"the {split} split was attacked, on which checkpoints are chosen, and k and b where a grid names them",
        {"split": split},
    )
    found = unlike(tables)
    yield Flag("trained alike", "fail" if found else "ok", f"different: {found}" if found else "as far as recorded", {})
    yield Flag(
        "the attack lowers the score",
        "ok" if findings.attack_worked else "fail",
        f"cross entropy: {findings.attack_effect.text}",
        {"attacked_minus_clean": _plain(findings.attack_effects)},
    )


def _strength(findings: Findings) -> Iterator[Flag]:
    asked = findings.scepticism
    several = findings.tables.endpoint.attack == WORST and len(asked.ensemble) > 1
    yield Flag(
        "worst case over several attacks",
        "ok" if several else "absent",
        f"candidates: {', '.join(asked.ensemble)}",
        {"attacks": list(asked.ensemble)},
    )
    convergence = asked.convergence
    open_ = [arm for arm in findings.tables.arms if not convergence.settled(arm)]
    numbers = {
        "states": convergence.states, "tolerance": convergence.tolerance, "doubling": convergence.doubling,
        "rounds_open": convergence.rounds_open, "restarts_open": convergence.restarts_open,
    }  # fmt: skip
    if convergence.doubling is None:
        yield Flag("convergence", "absent", "fewer than two attacked rounds were recorded", {})
    elif set(convergence.idle) == set(findings.tables.arms):
        yield Flag("convergence", "absent", "the attack did nothing", _plain(numbers))
    else:
        said = convergence_told(findings)
        said += f" ({convergence_idle(findings)})" if convergence.idle else ""
        yield _flag("convergence", open_, "warn", said, said, numbers)
    if not asked.convergence.restarts:
        yield Flag("restarts", "absent", "no attack with restarts that records where its first one ends", {})
    for restart in convergence.restarts:
        gained = [arm for arm, change in restart.changes.items() if change.high < -convergence.tolerance[arm]]
        yield _flag("restarts", gained, "warn", "they find nothing that matters", "they still find more", restart)
    if asked.sweep is None:
        yield Flag("score falls with the budget", "absent", "no sweep over budgets", {})
    else:
        rising = [arm for arm, falls in asked.sweep.monotone.items() if not falls]
        yield _flag("score falls with the budget", rising, "fail", "no larger budget measurably raises the score",
                    "a larger budget raises the score", {"levels": asked.sweep.levels, "eps": [
                        point.eps for point in asked.sweep.points]})  # fmt: skip
    if not asked.floors:
        yield Flag("an unbounded budget reaches the floor", "absent", "no unbounded attack, or no floor", {})
    for floor in asked.floors:
        high = [arm for arm, reached in floor.reached.items() if not reached]
        yield _flag("an unbounded budget reaches the floor", high, "fail", "the score of unrelated texts is reached",
                    "not reached", {"unrelated": floor.unrelated, "above": floor.above})  # fmt: skip
    if not asked.probes:
        yield Flag(
            "probes within the budget", "absent", "no attack beside the ensemble keeps to its budget and norm", {}
        )
    for probe in asked.probes:
        yield _flag("probes within the budget", list(probe.lower), "warn", f"{probe.attack} goes nowhere below the "
                    "ensemble's worst case", f"{probe.attack} lowers the score below the ensemble's worst case",
                    {"difference": probe.differences})  # fmt: skip


def convergence_idle(findings: Findings) -> str:
    """On which arms the main attack did nothing."""
    tables = findings.tables
    idle = [tables.label(arm) for arm in findings.scepticism.convergence.idle]
    return f"{tables.main_attack.upper()} did nothing to {listing(idle)}" if idle else ""


def _masking(findings: Findings) -> Iterator[Flag]:
    masking = findings.scepticism.masking
    for kind, name in (("transfer", "transfer against the white box"), ("query", "query against the white box")):
        accused = {arm: tuple(test for test in tests if test.kind == kind) for arm, tests in masking.suspected.items()}
        accused = {arm: tests for arm, tests in accused.items() if tests}
        if (kind == "transfer" and masking.transfer is None) or (kind == "query" and not masking.queries):
            yield Flag(name, "absent", "not in this run", {})
        elif accused:
            reason = "; ".join(f"masking suspected in {arm}: {told(tests)}" for arm, tests in accused.items())
            yield Flag(name, "fail", reason, {"tests": _plain(accused)}, tuple(accused))
        elif few := too_few([test for test in masking.tests if test.kind == kind]):
            yield Flag(name, "absent", few, {"comparisons": masking.comparisons})
        else:
            yield Flag(name, "ok", "nowhere measurably lower", {"comparisons": masking.comparisons})
    yield _norms(findings)
    open_ = {effect.arm: found for effect in findings.effects if (found := unexcluded_masking(findings, effect))}
    reason = "masked gradients cannot be excluded, with a higher score and gradients that fail"
    yield _flag("a gain with healthy gradients", list(open_), "fail", "no arm's gain comes with gradients that fail",
                reason, open_)  # fmt: skip
    if not masking.surfaces:
        yield Flag("loss surface", "absent", "no slice recorded", {})
    else:
        flat = [surface.arm for surface in masking.surfaces if surface.difference.low <= 0]
        rises = {surface.arm: surface.difference for surface in masking.surfaces}
        yield _flag("loss surface", flat, "warn", "it rises more along the gradient's signs than along random ones",
                    "it does not measurably rise more along the gradient's signs", rises)  # fmt: skip


def _norms(findings: Findings) -> Flag:
    """Norms are of the gradients that do not vanish: on how many images there is one belongs to the number."""
    name, rows = "gradient norms", findings.scepticism.masking.gradients
    if all(not row.norm_of for row in rows):
        return Flag(name, "absent", "not recorded", {})
    base = next(row for row in rows if row.arm == findings.tables.baseline)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        ratio = row.norm_over_baseline
        mine = [f"below {_SMALL_GRADIENT:g} of cross entropy's"] if ratio and ratio.high < _SMALL_GRADIENT else []
        mine += ["there is none, since every gradient is zero or not finite"] if row.norm is None else []
        mine += [unhealthy(row)] if row.failing else []
        if row.norm is not None and row.norm_images < (1 - ZERO_SHARE) * row.norm_of:
            mine.append(f"a norm exists on {row.norm_images:,} of {row.norm_of:,} images (times seeds) alone")
        if mine:
            reasons[row.arm] = mine
    numbers = _plain({
        row.arm: {"norm": row.norm, "over_baseline": row.norm_over_baseline, "images": row.norm_images,
                  "of": row.norm_of, "zero_share": row.zero_share} for row in rows
    })  # fmt: skip
    if reasons:
        told = "; ".join(f"{arm}: {', '.join(parts)}" for arm, parts in reasons.items())
        return Flag(name, "warn", told, numbers, tuple(reasons))
    where = f"on {base.norm_images:,} of {base.norm_of:,} images of cross entropy"
    return Flag(name, "ok", f"none below {_SMALL_GRADIENT:g} of cross entropy's ({where}); a healthy norm excludes no "
                "masking", numbers)  # fmt: skip


def _speech(findings: Findings) -> Iterator[Flag]:
    rows = [row for row in findings.scepticism.language if row.setting == "attacked"]
    baseline = next(row for row in rows if row.arm == findings.tables.baseline)
    if all(row.distinct is None for row in rows):
        yield Flag("diversity of outputs", "absent", "not recorded", {})
    else:
        poor = [row.arm for row in rows if (row.distinct or 0) < 0.5 * (baseline.distinct or 0)]
        numbers = {row.arm: row.distinct for row in rows}
        yield _flag("diversity of outputs", poor, "warn", "no arm says half as many different things as cross entropy",
                    "fewer than half as many different outputs as cross entropy", numbers)  # fmt: skip
    if all(row.blank is None for row in rows):
        yield Flag("likeness to a blank image's output", "absent", "not recorded", {})
    else:
        liker = [row.arm for row in rows if row.blank_effect is not None and row.blank_effect.low > 0]
        effects = {row.arm: row.blank_effect for row in rows}
        yield _flag("likeness to a blank image's output", liker, "warn", "no arm's is measurably above cross entropy's",
                    "measurably above cross entropy's", effects)  # fmt: skip


def write_evidence(findings: Findings) -> dict[str, Any]:
    """All findings as JSON types, with stable keys.

    Intervals are {"estimate", "low", "high"}, numbers that do not exist null. `trusted` has, for every arm but cross
    entropy, whether no piece of evidence fails for it or for cross entropy; `distrust` says which do, `caveats` what
    warns or is absent.
    """
    tables, end = findings.tables, findings.tables.endpoint
    found = flags(findings)
    distrust: dict[str, list[str]] = {}
    caveats: dict[str, list[str]] = {}
    for arm in tables.others:
        mine = [flag for flag in found if not flag.arms or {arm, tables.baseline} & set(flag.arms)]
        distrust[arm] = [f"{flag.name}: {flag.reason}" for flag in mine if flag.state == "fail"]
        caveats[arm] = [f"{flag.name}: {flag.reason}" for flag in mine if flag.state in ("warn", "absent")]
    result = {
        "format": FORMAT,
        "task": tables.task,
        "endpoint": {**dataclasses.asdict(end), "attacks": list(findings.scepticism.ensemble)},
        "main_attack": {"name": tables.main_attack, "round": tables.main_round, "eps": tables.main_budget()},
        "statistics": {"level": LEVEL, "alpha": ALPHA, "resamples": RESAMPLES, "few_seeds": FEW_SEEDS},
        "baseline": tables.baseline,
        "images": findings.images,
        "seeds": list(tables.seeds),
        "arms": {arm: {"label": tables.label(arm), "fits": [_fit(run) for run in tables.runs[arm]]}
                 for arm in tables.arms},
        "effects": {
            effect.arm: {
                **{field.name: _plain(getattr(effect, field.name)) for field in dataclasses.fields(effect)},
                "detected": effect.detected, "half_width": effect.half_width,
            }
            for effect in findings.effects
        },
        "levels": {arm: {"clean": clean, "attacked": attacked} for arm, (clean, attacked) in findings.levels.items()},
        "attack_effects": findings.attack_effects,
        "exploratory": findings.exploratory,
        "secondary": findings.secondary,
        "last_change": findings.last_change,
        "curves": findings.curves,
        "shares": [
            {"metric": share.metric, "attack": share.attack, "round": share.round, "images": share.images,
             "thresholds": THRESHOLDS, "below": share.below} for share in findings.shares
        ],
        "checks": findings.checks,
        "groups": findings.groups,
        "gradients": findings.gradients,
        **{
            field.name: getattr(findings.scepticism, field.name)
            for field in dataclasses.fields(findings.scepticism)
            if field.name != "seeds"
        },
        "by_seed": findings.scepticism.seeds,
        "verdicts": arm_verdicts(findings),
        "flags": found,
        "trusted": {arm: not reasons for arm, reasons in distrust.items()},
        "distrust": distrust,
        "caveats": caveats,
        "gaps": tables.gaps,
    }  # fmt: skip
    plain: dict[str, Any] = _plain(result)
    return plain


def _fit(run: Any) -> dict[str, Any]:
    return {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name not in ("training", "name")
    }


def _plain(value: Any) -> Any:
    """JSON types; a mapping by (source, target) becomes one of mappings."""
    if isinstance(value, Interval):
        return {"estimate": _plain(value.estimate), "low": _plain(value.low), "high": _plain(value.high)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, pd.DataFrame):
        return [_plain(row) for row in value.to_dict("records")]
    if isinstance(value, Mapping):
        nested: dict[str, Any] = {}
        for key, inner in value.items():
            if isinstance(key, tuple):
                nested.setdefault(str(key[0]), {})[str(key[1])] = _plain(inner)
            else:
                nested[str(key)] = _plain(inner)
        return nested
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return None if value is None or value is pd.NA else str(value)
