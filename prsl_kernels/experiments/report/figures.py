"""The figures: each panel once as SVG for the page, and all panels of a figure with a legend as PNG and SVG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from prsl_kernels.experiments.report.analysis import THRESHOLDS, Curve, Findings, Shares
from prsl_kernels.experiments.report.drawing import (
    FAINT,
    FigureBlock,
    Sketch,
    as_panel,
    draw_line,
    house_style,
    round_axis,
    slug,
    write_composite,
)
from prsl_kernels.experiments.report.figures_sceptic import sceptic_sketches
from prsl_kernels.experiments.report.grid import grid_caption, grid_sketches
from prsl_kernels.experiments.report.style import ArmStyle
from prsl_kernels.experiments.report.tables import TaskTables, metric_name
from prsl_kernels.experiments.report.tabulate import when


def draw_figures(findings: Findings, styles: Mapping[str, ArmStyle], folder: Path) -> dict[str, FigureBlock]:
    """Draws a task's figures and writes `folder`/<task>-<figure>.{png,svg}. Figures without data are left out."""
    tables = findings.tables
    attack = tables.main_attack.upper()
    sketches = {
        "rounds": (
            f"Scores against the rounds of {attack}, for every arm (the paper's Fig. 1, 3 and 4). The grey band is the "
            "95 % interval of cross entropy's mean, where the score is a mean over images. Horizontal lines: what is "
            "left when the image is blank, and (dotted) when references are paired at random.",
            [_rounds_sketch(curve, tables, styles) for curve in findings.curves if curve.rounds],
        ),
        "shares": (
            "Share of outputs whose BERTScore F1 is below a threshold, with 95 % Wilson intervals (the paper's Fig. 2 "
            "and 5), and the whole distribution. A lower share is better; a distribution further right is better.",
            [sketch for shares in findings.shares for sketch in _shares_sketches(shares, tables, styles)],
        ),
        "tradeoff": (
            f"Clean score against attacked score ({when(tables)}), both with 95 % intervals of the means over images. "
            "Up is better under attack, right is better without. The axes do not start at 0.",
            [_tradeoff_sketch(findings, styles)],
        ),
        "attack": (
            "What the attacker sees: the objective it maximises, the share of input gradients that are exactly zero, "
            "where an attack would stall and look like robustness, and the norm of the gradient.",
            _attack_sketches(tables, styles),
        ),
        "training": (
            "Fine-tuning: cross entropy on the training batches and on the selection split, the penalty without its "
            "weight, and the norm of the penalty's gradient (with its weight) over that of cross entropy.",
            _training_sketches(tables, styles),
        ),
    }
    blocks = {}
    sketches["grid"] = (grid_caption(tables), grid_sketches(tables))
    sketches |= sceptic_sketches(findings, styles)
    with house_style():
        for key, (caption, drawings) in sketches.items():
            if drawings:
                file = f"{slug(tables.task)}-{key}"
                panels = tuple(as_panel(sketch) for sketch in drawings)
                write_composite(drawings, tables, styles, folder / file, legend=key != "grid")
                blocks[key] = FigureBlock(key, caption, panels, file)
    return blocks


def _rounds_sketch(curve: Curve, tables: TaskTables, styles: Mapping[str, ArmStyle]) -> Sketch:
    def draw(axes: Axes) -> None:
        if curve.band:
            low, high = [end.low for end in curve.band], [end.high for end in curve.band]
            axes.fill_between(curve.rounds, low, high, color=styles[tables.baseline].color, alpha=0.12, linewidth=0)
        for arm in reversed(tables.arms):  # cross entropy last, on top
            draw_line(axes, curve.rounds, curve.values[arm], styles[arm])
        axes.yaxis.set_major_locator(MaxNLocator(5))
        round_axis(axes, curve.rounds)
        axes.margins(y=0.07)
        _floors(axes, curve)

    what = f"{metric_name(curve.metric)}{' (corpus)' if curve.corpus and not curve.band else ''}"
    ends = "; ".join(
        f"{tables.label(arm)} from {curve.values[arm][0]:.3f} to {curve.values[arm][-1]:.3f}" for arm in tables.arms
    )
    return Sketch(what, f"{what} from round {curve.rounds[0]} to round {curve.rounds[-1]}: {ends}.", draw)


