"""Shared by every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

# More threads than cores only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from running import DEVICE

from prsl_kernels.backends import native

# Tests of the public functions make their tensors on the GPU, if there is one, and compare backends there. (ttsem knows
# such a device, but says so to those who name it.)
if DEVICE != "cpu" and (torch.version.cuda or torch.version.hip):
    torch.set_default_device(DEVICE)

# A shell that starts the tests in the background has them, and every process they start, ignore Ctrl-C, which some
# tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whichever order."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def _single_thread() -> Iterator[None]:
    """For many small tensors: threads would spend more time waiting for each other than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _native() -> None:
    """For tests of the compiled extension: without it they are skipped, and fail where PRSL_REQUIRE_NATIVE=1."""
    if not native.available:
        refuse = pytest.fail if os.environ.get("PRSL_REQUIRE_NATIVE") == "1" else pytest.skip
        refuse(f"there is no native backend here: {native.reason}")


@pytest.fixture
def each_level() -> Iterator[Callable[[], Iterator[str]]]:
    """Call it to go through the instruction sets that run here, each in use while it is the turn of its name."""
    before = native.level()

    def in_turn() -> Iterator[str]:
        for name in native.levels():
            native.use_level(name)
            yield name

    yield in_turn
    if before is not None:
        native.use_level(before)
