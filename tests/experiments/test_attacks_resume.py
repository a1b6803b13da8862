"""The attack stage interrupted: what a kill leaves behind, and what is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stand_in import (  # noqa: F401
    CONFIG,
    StandIn,
    attack_fixture,
    contents,
    dataset_fixture,
    make_dataset,
    models_fixture,
)

from prsl_kernels.experiments.config import AttackConfig, ExtraAttack, SurfaceConfig, TransferConfig
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.errors import UserError

pytestmark = pytest.mark.usefixtures("_single_thread")

# What the model is asked for of one batch: bim's four recorded rounds, then one for each control.
PER_BATCH = [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("call", [1, 4, 5, 7, 9, 10, 13, 14, 18, 23, 27])
def test_an_interrupted_stage_goes_on_after_its_last_finished_attack_and_ends_the_same(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path, call: int
) -> None:
    whole = attack(out=tmp_path / "whole")
    models["arm"].calls.clear()
    models["arm"].interrupt_at = call
    with pytest.raises(KeyboardInterrupt):
        attack()
    assert not (tmp_path / "out" / "outputs.parquet").exists()
    models["arm"].interrupt_at = None
    models["arm"].calls.clear()
    assert attack() == whole
    finished = 0
    for calls in 3 * PER_BATCH:
        if finished + calls > call - 1:
            break
        finished += calls
    assert models["arm"].calls == ([4] * 18 + [2] * 9)[finished:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_stage_is_not_done_again_unless_damaged(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    rows = attack()
    before = contents(tmp_path / "out")
    models["arm"].calls.clear()
    attack()
    assert models["arm"].calls == []
    image = next(row["image"] for row in rows if row["image"])
    for damage in (lambda: (tmp_path / "out" / image).unlink(),
                   lambda: (tmp_path / "out" / "outputs.parquet").write_bytes(b"PAR1 but no more")):  # fmt: skip
        damage()
        assert attack() == rows
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["truncated", "other key", "other examples", "other attack", "image gone"])
def test_damaged_or_stale_parts_are_made_again(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path, damage: str
) -> None:
    whole = attack(out=tmp_path / "whole")
    models["arm"].calls.clear()
    models["arm"].interrupt_at = 19  # two of three batches are finished
    with pytest.raises(KeyboardInterrupt):
        attack()
    parts = tmp_path / "out" / "parts"
    assert len(list(parts.rglob("*.parquet"))) == 2 * 6
    first, second = sorted((parts / "bim").iterdir())
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-20])
    elif damage == "other key":
        table = pq.read_table(first)
        pq.write_table(table.replace_schema_metadata({"prsl_kernels.key": "0" * 64}), first)
    elif damage == "other examples":
        first.write_bytes(second.read_bytes())
    elif damage == "other attack":
        first.write_bytes((parts / "gaussian" / first.name).read_bytes())
    else:
        kept = [row["image"] for row in pq.read_table(first).to_pylist() if row["image"]]
        (tmp_path / "out" / kept[0]).unlink()
    models["arm"].interrupt_at = None
    models["arm"].calls.clear()
    assert attack() == whole
    assert models["arm"].calls == [4] * 4 + [2] * 9  # of the finished batches, the one attack of the one part
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_work_of_other_settings_is_never_mixed_in(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset, tmp_path: Path
) -> None:
    def interrupted() -> None:
        models["arm"].calls.clear()
        models["arm"].interrupt_at = 15
        with pytest.raises(KeyboardInterrupt):
            attack()
        models["arm"].interrupt_at = None

    changes: list[dict[str, Any]] = [
        {"config": AttackConfig(eps=8, step=1, rounds=(1, 2, 4), batch_size=4, keep_images=3)},
        {"path": "other"},
        {"seed": 8},
        {"arm": "prsl"},
        {"test": make_dataset(tmp_path / "nine", count=9)},
    ]
    for number, change in enumerate(changes):
        interrupted()
        rows = attack(**change)
        expected = attack(**change, out=tmp_path / f"fresh-{number}")
        assert rows == expected
        assert contents(tmp_path / "out") == contents(tmp_path / f"fresh-{number}")
        with pytest.raises(UserError, match="result of another attack; delete it"):
            attack()
        assert contents(tmp_path / "out") == contents(tmp_path / f"fresh-{number}")
        (tmp_path / "out" / "outputs.parquet").unlink()
        (tmp_path / "out" / "images").rename(tmp_path / f"old-{number}")


def test_work_under_another_surface_leaves_none_behind(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    config = replace(CONFIG, surface=SurfaceConfig(images=2, points=3))
    attack(config=config)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "surface.parquet").unlink()
    attack(config=config)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "outputs.parquet").unlink()
    (tmp_path / "out" / "parts").mkdir()  # a kill between the surface and the table, under other settings
    attack()
    assert not (tmp_path / "out" / "surface.parquet").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import stand_in as t
from pathlib import Path
from types import SimpleNamespace
from test_attacks_resume import EVERYTHING
arms = {{"arm": t.StandIn(0), "base": t.StandIn(1)}}
t.record.VisionLanguageModel = SimpleNamespace(from_pretrained=lambda path, device, dtype, decoding=None: arms[path])
count, kind, at = 0, *sys.argv[1:]
def killed_at(kind_of, call):
    def counted(*arguments, **keywords):
        global count
        if kind == kind_of:
            if count == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return call(*arguments, **keywords)
    return counted
os.replace = killed_at("file", os.replace)
arms["arm"].generate = killed_at("call", arms["arm"].generate)
data = t.make_dataset(Path({data!r}))
t.run.attack("arm", data, EVERYTHING, Path({out!r}), task="captions", arm="ce", seed=7, base_path="base")
"""
EVERYTHING = replace(
    CONFIG,
    extra=(
        ExtraAttack("pgd", "pgd", restarts=2),
        ExtraAttack("square", "square", role="query", rounds=(3, 5), images=6),
    ),
    transfer=TransferConfig("pgd", images=5),
    surface=SurfaceConfig(images=5, points=3),
)


def test_killed_again_and_again_without_warning(attack: Callable[..., Any], tmp_path: Path) -> None:
    """SIGKILL in processes of their own, each going on from the last: while asking, and while a file takes its name."""
    whole = attack(out=tmp_path / "whole", config=EVERYTHING)
    data, out = str(tmp_path / "data"), tmp_path / "out"
    program = KILLED.format(tests=str(Path(__file__).parent), data=data, out=str(out))
    files = len(contents(tmp_path / "whole"))
    parts, nameless = [], []
    for kind, at in (("file", 1), ("call", 13), ("file", 10)):
        done = subprocess.run(
            [sys.executable, "-c", program, kind, str(at)],
            capture_output=True,
            env=os.environ,
            timeout=300,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not (out / "outputs.parquet").exists()
        parts.append(len(list((out / "parts").glob("*/part-*.parquet"))))
        nameless.append({path.suffix for path in out.rglob(".*.*") if path.is_file()})
    assert 0 == parts[0] < parts[1] < parts[2] < 8 + 8 + 7
    assert nameless[0] == {".png"}  # written, but without its name yet; later calls remove it
    assert nameless[1] == set()
    assert attack(config=EVERYTHING) == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert len(contents(out)) == files
