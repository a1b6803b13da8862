"""The report of a run: one HTML file that stands alone, and its figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_directory, write_text
from prsl_kernels.experiments.report.analysis import analyse
from prsl_kernels.experiments.report.examples import choose_examples
from prsl_kernels.experiments.report.figures import draw_figures
from prsl_kernels.experiments.report.html import TaskPage, render
from prsl_kernels.experiments.report.style import arm_styles
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import headline_lines


def build_report(run: Path, *, recipe: Mapping[str, Any]) -> Path:
    """Writes `run/report.html` and `run/figures/*.{png,svg}` from the tables in `run`.

    Args:
        run: a run directory whose attack and evaluate stages are finished.
        recipe: the resolved recipe as plain types: which arms, seeds and tasks count, and each task's primary endpoint.

    Returns:
        The path of the page. It holds everything it shows and asks for nothing.

    Raises:
        UserError: a table is missing, damaged or empty, holds numbers that are not finite, or nothing can be compared.
    """
    tables = load_run(run, recipe)
    styles = arm_styles(tables.tasks)
    pages = []
    with atomic_directory(run / "figures") as figures:
        for task in tables.tasks:
            findings = analyse(task)
            pages.append(TaskPage(findings, draw_figures(findings, styles, figures), choose_examples(task, run)))
    page = run / "report.html"
    write_text(page, render(tables, pages, styles))
    return page


def headline(run: Path) -> list[str]:
    """The run's five most telling lines, for a terminal.

    Raises:
        UserError: as `build_report`, or there is no `recipe.yaml`.
    """
    path = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `prsl run RECIPE` writes it") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML ({error}); run `prsl run RECIPE` again") from None
    tables = load_run(run, recipe if isinstance(recipe, dict) else {})
    return headline_lines(tables, [analyse(task) for task in tables.tasks])


__all__ = ["build_report", "headline"]
