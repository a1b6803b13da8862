"""Tables of typed cells, so that the page, the CSV and the LaTeX of a table are of the same numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.text import p_value, percent, printable, ratio

NONE = "–"


@dataclass(frozen=True)
class ArmCell:
    """An arm: the page shows its mark and label, a file its name in the recipe."""

    name: str
    label: str


@dataclass(frozen=True)
class Level:
    """A mean with its interval, which unlike a difference has no sign to show."""

    interval: Interval
    percent: bool = False

    @property
    def value(self) -> str:
        found = self.interval.estimate
        return percent(found) if self.percent else f"{found:.3f}".replace("-", "\u2212")

    @property
    def range(self) -> str:
        ends = (self.interval.low, self.interval.high)
        low, high = (percent(end) if self.percent else f"{end:.3f}".replace("-", "\u2212") for end in ends)
        return f"[{low},\u00a0{high}]"


@dataclass(frozen=True)
class Share:
    """A share of one, shown as a percentage."""

    value: float | None
    digits: int = 1


@dataclass(frozen=True)
class PValue:
    """A p-value, shown as small when it is."""

    value: float


@dataclass(frozen=True)
class Ratio:
    """A number of any magnitude, shown with two significant digits."""

    value: float | None


Cell: TypeAlias = "str | int | float | Interval | ArmCell | Level | Share | PValue | Ratio | None"


@dataclass(frozen=True)
class DataTable:
    """Rows under headings. `key` names the table's files; a column is numeric where none of its cells is text."""

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.key!r}: a row of {len(row)} cells under {len(self.columns)} columns")

    def numeric(self, column: int) -> bool:
        return not any(isinstance(row[column], (str, ArmCell)) for row in self.rows)


_BREAKS = re.compile(r"[ \t\n\r\f\v\x85\u2028\u2029]+")  # but not the spaces that must not break


def _one_line(value: str) -> str:
    return _BREAKS.sub(" ", printable(value)).strip()


def shown(cell: Cell) -> str:
    """The cell for people, on one line."""
    if cell is None:
        return NONE
    if isinstance(cell, ArmCell):
        return printable(cell.label)
    if isinstance(cell, Interval):
        return cell.text
    if isinstance(cell, Level):
        return f"{cell.value} {cell.range}"
    if isinstance(cell, Share):
        return percent(cell.value, cell.digits)
    if isinstance(cell, PValue):
        return p_value(cell.value)
    if isinstance(cell, Ratio):
        return ratio(cell.value)
    if isinstance(cell, str):
        return _one_line(cell)
    if isinstance(cell, float):
        return NONE if cell != cell else f"{cell:.3f}".replace("-", "\u2212")
    return f"{cell:,}"


def plain(cell: Cell) -> tuple[object, ...]:
    """The cell for a machine: three numbers for an interval, else one value; None where there is none."""
    if isinstance(cell, Level):
        cell = cell.interval
    if isinstance(cell, Interval):
        return (cell.estimate, cell.low, cell.high)
    if isinstance(cell, ArmCell):
        return (" ".join(printable(cell.name).split()),)
    if isinstance(cell, (Share, PValue, Ratio)):
        return (cell.value,)
    return (" ".join(printable(cell).split()),) if isinstance(cell, str) else (cell,)


def sort_value(cell: Cell) -> object:
    """What the page sorts a row by: the number itself where the text rounds it."""
    value = plain(cell)[0]
    return value if isinstance(value, (int, float)) else None
