"""A sceptic's questions, and where a run answers them; what a run lacks, and what it cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prsl_kernels.experiments.report.analysis import FEW_SEEDS, Check, Findings
from prsl_kernels.experiments.report.claims import (
    attack_name,
    convergence_told,
    in_sentence,
    rule_of_three,
    task_title,
    told,
    too_few,
    unexcluded_masking,
    unlike,
)
from prsl_kernels.experiments.report.evidence import convergence_idle
from prsl_kernels.experiments.report.grid import named_by_grid
from prsl_kernels.experiments.report.statistics import ALPHA
from prsl_kernels.experiments.report.tables import RunTables, metric_name
from prsl_kernels.experiments.report.text import listing, percent, pixels, ratio

_PAPER_VOCABULARY = 50_257  # GPT-2's
_EMBEDDED = {"openmoji", "easy-vqa"}
_CONTROLS = {"gaussian": "Gaussian noise", "jpeg": "JPEG"}


@dataclass(frozen=True)
class Evidence:
    """One of a sceptic's questions; `state` is "here", "part" or "absent"."""

    question: str
    state: str
    answer: str
    anchor: str  # of the section that holds the evidence, without the task; empty for none


def evidence(findings: Findings) -> list[Evidence]:
    """A sceptic's questions, and where this run answers them."""
    tables, end, asked = findings.tables, findings.tables.endpoint, findings.scepticism
    runs = tables.runs[tables.baseline]
    seeds = len(tables.seeds)
    different = unlike(tables)
    kept = int(tables.outputs["image"].notna().sum())
    several = len(asked.ensemble) > 1
    which = f"the worst, image by image, of {listing([name.upper() for name in asked.ensemble])}" if several else (
        "one attack, so no worst case over attacks"
    )  # fmt: skip
    return [
        Evidence("What was attacked, by whom, with which budget?", "here", "Stated in the threat model.", "threat"),
        Evidence(
            "Were the arms treated alike?",
            "absent" if different else "here" if seeds >= FEW_SEEDS and tables.attacked_split == "test" else "part",
            f"Not alike: {different}." if different else
            f"Same base checkpoint, data order, {runs[0].steps} steps and selection by cross entropy. "
            f"{plural(seeds, 'training seed').capitalize()}. {_chosen(findings)}",
            "arms",
        ),
        Evidence("Is a clean-score cost hidden?", "here", "Clean and attacked scores in one plot.", "tradeoff"),
        Evidence("Had the attack converged?", *_convergence(findings), "convergence"),
        Evidence("Do the controls behave?", *_controls(findings), "controls"),
        Evidence("Could masked gradients pass for an effect?", *_masking(findings), "transfer"),
        Evidence(
            "Was the comparison declared, and are the statistics sound?",
            "here" if end.declared and several and seeds >= FEW_SEEDS else "part",
            f"Primary endpoint {'declared in the recipe' if end.declared else 'not declared; the default'}: "
            f"{metric_name(end.score)}, {attack_name(findings)}, against the primary reference: {which}. Paired "
            "bootstrap, sign-flip test, Holm over arms, a t test over three seeds or more; the rest is "
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


def _chosen(findings: Findings) -> str:
    """By what k and b were chosen, and whether on the images that were attacked."""
    tables = findings.tables
    split, named = tables.attacked_split, named_by_grid(tables)
    told = "k is the recipe's; b follows from the gradient ratio asked, or is the recipe's."
    if named:
        told = (
            f"k and b of {listing([tables.label(arm) for arm in named])} were named by the grid on the selection "
            "split; otherwise k is the recipe's, and b follows from the gradient ratio asked, or is the recipe's."
        )
    if split == "test":
        return f"{told} The test split was attacked, and none of this has seen it."
    return f"{told} The {split} split was attacked, on which checkpoints are chosen too: these images are not held out."


def _controls(findings: Findings) -> tuple[str, str]:
    present, asked = set(findings.tables.outputs["attack"].unique()), findings.scepticism
    lacking = [name for attack, name in _CONTROLS.items() if attack not in present]
    lacking += [] if asked.floors else ["an unbounded budget"]
    answer = f"{passed(findings.checks)}."
    for floor in asked.floors:
        high = [findings.tables.label(arm) for arm, reached in floor.reached.items() if not reached]
        answer += " An unbounded attack " + (
            f"does not bring {listing(high)} down to unrelated texts." if high else "reaches the floor on every arm."
        )
    return ("part", f"{answer} Not in this run: {listing(lacking)}.") if lacking else ("here", answer)


def _masking(findings: Findings) -> tuple[str, str]:
    masking, tables = findings.scepticism.masking, findings.tables
    lacking = [] if masking.transfer else ["transfer between arms"]
    lacking += [] if masking.queries else ["a query attack"]
    accused = [f"{tables.label(arm)} ({told(tests)})" for arm, tests in masking.suspected.items() if tests]
    answer = f"Suspected in {'; '.join(accused)}." if accused else ""
    open_ = [
        f"{tables.label(effect.arm)} ({found})"
        for effect in findings.effects
        if (found := unexcluded_masking(findings, effect))
    ]
    answer += f" Cannot be excluded in {'; '.join(open_)}." if open_ else ""
    few = too_few(masking.tests)
    answer += f" Not excluded: {few}." if few else ""
    if lacking:
        answer += f" Not excluded: {listing(lacking)} not in this run."
    if not accused and not few and masking.comparisons:
        answer += (
            f" In {masking.comparisons} comparisons neither transferred images nor attacks without gradients lowered a "
            "score measurably below the white box's."
        )
    answer += " Shares of zero and non-finite gradients are given."
    return "absent" if len(lacking) == 2 or few else "part" if lacking else "here", answer.strip()


def _convergence(findings: Findings) -> tuple[str, str]:
    tables, asked = findings.tables, findings.scepticism.convergence
    if asked.doubling is None:
        return "absent", "Only one round was recorded, so nothing can be said."
    if set(asked.idle) == set(tables.arms):
        return "absent", f"{convergence_told(findings)}."
    change = asked.doubling.changes[tables.baseline]
    open_ = [tables.label(arm) for arm in tables.arms if not asked.settled(arm)]
    verdict = f"{convergence_told(findings)}, to a tenth of what {tables.main_attack.upper()} did to each arm"
    verdict += f" (not for {listing(open_)})" if open_ else ""
    verdict += f"; {convergence_idle(findings)}" if asked.idle else ""
    moving = f"still changed by {change.text}" if change.excludes_zero else f"changed by {change.text}, not measurably"
    answer = f"{verdict}: from round {asked.doubling.before} to {asked.doubling.after} cross entropy {moving}."
    for restart in asked.restarts:
        answer += f" Restarts of {restart.attack.upper()} changed it by {restart.changes[tables.baseline].text}."
    if not asked.restarts:
        answer += " No restarts."
    if asked.unasked:
        names = listing([name.upper() for name in asked.unasked])
        answer += f" Too few rounds were recorded to ask it of {names}."
    if findings.scepticism.sweep is None:
        answer += " One eps only."
    complete = not open_ and bool(asked.restarts) and findings.scepticism.sweep is not None
    return "here" if complete else "part", answer


def missing_evidence(all_findings: Sequence[Findings]) -> str:
    """Which of the evidence that a claim of robustness needs is not in the run, in any of its tasks."""
    asked = [findings.scepticism for findings in all_findings]
    missing = [] if all(len(each.ensemble) > 1 for each in asked) else ["a worst case over several attacks"]
    missing += [] if all(each.masking.transfer for each in asked) else ["transfer between arms"]
    missing += [] if all(each.masking.queries for each in asked) else ["a query attack"]
    if not all(each.convergence.settled(arm) for each in asked for arm in each.convergence.states):
        missing.append("a converged attack")
    seeds = min(len(findings.tables.seeds) for findings in all_findings)
    if seeds < FEW_SEEDS:
        missing.append("more than one training seed" if seeds < 2 else f"{FEW_SEEDS} training seeds")
    return f"Not in this run: {listing(missing)}." if missing else ""


def passed(checks: Sequence[Check]) -> str:
    """How many controls pass."""
    held = [check for check in checks if check.passed is not None]
    return f"{sum(bool(check.passed) for check in held)} of {len(held)} controls that the run holds pass"


def plural(count: int, thing: str) -> str:
    """ "one thing", "2 things"."""
    return f"one {thing}" if count == 1 else f"{count} {thing}s"


def limits(run: RunTables, all_findings: Sequence[Findings]) -> list[str]:
    """What this run cannot tell, computed from the run."""
    found = [_small_scale(run, all_findings)]
    vocabularies = {f.tables.runs[f.tables.baseline][0].vocab_size for f in all_findings}
    k = max((r.k for f in all_findings for runs in f.tables.runs.values() for r in runs if r.has_k), default=0)
    if k and min(vocabularies) < _PAPER_VOCABULARY:
        size = min(vocabularies)
        found.append(
            f"k counts classes, so k/V is what compares: k = {k} is {percent(k / size)} of this vocabulary of {size:,} "
            f"and {percent(k / _PAPER_VOCABULARY, 2)} of GPT-2's {_PAPER_VOCABULARY:,}."
        )
    for findings in all_findings:
        tables = findings.tables
        half = [(e.attacked.high - e.attacked.low) / 2 for e in findings.effects if e.differing]
        if findings.effects and not half:
            found.append(
                f"{task_title(tables.task)}: no image was scored differently, so the intervals have no width; "
                f"{rule_of_three(findings.images)}."
            )
        elif half:
            found.append(
                f"{task_title(tables.task)}: with {findings.images:,} images the interval reaches about "
                f"±{np.median(half):.3f} around a change in {in_sentence(tables.endpoint.score)}; smaller ones go "
                "unseen."
            )
        least = 2 * 0.5**findings.images * len(findings.effects)
        if findings.effects and least >= ALPHA:
            found.append(
                f"{task_title(tables.task)}: {findings.images:,} images are too few for any change to be detected: no "
                f"p-value over {plural(len(findings.effects), 'arm')} can be below {ALPHA:g}."
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
    found += [_budget_limit(findings) for findings in all_findings]
    return [limit for limit in found if limit]


def _budget_limit(findings: Findings) -> str:
    tables, asked = findings.tables, findings.scepticism
    budgets = sorted({point.eps for point in asked.sweep.points if point.eps} if asked.sweep else set())
    swept = f", and a sweep from {pixels(budgets[0])} to {pixels(budgets[-1])} on some images" if budgets else ""
    names = [name.upper() for name in asked.ensemble]
    which = f"The worst case is over {listing(names)}" if len(names) > 1 else f"One white-box attack ({names[0]})"
    starts = "" if asked.convergence.restarts else "; no restarts"
    return (
        f"{task_title(tables.task)}: {which[0].lower()}{which[1:]}, at a budget of {pixels(tables.main_budget())}"
        f"{swept}{starts}. An attack that was not tried may find more; the paper's budgets are 63.75/255 and 67 to "
        "70/255."
    )


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
