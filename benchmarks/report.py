"""What comes of a race: the CSV, the tables with the targets, and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

CSV = Path(__file__).resolve().parent / "results" / "loss.csv"
# date is UTC; commit ends in + where the sources were changed; level is the kernel's instruction set; huge_pages is
# whether torch asked for them, thp_system whether the system gives them; waited is how many seconds per second threads
# waited for a core.
COMMON = ("date", "machine", "cores", "torch", "python", "prsl", "commit", "level", "huge_pages", "thp_system")
COLUMNS = (
    *COMMON,
    *("dtype", "N", "V", "k", "threads", "rows", "contender", "rounds", "median_ms", "p25_ms", "p75_ms"),
    *("ratio_to_cross_entropy", "ratio_p25", "ratio_p75", "peak_extra_mib", "waited"),
)
REFERENCE = "cross-entropy"


class BenchmarkError(Exception):
    """A failure that the user can mend, in words."""


class NothingToPlot(Exception):
    """The CSV has no row of the standard configuration."""


@dataclass(frozen=True)
class Configuration:
    """One point of the sweep."""

    dtype: str
    tokens: int
    vocab: int
    k: int
    threads: int
    rows: str

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.dtype} {self.tokens} x {self.vocab:,}, k = {self.k}, {threads}, {self.rows} rows"


STANDARD = Configuration("float32", 512, 50_257, 20, 2, "random")


@dataclass(frozen=True)
class Target:
    """The most that ``contender`` may take, as a multiple of ``against``, at the standard configuration."""

    contender: str
    against: str
    limits: Mapping[str, float]  # by dtype


# By whether torch asks for huge pages.
TARGETS = {
    "off": (
        Target("prsl", "cross-entropy", {"float32": 0.30, "bfloat16": 0.30}),
        Target("prsl-inplace", "cross-entropy", {"float32": 0.15, "bfloat16": 0.18}),
        Target("prsl", "naive", {"float32": 0.10, "bfloat16": 0.06}),
        Target("prsl", "naive-compiled", {"float32": 0.15, "bfloat16": 0.15}),
        Target("prsl", "clone", {"float32": 1.0, "bfloat16": 1.2}),
        Target("prsl-inplace", "copy", {"float32": 2.0, "bfloat16": 3.0}),
    ),
    "on": (
        Target("prsl", "cross-entropy", {"float32": 0.5}),
        Target("prsl", "clone", {"float32": 2.0}),
    ),
}


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """25 %, median, 75 %."""
    low, median, high = pd.Series(list(values)).quantile([0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def paired_ratio(rounds: Sequence[Mapping[str, float]], name: str, against: str) -> tuple[float, float, float] | None:
    """Quartiles (25 %, median, 75 %) of the ratio within each round; None where one of the two did not run.

    What slows the machine down for a while slows both, so that their ratio is steadier than either.
    """
    if not rounds or name not in rounds[0] or against not in rounds[0]:
        return None
    return quartiles(times[name] / times[against] for times in rounds)


def summarize(
    common: Mapping[str, Any],
    configuration: Configuration,
    rounds: Sequence[Mapping[str, float]],
    peak_extra: Mapping[str, float],
    order: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of the CSV for one race, one a contender."""
    where = asdict(configuration)
    where["N"], where["V"] = where.pop("tokens"), where.pop("vocab")
    rows = []
    for name in (name for name in order if name in rounds[0]):
        low, median, high = quartiles(times[name] for times in rounds)
        ratio = paired_ratio(rounds, name, REFERENCE) or (None, None, None)
        measured = {"contender": name, "rounds": len(rounds), "median_ms": median, "p25_ms": low, "p75_ms": high}
        measured |= {"ratio_to_cross_entropy": ratio[1], "ratio_p25": ratio[0], "ratio_p75": ratio[2]}
        rows.append({**common, **where, **measured, "peak_extra_mib": peak_extra.get(name)})
    return rows


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise unless rows with these columns can be appended to this file, or it is not there yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    except UnicodeDecodeError:
        raise BenchmarkError(f"--csv {path}: not a text file; name another one") from None
    header = text.partition("\n")[0].strip()
    if text and header != ",".join(columns):
        raise BenchmarkError(
            f"--csv {path}: its columns are not those of this program, so nothing is appended; name another file. "
            f"It has {header[:200] or 'an empty first line'}"
        )
    if text and not text.endswith("\n"):
        raise BenchmarkError(f"--csv {path}: its last line is cut off; complete or remove this line first")


