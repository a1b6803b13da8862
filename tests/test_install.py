"""What `pip install .` gives, on a machine without a compiler too."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a clean copy of what is committed, with no compiler to be found."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, env={**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"})
    (wheel,) = folder.glob("prsl_kernels-*.whl")
    return wheel


def test_the_wheel_carries_what_the_package_reads_at_run_time(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = "prsl_kernels/experiments"
    for name in (
        "prsl_kernels/py.typed",
        f"{package}/recipes/demo.yaml",
        f"{package}/report/template.html.j2",
        f"{package}/report/style.css",
        f"{package}/models/bases/captions/model.safetensors",
        f"{package}/models/bases/vqa/README.md",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    assert sum(entry.compress_size for entry in zipfile.ZipFile(wheel).infolist()) < 12e6


def test_the_installed_library_needs_torch_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    code = (
        "import sys, torch; before = set(sys.modules); import prsl_kernels; "
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "third = {name for name in loaded if 'site-packages' in str(getattr(sys.modules[name], '__file__', ''))}; "
        "print(prsl_kernels.__file__, sorted(third - {'torch'})); "
        "print(prsl_kernels.prsl_cross_entropy(torch.zeros(2, 5), torch.tensor([0, 1]), k=2).item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, second = result.stdout.splitlines()
    assert first == f"{target}/prsl_kernels/__init__.py []"
    assert float(second) == pytest.approx(1.6094379, rel=1e-6)
