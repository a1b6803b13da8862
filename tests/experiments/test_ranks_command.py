"""The command under its launchers: a whole run in two processes against one, one of the two killed, and refusals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_finetune import record, rows, weights

from prsl_kernels.experiments.config import load_recipe, save_recipe

pytestmark = pytest.mark.slow

_CLI = "prsl_kernels.experiments.cli"
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's captions, cut to two arms and a few images."""
    raw = yaml.safe_load(save_recipe(load_recipe("demo")))
    raw["name"] = "small"
    raw["arms"] = [arm for arm in raw["arms"] if arm["name"] in ("ce", "prsl-k20")]
    del raw["tasks"]["vqa"]
    task = raw["tasks"]["captions"]
    task["data"].update(train_limit=32, select_limit=8, test_limit=11)
    task["finetune"].update(
        steps=4, batch_size=2, gradient_accumulation=2, evaluate_every=2, log_every=2, calibration_batches=1
    )
    task["attack"].update(
        rounds=[0, 1, 2], batch_size=3, keep_images=2, controls=["random-sign", "blank"],
        transfer={"attack": "bim", "images": 5},
    )  # fmt: skip
    task["evaluate"].update(metrics=["rouge_l", "bertscore_f1"])
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


_TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Without --multi_gpu it starts one process on a machine that has no GPUs
_ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2")


def _start(
    count: int, recipe: Path, out: Path, *options: str, launcher: tuple[str, ...] = _TORCHRUN
) -> subprocess.Popen[str]:
    launched = ["-m", *launcher] if count > 1 else []
    command = [sys.executable, *launched, "-m", _CLI, "run", str(recipe), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(
        [*command, *options], env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, output, errors


def _assert_same(out: Path, other: Path) -> None:
    for arm in ("ce", "prsl-k20"):
        folders = [folder / "captions" / "finetune" / arm / "seed-0" for folder in (out, other)]
        assert record(folders[0]) == record(folders[1])
        assert rows(folders[0]) == rows(folders[1])
        mine, theirs = map(weights, folders)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        for stage in ("attack", "transfer"):
            table = Path("captions") / stage / arm / "seed-0" / "outputs.parquet"
            assert pq.read_table(out / table).to_pylist() == pq.read_table(other / table).to_pylist()
    scores = Path("captions") / "evaluate" / "scores.parquet"
    found, expected = (pq.read_table(folder / scores).to_pandas() for folder in (out, other))
    assert found.equals(expected)
    assert not list(out.rglob("*.partial"))


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "alone"
    status, _, errors = _finish(_start(1, recipe, out))
    assert status == 0, errors
    return out


def test_two_processes_killed_and_started_again_give_what_one_gives(recipe: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(2, recipe, out)
    while not list(out.glob("captions/attack/ce/seed-0.partial/parts/*/part-*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    last = _children(process.pid)[-1]
    begun = time.monotonic()
    os.kill(last, signal.SIGKILL)
    status, output, errors = _finish(process)
    assert status != 0
    assert time.monotonic() - begun < 120
    assert "Report:" not in output
    [said] = re.findall(r"prsl: (\w.*)", errors)
    assert re.fullmatch(r"rank [01] has died without a word .* run the same command again, it goes on from here", said)
    status, output, errors = _finish(_start(2, recipe, out))
    assert status == 0, errors
    assert output.count("Report:") == 1
    assert errors.count("captions/finetune/ce/seed-0: up to date") == 1
    _assert_same(out, alone)
    status, _, errors = _finish(_start(2, recipe, out))
    assert status == 0, errors
    assert errors.count("up to date") == 8


@pytest.mark.parametrize("launcher", [_TORCHRUN, _ACCELERATE], ids=["torchrun", "accelerate"])
def test_micro_batches_that_two_cannot_share_are_refused_before_anything_is_written(
    launcher: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    three = ("--set", "tasks.captions.finetune.gradient_accumulation=3")
    status, _, errors = _finish(_start(2, recipe, out, *three, launcher=launcher))
    assert status != 0
    [said] = re.findall(r"prsl: (\w.*)", errors)
    assert said.startswith("tasks.captions.finetune.gradient_accumulation is 3, which 2 processes cannot share equally")
    assert {path.name for path in out.iterdir()} <= {".lock-captions-ce", ".lock-captions-prsl-k20"}


def _children(process: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(folder.name))
    return sorted(found)
