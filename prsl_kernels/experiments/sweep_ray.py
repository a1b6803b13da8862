"""A sweep's workers on a Ray cluster: each job a Ray task, which runs the same process as a worker on this machine.

Ray gets nothing but text: the job's fields. Every node needs this package and the extra `[ray]`, and sees the run
directory, the data and the checkpoints under the same paths. Written against Ray 2.60.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.sweep import Job, died, environment, finish, launch, reason_of

_TURN = 0.5  # seconds between two looks


class WorkerDied(Exception):
    """The process that a Ray task started was ended from outside: Ray tries again, as if the task itself had died."""


@dataclass
class Cluster:
    """A connection to a Ray cluster."""

    ray: Any

    def device(self, asked: str) -> str:
        """The device on the nodes: what is asked for, or "auto": "cuda" if any node has a GPU."""
        if asked == "auto":
            return "cuda" if self.ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
        kind = asked.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise UserError(f"--device {asked!r}: on a cluster it is auto, cpu or cuda")
        return kind

    def workers(self) -> RayWorkers:
        """Workers on its nodes."""
        return RayWorkers(self.ray)


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A connection that is closed afterwards.

    Raises:
        UserError: Ray is not installed, or nothing answers at the address.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            f"--ray {address}: Ray cannot be imported ({error}); install it with `pip install 'prsl_kernels[ray]'`, or "
            "leave out --ray to use this machine"
        ) from None
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--ray {address}: there is no cluster ({reason}); start one with `ray start --head`, or leave out "
            "--ray to use this machine"
        ) from None
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuses an address at which nobody listens: Ray itself would try again for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray {address}: there is no cluster ({error}); start one with `ray start --head`, or leave out --ray to "
            "use this machine"
        ) from None


@dataclass
class RayWorkers:
    """Ray tasks: where and when they run is Ray's to say, and so is their repetition."""

    ray: Any
    _running: dict[Any, Job] = field(default_factory=dict)

    def check(self, jobs: Sequence[Job]) -> None:
        """Says which jobs no node has room for: a cluster may grow, so that they are no error."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for job in jobs:
            wanted = {"CPU": job.cpus, "GPU": job.gpus, "memory": job.memory}
            if not any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
                say(
                    f"{job.name}: no node of the cluster has {job.cpus:g} cores, {job.gpus:g} GPUs and "
                    f"{job.memory / 2**30:.3g} GiB; it waits for one"
                )

    def room_for(self, job: Job) -> bool:
        """Ray keeps a queue of its own."""
        return True

    def start(self, job: Job) -> None:
        """Gives the job to Ray."""
        job.log.unlink(missing_ok=True)
        # A process that serves one task: what a stage leaves behind in it never meets another
        task = self.ray.remote(max_calls=1)(_work).options(
            name=job.name,
            num_cpus=job.cpus,
            num_gpus=job.gpus,
            memory=job.memory or None,
            max_retries=job.retries,
            retry_exceptions=[WorkerDied],
        )
        self._running[task.remote(asdict(job))] = job

    def ended(self) -> list[tuple[str, str | None]]:
        """The jobs that are through, with the reason where Ray gave up."""
        ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=_TURN)
        return [self._outcome(reference) for reference in ready]

    def _outcome(self, reference: Any) -> tuple[str, str | None]:
        job = self._running.pop(reference)
        try:
            return job.name, self.ray.get(reference)
        except WorkerDied as error:
            return job.name, str(getattr(error, "cause", error))
        except self.ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return job.name, f"{type(error).__name__}: {lines[-1] if lines else ''}; see {job.log}"

    def stop(self) -> None:
        """Cancels what is running, and waits until its processes have ended."""
        for reference in self._running:
            self.ray.cancel(reference)
        deadline = time.monotonic() + 60
        while self._running and time.monotonic() < deadline:
            ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=_TURN)
            for reference in ready:
                del self._running[reference]
        self._running.clear()


def _work(fields: dict[str, Any]) -> str | None:
    """On a node: runs the job's process to its end; why it failed, or None.

    Raises:
        WorkerDied: the process was ended from outside.
    """
    job = Job(**fields)
    recipe = Path(job.run) / "recipe.yaml"
    if not recipe.is_file() or hashlib.sha256(recipe.read_bytes()).hexdigest() != job.recipe:
        return (
            f"{platform.node()}: {recipe} is not there, or another one: the run directory must be on storage that all "
            "nodes share under the same path; choose such an --out"
        )
    process = launch(job, environment(job), append=True)
    try:
        while process.poll() is None:
            try:  # in short turns, between which Ray's KeyboardInterrupt of a cancelled task arrives
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        finish(process)
    if process.returncode == 0:
        return None
    if died(process.returncode):
        raise WorkerDied(reason_of(job, process.returncode))
    return reason_of(job, process.returncode)
