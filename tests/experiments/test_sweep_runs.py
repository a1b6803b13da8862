"""Sweeps of a tiny recipe with real stages: killed workers, a killed scheduler, a Ray cluster that loses a node."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from prsl_kernels.experiments.config import load_recipe, save_recipe

pytestmark = pytest.mark.slow

_PRSL = [sys.executable, "-m", "prsl_kernels.experiments.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task of the demo, two arms, a few images."""
    raw = yaml.safe_load(save_recipe(load_recipe("demo")))
    raw["name"] = "tiny"
    raw["arms"] = [arm for arm in raw["arms"] if arm["name"] == "ce"]
    raw["sweep"] = {"k": [20], "b": [1.0]}
    raw["tasks"] = {"vqa": raw["tasks"]["vqa"]}
    task = raw["tasks"]["vqa"]
    task["data"].update(train_limit=32, select_limit=8, test_limit=8)
    task["finetune"].update(steps=2, batch_size=4, evaluate_every=1, log_every=1, calibration_batches=1)
    task["attack"].update(rounds=[1, 2], controls=["blank"], keep_images=1)
    task["evaluate"] = {"metrics": ["rouge_l"]}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def _start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_PRSL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def _stage_processes(run: Path, name: str = "") -> list[psutil.Process]:
    """Workers on a stage of this run whose name holds `name`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "stage" in line and str(run) in line and any(name in part for part in line[line.index("stage") :]):
            found.append(process)
    return found


def _wait_for(condition: Any, seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited for {seconds} s in vain")


def _assert_whole(recipe: Path, run: Path) -> None:
    """`prsl run` finds nothing left to do."""
    process = _start("run", recipe, "--out", run)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("up to date") == 6, errors


def test_a_sweep_survives_killed_workers_and_a_killed_scheduler(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _start("sweep", recipe, "--out", run, "--jobs", "1")
    _wait_for(lambda: _stage_processes(run))
    first.kill()  # without a chance to end its worker, which has to notice by itself
    first.communicate()
    _wait_for(lambda: not _stage_processes(run), 60)

    second = _start("sweep", recipe, "--out", run, "--jobs", "1")
    [worker] = _wait_for(lambda: _stage_processes(run, "vqa/attack/ce"))
    worker.kill()
    _wait_for(lambda: any(other.pid != worker.pid for other in _stage_processes(run, "vqa/attack/ce")))
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 130
    assert "the worker died (status -9); another one goes on" in errors
    assert "Traceback" not in errors
    assert not _stage_processes(run)

    third = _start("sweep", recipe, "--out", run)
    output, errors = third.communicate(timeout=600)
    assert third.returncode == 0, errors
    assert output.strip().splitlines()[0] == f"Report: {run / 'report.html'}"
    assert "of 6 stages were up to date" in errors
    _assert_whole(recipe, run)


def test_a_stage_that_fails_is_named_at_the_end(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    setting = "arms=[{name: ce, b: 0}, {name: flat, k: 1, gradient_ratio: 0.1}]"
    process = _start("sweep", recipe, "--out", run, "--set", "sweep=null", "--set", setting)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    summary = errors.split("stages are missing:")[1]
    assert "vqa/finetune/flat/seed-0: arm 'flat': gradient_ratio 0.1 cannot be reached" in summary
    assert "vqa/attack/flat/seed-0: needs vqa/finetune/flat/seed-0" in summary
    assert (run / "vqa" / "attack" / "ce" / "seed-0" / "outputs.parquet").is_file()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray on this machine: two nodes of one core each."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra [ray])")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def test_ray_replaces_a_worker_on_a_node_that_is_lost(recipe: Path, cluster: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    process = _start("sweep", recipe, "--out", run, "--ray", cluster.address)
    both = _wait_for(lambda: len(found := _stage_processes(run)) == 2 and found)
    assert len({worker.pid for worker in both}) == 2
    cluster.remove_node(lost, allow_graceful=False)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert f"Report: {run / 'report.html'}" in output
    assert not _stage_processes(run)
    _assert_whole(recipe, run)
    assert any(worker.pid != other.pid for worker, other in zip(both, reversed(both), strict=True))


def test_ray_that_is_not_there_is_said(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra [ray])")
    process = _start("sweep", recipe, "--out", tmp_path / "run", "--ray", "127.0.0.1:1")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "--ray 127.0.0.1:1: there is no cluster" in errors
    assert "Traceback" not in errors
