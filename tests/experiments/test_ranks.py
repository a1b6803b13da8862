"""Two processes (gloo, on the CPU) against one, row by row; and what happens when one of the two dies."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_finetune import CE, CONFIG, PRSL, bases, drawings, record, rows, weights

from prsl_kernels.experiments.config import (
    ArmConfig,
    AttackConfig,
    ExtraAttack,
    FinetuneConfig,
    TransferConfig,
    as_dict,
)
from prsl_kernels.experiments.data import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_single_thread")]

_SCRIPT = Path(__file__).with_name("rank_jobs.py")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TWO = dataclasses.replace(CONFIG, batch_size=2, gradient_accumulation=2)
FOUR = dataclasses.replace(CONFIG, batch_size=2, gradient_accumulation=4)
ATTACK = AttackConfig(
    eps=8,
    step=2,
    rounds=(0, 1, 2),
    batch_size=3,
    keep_images=3,
    controls=("random-sign", "blank"),
    extra=(
        ExtraAttack("pgd", "pgd", objective="margin", rounds=(2,), restarts=2),
        ExtraAttack("square", "square", role="query", rounds=(3,), images=7),
    ),
    transfer=TransferConfig("pgd", images=7),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    return drawings(tmp_path_factory.mktemp("images"))


def plain(dataset: Dataset) -> dict[str, Any]:
    return {**dataclasses.asdict(dataset), "examples": [dataclasses.asdict(e) for e in dataset.examples]}


def start(count: int, work: list[dict[str, Any]], folder: Path, **job: Any) -> subprocess.Popen[str]:
    """Starts a job in `count` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.json"
    file.write_text(json.dumps({"work": work, **job}, default=str))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(_SCRIPT), str(file)],
        env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(count: int, work: list[dict[str, Any]], folder: Path, **job: Any) -> tuple[int, str]:
    """Status and output of a job that must end by itself."""
    process = start(count, work, folder, **job)
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, output