def _floors(axes: Axes, curve: Curve) -> None:
    """Lines for the blank image and the random pairs, labelled where the curves are far: at the clean end, below."""
    lines = [(curve.blank, "blank image", (4.0, 2.0)), (curve.random_pair, "random pairs", (1.0, 1.5))]
    for value, _, dashes in lines:
        if value is not None:
            axes.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, dashes), zorder=1)
    known = [(value, text) for value, text, _ in lines if value is not None]
    low, high = axes.get_ylim()
    if len(known) == 2 and abs(known[0][0] - known[1][0]) < 0.09 * (high - low):  # their labels would collide
        known = [(max(known[0][0], known[1][0]), "blank image, random pairs")]
    for value, text in known:
        axes.annotate(text, (0.015, value), xycoords=("axes fraction", "data"), xytext=(0, 2), va="bottom",
                      textcoords="offset points", fontsize=7.5, color=FAINT, zorder=1)  # fmt: skip


def _shares_sketches(shares: Shares, tables: TaskTables, styles: Mapping[str, ArmStyle]) -> list[Sketch]:
    name = metric_name(shares.metric)
    after = when(tables) if shares.at_endpoint else f"after {shares.round} round{'s' if shares.round != 1 else ''}"

    def below(axes: Axes) -> None:
        spread = np.linspace(-0.3, 0.3, len(tables.arms)) if len(tables.arms) > 1 else [0.0]
        for shift, arm in zip(spread, tables.arms, strict=True):
            points = shares.below[arm]
            share = np.array([point.estimate for point in points])
            # Wilson's interval need not contain a share of 0 or 1 to the last bit; a bar has no negative length.
            ends = [
                np.maximum(0, share - [point.low for point in points]),
                np.maximum(0, [point.high for point in points] - share),
            ]
            style = styles[arm]
            axes.errorbar(np.arange(len(points)) + shift, 100 * share, yerr=100 * np.array(ends), color=style.color,
                          marker=style.marker, linestyle="none", elinewidth=1.0)  # fmt: skip
        axes.set_xticks(range(len(THRESHOLDS)), [f"< {bound:.2f}" for bound in THRESHOLDS])
        axes.grid(axis="x", visible=False)
        axes.set_ylim(-3, 103)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))

    def distribution(axes: Axes) -> None:
        for arm in reversed(tables.arms):
            values = shares.scores[arm]
            heights = 100 * np.arange(1, len(values) + 1) / len(values)
            axes.step(values, heights, where="post", color=styles[arm].color, linestyle=styles[arm].linestyle)
        axes.set_ylim(0, 102)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_xlabel(name)
        axes.set_ylabel("outputs at or below")
        axes.xaxis.set_major_locator(MaxNLocator(6))

    lowest = THRESHOLDS[-1]
    told = "; ".join(f"{tables.label(arm)} {shares.below[arm][-1].estimate:.1%}" for arm in tables.arms)
    sketches = [Sketch(f"Below a threshold, {after}", f"Share below {lowest} {after}: {told}.", below)]
    if shares.at_endpoint:
        medians = "; ".join(f"{tables.label(arm)} {np.median(shares.scores[arm]):.3f}" for arm in tables.arms)
        sketches.append(Sketch(f"Distribution, {after}", f"Median {name} {after}: {medians}.", distribution))
    return sketches


