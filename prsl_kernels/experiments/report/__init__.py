"""The report of a run: one HTML file that stands alone, its figures, its tables, and its evidence as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.files import atomic_directory, write_json, write_text
from prsl_kernels.experiments.report.analysis import analyse
from prsl_kernels.experiments.report.compare import compare_runs, read_recipe
from prsl_kernels.experiments.report.drawing import slug
from prsl_kernels.experiments.report.evidence import write_evidence
from prsl_kernels.experiments.report.examples import choose_examples
from prsl_kernels.experiments.report.export import write_tables
from prsl_kernels.experiments.report.figures import draw_figures
from prsl_kernels.experiments.report.history import image_history
from prsl_kernels.experiments.report.html import TaskPage, render
from prsl_kernels.experiments.report.sections import sections
from prsl_kernels.experiments.report.style import arm_styles
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.tabulate import page_tables
from prsl_kernels.experiments.report.verdict import headline_lines

OUTPUTS = ("figures", "tables", "evidence")  # the folders in the run that a report writes anew


def build_report(run: Path, *, recipe: Mapping[str, Any]) -> Path:
    """Writes `run/report.html`, and the folders `OUTPUTS`, from the tables in `run`.

    `figures` holds every figure as PNG and SVG, `tables` every table as CSV and LaTeX, `evidence` a JSON file per task.

    Args:
        run: a run directory whose attack and evaluate stages are finished.
        recipe: the resolved recipe as plain types: which arms, seeds and tasks count, and each task's primary endpoint.

    Returns:
        The path of the page. It holds everything it shows and asks for nothing; `report_files` names the others.

    Raises:
        UserError: a table is missing, damaged or empty, holds numbers that are not finite, or nothing can be compared.
    """
    tables = load_run(run, recipe)
    styles = arm_styles(tables.tasks)
    pages = []
    with ExitStack() as stack:
        figures, exported, evidence = (stack.enter_context(atomic_directory(run / name)) for name in OUTPUTS)
        for task in tables.tasks:
            findings = analyse(task)
            pages.append(
                TaskPage(
                    findings,
                    draw_figures(findings, styles, figures),
                    choose_examples(task, run),
                    sections(findings),
                    image_history(task, run),
                )
            )
            own = [table for section in pages[-1].sections.values() for table in section.tables]
            write_tables(exported, slug(task.task), [*page_tables(findings), *own])
            write_json(evidence / f"{slug(task.task)}.json", write_evidence(findings))
    page = run / "report.html"
    write_text(page, render(tables, pages, styles))
    return page


def report_files(run: Path) -> list[Path]:
    """All that `build_report` has written into `run`, the page first."""
    return [run / "report.html", *(path for name in OUTPUTS for path in sorted((run / name).iterdir()))]


def headline(run: Path) -> list[str]:
    """The run's five most telling lines, for a terminal.

    Raises:
        UserError: as `build_report`, or there is no `recipe.yaml`.
    """
    tables = load_run(run, read_recipe(run))
    return headline_lines(tables, [analyse(task) for task in tables.tasks])


__all__ = ["OUTPUTS", "build_report", "compare_runs", "headline", "report_files"]
