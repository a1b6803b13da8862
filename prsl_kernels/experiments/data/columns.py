"""Captions, questions and answers in the columns of sets whose authors named them as they liked."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prsl_kernels.experiments.data.base import Split
from prsl_kernels.experiments.data.jsonstream import text

CAPTIONS = ("text", "caption", "captions", "sentences", "sentence", "references", "description")
ANSWERS = ("answer", "answers")
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "select"), "select"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

Texts = tuple[tuple[str, ...], str | None]


def texts(row: Mapping[str, Any], tally: Counter[str]) -> Texts | None:
    """(references, question) of a row; None, counted, where a column that should hold a text is empty.

    A row without any such column has no references and no question.
    """
    if "question" in row:
        question, answers = text(row["question"]), _lines(row, ANSWERS)
        if question and answers:
            return answers, question
        tally["empty answers" if question else "empty questions"] += 1
        return None
    if not any(name in row for name in CAPTIONS):
        return (), None
    captions = _lines(row, CAPTIONS)
    if captions:
        return captions, None
    tally["images with an empty caption"] += 1
    return None


def _lines(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """The texts in the first of the columns that the row has, each once."""
    value = next((row[name] for name in names if name in row), None)
    values = value if isinstance(value, list) else [value]
    lines = (text(each.get("answer") if isinstance(each, dict) else each) for each in values)
    return tuple(dict.fromkeys(line for line in lines if line))


def identifier(path: str) -> str:
    """An id that is safe as a file name, and another one for every path."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", path.rpartition(".")[0] or path).strip("-")[-60:]
    return f"{slug}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
