"""What a published layout is: where its parts are in a folder, and how its rows are read."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from prsl_kernels.experiments.data.base import Split, rank
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import Row

SELECTION_SHARE = 0.05


def lacking(given: Iterable[Split]) -> tuple[Split, ...]:
    """The splits to hold out where a set has the splits `given`."""
    present = set(given)
    wanted: tuple[Split, ...] = ("test", "select")
    return tuple(split for split in wanted if split not in present)


class HoldOut:
    """Which training images of a set are held out for splits that it lacks.

    Each of those gets a `SELECTION_SHARE` of the images, and at least one: those with the lowest hash of set and image.
    `keys` are the `count` images, each once; in memory stay the hashes of those that are held out.
    """

    def __init__(self, name: str, lacking: Sequence[Split], keys: Iterable[str], count: int) -> None:
        self._name = name
        size = max(1, round(count * SELECTION_SHARE))
        lowest = heapq.nsmallest(size * len(lacking), (self._hash(key) for key in keys))
        self._last = [
            (split, lowest[min(size * place, len(lowest)) - 1]) for place, split in enumerate(lacking, 1) if lowest
        ]

    def _hash(self, key: str) -> str:
        return rank(f"{self._name}/select", key)[:16]

    def split(self, key: str) -> Split:
        """The split of a training image."""
        own = self._hash(key)
        return next((split for split, last in self._last if own <= last), "train")


class Layout(ABC):
    """One published layout in one folder.

    A layout consists of parts, each of which has its own index and serves one or more splits, so that a person who
    has only the test part can use that.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    license: ClassVar[str]
    attribution: ClassVar[str]
    description: ClassVar[str]
    version: ClassVar[int] = 1  # of the rows; another one makes every index anew
    published: ClassVar[int | None] = None  # how many images, where nothing in the folder says so

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the folder has anything of this layout."""

    @abstractmethod
    def part(self, split: Split) -> str:
        """The part that holds a split."""

    @abstractmethod
    def sources(self, part: str) -> Sequence[Path]:
        """Files and folders that a part is made from.

        Raises:
            UserError: one of them is missing, with what to do about it.
        """

    @abstractmethod
    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        """The rows of a part, those of one image after each other; `tally` counts what is left out, and why."""

    def missing(self) -> list[str]:
        """What of the set is not there and would not be missed by its rows."""
        return []

    def options(self) -> dict[str, str]:
        """What else the rows depend on."""
        return {}

    def images(self, part: str) -> Path:
        """The folder that the rows' images are relative to."""
        return self.root

    def provide(self, part: str, images: Iterable[str]) -> None:
        """Makes sure that images which are there in another form are there as files; here all are files."""
        return
