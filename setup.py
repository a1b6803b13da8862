"""Build script: what is declarative is in pyproject.toml; here is the native library, which may be left out.

The library is no Python module: it uses nothing of Python, and registers its operators with PyTorch's stable ABI when
``torch.ops.load_library`` loads it. So one file serves every Python, and every torch from 2.10 on.
``torch.utils.cpp_extension`` is not used: it must import torch, and cannot give a file flags of its own. torch is not a
build requirement either, or an isolated build would fetch gigabytes of CUDA for a few headers.

Environment variables:

    PRSL_BUILD_NATIVE=1      fail, with the reason, where the library cannot be built
    PRSL_BUILD_NATIVE=0      leave it out
    (unset)                  build it where that works; else print the reason and keep it in native_build.txt
    PRSL_BUILD_CUDA=1        build the CUDA kernels, too, even without a GPU and with a torch that has no CUDA; or fail
    PRSL_BUILD_CUDA=0        leave it out
    (unset)                  build it where torch has CUDA and there is an nvcc: no other torch could load it
    PRSL_SANITIZE=1          build it with AddressSanitizer and UndefinedBehaviorSanitizer (`make test-asan`)
    CXX, CXXFLAGS, LDFLAGS   the compiler, by default the first of g++, c++ and clang++ that runs, and options for it
    CUDA_HOME                where bin/nvcc is, if not on the PATH
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
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
CUDA_LIBRARY = "_native_cuda.abi3.so"  # of its own, since a torch without CUDA could not load it
NOTE = "native_build.txt"  # how the build went, for `prsl doctor` and the error of backend="native"
TORCH = (2, 10)  # the first whose stable ABI suffices
# pip keeps the wheels that it built, ours without a library too, and takes them again.
REINSTALL = "reinstall with pip install --force-reinstall --no-deps --no-cache-dir"

SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/binding.cpp"]
ROWS = "csrc/cpu/rows.cpp"  # compiled once for each level of the processor, of which dispatch.cpp chooses at run time
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

CUDA_KERNELS, CUDA_BINDING = "csrc/cuda/launch.cu", "csrc/cuda/binding.cpp"
CUDA_CHIPS = ("80", "90", "100")  # code for these, and for newer ones what the driver can translate
NVCC = (12, 8)  # the first that knows all of them

# No -ffast-math, nor a part of it that touches NaN, infinity or the order of operations. -fno-math-errno lets sqrt be
# an instruction.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += ["-Icsrc", f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"]
OPTIMIZE = ["-O3", "-DNDEBUG"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g", "-fno-omit-frame-pointer"]


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: bool


class Compiler(NamedTuple):
    command: list[str]
    version: str
    target: str  # such as x86_64-linux-gnu: what it compiles for, whatever this Python runs on


class BuildNative(build_ext):
    """Builds the library, or says why not; then the wheel is a pure one."""

    def run(self) -> None:
        wanted, cuda, sanitize = map(switch, ("PRSL_BUILD_NATIVE", "PRSL_BUILD_CUDA", "PRSL_SANITIZE"))
        note, library, cuda_library = self.paths()
        note.parent.mkdir(parents=True, exist_ok=True)
        # Whatever follows, no library of an earlier build may survive it. Processes that have it mapped keep it.
        library.unlink(missing_ok=True)
        cuda_library.unlink(missing_ok=True)
        try:
            if wanted is False:
                raise PlatformError(f"PRSL_BUILD_NATIVE=0 was set: unset it, then {REINSTALL}")
            built = self.build(library, SANITIZE if sanitize else OPTIMIZE)
        except (PlatformError, OSError, ValueError) as error:
            reason = f"not built: {error}"
            note.write_text(f"{reason}\n", encoding="utf-8")
            if wanted or cuda:
                name = "PRSL_BUILD_NATIVE" if wanted else "PRSL_BUILD_CUDA"
                raise PlatformError(f"{name}=1, but the native library was {reason}") from error
            print(f"prsl_kernels: the native library was {reason}", file=sys.stderr)
            self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True
            return
        try:
            built += f"; CUDA kernels {self.build_cuda(cuda_library, cuda)}"
        except (PlatformError, OSError) as error:
            built += f"; CUDA kernels not built: {error}"
            if cuda:
                raise PlatformError(f"PRSL_BUILD_CUDA=1, but the CUDA kernels were not built: {error}") from error
        finally:
            note.write_text(f"{built}\n", encoding="utf-8")

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

    def build_cuda(self, library: Path, wanted: bool | None) -> str:
        """The same for the CUDA kernels, after the rest, which defines their operators."""
        compiler, torch = find_compiler(), find_torch()
        if wanted is False:
            raise PlatformError(f"PRSL_BUILD_CUDA=0 was set: unset it, then {REINSTALL}")
        if not (wanted or torch.cuda):
            raise PlatformError(f"torch {torch.version} has no CUDA")
        nvcc, version = find_nvcc()
        folder = Path(self.build_temp)
        kernels, binding, stub = (folder / name for name in ("cuda_kernels.o", "cuda_binding.o", "libtorch_cuda.so"))
        host = ["-ccbin", compiler.command[-1]]
        codes = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in CUDA_CHIPS]
        codes.append(f"-gencode=arch=compute_{CUDA_CHIPS[-1]},code=compute_{CUDA_CHIPS[-1]}")
        call([nvcc, *host, *codes, *NVCC_FLAGS, "-c", CUDA_KERNELS, "-o", str(kernels)])
        headers = ["-DUSE_CUDA", "-isystem", f"{torch.folder}/include", f"-ffile-prefix-map={torch.folder}=torch"]
        call([*compiler.command, *FLAGS, *OPTIMIZE, *headers, "-c", CUDA_BINDING, "-o", str(binding)])
        # All that is used of torch's own CUDA library, so that one without it suffices to build with.
        source = folder / "torch_cuda.cpp"
        source.write_text('extern "C" void aoti_torch_get_current_cuda_stream() {}\n', encoding="utf-8")
        call([*compiler.command, "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", str(source), "-o", str(stub)])
        # The CUDA runtime is linked statically, and kept to ourselves.
        link = [f"-L{folder}", "-ltorch_cuda", f"-L{torch.folder}/lib", "-ltorch_cpu"]
        link += [f"-Xlinker={option}" for option in ("-z", "defs", "--exclude-libs=ALL")]
        call([nvcc, *host, "-shared", "-o", str(library), str(kernels), str(binding), *link])
        return f"built by nvcc {version} for sm_{', sm_'.join(CUDA_CHIPS)}"

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

    def paths(self) -> tuple[Path, Path, Path]:
        """Of the note and the libraries: in the source tree for an editable install."""
        package = Path("" if self.inplace or self.editable_mode else self.build_lib, PACKAGE)
        return package / NOTE, package / LIBRARY, package / CUDA_LIBRARY

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


def find_nvcc() -> tuple[str, str]:
    """The CUDA compiler, and its version."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        raise PlatformError(
            "there is no nvcc on the PATH, nor in CUDA_HOME: install the CUDA toolkit, or correct these"
        )
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release ((\d+)\.(\d+))", text)
    if match is None or (int(match[2]), int(match[3])) < NVCC:
        found, required = match[1] if match else "of unknown version", ".".join(map(str, NVCC))
        raise PlatformError(f"{nvcc} is {found}, but {required} is the oldest that suffices")
    return nvcc, match[1]


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
        has_cuda = re.search(r"^cuda[^=]*= *['\"]", text, re.MULTILINE) is not None
        return Torch(folder, version, has_cuda)
    raise PlatformError(f"no torch was found in {sys.prefix}: {remedy} (and --no-build-isolation where it is there)")


def call(command: list[str]) -> None:
    """Run the compiler; PlatformError with the first error it reports."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(f"{shlex.join(command)}\n{result.stdout}", end="", flush=True)
    if result.returncode:
        error = re.search(".*(error: |undefined|cannot find).*", result.stdout) or re.search(".+", result.stdout)
        message = error[0].strip() if error else "no message"
        raise PlatformError(f"{command[0]} failed with status {result.returncode}: {message} (pip -v shows all)")


HEADERS = [*glob("csrc/**/*.h", recursive=True), *glob("csrc/cuda/*.cu*"), CUDA_BINDING]
setup(
    ext_modules=[Extension(f"{PACKAGE}._native", [ROWS, *SOURCES], depends=HEADERS, py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    # The lowest Python of requires-python. One without a GIL has no abi3, and setuptools refuses it: it gets a wheel
    # for itself.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
