"""Shared by every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# More threads than cores only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

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