def append(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Append rows to the CSV, with a header if it is new."""
    check_csv(path, columns)
    new = not path.exists() or path.stat().st_size == 0
    output = pd.DataFrame(rows, columns=list(columns))
    output.to_csv(path, mode="a", header=new, index=False, float_format="%.4f", lineterminator="\n")


def read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of the CSV."""
    check_csv(path, columns)
    return pd.read_csv(path)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, the first to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([*([title] if title else []), *("  " + line for line in text)])


def race_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians with quartiles of one race."""
    cells = []
    for row in rows:
        ratio, peak = row["ratio_to_cross_entropy"], row["peak_extra_mib"]
        cells.append(
            (
                row["contender"],
                f"{row['median_ms']:.2f}",
                f"{row['p25_ms']:.2f}-{row['p75_ms']:.2f}",
                "" if ratio is None else f"{ratio:.3f}",
                "" if ratio is None else f"{row['ratio_p25']:.3f}-{row['ratio_p75']:.3f}",
                "" if peak is None else f"{peak:.1f}",
            )
        )
    header = ("contender", "median ms", "quartiles", f"/ {REFERENCE}", "quartiles", "peak extra MiB")
    return table("", header, cells)


JUDGED = ("median", "quartiles", "target", "")


def judge(ratio: tuple[float, float, float], limit: float | None, waited: float | None) -> tuple[str, ...]:
    """The cells under `JUDGED`: a ratio, and whether it is within its target, where it has one."""
    low, median, high = ratio
    cells = (f"{median:.3f}", f"{low:.3f}-{high:.3f}")
    if limit is None:
        return (*cells, "", "")
    verdict = "disturbed" if disturbed(waited) else "reached" if median <= limit else "not reached"
    return (*cells, f"<= {limit:.2f}", verdict)


def disturbed(waited: float | None) -> bool:
    """Whether threads waited for a core for so long that neither times nor ratios say anything."""
    return waited is not None and waited > 0.03


def target_table(
    configuration: Configuration, huge_pages: str, rounds: Sequence[Mapping[str, float]], waited: float | None
) -> str:
    """Ratio against target, reached or not; empty for any but the standard configuration."""
    if replace(configuration, dtype=STANDARD.dtype) != STANDARD:
        return ""
    cells = []
    for target in TARGETS[huge_pages]:
        limit = target.limits.get(configuration.dtype)
        ratio = paired_ratio(rounds, target.contender, target.against)
        if limit is not None and ratio is not None:
            cells.append((f"{target.contender} / {target.against}", *judge(ratio, limit, waited)))
    title = f"targets in {configuration.dtype}, huge pages {huge_pages}:"
    return table(title, ("ratio", *JUDGED), cells) if cells else ""


SMALL_MS = 1  # below which bars have three decimals

# Bars that can be told apart without colour: (label, colour, hatch).
_BARS = {
    "prsl": ("PRSL", "#1b5e9c", ""),
    "prsl-inplace": ("PRSL, in place", "#1b5e9c", ""),
    "prsl-forward": ("PRSL, forward alone", "#8fb8de", ""),
    "native": ("PRSL, native", "#8fb8de", ""),
    "cross-entropy": ("F.cross_entropy", "#f3f3f1", "///"),
    "liger": ("Liger-Kernel's cross entropy", "#f3f3f1", "///"),
    "naive": ("PRSL, naive", "#f3f3f1", "xxx"),
    "naive-compiled": ("PRSL, naive, torch.compile", "#f3f3f1", "\\\\\\"),
    "clone": ("logits.clone()", "#ffffff", ""),
    "copy": ("copy_() into a buffer", "#ffffff", ""),
    "eager": ("PRSL, eager", "#f3f3f1", "..."),
}


def newest(measured: pd.DataFrame) -> list[pd.DataFrame]:
    """The newest race of the standard configuration, for each setting of huge pages and each dtype."""
    same = measured[["N", "V", "k", "threads", "rows"]] == list(asdict(STANDARD).values())[1:]
    chosen = measured[same.all(axis=1) & measured["dtype"].isin(["float32", "bfloat16"])]
    panels = []
    for huge_pages in ("off", "on"):
        for dtype in ("float32", "bfloat16"):
            panel = chosen[(chosen["huge_pages"] == huge_pages) & (chosen["dtype"] == dtype)]
            if len(panel):
                panels.append(panel[panel["date"] == panel["date"].max()])
    return panels


def plot(csv: Path) -> list[Path]:
    """Draw the newest races of the standard configuration as PNG and SVG beside the CSV."""
    if not csv.exists():
        raise NothingToPlot(f"{csv} does not exist")
    panels = newest(read(csv, COLUMNS))
    if not panels:
        raise NothingToPlot(f"{csv} has no row of the standard configuration, {STANDARD}")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "prsl", "hatch.linewidth": 0.6}
    with mpl.rc_context(style):
        height = 0.55 + max(map(len, panels)) * 0.27
        lines = (len(panels) + 1) // 2
        figure = Figure(figsize=(10, 0.75 + lines * height), layout="constrained")
        axes = figure.subplots(lines, min(2, len(panels)), squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=False):
            pages = ", huge pages" if panel.iloc[0]["huge_pages"] == "on" else ""
            draw_race(ax, panel, f"{panel.iloc[0]['dtype']}{pages}", line="clone")
        for ax in list(axes.flat)[len(panels) :]:
            ax.remove()
        last = panels[-1].iloc[-1]
        figure.suptitle(
            f"{STANDARD.tokens} x {STANDARD.vocab:,} logits, k = {STANDARD.k}, forward and backward, "
            f"{STANDARD.threads} threads: milliseconds, medians and quartiles\n"
            f"{last['machine']}, torch {last['torch']}, {last['date'][:10]}",
            fontsize=9.5,
        )
        paths = [csv.with_suffix(".png"), csv.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw_race(ax: Any, panel: pd.DataFrame, title: str, line: str) -> None:
    """One race as horizontal bars with their milliseconds, and the time of the contender ``line`` as a line."""
    race = panel.set_index("contender")
    names = [name for name in _BARS if name in race.index]
    for place, name in enumerate(names):
        row = race.loc[name]
        _, colour, hatch = _BARS[name]
        spread = [[row["median_ms"] - row["p25_ms"]], [row["p75_ms"] - row["median_ms"]]]
        bar = {"color": colour, "edgecolor": "#3a3d42", "linewidth": 0.7, "hatch": hatch}
        ax.barh(place, row["median_ms"], height=0.7, xerr=spread, error_kw={"linewidth": 1, "capsize": 2}, **bar)
        place_of = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        # White behind the number, where the dashed line would run through it.
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        digits = 0 if row["median_ms"] >= 100 else 1 if row["median_ms"] >= SMALL_MS else 3
        number = f"{row['median_ms']:,.{digits}f}"
        ax.annotate(number, (row["p75_ms"], place), bbox=behind, **place_of)
    if line in names:
        ax.axvline(race.loc[line, "median_ms"], color="#3a3d42", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ax.set_yticks(range(len(names)), [_BARS[name][0] for name in names])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
    ax.set_xlabel(f"ms (dashed: one {line}())" if line in names else "ms", fontsize=8.5)
