"""Loads the compiled extension, which holds the CPU kernels, and chooses their instruction set.

Two environment variables are read when this is imported: ``PRSL_CPU_CAPABILITY`` forces an instruction set ("baseline",
"avx2", "avx512", "avx512_bf16"; as ``ATEN_CPU_CAPABILITY`` does for PyTorch), and ``PRSL_NATIVE_LIBRARY`` names another
build of the extension, such as one with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# Of the operators that the rest of the package expects: prsl_interface() in csrc/binding.cpp.
INTERFACE = 1

_PACKAGE = Path(__file__).resolve().parent.parent


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The extension, or None and the reason why it does not run; ValueError where an environment variable is wrong."""
    named = os.environ.get("PRSL_NATIVE_LIBRARY")
    # Absolute: a bare name would be looked for among the system's libraries.
    path = Path(named).absolute() if named else _PACKAGE / "_native.abi3.so"
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
    try:
        note = (_PACKAGE / "native_build.txt").read_text(encoding="utf-8").strip()  # written by setup.py
    except OSError:
        note = "not built: this installation came without it"
    if note.startswith("not built"):
        return f"the compiled extension was {note}; or use backend='eager'"
    return f"the extension {path} is missing, although it was {note}: {remedy}"


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

_forced = os.environ.get("PRSL_CPU_CAPABILITY")
if _forced and available:
    try:
        use_level(_forced)
    except ValueError as error:
        raise ValueError(f"PRSL_CPU_CAPABILITY={_forced!r}: {error}; choose one of these, or unset it") from None
