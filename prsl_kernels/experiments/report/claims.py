"""What may be claimed of one arm, and never more.

"Higher" and "lower" are said where the interval excludes zero and the p-value and the seeds agree. "More robust" takes,
beside that: a worst case over several attacks, three training seeds, a score that falls less and not one that was
higher without an attack, and the same answer from transferred images, from an attack without gradients, and from
attacks that have converged.

Where gradients may be masked, that is said instead. There are two grounds, told in different words:

- "Masking is suspected": transferred images or a query attack lower the arm's score measurably below its white box.
- "Masked gradients cannot be excluded": the arm's score is measurably higher under attack, and its own input gradients
  vanish (more than a tenth of their entries is exactly zero) or are not finite, while cross entropy's are healthy. An
  attack that sees through a part of the masking (a margin, say) can leave just such a gain. Gradients that vanish
  without a gain are no such ground: there is then nothing that masking could have feigned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prsl_kernels.experiments.report.analysis import FEW_SEEDS, Effect, Findings
from prsl_kernels.experiments.report.scepticism import GradientHealth, MaskingTest
from prsl_kernels.experiments.report.statistics import ALPHA, Interval
from prsl_kernels.experiments.report.tables import WORST, TaskTables, metric_name
from prsl_kernels.experiments.report.text import listing, p_value, percent, ratio

MORE_ROBUST = "more robust"
NOT_EXCLUDED = "masking not excluded"
_TASK_TITLES = {"captions": "Captions", "vqa": "Visual question answering"}
_MID_SENTENCE = {"vqa_accuracy": "answer accuracy", "exact_match": "exact match"}


@dataclass(frozen=True)
class ArmVerdict:
    """One arm against cross entropy.

    `word` is "more robust", "higher", "lower", "masking suspected", "masking not excluded" or "no change detected";
    `reasons` say what stands between the arm and "more robust" (empty for it, and only for it).
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
    suspected, excluded = findings.scepticism.masking.suspected[effect.arm], not unexcluded_masking(findings, effect)
    if suspected:
        word = "masking suspected"
    elif not excluded:
        word = NOT_EXCLUDED
    elif not effect.detected:
        word = "no change detected"
    elif effect.attacked.estimate < 0:
        word = "lower"
    else:
        word = "higher" if reasons else MORE_ROBUST
    if effect.detected:
        sentence = f"{label} changed {what} by {effect.attacked.text}."
    else:
        sentence = f"No change detected in {what} with {label}: {effect.attacked.text}; {_unseen(effect)}."
    if suspected:
        sentence += f" Masking is suspected: {told(suspected)}."
    if not excluded:
        sentence += f" Masked gradients cannot be excluded: {unexcluded_masking(findings, effect)}."
    trade_off = f"Clean score {effect.clean.text}; the attack's effect differs by {effect.drop.text}."
    return ArmVerdict(effect.arm, word, sentence, trade_off, reasons, effect.half_width)


def _unseen(effect: Effect) -> str:
    """What the arm could have done without being seen to."""
    if not effect.differing:
        return f"no image was scored differently, and {rule_of_three(effect.images)}"
    half = effect.half_width
    return f"changes much smaller than {f'{half:.3f}' if half >= 0.0005 else ratio(half)} would go unseen"


def rule_of_three(images: int) -> str:
    """What is left possible where `images` images show nothing: a rate of 3/n gives none with a chance of 5 %."""
    return (
        f"with {images:,} images a change on {percent(min(1.0, 3 / images))} of all images is still not excluded (rule "
        "of three, 95 %)"
    )


def _health(findings: Findings, arm: str) -> GradientHealth:
    return next(row for row in findings.scepticism.masking.gradients if row.arm == arm)


def unhealthy(health: GradientHealth) -> str:
    """What is wrong with an arm's input gradients; empty where nothing is."""
    parts = [f"up to {percent(health.zero_share)} of the entries of its input gradients are exactly zero"]
    parts = parts if health.vanishing else []
    if health.nonfinite_share:
        parts.append(
            f"up to {percent(health.nonfinite_share, 2)} of them are not finite"
            if parts
            else f"up to {percent(health.nonfinite_share, 2)} of the entries of its input gradients are not finite"
        )
    return listing(parts)


def unexcluded_masking(findings: Findings, effect: Effect) -> str:
    """Why masked gradients cannot be excluded though no test accuses the arm of them; empty where they can be."""
    own, base = _health(findings, effect.arm), _health(findings, findings.tables.baseline)
    if effect.detected and effect.attacked.estimate > 0 and own.failing and not base.failing:
        return f"{unhealthy(own)}, and cross entropy's are healthy"
    return ""


def cautions(findings: Findings, effect: Effect) -> str:
    """What must be said in one breath with a higher score: gradients that fail, or what does not confirm it."""
    if not effect.detected or effect.attacked.estimate < 0:
        return ""
    parts = [unhealthy(_health(findings, effect.arm))]
    pairs = _confirmations(findings, effect.arm)
    names = [name for name, found in pairs if found is not None and found.low <= 0]
    parts.append(f"not confirmed by {' or '.join(names)}" if names else "")
    return "; ".join(part for part in parts if part)


