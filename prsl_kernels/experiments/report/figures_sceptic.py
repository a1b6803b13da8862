"""The figures behind a sceptic's questions: attacks, convergence, budgets, transfer, white box, gradients, surfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from prsl_kernels.experiments.report.analysis import Findings
from prsl_kernels.experiments.report.drawing import FAINT, INK, Sketch, draw_line, round_axis
from prsl_kernels.experiments.report.scepticism import (
    Convergence,
    EpsSweep,
    Floor,
    MaskingTest,
    Scepticism,
    SeedRow,
    Surface,
    Transfer,
)
from prsl_kernels.experiments.report.statistics import Interval, signed
from prsl_kernels.experiments.report.style import ArmStyle
from prsl_kernels.experiments.report.tables import TaskTables, metric_name
from prsl_kernels.experiments.report.text import printable

Styles = Mapping[str, ArmStyle]

_ROW = 0.24  # inches of a row in a plot of dots
_WIDE = 6.6  # inches
# One hue from paper to ink: ordered by lightness, so that it prints and needs no sense of colour.
_HEAT = LinearSegmentedColormap.from_list("heat", ["#fbfbf8", "#cfdfe9", "#7fabc9", "#2d6f9e", "#0b3552"])
_PALE = LinearSegmentedColormap.from_list("pale", ["#fbfbf8", "#8fb6d0"])  # behind lines and their numbers


def sceptic_sketches(findings: Findings, styles: Styles) -> dict[str, tuple[str, list[Sketch]]]:
    """Figure name -> (caption, its panels); no panels where the run has no such rows."""
    found, tables = findings.scepticism, findings.tables
    score = metric_name(tables.endpoint.score)
    sweep = [] if found.sweep is None else _sweep_sketches(found.sweep, found.floors, tables, styles)
    transfer = [] if found.masking.transfer is None else [_matrix(found.masking.transfer, tables)]
    tests = _masking_tests(found)
    return {
        "ensemble": (
            f"{score} that each attack leaves, at its last round, with 95 % intervals of the mean over its images. "
            "The first row is the worst case: for each image the lowest score over the attacks of the ensemble.",
            _ensemble_sketches(found, tables, styles),
        ),
        "convergence": (
            f"{score} against the rounds of the main attack, with 95 % intervals, and the difference from cross "
            "entropy at the same round. A converged attack ends flat.",
            _convergence_sketches(found.convergence, tables, styles),
        ),
        "eps": (
            f"{score} against the budget eps (0: clean), and the difference from cross entropy; 95 % intervals. "
            "Dotted: the score of references that were paired at random.",
            sweep,
        ),
        "transfer": (
            f"{score} of the arm that is asked (row) on images that were made on another (column). On the diagonal "
            "stands the white box of the same attack. Lower and darker is a stronger attack.",
            transfer,
        ),
        "white-box": (
            "Score under images from elsewhere (filled: made on another arm; open: by a query attack) minus the score "
            "under the white box, on the same images, with 95 % intervals. Left of zero, an attack that knows less "
            "does more: evidence of masked gradients.",
            [_tests_sketch(tests, tables, styles)] if tests else [],
        ),
        "surface": (
            "Mean of the attack's objective over a square around the clean image (the cross), in units of eps: across, "
            "along the sign of the gradient; upwards, along random signs. All panels share one scale and one spacing "
            "of contours. Rugged or flat pictures would speak for masked gradients.",
            _surface_sketches(found.masking.surfaces, tables),
        ),
        "seeds": (
            "Difference from cross entropy at the primary endpoint under each training seed, and (filled) their mean.",
            _seed_sketches(found.seeds, tables, styles),
        ),
    }


def _bars(axes: Axes, x: Sequence[float], y: Sequence[float], found: Sequence[Interval], style: ArmStyle) -> None:
    """Horizontal intervals at heights `y`."""
    ends = [[a.estimate - a.low for a in found], [a.high - a.estimate for a in found]]
    axes.errorbar(x, y, xerr=np.maximum(0, ends), color=style.color, marker=style.marker, linestyle="none",
                  elinewidth=1.0)  # fmt: skip


def _spread(count: int) -> list[float]:
    return list(np.linspace(-0.28, 0.28, count)) if count > 1 else [0.0]


def _cut(name: str, longest: int = 34) -> str:
    name = " ".join(printable(name).split())
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _named_rows(axes: Axes, names: Sequence[str]) -> None:
    """A row per name, the first on top."""
    axes.set_yticks(range(len(names)), [_cut(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for edge in np.arange(0.5, len(names) - 1):
        axes.axhline(edge, color="#e3e4e1", linewidth=0.6, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _height(rows: int, series: int) -> float:
    """Inches of a plot with that many rows of that many markers each."""
    return 0.7 + rows * max(_ROW, 0.085 * series + 0.08)


def _zero_line(axes: Axes) -> None:
    axes.axvline(0, color=FAINT, linewidth=0.9, zorder=1)


def _ensemble_sketches(found: Scepticism, tables: TaskTables, styles: Styles) -> list[Sketch]:
    attacks = [attack for attack in found.attacks if attack.levels]
    if sum(attack.role not in ("worst", "control") for attack in attacks) < 2:
        return []

    def draw(axes: Axes) -> None:
        for shift, arm in zip(_spread(len(tables.arms)), tables.arms, strict=True):
            rows = [(i + shift, attack.levels[arm]) for i, attack in enumerate(attacks) if arm in attack.levels]
            _bars(axes, [level.estimate for _, level in rows], [y for y, _ in rows], [x for _, x in rows], styles[arm])
        _named_rows(axes, [attack.attack if attack.role != "worst" else "worst case" for attack in attacks])
        axes.set_xlabel(metric_name(tables.endpoint.score))

    baseline = "; ".join(
        f"{attack.attack} {attack.levels[tables.baseline].estimate:.3f}"
        for attack in attacks if tables.baseline in attack.levels
    )  # fmt: skip
    size = (_WIDE, _height(len(attacks), len(tables.arms)))
    return [Sketch("Score under every attack", f"Cross entropy under each attack: {baseline}.", draw, size, 1.75)]


def _curves(
    title: str, x: Sequence[float], series: Mapping[str, Sequence[Interval]], tables: TaskTables, styles: Styles,
    label: str, set_axis: Callable[[Axes], None], *, zero: bool = False,
) -> Sketch:  # fmt: skip
    """A line with error bars per arm over `x`, whose axis `set_axis` makes; `zero` marks where there is no effect."""
    arms = [arm for arm in tables.arms if arm in series]

    def draw(axes: Axes) -> None:
        if zero:
            axes.axhline(0, color=FAINT, linewidth=0.9, zorder=1)
        for arm in reversed(arms):
            points, style = series[arm], styles[arm]
            middle = [point.estimate for point in points]
            ends = [[p.estimate - p.low for p in points], [p.high - p.estimate for p in points]]
            axes.errorbar(x, middle, yerr=np.maximum(0, ends), color=style.color, linestyle="none", elinewidth=0.8,
                          alpha=0.6)  # fmt: skip
            draw_line(axes, x, middle, style)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel(label)
        set_axis(axes)

    told = "; ".join(
        f"{tables.label(arm)} from {series[arm][0].estimate:.3f} to {series[arm][-1].estimate:.3f}" for arm in arms
    )
    return Sketch(title, f"{title}: {told}.", draw)


def _convergence_sketches(found: Convergence, tables: TaskTables, styles: Styles) -> list[Sketch]:
    rounds = found.curve.rounds
    if len(rounds) < 2:
        return []
    score = metric_name(tables.endpoint.score)

    def axis(axes: Axes) -> None:
        round_axis(axes, rounds)

    sketches = [_curves(f"{score} against rounds", rounds, found.curve.levels, tables, styles, score, axis)]
    if found.curve.effects:
        title = "Arm minus cross entropy"
        sketches.append(_curves(title, rounds, found.curve.effects, tables, styles, "difference", axis, zero=True))
    return sketches


def _sweep_sketches(found: EpsSweep, floors: Sequence[Floor], tables: TaskTables, styles: Styles) -> list[Sketch]:
    budgets = [255 * point.eps for point in found.points]
    score = metric_name(tables.endpoint.score)

    def axis(axes: Axes) -> None:
        positive = [budget for budget in budgets if budget > 0]
        axes.set_xscale("symlog", linthresh=min(positive, default=1.0), linscale=0.5)
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{budget:g}" for budget in budgets]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("eps, levels of 255")

    def levels_axis(axes: Axes) -> None:
        axis(axes)
        for floor in floors[:1]:
            axes.axhline(floor.unrelated, color=FAINT, linewidth=0.9, linestyle=(0, (1.0, 1.5)), zorder=1)
            axes.annotate("unrelated texts", (0.015, floor.unrelated), xycoords=("axes fraction", "data"), va="bottom",
                          xytext=(0, 2), textcoords="offset points", fontsize=7.5, color=FAINT, zorder=1)  # fmt: skip

    sketches = [_curves(f"{score} against the budget", budgets, found.levels, tables, styles, score, levels_axis)]
    if found.effects:
        title = "Arm minus cross entropy"
        sketches.append(_curves(title, budgets, found.effects, tables, styles, "difference", axis, zero=True))
    return sketches


def _matrix(found: Transfer, tables: TaskTables) -> Sketch:
    arms = [arm for arm in tables.arms if any(arm in pair for pair in found.matrix)]
    means = np.array([
        [found.matrix[source, target].estimate if (source, target) in found.matrix else np.nan for source in arms]
        for target in arms
    ])  # fmt: skip

    def draw(axes: Axes) -> None:
        # Darker is a lower score: a stronger attack.
        axes.imshow(means, cmap=_HEAT.reversed(), aspect="auto")
        low, high = np.nanmin(means), np.nanmax(means)
        for row, column in np.ndindex(means.shape):
            if np.isfinite(means[row, column]):
                dark = means[row, column] < low + 0.45 * (high - low)
                weight = "bold" if row == column else "normal"
                axes.text(column, row, f"{means[row, column]:.3f}", ha="center", va="center", fontsize=8.5,
                          color="#ffffff" if dark else INK, fontweight=weight)  # fmt: skip
        names = [_cut(tables.label(arm), 30) for arm in arms]
        axes.set_xticks(range(len(arms)), names, rotation=25, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(arms)), names)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("made on")
        axes.set_ylabel("shown to")

    lowest = min(found.matrix, key=lambda pair: found.matrix[pair].estimate)
    told = (
        f"The lowest mean is {found.matrix[lowest].estimate:.3f}, of {tables.label(lowest[1])} on images made on "
        f"{tables.label(lowest[0])}."
    )
    longest = max(len(_cut(tables.label(arm), 30)) for arm in arms)
    left, bottom = 0.45 + 0.066 * longest, 0.45 + 0.03 * longest  # the names stand beside it, and slanted below it
    size = (left + 0.3 + 0.95 * len(arms), bottom + 0.2 + 0.36 * len(arms))
    return Sketch(f"Transfer of {found.attack}", told, draw, size, left, bottom)


def _masking_tests(found: Scepticism) -> list[MaskingTest]:
    transfer = [] if found.masking.transfer is None else list(found.masking.transfer.tests.values())
    return [*transfer, *(test for query in found.masking.queries for test in query.tests.values())]


def _tests_sketch(tests: Sequence[MaskingTest], tables: TaskTables, styles: Styles) -> Sketch:
    order = [test for arm in tables.arms for test in tests if test.arm == arm]
    names = [f"{test.arm} ← {test.source}" for test in order]  # the recipe's names: labels would be too long

    def draw(axes: Axes) -> None:
        _zero_line(axes)
        for row, test in enumerate(order):
            style = styles[test.arm]
            found = test.difference
            ends = [[found.estimate - found.low], [found.high - found.estimate]]
            axes.errorbar(
                [found.estimate], [row], xerr=np.maximum(0, ends),
                color=style.color, marker=style.marker, elinewidth=1.0,
                markerfacecolor="#ffffff" if test.kind == "query" else style.color, markeredgecolor=style.color,
            )  # fmt: skip
        _named_rows(axes, names)
        axes.set_xlabel(f"{metric_name(tables.endpoint.score)}, minus the white box's")

    worst = min(order, key=lambda test: test.difference.low)
    told = f"The lowest lower end is {worst.difference.text}, of {tables.label(worst.arm)} asked by {worst.source}."
    return Sketch("Against the white box", told, draw, (_WIDE, _height(len(order), 1)), 2.35)


def _surface_sketches(surfaces: Sequence[Surface], tables: TaskTables) -> list[Sketch]:
    if not surfaces:
        return []
    everything = np.concatenate([np.asarray(surface.values).ravel() for surface in surfaces])
    everything = everything[np.isfinite(everything)]
    low, high = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
    contours = np.linspace(low, high if high > low else low + 1e-9, 9)[1:-1]

    def sketch(surface: Surface) -> Sketch:
        values = np.asarray(surface.values, dtype=float)

        def draw(axes: Axes) -> None:
            axes.pcolormesh(surface.a, surface.b, values, cmap=_PALE, vmin=low, vmax=high, shading="nearest",
                            linewidth=0.4, edgecolors="face")  # fmt: skip
            if np.isfinite(values).all() and values.max() > values.min():
                lines = axes.contour(surface.a, surface.b, values, levels=contours, colors=INK, linewidths=0.6,
                                     linestyles="solid")  # fmt: skip
                axes.clabel(lines, fontsize=7, fmt="%.3g")
            axes.plot([0], [0], marker="+", color=INK, markersize=8, markeredgewidth=1.2)
            axes.grid(visible=False)
            axes.set_xlabel("along the gradient's sign, eps")
            axes.set_ylabel("along random signs, eps")

        told = f"Rise along the gradient's sign {surface.along_gradient.text}, along random signs "
        return Sketch(tables.label(surface.arm), f"{told}{surface.along_random.text}.", draw)

    return [sketch(surface) for surface in surfaces]


def _seed_sketches(seeds: Sequence[SeedRow], tables: TaskTables, styles: Styles) -> list[Sketch]:
    numbers = sorted({row.seed for row in seeds})
    effects = {
        arm: {row.seed: row.effect for row in seeds if row.arm == arm and row.effect is not None}
        for arm in tables.others
    }
    effects = {arm: by_seed for arm, by_seed in effects.items() if by_seed}
    if len(numbers) < 2 or not effects:
        return []

    def draw(axes: Axes) -> None:
        _zero_line(axes)
        for row, (arm, by_seed) in enumerate(effects.items()):
            style = styles[arm]
            axes.plot(list(by_seed.values()), [row] * len(by_seed), linestyle="none", marker=style.marker,
                      markerfacecolor="none", markeredgecolor=style.color, markersize=6)  # fmt: skip
            axes.plot([float(np.mean(list(by_seed.values())))], [row], linestyle="none", marker=style.marker,
                      color=style.color, markersize=6)  # fmt: skip
        _named_rows(axes, [tables.label(arm) for arm in effects])
        axes.set_xlabel(f"{metric_name(tables.endpoint.score)}, arm minus cross entropy")

    told = "; ".join(
        f"{tables.label(arm)} {', '.join(signed(value) for value in by_seed.values())}"
        for arm, by_seed in effects.items()
    )
    size = (_WIDE, _height(len(effects), 2))
    return [Sketch("Effect under each seed", f"By seed: {told}.", draw, size, 2.0)]
