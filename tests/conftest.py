"""Shared by every test."""

from __future__ import annotations

import os
import signal

# More threads than cores only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "2")

# A shell that starts the tests in the background has them, and every process they start, ignore Ctrl-C, which some
# tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whichever order."""
    torch.manual_seed(0)
