"""What comes of a GPU check: one JSON file that is whole at any time, and from it a CSV, tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prsl_kernels.experiments.files import atomic_file, write_json

from . import report
from .gpu_parts import Record

FOLDER = report.CSV.parent
WHERE = ("sweep", "dtype", "tokens", "vocab", "k", "rounds")
MEASURED = ("contender", "phase", "median_ms", "p25_ms", "p75_ms", "wall_ms", "bytes", "gb_per_s", "share_of_copy")
RATIOS = ("ratio_to_cross-entropy", "ratio_to_liger", "ratio_to_copy")
COLUMNS = ("dry_run", "date", "gpu", "torch", "triton", "commit", *WHERE, *MEASURED, *RATIOS, "peak_extra_mib")
DRY = "DRY RUN, NO GPU: "


def points(document: Record) -> list[Record]:
    """The races that have times."""
    return [record for record in document["sections"]["times"].get("records", []) if record.get("results")]


def write(document: Record, folder: Path) -> None:
    """The JSON and the CSV, each replaced as a whole."""
    write_json(folder / "gpu.json", document)
    common = {"dry_run": document["dry_run"], **document["environment"]}
    rows = [{**common, **point, **result} for point in points(document) for result in point["results"]]
    with atomic_file(folder / "gpu.csv") as path:
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        table.to_csv(path, index=False, float_format="%.5g", lineterminator="\n")


def race_table(document: Record, point: Record) -> str:
    """Times, bandwidth and ratios of one race."""
    rows = []
    for result in point["results"]:
        ratios = [f"{result[name]:.3f}" if result.get(name) is not None else "" for name in RATIOS]
        peak, wall = result.get("peak_extra_mib"), result.get("wall_ms")
        rows.append(
            (
                result["contender"],
                "" if result["phase"] == "copy" else result["phase"],
                f"{result['median_ms']:.4f}",
                f"{result['p25_ms']:.4f}-{result['p75_ms']:.4f}",
                "" if wall is None else f"{wall:.4f}",
                f"{result['bytes'] / 1e6:,.1f}",
                f"{result['gb_per_s']:,.1f}",
                f"{result['share_of_copy']:.1%}",
                *ratios,
                "" if peak is None else f"{peak:,.1f}",
            )
        )
    header: tuple[str, ...] = ("contender", "phase", "ms", "quartiles", "wall ms", "MB", "GB/s", "of copy's")
    header += ("/ cross entropy", "/ Liger", "/ copy", "peak extra MiB")
    title = f"{DRY if document['dry_run'] else ''}{point['point']}, {point['rounds']} rounds:"
    return report.table(title, header, rows)


def summary(document: Record) -> str:
    """The main races, who was left out of them, and how each section ended."""
    main = [point for point in points(document) if point["sweep"] == "main"]
    lines = [race_table(document, point) for point in main]
    left_out: dict[str, str] = {}
    for point in document["sections"]["times"].get("records", []):
        left_out |= point.get("left_out", {})
    lines += [f"left out: {name} ({reason})" for name, reason in left_out.items()]
    rows = []
    for name, section in document["sections"].items():
        verdict = {True: "passed", False: "FAILED", None: "-"}[section.get("passed")]
        seconds = f"{section.get('seconds', 0):.0f} s"
        rows.append((name, section["status"], verdict, seconds, section.get("reason", "")))
    lines.append(report.table("sections:", ("section", "status", "verdict", "took", "why"), rows))
    failed = [
        f"FAILED: {name}: {record.get('check') or record.get('point') or record.get('what')}: {record.get('reason')}"
        for name, section in document["sections"].items()
        for record in section.get("records", [])
        if record.get("passed") is False
    ]
    failed += [
        f"FAILED: {name}" for name in (document["sections"]["tests"].get("counts") or {}).get("names_of_failed", [])
    ]
    return "\n".join(lines + failed)


# ---- plots -----------------------------------------------------------------------------------------------------------

_LINES = {
    "prsl": ("PRSL", "#1b5e9c", "-", "o"),
    "prsl-inplace": ("PRSL, in place", "#1b5e9c", "--", "s"),
    "native": ("PRSL, native", "#8fb8de", "-", "v"),
    "cross-entropy": ("F.cross_entropy", "#7a7d82", "-", "^"),
    "liger": ("Liger-Kernel's cross entropy", "#b3541e", "-", "D"),
}
_AXES = {"vocab": "classes V, with N x V constant", "k": "k", "tokens": "rows of 262,144"}


def plot(document: Record, folder: Path) -> list[Path]:
    """Bars of the main races, and lines along the sweeps, each as PNG and SVG; what has no times is not drawn."""
    import matplotlib as mpl

    style = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "prsl", "hatch.linewidth": 0.6}
    paths = []
    with mpl.rc_context(style):
        for name, draw in (("gpu-main", _main_figure), ("gpu-sweeps", _sweep_figure)):
            figure = draw(document)
            if figure is None:
                continue
            for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
                with atomic_file(folder / f"{name}{suffix}") as path:
                    figure.savefig(path, **options)
                paths.append(folder / f"{name}{suffix}")
    return paths


def _title(document: Record, what: str) -> str:
    about = document["environment"]
    dry = DRY if document["dry_run"] else ""
    return f"{dry}{what}\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date'][:10]}"


def _main_figure(document: Record) -> Any:
    from matplotlib.figure import Figure

    races = [point for point in points(document) if point["sweep"] == "main"]
    if not races:
        return None
    tallest = max(len({result["contender"] for result in point["results"]}) for point in races)
    figure = Figure(figsize=(4.2 * len(races), 1.3 + 0.27 * tallest), layout="constrained")
    for ax, point in zip(figure.subplots(1, len(races), squeeze=False)[0], races, strict=True):
        panel = pd.DataFrame([result for result in point["results"] if result["phase"] in ("both", "copy")])
        report.draw_race(ax, panel, f"{point['dtype']}, {point['tokens']:,} x {point['vocab']:,}", line="copy")
    figure.suptitle(
        _title(document, "Forward and backward on the GPU, milliseconds, medians and quartiles"), fontsize=9.5
    )
    return figure


def _sweep_figure(document: Record) -> Any:
    from matplotlib.figure import Figure

    sweeps = {"vocab": "vocab", "k": "k", "rows": "tokens"}
    by_sweep: Mapping[str, Sequence[Record]] = {
        sweep: [point for point in points(document) if point["sweep"] == sweep] for sweep in sweeps
    }
    drawn = {sweep: races for sweep, races in by_sweep.items() if races}
    if not drawn:
        return None
    figure = Figure(figsize=(4.2 * len(drawn), 3.6), layout="constrained")
    for ax, (sweep, races) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        axis = sweeps[sweep]
        for name, (label, colour, line, marker) in _LINES.items():
            at = [
                (race[axis], r)
                for race in races
                for r in race["results"]
                if (r["contender"], r["phase"]) == (name, "both")
            ]
            at = sorted((x, r["ratio_to_copy"]) for x, r in at)
            if at:
                style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}
                ax.plot(*zip(*at, strict=True), label=label, **style)
        ax.set_xscale("log")
        ax.set_xticks(
            sorted({race[axis] for race in races}), [f"{x:,}" for x in sorted({race[axis] for race in races})]
        )
        ax.minorticks_off()
        ax.tick_params(axis="x", rotation=45)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", linewidth=0.4)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel(_AXES[axis])
        ax.set_ylabel("time / a copy of the logits")
    ax.legend(fontsize=8)
    figure.suptitle(_title(document, "Forward and backward in bfloat16, as a multiple of one copy_()"), fontsize=9.5)
    return figure
