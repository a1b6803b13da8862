"""Shared by the experiment's tests: runs with planted numbers, made once and only read, and copies to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_pages import ARMS, PLANT, full_recipe
from synthetic_run import make_run


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of both tasks with all arms, and its recipe."""
    run = tmp_path_factory.mktemp("planted")
    return run, make_run(run)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of attack, three seeds, and arms of which one is robust, one masked and one harmed."""
    run = tmp_path_factory.mktemp("full")
    full_recipe(run, images=48, seeds=(0, 1, 2), arms=ARMS, plant=PLANT)
    return run


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("small")
    make_run(run, images=10, arms=("ce", "prsl-k20"), tasks=("captions",), keep=4, pixels=16)
    return run


@pytest.fixture
def small(small_source: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run of its own for each test that damages it."""
    run = tmp_path / "run"
    shutil.copytree(small_source, run)
    return run, yaml.safe_load((run / "recipe.yaml").read_text())
