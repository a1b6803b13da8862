"""`prsl sweep`: the stages of a recipe as a graph, each run by a worker as soon as the stages that it needs are done.

A worker is a process of its own, on this machine or, through Ray, on any other that sees the run directory. What a
stage depends on, how it is cached and how it goes on where it was cut off is `pipeline`'s, whoever runs it: a sweep
that is interrupted can be taken up by a sweep or by `prsl run`, and the other way round.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import Recipe, ResourcesConfig, load_recipe, save_recipe
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.execution import execute, is_fresh, locked
from prsl_kernels.experiments.files import write_json, write_text
from prsl_kernels.experiments.pipeline import Experiment, Stage, whole_run

LOCAL = "local"  # the scheduler in this process, in place of a Ray cluster's address
_PATIENCE = 60.0  # seconds for a worker to end when told to, or for the one before it to let a stage go
_TURN = 0.2  # seconds between two looks at the workers
# Of a process that did not end by itself: interrupted, killed, terminated. Negative: by a signal, as `Popen` says it
_DIED = (130, 137, 143)


@dataclass(frozen=True)
class Job:
    """A stage as a worker gets it: all of it plain text, so that it can be sent anywhere.

    Attributes:
        run: the run directory, absolute.
        folder: where the sweep was started: paths in a recipe may be relative to it.
        name, key: of the stage; a worker whose code, data or recipe gives it another key refuses it.
        recipe: SHA-256 of the run's `recipe.yaml`.
        device: "cpu" or "cuda": where the worker computes.
        cpus, gpus, memory: what it occupies meanwhile: cores, GPUs, bytes (0 where nothing is said).
        retries: how often a worker that died is replaced.
    """

    run: str
    folder: str
    name: str
    key: str
    recipe: str
    device: str
    cpus: float
    gpus: float
    memory: int
    retries: int

    @property
    def log(self) -> Path:
        """What the stage's workers print."""
        return Path(self.run) / "stages" / (self.name.replace("/", "--") + ".log")


class Workers(Protocol):
    """Something that runs jobs beside each other. It replaces workers that died, as often as the job allows."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses (`UserError`) jobs for which there never is room."""

    def room_for(self, job: Job) -> bool:
        """Whether the job would begin at once."""

    def start(self, job: Job) -> None:
        """Begins the job."""

    def ended(self) -> list[tuple[str, str | None]]:
        """Waits for a moment; the names of jobs that ended, each with the reason if it failed."""

    def stop(self) -> None:
        """Ends what is still running, such that it can be resumed."""


def sweep(
    recipe: Recipe, run: Path, *, device: str, connect: Callable[[], Workers] | None = None, jobs: int | None = None
) -> None:
    """Brings every stage of a recipe up to date, several at a time.

    Args:
        recipe: the validated recipe; a grid is run first, in `run/grid`, as `prsl run` does.
        run: the run directory; workers on other machines must see it under the same path.
        device: "cpu", "cuda" or "cuda:N".
        connect: makes the workers; None is processes on this machine.
        jobs: how many at a time, at most; None is as many as the resources allow.

    Raises:
        UserError: several ranks, each of which would sweep; a stage that can never be run with the resources there
            are; or stages that failed. What does not depend on those was brought up to date nevertheless.
    """
    if ranks.world() > 1:
        raise UserError("a sweep starts its own workers; run `prsl sweep` without torchrun or accelerate launch")
    run = run.resolve()
    if recipe.grid is not None:
        from prsl_kernels.experiments import study

        Experiment(recipe, run, device).check()
        grid = Experiment(study.grid_recipe(recipe), run / study.GRID, device)
        _sweep(grid, connect, jobs, until="evaluate")
        recipe = study.confirmed_recipe(recipe, run)
    experiment = Experiment(recipe, run, device)
    _sweep(experiment, connect, jobs, until="report")
    for further in experiment.further():
        further.borrow()
        _sweep(further, connect, jobs, until="report")


def _sweep(experiment: Experiment, connect: Callable[[], Workers] | None, jobs: int | None, *, until: str) -> None:
    recipe, run, device = experiment.recipe, experiment.run, experiment.device
    stages = [stage for stage in experiment.stages if until == "report" or stage.kind != "report"]
    with locked(run, stages):
        fresh = {stage.name for stage in stages if is_fresh(run, stage)}
        if len(fresh) < len(stages):
            experiment.check()  # before anything is written, as in `run_experiment`
        text = save_recipe(recipe)
        write_text(run / "recipe.yaml", text)
        write_json(run / "run.json", experiment.describe())
        digest = hashlib.sha256(text.encode()).hexdigest()
        wanted = {stage.name: job_of(stage, run, device, recipe, digest) for stage in stages if stage.name not in fresh}
        failed: dict[str, str] = {}
        if wanted:
            workers = LocalWorkers(device) if connect is None else connect()
            try:
                workers.check(list(wanted.values()))
                failed = schedule(stages, wanted, workers, jobs=jobs)
            finally:
                workers.stop()
        say(f"{run}: {len(fresh)} of {len(stages)} stages were up to date, {len(wanted) - len(failed)} were made")
    if failed:
        lines = [f"  {name}: {reason}" for name, reason in failed.items()]
        raise UserError(
            f"{len(failed)} of {len(stages)} stages are missing:\n" + "\n".join(lines) + "\nThe same command goes on "
            "from here once that is mended; what the workers printed is in " + str(run / "stages") + "/*.log"
        )


