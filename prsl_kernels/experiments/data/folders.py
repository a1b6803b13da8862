"""Folders of images as people keep them: nested by a second unpacking, littered, and possibly hostile."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from prsl_kernels.experiments.data.table import ABSENT
from prsl_kernels.experiments.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_OTHER_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")
_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))


def is_litter(name: str) -> bool:
    """What operating systems leave in folders: hidden files, `Thumbs.db`, `__MACOSX` and its `._` copies."""
    return name.startswith(".") or name.casefold() in _LITTER


def is_picture(name: str) -> bool:
    """Whether a file's name is that of an image, in upper or lower case."""
    return not is_litter(name) and os.path.splitext(name)[1].casefold() in SUFFIXES


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, litter left out, in no order."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if not is_litter(entry.name):
                    yield entry
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the path and its permissions") from None


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; links are not followed."""
    return sorted(entry.name for entry in entries(folder) if entry.is_dir(follow_symlinks=False))


def tree(root: Path, folder: Path) -> Iterator[Path]:
    """The folder and all folders below it, in no order; links to folders are not followed.

    Raises:
        UserError: one of them cannot be read, or has no name in UTF-8, or a link leads out of `root`.
    """
    waiting = [folder]
    while waiting:  # and no recursion, which would end with Python's stack
        place = waiting.pop()
        yield place
        for entry in entries(place):
            if entry.is_symlink():
                check_inside(root, Path(entry.path))
            elif entry.is_dir():
                waiting.append(checked_name(Path(entry.path)))


def checked_name(path: Path) -> Path:
    """`path`, refused where its name is not UTF-8, in which everything here is written."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is not UTF-8; rename the file or folder") from None
    return path


def named_folder(path: str, key: str) -> Path:
    """The folder that the user gave as `key`, absolute.

    Raises:
        UserError: there is none, or its name is not UTF-8.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return checked_name(folder.resolve())
        remedy = "is a file and no folder; unpack it if it is an archive, and give the folder"
        remedy = remedy if folder.exists() else "there is no such folder; correct the path"
    except (OSError, RuntimeError) as error:  # too long a name; nobody's home
        remedy = f"no folder can be at this path ({getattr(error, 'strerror', None) or error}); correct it"
    raise UserError(f"{key} {path!r}: {remedy}")


def unnested(folder: Path) -> Path:
    """`folder`, or the one of its name which is all that is in it: a zip that was unpacked into its own name."""
    for _ in range(3):
        inner = folder / folder.name
        names = [entry.name for entry in entries(folder)]
        if names != [folder.name] or inner.is_symlink() or not inner.is_dir():
            break
        folder = inner
    return folder


def image_folder(root: Path, name: str) -> Path | None:
    """The folder `name` of `root`, or None; where it holds no image but a folder of its own name, that one."""
    folder = root / name
    if not folder.is_dir():
        return None
    check_inside(root, folder)
    while (inner := folder / folder.name).is_dir() and not inner.is_symlink():
        if any(is_picture(entry.name) for entry in entries(folder)):
            break
        folder = inner
    return check_inside(root, folder)


def check_inside(root: Path, path: Path) -> Path:
    """`path`, refused where a link leads it out of `root`."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"{path}: cannot be followed ({error}); remove the link") from None
    if not inside:
        raise UserError(
            f"{path}: leads out of the folder {root}, to {path.resolve()}; links out of the data are not followed: "
            "move or mount what it points to inside"
        )
    return path


class Finder:
    """Looks for the images of one data set, and for nothing outside of its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._within = lru_cache(maxsize=1024)(self._check_folder)

    def find(self, relative: str, *, where: str) -> tuple[str, int]:
        """(the image's path relative to the root, its size in bytes), or `ABSENT` for the size.

        A suffix in another case or spelling is found. `where` begins the message of an error.

        Raises:
            UserError: a path that is no relative path, or one that leads out of the folder.
        """
        parts = PurePosixPath(relative).parts
        if not parts or relative.startswith("/") or ".." in parts or any(mark in relative for mark in "\\\0:"):
            raise UserError(f"{where}: the image {relative[:200]!r} is no path inside of {self.root}; correct it")
        relative = "/".join(parts)
        size = self._size(relative, where)
        if size == ABSENT:
            stem, suffix = os.path.splitext(relative)
            for other in _OTHER_SUFFIXES:
                if other != suffix and (size := self._size(stem + other, where)) != ABSENT:
                    return stem + other, size
        return relative, size

    def _size(self, relative: str, where: str) -> int:
        path = self.root / relative
        try:
            self._within(path.parent)
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                check_inside(self.root, path)
                found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return ABSENT
        except (OSError, ValueError) as error:  # too long a name, no permission, half a surrogate pair
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"{where}: the image {relative[:200]!r} cannot be used ({reason}); correct it") from None
        return found.st_size if stat.S_ISREG(found.st_mode) else ABSENT

    def _check_folder(self, folder: Path) -> None:
        check_inside(self.root, folder)
