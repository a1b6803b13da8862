"""The controls of a task: what each expects, what was found, and for which arms it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from prsl_kernels.experiments.report.scepticism import ZERO_SHARE
from prsl_kernels.experiments.report.statistics import Interval, paired_bootstrap
from prsl_kernels.experiments.report.sweeps import attack_table
from prsl_kernels.experiments.report.tables import TaskTables
from prsl_kernels.experiments.report.text import listing, percent, pixels


@dataclass(frozen=True)
class Check:
    """A control: what was expected, what was found; `passed` None where the run does not hold it."""

    name: str
    passed: bool | None
    found: str
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # attack minus the control, by arm; may be empty
    failing: tuple[str, ...] = ()  # arms for which it failed; never empty where `passed` is False

    def against(self, arm: str, baseline: str) -> bool:
        """Whether it speaks against a comparison of the two: what another arm does is no matter to them."""
        return self.passed is False and bool({arm, baseline} & set(self.failing))


def run_checks(tables: TaskTables) -> list[Check]:
    """All controls of a task, in a fixed order."""
    return [_zero_step(tables), _budget(tables), *_beats(tables), _finite_gradients(tables)]


def _zero_step(tables: TaskTables) -> Check:
    name = "A step of 0 changes nothing"
    rows = tables.outputs
    control = rows[rows["attack"] == "zero-step"]
    if control.empty:
        return Check(name, None, "the run has no zero-step control")
    keys = ["arm", "seed", "id"]
    clean = rows[(rows["attack"] == tables.main_attack) & (rows["round"] == 0)][[*keys, "text"]]
    pairs = control.merge(clean, on=keys, suffixes=("", "_clean"))
    differs = pairs["text"] != pairs["text_clean"]
    changed = int(differs.sum())
    moved = float(control["linf"].max())
    found = (
        f"{changed:,} of {len(pairs):,} outputs differ from those of the clean images; largest change of a pixel "
        f"{pixels(moved)}"
    )
    lost = control["arm"].value_counts() != pairs["arm"].value_counts().reindex(control["arm"].unique(), fill_value=0)
    bad = {*pairs.loc[differs, "arm"], *control.loc[control["linf"] != 0, "arm"], *lost.index[lost]}
    return _check(tables, name, bad, found)


def _check(
    tables: TaskTables, name: str, bad: set[str], found: str, intervals: Mapping[str, Interval] | None = None
) -> Check:
    failing = tuple(arm for arm in tables.arms if arm in bad)
    told = f"; not so for {listing([tables.label(arm) for arm in failing])}" if failing else ""
    return Check(name, not failing, found + told, intervals or {}, failing)


def _budget(tables: TaskTables) -> Check:
    """Every image of every attack against its own eps, in its own norm. Noise and JPEG have no budget to keep to."""
    rows = tables.outputs
    bound = (rows["role"] != "control") | rows["attack"].isin(["random-sign", "zero-step"])
    rows = rows[bound & (rows["round"] > 0) & rows["eps"].notna()]
    used = rows["linf"].where(rows["norm"] != "l2", rows["l2"]).astype(float)
    outside = rows.loc[used - rows["eps"] * (1 + 1e-6) > 1e-6, "arm"]
    largest, allowed = float(tables.main_rows["linf"].max()), tables.main_budget()
    found = f"largest change of a pixel {pixels(largest)}, allowed {pixels(allowed)}, after rounding to 8 bits"
    others = int(rows["attack"].nunique()) - 1
    found += f"; {others} other attack{'s' if others > 1 else ''} held to their own" if others > 0 else ""
    return _check(tables, "No image leaves the budget", set(outside), found)


def _beats(tables: TaskTables) -> list[Check]:
    """The main attack must lower the score further than noise does, and than one step alone."""
    main = tables.main_attack
    rounds = [number for number in tables.rounds(main) if number > 0]
    table = attack_table(tables)
    single = table.loc[(table["method"] == "fgsm") & table["role"].isin(["ensemble", "probe"]), "attack"]
    single = [(str(name), tables.rounds(str(name))[-1]) for name in single]
    first = [(main, rounds[0])] if rounds[:1] != [tables.main_round] else []
    rivals = [
        ("The attack beats random signs of the same size", "random-sign"),
        ("The attack beats Gaussian noise", "gaussian"),
        ("The attack beats JPEG", "jpeg"),
    ]
    wanted = [(name, [(rival, number) for number in tables.rounds(rival)[-1:]]) for name, rival in rivals]
    wanted.append(("Many rounds beat one", (single or first)[:1]))
    checks = []
    for name, cells in wanted:
        values, ids = tables.aligned([(main, tables.main_round, None), *((*cell, None) for cell in cells)])
        if not cells or not ids:
            checks.append(Check(name, None, "the run does not hold both on the same images"))
            continue
        intervals = dict(zip(tables.arms, paired_bootstrap(values[0] - values[1]), strict=True))
        failed = {arm for arm, interval in intervals.items() if interval.high >= 0}
        found = f"cross entropy: {intervals[tables.baseline].text}" + ("" if failed else "; so for every arm")
        checks.append(_check(tables, name, failed, found, intervals))
    return checks


def _finite_gradients(tables: TaskTables) -> Check:
    name = "Input gradients are healthy"
    table = gradient_shares(tables)
    if table.empty:
        return Check(name, None, "the run records no shares of zero and non-finite gradients")
    zero, broken = float(table["zero_max"].max()), float(table["nonfinite_max"].max())
    found = f"at most {percent(zero, 2)} exactly zero and {percent(broken, 2)} not finite, in any arm and round"
    bad = table[(table["nonfinite_max"] > 0) | (table["zero_max"] > ZERO_SHARE)]
    return _check(tables, name, set(bad["arm"]), found)


def gradient_shares(tables: TaskTables) -> pd.DataFrame:
    """Per arm: mean share of zero gradients in the first and last attacked round, and the largest round means."""
    rows = tables.main_rows
    rows = rows.dropna(subset=["zero_gradient_share", "nonfinite_gradient_share"])
    table = []
    for arm in tables.arms:
        means = rows[rows["arm"] == arm].groupby("round")[["zero_gradient_share", "nonfinite_gradient_share"]].mean()
        if len(means):
            zero, broken = means["zero_gradient_share"], means["nonfinite_gradient_share"]
            table.append({"arm": arm, "zero_first": zero.iloc[0], "zero_last": zero.iloc[-1], "zero_max": zero.max(),
                          "nonfinite_max": broken.max()})  # fmt: skip
    return pd.DataFrame(table)
