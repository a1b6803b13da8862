"""Directories in the cache: built atomically, by one process at a time, and checked file by file before use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_directory, sha256, write_json

MANIFEST = "checksums.json"


def build_verified(
    path: Path, build: Callable[[Path], None], *, stamp: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Makes the directory `path` by `build(temporary)` unless it is there and whole; returns {file: SHA-256}.

    `stamp` names what the content depends on (versions, say): a directory made with another stamp is made again.

    A process killed while building leaves no `path`; what it left beside it is removed by the next builder.
    """
    checksums = verified(path, stamp)
    if checksums is not None:
        return checksums
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            checksums = verified(path, stamp)  # another process may have made it while this one waited
            if checksums is not None:
                return checksums
            for leftover in path.parent.glob(f".{path.name}.*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
            with atomic_directory(path) as temporary:
                build(temporary)
                checksums = _checksums(temporary)
                write_json(temporary / MANIFEST, {"stamp": dict(stamp or {}), "files": checksums})
            return checksums
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free some space, or name another cache "
            "directory in the environment variable PRSL_CACHE"
        ) from error


def verified(path: Path, stamp: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """{relative file name: SHA-256} of a directory in which every file has its recorded checksum, else None."""
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = record["files"]
        whole = record["stamp"] == dict(stamp or {}) and all(sha256(path / name) == files[name] for name in files)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return files if whole and files else None


def _checksums(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): sha256(file) for file in files}
