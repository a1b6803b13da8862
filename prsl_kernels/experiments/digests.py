"""What results depend on beside their configuration, as checksums: the package's own code, and checkpoints."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

from prsl_kernels.experiments.files import sha256

_PACKAGE = Path(__file__).resolve().parents[1]
_digests: dict[str, str] = {}


def source_digest(source: str) -> str:
    """Digest of the Python files of one module or subpackage, so that a change of code makes its results again.

    Comments, docstrings and layout are not part of it: results of hours should survive a better explanation.
    """
    if source not in _digests:
        path = _PACKAGE / source
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + _code(file.read_text(encoding="utf-8")).encode())
        _digests[source] = digest.hexdigest()
    return _digests[source]


def _code(text: str) -> str:
    """A module's syntax tree without its docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _content(file: Path) -> str:
    """SHA-256 of a file; the Hub's cache has it as the name of what a large file links to."""
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    if key not in _digests:  # every arm and seed asks for the same checkpoint, of gigabytes
        _digests[key] = sha256(file)
    return _digests[key]


def base_digest(base: str) -> str:
    """Content digest of the base checkpoint, so that a base trained anew makes everything after it anew."""
    from prsl_kernels.experiments.models.loading import resolve

    folder = resolve(base)
    listing = [(file.name, _content(file)) for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