def job_of(stage: Stage, run: Path, device: str, recipe: Recipe, digest: str = "") -> Job:
    """A stage with the resources that the recipe gives to its kind.

    Raises:
        UserError: more than one GPU, since a stage's worker is one process.
    """
    resources = recipe.resources.get(stage.kind, ResourcesConfig())  # type: ignore[call-overload]
    gpus = resources.gpus
    if gpus is None:
        gpus = 1.0 if device.startswith("cuda") and stage.kind != "report" else 0.0
    if gpus > 1:
        raise UserError(
            f"resources.{stage.kind}.gpus is {gpus:g}: a stage of a sweep is one process on one GPU; give at most 1 "
            "(a fraction shares one), or let `torchrun` start `prsl run` on several"
        )
    return Job(
        run=str(run),
        folder=os.getcwd(),
        name=stage.name,
        key=stage.key,
        recipe=digest,
        device="cuda" if gpus else "cpu",
        cpus=resources.cpus,
        gpus=gpus,
        memory=int((resources.memory_gib or 0) * 2**30),
        retries=resources.retries,
    )


def schedule(
    stages: Sequence[Stage], wanted: Mapping[str, Job], workers: Workers, *, jobs: int | None = None
) -> dict[str, str]:
    """Runs the wanted jobs, each once those of them that its stage needs are done.

    Args:
        stages: in an order in which they could run one by one; it decides who goes first.
        wanted: jobs by the stage's name; a stage without one is done already.
        workers: that run them.
        jobs: how many at a time, at most.

    Returns:
        The stages that are missing, with the reason; what needs a failed stage is among them.
    """
    waiting = {stage.name: [need.name for need in stage.needs] for stage in stages if stage.name in wanted}
    running: dict[str, float] = {}
    failed: dict[str, str] = {}
    done = 0
    while waiting or running:
        for name, needs in list(waiting.items()):
            broken = [need for need in needs if need in failed]
            if broken:
                failed[name] = f"needs {broken[0]}"
                del waiting[name]
                continue
            ready = not any(need in running or need in waiting for need in needs)
            full = jobs is not None and len(running) >= jobs
            if ready and not full and workers.room_for(wanted[name]):
                del waiting[name]
                running[name] = time.monotonic()
                workers.start(wanted[name])
                say(f"{name} ...")
        for name, reason in workers.ended():
            seconds = time.monotonic() - running.pop(name)
            if reason is None:
                done += 1
                say(f"[{done:>2}/{len(wanted)}] {name}: {seconds:.1f} s")
            else:
                failed[name] = reason
                say(f"{name}: failed after {seconds:.1f} s")
    return failed


def command(job: Job) -> list[str]:
    """The worker's command line."""
    stage = ["stage", job.run, job.name, "--key", job.key, "--device", job.device]
    return [sys.executable, "-m", "prsl_kernels.experiments.cli", *stage]


def environment(job: Job) -> dict[str, str]:
    """As this process's, with as many threads as the job has cores."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, int(job.cpus)))}


def launch(job: Job, variables: Mapping[str, str], *, append: bool) -> subprocess.Popen[bytes]:
    """Starts a worker; what it prints goes to the job's log. It ends by itself when its standard input is closed."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab" if append else "wb") as log:
        return subprocess.Popen(
            command(job),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(variables),
            cwd=job.folder if os.path.isdir(job.folder) else None,  # elsewhere, absolute paths alone are found
            start_new_session=True,  # Ctrl-C is for the scheduler, which ends its workers in order
        )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Ends a worker: it is asked first, and killed where it does not listen."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        process.stdin.close()


def died(status: int) -> bool:
    """Whether a worker's exit status says that it was ended from outside."""
    return status < 0 or status in _DIED


def reason_of(job: Job, status: int) -> str:
    """Why a worker ended, in its own words where it left any."""
    if died(status):
        return f"its worker died {job.retries + 1} times, the last time with status {status}; see {job.log}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("prsl: ")]
    if starts:
        return "\n    ".join(lines[starts[-1] :]).removeprefix("prsl: ")
    return f"{lines[-1] if lines else f'status {status}'}; see {job.log}"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpu: int | None
    attempts: int = 1


