"""Files that are either whole or not there: atomic writes, checksums, and reading what others wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there leftovers stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on any exception it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which would hide a shared cache from others
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; on success it replaces `path`, on any exception it is removed.

    A process that is killed leaves its temporary directory behind. The next call for the same `path` removes such
    leftovers: the temporary directory is locked while it is in use, and a lock dies with its process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path, time.time())
    temporary, lock = _locked_directory(path)
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_directory(path: Path) -> tuple[Path, int | None]:
    """A new directory beside `path`, and the descriptor that holds its lock; None where the system has no such lock."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        lock = _lock(temporary, wait=True)
        # Between its making and its lock another process may have taken it for a leftover
        if temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the folder's lock; None where another process has it, or there are no such locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(path: Path, before: float) -> None:
    """Removes temporary directories of `path` (and of nothing else) older than `before` that no process holds."""
    # Eight characters are what `tempfile` adds
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    for found in path.parent.iterdir():
        if not pattern.fullmatch(found.name) or found.is_symlink() or not found.is_dir():
            continue
        lock = _lock(found, wait=False)
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_mtime < before:
                shutil.rmtree(found, ignore_errors=True)
        finally:
            os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON atomically; non-finite numbers are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file, or raises a `UserError` that names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file in UTF-8 ({error})") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is Python 3.11's
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_root() -> Path:
    """Where verified downloads and rendered images live: `$PRSL_CACHE`, else `~/.cache/prsl_kernels`."""
    return Path(os.environ.get("PRSL_CACHE") or Path.home() / ".cache" / "prsl_kernels")
