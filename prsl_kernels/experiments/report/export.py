"""Every table of the report as files: CSV with all digits, and LaTeX for `booktabs`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prsl_kernels.experiments.report.datatable import DataTable, Level, plain, shown
from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.text import printable

_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
    # The report's own typography, in commands that every engine knows.
    "\u2212": r"$-$", "–": "--", "\u00a0": "~", "\u2009": r"\,", "→": r"$\to$", "×": r"$\times$", "∞": r"$\infty$",
    "“": "``", "”": "''", "’": "'", "•": r"\textbullet{}", "±": r"$\pm$", "≤": r"$\le$", "…": r"\dots{}",
    "\ufffd": "?", "≥": r"$\ge$", "←": r"$\leftarrow$", "·": r"\textperiodcentered{}",
    **{character: f"$^{{{digit}}}$" for character, digit in zip("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789", strict=True)},
})  # fmt: skip
_HEADER = "% Needs booktabs, textcomp and T1 font encoding; texts in other scripts need XeLaTeX or LuaLaTeX.\n"


def latex(text: str) -> str:
    """`text` as LaTeX that prints it, whatever it holds."""
    escaped = " ".join(printable(text).split(" ")).translate(_ESCAPES)
    return re.sub(r"\s+", " ", escaped)


def as_csv(table: DataTable) -> str:
    """The table as CSV: unrounded numbers, an interval in three columns (…, … low, … high), nothing where none is.

    Text that begins as a formula does (= + - @) gets an apostrophe before it: what a model says, or how somebody calls
    an arm, is not to be computed.
    """
    wide = [
        any(isinstance(row[column], (Interval, Level)) for row in table.rows) for column in range(len(table.columns))
    ]
    names = [
        name for heading, spread in zip(table.columns, wide, strict=True) for name in
        ((heading, f"{heading} low", f"{heading} high") if spread else (heading,))
    ]  # fmt: skip
    rows = []
    for row in table.rows:
        cells: list[object] = []
        for cell, spread in zip(row, wide, strict=True):
            values = tuple(_inert(value) for value in plain(cell))
            cells += [*values, *[None] * (3 - len(values))] if spread else values
        rows.append(cells)
    frame = pd.DataFrame(rows, columns=[_inert(" ".join(printable(name).split())) for name in names], dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _inert(cell: object) -> object:
    """Text that a spreadsheet would compute, behind an apostrophe; numbers stay what they are."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def as_latex(table: DataTable, label: str) -> str:
    """The table as a LaTeX `table` with the rounding of the page."""
    cells = [[latex(shown(cell)) for cell in row] for row in table.rows]
    for row in cells:
        if row and row[0].startswith(("[", "*")):  # after \\ these would be read as its argument
            row[0] = "{}" + row[0]
    frame = pd.DataFrame(cells, columns=range(len(table.columns)))
    styler = frame.style.hide(axis="index").format_index(
        lambda column: latex(table.columns[column]), axis="columns"
    )  # fmt: skip
    alignment = "".join("r" if table.numeric(column) else "l" for column in range(len(table.columns)))
    text = styler.to_latex(
        hrules=True, column_format=alignment, caption=latex(table.caption), label=label, position_float="centering"
    )
    return _HEADER + text


def write_tables(folder: Path, task: str, tables: Sequence[DataTable]) -> list[Path]:
    """Writes `folder`/`task`-<table>.{csv,tex} and returns what was written.

    Args:
        folder: an existing folder.
        task: the task's name as part of a file name.
        tables: with keys that differ, else a ValueError is raised.
    """
    keys = [table.key for table in tables]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two tables would be written to one file: {keys}")
    written = []
    for table in tables:
        for suffix, content in ((".csv", as_csv(table)), (".tex", as_latex(table, f"tab:{task}-{table.key}"))):
            path = folder / f"{task}-{table.key}{suffix}"
            path.write_text(content, encoding="utf-8")
            written.append(path)
    return written