def _confirmations(findings: Findings, arm: str) -> list[tuple[str, Interval | None]]:
    """Arm minus cross entropy under attacks that do not follow the arm's own gradients; None where not in the run."""
    masking = findings.scepticism.masking
    transfer = masking.transfer.effects.get(arm) if masking.transfer else None
    return [("transferred images", transfer), *((query.attack, query.effects.get(arm)) for query in masking.queries)]


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
    for check in findings.checks:
        if check.against(effect.arm, tables.baseline):
            yield f"the control “{check.name}” failed on {listing([tables.label(arm) for arm in check.failing])}"
    for probe in asked.probes:
        if effect.arm in probe.lower:
            yield f"{probe.attack}, which is not of the ensemble, lowers its score below the worst case"
    for floor in asked.floors:
        high = [tables.label(arm) for arm in (effect.arm, tables.baseline) if not floor.reached[arm]]
        if high:
            yield f"an unbounded attack does not bring {listing(high)} down to unrelated texts"
    pair = (effect.arm, tables.baseline)
    if asked.sweep and (rising := [tables.label(arm) for arm in pair if not asked.sweep.monotone[arm]]):
        yield f"a larger budget raises the score of {listing(rising)}"
    if found := unlike(tables):
        yield f"the arms were not trained alike ({found})"


def _masking_reasons(findings: Findings, arm: str) -> Iterator[str]:
    tables, masking = findings.tables, findings.scepticism.masking
    for name in (arm, tables.baseline):
        if masking.suspected[name]:
            yield f"masked gradients are suspected in {tables.label(name)}"
    if not masking.queries:
        yield "no query attack in this run"
    if few := too_few(masking.tests):
        yield f"{few} to exclude masked gradients"
    for name, found in _confirmations(findings, arm):
        if found is None:
            yield f"no {name} to compare with cross entropy in this run"
        elif found.low <= 0:
            yield f"not confirmed by {name} ({found.text})"


def too_few(tests: Sequence[MaskingTest]) -> str:
    """ "too few images (4; p < 0.05 takes 5 or more)" where any comparison has so few; else empty."""
    few = min((test.images for test in tests if test.too_few), default=0)
    least = next(count for count in range(1, 64) if 0.5**count < ALPHA)
    return f"too few images ({few}; p < {ALPHA:g} takes {least} or more)" if few else ""


def convergence_told(findings: Findings) -> str:
    """Which attacks had converged, over all arms: "BIM had converged; APGD was not shown to have"."""
    convergence, main = findings.scepticism.convergence, findings.tables.main_attack
    if set(convergence.idle) == set(findings.tables.arms):
        return f"{main.upper()} did nothing, so it cannot be said to have converged"
    done = all(convergence.states[arm] == "converged" for arm in findings.tables.arms)
    rest = [name.upper() for name in _attacks(convergence.rounds_open)]
    rest += [f"the restarts of {name.upper()}" for name in _attacks(convergence.restarts_open)]
    if not done:
        return f"{listing([main.upper(), *rest])} {_were([main, *rest])} not shown to have converged"
    asked = [found.attack.upper() for found in convergence.others if found.attack in findings.scepticism.ensemble]
    asked += [f"the restarts of {found.attack.upper()}" for found in convergence.restarts]
    text = f"{listing([main.upper(), *(name for name in asked if name not in rest)])} had converged"
    return text + (f"; {listing(rest)} {_were(rest)} not shown to have" if rest else "")


def _attacks(by_arm: Mapping[str, tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(name for names in by_arm.values() for name in names))


def _were(names: Sequence[str]) -> str:
    return "were" if len(names) > 1 or names[0].startswith("the restarts") else "was"


def _convergence_reasons(findings: Findings, arm: str) -> Iterator[str]:
    tables, convergence = findings.tables, findings.scepticism.convergence
    main, pair = tables.main_attack.upper(), (arm, tables.baseline)
    if idle := [tables.label(name) for name in pair if name in convergence.idle]:
        yield f"{main} did nothing to {listing(idle)}, so it cannot be said to have converged"
    open_ = [
        tables.label(name) for name in pair
        if convergence.states[name] != "converged" and name not in convergence.idle
    ]  # fmt: skip
    if open_:
        yield f"{main} has not been shown to have converged on {listing(open_)}"
    for what, by_arm in (("", convergence.rounds_open), ("the restarts of ", convergence.restarts_open)):
        for attack in dict.fromkeys(name for each in pair for name in by_arm[each]):
            where = listing([tables.label(each) for each in pair if attack in by_arm[each]])
            verb = "have" if what else "has"
            yield f"{what}{attack.upper()} {verb} not been shown to have converged on {where}"
    if open_ or idle:
        return
    if convergence.doubling is not None and convergence.doubling.effects[arm].high < 0:
        yield f"the advantage still shrank in the last rounds ({convergence.doubling.effects[arm].text})"
