"""The grid: the many arms, looked at on the selection split, of which some were taken into the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from pydantic import TypeAdapter, ValidationError

from prsl_kernels.experiments.config import ArmConfig, GridConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report.datatable import Cell, DataTable, Ratio
from prsl_kernels.experiments.report.drawing import FAINT, INK, Sketch
from prsl_kernels.experiments.report.section import Section
from prsl_kernels.experiments.report.tables import TaskTables, metric_name
from prsl_kernels.experiments.report.text import listing, printable

_MARKS = "osv^DPX*"


@dataclass(frozen=True)
class GridArm:
    """One arm of the grid: means over images of the primary score; k, b and space None where not recorded."""

    name: str
    family: str
    k: int | None
    b: float | None
    space: str | None
    clean: float
    attacked: float
    chosen: bool


@dataclass(frozen=True)
class GridFindings:
    """What the grid found, in the order of its record; `baseline` is cross entropy's row, None where not known."""

    score: str
    clean_tolerance: float
    arms: tuple[GridArm, ...]
    baseline: GridArm | None

    @property
    def chosen(self) -> tuple[GridArm, ...]:
        return tuple(arm for arm in self.arms if arm.chosen)


def grid_findings(tables: TaskTables) -> GridFindings | None:
    """The grid's record of a task; None where the run has none.

    Raises:
        UserError: choice.json is not such a record.
    """
    raw, path = tables.choice, tables.folder / "choice.json"
    if not raw:
        return None
    settings = _settings(tables)
    try:
        names = {str(name) for name in raw["chosen"].values() if name is not None}
        arms = tuple(
            _arm(str(name), str(found["family"]), float(found["clean"]), float(found["attacked"]), name in names,
                 settings.get(str(name)))
            for name, found in raw["arms"].items()
        )  # fmt: skip
        tolerance, score = float(raw["clean_tolerance"]), str(raw["score"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the record of a grid ({type(error).__name__}: {error}); delete it and run `prsl run` again"
        ) from None
    numbers = [tolerance, *(value for arm in arms for value in (arm.clean, arm.attacked))]
    if not arms or not all(map(math.isfinite, numbers)):
        raise UserError(f"{path}: no arm, or a score that is no finite number; delete it and run `prsl run` again")
    base = next((arm for arm in arms if arm.name == tables.baseline), None)
    return GridFindings(score, tolerance, arms, base)


def _settings(tables: TaskTables) -> dict[str, tuple[int | None, float, str | None]]:
    """k, b and space by arm; of arms that the grid makes itself, as the grid names them."""
    try:
        grid = TypeAdapter(GridConfig).validate_python(dict(tables.grid))
    except (ValidationError, ValueError, TypeError):
        grid = None
    found = {arm.name: _setting(arm) for arm in (grid.candidates if grid else ()) if arm.b is not None}
    for name in tables.arms:
        run = tables.runs[name][0]
        found[name] = (run.k if run.has_k else None, run.b, run.space if run.b and run.loss == "prsl" else None)
    return found


def _setting(arm: ArmConfig) -> tuple[int | None, float, str | None]:
    assert arm.b is not None
    penalised = arm.b != 0
    space = arm.space if penalised and arm.loss == "prsl" else None
    return arm.k if penalised and arm.loss != "drsl" else None, arm.b, space


def _arm(
    name: str, family: str, clean: float, attacked: float, chosen: bool,
    setting: tuple[int | None, float, str | None] | None,
) -> GridArm:  # fmt: skip
    k, b, space = setting or (None, None, None)
    return GridArm(name, family, k, b, space, clean, attacked, chosen)


def named_by_grid(tables: TaskTables) -> tuple[str, ...]:
    """Arms of the run that its grid has named; empty without a grid."""
    found = grid_findings(tables)
    names = {arm.name for arm in found.chosen} if found else set()
    return tuple(arm for arm in tables.arms if arm in names)


def grid_section(tables: TaskTables) -> Section | None:
    """All arms of the grid and which were taken; None where the run has no grid."""
    found = grid_findings(tables)
    if found is None:
        return None
    score = metric_name(found.score)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (arm.name, arm.family, arm.k, Ratio(arm.b), arm.space, arm.clean, arm.attacked, "yes" if arm.chosen else "no")
        for arm in found.arms
    )
    columns = ("Arm", "Family", "k", "b", "Space", "Clean", "Attacked", "Taken")
    caption = f"Every arm of the grid on the selection split, mean {score}"
    names = [f"{arm.name} ({arm.family}: {arm.attacked:.3f} attacked, {arm.clean:.3f} clean)" for arm in found.chosen]
    answer = f"{len(found.arms)} arms were looked at on the selection split; taken: {listing(names) or 'none'}."
    if found.baseline is not None:
        answer += f" Cross entropy has {found.baseline.attacked:.3f} attacked and {found.baseline.clean:.3f} clean."
    note = (
        "Of each family the arm with the highest attacked score is taken, among those whose clean score is at most "
        f"{found.clean_tolerance:g} below cross entropy's. One seed and the main attack alone: these numbers choose, "
        "they claim nothing, and the highest of many is too high by chance."
    )
    table = DataTable("grid", caption, columns, rows)
    return Section("grid", "Grid", "How were k and b chosen?", answer, note, (table,), ("grid",))


def grid_sketches(tables: TaskTables) -> list[Sketch]:
    """Attacked score against b, a panel per space and a line per k; empty where no such arms are recorded."""
    found = grid_findings(tables)
    if found is None:
        return []
    spaces = dict.fromkeys(arm.space for arm in found.arms if arm.space is not None)
    return [_sketch(found, space) for space in spaces]


def _sketch(found: GridFindings, space: str) -> Sketch:
    by_k: dict[int, list[GridArm]] = {}
    for arm in found.arms:
        if arm.space == space and arm.k is not None and arm.b is not None and arm.b > 0:
            by_k.setdefault(arm.k, []).append(arm)
    lines = {k: sorted(by_k[k], key=_weight) for k in sorted(by_k)}

    def draw(axes: Axes) -> None:
        for place, (k, arms) in enumerate(lines.items()):
            shade = 0.75 * place / max(1, len(lines) - 1)  # ordered by lightness: needs no sense of colour
            b, attacked = [_weight(arm) for arm in arms], [arm.attacked for arm in arms]
            axes.plot(b, attacked, color=str(shade), label=f"k = {k}", marker=_MARKS[place % len(_MARKS)])
            for arm in arms:
                if arm.chosen:
                    axes.plot([_weight(arm)], [arm.attacked], "o", markersize=11, markerfacecolor="none", color=INK)
        if found.baseline is not None:
            axes.axhline(found.baseline.attacked, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("b")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.12)
        axes.legend(fontsize=7.5)

    told = "; ".join(
        f"k = {k}: " + ", ".join(f"{arm.attacked:.3f} at b {arm.b:g}" for arm in arms) for k, arms in lines.items()
    )
    title = f"Attacked {metric_name(found.score)}, {space}"
    return Sketch(printable(title), printable(f"{title}, on the selection split: {told}."), draw)


def _weight(arm: GridArm) -> float:
    return arm.b or 0.0


def grid_caption(tables: TaskTables) -> str:
    """What the figure shows."""
    score = metric_name(tables.endpoint.score)
    return (
        f"The grid: {score} under the main attack on the selection split against b, for every k. Rings: taken. Dashed: "
        "cross entropy."
    )
