"""The words: what the findings allow to be said, and never more.

"Changed" is said where the interval excludes zero and the adjusted p-value agrees; otherwise "no change detected".
"More robust" is never said: it takes a worst case over attacks, transfer, a query attack and convergence to agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prsl_kernels.experiments.report.analysis import Check, Effect, Findings
from prsl_kernels.experiments.report.tables import RunTables, TaskTables, metric_name
from prsl_kernels.experiments.report.text import listing, p_value, percent, pixels, ratio

NO_CLAIM = (
    "This report does not say “more robust”. That takes the worst case over several attacks, transfer between the "
    "arms, a query attack and a converged attack to agree."
)
_TASK_TITLES = {"captions": "Captions", "vqa": "Visual question answering"}
_MID_SENTENCE = {"vqa_accuracy": "answer accuracy", "exact_match": "exact match"}
_PAPER_VOCABULARY = 50_257  # GPT-2's
_EMBEDDED = {"openmoji", "easy-vqa"}
# Sceptics' evidence that a later attack would leave as rows, by a part of that attack's name.
_NOISES = {"Gaussian noise": "gauss", "JPEG": "jpeg"}
_MASKING = {"transfer between arms": "transfer", "a query attack": "square"}
_CONTROLS = {"zero-step", "random-sign", "blank"}


@dataclass(frozen=True)
class Verdict:
    """The first screen of a task: one sentence, and what must be known to weigh it."""

    task: str
    title: str
    headline: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """One of a sceptic's questions; `state` is "here", "part" or "absent"."""

    question: str
    state: str
    answer: str
    anchor: str  # of the section that holds the evidence, without the task; empty for none


def task_title(task: str) -> str:
    """A task's name for people."""
    return _TASK_TITLES.get(task, task)


def in_sentence(metric: str) -> str:
    """A score's name in the middle of a sentence."""
    return _MID_SENTENCE.get(metric, metric_name(metric))


def outcome(effect: Effect) -> str:
    """The words for one arm."""
    if effect.detected:
        return "higher" if effect.attacked.estimate > 0 else "lower"
    if not effect.differing:
        return "no change detected: alike on every image"
    return "no change detected after Holm" if effect.borderline else "no change detected"


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
    what = f"{in_sentence(end.score)} at round {end.round}"
    if not total:
        return f"Nothing to compare: {tables.label(tables.baseline)} is the only arm."
    if not found:
        among = f"for any of the {total} PRSL arms" if total > 1 else f"({tables.variant(findings.effects[0].arm)})"
        return f"No change detected in {what} {among}."
    rest = total - len(found)
    remainder = f" No change detected for the other {rest}." if rest else ""
    if len(found) <= 2:
        parts = [f"by {effect.attacked.text} ({tables.variant(effect.arm)})" for effect in found]
        return f"PRSL changed {what} {listing(parts)}.{remainder}"
    smallest, largest = (pick(found, key=lambda effect: effect.attacked.estimate) for pick in (min, max))
    return (
        f"PRSL changed {what} for {len(found)} of {total} arms, from {smallest.attacked.text} "
        f"({tables.variant(smallest.arm)}) to {largest.attacked.text} ({tables.variant(largest.arm)}).{remainder}"
    )


