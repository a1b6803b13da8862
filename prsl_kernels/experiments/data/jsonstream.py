"""JSON files of hundreds of megabytes, an object at a time, and the checks that hostile content needs."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prsl_kernels.experiments.errors import UserError

_DEPTH = 200  # published files nest six levels
_BRACKETS = b"[]{}"
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))


class _Shallow:
    """A file for ijson, which takes memory by the square of the depth of what is nested: refuses what is too deep."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._depth, self._in_text, self._escaped = file, 0, False, False

    def read(self, size: int = -1) -> bytes:
        """The next bytes.

        Raises:
            ValueError: more than `_DEPTH` brackets are open.
        """
        block = self._file.read(size)
        marks = block[self._escaped :].replace(b"\\\\", b"")
        self._escaped = marks.endswith(b"\\")
        parts = marks.replace(b'\\"', b"").split(b'"')
        brackets = b"".join(parts[self._in_text :: 2]).translate(None, _OTHERS)
        self._in_text ^= len(parts) % 2 == 0
        if brackets:
            # Of the four codes, bit 2 is set in those that close and bit 1 in those that open
            depths = self._depth + np.cumsum(3 - (np.frombuffer(brackets, np.uint8) & 6).astype(np.int64))
            if depths.max() > _DEPTH:
                raise ValueError(f"more than {_DEPTH} brackets within each other")
            self._depth = int(depths[-1])
        return block


def objects(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a list of a file: `prefix` is "item" for a list, "images.item" for one under a key.

    The standard library reads a file whole, which takes ten times its size in memory; ijson does not.

    Raises:
        UserError: there is no such file, it is no JSON, ends too early, or holds something else in the list.
    """
    import ijson

    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            for number, value in enumerate(ijson.items(_Shallow(file), prefix, use_float=True)):
                if not isinstance(value, dict):
                    raise UserError(
                        f"{path}: element {number} of the list is a {type(value).__name__} and no object; "
                        "download the file again"
                    )
                yield value
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; download it, or correct the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ijson.JSONError, UnicodeDecodeError, ValueError, RecursionError) as error:
        told = error.args[0] if error.args else ""  # its first line; the others quote the file
        reason = (told.decode("ascii", "replace") if isinstance(told, bytes) else str(told)).partition("\n")[0][:200]
        raise UserError(f"{path}: not JSON in UTF-8, or cut off ({reason}); download the file again") from None


def text(value: Any) -> str:
    """A text as one line without blanks at its ends; "" for anything else, and for half a surrogate pair.

    Control characters, a terminal's escape among them, are blanks.
    """
    if not isinstance(value, str):
        return ""
    line = " ".join((value if value.isprintable() else value.translate(_CONTROLS)).split())
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return ""
    return line


def integer(value: Any, what: str, path: Path) -> int:
    """A whole number of a published file, 0 to 2**63 - 1.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise UserError(f"{path}: {what} is {str(value)[:60]!r} and no whole number; download the file again")
    return value


def file_name(value: Any, what: str, path: Path) -> str:
    """The name of an image as a published file gives it; whether there is such a file is another question.

    Raises:
        UserError: no text, or one that no file system can hold.
    """
    if not isinstance(value, str) or not value or "\0" in value or any("\ud800" <= mark <= "\udfff" for mark in value):
        raise UserError(f"{path}: {what} is {ascii(value)[:60]} and no file name; download the file again")
    return value
