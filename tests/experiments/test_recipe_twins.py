"""The smoke twins of the large recipes as a person starts them: everything runs, and a second call does nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from published_folders import own_cache

from prsl_kernels.experiments.config import load_recipe

pytestmark = pytest.mark.slow

TWINS = ("paper-vitgpt2", "paper-blip2opt", "modern")


def prsl(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prsl_kernels.experiments.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PRSL_CACHE": str(cache)},
        timeout=1800,
    )


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_to_its_reports_and_then_has_nothing_left_to_do(name: str, tmp_path: Path) -> None:
    if name == "modern":
        pytest.importorskip("peft", reason="PEFT is not installed (the extra [lora])")
    cache, run = own_cache(tmp_path), tmp_path / "run"
    recipe = load_recipe(f"{name}-smoke")
    first = prsl("run", f"{name}-smoke", "--out", run, cache=cache)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "Traceback" not in first.stderr
    sets = sorted({test for config in recipe.tasks.values() for test in config.tests})
    parts = [run, *(run / "tests" / test for test in sets)]
    assert first.stdout.splitlines()[1] == f"Report: {run / 'report.html'}"
    for part in parts:
        assert str(part / "report.html") in first.stdout
        page = (part / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["']https?://[^"']+\.(js|css|png|svg)""", page)
        for task, config in recipe.tasks.items():
            scores = pq.read_table(part / task / "evaluate" / "scores.parquet").to_pandas()
            arms = {arm.name for arm in load_recipe(str(part / "recipe.yaml")).arms_of(task)}
            assert set(scores["arm"]) == arms | {"random-pair"}
            assert set(scores["attack"]) >= {config.attack.method, *(extra.name for extra in config.attack.extra)}
            assert config.primary.score in set(scores["metric"])
            assert scores["value"].notna().all()
    for task in recipe.tasks:
        assert json.loads((run / task / "choice.json").read_text())["arms"]
        assert list((run / "grid" / task / "finetune").iterdir())
    assert not list(run.rglob("*.partial"))

    files = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    started = time.monotonic()
    second = prsl("run", f"{name}-smoke", "--out", run, cache=cache)
    assert second.returncode == 0, second.stderr[-4000:]
    assert time.monotonic() - started < 60
    stages = [line for line in second.stderr.splitlines() if line.startswith("[")]
    markers = [file for part in (run / "grid", *parts) for file in (part / "stages").glob("*.json")]
    assert len(stages) == len(markers) > 0
    assert all(line.endswith(": up to date") for line in stages), second.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == files
    planned = json.loads(prsl("plan", f"{name}-smoke", "--out", run, "--json", cache=cache).stdout)
    assert all(row["cached"] == row["number"] and row["seconds_left"] == 0 for row in planned["stages"])
