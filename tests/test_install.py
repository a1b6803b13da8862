"""What `pip install .` gives: with a compiler, without one, and where the native library must or must not be built."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "prsl_kernels/_native.abi3.so"
NOTE = "prsl_kernels/native_build.txt"

needs_compiler = pytest.mark.skipif(
    platform.system() != "Linux" or not shutil.which("g++"), reason="there is no g++ on a Linux to build with"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what is committed. All builds share it, so that one could find what another left."""
    folder = tmp_path_factory.mktemp("source")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def run(command: list[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command with these variables, and none that would change what it builds."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PRSL_", "MAKE")) and name not in ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")
    }
    return subprocess.run(command, cwd=folder, env=kept | variables, text=True, capture_output=True)


def pip_wheel(source: Path, target: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(target), *options, str(source)]
    return run(command, source, **variables)


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("prsl_kernels-*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine whose compiler does not work."""
    folder = tmp_path_factory.mktemp("pure")
    result = pip_wheel(source, folder, "--no-build-isolation", CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    return only_wheel(folder)


@pytest.fixture(scope="module")
def native_wheel(source: Path) -> Path:
    """The wheel of `make wheel`, with the tools of this environment, which is not installed anew."""
    command = ["make", "wheel", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
    result = run(command, source)
    assert result.returncode == 0, result.stdout + result.stderr
    return only_wheel(source / "dist")


def test_the_wheel_carries_what_the_package_reads_at_run_time(pure_wheel: Path) -> None:
    names = set(zipfile.ZipFile(pure_wheel).namelist())
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
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    assert sum(entry.compress_size for entry in zipfile.ZipFile(pure_wheel).infolist()) < 12e6


def test_the_installed_library_needs_torch_alone(pure_wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, pure_wheel]
    subprocess.run(command, check=True)
    code = (
        "import sys, torch; before = set(sys.modules); import prsl_kernels; "
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "third = {name for name in loaded if 'site-packages' in str(getattr(sys.modules[name], '__file__', ''))}; "
        "print(prsl_kernels.__file__, sorted(third - {'torch'})); "
        "print(prsl_kernels.prsl_cross_entropy(torch.zeros(2, 5), torch.tensor([0, 1]), k=2).item())"
    )
    result = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == f"{target}/prsl_kernels/__init__.py []"
    assert float(second) == pytest.approx(1.6094379, rel=1e-6)


def test_without_a_compiler_the_wheel_is_pure_and_says_why(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(pure_wheel)
    assert LIBRARY not in archive.namelist()
    note = archive.read(NOTE).decode()
    assert note.startswith(
        "not built: no C++ compiler runs (tried /bin/false, which is the environment variable CXX): "
    )


@needs_compiler
def test_the_wheel_of_make_wheel_suits_every_python_and_old_machines(native_wheel: Path) -> None:
    tag = re.search(r"-cp310-abi3-manylinux_2_(\d+)_", native_wheel.name)
    assert tag, native_wheel.name
    assert int(tag[1]) <= 31
    archive = zipfile.ZipFile(native_wheel)
    assert re.fullmatch(r"built by .+ against torch \d.+\n", archive.read(NOTE).decode())
    assert not [name for name in archive.namelist() if ".libs/" in name], "it must not bring libraries of torch's"


@needs_compiler
def test_the_library_asks_for_torch_and_names_no_folder_of_the_machine(native_wheel: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with zipfile.ZipFile(native_wheel).open(LIBRARY) as file:
        tags = [
            (tag.entry.d_tag, getattr(tag, "needed", None))
            for tag in elffile.ELFFile(file).get_section_by_name(".dynamic").iter_tags()
        ]
    assert ("DT_NEEDED", "libtorch_cpu.so") in tags
    assert not {"libtorch_python.so", "libgomp.so.1"} & {needed for _, needed in tags}
    assert not {"DT_RPATH", "DT_RUNPATH"} & {name for name, _ in tags}
    assert sys.prefix.encode() not in zipfile.ZipFile(native_wheel).read(LIBRARY)


@needs_compiler
def test_the_levels_share_no_function_and_run_nothing_when_loaded(native_wheel: Path, source: Path) -> None:
    # The linker keeps one copy of a function that several files define, and could give AVX-512 to every machine.
    objects = list(source.glob("build/temp*/rows_*.o"))
    assert {path.stem for path in objects} >= {"rows_baseline"}
    for path in objects:
        level = path.stem.removeprefix("rows_")
        lines = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout.splitlines()
        shared = [line for line in lines if re.search(" [WVu] ", line) and f"prsl::{level}::" not in line]
        assert shared == [], path
        assert not [line for line in lines if "_GLOBAL__sub_I" in line], path


@needs_compiler
def test_the_installed_wheel_runs_the_native_backend(native_wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", native_wheel]
    subprocess.run(command, check=True)
    # torch of this environment; the .pth files there, which lead to the source tree, are not read.
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).stdout.strip())
    (site / "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    code = (
        "import prsl_kernels, torch; print(prsl_kernels.__file__); "
        "logits = torch.randn(4, 50, requires_grad=True); target = torch.arange(4); "
        "losses = [prsl_kernels.prsl_cross_entropy(logits, target, b=1.0, backend=x) for x in ('native', 'eager')]; "
        "native, eager = [torch.autograd.grad(loss, logits)[0] for loss in losses]; "
        "torch.testing.assert_close(native, eager); torch.testing.assert_close(*losses); print('equal')"
    )
    result = run([python, "-I", "-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{site}/prsl_kernels/__init__.py", "equal"]


@needs_compiler
def test_an_isolated_build_finds_torch_of_the_environment(source: Path, tmp_path: Path) -> None:
    result = pip_wheel(source, tmp_path, PRSL_BUILD_NATIVE="1")  # fetches setuptools, not torch
    assert result.returncode == 0, result.stdout + result.stderr
    assert LIBRARY in zipfile.ZipFile(only_wheel(tmp_path)).namelist()


def test_switched_off_nothing_is_built_and_nothing_older_stays(source: Path, tmp_path: Path) -> None:
    for folder in (source, *source.glob("build/lib.*")):  # an editable install and a wheel
        (folder / LIBRARY).write_bytes(b"of an earlier build")
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], source, PRSL_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "the native library was not built: PRSL_BUILD_NATIVE=0 was set" in result.stderr
    assert not (source / LIBRARY).exists()
    assert (source / NOTE).read_text().startswith("not built: PRSL_BUILD_NATIVE=0 was set: unset it, then reinstall")

    result = pip_wheel(source, tmp_path, "--no-build-isolation", PRSL_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stderr
    wheel = only_wheel(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PRSL_BUILD_NATIVE": "1", "CXX": "/bin/false"},
            "error: PRSL_BUILD_NATIVE=1, but the native library was not built: no C++ compiler runs (tried /bin/false, "
            "which is the environment variable CXX): correct or unset CXX, then reinstall",
        ),
        (
            {"PRSL_BUILD_NATIVE": "yes"},
            "error: the environment variable PRSL_BUILD_NATIVE must be 1, 0 or unset, but is 'yes'",
        ),
        ({"PRSL_SANITIZE": "2"}, "error: the environment variable PRSL_SANITIZE must be 1, 0 or unset, but is '2'"),
    ],
)
def test_what_cannot_be_done_is_an_error(variables: dict[str, str], message: str, source: Path, tmp_path: Path) -> None:
    result = pip_wheel(source, tmp_path, "--no-build-isolation", **variables)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_the_source_distribution_carries_the_sources_of_the_library(source: Path, tmp_path: Path) -> None:
    result = run([sys.executable, "setup.py", "-q", "sdist", "--formats=zip", "--dist-dir", str(tmp_path)], source)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    assert {str(path.relative_to(source)) for path in source.glob("csrc/**/*.*")} <= names
