"""One process or many: which one this is, what the first decides for all, and what happens when one of them dies.

`torchrun` and `accelerate launch` start the same command once for each rank and say so in the environment. In a single
process every function here does nothing, or hands back what it was given.

The ranks talk through the launcher's key-value store, in JSON. Unlike a collective of torch.distributed, waiting there
has no time limit, since one rank may score or write for hours while the others wait, and ends at once where the awaited
rank has failed or died. Whether it lives is known from its process on the same machine, and elsewhere from a beat that
it gives every few seconds. The gradients go through a process group of torch.distributed, which is started when the
fine-tuning first needs it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.errors import UserError

_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 120.0  # seconds without one, after which a rank on another machine counts as dead
_START = 600.0  # seconds within which all ranks must have been started
_COLLECTIVE = timedelta(minutes=30)  # the longest that a collective waits for a rank that lives
_PIECE = 4 << 20  # characters in one value: torch's store drops whoever sends it more than 8 MiB at once
_GOES_ON = "run the same command again, it goes on from here"


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone writes, prints and decides."""
    return rank() == 0


def device(name: str) -> str:
    """The device of this rank where the run is on `name`: a GPU of its own.

    Raises:
        UserError: a numbered GPU for several ranks, or more ranks than GPUs on this machine.
    """
    kind, _, index = name.partition(":")
    if world() == 1 or kind == "cpu":
        return name
    if index:
        raise UserError(f"--device {name!r}: {world()} processes take a GPU each; use --device {kind}")
    import torch

    there = torch.cuda.device_count()
    if local_rank() >= there:
        raise UserError(f"this machine has {there} GPUs for more processes; start at most {there} on it")
    torch.cuda.set_device(local_rank())
    return f"{kind}:{local_rank()}"


def micro_batches(gradient_accumulation: int, name: str = "gradient_accumulation") -> int:
    """How many of the micro-batches of an optimisation step are this rank's.

    Raises:
        UserError: the ranks cannot have equally many; `name` is what the setting is called.
    """
    share, rest = divmod(gradient_accumulation, world())
    if rest:
        nearest = -(-gradient_accumulation // world()) * world()
        raise UserError(
            f"{name} is {gradient_accumulation}, which {world()} processes cannot share equally; set it to a multiple "
            f"of {world()}, such as {nearest} with batch_size lowered in proportion, or start another number of "
            "processes for the fine-tuning"
        )
    return share


class Ended(UserError):
    """Another rank has failed or died, so that this one cannot go on either."""


class _Peers:
    """This rank's connection to the others."""

    def __init__(self) -> None:
        from torch import distributed

        # A model whose weights rank 0 alone has read would be attacked by the others with whatever is in memory.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self.rank, self.world = rank(), world()
        try:
            store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=_START)))
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"RANK and WORLD_SIZE say that this is process {self.rank} of {self.world}, but the others cannot be "
                f"reached ({str(error).splitlines()[0]}); start them with torchrun or accelerate launch"
            ) from None
        self.base = store
        self._store = distributed.PrefixStore("prsl", store)
        self._exchanges = 0
        self._told = False
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._joined = time.monotonic()
        self._store.set(f"home/{self.rank}", json.dumps(_home()))
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="prsl-beat", daemon=True)
        self._pulse.start()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:  # the store has gone: whoever waits for something in it says so
                return

    def gather(self, value: Any) -> list[Any]:
        self._exchanges += 1
        self._put(f"gather/{self._exchanges}/{self.rank}", value)
        return [self._await(f"gather/{self._exchanges}/{other}") for other in range(self.world)]

    def share(self, value: Any) -> Any:
        self._exchanges += 1
        if self.rank == 0:
            self._put(f"share/{self._exchanges}", value)
        return self._await(f"share/{self._exchanges}")

    def _put(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(key, str(len(pieces)))

    def _await(self, key: str) -> Any:
        pause = 0.001
        while True:
            try:
                if self._store.check([key]):
                    pieces = range(int(self._store.get(key)))
                    return json.loads(b"".join(self._store.get(f"{key}/{number}") for number in pieces))
            except RuntimeError:
                raise Ended(f"rank {self.rank} has lost the launcher; {_GOES_ON}") from None
            reason = self.trouble()
            if reason is not None:
                raise Ended(reason)
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def trouble(self) -> str | None:
        """What keeps the others from going on, where that is known."""
        try:
            if self._store.check(["failed"]):
                failed, reason = json.loads(self._store.get("failed"))
                if failed != self.rank:
                    return f"rank {failed} {reason}"
            gone = [str(other) for other in range(self.world) if other != self.rank and not self._lives(other)]
        except RuntimeError:
            return f"rank {self.rank} has lost the launcher; {_GOES_ON}"
        if not gone:
            return None
        who = f"rank {gone[0]} has" if len(gone) == 1 else f"ranks {', '.join(gone)} have"
        return f"{who} died without a word (killed, or out of memory); {_GOES_ON}"

    def _lives(self, other: int) -> bool:
        now = time.monotonic()
        if self._store.check([f"left/{other}"]):
            return True
        if not self._store.check([f"home/{other}"]):
            return now - self._joined < _START
        place, process = json.loads(self._store.get(f"home/{other}"))
        if place == _home()[0]:
            return _runs(process)
        count = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
        if self._beats.get(other, (None, 0.0))[0] != count:
            self._beats[other] = (count, now)
        return now - self._beats[other][1] < _SILENCE

    def post(self, reason: str) -> None:
        """Tells all others that this rank cannot go on; the first reason stays."""
        try:
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps([self.rank, reason]))
        except RuntimeError:
            pass

    def tell(self) -> bool:
        """Whether this rank is the first to tell the person at the terminal why the command ended."""
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:
            return True

    def leave(self) -> None:
        self._store.set(f"left/{self.rank}", "")
        if self.rank == 0:  # which may hold the store that the others still read
            for other in range(1, self.world):
                while not self._store.check([f"left/{other}"]) and self.trouble() is None:
                    time.sleep(0.01)
        self._ended.set()
        self._pulse.join()


