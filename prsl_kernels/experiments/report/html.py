"""The page: what the template is given, and how it is rendered into one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prsl_kernels.experiments.report import text
from prsl_kernels.experiments.report.analysis import Findings
from prsl_kernels.experiments.report.datatable import ArmCell, Cell, DataTable, Level, shown, sort_value
from prsl_kernels.experiments.report.drawing import FigureBlock, slug
from prsl_kernels.experiments.report.examples import Examples
from prsl_kernels.experiments.report.history import History
from prsl_kernels.experiments.report.sections import Section
from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.style import ArmStyle
from prsl_kernels.experiments.report.tables import ArmRun, RunTables, TaskTables, metric_name
from prsl_kernels.experiments.report.tabulate import flag_table, when
from prsl_kernels.experiments.report.verdict import (
    NO_CLAIM,
    arm_verdicts,
    evidence,
    in_sentence,
    limits,
    missing_evidence,
    outcome,
    task_title,
    verdict,
)
from prsl_kernels.version import __version__

_PER_CHANNEL = 5  # significant digits of a budget in normalised units


@dataclass(frozen=True)
class TaskPage:
    """Everything the template shows of one task."""

    findings: Findings
    figures: Mapping[str, FigureBlock]
    examples: Examples
    sections: Mapping[str, Section]
    history: History

    @property
    def tables(self) -> TaskTables:
        return self.findings.tables

    @property
    def anchor(self) -> str:
        return slug(self.tables.task)


def render(run: RunTables, pages: list[TaskPage], styles: Mapping[str, ArmStyle]) -> str:
    """The report as HTML text."""
    environment = page_environment()
    environment.filters |= {"in_sentence": in_sentence, "outcome": outcome, "groupby_backend": _group_by_backend}
    findings = [page.findings for page in pages]
    folder = Path(__file__).parent
    script = (folder / "report.js").read_text(encoding="utf-8")
    return environment.get_template("template.html.j2").render(
        run=run,
        pages=pages,
        styles=styles,
        verdicts={page.tables.task: verdict(page.findings) for page in pages},
        evidence=_merged_evidence(pages),
        limits=limits(run, findings),
        no_claim=NO_CLAIM,
        missing=missing_evidence(findings),
        summary=_summary(findings),
        title_of=task_title,
        threat={page.tables.task: _threat_model(run, page) for page in pages},
        forest={page.tables.task: forest_rows([effect.attacked for effect in page.findings.effects]) for page in pages},
        arm_rows={page.tables.task: _arm_rows(page.tables) for page in pages},
        provenance=_provenance(run),
        recipe_yaml=yaml.safe_dump(
            json.loads(json.dumps(run.recipe, default=str)), sort_keys=False, allow_unicode=True
        ),
        claims={page.tables.task: arm_verdicts(page.findings) for page in pages},
        flags={page.tables.task: flag_table(page.findings) for page in pages},
        toc={page.tables.task: _contents(page) for page in pages},
        when={page.tables.task: when(page.tables) for page in pages},
        css=Markup((folder / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=script_hash(script),
    )


def page_environment() -> Environment:
    """Jinja as every page of the project uses it: escaping, strict, and without control characters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number, "percent": text.percent, "ratio": text.ratio, "p": text.p_value, "short": text.shorten,
        "metric": metric_name, "svg_uri": _svg_uri, "cell": cell_html, "sort_value": sort_value, "is_arm": _is_arm,
        "marks_zero": _marks_zero,
    }  # fmt: skip
    return environment


