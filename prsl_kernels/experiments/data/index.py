"""The index of one part of a published set: made once, kept in the cache, and mapped into memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from prsl_kernels.experiments.console import say, track
from prsl_kernels.experiments.data.base import SPLITS, Integers, Split, draw
from prsl_kernels.experiments.data.cache import build_verified
from prsl_kernels.experiments.data.layout import Layout
from prsl_kernels.experiments.data.pixels import image_faults
from prsl_kernels.experiments.data.scratch import scratch
from prsl_kernels.experiments.data.table import ABSENT, Table, first_of_each, write_table
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, cache_root, read_json, write_json

_FORMAT = "2"
_ROWS, _SUMMARY = "rows.arrow", "summary.json"
_BLOCK = 512
_State = np.ndarray[Any, np.dtype[np.int64]]


class Index:
    """Rows, counts and the state of the images of a layout's part.

    It is made anew when a file that it was made from, or a folder of images, has another time or size. An image that is
    overwritten in place changes no folder: whether it can be read is looked at again when its own time or size changes.

    Raises:
        UserError: a source is missing or damaged, rows with and without a question are mixed, or the cache cannot be
            written.
    """

    def __init__(self, layout: Layout, part: str) -> None:
        self.layout, self.part = layout, part
        facts = {"layout": f"{layout.name} {layout.version}, format {_FORMAT}", **layout.options()}
        for path in layout.sources(part):
            found = path.stat()
            facts[str(path)] = f"{found.st_mtime_ns} {0 if path.is_dir() else found.st_size}"
        place = hashlib.sha256(repr([str(layout.root.resolve()), layout.options()]).encode()).hexdigest()[:16]
        self.folder = cache_root() / "layouts" / f"{layout.name}-{part}-{place}"
        checksums = build_verified(self.folder, self._build, stamp=facts)
        self._state = self.folder.with_name(f"{self.folder.name}-{checksums[_ROWS][:16]}.npy")
        self.table = Table(self.folder / _ROWS)
        summary: dict[str, Any] = read_json(self.folder / _SUMMARY)
        self.counts: dict[str, dict[str, int]] = summary["counts"]
        self.left_out: dict[str, int] = summary["left_out"]

    def _build(self, folder: Path) -> None:
        tally: Counter[str] = Counter()
        say(f"{self.layout.folder}: reading {self.layout.title}, {self.part}; the index is kept in the cache")
        with scratch(folder) as database:
            rows = track(self.layout.rows(self.part, database, tally), "indexing")
            counts = write_table(folder / _ROWS, rows)
        asked, total = (sum(count[what] for count in counts.values()) for what in ("questions", "examples"))
        if 0 < asked < total:
            raise UserError(
                f"{self.layout.root}: {asked:,} of {total:,} rows have a question and the others none; give every row "
                "one, or make one set for captions and one for questions"
            )
        for leftover in self.folder.parent.glob(f"{self.folder.name}-*.npy"):
            leftover.unlink(missing_ok=True)
        write_json(folder / _SUMMARY, {"counts": counts, "left_out": {key: n for key, n in tally.items() if n}})

    @property
    def has_questions(self) -> bool:
        """Whether its rows ask something themselves."""
        return any(count["questions"] for count in self.counts.values())

    @cached_property
    def pictures(self) -> Integers:
        """The number of each row's image, (rows,) int64."""
        return self.table.numbers("picture")

    def rows(self, split: Split) -> Integers:
        """The numbers of the rows of a split."""
        return np.flatnonzero(self.table.numbers("split") == SPLITS.index(split))

    def absent(self, rows: Integers) -> Integers:
        """Those of the rows whose image is not there."""
        return rows[self.table.numbers("size")[rows] == ABSENT]

    def draw(self, rows: Integers, limit: int | None, seed: int, *, stratify: bool) -> Integers:
        """The rows that `base.subset` would take."""
        if limit is None or not len(rows):
            return rows
        ids = (row["id"] for row in self.table.select(rows, ("id",)))
        if not stratify:
            return rows[draw(ids, limit, seed)]
        return rows[draw(ids, limit, seed, images=self.pictures[rows], groups=self.table.codes("group")[rows])]

    def faults(self, rows: Integers) -> dict[int, str]:
        """{picture: why it cannot be read} of the rows' images; each is decoded once and remembered as good."""
        with FileLock(self._state.with_name(f".{self._state.name}.lock")):
            state = self._load_state()
            known = state.copy()
            try:
                return self._decode(rows, state)
            finally:  # what an interrupted check has seen is kept
                if (state != known).any():
                    self._save_state(state)

    def _decode(self, rows: Integers, state: _State) -> dict[int, str]:
        """As `faults`; `state` (pictures,) has the marks of the good images' files, and is brought up to date."""
        found: dict[int, str] = {}
        pairs, folder = first_of_each(self.pictures, rows), self.layout.images(self.part)
        starts = range(0, len(pairs), _BLOCK)
        for start in track(starts, f"checking images, by {_BLOCK}") if len(starts) > 1 else starts:
            block = pairs[start : start + _BLOCK]
            names = list(self.names(block[:, 1]))
            self.layout.provide(self.part, names)
            marks = [_mark(folder / name) for name in names]
            todo = [place for place, mark in enumerate(marks) if mark == 0 or state[block[place, 0]] != mark]
            faults = image_faults([folder / names[place] for place in todo]) if todo else []
            for place, fault in zip(todo, faults, strict=True):
                picture = int(block[place, 0])
                state[picture] = marks[place] if fault is None else 0
                if fault is not None:
                    found[picture] = fault
        return found

    def _load_state(self) -> _State:
        size = int(self.pictures.max(initial=-1)) + 1
        try:
            state: _State = np.load(self._state, allow_pickle=False)
            if state.dtype == np.int64 and state.shape == (size,):
                return state
        except (OSError, ValueError, EOFError):
            pass  # none yet, or damaged: everything is checked again
        return np.zeros(size, np.int64)

    def _save_state(self, state: _State) -> None:
        with atomic_file(self._state) as temporary, temporary.open("wb") as file:
            np.save(file, state, allow_pickle=False)

    def names(self, rows: Integers) -> Iterator[str]:
        """The images of these rows, relative to the images' folder."""
        return (row["image"] for row in self.table.select(rows, ("image",)))


def _mark(path: Path) -> int:
    """A number for a file's time and size; 0 where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return (found.st_mtime_ns ^ found.st_size << 40) % 2**63 or 1
