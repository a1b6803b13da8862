"""The scheduler of `prsl sweep`: who runs when, beside whom, and what happens to those that fail or die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prsl_kernels.experiments import sweep
from prsl_kernels.experiments.config import ResourcesConfig, load_recipe, save_recipe
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.pipeline import Stage
from prsl_kernels.experiments.sweep import Job, LocalWorkers, job_of, run_stage, schedule

# A worker that writes down when it began and ended, and does what its stage's name says.
_WORKER = """
import os, sys, time
folder, name = sys.argv[1:]
mark = os.path.join(folder, name.replace("/", "-"))
def note(what):
    with open(mark + "." + what, "a") as file:
        file.write(f"{time.time()}\\n")
note("begin")
if "die" in name and (not os.path.exists(mark + ".died") or "always" in name):
    note("died")
    os.kill(os.getpid(), 9)
time.sleep(0.4)
if "fail" in name:
    print("noise\\nprsl: there is no such data; fetch it", file=sys.stderr)
    sys.exit(1)
if "bug" in name:
    raise ValueError("a defect")
if "long" in name:
    time.sleep(60)
note("end")
"""


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "command", lambda job: [sys.executable, "-c", _WORKER, job.run, job.name])


def _stages(needs: Mapping[str, Sequence[str]]) -> list[Stage]:
    stages: dict[str, Stage] = {}
    for name, wanted in needs.items():
        kind = name.split("/")[1]
        stages[name] = Stage(name, kind, {}, (), lambda out: None, tuple(stages[need] for need in wanted))
    return list(stages.values())


def _job(name: str, run: Path, **changes: Any) -> Job:
    job = Job(str(run), str(run), name, "key", "recipe", "cpu", cpus=1.0, gpus=0.0, memory=0, retries=1)
    return replace(job, **changes)


@pytest.fixture(name="go")
def go_fixture(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Runs stages on `cores` cores and returns what failed."""

    def call(
        needs: Mapping[str, Sequence[str]], cores: float = 4, jobs: int | None = None, **changes: Any
    ) -> dict[str, str]:
        stages = _stages(needs)
        workers = LocalWorkers("cpu", cores=cores, memory=1e9)
        wanted = {stage.name: _job(stage.name, tmp_path, **changes) for stage in stages}
        try:
            workers.check(list(wanted.values()))
            return schedule(stages, wanted, workers, jobs=jobs)
        finally:
            workers.stop()

    return call


def _times(run: Path, name: str, what: str) -> list[float]:
    file = run / f"{name.replace('/', '-')}.{what}"
    return [float(line) for line in file.read_text().split()] if file.exists() else []


def _most_at_once(run: Path) -> int:
    events = [(float(line), 1) for file in run.glob("*.begin") for line in file.read_text().split()]
    events += [(float(line), -1) for file in run.glob("*.end") for line in file.read_text().split()]
    running, most = 0, 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return most


_GRAPH = {
    "t/finetune/a": [],
    "t/finetune/b": [],
    "t/attack/a": ["t/finetune/a"],
    "t/attack/b": ["t/finetune/b"],
    "t/transfer/a": ["t/attack/a", "t/attack/b"],
    "t/evaluate": ["t/attack/a", "t/attack/b", "t/transfer/a"],
}


