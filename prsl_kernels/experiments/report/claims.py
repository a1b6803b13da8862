"""What may be claimed of one arm, and never more.

"Higher" and "lower" are said where the interval excludes zero and the p-value and the seeds agree. "More robust" takes,
beside that: a worst case over several attacks, three training seeds, a score that falls less and not one that was
higher without an attack, and the same answer from transferred images, from an attack without gradients, and from an
attack that has converged. Where those say that gradients are masked, that is said instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prsl_kernels.experiments.report.analysis import FEW_SEEDS, Effect, Findings
from prsl_kernels.experiments.report.scepticism import MaskingTest
from prsl_kernels.experiments.report.tables import WORST, TaskTables, metric_name
from prsl_kernels.experiments.report.text import listing, p_value

MORE_ROBUST = "more robust"
_TASK_TITLES = {"captions": "Captions", "vqa": "Visual question answering"}
_MID_SENTENCE = {"vqa_accuracy": "answer accuracy", "exact_match": "exact match"}


@dataclass(frozen=True)
class ArmVerdict:
    """One arm against cross entropy: `word` is "more robust", "higher", "lower", "masking suspected" or "no change
    detected"; `reasons` say what stands between the arm and "more robust" (empty for it, and only for it).
    """

    arm: str
    word: str
    sentence: str
    trade_off: str  # what happens to the clean score, and to the fall from there
    reasons: tuple[str, ...]
    half_width: float  # half of the primary interval's width: smaller changes go unseen


def task_title(task: str) -> str:
    """A task's name for people."""
    return _TASK_TITLES.get(task, task)


def in_sentence(metric: str) -> str:
    """A score's name in the middle of a sentence."""
    return _MID_SENTENCE.get(metric, metric_name(metric))


def attack_name(findings: Findings) -> str:
    """The endpoint's attack for people: "BIM", or "the worst of 5 attacks"."""
    tables, count = findings.tables, len(findings.scepticism.ensemble)
    if tables.endpoint.attack != WORST:
        return tables.endpoint.attack.upper()
    return f"the worst of {count} attacks" if count > 1 else tables.main_attack.upper()


def at_endpoint(findings: Findings) -> str:
    """Where the endpoint is, in a sentence: "at round 20", "in the worst case over 5 attacks"."""
    tables, count = findings.tables, len(findings.scepticism.ensemble)
    end = tables.endpoint
    if end.attack == WORST:
        return f"in the worst case over {count} attacks" if count > 1 else f"at round {tables.main_round}"
    return f"at round {end.round}" + ("" if end.attack == tables.main_attack else f" of {end.attack.upper()}")


def unlike(tables: TaskTables) -> str:
    """What differs between the fine-tunings that should not; empty where nothing does."""
    runs = [run for arm in tables.arms for run in tables.runs[arm]]
    base = [run.base_eval_cross_entropy for run in runs]
    differing = []
    if not np.allclose(base, base[0], rtol=1e-4):
        differing.append("base checkpoint")
    differing += [
        name for name, values in (
            ("number of steps", {run.steps for run in runs}), ("vocabulary", {run.vocab_size for run in runs}),
            ("seeds", {tuple(run.seed for run in tables.runs[arm]) for arm in tables.arms}),
        ) if len(values) > 1
    ]  # fmt: skip
    return listing(differing)


def outcome(effect: Effect) -> str:
    """The words for one arm's primary difference alone, without the evidence beside it."""
    if effect.detected:
        beyond = ", not shown beyond these seeds" if effect.holds_across_seeds is False else ""
        return ("higher" if effect.attacked.estimate > 0 else "lower") + beyond
    if not effect.differing:
        return "no change detected: alike on every image"
    return "no change detected after Holm" if effect.borderline else "no change detected"


def arm_verdicts(findings: Findings) -> dict[str, ArmVerdict]:
    """What may be said of each arm but cross entropy."""
    return {effect.arm: _arm_verdict(findings, effect) for effect in findings.effects}


