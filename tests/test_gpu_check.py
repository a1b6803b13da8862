"""The program for a machine with a GPU, on one without: a dry run, and the ways in which a part can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are not installed

from benchmarks import gpu, gpu_checks, gpu_parts, gpu_results, gpu_sections, gpu_times
from benchmarks.gpu_parts import Ended, Setting

ROOT = Path(__file__).resolve().parent.parent
DRY = Setting(True, float("inf"))
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing")
FAKE_SANITIZER = """\
#!/bin/sh
while case "$1" in --*) true ;; *) false ;; esac; do
  case "$2" in initcheck) echo "========= Uninitialized read"; exit 99 ;; racecheck) exit 3 ;; esac
  shift 2
done
exec "$@"
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def variables(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more


@pytest.fixture
def context() -> gpu_sections.Context:
    return gpu_sections.Context(True, 60, {}, lambda: None, lambda line: None)


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_triton
def test_a_dry_run_goes_through_everything(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    folder = tmp_path / "results"
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        command("--dry-run", "--output", str(folder)),
        env=variables(PATH=path),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    document = json.loads((folder / "gpu.json").read_text())
    assert ran.returncode == 1, ran.stdout + ran.stderr  # the sanitizer has "found" something
    assert document["dry_run"] is True
    assert "no figure here says anything about speed" in document["about"]
    assert document["status"] == "complete"
    assert document["environment"]["gpu"] == "none: a dry run on the CPU"
    sections: dict[str, Any] = document["sections"]
    assert {name: (section["status"], section["passed"]) for name, section in sections.items()} == {
        "correctness": ("complete", True),
        "first call": ("complete", True),
        "times": ("complete", True),
        "tests": ("complete", True),
        "sanitizer": ("complete", False),
    }

    checks = {record["check"]: record for record in sections["correctness"]["records"]}
    assert list(gpu_checks.planned()) == [name for name in gpu_checks.planned() if name in checks]
    for_a_gpu = {name for name, record in checks.items() if record["passed"] is None}
    assert for_a_gpu == {"CUDA graph", "more than 2^31 logits"}
    assert checks["values in bfloat16"]["worst"] <= 1

    assert [record["what"] for record in sections["first call"]["records"]] == ["an empty cache", "a full cache"]
    assert sections["tests"]["counts"]["passed"] > 0
    assert sections["tests"]["counts"]["failed"] == 0
    said = {record["what"]: record["passed"] for record in sections["sanitizer"]["records"]}
    assert said == {"every kernel, without a tool": True, "memcheck": True, "racecheck": None, "initcheck": False}

    points = sections["times"]["records"]
    assert [point["point"] for point in points] == [point.name for point in gpu_times.points(True)]
    assert "cut-cross-entropy" in sections["times"]["left_out"]
    main = points[0]
    ran_or_not = {result["contender"] for result in main["results"]} | set(main["left_out"])
    assert ran_or_not == {"copy", *gpu_times.CONTENDERS}
    phases = [result["phase"] for result in main["results"] if result["contender"] == "prsl"]
    assert phases == list(gpu_times.PHASES)

    table = pd.read_csv(folder / "gpu.csv")
    assert tuple(table.columns) == gpu_results.COLUMNS
    assert table["dry_run"].all()
    assert len(table) == sum(len(point["results"]) for point in points)
    for name in ("gpu-main", "gpu-sweeps"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert "DRY RUN" in (folder / f"{name}.svg").read_text()
    assert "DRY RUN, NO GPU: main: bfloat16" in ran.stdout
    assert "FAILED: sanitizer: initcheck" in ran.stdout
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["gpu.json", "gpu.csv", *(f"gpu-{name}.{suffix}" for name in ("main", "sweeps") for suffix in ("png", "svg"))]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "CUDA" in error or "no GPU" in error
    assert "--dry-run" in error
    assert not any(tmp_path.iterdir())


def test_a_dry_run_leaves_the_results_of_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--dry-run"])
    assert exit.value.code == 2
    assert "--output" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("--dry-run", "--output", str(tmp_path), "--only", "correctness"),
        env=variables(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "values in" in line:
            process.send_signal(number)
            break
    seen += process.stdout.readlines()
    assert process.wait(60) == 130, "".join(seen)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["status"] == "interrupted"
    assert document["sections"]["correctness"]["records"]
    assert document["sections"]["times"]["status"] == "not asked for"


def test_the_sections_share_the_time() -> None:
    names = list(gpu_sections.SECTIONS)
    whole = sum(seconds for _, seconds in gpu_sections.SECTIONS.values())
    assert gpu.LIMIT + 2 * gpu_parts.GRACE < 600
    left = float(gpu.LIMIT)
    for name in names:
        seconds = gpu.allowance(name, names, left, gpu.LIMIT)
        assert seconds >= gpu_sections.SECTIONS[name][1] * gpu.LIMIT / whole - gpu_parts.GRACE - 1e-6
        left -= seconds + gpu_parts.GRACE  # as if it took all of it, and had to be ended
    assert left >= -1e-6
    # What the first one leaves is the others'.
    assert gpu.allowance("first call", names, gpu.LIMIT - 1, gpu.LIMIT) > gpu_sections.SECTIONS["first call"][1] + 100


# ---- parts and processes ---------------------------------------------------------------------------------------------


def test_a_process_that_hangs_is_ended_with_its_children() -> None:
    lines: list[str] = []
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    began = time.monotonic()
    ended = gpu_parts.run(python(code), 2, variables(), lines.append)
    assert time.monotonic() - began < 60
    assert ended.timed_out
    assert "not through after" in str(ended.reason)
    status = Path(f"/proc/{lines[0]}/stat")
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_how_a_process_ended_is_said_in_words() -> None:
    both = [(python("import os; os.abort()"), None), (python("raise SystemExit(3)"), None)]
    aborted, failed = gpu_parts.run_together(both, 60, variables())
    assert aborted.reason == "killed by SIGABRT"
    assert failed.reason == "exit status 3"
    assert gpu_parts.run(python("pass"), 60, variables()).reason is None


def settled(context: gpu_sections.Context, ended: Ended, *lines: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    context.section["planned"] = ["a", "b"]
    for line in lines:
        context.take(line if isinstance(line, str) else json.dumps(line))
    gpu_sections.settle(context.section, [ended], **{"must_finish": True, **more})
    return context.section


def test_a_part_that_dies_names_what_was_under_way(context: gpu_sections.Context) -> None:
    cut = '{"check": "b", "pas'
    section = settled(
        context, Ended(-6, False, 1.0), {"begin": "a"}, {"check": "a", "passed": True}, {"begin": "b"}, cut
    )
    assert (section["status"], section["passed"], section["not_done"]) == ("failed", False, ["b"])
    assert section["reason"] == "killed by SIGABRT; under way: b"


def test_a_check_that_was_not_done_has_not_passed(context: gpu_sections.Context) -> None:
    section = settled(context, Ended(0, False, 1.0), {"check": "a", "passed": True})
    assert (section["status"], section["passed"]) == ("incomplete", False)
    # Times that were not taken are no error.
    gpu_sections.settle(section, [Ended(0, False, 1.0)], must_finish=False)
    assert section["passed"] is True


def test_a_part_whose_checks_all_passed_has_passed(context: gpu_sections.Context) -> None:
    records = [{"check": "a", "passed": True}, {"check": "b", "passed": None, "reason": "not here"}]
    section = settled(context, Ended(0, False, 1.0), *records)
    assert (section["status"], section["passed"]) == ("complete", True)
    section["records"][0]["passed"] = False
    gpu_sections.settle(section, [Ended(0, False, 1.0)], must_finish=True)
    assert section["passed"] is False


def test_the_counts_of_the_tests_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    assert gpu_sections.read_junit(path) is None
    outcomes = {"a": "", "b": "<failure/>", "c": "<skipped/>"}
    cases = "".join(f'<testcase classname="t" name="{name}">{what}</testcase>' for name, what in outcomes.items())
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts = {"passed": 1, "failed": 1, "skipped": 1, "names_of_failed": ["t::b"]}
    assert gpu_sections.read_junit(path) == counts
    path.write_text("<testsuites><cut")
    assert gpu_sections.read_junit(path) is None


def test_the_suite_on_the_device_has_tests() -> None:
    for glob in gpu_sections.TESTS:
        assert list(ROOT.glob(glob)), glob


# ---- the checks see errors -------------------------------------------------------------------------------------------


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> tuple[gpu_checks.Found, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What a faultless kernel would give: eager's, rounded once."""
    logits, target, upstream = gpu_checks.batch(DRY, 4, 300, torch.bfloat16)
    z = logits.double().requires_grad_()
    ce, d = gpu_checks.eager.token_terms(z, target, None, **gpu_checks.Options()._asdict())
    loss = ce + gpu_checks.B * d
    (gradient,) = torch.autograd.grad(loss, z, upstream.double())
    return gpu_checks.Found(loss.detach().float(), gradient.bfloat16()), (logits, target, upstream)


def error(found: gpu_checks.Found, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    return gpu_checks.worst_error(found, *inputs, gpu_checks.Options())


def test_rounding_is_no_error(right: Any) -> None:
    assert 0.1 < error(*right) <= 0.51  # half a unit in the last place, of bounds of a whole one


@pytest.mark.parametrize(
    ("part", "value"),
    [("gradient", torch.nan), ("gradient", torch.inf), ("loss", torch.nan), ("gradient", 1e-3)],
)
def test_an_unwritten_or_wrong_element_is_an_error(right: Any, part: str, value: float) -> None:
    found, inputs = right
    row = (inputs[1][2] + 1) % 300
    if part == "gradient":
        found.gradient[2, row] += value
    else:
        found.loss[2] += value
    assert error(found, inputs) > 1
    with pytest.raises(gpu_checks.CheckFailed):
        gpu_checks.need_small(error(found, inputs))


def test_the_gradient_of_plain_cross_entropy_is_an_error(right: Any) -> None:
    found, (logits, target, upstream) = right
    z = logits.float().requires_grad_()
    torch.nn.functional.cross_entropy(z, target, reduction="none").backward(upstream)
    assert z.grad is not None
    assert error(found._replace(gradient=z.grad.bfloat16()), (logits, target, upstream)) > 10


def test_unwritten_memory_is_nan() -> None:
    with gpu_checks.unwritten_is_nan():
        assert torch.zeros(3, dtype=torch.bfloat16).new_empty(1000).isnan().all()
        assert (torch.empty(1000, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- times -----------------------------------------------------------------------------------------------------------


def test_ratios_and_bandwidths() -> None:
    point = gpu_times.Point("main", "bfloat16", 4, 1000, 20)
    times = {"copy copy": 1.0, "prsl both": 3.0, "cross-entropy both": 6.0}
    rounds = [{turn: slow * ms for turn, ms in times.items()} for slow in (1, 5, 1)]
    copy, prsl, other = gpu_times.summarize(point, rounds)
    assert (copy["bytes"], prsl["bytes"]) == (2 * 8000, 3 * 8000)
    assert copy["share_of_copy"] == 1
    assert prsl["gb_per_s"] == pytest.approx(24000 / 3e-3 / 1e9)
    assert prsl["share_of_copy"] == pytest.approx(0.5)
    assert (prsl["ratio_to_cross-entropy"], prsl["ratio_to_copy"], prsl["ratio_to_liger"]) == (0.5, 3.0, None)
    assert other["ratio_to_copy"] == 6


def test_contenders_that_compute_another_loss_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
        return 2 * gpu_times.naive_prsl(logits, target, k)

    few = {
        "naive": gpu_times.CONTENDERS["naive"],
        "native": gpu_times.Contender("", lambda setting: wrong, prsl=True),
        "liger": gpu_times.CONTENDERS["liger"],
    }
    monkeypatch.setattr(gpu_times, "CONTENDERS", few)
    record = gpu_times.race(DRY, gpu_times.Point("main", "float32", 3, 100, 20), gpu_times._Clock())
    assert record["passed"] is False
    assert "same loss" in record["reason"]


def test_a_contender_that_cannot_run_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> gpu_times.Loss:
        raise RuntimeError("no such kernel\nand more")

    few = {"naive": gpu_times.CONTENDERS["naive"], "native": gpu_times.Contender("", broken, prsl=True)}
    monkeypatch.setattr(gpu_times, "CONTENDERS", few)
    record = gpu_times.race(DRY, gpu_times.Point("main", "float32", 3, 100, 20), gpu_times._Clock())
    assert record["left_out"] == {"native": "RuntimeError: no such kernel"}
    assert record["passed"] is True
    late = Setting(True, 0.0)  # the time is up
    record = gpu_times.race(late, gpu_times.Point("main", "float32", 3, 100, 20), gpu_times._Clock())
    assert set(record["left_out"].values()) == {"the time of this part was up"}
    assert record["rounds"] == 1


def test_every_race_asked_for_is_planned() -> None:
    points = gpu_times.points(False)
    assert {(p.dtype, p.tokens, p.vocab, p.k) for p in points if p.sweep == "main"} == {
        ("bfloat16", 4096, 50_257, 20),
        ("float32", 4096, 50_257, 20),
        ("bfloat16", 4096, 50_304, 20),
    }
    assert len({point.name for point in points}) == len(points)
    sizes = [point.tokens * point.vocab for point in points if point.sweep == "vocab"]
    assert max(sizes) / min(sizes) < 1.01