def _notes(findings: Findings) -> list[str]:
    tables, end = findings.tables, findings.tables.endpoint
    clean, attacked = findings.levels[tables.baseline]
    curve = next((curve for curve in findings.curves if curve.metric == end.score), None)
    floors = []
    if curve is not None and curve.blank is not None:
        floors.append(f"a blank image gives {curve.blank:.3f}")
    if curve is not None and curve.random_pair is not None:
        floors.append(f"references paired at random give {curve.random_pair:.3f}")
    notes = [
        f"{end.attack.upper()} took cross entropy from {clean.estimate:.3f} (clean) to {attacked.estimate:.3f}"
        + (f"; {listing(floors)}." if floors else ".")
    ]
    if findings.effects:
        up = sum(effect.detected and effect.attacked.estimate > 0 for effect in findings.effects)
        down = sum(effect.detected and effect.attacked.estimate < 0 for effect in findings.effects)
        same = len(findings.effects) - up - down
        notes.append(
            f"The paper reports higher scores under attack with PRSL. Here {_count(up)} higher than cross entropy, "
            f"{_count(down)} lower, and for {same or 'none'} no change was detected"
            + (": this run does not show the paper's effect." if not up else ".")
        )
    seeds = len(tables.seeds)
    if seeds == 1:
        notes.append(
            "One training seed: the intervals cover the choice of images, not the luck of a training run. A change is "
            "one between these checkpoints, not yet one that the loss makes."
        )
    else:
        notes.append(
            f"{seeds} training seeds: the intervals cover the choice of images and of seeds (few seeds make them a "
            "little narrow); the p-values are over images, given these seeds."
        )
    return notes


def _count(arms: int) -> str:
    return "no arm is" if arms == 0 else "1 arm is" if arms == 1 else f"{arms} arms are"


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
    curve = next((curve for curve in findings.curves if curve.metric == end.score), None)
    if curve is not None and curve.blank is not None and findings.levels[tables.baseline][1].estimate <= curve.blank:
        warnings.append(
            "Under attack cross entropy scores no more than with a blank image: differences are at the floor."
        )
    if unlike := _unlike(tables):
        warnings.append(f"The arms were not trained alike ({unlike}): the comparison is void.")
    if not end.declared:
        warnings.append("The recipe declares no primary endpoint; the default was taken.")
    return warnings


def _unlike(tables: TaskTables) -> str:
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


def evidence(findings: Findings) -> list[Evidence]:
    """A sceptic's questions, and where this run answers them."""
    tables, end = findings.tables, findings.tables.endpoint
    runs = tables.runs[tables.baseline]
    present = {str(name) for name in tables.outputs["attack"].unique()}
    seeds = len(tables.seeds)
    noises, masking = _lacking(present, _NOISES), _lacking(present, _MASKING)
    unlike = _unlike(tables)
    kept = int(tables.outputs["image"].notna().sum())
    return [
        Evidence("What was attacked, by whom, with which budget?", "here", "Stated in the threat model.", "threat"),
        Evidence(
            "Were the arms treated alike?",
            "absent" if unlike else "here" if seeds >= 3 else "part",
            f"Not alike: {unlike}." if unlike else
            f"Same base checkpoint, data order, {runs[0].steps} steps and selection by cross entropy. "
            f"{_plural(seeds, 'training seed').capitalize()}. k is the recipe's; b follows from the gradient ratio "
            "asked, or is the recipe's; neither has seen the test split.",
            "arms",
        ),
        Evidence("Is a clean-score cost hidden?", "here", "Clean and attacked scores in one plot.", "tradeoff"),
        Evidence("Had the attack converged?", "part", _convergence(findings), "rounds"),
        Evidence(
            "Do the controls behave?",
            "part" if noises else "here",
            f"{_passed(findings.checks)}. Not in this run: {listing([*noises, 'an unbounded budget'])}.",
            "controls",
        ),
        Evidence(
            "Could masked gradients pass for an effect?",
            "absent" if len(masking) == len(_MASKING) else "part",
            f"Not excluded: {listing(masking)} not in this run. Shares of zero and non-finite gradients are given."
            if masking else "Transfer and a query attack are in this run.",
            "controls",
        ),
        Evidence(
            "Was the comparison declared, and are the statistics sound?",
            "part",
            f"Primary endpoint {'declared in the recipe' if end.declared else 'not declared; the default'}: "
            f"{metric_name(end.score)}, {end.attack.upper()}, round {end.round}, against the primary reference. One "
            "attack, so no worst case over attacks. Paired bootstrap, sign-flip test, Holm over arms; the rest is "
            "exploratory.",
            "effects",
        ),
        Evidence(
            "Is the evidence kept?",
            "here",
            f"One row per image, arm, round and score in Parquet; {kept:,} images as PNG, scored after being read "
            "back; versions, seeds and configuration below.",
            "examples",
        ),
    ]  # fmt: skip


