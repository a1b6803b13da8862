"""Loads the compiled extension, which holds the CPU kernels, and chooses their instruction set; and the CUDA kernels.

Two environment variables are read when this is imported: ``PRSL_CPU_CAPABILITY`` forces an instruction set ("baseline",
"avx2", "avx512", "avx512_bf16"; as ``ATEN_CPU_CAPABILITY`` does for PyTorch), and ``PRSL_NATIVE_LIBRARY`` names another
build of the extension, such as one with sanitizers. The CUDA kernels are a library beside it, which only a torch with
CUDA can load.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# Of the operators that the rest of the package expects: prsl_interface() in csrc/binding.cpp.
INTERFACE = 1

_PACKAGE = Path(__file__).resolve().parent.parent


def _path() -> Path:
    """Of the extension. Absolute: a bare name would be looked for among the system's libraries."""
    named = os.environ.get("PRSL_NATIVE_LIBRARY")
    return Path(named).absolute() if named else _PACKAGE / "_native.abi3.so"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The extension, or None and the reason why it does not run; ValueError where an environment variable is wrong."""
    named, path = os.environ.get("PRSL_NATIVE_LIBRARY"), _path()
    try:
        if not path.exists():
            raise FileNotFoundError("no such file")
        torch.ops.load_library(path)  # its operators register themselves
        library = ctypes.CDLL(str(path))
        library.prsl_level.restype = library.prsl_levels.restype = ctypes.c_char_p
        library.prsl_use_level.argtypes = [ctypes.c_char_p]
        if library.prsl_interface() != INTERFACE:
            raise OSError("it was built from other sources than these")
    except (OSError, AttributeError) as error:
        cause = error.__cause__ or error  # load_library keeps the loader's words to itself
        if named:
            raise ValueError(
                f"PRSL_NATIVE_LIBRARY={named!r} cannot be loaded ({cause}): name a build of the extension, or unset it"
            ) from error
        return None, _why_missing(path, cause)
    return library, ""


def _why_missing(path: Path, error: BaseException) -> str:
    remedy = "reinstall prsl_kernels, or use backend='eager'"
    if path.exists():
        return f"the extension {path} cannot be loaded with torch {torch.__version__} ({error}): {remedy}"
    note = _notes()[0] or "not built: this installation came without it"
    if note.startswith("not built"):
        return f"the compiled extension was {note}; or use backend='eager'"
    return f"the extension {path} is missing, although it was {note}: {remedy}"


def _notes() -> tuple[str, str]:
    """How the builds of the extension and of the CUDA kernels went, as setup.py wrote it; empty where it did not."""
    try:
        note = (_PACKAGE / "native_build.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return "", ""
    extension, _, kernels = note.partition("; CUDA kernels ")
    return extension, kernels


def _load_cuda() -> str:
    """Load the CUDA kernels, which implement the operators of the extension; the reason why not, or an empty one."""
    if not available:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} comes without CUDA: install one that comes with it"
    path = _path().with_name("_native_cuda.abi3.so")
    if not path.exists():
        return f"the CUDA kernels were {_notes()[1] or 'not built: this installation came without them'}"
    try:
        torch.ops.load_library(path)
        if ctypes.CDLL(str(path)).prsl_interface() != INTERFACE:
            raise OSError("it was built from other sources than these")
    except (OSError, AttributeError) as error:
        cause = error.__cause__ or error
        return f"{path} cannot be loaded with torch {torch.__version__} ({cause}): reinstall prsl_kernels"
    return ""


def levels() -> tuple[str, ...]:
    """The instruction sets that kernels were compiled for and the machine has, best first; empty where none runs."""
    return () if _library is None else tuple(_library.prsl_levels().decode().split())


def level() -> str | None:
    """The instruction set in use: the best one, or the one that was asked for; None where the extension is missing."""
    return None if _library is None else _library.prsl_level().decode()


def use_level(name: str) -> None:
    """Use the kernels for an instruction set from now on, in all threads; ValueError where they cannot run."""
    if _library is None or not _library.prsl_use_level(name.encode()):
        raise ValueError(f"{name!r} is none of the instruction sets that can run here: {', '.join(levels()) or 'none'}")


_library, reason = _load()
available = _library is not None
cuda_reason = _load_cuda()
cuda_available = not cuda_reason

_forced = os.environ.get("PRSL_CPU_CAPABILITY")
if _forced and available:
    try:
        use_level(_forced)
    except ValueError as error:
        raise ValueError(f"PRSL_CPU_CAPABILITY={_forced!r}: {error}; choose one of these, or unset it") from None
