"""Build script: what is declarative is in pyproject.toml; here is the native library, which may be left out.

The library is no Python module: it uses nothing of Python, and registers its operators with PyTorch's stable ABI when
``torch.ops.load_library`` loads it. So one file serves every Python, and every torch from 2.10 on.
``torch.utils.cpp_extension`` is not used: it must import torch, and cannot give a file flags of its own. torch is not a
build requirement either, or an isolated build would fetch gigabytes of CUDA for a few headers.

Environment variables:

    PRSL_BUILD_NATIVE=1      fail, with the reason, where the library cannot be built
    PRSL_BUILD_NATIVE=0      leave it out
    (unset)                  build it where that works; else print the reason and keep it in native_build.txt
    PRSL_SANITIZE=1          build it with AddressSanitizer and UndefinedBehaviorSanitizer (`make test-asan`)
    CXX, CXXFLAGS, LDFLAGS   the compiler, by default the first of g++, c++ and clang++ that runs, and options for it
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

PACKAGE = "prsl_kernels"
LIBRARY = "_native.abi3.so"
NOTE = "native_build.txt"  # how the build went, for `prsl doctor` and the error of backend="native"
TORCH = (2, 10)  # the first whose stable ABI suffices
# pip keeps the wheels that it built, ours without a library too, and takes them again.
REINSTALL = "reinstall with pip install --force-reinstall --no-deps --no-cache-dir"

SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/binding.cpp"]
ROWS = "csrc/cpu/rows.cpp"  # compiled once for each level of the processor, of which dispatch.cpp chooses at run time
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# No -ffast-math, nor a part of it that touches NaN, infinity or the order of operations. -fno-math-errno lets sqrt be
# an instruction.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += ["-Icsrc", f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"]
OPTIMIZE = ["-O3", "-DNDEBUG"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g", "-fno-omit-frame-pointer"]


class Torch(NamedTuple):
    folder: Path
    version: str


class Compiler(NamedTuple):
    command: list[str]
    version: str
    target: str  # such as x86_64-linux-gnu: what it compiles for, whatever this Python runs on


class BuildNative(build_ext):
    """Builds the library, or says why not; then the wheel is a pure one."""

    def run(self) -> None:
        wanted, sanitize = switch("PRSL_BUILD_NATIVE"), switch("PRSL_SANITIZE")
        note, library = self.paths()
        note.parent.mkdir(parents=True, exist_ok=True)
        # Whatever follows, no library of an earlier build may survive it. Processes that have it mapped keep it.
        library.unlink(missing_ok=True)
        try:
            if wanted is False:
                raise PlatformError(f"PRSL_BUILD_NATIVE=0 was set: unset it, then {REINSTALL}")
            note.write_text(f"{self.build(library, SANITIZE if sanitize else OPTIMIZE)}\n", encoding="utf-8")
        except (PlatformError, OSError, ValueError) as error:
            reason = f"not built: {error}"
            note.write_text(f"{reason}\n", encoding="utf-8")
            if wanted:
                raise PlatformError(f"PRSL_BUILD_NATIVE=1, but the native library was {reason}") from error
            print(f"prsl_kernels: the native library was {reason}", file=sys.stderr)
            self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True

    def build(self, library: Path, mode: list[str]) -> str:
        """Compile and link; the sentence for the note."""
        if os.name == "nt":
            raise PlatformError("it needs the vector extensions of GCC and Clang, which there are not on Windows")
        compiler, torch = find_compiler(), find_torch()
        objects = self.compile(compiler, torch, mode)
        # Named as needed, for Python does not offer torch's symbols to libraries that do not ask for them. No rpath:
        # torch is imported first, and the loader takes the library of that name which is there already.
        link = [*mode, "-shared", *words("LDFLAGS"), f"-L{torch.folder}/lib", "-ltorch_cpu"]
        if "linux" in compiler.target and mode is OPTIMIZE:
            link.append("-Wl,-z,defs")  # what is not defined is an error now, not when the library is loaded
        call([*compiler.command, "-o", str(library), *objects, *link])
        return f"built{' with sanitizers' * (mode is SANITIZE)} by {compiler.version} against torch {torch.version}"

    def compile(self, compiler: Compiler, torch: Torch, mode: list[str]) -> list[str]:
        """All sources, and one of them for each level; the object files."""
        x86 = compiler.target.startswith("x86_64")
        levels = X86_LEVELS if x86 else {"baseline": []}
        jobs = {f"rows_{name}.o": [ROWS, f"-DPRSL_LEVEL={name}", *flags] for name, flags in levels.items()}
        jobs |= {f"{Path(source).stem}.o": [source, *["-DPRSL_X86_LEVELS=1"] * x86] for source in SOURCES}
        # Headers of torch with -isystem, so that the warnings are ours alone; their messages name no folder of this
        # machine, so that every machine builds the same.
        headers = ["-isystem", f"{torch.folder}/include", f"-ffile-prefix-map={torch.folder}=torch"]
        command = [*compiler.command, *FLAGS, *mode, *words("CXXFLAGS"), *headers, "-c"]

        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / name) for name in jobs]
        with ThreadPool(self.parallel or os.cpu_count()) as pool:
            pool.map(call, [[*command, *job, "-o", to] for job, to in zip(jobs.values(), objects, strict=True)])
        return objects

    def paths(self) -> tuple[Path, Path]:
        """Of the note and the library: in the source tree for an editable install."""
        package = Path("" if self.inplace or self.editable_mode else self.build_lib, PACKAGE)
        return package / NOTE, package / LIBRARY

    def get_output_mapping(self) -> dict[str, str]:
        """Where the files belong in a wheel, and where they are."""
        return {str(Path(self.build_lib, PACKAGE, path.name)): str(path) for path in self.paths() if path.exists()}

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())


def switch(name: str) -> bool | None:
    """An environment variable that is 1, 0 or unset; empty counts as unset."""
    choices = {"1": True, "0": False, "": None}
    value = os.environ.get(name, "")
    if value not in choices:
        raise PlatformError(f"the environment variable {name} must be 1, 0 or unset, but is {value!r}")
    return choices[value]


def words(name: str) -> list[str]:
    """An environment variable that holds a command or options."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise PlatformError(f"the environment variable {name} is {os.environ[name]!r}: {error}") from error


