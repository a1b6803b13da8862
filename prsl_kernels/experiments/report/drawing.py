"""How every figure is drawn: the house style, a panel as SVG for the page, and all of them with a legend as files."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from prsl_kernels.experiments.files import atomic_file
from prsl_kernels.experiments.report.style import ArmStyle
from prsl_kernels.experiments.report.tables import TaskTables
from prsl_kernels.experiments.report.text import printable

Draw = Callable[[Axes], None]

INK, FAINT, GRID = "#16181d", "#6b7078", "#e3e4e1"
PANEL = (3.3, 2.5)  # inches
MARGINS = (0.62, 0.16, 0.5, 0.34)  # inches: left, right, bottom, top
_STYLE = {
    "font.family": "sans-serif",
    # Whatever the reader's machine has; Matplotlib measures with the first it finds, so the widest comes last.
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9, "axes.labelcolor": FAINT, "axes.edgecolor": "#9a9ea5", "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": "#9a9ea5", "ytick.color": "#9a9ea5", "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "lines.linewidth": 1.5, "lines.markersize": 4.5, "lines.markeredgewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar sign in somebody's arm name is a dollar sign
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "prsl",  # the same data give the same file
    "savefig.dpi": 150,
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One picture on the page: a heading, its SVG, words for those who cannot see it, and its size in pixels."""

    title: str
    svg: bytes
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class FigureBlock:
    """Panels that share a caption, and the name of the file (without suffix) that holds them all."""

    key: str
    caption: str
    panels: tuple[Panel, ...]
    file: str


@dataclass(frozen=True)
class Sketch:
    """A panel before it is drawn; `size` is its width and height in inches without the title."""

    title: str
    alt: str
    draw: Draw
    size: tuple[float, float] = PANEL
    left: float = MARGINS[0]  # inches for the labels of the vertical axis
    bottom: float = MARGINS[2]  # and of the horizontal one


def slug(name: str) -> str:
    """`name` as a file name or an anchor: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unnamed"


@contextmanager
def house_style() -> Iterator[None]:
    """The look of all figures; Matplotlib's remarks on missing fonts are not for the reader."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mpl.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield
    finally:
        logger.setLevel(level)


def as_panel(sketch: Sketch) -> Panel:
    """One drawing as the page embeds it: an SVG of its own, with its size in hundredths of an inch."""
    width, height = (round(100 * side) for side in sketch.size)
    return Panel(sketch.title, _svg(sketch), sketch.alt, width, height)


def _svg(sketch: Sketch) -> bytes:
    figure = Figure(figsize=sketch.size)
    right, (width, height) = MARGINS[1], sketch.size
    inner = (width - sketch.left - right, height - sketch.bottom - 0.1)
    axes = figure.add_axes((sketch.left / width, sketch.bottom / height, inner[0] / width, inner[1] / height))
    sketch.draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()


def write_composite(
    drawings: Sequence[Sketch], tables: TaskTables, styles: Mapping[str, ArmStyle], path: Path, *, legend: bool = True
) -> None:
    """Writes `path`.png and .svg: all panels, and below them the arms, where the panels show arms."""
    columns = 2 if len(drawings) == 4 else min(3, len(drawings))
    rows = math.ceil(len(drawings) / columns)
    panel_width, panel_height = (max(sketch.size[i] for sketch in drawings) for i in (0, 1))
    width, row_height = columns * panel_width, panel_height + MARGINS[3]
    legend_columns = max(1, int(width / 2.2))
    below = 0.25 + 0.18 * math.ceil(len(tables.arms) / legend_columns) if legend else 0.0
    height = rows * row_height + below
    figure = Figure(figsize=(width, height))
    for number, sketch in enumerate(drawings):
        row, column = divmod(number, columns)
        right, bottom, top = MARGINS[1], sketch.bottom, MARGINS[3]
        axes = figure.add_axes(
            (
                (column * panel_width + sketch.left) / width,
                (below + (rows - 1 - row) * row_height + bottom) / height,
                (panel_width - sketch.left - right) / width,
                (row_height - bottom - top) / height,
            )
        )
        sketch.draw(axes)
        axes.set_title(printable(sketch.title), color=INK)
    if legend:
        handles = [_handle(printable(tables.label(arm)), styles[arm]) for arm in tables.arms]
        figure.legend(handles=handles, loc="lower center", ncols=legend_columns)
    for suffix in ("png", "svg"):
        target = path.parent / f"{path.name}.{suffix}"
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        with atomic_file(target) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)


def _handle(label: str, style: ArmStyle) -> Line2D:
    return Line2D([], [], label=label, color=style.color, marker=style.marker, linestyle=style.linestyle)


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], style: ArmStyle, *, markevery: int = 1) -> None:
    """One arm's curve, told from the others by marker and dashes as well as by colour."""
    axes.plot(x, y, color=style.color, marker=style.marker, linestyle=style.linestyle, markevery=markevery)


def round_axis(axes: Axes, rounds: Sequence[int]) -> None:
    """Rounds on a scale that is linear up to 1 and logarithmic above: the first rounds do the most."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator([float(number) for number in rounds]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(number) for number in rounds]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("attack round (0: clean)")
