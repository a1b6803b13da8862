"""Downloads from the Hub as they lie on disk, without any."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def put(cache: Path, saved: Path, name: str, revision: str = "main", commit: str = "a" * 40) -> Path:
    """A downloaded repository as huggingface_hub keeps it: a commit's files are links to blobs.

    A blob is named by its etag: SHA-256 of what is large (kept by LFS), git's SHA-1 of what is small.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in saved.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            etag = hashlib.sha256(content).hexdigest()
        else:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = repository / "blobs" / etag
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(Path("../../blobs") / etag)
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return folder
