"""Whole runs: small ones that are killed and damaged, and the demo itself within its ten minutes."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from prsl_kernels.experiments.config import Task, load_recipe, save_recipe

pytestmark = pytest.mark.slow

_COMMAND = [sys.executable, "-m", "prsl_kernels.experiments.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, cut to two arms and a few images, with further attacks."""
    raw = yaml.safe_load(save_recipe(load_recipe("demo")))
    raw["name"] = "small"
    raw["arms"] = [arm for arm in raw["arms"] if arm["name"] in ("ce", "prsl-k20")]
    for task in raw["tasks"].values():
        task["data"].update(train_limit=64, select_limit=16, test_limit=12)
        task["finetune"].update(steps=4, batch_size=8, evaluate_every=2, log_every=2, calibration_batches=1)
        task["attack"].update(
            rounds=[0, 1, 2, 3],
            keep_images=2,
            extra=[
                {"name": "fgsm", "method": "fgsm"},
                {"name": "pgd", "method": "pgd", "rounds": [2, 4], "restarts": 2},
                {"name": "apgd-margin", "method": "apgd", "objective": "margin", "rounds": [4]},
                {"name": "apgd-target", "method": "apgd", "objective": "target", "rounds": [2]},
                {"name": "square", "method": "square", "role": "query", "rounds": [6], "images": 6},
                {"name": "eps-2", "role": "eps", "eps": 2, "rounds": [2], "images": 6},
            ],
            transfer={"attack": "pgd", "images": 6},
            surface={"images": 2, "points": 3},
        )
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def _run(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, "run", str(recipe), "--out", str(out)], capture_output=True, text=True, timeout=900, check=True
    )


def _assert_same_rows(out: Path, other: Path) -> None:
    """Equal scores, BERTScore's but for the last bits: bert-score embeds in a set's order, which no process shares."""
    tables = sorted(path.relative_to(out) for path in out.glob("*/evaluate/scores.parquet"))
    assert len(tables) == 2
    for table in tables:
        mine, theirs = (pq.read_table(folder / table).to_pandas() for folder in (out, other))
        keys = [name for name in mine.columns if name != "value"]
        assert mine[keys].equals(theirs[keys])
        assert mine["value"].to_numpy() == pytest.approx(theirs["value"].to_numpy(), abs=1e-6)


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "small"
    result = _run(recipe, out)
    assert str(out / "report.html") in result.stdout
    return out


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    tasks: tuple[Task, ...] = ("captions", "vqa")
    for task in tasks:
        for arm in ("ce", "prsl-k20"):
            for name in ("model.safetensors", "train.jsonl", "arm.json"):
                assert (finished / task / "finetune" / arm / "seed-0" / name).is_file()
            outputs = pq.read_table(finished / task / "attack" / arm / "seed-0" / "outputs.parquet").to_pylist()
            assert {row["round"] for row in outputs if row["attack"] == "bim"} == {0, 1, 2, 3}
            clean = {row["id"]: row["text"] for row in outputs if row["attack"] == "bim" and row["round"] == 0}
            still = {row["id"]: row["text"] for row in outputs if row["attack"] == "zero-step"}
            assert clean == still
            assert all(row["linf"] <= row["eps"] + 1e-7 for row in outputs if row["eps"] is not None)
            assert {row["attack"] for row in outputs} >= {"fgsm", "pgd", "apgd-margin", "apgd-target", "square", "jpeg"}
            other = {"ce": "prsl-k20", "prsl-k20": "ce"}[arm]
            shown = pq.read_table(finished / task / "transfer" / arm / "seed-0" / "outputs.parquet").to_pylist()
            assert {(row["attack"], row["source"]) for row in shown} == {(f"transfer-from-{other}", other)}
            assert (finished / task / "attack" / arm / "seed-0" / "surface.parquet").is_file()
        scores = pq.read_table(finished / task / "evaluate" / "scores.parquet").to_pylist()
        assert "worst" in {row["attack"] for row in scores}
        evidence = json.loads((finished / "evidence" / f"{task}.json").read_text(encoding="utf-8"))
        assert evidence["flags"]
        assert list((finished / "tables").glob(f"{task}-*.csv"))
        assert len(list((finished / "tables").glob(f"{task}-*.tex"))) == len(
            list((finished / "tables").glob(f"{task}-*.csv"))
        )
    assert not list(finished.rglob("*.partial"))
    assert (finished / "figures").is_dir()
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in html
    assert not re.search(r"""(src|href)=["']https?://[^"']+\.(js|css|png|svg)""", html)


def test_a_second_run_is_instant_and_changes_nothing(recipe: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*/*/*/*")}
    started = time.monotonic()
    result = _run(recipe, finished)
    assert result.stderr.count("up to date") == 15
    assert time.monotonic() - started < 30
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*/*/*/*/*")}


def test_a_killed_run_goes_on_to_the_same_rows(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    generator = random.Random(0)
    for attempt in range(5):
        process = subprocess.Popen(
            [*_COMMAND, "run", str(recipe), "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        # By the run's own progress, and not by the clock: on a fast machine that would find a run that has ended.
        assert any(line.endswith("...\n") for line in process.stdout), "no stage was left to be started"
        time.sleep(generator.uniform(0, 3))
        process.send_signal((signal.SIGINT, signal.SIGKILL, signal.SIGTERM)[attempt % 3])
        process.communicate(timeout=60)
        if attempt % 3 == 0:
            assert process.returncode == 130
    _run(recipe, out)
    _assert_same_rows(out, finished)


def test_damage_is_made_good(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    weights = out / "captions" / "finetune" / "ce" / "seed-0" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.write_bytes(weights.read_bytes()[:1000])
    result = _run(recipe, out)
    assert "its content changed" in result.stderr
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == digest
    _assert_same_rows(out, finished)


def test_the_demo_takes_at_most_ten_minutes(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    started = time.monotonic()
    result = subprocess.run([*_COMMAND, "run", "demo", "--out", str(out)], capture_output=True, text=True, timeout=1800)
    minutes = (time.monotonic() - started) / 60
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.strip().splitlines()
    assert lines[0] == f"Report: {out / 'report.html'}"
    assert len(lines) == 6
    print(result.stdout, f"{minutes:.1f} minutes")
    assert minutes < 10
