"""What a published layout is: where its parts are in a folder, and how its rows are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from prsl_kernels.experiments.data.base import Split, rank
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import Row

SELECTION_SHARE = 0.05


def share(name: str, key: str) -> float:
    """A number in [0, 1) that depends on the set and the image alone: adding images moves none to another split."""
    return int(rank(name, key)[:13], 16) / 16**13


def held_out(name: str, key: str) -> Split:
    """The split of an image of a set without official ones: a share of `SELECTION_SHARE` each is test and select."""
    number = share(name, key)
    return "test" if number < SELECTION_SHARE else "select" if number < 2 * SELECTION_SHARE else "train"


def completed(name: str, key: str, own: Split, given: Collection[Split]) -> Split:
    """The split of an image of a set that has the splits `given`: what it lacks is taken from its training images."""
    wanted = held_out(name, key)
    return own if own != "train" or wanted in given else wanted


def selection(name: str, key: str) -> Split:
    """The split of an image of an official training set, of which a share is held back for selection."""
    return "select" if share(name, key) < SELECTION_SHARE else "train"


class Layout(ABC):
    """One published layout in one folder.

    A layout consists of parts, each of which has its own index and serves one or more splits, so that a person who
    has only the test part can use that.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str]
    attribution: ClassVar[str]
    description: ClassVar[str]
    version: ClassVar[int] = 1  # of the rows; another one makes every index anew

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

    def options(self) -> dict[str, str]:
        """What else the rows depend on."""
        return {}

    def images(self, part: str) -> Path:
        """The folder that the rows' images are relative to."""
        return self.root

    def provide(self, part: str, images: Iterable[str]) -> None:
        """Makes sure that images which are there in another form are there as files; here all are files."""
        return
