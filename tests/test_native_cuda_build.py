"""What nvcc makes of the CUDA kernels: the machine code for real GPUs, and the library around it. No GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from prsl_kernels.backends import native

pytestmark = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs of their own")

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "csrc/cuda/launch.cu"
CHIPS = ("sm_80", "sm_90", "sm_100")  # as in setup.py


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_in_torch_the_reason_is_said() -> None:
    assert not native.cuda_available
    assert native.cuda_reason == f"torch {torch.__version__} comes without CUDA: install one that comes with it"


def nvcc() -> str:
    return shutil.which("nvcc") or pytest.skip("nvcc is not installed")


def disassembler() -> str:
    """nvdisasm: of the CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which("nvdisasm")
    if found is None:
        triton = pytest.importorskip("triton", reason="there is no nvdisasm")
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    return found if Path(found).exists() else pytest.skip("there is no nvdisasm")


# ---- the machine code ------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    report: str  # of ptxas
    cubin: Path


def compile_for(chip: str, folder: Path) -> Compiled:
    cubin = folder / "kernels.cubin"
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-Icsrc",
        f"-arch={chip}",
        "-Xptxas=-v",
        "-cubin",
        KERNELS,
        "-o",
        str(cubin),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Compiled(result.stderr, cubin)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_no_kernel_spills_registers(chip: str, tmp_path: Path) -> None:
    """Nor has one a stack: all 8 + 8 of them, two directions of four dtypes in two kinds."""
    report = compile_for(chip, tmp_path).report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == 16
    assert set(frames) == {("0", "0", "0")}


class Loop(NamedTuple):
    """The machine code of an iteration, without what only few parts of a row take."""

    kernel: str
    code: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.code)


def shortest(lines: list[str], begin: int, end: int, labels: dict[str, int], avoid: set[int]) -> list[str]:
    """The fewest instructions from ``begin`` to ``end``, a branch back to it."""
    before, frontier = {begin: begin}, [begin]
    while end not in before:
        reached = []
        for at in frontier:
            target = re.search(r"BRA .*`\((\.L_x_\d+)\)", lines[at])
            always = re.search(r"\*/\s+(BRA `|EXIT|RET)", lines[at])
            steps = [at + 1] * (not always) + ([labels[target[1]]] if target and target[1] in labels else [])
            for step in steps:
                if begin <= step <= end and step not in before and step not in avoid:
                    before[step] = at
                    reached.append(step)
        assert reached, lines[begin]
        frontier = reached
    path = [end]
    while path[-1] != begin:
        path.append(before[path[-1]])
    return [lines[at] for at in reversed(path)]


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> list[Loop]:
    """Those of all kernels that have accesses of 16 bytes, and no smaller ones with them; for the H100."""
    command = [disassembler(), "-c", str(compile_for("sm_90", tmp_path_factory.mktemp("cuda")).cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[Loop] = []
    for function in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in function.splitlines():
            if match := re.match(r"(\.L_x_\d+):", line):
                labels[match[1]] = len(lines)
            elif re.match(r"\s*/\*[0-9a-f]+\*/", line):
                lines.append(line)
        last, narrow = 0, set[int]()  # where the loop before ends, and what is in loops of single classes
        for end, line in enumerate(lines):
            match = re.search(r"BRA .*`\((\.L_x_\d+)\)", line)
            begin = labels.get(match[1], end) if match else end
            if begin < end and not any(".128" in inside for inside in lines[begin:end]):
                narrow.update(range(begin, end + 1))
            elif last <= begin < end:
                code = shortest(lines, begin, end, labels, narrow)
                found.append(Loop(function.partition(":")[0], code))
                last = end
    return found


def only(loops: list[Loop], kernel: str, *patterns: str) -> Loop:
    """The loop of a kernel with all of these instructions."""
    (loop,) = [x for x in loops if kernel in x.kernel and all(map(x.count, patterns))]
    return loop


# Of both directions, for each class. From 38 on the instructions, and no longer the memory, are what an H100 waits for.
MOST = 20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["8BFloat16", "4Half"])
def test_halves_are_read_and_written_16_bytes_at_a_time(dtype: str, loops: list[Loop]) -> None:
    """Rows of any length and any beginning go through these loops: their ends are peeled."""
    gradient = only(loops, f"backward_rowsINS_{dtype}ELb0", "MUFU.EX2")
    assert gradient.count(r"LDG\.E\.128") == gradient.count(r"STG\.E\.128") == gradient.count("MUFU.EX2") / 8
    held = f"forward_rowsINS_{dtype}ELb1"
    copy = only(loops, held, r"LDGSTS\.\S*128")
    maximum = only(loops, held, "HMNMX2")
    exponentials = only(loops, held, "MUFU.EX2", r"LDS\.128", "FADD")
    assert exponentials.count(r"LDS\.128") == exponentials.count("MUFU.EX2") / 8
    wide = ((gradient, r"LDG\.E\.128"), (copy, "LDGSTS"), (maximum, r"LDS\.128"), (exponentials, r"LDS\.128"))
    for loop, _ in wide:  # nothing narrower; @!PT is never
        assert loop.count(r"^(?!.*(\.128|@!PT)).*\b(LD|LDG|LDL|LDS|LDGSTS|ST|STG|STL|STS|ATOMS)\b") == 0
    assert sum(len(loop.code) / loop.count(access) / 8 for loop, access in wide) <= MOST
    only(loops, f"forward_rowsINS_{dtype}ELb0", r"LDG\.E\.128", "MUFU.EX2")  # where the row does not fit


# ---- the library -----------------------------------------------------------------------------------------------------


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PRSL_")}
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder),
    ]
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True)