def test_each_stage_begins_once_what_it_needs_has_ended(go: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    assert go(_GRAPH) == {}
    for name, needs in _GRAPH.items():
        [begin] = _times(tmp_path, name, "begin")
        for need in needs:
            assert _times(tmp_path, need, "end")[0] <= begin
    assert _most_at_once(tmp_path) == 2


@pytest.mark.parametrize(("cores", "jobs", "cpus"), [(1, None, 1.0), (4, 1, 1.0), (3, None, 2.0)])
def test_no_more_run_than_there_is_room_for(
    cores: float, jobs: int | None, cpus: float, go: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    assert go(dict.fromkeys(["t/attack/1", "t/attack/2", "t/attack/3"], ()), cores, jobs, cpus=cpus) == {}
    assert _most_at_once(tmp_path) == 1


def test_a_failure_takes_along_what_needs_it_and_nothing_else(
    go: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    failed = go(
        {
            "t/finetune/fail": [],
            "t/finetune/bug": [],
            "t/finetune/b": [],
            "t/attack/a": ["t/finetune/fail"],
            "t/attack/b": ["t/finetune/b"],
            "t/evaluate": ["t/attack/a", "t/attack/b"],
        }
    )
    assert failed["t/finetune/fail"] == "there is no such data; fetch it"
    assert failed["t/finetune/bug"].startswith("ValueError: a defect; see")
    assert failed["t/attack/a"] == "needs t/finetune/fail"
    assert failed["t/evaluate"] == "needs t/attack/a"
    assert set(failed) == {"t/finetune/fail", "t/finetune/bug", "t/attack/a", "t/evaluate"}
    assert _times(tmp_path, "t/attack/b", "end")
    assert len(_times(tmp_path, "t/finetune/fail", "begin")) == 1  # its own fault: not tried again


def test_a_worker_that_dies_is_replaced_as_often_as_the_recipe_says(
    go: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    failed = go({"t/attack/die": [], "t/attack/die-always": [], "t/evaluate": ["t/attack/die"]}, retries=2)
    assert list(failed) == ["t/attack/die-always"]
    assert "died 3 times" in failed["t/attack/die-always"]
    assert len(_times(tmp_path, "t/attack/die", "begin")) == 2
    assert len(_times(tmp_path, "t/attack/die-always", "begin")) == 3
    assert _times(tmp_path, "t/evaluate", "end")


def test_an_interrupt_ends_all_workers(tmp_path: Path) -> None:
    stages = _stages({"t/attack/long": []})
    workers = LocalWorkers("cpu", cores=1, memory=1e9)
    workers.start(_job("t/attack/long", tmp_path))
    [running] = workers._running.values()
    while not _times(tmp_path, "t/attack/long", "begin"):
        time.sleep(0.05)
    started = time.monotonic()
    workers.stop()
    assert running.process.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 10
    assert schedule(stages, {}, workers) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpus": 8.0}, "resources.attack.cpus is 8, but this machine has 4"),
        ({"memory": 2**40}, "resources.attack.memory_gib is 1024, but this machine has"),
        ({"gpus": 1.0}, "resources.attack.gpus is 1, but this machine has 0"),
    ],
)
def test_what_never_has_room_is_refused(
    changes: dict[str, Any], words: str, go: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        go({"t/attack/a": []}, **changes)
    assert not list(tmp_path.glob("*.begin"))


def test_a_gpu_is_shared_by_fractions_and_fills_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(sweep, "_visible", lambda: {0: "4", 1: "7"})
    monkeypatch.setattr(
        sweep,
        "launch",
        lambda job, variables, append: given.append(variables["CUDA_VISIBLE_DEVICES"]) or SimpleNamespace(),
    )
    workers = LocalWorkers("cuda", cores=8, memory=1e9)
    for index in range(3):
        job = _job(f"t/attack/{index}", tmp_path, gpus=0.5, device="cuda")
        assert workers.room_for(job)
        workers.start(job)
    assert sorted(given) == ["4", "4", "7"]
    assert not workers.room_for(_job("t/attack/whole", tmp_path, gpus=1.0, device="cuda"))
    assert workers.room_for(_job("t/attack/half", tmp_path, gpus=0.5, device="cuda"))


def test_resources_come_from_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    resources = {"attack": ResourcesConfig(cpus=3, memory_gib=2, retries=5), "evaluate": ResourcesConfig(gpus=0)}
    recipe = replace(recipe, resources=resources)  # type: ignore[arg-type]
    finetune, attack, evaluate = _stages({"t/finetune/a": [], "t/attack/a": [], "t/evaluate": []})
    job = job_of(attack, tmp_path, "cuda:1", recipe)
    assert (job.cpus, job.gpus, job.memory, job.retries, job.device) == (3, 1, 2 * 2**30, 5, "cuda")
    assert sweep.environment(job)["OMP_NUM_THREADS"] == "3"
    assert job_of(evaluate, tmp_path, "cuda", recipe).device == "cpu"
    assert job_of(finetune, tmp_path, "cpu", recipe).gpus == 0
    two = replace(recipe, resources={"attack": ResourcesConfig(gpus=2)})
    with pytest.raises(UserError, match="a stage of a sweep is one process on one GPU"):
        job_of(attack, tmp_path, "cuda", two)


def test_a_worker_makes_its_stage_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def stage(name: str, needs: tuple[Stage, ...] = ()) -> Stage:
        return Stage(name, name.split("/")[1], {}, ("version.py",), lambda out: made.append(name), needs)

    first = stage("vqa/finetune/a")
    second = stage("vqa/attack/a", (first,))
    tasks: list[list[str]] = []

    def experiment(recipe: Any, run: Path, device: str) -> SimpleNamespace:
        tasks.append(list(recipe.tasks))
        return SimpleNamespace(stages=[first, second])

    monkeypatch.setattr(sweep, "Experiment", experiment)
    (tmp_path / "recipe.yaml").write_text(save_recipe(load_recipe("demo")))
    run_stage(tmp_path, second.name, key=second.key, device="cpu")
    run_stage(tmp_path, second.name, key=second.key, device="cpu")  # as a worker does that died after its work
    assert made == [second.name]
    assert tasks == [["vqa"], ["vqa"]]
    assert json.loads((tmp_path / "stages" / "vqa--attack--a.json").read_text())["key"] == second.key
    with pytest.raises(UserError, match="not what the scheduler has"):
        run_stage(tmp_path, second.name, key="another", device="cpu")
    with pytest.raises(UserError, match="has no stage 'vqa/attack/b'"):
        run_stage(tmp_path, "vqa/attack/b", key="", device="cpu")


def test_a_worker_ends_with_its_scheduler(tmp_path: Path) -> None:
    code = "import signal, time; from prsl_kernels.experiments import cli, sweep; "
    code += "signal.signal(signal.SIGTERM, cli._terminate); sweep.end_with_input(); print('up', flush=True); "
    code += "time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(30) != 0
    process.stdout.close()


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from prsl_kernels.experiments.sweep_ray import connected

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'prsl_kernels\[ray\]'"), connected("auto"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_said_at_once(address: str) -> None:
    from prsl_kernels.experiments.sweep_ray import _check_reachable

    started = time.monotonic()
    with pytest.raises(UserError, match=f"--ray {address}: there is no cluster .*refused"):
        _check_reachable(address)
    assert time.monotonic() - started < 11
    _check_reachable("auto")  # Ray itself knows at once


def test_a_node_that_does_not_see_the_run_says_so(tmp_path: Path) -> None:
    from dataclasses import asdict

    from prsl_kernels.experiments.sweep_ray import _work

    assert "must be on storage that all nodes share" in str(_work(asdict(_job("t/attack/a", tmp_path))))
    (tmp_path / "recipe.yaml").write_text("name: another")
    assert "must be on storage that all nodes share" in str(_work(asdict(_job("t/attack/a", tmp_path))))
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_worker_finds_what_the_recipe_names_from_where_the_sweep_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import asdict
    from hashlib import sha256

    from prsl_kernels.experiments.sweep_ray import _work

    run, folder = tmp_path / "run", tmp_path / "started here"
    run.mkdir()
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # as the node's own
    (run / "recipe.yaml").write_text("name: same")
    monkeypatch.setattr(sweep, "command", lambda job: [sys.executable, "-c", "open('found', 'w').close()"])
    job = _job("t/attack/a", run, folder=str(folder), recipe=sha256(b"name: same").hexdigest())
    assert _work(asdict(job)) is None
    assert (folder / "found").exists()
    assert _work(asdict(replace(job, folder=str(tmp_path / "not on this node")))) is None


def test_ranks_do_not_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        sweep.sweep(load_recipe("demo"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
