"""What a data set is to the rest of the experiment: examples with an image file and texts, and seeded subsets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Task = Literal["captions", "vqa"]
Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]


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
    """One split of a data set.

    `examples` need not be in memory: those of a published set are made as they are asked for, from a file that is
    mapped into memory (see `table.TableExamples`). `fingerprint` is a SHA-256 over ids, texts and the content of the
    images, or, for published sets of many gigabytes, the sizes of their files.
    """

    name: str
    task: Task
    split: str
    examples: Sequence[Example]
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
    images = _codes(example.image for example in examples) if stratify else None
    groups = _codes(example.group for example in examples) if stratify else None
    places = draw((example.id for example in examples), limit, seed, images=images, groups=groups)
    return tuple(examples[place] for place in places)


def draw(
    ids: Iterable[str], limit: int, seed: int, *, images: Integers | None = None, groups: Integers | None = None
) -> Integers:
    """The places of the examples that `subset` takes, int64, without the examples themselves.

    `images` and `groups` (N,) number each example's image and group from 0; with both the subset is stratified. Takes
    24 bytes an example while it works.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all examples")
    # The order of the first 128 bits of the rank is that of the whole rank
    content = bytearray()
    for name in ids:
        content += bytes.fromhex(rank(seed, name)[:32])
    keys = np.frombuffer(content, dtype=">u8").reshape(-1, 2)
    shuffled = np.lexsort((keys[:, 1], keys[:, 0]))
    if images is None or groups is None:
        return shuffled[:limit]
    visits = _turns(images[shuffled])
    turns = _turns(visits * (int(groups.max(initial=0)) + 1) + groups[shuffled])
    return shuffled[np.lexsort((turns, visits))[:limit]]


def _codes(values: Iterable[Hashable]) -> Integers:
    """Each value's number, counted from 0 in the order of first appearance."""
    known: dict[Hashable, int] = {}
    return np.fromiter((known.setdefault(value, len(known)) for value in values), dtype=np.int64)


def _turns(codes: Integers) -> Integers:
    """How often each element's value occurred before it."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    turns = np.empty_like(codes)
    turns[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    return turns


def fingerprint(examples: Iterable[Example], image_hashes: Iterable[str]) -> str:
    """SHA-256 over the examples in their order; `image_hashes` holds the SHA-256 of each example's image file."""
    digest = hashlib.sha256()
    for example, image_hash in zip(examples, image_hashes, strict=True):
        row = [example.id, example.references, example.question, example.group, image_hash]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