def _arm_verdict(findings: Findings, effect: Effect) -> ArmVerdict:
    tables = findings.tables
    label, what = tables.label(effect.arm), f"{in_sentence(tables.endpoint.score)} {at_endpoint(findings)}"
    reasons = tuple(_reasons(findings, effect))
    if findings.scepticism.masking.suspected[effect.arm]:
        word = "masking suspected"
    elif not effect.detected:
        word = "no change detected"
    elif effect.attacked.estimate < 0:
        word = "lower"
    else:
        word = "higher" if reasons else MORE_ROBUST
    if effect.detected:
        sentence = f"{label} changed {what} by {effect.attacked.text}."
    else:
        sentence = (
            f"No change detected in {what} with {label}: {effect.attacked.text}; changes much smaller than "
            f"{effect.half_width:.3f} would go unseen."
        )
    if word == "masking suspected":
        sentence += f" Masking is suspected: {told(findings.scepticism.masking.suspected[effect.arm])}."
    trade_off = f"Clean score {effect.clean.text}; the attack's effect differs by {effect.drop.text}."
    return ArmVerdict(effect.arm, word, sentence, trade_off, reasons, effect.half_width)


def told(tests: tuple[MaskingTest, ...]) -> str:
    """What accuses an arm of masked gradients, the strongest first, at most two."""
    ordered = sorted(tests, key=lambda test: test.difference.estimate)[:2]
    what = {"transfer": "images made on {}", "query": "{}, which uses no gradient"}
    parts = [
        f"{what[test.kind].format(test.source)}: {test.difference.text} against its own white box "
        f"(p {p_value(test.p)})" for test in ordered
    ]  # fmt: skip
    more = len(tests) - len(ordered)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def _reasons(findings: Findings, effect: Effect) -> Iterator[str]:
    """Everything that speaks against "more robust", or is not there to speak for it."""
    tables, asked = findings.tables, findings.scepticism
    if not effect.detected or effect.attacked.estimate < 0:
        yield "no higher score under attack was detected"
    elif effect.drop.low <= 0:
        yield f"its score does not measurably fall less than cross entropy's ({effect.drop.text})"
    if len(tables.seeds) < FEW_SEEDS:
        yield f"fewer than {FEW_SEEDS} training seeds"
    elif not effect.holds_across_seeds:
        yield f"the seeds' means alone do not show it (p {p_value(effect.p_seeds)}, t test, Holm over arms)"
    if tables.endpoint.attack != WORST or len(asked.ensemble) < 2:
        yield "no worst case over several attacks"
    if not findings.attack_worked:
        yield "the attack did not lower the score of cross entropy"
    yield from _masking_reasons(findings, effect.arm)
    yield from _convergence_reasons(findings, effect.arm)
    yield from (f"the control “{check.name}” failed" for check in findings.checks if check.passed is False)
    for floor in asked.floors:
        high = [tables.label(arm) for arm in (effect.arm, tables.baseline) if not floor.reached[arm]]
        if high:
            yield f"an unbounded attack does not bring {listing(high)} down to unrelated texts"
    if found := unlike(tables):
        yield f"the arms were not trained alike ({found})"


def _masking_reasons(findings: Findings, arm: str) -> Iterator[str]:
    tables, masking = findings.tables, findings.scepticism.masking
    for name in (arm, tables.baseline):
        if masking.suspected[name]:
            yield f"masked gradients are suspected in {tables.label(name)}"
    pairs = [("transferred images", masking.transfer.effects.get(arm) if masking.transfer else None)]
    pairs += [(query.attack, query.effects.get(arm)) for query in masking.queries]
    if not masking.queries:
        yield "no query attack in this run"
    for name, found in pairs:
        if found is None:
            yield f"no {name} to compare with cross entropy in this run"
        elif found.low <= 0:
            yield f"not confirmed by {name} ({found.text})"


def _convergence_reasons(findings: Findings, arm: str) -> Iterator[str]:
    tables, convergence = findings.tables, findings.scepticism.convergence
    open_ = [name for name in (arm, tables.baseline) if convergence.states[name] != "converged"]
    if open_:
        yield f"the attack has not been shown to have converged on {listing([tables.label(name) for name in open_])}"
    elif convergence.doubling is not None and convergence.doubling.effects[arm].high < 0:
        yield f"the advantage still shrank in the last rounds ({convergence.doubling.effects[arm].text})"