@dataclass
class LocalWorkers:
    """Processes on this machine, as many as its cores, GPUs and memory allow.

    `cores`, `memory` (bytes) and `free` (the share that is left of each visible GPU) are measured where not given.
    """

    device: str
    cores: float = field(default_factory=lambda: float(len(_cores())))
    memory: float = field(default_factory=lambda: _memory())
    free: dict[int, float] | None = None
    _running: dict[str, _Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.free is None:
            self.free = dict.fromkeys(_gpus(self.device), 1.0)

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses jobs that are larger than this machine."""
        for job in jobs:
            kind = "report" if job.name == "report" else job.name.split("/")[1]
            for what, wanted, there in (
                ("cpus", job.cpus, self.cores),
                ("memory_gib", job.memory / 2**30, self.memory / 2**30),
                ("gpus", job.gpus, float(len(self.free or ()))),
            ):
                if wanted > there:
                    raise UserError(
                        f"resources.{kind}.{what} is {wanted:g}, but this machine has {there:.4g}; lower it, or use "
                        "a cluster with --ray ADDRESS"
                    )

    def room_for(self, job: Job) -> bool:
        """Whether cores, memory and a GPU are left."""
        running = [worker.job for worker in self._running.values()]
        return (
            sum(other.cpus for other in running) + job.cpus <= self.cores
            and sum(other.memory for other in running) + job.memory <= self.memory
            and (not job.gpus or self._gpu(job) is not None)
        )

    def _gpu(self, job: Job) -> int | None:
        """The fullest GPU that still has room."""
        left = {index: share for index, share in (self.free or {}).items() if share >= job.gpus - 1e-9}
        return min(left, key=lambda index: left[index]) if left else None

    def start(self, job: Job) -> None:
        """Starts the job's first worker."""
        gpu = self._gpu(job) if job.gpus else None
        if gpu is not None and self.free is not None:
            self.free[gpu] -= job.gpus
        self._running[job.name] = _Running(job, launch(job, _variables(job, gpu), append=False), gpu)

    def ended(self) -> list[tuple[str, str | None]]:
        """Replaces workers that died; names, and reasons, of the jobs that are through."""
        time.sleep(_TURN)
        through: list[tuple[str, str | None]] = []
        for name, worker in list(self._running.items()):
            status = worker.process.poll()
            if status is None:
                continue
            finish(worker.process)
            if died(status) and worker.attempts <= worker.job.retries:
                say(f"{name}: the worker died (status {status}); another one goes on")
                worker.attempts += 1
                worker.process = launch(worker.job, _variables(worker.job, worker.gpu), append=True)
                continue
            del self._running[name]
            if worker.gpu is not None and self.free is not None:
                self.free[worker.gpu] += worker.job.gpus
            through.append((name, None if status == 0 else reason_of(worker.job, status)))
        return through

    def stop(self) -> None:
        """Asks all workers to end, and then waits for them."""
        for worker in self._running.values():
            worker.process.terminate()
        for worker in self._running.values():
            finish(worker.process)
        self._running.clear()


def _variables(job: Job, gpu: int | None) -> dict[str, str]:
    visible = {} if job.device == "cpu" or gpu is None else {"CUDA_VISIBLE_DEVICES": _visible()[gpu]}
    return {**environment(job), **visible}


def _visible() -> dict[int, str]:
    """Index of each GPU that torch sees -> its name for CUDA_VISIBLE_DEVICES."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else []
    return {index: names[index] if index < len(names) else str(index) for index in range(torch.cuda.device_count())}


def _gpus(device: str) -> Iterable[int]:
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return ()
    return [int(index)] if index else _visible()


def _cores() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _memory() -> float:
    """Bytes of this machine; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _opened(run: Path, task: str, device: str) -> Experiment:
    """The experiment in a run directory, with this task alone where it has it: no other data need be read."""
    whole = whole_run(run)
    if whole is not None:
        return next(other for other in _opened(whole, task, device).further() if other.run == run.resolve())
    recipe = load_recipe(str(run / "recipe.yaml"))
    own = {name: config for name, config in recipe.tasks.items() if name == task}
    return Experiment(replace(recipe, tasks=own) if own else recipe, run, device)


def run_stage(run: Path, name: str, *, key: str, device: str) -> None:
    """What a worker does: one stage of a run whose `recipe.yaml` is there and whose earlier stages are done.

    Raises:
        UserError: no such run or stage, a stage that this machine would make of something else than the scheduler, or
            one that another process is making.
    """
    stages = _opened(run, name.split("/")[0], device).stages
    stage = next((stage for stage in stages if stage.name == name), None)
    if stage is None:
        raise UserError(f"{run}: its recipe has no stage {name!r}")
    if stage.key != key:
        raise UserError(
            f"{name}: this machine's package, data or base checkpoint is not what the scheduler has; install the "
            "same version and put the same files there"
        )
    try:
        with FileLock(run / f".lock-stage-{name.replace('/', '--')}").acquire(timeout=_PATIENCE):
            if not is_fresh(run, stage):
                execute(run, stage)
    except Timeout:
        raise UserError(f"{run}: another process is making {name}; wait for it, or end it") from None


def end_with_input() -> None:
    """From now on, ends this process as Ctrl-C does when whoever started it is gone: that closes its standard input."""
    threading.Thread(target=_watch_input, daemon=True).start()


def _watch_input() -> None:
    # Not sys.stdin, whose lock a thread must not hold at exit
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(137)
