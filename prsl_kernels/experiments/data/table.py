"""A large data set on disk: one row an example, in an Arrow file that is mapped into memory.

Written once, in one pass and with one batch in memory; read by row number. What stays in memory while a set is in use
are numbers of a few bytes a row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from prsl_kernels.experiments.data.base import SPLITS, Example, Integers, Split

BATCH = 4096
ABSENT = -1
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("references", pa.list_(pa.string())),
        ("question", pa.string()),
        ("group", pa.string()),
        ("split", pa.int8()),
        ("size", pa.int64()),
        ("picture", pa.int32()),
        ("digest", pa.binary(16)),
    ]
)


@dataclass(frozen=True)
class Row:
    """An example as a layout reads it; `image` is relative to the images' folder, `size` its bytes or `ABSENT`."""

    id: str
    image: str
    size: int
    references: tuple[str, ...]
    split: Split
    question: str | None = None
    group: str = ""


def write_table(path: Path, rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Writes rows, of which those of one image follow each other; returns {split: counts}.

    Counted are `examples`, `references`, `questions`, `images`, and the `absent` among those.
    """
    counts: dict[str, dict[str, int]] = {
        split: dict.fromkeys(("examples", "references", "questions", "images", "absent"), 0) for split in SPLITS
    }
    batch: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    picture, last = -1, None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for row in rows:
            count = counts[row.split]
            if row.image != last:
                picture, last = picture + 1, row.image
                count["images"] += 1
                count["absent"] += row.size == ABSENT
            count["examples"] += 1
            count["references"] += len(row.references)
            count["questions"] += row.question is not None
            content = [row.id, row.references, row.question, row.group, row.size]
            values = (
                row.id,
                row.image,
                row.references,
                row.question,
                row.group,
                SPLITS.index(row.split),
                row.size,
                picture,
                hashlib.sha256(json.dumps(content).encode()).digest()[:16],
            )
            for column, value in zip(batch.values(), values, strict=True):
                column.append(value)
            if len(batch["id"]) == BATCH:
                writer.write_batch(pa.record_batch(batch, schema=_SCHEMA))
                batch = {name: [] for name in _SCHEMA.names}
        if batch["id"]:
            writer.write_batch(pa.record_batch(batch, schema=_SCHEMA))
    return counts


class Table:
    """Rows by their number. Can be pickled: each process maps the file for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[Table], tuple[Path]]:
        return Table, (self.path,)

    @cached_property
    def _batches(self) -> list[Any]:
        return list(pa.ipc.open_file(pa.memory_map(str(self.path))).read_all().to_batches())

    def numbers(self, column: str) -> Integers:
        """A column of integers, (rows,) int64."""
        parts = [batch.column(column).to_numpy() for batch in self._batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def codes(self, column: str) -> Integers:
        """A column of texts as the number of each among the different ones, (rows,) int64."""
        known: dict[str, int] = {}
        parts = []
        for batch in self._batches:
            encoded = batch.column(column).dictionary_encode()
            own = [known.setdefault(value, len(known)) for value in encoded.dictionary.to_pylist()]
            parts.append(np.array(own, np.int64)[encoded.indices.to_numpy()])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def select(self, rows: Integers, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of these numbers, in their order, a batch of the file at a time."""
        for place, run in itertools.groupby(rows, key=lambda row: int(row) // BATCH):
            own = np.fromiter(run, np.int64) - place * BATCH
            yield from self._batches[place].select(list(columns)).take(pa.array(own)).to_pylist()


class TableExamples(Sequence[Example]):
    """Examples made as they are asked for; a slice is of the same kind and copies nothing but row numbers.

    With `question`, each example asks that and has no references: the set's own texts answer no question.
    """

    def __init__(self, table: Table, images: Path, rows: Integers, question: str | None = None) -> None:
        self.table, self.images, self.rows, self.question = table, images, rows, question

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> TableExamples: ...

    def __getitem__(self, index: int | slice) -> Example | TableExamples:
        if isinstance(index, slice):
            return TableExamples(self.table, self.images, self.rows[index], self.question)
        return next(self._make(self.rows[index].reshape(1)))  # numpy's IndexError is the one that a sequence raises

    def __iter__(self) -> Iterator[Example]:
        return self._make(self.rows)

    def _make(self, rows: Integers) -> Iterator[Example]:
        for row in self.table.select(rows, ("id", "image", "references", "question", "group")):
            references = () if self.question is not None else tuple(row["references"])
            question = row["question"] if self.question is None else self.question
            yield Example(row["id"], self.images / row["image"], references, question, row["group"])

    def fingerprint(self) -> str:
        """SHA-256 over ids, texts, groups and sizes of the images' files, in their order."""
        digest = hashlib.sha256(json.dumps(["rows", self.question]).encode())
        for row in self.table.select(self.rows, ("digest",)):
            digest.update(row["digest"])
        return digest.hexdigest()


def first_of_each(pictures: Integers, rows: Integers) -> Integers:
    """(pictures, 2): each picture of `rows` and the first row that shows it; `pictures` (table rows,) numbers them."""
    numbers, places = np.unique(pictures[rows], return_index=True)
    return np.stack([numbers, rows[places]], axis=1)