def find_compiler() -> Compiler:
    """The compiler of $CXX, or else the first that runs."""
    candidates = [words("CXX")] if words("CXX") else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        try:
            # A compiler alone can say what it compiles for.
            target, version = (
                subprocess.run([*command, option], capture_output=True, text=True, check=True).stdout.strip()
                for option in ("-dumpmachine", "--version")
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        if target:
            return Compiler(command, version.partition("\n")[0], target)
    tried, remedy = "g++, c++, clang++", "install g++"
    if words("CXX"):
        tried, remedy = f"{os.environ['CXX']}, which is the environment variable CXX", "correct or unset CXX"
    raise PlatformError(f"no C++ compiler runs (tried {tried}): {remedy}, then {REINSTALL}")


def find_torch() -> Torch:
    """The torch that is installed: the one on the path, or the one of the environment behind an isolated build.

    pip's isolation hides the site-packages of the environment, but runs its interpreter, which still knows where they
    are.
    """
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations or [] if spec else [])]
    folders += [f"{sysconfig.get_path(name)}/torch" for name in ("purelib", "platlib")]
    required = ".".join(map(str, TORCH))
    remedy = f"install torch from PyPI first, then {REINSTALL}"
    for folder in map(Path, folders):
        if not (folder / "version.py").is_file():
            continue
        text = (folder / "version.py").read_text(encoding="utf-8")
        match = re.search(r"^__version__ *= *['\"]((\d+)\.(\d+)[^'\"]*)", text, re.MULTILINE)
        version = match[1] if match else "of unknown version"
        if match is None or (int(match[2]), int(match[3])) < TORCH:
            raise PlatformError(f"torch is {version}, but {required} is the oldest that suffices: {remedy}")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            raise PlatformError(f"torch {version} in {folder} comes without its C++ headers: {remedy}")
        return Torch(folder, version)
    raise PlatformError(f"no torch was found in {sys.prefix}: {remedy} (and --no-build-isolation where it is there)")


def call(command: list[str]) -> None:
    """Run the compiler; PlatformError with the first error it reports."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(f"{shlex.join(command)}\n{result.stdout}", end="", flush=True)
    if result.returncode:
        error = re.search(".*(error: |undefined|cannot find).*", result.stdout) or re.search(".+", result.stdout)
        message = error[0].strip() if error else "no message"
        raise PlatformError(f"{command[0]} failed with status {result.returncode}: {message} (pip -v shows all)")


HEADERS = glob("csrc/**/*.h", recursive=True)
setup(
    ext_modules=[Extension(f"{PACKAGE}._native", [ROWS, *SOURCES], depends=HEADERS, py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    # The lowest Python of requires-python. One without a GIL has no abi3, and setuptools refuses it: it gets a wheel
    # for itself.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