def _tradeoff_sketch(findings: Findings, styles: Mapping[str, ArmStyle]) -> Sketch:
    tables = findings.tables

    def draw(axes: Axes) -> None:
        for arm, (clean, attacked) in findings.levels.items():
            style = styles[arm]
            axes.errorbar(
                [clean.estimate], [attacked.estimate],
                xerr=[[clean.estimate - clean.low], [clean.high - clean.estimate]],
                yerr=[[attacked.estimate - attacked.low], [attacked.high - attacked.estimate]],
                color=style.color, marker=style.marker, markersize=7, elinewidth=0.9, alpha=0.95,
            )  # fmt: skip
        axes.set_xlabel("clean")
        axes.set_ylabel(when(tables))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    told = "; ".join(
        f"{tables.label(arm)} {clean.estimate:.3f} and {attacked.estimate:.3f}"
        for arm, (clean, attacked) in findings.levels.items()
    )
    name = metric_name(tables.endpoint.score)
    return Sketch(f"{name}, clean against attacked", f"{name} clean, and {when(tables)}: {told}.", draw)


def _attack_sketches(tables: TaskTables, styles: Mapping[str, ArmStyle]) -> list[Sketch]:
    rows = tables.outputs[tables.outputs["attack"] == tables.main_attack]
    wanted = {
        "objective_value": "Attack's objective (mean over images)",
        "zero_gradient_share": "Share of input gradients exactly zero",
        "gradient_norm": "Norm of the input gradient (L2)",
    }
    sketches = []
    for column, title in wanted.items():
        values = rows.dropna(subset=[column])
        values = values[np.isfinite(values[column].astype(float))]
        if values.empty:
            continue
        means = values.groupby(["round", "arm"])[column].mean().unstack("arm")
        sketches.append(_by_round(means, title, tables, styles, percent=column == "zero_gradient_share"))
    return sketches


def _by_round(
    means: pd.DataFrame, title: str, tables: TaskTables, styles: Mapping[str, ArmStyle], *, percent: bool
) -> Sketch:
    rounds = [int(number) for number in means.index]

    def draw(axes: Axes) -> None:
        for arm in reversed([arm for arm in tables.arms if arm in means]):
            draw_line(axes, rounds, list(means[arm] * (100 if percent else 1)), styles[arm])
        round_axis(axes, rounds)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=0)
        if percent:
            top = max(1.0, float(means.to_numpy().max()) * 115)
            axes.set_ylim(0, top)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))

    form = "{:.2%}" if percent else "{:.3f}"
    told = "; ".join(f"{tables.label(arm)} {form.format(means[arm].iloc[-1])}" for arm in tables.arms if arm in means)
    return Sketch(title, f"{title} at round {rounds[-1]}: {told}.", draw)


def _training_sketches(tables: TaskTables, styles: Mapping[str, ArmStyle]) -> list[Sketch]:
    wanted = {
        "cross_entropy": "Cross entropy, training batches",
        "eval_cross_entropy": "Cross entropy, selection split",
        "penalty": "Penalty d, without b",
        "gradient_ratio": "Gradient ratio, penalty over CE",
    }
    sketches = []
    for column, title in wanted.items():
        series = {}
        for arm in tables.arms:
            frames = [run.training for run in tables.runs[arm] if {"step", column} <= set(run.training.columns)]
            points = pd.concat(frames)[["step", column]].astype(float).dropna() if frames else pd.DataFrame()
            if len(points):
                series[arm] = points.groupby("step")[column].mean()
        if column == "gradient_ratio":  # on a logarithmic axis zero has no place: cross entropy has no penalty
            series = {arm: line[line > 0] for arm, line in series.items() if (line > 0).any()}
        if series:
            sketches.append(_training_sketch(series, title, tables, styles, logarithmic=column == "gradient_ratio"))
    return sketches


def _training_sketch(
    series: Mapping[str, pd.Series],
    title: str,
    tables: TaskTables,
    styles: Mapping[str, ArmStyle],
    *,
    logarithmic: bool,
) -> Sketch:
    def draw(axes: Axes) -> None:
        for arm in reversed(list(series)):
            line = series[arm]
            draw_line(axes, list(line.index), list(line), styles[arm], markevery=max(1, len(line) // 5))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))

    told = "; ".join(f"{tables.label(arm)} {line.iloc[-1]:.3g}" for arm, line in series.items())
    return Sketch(title, f"{title}, last value: {told}.", draw)
