"""What ranks say to each other, without the processes: two of them as threads over a store in memory, and none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.console import say, track
from prsl_kernels.experiments.errors import UserError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def be(rank: int, world: int) -> None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))

    return be


@pytest.fixture
def two(several: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ranks._Peers]]:
    """Two ranks that share a store; each sees itself on the same machine, and so the other's process alive."""
    monkeypatch.setattr(ranks, "_BEAT", 0.02)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    peers = []
    for number in range(2):
        several(number, 2)
        peers.append(ranks._Peers())
    yield peers
    for peer in peers:
        peer._ended.set()
        peer._pulse.join()


def both(peers: list[ranks._Peers], act: Callable[[ranks._Peers], Any]) -> list[Any]:
    """What each rank gets, or the error that it ends with."""
    found: list[Any] = [None, None]

    def go(peer: ranks._Peers) -> None:
        try:
            found[peer.rank] = act(peer)
        except UserError as error:
            found[peer.rank] = error

    threads = [threading.Thread(target=go, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return found


def test_alone_everything_is_what_was_given(capsys: Any, tmp_path: Path) -> None:
    assert (ranks.rank(), ranks.world(), ranks.local_rank(), ranks.is_main()) == (0, 1, 0, True)
    value = object()
    assert ranks.share(value) is value
    assert ranks.gather(value) == [value]
    assert ranks.join() is None
    ranks.barrier()
    ranks.leave()
    assert ranks.device("cuda:3") == "cuda:3"
    assert ranks.micro_batches(7) == 7
    with ranks.main_first(), ranks.together():
        pass
    with pytest.raises(ValueError, match="mine"), ranks.together():
        raise ValueError("mine")
    with pytest.raises(UserError, match=r"nowhere: not there for rank 0"):
        ranks.await_path(tmp_path / "nowhere")
    say("heard")
    assert "heard" in capsys.readouterr().err


def test_only_the_first_rank_speaks(several: Any, capsys: Any) -> None:
    several(1, 2)
    say("unheard")
    assert list(track([1, 2], "unseen")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_world_size_alone_makes_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as batch systems leave it about
    assert ranks.world() == 1


def test_micro_batches_are_shared_equally_or_not_at_all(several: Any) -> None:
    several(1, 4)
    assert ranks.micro_batches(8) == 2
    with pytest.raises(UserError, match=r"finetune.gradient_accumulation is 6, which 4 processes .* such as 8"):
        ranks.micro_batches(6, "tasks.vqa.finetune.gradient_accumulation")


def test_each_rank_has_a_gpu_of_its_own(several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    several(1, 2)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device("cpu") == "cpu"
    assert ranks.device("cuda") == "cuda:1"
    assert taken == [1]
    with pytest.raises(UserError, match="--device 'cuda:0': 2 processes"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="start at most 1"):
        ranks.device("cuda")


def test_ranks_without_a_launcher_are_told_how_to_start(several: Any) -> None:
    several(1, 2)
    with pytest.raises(UserError, match=r"process 1 of 2, but the others cannot be reached .*torchrun"):
        ranks._Peers()


def test_exchange(two: list[ranks._Peers]) -> None:
    numbers = [0.1, 1e-310, float("inf")]
    assert both(two, lambda peer: peer.gather([peer.rank, *numbers])) == [[[0, *numbers], [1, *numbers]]] * 2
    assert both(two, lambda peer: peer.share({"from": peer.rank})) == [{"from": 0}] * 2
    assert both(two, lambda peer: peer.share(None)) == [None] * 2


def test_an_exchange_may_be_larger_than_the_store_takes_at_once(monkeypatch: pytest.MonkeyPatch, several: Any) -> None:
    # A store as the launchers start it; one in memory takes anything
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    several(0, 2)
    peer = ranks._Peers()
    try:
        value = ["scores \u00e9"] * 900_000
        assert peer.share(value) == value
    finally:
        peer._ended.set()
        peer._pulse.join()


def test_waiting_has_no_limit_while_the_other_lives(two: list[ranks._Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_SILENCE", 0.5)
    for number in range(2):
        two[number]._store.set(f"home/{number}", json.dumps([f"machine {number}", 1]))

    def act(peer: ranks._Peers) -> Any:
        if peer.rank == 1:
            time.sleep(2)
        return peer.gather(peer.rank)

    assert both(two, act) == [[0, 1]] * 2


def test_a_rank_that_falls_silent_elsewhere_is_dead(two: list[ranks._Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_SILENCE", 0.5)
    two[1]._store.set("home/1", json.dumps(["another machine", 1]))
    two[1]._ended.set()
    [ended, _] = both(two, lambda peer: peer.gather(0) if peer.rank == 0 else None)
    assert isinstance(ended, ranks.Ended)
    assert str(ended).startswith("rank 1 has died without a word")


def test_a_process_that_is_gone_is_dead_at_once(two: list[ranks._Peers]) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    while ranks._runs(child.pid):  # ended, but not collected yet
        time.sleep(0.01)
    two[1]._store.set("home/1", json.dumps([ranks._home()[0], child.pid]))
    assert "rank 1 has died" in (two[0].trouble() or "")
    child.wait()
    assert "rank 1 has died" in (two[0].trouble() or "")
    assert ranks._runs(os.getpid())
    two[1]._store.set("left/1", "")  # it had done its work
    assert two[0].trouble() is None


def test_what_fails_on_one_is_known_to_the_other(two: list[ranks._Peers]) -> None:
    def act(peer: ranks._Peers) -> Any:
        if peer.rank == 0:
            return peer.gather(1)
        peer.post("failed: that was 0")
        peer.post("failed: and another thing")
        return peer.trouble()

    ended, own = both(two, act)
    assert str(ended) == "rank 1 failed: that was 0"
    assert own is None
    assert sorted(both(two, lambda peer: peer.tell())) == [False, True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:4"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed"), False),
    ],
)
def test_lost_connections_are_told_from_defects(error: Exception, expected: bool) -> None:
    assert ranks._is_lost_connection(error) == expected


def test_a_lost_connection_becomes_the_reason(two: list[ranks._Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_peers", two[0])
    two[1].post("failed: the 17th image is upside down")
    with pytest.raises(ranks.Ended, match="rank 1 failed: the 17th image is upside down"), ranks.together():
        raise RuntimeError("gloo: Connection closed by peer")
