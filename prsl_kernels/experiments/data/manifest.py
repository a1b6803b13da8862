"""The user's own data: a JSONL manifest beside the images. Every line of it is checked before anything is used."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.data.base import SPLITS, Dataset, Example, Split, fingerprint, subset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256

FILE_NAME = "manifest.jsonl"
KEYS = ("image", "split", "references", "question", "id", "group")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")

_short = reprlib.Repr()  # a hostile value may be megabytes long
_short.maxstring = _short.maxother = 100


def load(name: str, split: Split, *, limit: int | None, seed: int) -> Dataset:
    """A split of a JSONL manifest, or of `manifest.jsonl` in a folder.

    One JSON object a line, in UTF-8; empty lines are skipped:

        {"image": "photos/1.jpg", "split": "test", "references": ["a red bus"], "id": "bus-1"}
        {"image": "photos/2.jpg", "split": "test", "question": "how many dogs?", "references": ["two"]}

    `image` is a path relative to the manifest's folder and stays inside it. `split` is "train", "select" or "test";
    all rows of one image are in one split. `references` may be left out for captions of the test split alone, where
    the attack then starts from what the model says. A manifest with questions is question answering and needs one in
    every row. `id` (letters, digits, `_`, `-`; by default the line number) and `group` are optional.

    Raises:
        UserError: naming the file, the line, and the remedy.
    """
    path = Path(os.path.expanduser(name))  # that of `Path` raises where there is no such user
    if path.is_dir():
        path /= FILE_NAME
    rows = dict(_rows(path))
    root = path.parent.resolve()
    lines: dict[str, int] = {}
    home: dict[Path, tuple[str, int]] = {}
    examples: list[Example] = []
    with_question = {line for line, row in rows.items() if row.get("question") is not None}
    for line, row in rows.items():
        where = f"{path}, line {line}"
        example = _example(row, line, root, where)
        other = lines.setdefault(example.id.casefold(), line)
        if other != line:
            raise UserError(f"{where}: the id {example.id!r} is that of line {other} as well; ids must differ")
        first_split, first = home.setdefault(example.image, (row["split"], line))
        if first_split != row["split"]:
            raise UserError(
                f"{where}: the image {row['image']!r} is in the split {row['split']!r} here and in {first_split!r} in "
                f"line {first}; keep all rows of an image in one split"
            )
        if row["split"] == split:
            examples.append(example)
    without = sorted(set(rows) - with_question)
    if with_question and without:
        raise UserError(
            f"{path}, line {without[0]}: no question, but line {min(with_question)} has one; give every row a "
            "question, or make one manifest for captions and one for questions"
        )
    if not examples:
        raise UserError(f'{path}: no row has "split": "{split}"; add such rows')
    chosen = subset(examples, limit, seed, stratify=bool(with_question))
    return Dataset(
        name=name,
        task="vqa" if with_question else "captions",
        split=split,
        examples=chosen,
        license="not stated",
        attribution=f"the user's own data, {path.name} in the folder {root.name}",
        fingerprint=fingerprint(chosen, _image_hashes(chosen)),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, refused where a key occurs twice: the reader would otherwise keep the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; give openmoji, easy-vqa, or the path of a JSONL manifest or of a folder "
            f"that holds {FILE_NAME}; a published layout is given by its name and its path"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line}: not JSON ({error}); write one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: a {type(row).__name__} instead of a JSON object in braces")
        yield line, row


def _example(row: dict[str, Any], line: int, root: Path, where: str) -> Example:
    unknown = sorted(set(row) - set(KEYS))
    if unknown:
        raise UserError(f"{where}: the key {_short.repr(unknown[0])} is unknown; the keys are {', '.join(KEYS)}")
    if row.get("split") not in SPLITS:
        raise UserError(f'{where}: "split" is {_short.repr(row.get("split"))}; give one of {", ".join(SPLITS)}')
    question = None if row.get("question") is None else _text(row["question"], "question", where)
    references = [] if row.get("references") is None else row["references"]
    if not isinstance(references, list):
        raise UserError(f'{where}: "references" is a {type(references).__name__}; give a list of texts')
    texts = tuple(_text(reference, "references", where) for reference in references)
    if question is not None and not texts:
        raise UserError(f'{where}: a question without an answer; give the answer as "references": ["..."]')
    if not texts and row["split"] != "test":
        raise UserError(f'{where}: no caption, which the split {row["split"]!r} needs; give "references": ["..."]')
    identifier = row.get("id", f"line-{line:06d}")
    if not isinstance(identifier, str) or not _ID.fullmatch(identifier):
        raise UserError(f'{where}: "id" is {_short.repr(identifier)}; use 1 to 100 letters, digits, "_" and "-"')
    group = "" if row.get("group") is None else _text(row["group"], "group", where)
    return Example(identifier, _image(row.get("image"), root, where), texts, question, group)


def _text(value: Any, key: str, where: str) -> str:
    """`value` as one line of text; refuses other types, nothing but white space, and half surrogate pairs."""
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" holds {_short.repr(value)}, a {type(value).__name__}; give text in quotes')
    text = " ".join(value.split())
    if not text:
        raise UserError(f'{where}: "{key}" holds an empty text; fill it in or remove the row')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half a surrogate pair, which is no character; remove it') from None
    return text


def _image(value: Any, root: Path, where: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(
            f'{where}: "image" is {_short.repr(value)}; give the path of the image relative to the manifest'
        )
    try:
        path = (root / value).resolve()
        inside = not Path(value).is_absolute() and path.is_relative_to(root)
        exists = inside and path.is_file()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # too long a name, a loop of links, a surrogate
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{where}: the image path {_short.repr(value)} cannot be used ({reason}); correct it") from None
    if not inside:
        raise UserError(
            f"{where}: the image {_short.repr(value)} is outside of the manifest's folder {root}; move it inside"
        )
    if not exists:
        raise UserError(
            f"{where}: the image {_short.repr(value)} does not exist in {root}; restore it or remove the row"
        )
    return path


def _image_hashes(examples: tuple[Example, ...]) -> list[str]:
    known: dict[Path, str] = {}
    for example in examples:
        if example.image not in known:
            try:
                known[example.image] = sha256(example.image)
            except OSError as error:
                raise UserError(f"{example.image}: cannot be read ({error.strerror}); check its permissions") from None
    return [known[example.image] for example in examples]