def script_hash(script: str) -> str:
    """The page's own script as its Content-Security-Policy names it: no other script runs, whatever a text holds."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def cell_html(cell: Cell) -> Markup:
    """A cell as markup: an interval under its number, and a dot where it excludes zero."""
    if isinstance(cell, (Interval, Level)):
        mark = " •" if isinstance(cell, Interval) and cell.excludes_zero else ""
        return Markup('<span class="value">{}{}</span><small class="range">{}</small>').format(
            cell.value, mark, cell.range
        )
    return Markup("<bdi>{}</bdi>").format(text.shorten(shown(cell)))


def _is_arm(cell: Cell) -> bool:
    return isinstance(cell, ArmCell)


def _marks_zero(table: DataTable) -> bool:
    return any(isinstance(cell, Interval) and cell.excludes_zero for row in table.rows for cell in row)


_CONTENTS = (
    ("threat", "Threat model"), ("arms", "Arms treated alike"), ("grid", "Grid"), ("effects", "Effects"),
    ("tradeoff", "Clean and worst case"), ("ensemble", "Ensemble of attacks"), ("rounds", "Score by round"),
    ("convergence", "Convergence"), ("eps", "Score against eps"), ("floor", "Unbounded attack"),
    ("controls", "Controls"), ("transfer", "Transfer"), ("query", "Query attack"), ("gradients", "Input gradients"),
    ("surface", "Loss surface"), ("seeds", "Training seeds"), ("shares", "Low scores"), ("groups", "Groups"),
    ("language", "What is said"), ("examples", "Examples"), ("history", "Every image"), ("training", "Fine-tuning"),
)  # fmt: skip


def _contents(page: TaskPage) -> list[tuple[str, str]]:
    """Anchors and titles of what the task's part of the page holds."""
    absent = {anchor for anchor, section in page.sections.items() if section.absent}
    absent |= {"grid"} - set(page.sections)
    return [(anchor, title) for anchor, title in _CONTENTS if anchor not in absent]


def _printable(value: object) -> object:
    """Applied to whatever the template prints: what is not markup of ours loses its control characters."""
    return text.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def _svg_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _summary(all_findings: list[Findings]) -> list[str]:
    """What was done, in two sentences."""
    arms = max(len(findings.tables.others) for findings in all_findings)
    tasks = text.listing([task_title(findings.tables.task).lower() for findings in all_findings])
    counts = text.listing([f"{f.images:,} for {task_title(f.tables.task).lower()}" for f in all_findings])
    rounds = max(findings.tables.main_round for findings in all_findings)
    attacks = sorted({findings.tables.main_attack.upper() for findings in all_findings})
    splits = sorted({findings.tables.attacked_split for findings in all_findings})
    more = max(
        sum(attack.role not in ("worst", "primary") for attack in findings.scepticism.attacks)
        for findings in all_findings
    )
    return [
        f"Copies of one base checkpoint per task ({tasks}) were fine-tuned with cross entropy and, alike in all else, "
        f"with {arms} other loss{'es' if arms != 1 else ''}.",
        f"Then {text.listing(attacks)}, {rounds} round{'s' if rounds != 1 else ''} long, and the other attacks and "
        f"controls of the recipe ({more} in all) perturbed images of the {text.listing(splits)} split ({counts}), "
        "and what every model said before and after was scored against the same references.",
    ]


