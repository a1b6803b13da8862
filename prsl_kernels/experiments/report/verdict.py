"""The words of a task's first screen, and the lines for a terminal. What may be claimed of an arm: see `claims`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prsl_kernels.experiments.report.analysis import FEW_SEEDS, Effect, Findings
from prsl_kernels.experiments.report.claims import (
    MORE_ROBUST,
    NOT_EXCLUDED,
    ArmVerdict,
    arm_verdicts,
    at_endpoint,
    attack_name,
    cautions,
    convergence_told,
    in_sentence,
    outcome,
    task_title,
    unexcluded_masking,
    unlike,
)
from prsl_kernels.experiments.report.evidence import flags
from prsl_kernels.experiments.report.questions import Evidence, evidence, limits, missing_evidence, passed, plural
from prsl_kernels.experiments.report.tables import RunTables
from prsl_kernels.experiments.report.text import listing, p_value, pixels

NO_CLAIM = (
    "“More robust” is said of an arm only where its score under the worst of several attacks is higher than cross "
    "entropy's beyond chance and beyond its clean score, with three training seeds or more, and where transfer between "
    "the arms, a query attack and converged attacks agree."
)
_FEW_REASONS = 3

__all__ = [
    "NO_CLAIM",
    "ArmVerdict",
    "Evidence",
    "Verdict",
    "arm_verdicts",
    "at_endpoint",
    "attack_name",
    "evidence",
    "headline_lines",
    "in_sentence",
    "limits",
    "missing_evidence",
    "outcome",
    "task_title",
    "verdict",
]


@dataclass(frozen=True)
class Verdict:
    """The first screen of a task: one sentence, and what must be known to weigh it."""

    task: str
    title: str
    headline: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def verdict(findings: Findings) -> Verdict:
    """The verdict of a task."""
    tables = findings.tables
    return Verdict(
        task=tables.task,
        title=task_title(tables.task),
        headline=_headline(findings),
        notes=tuple(_notes(findings)),
        warnings=tuple(_warnings(findings)),
    )


def _headline(findings: Findings) -> str:
    tables, end = findings.tables, findings.tables.endpoint
    found = [effect for effect in findings.effects if effect.detected]
    total = len(findings.effects)
    what = f"{in_sentence(end.score)} {at_endpoint(findings)}"
    if not total:
        return f"Nothing to compare: {tables.label(tables.baseline)} is the only arm."
    if not found:
        kind = "PRSL arms" if _all_prsl(findings, findings.effects) else "arms"
        among = f"for any of the {total} {kind}" if total > 1 else f"({tables.variant(findings.effects[0].arm)})"
        return f"No change detected in {what} {among}.{_claims(findings)}"
    rest = total - len(found)
    remainder = f" No change detected for the other {rest}." if rest else ""
    subject = "PRSL" if _all_prsl(findings, found) else "The loss"
    remainder += _claims(findings)
    if len(found) <= 2:
        parts = [f"by {effect.attacked.text} ({_with_cautions(findings, effect)})" for effect in found]
        return f"{subject} changed {what} {listing(parts)}.{remainder}"
    smallest, largest = (pick(found, key=lambda effect: effect.attacked.estimate) for pick in (min, max))
    careful = [_with_cautions(findings, effect) for effect in found if cautions(findings, effect)]
    return (
        f"{subject} changed {what} for {len(found)} of {total} arms, from {smallest.attacked.text} "
        f"({tables.variant(smallest.arm)}) to {largest.attacked.text} ({tables.variant(largest.arm)})"
        f"{', but ' + ', and '.join(careful) if careful else ''}.{remainder}"
    )


def _with_cautions(findings: Findings, effect: Effect) -> str:
    """The arm, and what must be said of its higher score in one breath: "k = 20: not confirmed by square"."""
    careful = cautions(findings, effect)
    return findings.tables.variant(effect.arm) + (f": {careful}" if careful else "")


def _all_prsl(findings: Findings, effects: Sequence[Effect]) -> bool:
    runs = findings.tables.runs
    return all(runs[effect.arm][0].loss == "prsl" for effect in effects)


def _claims(findings: Findings) -> str:
    """What all the evidence together says: of no arm more than that it changed the score, unless it is named here."""
    found = arm_verdicts(findings).values()
    robust = [findings.tables.label(claim.arm) for claim in found if claim.word == MORE_ROBUST]
    masked = [findings.tables.label(arm) for arm, tests in findings.scepticism.masking.suspected.items() if tests]
    told = f" More robust than cross entropy by all the evidence asked for: {listing(robust)}." if robust else ""
    lucky = [
        findings.tables.label(effect.arm)
        for effect in findings.effects
        if effect.detected and effect.holds_across_seeds is False
    ]
    told += f" Not shown beyond these seeds: {listing(lucky)}." if lucky else ""
    return told + _masked(findings, masked)


def _masked(findings: Findings, suspected: Sequence[str], where: str = "") -> str:
    """Arms that a test accuses, and those of which masked gradients cannot be excluded for another reason."""
    open_ = [
        f"{findings.tables.label(effect.arm)}{where}"
        for effect in findings.effects
        if unexcluded_masking(findings, effect) and not findings.scepticism.masking.suspected[effect.arm]
    ]
    told = f" Masking suspected: {listing(list(suspected))}." if suspected else ""
    return told + (f" Masked gradients cannot be excluded: {listing(open_)}." if open_ else "")


def _papers_effect(findings: Findings) -> str:
    """How many arms of PRSL show what the paper reports: those with masked gradients, or other losses, do not."""
    tables, words = findings.tables, {arm: claim.word for arm, claim in arm_verdicts(findings).items()}
    ours = [effect for effect in findings.effects if tables.runs[effect.arm][0].loss == "prsl"]
    others = [effect for effect in findings.effects if effect not in ours]
    up = [effect for effect in ours if words[effect.arm] in (MORE_ROBUST, "higher")]
    shown = [effect for effect in up if effect.holds_across_seeds]
    lucky = [effect for effect in up if effect.holds_across_seeds is False]
    masked = [tables.label(effect.arm) for effect in ours if words[effect.arm] in ("masking suspected", NOT_EXCLUDED)]
    down = sum(words[effect.arm] == "lower" for effect in ours)
    same = sum(words[effect.arm] == "no change detected" for effect in ours)
    if not ours:
        told = "The paper reports higher scores under attack with PRSL. No arm here is PRSL"
    else:
        told = (
            f"The paper reports higher scores under attack with PRSL. Of {plural(len(ours), 'arm')} of PRSL, "
            f"{_count(len(up))} higher than cross entropy here, {_count(down)} lower, and for {same or 'none'} no "
            "change was detected"
        )
        told += f"; not counted, since gradients may be masked: {listing(masked)}" if masked else ""
        if lucky:
            told += f"; not shown beyond these seeds: {listing([tables.label(effect.arm) for effect in lucky])}"
    if shown:
        told += "."
    elif len(up) > len(lucky):
        told += f": with fewer than {FEW_SEEDS} training seeds that does not yet show the paper's effect."
    else:
        told += ": this run does not show the paper's effect."
    if others:
        told += f" Other losses: {listing([f'{tables.label(e.arm)} ({words[e.arm]})' for e in others])}."
    return told


def _notes(findings: Findings) -> list[str]:
    tables, end = findings.tables, findings.tables.endpoint
    name = attack_name(findings)
    clean, attacked = findings.levels[tables.baseline]
    curve = next((curve for curve in findings.curves if curve.metric == end.score), None)
    floors = []
    if curve is not None and curve.blank is not None:
        floors.append(f"a blank image gives {curve.blank:.3f}")
    if curve is not None and curve.random_pair is not None:
        floors.append(f"references paired at random give {curve.random_pair:.3f}")
    notes = [
        f"{name[0].upper()}{name[1:]} took cross entropy from {clean.estimate:.3f} (clean) to {attacked.estimate:.3f}"
        + (f"; {listing(floors)}." if floors else ".")
    ]
    if findings.effects:
        notes.append(_papers_effect(findings))
    seeds = len(tables.seeds)
    if seeds == 1:
        notes.append(
            "One training seed: the intervals cover the choice of images, not the luck of a training run. A change is "
            "one between these checkpoints, not yet one that the loss makes."
        )
    elif seeds < FEW_SEEDS:
        notes.append(
            f"{seeds} training seeds: too few to tell the loss from the luck of a training run. The intervals cover "
            "the choice of images and, too narrowly, of seeds; the p-values are over images, given these seeds."
        )
    else:
        notes.append(
            f"{seeds} training seeds: the intervals cover the choice of images and of seeds (few seeds make them too "
            "narrow); the p-values are over images, given these seeds. Whether a change is more than the luck of "
            "training is asked of the seeds' means, by Student's t test."
        )
    notes += [
        f"{tables.label(claim.arm)}, {claim.word}: not called more robust because {'; '.join(claim.reasons)}."
        for claim in arm_verdicts(findings).values()
        if claim.word == "higher" and len(claim.reasons) <= _FEW_REASONS
    ]
    return notes


def _count(arms: int) -> str:
    return "none is" if arms == 0 else "1 is" if arms == 1 else f"{arms} are"


def _warnings(findings: Findings) -> list[str]:
    tables, end = findings.tables, findings.tables.endpoint
    warnings = []
    if not findings.attack_worked:
        warnings.append(
            f"The attack did not lower the score of cross entropy measurably ({findings.attack_effect.text}): there is "
            "nothing to defend against, and differences under attack mean little."
        )
    warnings += [
        f"Control failed, “{check.name}”: {check.found}." for check in findings.checks if check.passed is False
    ]
    controls = {f"control: {check.name}" for check in findings.checks}
    # In words of their own
    told = {"the attack lowers the score", "trained alike", "a gain with healthy gradients", *controls}
    warnings += [
        f"{flag.name[0].upper()}{flag.name[1:]}: {flag.reason}."
        for flag in flags(findings)
        if flag.state == "fail" and flag.name not in told
    ]
    curve = next((curve for curve in findings.curves if curve.metric == end.score), None)
    if curve is not None and curve.blank is not None and findings.levels[tables.baseline][1].estimate <= curve.blank:
        warnings.append(
            "Under attack cross entropy scores no more than with a blank image: differences are at the floor."
        )
    if different := unlike(tables):
        warnings.append(f"The arms were not trained alike ({different}): the comparison is void.")
    if not end.declared:
        warnings.append("The recipe declares no primary endpoint; the default was taken.")
    return warnings


def headline_lines(run: RunTables, all_findings: Sequence[Findings]) -> list[str]:
    """Five lines for the end of a run on a terminal."""
    lines = [f"{task_title(f.tables.task)}: {_headline(f)}" for f in all_findings][:2]
    falls = []
    for findings in all_findings:
        tables = findings.tables
        clean, attacked = findings.levels[tables.baseline]
        eps = pixels(tables.main_budget())
        score = in_sentence(tables.endpoint.score)
        falls.append(f"{score} from {clean.estimate:.3f} to {attacked.estimate:.3f} (eps {eps})")
    attacks = listing(list(dict.fromkeys(attack_name(f) for f in all_findings)))
    lines.append(f"The attack ({attacks}) took cross entropy's {listing(falls)}.")
    if len(lines) < 3:
        lines.append(_cost(all_findings[0]))
    checks = [check for findings in all_findings for check in findings.checks]
    failed = [check.name for check in checks if check.passed is False]
    failed = list(dict.fromkeys(failed))
    said = {convergence_told(f): task_title(f.tables.task) for f in all_findings}
    converged = [f"{task}: {text}" if len(said) > 1 else text for text, task in said.items()]
    lines.append(f"{passed(checks)}{': failed ' + listing(failed) if failed else ''}; {'; '.join(converged)}.")
    lines.append(_last_line(all_findings))
    return lines


def _last_line(all_findings: Sequence[Findings]) -> str:
    """For which arms a claim of robustness is made, or why for none."""
    claims = [(f, claim) for f in all_findings for claim in arm_verdicts(f).values()]
    robust = [
        f"{f.tables.label(claim.arm)} ({task_title(f.tables.task)})" for f, claim in claims if claim.word == MORE_ROBUST
    ]
    masked = ""
    for f in all_findings:
        where = f" ({task_title(f.tables.task)})"
        accused = [arm for arm, tests in f.scepticism.masking.suspected.items() if tests]
        masked += _masked(f, [f"{f.tables.label(arm)}{where}" for arm in accused], where)
    if robust:
        line = f"More robust than cross entropy by all the evidence asked for: {listing(robust)}."
    else:
        seeds = min(len(f.tables.seeds) for f in all_findings)
        attacks = min(len(f.scepticism.ensemble) for f in all_findings)
        line = f"No claim of robustness: {plural(seeds, 'training seed')}, {plural(attacks, 'white-box attack')}"
        asked = [f.scepticism.masking for f in all_findings]
        lacking = [] if all(each.transfer for each in asked) else ["transfer between arms"]
        lacking += [] if all(each.queries for each in asked) else ["a query attack"]
        line += f"; not in this run: {listing(lacking)}." if lacking else "."
    return line + masked


def _cost(findings: Findings) -> str:
    tables = findings.tables
    if not findings.effects:
        return "There is no arm to compare with cross entropy."
    largest = max(findings.effects, key=lambda effect: abs(effect.clean.estimate))
    return (
        f"Largest change on clean images: {largest.clean.text} with {tables.label(largest.arm)} (exploratory; its "
        f"p-value under attack, over all arms, is {p_value(largest.p_holm)})."
    )
