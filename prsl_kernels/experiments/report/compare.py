"""Runs side by side: the same endpoint, arms, scores and effects of each, how they were set up, and what forbids it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import write_text
from prsl_kernels.experiments.report import text
from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.datatable import Cell, DataTable, Level, PValue, Ratio, shown
from prsl_kernels.experiments.report.html import forest_rows, page_environment, script_hash
from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.tables import RunTables, TaskTables, load_run, metric_name
from prsl_kernels.experiments.report.tabulate import when
from prsl_kernels.experiments.report.verdict import outcome, task_title

_MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST_VALUE = 160
_ARM_SETTINGS = ("loss", "k", "space", "distance", "label_smoothing", "temperature", "gradient_ratio_target", "steps")


@dataclass(frozen=True)
class ComparedRun:
    """A run under the letter by which the comparison calls it."""

    mark: str
    run: RunTables
    findings: Mapping[str, Findings]  # by task

    @property
    def title(self) -> str:
        return f"{self.mark}: {self.run.name}"


@dataclass(frozen=True)
class TaskComparison:
    """One task: a table with a row per arm and run, the effects on a common axis, and why runs are not comparable."""

    task: str
    title: str
    table: DataTable
    effects: tuple[tuple[str, str, Interval, str], ...]  # mark, label, arm minus cross entropy, words
    warnings: tuple[str, ...]


def compare_runs(runs: Sequence[Path], out: Path | None = None) -> str:
    """Compares finished runs.

    Args:
        runs: two or more run directories, each with its `recipe.yaml`.
        out: where to write the comparison as one HTML page that stands alone; None for none.

    Returns:
        The same rows and warnings as text for a terminal.

    Raises:
        UserError: fewer than two runs, one given twice, more than 26, or one that cannot be reported on.
    """
    if len(runs) < 2:
        raise UserError("prsl compare needs two or more run directories")
    if len(runs) > len(_MARKS):
        raise UserError(f"prsl compare takes at most {len(_MARKS)} runs, not {len(runs)}")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"prsl compare: a run directory is given twice: {', '.join(map(str, runs))}")
    loaded = [_load(mark, run) for mark, run in zip(_MARKS, runs, strict=False)]
    tasks = [_compare_task(task, loaded) for task in dict.fromkeys(task for run in loaded for task in run.findings)]
    settings = _settings(loaded)
    if out is not None:
        write_text(out, _page(loaded, tasks, settings))
    return _for_terminal(loaded, tasks, settings)


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe that a run keeps beside its results.

    Raises:
        UserError: there is none, or it is not YAML.
    """
    path = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such file; `prsl run RECIPE` writes it") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({error}); run `prsl run RECIPE` again") from None
    return recipe if isinstance(recipe, dict) else {}


def _load(mark: str, run: Path) -> ComparedRun:
    tables = load_run(run, read_recipe(run))
    return ComparedRun(mark, tables, {task.task: analyse(task) for task in tables.tasks})


def _compare_task(task: str, runs: Sequence[ComparedRun]) -> TaskComparison:
    present = [run for run in runs if task in run.findings]
    rows: list[tuple[Cell, ...]] = []
    effects = []
    for arm in dict.fromkeys(arm for run in present for arm in run.findings[task].tables.arms):
        for run in present:
            findings = run.findings[task]
            tables = findings.tables
            if arm not in tables.arms:
                continue
            effect = next((effect for effect in findings.effects if effect.arm == arm), None)
            clean, attacked = findings.levels[arm]
            fixed: tuple[Cell, ...] = (
                run.mark, arm, tables.label(arm), Ratio(tables.runs[arm][0].b), len(tables.seeds), findings.images,
                Level(clean), Level(attacked),
            )  # fmt: skip
            if effect is None:
                rows.append((*fixed, None, None, None, None))
            else:
                rows.append((*fixed, effect.clean, effect.attacked, PValue(effect.p_holm), outcome(effect)))
                effects.append((run.mark, tables.label(arm), effect.attacked, outcome(effect)))
    endpoints = {run.mark: _endpoint(run.findings[task].tables) for run in present}
    told = set(endpoints.values())
    caption = told.pop() if len(told) == 1 else "; ".join(f"{mark}: {said}" for mark, said in endpoints.items())
    columns = ("Run", "Arm", "Label", "b", "Seeds", "Images", "Clean", "Attacked", "Clean, arm minus CE",
               "Attacked, arm minus CE", "p Holm", "In words")  # fmt: skip
    return TaskComparison(
        task, task_title(task), DataTable(task, f"{task_title(task)}, {caption}", columns, tuple(rows)),
        tuple(effects), tuple(_warnings(task, runs)),
    )  # fmt: skip


def _endpoint(tables: TaskTables) -> str:
    declared = "" if tables.endpoint.declared else " (not declared)"
    return f"{metric_name(tables.endpoint.score)}, {when(tables)}{declared}"