def forest_rows(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Positions, in per cent of the width, of intervals and of zero on their common axis."""
    low = min([0.0, *(interval.low for interval in intervals)])
    high = max([0.0, *(interval.high for interval in intervals)])
    margin = 0.06 * (high - low) or 1e-3
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = [
        {"low": place(interval.low), "high": place(interval.high), "estimate": place(interval.estimate)}
        for interval in intervals
    ]
    return {"zero": place(0.0), "rows": rows, "low": low, "high": high}


def _arm_rows(tables: TaskTables) -> list[tuple[str, ArmRun]]:
    return [(arm, run) for arm in tables.arms for run in tables.runs[arm]]


def _merged_evidence(pages: list[TaskPage]) -> list[tuple[str, str, dict[str, list[tuple[str, str]]]]]:
    """(question, weakest state, answer -> [(task, anchor)]): tasks with the same answer share it."""
    merged = []
    for items in zip(*(evidence(page.findings) for page in pages), strict=True):
        answers: dict[str, list[tuple[str, str]]] = {}
        for page, item in zip(pages, items, strict=True):
            place = (task_title(page.tables.task), f"{page.anchor}-{item.anchor}")
            answers.setdefault(item.answer, []).append(place)
        weakest = min((item.state for item in items), key=("absent", "part", "here").index)
        merged.append((items[0].question, weakest, answers))
    return merged


def _threat_model(run: RunTables, page: TaskPage) -> list[tuple[str, str]]:
    """Terms and what holds in this run; what the run does not record is said so."""
    tables = page.tables
    rows = tables.main_rows
    config = ((run.recipe.get("tasks") or {}).get(tables.task) or {}).get("attack") or {}
    std = _stds(tables)
    units = {"pixels255": "levels of 255", "pixels": "pixels of [0, 1]", "normalized": "normalised units"}
    given = f"; given in {units[config['units']]}" if config.get("units") in units else ""
    rounds = tables.rounds(tables.main_attack)
    questions = sorted(str(question) for question in tables.outputs["question"].dropna().unique())
    if not questions:
        prompt = "none"
    elif len(questions) == 1:
        prompt = f"one constant question: “{text.shorten(questions[0], 120)}”"
    else:
        prompt = "the image's own question"
    size = tables.preprocessing.get("size") or {}
    side = f"{size['height']} × {size['width']} pixels" if {"height", "width"} <= set(size) else "not recorded"
    return [
        ("Images", f"of the {tables.attacked_split} split"),
        ("Goal", _goal(page.findings)),
        ("Norm", "L∞ around the clean image, and every pixel stays in [0, 1]"),
        ("eps", f"{_length(rows['eps'], std)}{given}"),
        ("Step", _length(rows["step"], std)),
        (
            "Rounds",
            f"{rounds[-1]} of the main attack ({tables.main_attack.upper()}), recorded at "
            f"{', '.join(map(str, rounds))}; starts at the clean image, no restarts",
        ),
        (
            "Attacker knows",
            "everything of the arm that it attacks (white box: weights, gradients, reference); each arm is attacked on "
            f"its own; {_knows_penalty(page.findings)}",
        ),
        ("Maximises", _maximised(page.findings)),
        ("Ensemble", _ensemble(page.findings)),
        (
            "Reference",
            "the ground truth, frozen: the same for all arms and rounds; where a set has none, the base checkpoint's "
            f"output on the clean image{_own_reference(page.findings)}",
        ),
        ("Prompt", prompt),
        ("Decoding", "greedy, deterministic"),
        ("Image size", side),
        ("Quantisation", "every recorded image is rounded to 8 bits, to the nearest inside the budget, then scored"),
    ]  # fmt: skip


def _objectives(findings: Findings) -> tuple[str, dict[str, list[str]]]:
    """What the main attack maximises, and for each objective the other attacks of the ensemble that maximise it."""
    tables = findings.tables
    main = str(tables.main_rows["objective"].iloc[0])
    others: dict[str, list[str]] = {}
    for attack in findings.scepticism.attacks:
        if attack.attack in findings.scepticism.ensemble and attack.attack != tables.main_attack:
            others.setdefault(attack.objective, []).append(attack.attack)
    return main, others


def _goal(findings: Findings) -> str:
    """Whether an attack wants any other text, or one of its own choice."""
    main, others = _objectives(findings)
    free, aimed = "untargeted: make the model say anything but the reference", "targeted: make it say another's text"
    goal = aimed if main == "target" else free
    unlike = [name for key, names in others.items() for name in names if (key == "target") != (main == "target")]
    if not unlike:
        return goal
    return f"the main attack is {goal}; of the ensemble, {text.listing(unlike)} {_are(unlike)} " + (
        free if main == "target" else aimed
    )


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


_OBJECTIVES = {
    "ce": "cross entropy of the reference",
    "margin": "the best wrong token's logit less the reference's, mean over tokens",
    "margin-max": "the same at the weakest token",
    "dlr": "the difference-of-logits ratio, mean over tokens",
    "ce+bd": "cross entropy plus the arm's own weighted penalty",
    "ce-bd": "cross entropy minus the arm's own weighted penalty",
    "target": "minus the cross entropy of another image's text",
}


def _maximised(findings: Findings) -> str:
    """The main attack's objective, and those of the ensemble that are others."""
    main, others = _objectives(findings)
    told = f"{_OBJECTIVES.get(main, main)}, mean over tokens, from the logits (never the model's own loss)"
    parts = [
        f"{_OBJECTIVES.get(key, key)} ({text.listing(names)})"
        for key, names in others.items()
        if key != main
    ]  # fmt: skip
    return f"main attack: {told}; of the ensemble: {'; '.join(parts)}" if parts else told


def _own_reference(findings: Findings) -> str:
    rows = findings.tables.outputs
    names = set(rows.loc[rows["reference"] == "secondary", "attack"]) & set(findings.scepticism.ensemble)
    return f"; for {text.listing(sorted(names))} what the arm itself says of the clean image" if names else ""


def _knows_penalty(findings: Findings) -> str:
    """Whether an attack adapts to the arm's own loss, and for which arms that is no other attack."""
    main, others = _objectives(findings)
    adaptive = [name for key, names in others.items() if key in ("ce+bd", "ce-bd") for name in names]
    knows = main in ("ce+bd", "ce-bd")
    told = f"the main attack {'knows' if knows else 'does not know'} of the penalty"
    if not adaptive and not knows:
        return "no attack of the ensemble knows of the penalty"
    if adaptive:
        told += f", {'and' if knows else 'but'} {text.listing(adaptive)} of the ensemble "
        told += "does" if len(adaptive) == 1 else "do"
    tables = findings.tables
    plain = [tables.label(arm) for arm in tables.arms if tables.runs[arm][0].loss != "prsl"]
    return f"{told}; on {text.listing(plain)}, whose loss is not PRSL, that is cross entropy" if plain else told


def _ensemble(findings: Findings) -> str:
    names = list(findings.scepticism.ensemble)
    if len(names) < 2:
        return "none: one attack within the budget"
    return f"the worst, image by image, of {len(names)} attacks within the budget: {text.listing(names)}"


def _stds(tables: TaskTables) -> list[float]:
    found = tables.preprocessing.get("image_std") or []
    valid = isinstance(found, list) and all(isinstance(value, (int, float)) and value > 0 for value in found)
    return [float(value) for value in found] if valid else []


def _length(values: Any, std: list[float]) -> str:
    """A budget in levels, as a share of the range, and in the model's normalised units."""
    shown = []
    for value in sorted({float(value) for value in values.dropna()}):
        normalised = list(dict.fromkeys(f"{value / deviation:.{_PER_CHANNEL}g}" for deviation in std))
        told = f"{text.listing(normalised)} normalised" if normalised else "normalised: not recorded"
        shown.append(f"{text.pixels(value)} = {value:.4g} of the pixel range = {told}")
    return "; ".join(shown) or "not recorded"


def backend(tables: TaskTables, metric: str) -> str:
    """The back end and version that computed a score, as the evaluation recorded it; "bleu" stands for BLEU-1 to 4."""
    if metric in ("exact_match", "vqa_accuracy"):
        return f"prsl_kernels {__version__}"
    found = [str(value) for name, value in tables.versions.items() if metric == name or metric.startswith(f"{name}_")]
    return found[0] if found else "back end not recorded"


def _group_by_backend(metrics: list[str], tables: TaskTables) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        groups.setdefault(backend(tables, metric), []).append(metric_name(metric))
    return list(groups.items())


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as ("outer / inner", value) rows."""
    if not isinstance(values, Mapping):
        return [(prefix, values if isinstance(values, str) else json.dumps(values, ensure_ascii=False, default=str))]
    return [row for key, value in values.items() for row in _flat(value, f"{prefix} / {key}" if prefix else str(key))]


def _provenance(run: RunTables) -> dict[str, Any]:
    datasets = run.info.get("datasets")
    return {
        "facts": [(name, str(run.info[name])) for name in ("name", "created", "host") if run.info.get(name)],
        "versions": [
            *_flat(run.info.get("versions") or {}),
            *(row for task in run.tasks for row in _flat(task.versions, f"scores of {task.task}")),
        ],
        "datasets": datasets if isinstance(datasets, Mapping) else {},
        "seeds": text.listing([str(seed) for seed in sorted({seed for task in run.tasks for seed in task.seeds})]),
    }