_peers: _Peers | None = None


def join() -> _Peers | None:
    """Connects to the other ranks, once; None where there are none.

    Raises:
        UserError: they cannot be reached.
    """
    global _peers
    if _peers is None and world() > 1:
        _peers = _Peers()
    return _peers


def leave() -> None:
    """Says that this rank has done its work; its end is no failure any more."""
    global _peers
    if _peers is not None:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
        _peers.leave()
        _peers = None


def start_group(kind: str) -> None:
    """Starts the process group that gradients go through: gloo on "cpu", NCCL on "cuda". The Trainer takes it over."""
    peers = join()
    if peers is None:
        return
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(
            "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl",
            store=distributed.PrefixStore("group", peers.base),
            rank=peers.rank,
            world_size=peers.world,
            timeout=_COLLECTIVE,
        )


def share(value: Any = None) -> Any:
    """What rank 0 gives here, on all ranks; JSON."""
    peers = join()
    return value if peers is None else peers.share(value)


def gather(value: Any) -> list[Any]:
    """What every rank gives here, in their order, on all of them; JSON."""
    peers = join()
    return [value] if peers is None else peers.gather(value)


def barrier() -> None:
    """Waits until all ranks are here."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 does the block before the others do: what it leaves in a cache, they find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def await_path(path: Path) -> None:
    """Waits until what another rank has made is seen here: a network's file system may take seconds.

    Raises:
        UserError: it is not seen, so that the ranks do not share the file system.
    """
    for _ in range(60 if world() > 1 else 1):
        if path.exists():
            return
        time.sleep(1.0 if world() > 1 else 0.0)
    raise UserError(
        f"{path}: not there for rank {rank()} on {socket.gethostname()}; choose an --out on a file system that all "
        "processes share"
    )


@contextmanager
def together() -> Iterator[None]:
    """What fails on one rank within the block ends it on all of them, each with the reason."""
    if world() == 1:
        yield
        return
    try:
        yield
    except Ended:
        raise
    except BaseException as error:
        peers = join()
        assert peers is not None
        if isinstance(error, Exception) and _is_lost_connection(error):
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:  # a moment passes between a death and its being known
                reason = peers.trouble()
                if reason is not None:
                    raise Ended(reason) from error
                time.sleep(0.1)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}".splitlines()[0]
        if not isinstance(error, KeyboardInterrupt):
            peers.post(f"failed: {text}")
        elif peers.trouble() is None:  # else the launcher ends this rank because another one has ended
            peers.post(f"was interrupted; {_GOES_ON}")
        raise


def tell() -> bool:
    """Whether this rank is to tell the person at the terminal why the command ends: only one of them is."""
    return True if _peers is None else _peers.tell()


def trouble() -> str | None:
    """Why another rank cannot go on, where that is so."""
    return None if _peers is None else _peers.trouble()


def _home() -> tuple[str, int]:
    """The machine, as far as process numbers mean the same, and this process."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}", os.getpid()


def _runs(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and was not collected yet does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is not there any more."""
    from torch import distributed

    # Backends raise plain RuntimeErrors whose text alone names them.
    text = str(error).lower()
    known = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group")
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in known)
    )