def missing_evidence(all_findings: Sequence[Findings]) -> str:
    """Which of the evidence that a claim of robustness needs is not in the run."""
    present = {str(name) for findings in all_findings for name in findings.tables.outputs["attack"].unique()}
    missing = [] if len(present - _CONTROLS) > 1 else ["a worst case over several attacks"]
    missing += _lacking(present, _MASKING)
    if any(change.excludes_zero for findings in all_findings for change in findings.last_change.values()):
        missing.append("a converged attack")
    if min(len(findings.tables.seeds) for findings in all_findings) < 2:
        missing.append("more than one training seed")
    return f"Not in this run: {listing(missing)}." if missing else ""


def _lacking(present: set[str], wanted: dict[str, str]) -> list[str]:
    return [name for name, part in wanted.items() if not any(part in attack.lower() for attack in present)]


def _passed(checks: Sequence[Check]) -> str:
    held = [check for check in checks if check.passed is not None]
    return f"{sum(bool(check.passed) for check in held)} of {len(held)} controls that the run holds pass"


def _convergence(findings: Findings) -> str:
    tables = findings.tables
    change = findings.last_change.get(tables.baseline)
    if change is None:
        return "Only one round was recorded, so nothing can be said."
    rounds = [number for number in tables.rounds(tables.endpoint.attack) if number <= tables.endpoint.round]
    moving = f"from round {rounds[-2]} to {rounds[-1]} the score of cross entropy "
    moving += f"still changed by {change.text}" if change.excludes_zero else f"changed by {change.text}, not measurably"
    verdict = "Not converged" if change.excludes_zero else "No sign against it"
    return f"{verdict}: {moving}. No restarts and one eps only."


def limits(run: RunTables, all_findings: Sequence[Findings]) -> list[str]:
    """What this run cannot tell, computed from the run."""
    found = [_small_scale(run, all_findings)]
    vocabularies = {f.tables.runs[f.tables.baseline][0].vocab_size for f in all_findings}
    k = max((r.k for f in all_findings for runs in f.tables.runs.values() for r in runs if r.b), default=0)
    if k and min(vocabularies) < _PAPER_VOCABULARY:
        size = min(vocabularies)
        found.append(
            f"k counts classes, so k/V is what compares: k = {k} is {percent(k / size)} of this vocabulary of {size:,} "
            f"and {percent(k / _PAPER_VOCABULARY)} of GPT-2's {_PAPER_VOCABULARY:,}."
        )
    for findings in all_findings:
        tables = findings.tables
        half = [(e.attacked.high - e.attacked.low) / 2 for e in findings.effects if e.differing]
        if findings.effects and not half:
            found.append(
                f"{task_title(tables.task)}: no image was scored differently, so the intervals have no width; with "
                f"{findings.images:,} images a change on {percent(min(1.0, 3 / findings.images))} of all images is "
                "still not excluded (rule of three, 95 %)."
            )
        elif half:
            found.append(
                f"{task_title(tables.task)}: with {findings.images:,} images the interval reaches about "
                f"±{np.median(half):.3f} around a change in {in_sentence(tables.endpoint.score)}; smaller ones go "
                "unseen."
            )
        tuned = tables.runs[tables.baseline][0]
        if tuned.eval_cross_entropy >= tuned.base_eval_cross_entropy:
            found.append(
                f"{task_title(tables.task)}: fine-tuning with cross entropy did not lower it on the selection split "
                f"({tuned.base_eval_cross_entropy:.3f} at the base, {tuned.eval_cross_entropy:.3f} selected)."
            )
        shared = tables.outputs["question"].notna().any()
        if shared:
            found.append(
                f"{task_title(tables.task)}: what is resampled is the question with its image; where several questions "
                "are about one image, the interval is a little too narrow."
            )
    printed = [
        ratio(fit.gradient_ratio_measured)
        for findings in all_findings
        for fits in findings.tables.runs.values()
        for fit in fits
        if fit.as_printed and fit.gradient_ratio_measured
    ]
    if printed:
        found.append(
            f"The weight as printed, b = 1e-4, makes the penalty's gradient {listing(list(dict.fromkeys(printed)))} of "
            "that of cross entropy: that arm is next to inert, and what it differs by is little but noise."
        )
    budgets = {pixels(float(f.tables.outputs["eps"].max())) for f in all_findings}
    found.append(
        f"One white-box attack (BIM, no random start, no restarts) at one budget ({listing(sorted(budgets))}), which "
        "raises cross entropy and does not know the penalty; the paper's budgets are 63.75/255 and 67 to 70/255."
    )
    return [limit for limit in found if limit]


