"""The attack and the transfer stage on disk: finished batches that survive a kill, and the table that they become.

Under the stage's folder:

    parts/.key                           hash of all that the rows depend on; it stands in every table as well
    parts/<attack>/part-00000.parquet    the rows of one finished batch of an attack, written after its images
    images/<attack>/round-NN/<id>.png    images of the sample that is kept
    surface.parquet                      where the recipe asks for it; see `surface`
    outputs.parquet                      all rows, written last: where it stands, the stage is whole
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.attacks.surface import FILE as SURFACE
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, write_text

OUTPUTS = "outputs.parquet"
IMAGES = "images"
_PARTS = "parts"
_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.(png|parquet)")  # what a kill leaves of an atomic write
_KEY = "prsl_kernels.key"

# One row per image, attack and recorded round. `role` is what a row is evidence for (see `config.ExtraAttack`; besides
# "primary", "control" and "transfer"), `source` the arm on which a transferred image was made, `target` the text that
# a targeted attack wanted. eps, step, linf and l2 are in [0, 1] pixels (eps and step the largest over the channels;
# null for images that are bound to no budget), linf and l2 of the 8-bit image against the clean one. Gradient shares
# and norms are means over the rounds so far, null where no gradient was taken. `image` is relative to the folder of
# the table; `png` holds the image itself where others are to be asked about it.
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("objective", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("target", pa.string()),
        pa.field("norm", pa.string()),
        pa.field("eps", pa.float64()),
        pa.field("step", pa.float64()),
        pa.field("restarts", pa.int64()),
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
        pa.field("gradient_norm", pa.float64()),
        pa.field("image", pa.string()),
        pa.field("png", pa.binary()),
    ]
)


class Store:
    """The folder of one attack stage, opened for the work that `key` stands for.

    Of several ranks, one opens and finishes it; all write parts in between.
    """

    def __init__(self, out: Path, key: str, metadata: dict[str, str], beside: Sequence[str] = ()) -> None:
        """`metadata` goes into the finished table, beside the key; `beside` are files that a whole result also has."""
        self.out = out
        self.key = key
        self._beside = tuple(beside)
        self._parts = out / _PARTS
        self._schema = SCHEMA.with_metadata({_KEY: key, **metadata})

    def open(self) -> bool:
        """Makes ready for work; True if there is nothing left to do.

        Unfinished work under another key is removed. So is a finished table that is damaged, or misses images or
        the files beside it.

        Raises:
            UserError: the folder cannot be written, or holds the finished result of another attack, or images that
                no attack put there.
        """
        outputs, images = self.out / OUTPUTS, self.out / IMAGES
        if outputs.exists():
            table = _read(outputs)
            if table is not None and _key_of(table) != self.key:
                raise UserError(f"{outputs}: the result of another attack; delete it or choose another folder")
            if (
                table is not None
                and self._images_exist(table)
                and all((self.out / name).exists() for name in self._beside)
            ):
                shutil.rmtree(self._parts, ignore_errors=True)
                return True
            say(f"{outputs}: damaged or without its images; made again")
            self._clear()
            outputs.unlink()
        elif images.exists() and not self._parts.exists():
            raise UserError(f"{images}: not from an attack; choose another folder")
        key_file = self._parts / ".key"  # no attack has a name that begins with a period
        if self._parts.exists() and not (key_file.exists() and key_file.read_text() == self.key):
            say(f"{self._parts}: unfinished work of other settings; begun anew")
            self._clear()
        try:
            write_text(key_file, self.key)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); choose another folder") from None
        for file in [*self.out.glob(".*"), *(self.out / IMAGES).rglob(".*")]:
            if _UNFINISHED.fullmatch(file.name):
                file.unlink()
        return False

    def image_path(self, attack: str, round_index: int, example_id: str) -> Path:
        """Where a PNG belongs."""
        return self.out / IMAGES / attack / f"round-{round_index:02d}" / f"{example_id}.png"

    def has_part(self, attack: str, index: int, ids: Sequence[str]) -> bool:
        """Whether an attack's batch `index`, of the examples `ids`, is finished under this key, and whole."""
        part = self._part(attack, index)
        table = _read(part) if part.exists() else None
        return (
            table is not None
            and _key_of(table) == self.key
            and set(table.column("id").to_pylist()) == set(ids)
            and set(table.column("attack").to_pylist()) == {attack}
            and self._images_exist(table)
        )

    def write_part(self, attack: str, index: int, rows: list[dict[str, Any]]) -> None:
        """Makes an attack's batch `index` finished; its images must have been written before."""
        write_rows(self._part(attack, index), pa.Table.from_pylist(rows, schema=self._schema))

    def finish(self, parts: Iterable[tuple[str, int]]) -> None:
        """Makes the result of finished batches, given as (attack, index) in the order of their rows; removes them.

        Raises:
            UserError: a part that another rank has written is not seen.
        """
        files = [self._part(attack, index) for attack, index in parts]
        for file in files:
            ranks.await_path(file)
        tables = [pq.ParquetFile(file).read() for file in files]
        write_rows(self.out / OUTPUTS, pa.concat_tables(tables))
        shutil.rmtree(self._parts)

    def _part(self, attack: str, index: int) -> Path:
        return self._parts / attack / f"part-{index:05d}.parquet"

    def _clear(self) -> None:
        # Images first: without the parts' folder, a later call could not tell whose they are.
        for folder in (self.out / IMAGES, self._parts):
            if folder.exists():
                shutil.rmtree(folder)
        (self.out / SURFACE).unlink(missing_ok=True)

    def _images_exist(self, table: pa.Table) -> bool:
        return all((self.out / image).exists() for image in table.column("image").to_pylist() if image is not None)


def write_rows(path: Path, table: pa.Table) -> None:
    """Writes a table atomically."""
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
