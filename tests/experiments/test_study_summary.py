"""The published study: what it says follows from the rows that are published with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.compare import read_recipe
from prsl_kernels.experiments.report.evidence import write_evidence
from prsl_kernels.experiments.report.tables import RunTables, load_run
from prsl_kernels.experiments.report.verdict import headline_lines

STUDY = Path(__file__).parents[2] / "docs" / "study"
TASKS = ["captions", "vqa"]


def evidence(task: str) -> dict[str, Any]:
    return json.loads((STUDY / "evidence" / f"{task}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TASKS)
def test_the_endpoint_follows_from_the_rows(task: str) -> None:
    told = evidence(task)
    end = told["endpoint"]
    scores = pd.read_parquet(STUDY / "run" / task / "evaluate" / "scores.parquet")
    rows = scores[(scores["reference"] == "primary") & (scores["metric"] == end["score"])]
    rows = rows[rows["attack"].isin(end["attacks"]) & (rows["round"] > 0)]
    last = rows.groupby("attack")["round"].transform("max")
    worst = rows[rows["round"] == last].groupby(["arm", "seed", "id"])["value"].min()
    assert worst.groupby(["arm", "seed"]).size().eq(128).all()
    means = worst.groupby("arm").mean()
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert set(told["effects"]) == set(means.index) - {"ce"}
    for arm, effect in told["effects"].items():
        change = means[arm] - means["ce"]
        assert effect["attacked"]["estimate"] == pytest.approx(change, abs=1e-9)
        assert cells(text, task, arm) == pytest.approx([means[arm], change], abs=6e-4)


def cells(text: str, task: str, arm: str) -> list[float]:
    """What the README's table says of one arm: its worst case, and that minus cross entropy's."""
    title = {"captions": "\n| Captions", "vqa": "\n| Answers"}[task]
    table = text.split(title, 1)[1].split("\n\n", 1)[0]
    [line] = [line for line in table.splitlines() if line.startswith(f"| `{arm}`")]
    return [float(cell.split("[")[0]) for cell in line.split("|")[3:5]]


@pytest.fixture(scope="module")
def study() -> tuple[RunTables, list[Findings]]:
    tables = load_run(STUDY / "run", read_recipe(STUDY / "run"))
    return tables, [analyse(task) for task in tables.tasks]


def test_the_evidence_follows_from_the_rows(study: tuple[RunTables, list[Findings]]) -> None:
    for findings in study[1]:
        task = findings.tables.task
        assert_close(json.loads(json.dumps(write_evidence(findings))), evidence(task), task)


def test_the_headline_follows_from_the_rows(study: tuple[RunTables, list[Findings]]) -> None:
    lines = (STUDY / "run" / "headline.txt").read_text(encoding="utf-8").splitlines()
    assert headline_lines(*study) == lines


def assert_close(mine: Any, theirs: Any, where: str) -> None:
    """Equal, numbers to rounding: sums are made in another order elsewhere."""
    if isinstance(theirs, dict):
        assert set(mine) == set(theirs), where
        for key, value in theirs.items():
            assert_close(mine[key], value, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        for place, value in enumerate(theirs):
            assert_close(mine[place], value, f"{where}[{place}]")
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9), where
    else:
        assert mine == theirs, where