@pytest.fixture(scope="module")
def jobs(base: Any, data: Any) -> Callable[[Path], list[dict[str, Any]]]:
    """Fine-tunings of both families, an attack on two of them, and a transfer, in a folder."""

    def make(folder: Path) -> list[dict[str, Any]]:
        def tuned(name: str, task: str, arm: ArmConfig, config: FinetuneConfig) -> dict[str, Any]:
            return {
                "kind": "finetune", "out": folder / name, "base": base(task), "arm": as_dict(arm),
                "config": as_dict(config), "train": plain(data(task, "train", 12)),
                "select": plain(data(task, "select", 7)),
            }  # fmt: skip

        test = plain(data("captions", "test", 11))
        test["examples"][4]["references"] = ()  # what the base says of it counts
        attacked = {"task": "captions", "base": base("captions"), "test": test, "config": as_dict(ATTACK)}
        return [
            tuned("prsl", "captions", PRSL, TWO),
            tuned("ce", "captions", CE, TWO),
            tuned("vqa", "vqa", PRSL, FOUR),
            {"kind": "attack", "out": folder / "attack-prsl", "model": folder / "prsl", "arm": "prsl", **attacked},
            {"kind": "attack", "out": folder / "attack-ce", "model": folder / "ce", "arm": "ce", **attacked},
            {
                "kind": "transfer", "out": folder / "transfer", "model": folder / "ce", "arm": "ce",
                "sources": {"prsl": folder / "attack-prsl" / "outputs.parquet"}, **attacked,
            },
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def alone(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, done by one process."""
    folder = tmp_path_factory.mktemp("alone")
    status, output = run(1, jobs(folder), folder)
    assert status == 0, output
    return folder


def assert_same_training(mine: Path, theirs: Path) -> None:
    """To the last bit."""
    assert record(mine) == record(theirs)
    assert rows(mine) == rows(theirs)
    expected = weights(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in weights(mine).items())
    assert not (mine / "training").exists()


def assert_same_rows(mine: Path, theirs: Path) -> None:
    """To the last bit, and in the same order."""
    table, expected = (pq.read_table(folder / "outputs.parquet").to_pylist() for folder in (mine, theirs))
    assert len(table) == len(expected) > 0
    for one, other in zip(table, expected, strict=True):
        assert one == other
    images = {path.relative_to(theirs) for path in theirs.rglob("*.png")}
    assert {path.relative_to(mine) for path in mine.rglob("*.png")} == images
    assert not (mine / "parts").exists()


def test_two_ranks_give_what_one_gives(jobs: Any, alone: Path, tmp_path: Path) -> None:
    status, output = run(2, jobs(tmp_path), tmp_path)
    assert status == 0, output
    for name in ("prsl", "ce"):  # one micro-batch each: their sum is the same in either order
        assert_same_training(tmp_path / name, alone / name)
    for name in ("attack-prsl", "attack-ce", "transfer"):
        assert_same_rows(tmp_path / name, alone / name)
    mine, theirs = tmp_path / "vqa", alone / "vqa"  # two each, which are summed in another order
    assert record(mine)["selected_step"] == record(theirs)["selected_step"]
    for one, other in zip(rows(mine), rows(theirs), strict=True):
        for name, value in one.items():
            assert value == (other[name] if value is None else pytest.approx(other[name], rel=1e-5, abs=1e-7)), name
    expected = weights(theirs)
    for name, value in weights(mine).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def assert_nearly_same_training(mine: Path, theirs: Path) -> None:
    for one, other in zip(rows(mine)[1:], rows(theirs)[1:], strict=True):
        assert one["gradient_ratio"] is None  # no rank has the whole gradient
        for name in ("loss", "cross_entropy", "penalty", "eval_cross_entropy", "eval_penalty"):
            assert one[name] == (other[name] and pytest.approx(other[name], rel=1e-5)), name
    expected = weights(theirs)
    for name, value in weights(mine).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_that_is_split_over_ranks_learns_the_same(jobs: Any, alone: Path, tmp_path: Path) -> None:
    """FSDP in its second version: equal within rounding, and what it leaves is a whole model."""
    status, output = run(2, jobs(tmp_path)[:1], tmp_path, sharded=True)
    assert status == 0, output
    assert_nearly_same_training(tmp_path / "prsl", alone / "prsl")


def test_a_model_that_is_split_over_ranks_goes_on_after_a_death(jobs: Any, alone: Path, tmp_path: Path) -> None:
    tuning = jobs(tmp_path)[:1]
    assert_noticed(*run(2, tuning, tmp_path, sharded=True, die=[1, "step", 4]), 1)
    status, output = run(2, tuning, tmp_path, sharded=True)
    assert status == 0, output
    assert_nearly_same_training(tmp_path / "prsl", alone / "prsl")


# ---- deaths ----------------------------------------------------------------------------------------------------------


def messages(output: str) -> list[str]:
    """What the command says at its end; a bar that it cut short may stand before."""
    return re.findall(r"(?<![/\w])prsl: (\w.*)", output)


def assert_noticed(status: int, output: str, died: int) -> None:
    assert status != 0
    said = messages(output)
    assert len(said) == 1, output
    assert said[0].startswith(f"rank {died} has died without a word"), output
    assert "run the same command again" in said[0]


@pytest.mark.parametrize("died", [0, 1])
def test_a_killed_rank_ends_the_fine_tuning_which_then_goes_on(
    died: int, jobs: Any, alone: Path, tmp_path: Path
) -> None:
    tuning = jobs(tmp_path)[:1]
    begun = time.monotonic()
    assert_noticed(*run(2, tuning, tmp_path, die=[died, "step", 4]), died)  # the first checkpoint is of step 2
    assert time.monotonic() - begun < 120
    assert (tmp_path / "prsl" / "training" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (tmp_path / "prsl" / "arm.json").exists()
    status, output = run(2, tuning, tmp_path)
    assert status == 0, output
    assert_same_training(tmp_path / "prsl", alone / "prsl")


def test_what_two_ranks_began_one_can_finish(jobs: Any, alone: Path, tmp_path: Path) -> None:
    tuning = jobs(tmp_path)[:1]
    assert_noticed(*run(2, tuning, tmp_path, die=[1, "step", 4]), 1)
    status, output = run(1, tuning, tmp_path)
    assert status == 0, output
    assert_same_training(tmp_path / "prsl", alone / "prsl")


@pytest.mark.parametrize("died", [0, 1])
def test_a_killed_rank_ends_the_attack_which_then_goes_on(died: int, jobs: Any, alone: Path, tmp_path: Path) -> None:
    [attack] = [{**one, "model": alone / "prsl"} for one in jobs(tmp_path) if one["out"].name == "attack-prsl"]
    out = tmp_path / "attack-prsl"
    assert_noticed(*run(2, [attack], tmp_path, die=[died, "write_part", 3]), died)
    done = {file: file.stat().st_mtime_ns for file in out.glob("parts/*/part-*.parquet")}
    assert len(done) >= 2
    assert not (out / "outputs.parquet").exists()
    status, output = run(2, [attack], tmp_path)
    assert status == 0, output
    assert_same_rows(out, alone / "attack-prsl")


@pytest.mark.parametrize(
    ("what", "message"),
    [("user", "the 17th image is upside down"), ("that was 0", "ValueError that was 0")],
)
def test_what_fails_on_one_rank_is_said_once_and_ends_all(what: str, message: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    status, output = run(3, [], tmp_path, disagree=[1, what])
    assert status != 0
    assert time.monotonic() - begun < 120
    assert messages(output) in ([message], [f"rank 1 failed: {message}"])
    assert output.count("ValueError: that was 0") == (what != "user")
