"""The attack stage on disk: finished batches that survive a kill, and the table that they become.

Under the stage's folder:

    parts/key                            hash of all that the rows depend on; it stands in every table as well
    parts/part-00000.parquet             the rows of one finished batch, written after its images
    images/<attack>/round-NN/<id>.png    images of the sample that is kept
    outputs.parquet                      all rows, written last: where it stands, the stage is whole
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, write_text

OUTPUTS = "outputs.parquet"
IMAGES = "images"
_PARTS = "parts"
_KEY = "prsl_kernels.key"

# One row per image, attack and recorded round. eps, step, linf and l2 are in [0, 1] pixels (eps and step the largest
# over the channels; null for the blank image, which has no budget), linf and l2 of the 8-bit image against the clean
# one. Gradient shares are means over the rounds so far, null where no gradient was taken. `image` is relative to the
# folder of the table.
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("objective", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("eps", pa.float64()),
        pa.field("step", pa.float64()),
        pa.field("round", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("question", pa.string()),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("objective_value", pa.float64(), nullable=False),
        pa.field("linf", pa.float64(), nullable=False),
        pa.field("l2", pa.float64(), nullable=False),
        pa.field("zero_gradient_share", pa.float64()),
        pa.field("nonfinite_gradient_share", pa.float64()),
        pa.field("image", pa.string()),
    ]
)


class Store:
    """The folder of one attack stage, opened for the work that `key` stands for."""

    def __init__(self, out: Path, key: str, metadata: dict[str, str]) -> None:
        """`metadata` goes into the finished table, beside the key."""
        self.out = out
        self.key = key
        self._parts = out / _PARTS
        self._schema = SCHEMA.with_metadata({_KEY: key, **metadata})

    def open(self) -> bool:
        """Makes ready for work; True if there is nothing left to do.

        Unfinished work under another key is removed. So is a finished table that is damaged or misses images.

        Raises:
            UserError: the folder cannot be written, or holds the finished result of another attack, or images that
                no attack put there.
        """
        outputs, images = self.out / OUTPUTS, self.out / IMAGES
        if outputs.exists():
            table = _read(outputs)
            if table is not None and _key_of(table) != self.key:
                raise UserError(f"{outputs}: the result of another attack; delete it or choose another folder")
            if table is not None and self._images_exist(table):
                shutil.rmtree(self._parts, ignore_errors=True)
                return True
            say(f"{outputs}: damaged or without its images; made again")
            self._clear()
            outputs.unlink()
        elif images.exists() and not self._parts.exists():
            raise UserError(f"{images}: not from an attack; choose another folder")
        key_file = self._parts / "key"
        if self._parts.exists() and not (key_file.exists() and key_file.read_text() == self.key):
            say(f"{self._parts}: unfinished work of other settings; begun anew")
            self._clear()
        try:
            write_text(key_file, self.key)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); choose another folder") from None
        return False

    def image_path(self, attack: str, round_index: int, example_id: str) -> Path:
        """Where a PNG belongs."""
        return self.out / IMAGES / attack / f"round-{round_index:02d}" / f"{example_id}.png"

    def has_part(self, index: int, ids: Sequence[str]) -> bool:
        """Whether batch `index`, of the examples `ids`, is finished under this key; a damaged one is not."""
        table = _read(self._part(index)) if self._part(index).exists() else None
        return (
            table is not None
            and _key_of(table) == self.key
            and set(table.column("id").to_pylist()) == set(ids)
            and self._images_exist(table)
        )

    def write_part(self, index: int, rows: list[dict[str, Any]]) -> None:
        """Makes batch `index` finished; its images must have been written before."""
        _write(self._part(index), pa.Table.from_pylist(rows, schema=self._schema))

    def finish(self, count: int) -> None:
        """Makes the result of `count` finished batches, and removes them."""
        _write(self.out / OUTPUTS, pa.concat_tables([pq.read_table(self._part(index)) for index in range(count)]))
        shutil.rmtree(self._parts)

    def _part(self, index: int) -> Path:
        return self._parts / f"part-{index:05d}.parquet"

    def _clear(self) -> None:
        # Images first: without the parts' folder, a later call could not tell whose they are.
        for folder in (self.out / IMAGES, self._parts):
            if folder.exists():
                shutil.rmtree(folder)

    def _images_exist(self, table: pa.Table) -> bool:
        return all((self.out / image).exists() for image in table.column("image").to_pylist() if image is not None)


def _write(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


def _read(path: Path) -> pa.Table | None:
    """The table, or None where the file is damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None


def _key_of(table: pa.Table) -> str | None:
    value = (table.schema.metadata or {}).get(_KEY.encode())
    return None if value is None else value.decode(errors="replace")
