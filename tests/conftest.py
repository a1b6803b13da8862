"""Shared by every test."""

from __future__ import annotations

import os

# More threads than cores only get in each other's way, and pytest-xdist runs a process per core.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whichever order."""
    torch.manual_seed(0)
