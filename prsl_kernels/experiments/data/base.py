"""What a data set is to the rest of the experiment: examples with an image file and texts, and seeded subsets."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Task = Literal["captions", "vqa"]
Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Example:
    """One image with its ground truth.

    `id` is unique in its data set and safe as a file name (letters, digits, `_` and `-`). `references` holds the
    captions or the answer; it is empty where the set has no ground truth. `question` belongs to question answering
    alone. `group` is the question type ("color", "shape", "yes/no") or the kind of a caption.
    """

    id: str
    image: Path
    references: tuple[str, ...]
    question: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Dataset:
    """One split of a data set. `fingerprint` is a SHA-256 over ids, texts and the content of the images."""

    name: str
    task: Task
    split: str
    examples: tuple[Example, ...]
    license: str
    attribution: str
    fingerprint: str
    description: str = ""


def rank(seed: int | str, key: str) -> str:
    """A reproducible pseudo-random sort key: the same on every machine and independent of everything else drawn."""
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def subset(examples: Sequence[Example], limit: int | None, seed: int, *, stratify: bool) -> tuple[Example, ...]:
    """A seeded random subset of at most `limit` examples, in an order in which every prefix is the smaller subset.

    With `stratify`, each group gets an equal share as long as it lasts, and an image comes a second time only after
    every image came once: a small subset then says something of each question type and its images are independent.
    """
    if limit is None:
        return tuple(examples)
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all examples")
    shuffled = sorted(examples, key=lambda example: rank(seed, example.id))
    if not stratify:
        return tuple(shuffled[:limit])
    seen: Counter[Path] = Counter()
    turns: Counter[tuple[int, str]] = Counter()
    order: list[tuple[int, int, int]] = []
    for position, example in enumerate(shuffled):
        visit = seen[example.image]
        order.append((visit, turns[visit, example.group], position))
        seen[example.image] += 1
        turns[visit, example.group] += 1
    return tuple(shuffled[position] for _, _, position in sorted(order)[:limit])


def fingerprint(examples: Iterable[Example], image_hashes: Iterable[str]) -> str:
    """SHA-256 over the examples in their order; `image_hashes` holds the SHA-256 of each example's image file."""
    digest = hashlib.sha256()
    for example, image_hash in zip(examples, image_hashes, strict=True):
        row = [example.id, example.references, example.question, example.group, image_hash]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
