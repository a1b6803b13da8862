"""JSON files of hundreds of megabytes, an object at a time, and the checks that hostile content needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.errors import UserError


def objects(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a list of a file: `prefix` is "item" for a list, "images.item" for one under a key.

    The standard library reads a file whole, which takes ten times its size in memory; ijson does not.

    Raises:
        UserError: there is no such file, it is no JSON, ends too early, or holds something else in the list.
    """
    import ijson

    try:
        with path.open("rb") as file:
            for number, value in enumerate(ijson.items(file, prefix, use_float=True)):
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
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not JSON, or cut off ({reason}); download the file again") from None


def text(value: Any) -> str:
    """A text as one line without blanks at its ends; "" for anything else, and for half a surrogate pair."""
    if not isinstance(value, str):
        return ""
    line = " ".join(value.split())
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
