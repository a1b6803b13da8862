"""`prsl score`: captions from JSON files that anybody may have written, and their scores as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics.scorer import ALL, score_captions

_SHAPE = {"candidates": '{"id": "caption", ...}', "references": '{"id": ["caption", ...], ...}'}


def load_captions_json(path: Path, kind: Literal["candidates", "references"]) -> dict[str, Any]:
    """Reads {id: caption} (`kind` "candidates") or {id: [captions]} ("references"). Ids stay strings.

    A byte order mark is skipped. A candidate may be empty; of the references of an id, one must not be.

    Raises:
        UserError: the file cannot be read, is not JSON in UTF-8, has an id twice, or has another shape; the message
            names the file, the id and the remedy.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSON file {_SHAPE[kind]}") from None
    try:
        text = content.decode("utf-8-sig")
        captions = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected {_SHAPE[kind]}") from None
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected {_SHAPE[kind]}") from None
    if not isinstance(captions, dict):
        raise UserError(f"{path}: {_name(captions)} where an object was expected: {_SHAPE[kind]}")
    if not captions:
        raise UserError(f"{path}: holds no captions; expected {_SHAPE[kind]}")
    for name, value in captions.items():
        complaint = _complaint(value, kind)
        if complaint:
            raise UserError(f"{path}: id {name!r}: {complaint}")
    return captions


def score_files(
    candidates: Path,
    references: Path,
    *,
    metrics: Sequence[str] = ALL,
    encoder: str | Path | None = None,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Scores the captions of one file against those of another.

    Returns:
        {"corpus": {metric: score}, "items": {id: {metric: score}}, "versions": {back end: version}}: plain, finite
        JSON.

    Raises:
        UserError: see `load_captions_json` and `score_captions`.
    """
    scores = score_captions(
        load_captions_json(candidates, "candidates"),
        load_captions_json(references, "references"),
        metrics=metrics,
        encoder=None if encoder is None else Path(encoder),
        num_layers=num_layers,
    )
    return {"corpus": scores.corpus, "items": scores.items, "versions": scores.versions}


class _Refused(Exception):
    """Valid JSON that must not be accepted."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _Refused(f"id {name!r} occurs more than once, and only one of them could count; remove the others")
        result[name] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not valid JSON, and captions are strings; remove it")


def _complaint(value: Any, kind: str) -> str | None:
    if kind == "candidates":
        if isinstance(value, list):
            return "a list where one caption was expected; give the one caption to score as a string"
        return None if isinstance(value, str) else f"{_name(value)} where a caption was expected; give a string"
    if isinstance(value, str):
        return 'a string where a list of captions was expected; write ["..."] around it'
    if not isinstance(value, list):
        return f"{_name(value)} where a list of captions was expected; give a list of strings"
    for position, text in enumerate(value):
        if not isinstance(text, str):
            return f"reference {position + 1} is {_name(text)}; give strings only"
    if not any(text.strip() for text in value):
        return "no reference that is not empty; give at least one caption, or leave the id out of both files"
    return None


def _name(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