@pytest.mark.slow
def test_the_library_is_built_and_loaded_without_a_gpu(tmp_path: Path) -> None:
    """A torch without CUDA has no current stream, so here it is loaded beside the stub that it was linked with."""
    nvcc()
    result = build(tmp_path, PRSL_BUILD_CUDA="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "warning" not in result.stdout
    package = tmp_path / "prsl_kernels"
    note = (package / "native_build.txt").read_text()
    assert re.fullmatch(
        r"built by .+ against torch \d.+; CUDA kernels built by nvcc \d.+ for sm_80, sm_90, sm_100\n", note
    )

    library = package / "_native_cuda.abi3.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    stable = set(re.findall(r" U ((?:aoti_)?torch_\w+)", symbols))
    assert "aoti_torch_get_current_cuda_stream" in stable
    include = Path(torch.__file__).parent / "include/torch/csrc"
    shims = [*include.glob("inductor/aoti_torch/c/*.h"), *include.glob("stable/c/*.h"), *include.glob("stable/*.h")]
    declared = "".join(path.read_text() for path in shims)
    macros = {name for name in stable if re.match(r"aoti_torch_(dtype|layout|memory_format|device_type)_", name)}
    assert not [name for name in stable - macros if not re.search(rf"\b{name}\b", declared)]
    assert not re.findall(r" U (_ZN2at\S*|_ZN3c10\S*|cuda\w*)", symbols)  # nothing of C++, nor of a runtime to be found

    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(re.findall(r"NEEDED.*\[(.+)\]", needed))
    assert "RUNPATH" not in needed
    assert "RPATH" not in needed
    if torch.version.cuda is not None:
        return
    code = (
        "import torch; from prsl_kernels.backends import native; "
        f"torch.ops.load_library({str(library)!r}); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print([has(f'prsl_native::{name}', 'CUDA') for name in ('token_terms', 'token_gradient', 'token_gradient_')])"
    )
    variables = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert result.stdout == "[True, True, True]\n", result.stderr


@pytest.mark.slow
def test_what_is_asked_for_and_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "nvcc"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    fake.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    result = build(tmp_path, PRSL_BUILD_CUDA="1", PATH=path)
    assert result.returncode != 0
    message = f"{fake} is 12.4, but 12.8 is the oldest that suffices"
    assert f"PRSL_BUILD_CUDA=1, but the CUDA kernels were not built: {message}" in result.stderr
    note = (tmp_path / "prsl_kernels/native_build.txt").read_text()
    assert note.endswith(f"; CUDA kernels not built: {message}\n")
    assert not (tmp_path / "prsl_kernels/_native_cuda.abi3.so").exists()