def _small_scale(run: RunTables, all_findings: Sequence[Findings]) -> str:
    datasets = run.info.get("datasets") or {}
    names = sorted({str((datasets.get(f.tables.task) or {}).get("name", "")) for f in all_findings} & _EMBEDDED)
    if not names:
        return ""
    steps = sorted({r.steps for f in all_findings for runs in f.tables.runs.values() for r in runs})
    return (
        f"The embedded data ({listing(names)}) and models of a few million parameters, fine-tuned for "
        f"{listing([str(count) for count in steps])} steps from bases that already know the task: nothing here says "
        "what PRSL does to ViT-GPT2 on COCO or to BLIP-2 on Visual Genome."
    )


def headline_lines(run: RunTables, all_findings: Sequence[Findings]) -> list[str]:
    """Five lines for the end of a run on a terminal."""
    lines = [f"{task_title(f.tables.task)}: {_headline(f)}" for f in all_findings][:2]
    falls = []
    for findings in all_findings:
        tables = findings.tables
        clean, attacked = findings.levels[tables.baseline]
        eps = pixels(float(tables.outputs["eps"].max()))
        score = in_sentence(tables.endpoint.score)
        falls.append(f"{score} from {clean.estimate:.3f} to {attacked.estimate:.3f} (eps {eps})")
    lines.append(f"The attack (BIM) took cross entropy's {listing(falls)}.")
    if len(lines) < 3:
        lines.append(_cost(all_findings[0]))
    checks = [check for findings in all_findings for check in findings.checks]
    failed = [check.name for check in checks if check.passed is False]
    moving = any(change.excludes_zero for f in all_findings for change in f.last_change.values())
    lines.append(
        f"{_passed(checks)}{': failed ' + listing(failed) if failed else ''}; the attack "
        + ("was still gaining in its last rounds." if moving else "gained nothing measurable in its last rounds.")
    )
    seeds = min(len(f.tables.seeds) for f in all_findings)
    lacking = _lacking({str(name) for f in all_findings for name in f.tables.outputs["attack"].unique()}, _MASKING)
    lines.append(
        f"No claim of robustness: {_plural(seeds, 'training seed')}, one white-box attack"
        + (f"; not in this run: {listing(lacking)}." if lacking else ".")
    )
    return lines


def _cost(findings: Findings) -> str:
    tables = findings.tables
    if not findings.effects:
        return "There is no PRSL arm to compare with cross entropy."
    largest = max(findings.effects, key=lambda effect: abs(effect.clean.estimate))
    return (
        f"Largest change on clean images: {largest.clean.text} with {tables.label(largest.arm)} (exploratory; its "
        f"p-value under attack, over all arms, is {p_value(largest.p_holm)})."
    )


def _plural(count: int, thing: str) -> str:
    return f"one {thing}" if count == 1 else f"{count} {thing}s"
