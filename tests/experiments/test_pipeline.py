"""Stages: cached by what they depend on, whole or not there, and resumed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from prsl_kernels.experiments import digests, pipeline
from prsl_kernels.experiments.config import load_recipe
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.execution import locked
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.pipeline import Stage, execute, is_fresh


def _stage(calls: list[str], depends: int = 0, needs: tuple[Stage, ...] = ()) -> Stage:
    def build(out: Path) -> None:
        calls.append(repr(sorted(path.name for path in out.iterdir())))
        (out / "part").write_text("half")
        if "crash" in calls:
            calls.remove("crash")
            raise KeyboardInterrupt
        (out / "whole").write_text(f"result {depends}")

    return Stage(f"task/stage{len(needs)}", "finetune", {"value": depends}, ("version.py",), build, needs)


def test_a_finished_stage_is_fresh_until_something_it_depends_on_changes(tmp_path: Path) -> None:
    calls: list[str] = []
    stage = _stage(calls)
    assert not is_fresh(tmp_path, stage)
    execute(tmp_path, stage)
    assert is_fresh(tmp_path, stage)
    assert not is_fresh(tmp_path, _stage(calls, depends=1))
    later = _stage(calls, needs=(stage,))
    assert later.key != _stage(calls, needs=(_stage(calls, depends=1),)).key


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "marker", "marker type"])
def test_damage_is_noticed_and_made_again(damage: str, tmp_path: Path) -> None:
    stage = _stage([])
    execute(tmp_path, stage)
    result = tmp_path / stage.name / "whole"
    marker = tmp_path / "stages" / "task--stage0.json"
    match damage:
        case "change":
            result.write_text("result 1")
        case "truncate":
            result.write_text("")
        case "remove":
            result.unlink()
        case "marker":
            marker.write_text(marker.read_text()[:40])
        case "marker type":
            marker.write_text("[]")
    assert not is_fresh(tmp_path, stage)
    execute(tmp_path, stage)
    assert is_fresh(tmp_path, stage)
    assert result.read_text() == "result 0"


def test_an_interrupted_stage_finds_its_partial_work_again(tmp_path: Path) -> None:
    calls = ["crash"]
    stage = _stage(calls)
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, stage)
    assert not (tmp_path / stage.name).exists()
    assert not is_fresh(tmp_path, stage)
    execute(tmp_path, stage)
    assert calls == ["[]", "['part']"]
    assert is_fresh(tmp_path, stage)


def test_partial_work_on_something_else_is_not_continued(tmp_path: Path) -> None:
    calls = ["crash"]
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, _stage(calls))
    execute(tmp_path, _stage(calls, depends=1))
    assert calls == ["[]", "[]"]


def test_a_failed_remake_leaves_the_earlier_result(tmp_path: Path) -> None:
    calls: list[str] = []
    execute(tmp_path, _stage(calls))
    calls.append("crash")
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, _stage(calls, depends=1))
    assert is_fresh(tmp_path, _stage(calls))


def test_stage_keys_follow_the_configuration_but_not_the_notes(tmp_path: Path) -> None:
    def keys(*overrides: str) -> dict[str, str]:
        experiment = pipeline.Experiment(load_recipe("demo", overrides), tmp_path, "cpu")
        return {stage.name: stage.key for stage in experiment.stages}

    before = keys()

    def changed(*overrides: str) -> set[str]:
        return {name for name, key in keys(*overrides).items() if before[name] != key}

    assert changed("arms.prsl-k6.note=hello") == {"report"}
    assert changed("tasks.vqa.evaluate={metrics: [rouge_l]}") == {"vqa/evaluate", "report"}
    assert changed("arms.prsl-k6.k=7") == {
        "captions/finetune/prsl-k6/seed-0",
        "captions/attack/prsl-k6/seed-0",
        "captions/evaluate",
        "vqa/finetune/prsl-k6/seed-0",
        "vqa/attack/prsl-k6/seed-0",
        "vqa/evaluate",
        "report",
    }


def test_one_process_per_arm_of_a_task_in_a_run_directory(tmp_path: Path) -> None:
    stages = pipeline.Experiment(load_recipe("demo"), tmp_path, "cpu").stages
    arm = [stage for stage in stages if (stage.task, stage.arm) == ("captions", "ce")]
    others = [stage for stage in stages if stage.arm is not None and stage not in arm]
    with locked(tmp_path, arm):
        with (
            pytest.raises(UserError, match="another prsl process is working on captions-ce"),
            locked(tmp_path, stages),
        ):
            pass
        with locked(tmp_path, others):
            pass
    with locked(tmp_path, stages):
        pass


def test_a_full_disk_is_said_whichever_library_meets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Path, stage: Stage) -> None:
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pipeline, "execute", fail)
    with pytest.raises(OSError, match="No space left") as error:
        pipeline.run_experiment(load_recipe("demo"), tmp_path, device="cpu", until="finetune")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_markers_are_json_with_checksums(tmp_path: Path) -> None:
    stage = _stage([])
    execute(tmp_path, stage)
    marker = json.loads((tmp_path / "stages" / "task--stage0.json").read_text())
    assert set(marker["files"]) == {"task/stage0/part", "task/stage0/whole"}


def test_a_checkpoint_is_read_once_for_all_arms_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"first")
    read: list[Path] = []
    monkeypatch.setattr(digests, "sha256", lambda file: read.append(file) or sha256(file))  # type: ignore[func-returns-value]
    found = {digests.base_digest(str(tmp_path)) for _ in range(3)}
    assert (len(found), read) == (1, [weights])
    weights.write_bytes(b"another")
    assert digests.base_digest(str(tmp_path)) not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (
                "arms=[{name: ce, b: 0}, {name: r, loss: released, k: 20, b: 1}]",
                "tasks.vqa.finetune.gradient_accumulation=2",
            ),
            "'released' runs over the tokens of the whole batch",
        ),
        (("tasks.vqa.finetune.trainable=lora",), r"tasks\.vqa\.finetune\.trainable: lora needs PEFT"),
    ],
)  # fmt: skip
def test_what_a_later_task_cannot_train_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        pipeline.run_experiment(load_recipe("demo", overrides), tmp_path / "run", device="cpu")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