def _warnings(task: str, runs: Sequence[ComparedRun]) -> list[str]:
    """Why numbers of these runs must not be put side by side; each names what differs, and between which runs."""
    absent = [run.mark for run in runs if task not in run.findings]
    warnings = [f"{text.listing(absent)} without this task."] if absent else []
    present = [run for run in runs if task in run.findings]
    of_task = {run.mark: run.findings[task] for run in present}

    def unlike(what: str, values: Mapping[str, Any], consequence: str) -> None:
        groups: dict[Any, list[str]] = {}
        for mark, value in values.items():
            groups.setdefault(value, []).append(mark)
        if len(groups) > 1:
            told = [f"{text.listing(marks)}: {text.shorten(str(value), 80)}" for value, marks in groups.items()]
            warnings.append(f"{what} differ ({'; '.join(told)}): {consequence}.")

    prints = {run.mark: _fingerprint(run.run, task) for run in present}
    unlike("The data", prints, "scores are of other images and references")
    if set(prints.values()) == {"not recorded"}:
        warnings.append("No run records its data's fingerprint: whether the data are the same is not known.")
    ids = {mark: _attacked_ids(found.tables) for mark, found in of_task.items()}
    if len(set(ids.values())) > 1:
        shared = len(frozenset.intersection(*ids.values()))
        sizes = ", ".join(f"{mark} {len(names):,}" for mark, names in ids.items())
        warnings.append(f"The attacked images differ ({sizes}; {shared:,} in all of them): means of other images.")
    unlike("The endpoints", {m: _endpoint(f.tables) for m, f in of_task.items()}, "the columns are not of one quantity")
    unlike("The budgets", {m: text.pixels(f.tables.main_budget()) for m, f in of_task.items()},
           "an attack with more room does more")  # fmt: skip
    unlike("The main attack's rounds", {m: f.tables.main_round for m, f in of_task.items()},
           "a longer attack does more")  # fmt: skip
    unlike("The attacks of the ensemble", {m: text.listing(list(f.scepticism.ensemble)) for m, f in of_task.items()},
           "a worst case over more attacks is worse")  # fmt: skip
    backends = {mark: json.dumps(found.tables.versions, sort_keys=True, default=str) for mark, found in of_task.items()}
    if len(set(backends.values())) > 1:
        names = sorted({
            name for found in of_task.values() for name in found.tables.versions
            if len({json.dumps(other.tables.versions.get(name), default=str) for other in of_task.values()}) > 1
        })  # fmt: skip
        warnings.append(f"The scores' back ends differ ({text.listing(names)}): such scores are not comparable.")
    bases = {m: f"{f.tables.runs[f.tables.baseline][0].base_eval_cross_entropy:.4f}" for m, f in of_task.items()}
    unlike("The bases' cross entropies", bases, "the arms start from other checkpoints, or are measured on other data")
    for arm in dict.fromkeys(arm for found in of_task.values() for arm in found.tables.arms):
        fits = {m: f.tables.runs[arm][0] for m, f in of_task.items() if arm in f.tables.arms}
        differing = [n for n in _ARM_SETTINGS if len({getattr(fit, n) for fit in fits.values()}) > 1]
        if differing:
            warnings.append(f"Arm {arm} is not the same in all runs ({', '.join(differing)} differ).")
    return warnings


def _attacked_ids(tables: TaskTables) -> frozenset[str]:
    return frozenset(map(str, tables.main_rows["id"].unique()))


def _fingerprint(run: RunTables, task: str) -> str:
    datasets = run.info.get("datasets")
    found = datasets.get(task) if isinstance(datasets, Mapping) else None
    return str(found.get("fingerprint") or "not recorded")[:12] if isinstance(found, Mapping) else "not recorded"


def _settings(runs: Sequence[ComparedRun]) -> DataTable:
    """The keys of recipe, software and machine whose values differ, a column per run."""
    flat = [{**_flat(_named(run.run.recipe)), **_flat({"versions": run.run.info.get("versions") or {}}),
             **_flat({"host": run.run.info.get("host")})} for run in runs]  # fmt: skip
    keys = dict.fromkeys(key for values in flat for key in values)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (key, *(text.shorten(values.get(key, "–"), _LONGEST_VALUE) for values in flat))
        for key in keys if len({values.get(key) for values in flat}) > 1
    )  # fmt: skip
    return DataTable("settings", "Settings that differ", ("Setting", *(run.title for run in runs)), rows)


def _named(value: Any) -> Any:
    """Lists of named things as mappings by name, so that an arm more does not move all that follow."""
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        return {str(item["name"]): _named({k: v for k, v in item.items() if k != "name"}) for item in value}
    return value


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}


def _for_terminal(runs: Sequence[ComparedRun], tasks: Sequence[TaskComparison], settings: DataTable) -> str:
    lines = [f"{run.title}  ({text.printable(str(run.run.folder))})" for run in runs]
    for task in tasks:
        lines += ["", task.table.caption, *(f"  ! {warning}" for warning in task.warnings), _aligned(task.table)]
    lines += ["", settings.caption + ("" if settings.rows else ": none")]
    if settings.rows:
        lines.append(_aligned(settings))
    return "\n".join(text.printable(line) for line in "\n".join(lines).splitlines())


def _aligned(table: DataTable) -> str:
    frame = pd.DataFrame([[shown(cell) for cell in row] for row in table.rows], columns=list(table.columns))
    numeric = {name: table.numeric(index) for index, name in enumerate(table.columns)}
    lines = []
    widths = {name: max(len(name), int(frame[name].str.len().max())) for name in frame}
    for row in [list(frame.columns), *frame.to_numpy().tolist()]:
        cells = [
            cell.rjust(widths[name]) if numeric[name] else cell.ljust(widths[name])
            for name, cell in zip(frame.columns, row, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _page(runs: Sequence[ComparedRun], tasks: Sequence[TaskComparison], settings: DataTable) -> str:
    folder = Path(__file__).parent
    script = (folder / "report.js").read_text(encoding="utf-8")
    environment = page_environment()
    return environment.get_template("compare.html.j2").render(
        runs=runs,
        tasks=tasks,
        settings=settings,
        forests={task.task: forest_rows([effect[2] for effect in task.effects]) for task in tasks},
        css=Markup((folder / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=script_hash(script),
    )
