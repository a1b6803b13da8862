"""Folders of pictures: Natural Images, whose folders are classes, and Hugging Face's `imagefolder`."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.data.base import Split
from prsl_kernels.experiments.data.columns import SPLIT_NAMES, identifier, texts
from prsl_kernels.experiments.data.folders import (
    Finder,
    check_inside,
    checked_name,
    entries,
    is_picture,
    subfolders,
    tree,
    unnested,
)
from prsl_kernels.experiments.data.jsonstream import file_name, text
from prsl_kernels.experiments.data.layout import SELECTION_SHARE, HoldOut, Layout, lacking
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import Row
from prsl_kernels.experiments.errors import UserError

CLASSES = ("airplane", "car", "cat", "dog", "flower", "fruit", "motorbike", "person")
_METADATA = ("metadata.jsonl", "metadata.csv")


class NaturalImages(Layout):
    """Natural Images (Roy et al., arXiv:1807.10108): eight folders of 6,899 images in all, and no captions.

    Kaggle's archive holds them twice, in `natural_images` and in `data/natural_images`; the first is read.
    """

    name = "natural-images"
    title = "Natural Images"
    license = "see https://www.kaggle.com/datasets/prasunroy/natural-images"
    attribution = "Natural Images by Roy et al. (arXiv:1807.10108)"
    description = (
        "Natural Images: photographs of eight classes without captions, so that references are what the base model "
        "says of them. All of it is test."
    )

    published = 6_899

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.root = _with_classes(folder) or unnested(folder)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        root = _with_classes(folder)
        return root is not None and len(_classes(root)) >= len(CLASSES) // 2

    def part(self, split: Split) -> str:
        return "all"

    def sources(self, part: str) -> Sequence[Path]:
        classes = _classes(self.root)
        if not classes:
            raise UserError(
                f"{self.root}: none of the folders {', '.join(CLASSES)} is there; unpack the archive of Natural Images "
                "in it"
            )
        for name in CLASSES:
            check_inside(self.root, self.root / name)
        return [folder for name in classes for folder in tree(self.root, self.root / name)]

    def missing(self) -> list[str]:
        there = _classes(self.root)
        return [f"the folder {name}" for name in CLASSES if name not in there]

    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        for name in _classes(self.root):
            for path, size in sorted(_pictures(self.root, self.root / name)):
                yield Row(identifier(path), path, size, (), "test", group=path.split("/")[0])


def _with_classes(folder: Path) -> Path | None:
    """Where the class folders are."""
    places = (folder, folder / "natural_images", folder / "data" / "natural_images")
    return next((unnested(place) for place in places if place.is_dir() and _classes(unnested(place))), None)


def _classes(root: Path) -> list[str]:
    return [name for name in subfolders(root) if name in CLASSES]


def _pictures(root: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """(path relative to `root`, size) of each image in `folder` and below, in no order.

    Raises:
        UserError: a link leads out of `root`, or a name is not UTF-8.
    """
    for place in tree(root, folder):
        for entry in entries(place):
            if is_picture(entry.name) and entry.is_file():
                yield checked_name(Path(entry.path)).relative_to(root).as_posix(), entry.stat().st_size


class ImageFolder(Layout):
    """Hugging Face's `imagefolder`: pictures with `metadata.jsonl` or `metadata.csv`, or in folders of classes.

    `train`, `validation` and `test` are folders of it, each with metadata of its own, or in that of the whole. A split
    that is not there is taken from train by a hash. Without metadata there are no captions, and without folders of
    splits everything is test then.
    """

    name = "imagefolder"
    title = "a folder of images (imagefolder)"
    license = "not stated"
    attribution = "the user's own data"
    description = (
        "A folder of images; the splits are its folders, and what of train, select and test is not there is "
        f"{SELECTION_SHARE:.0%} of the training images each, chosen by a hash of their names."
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.root = unnested(folder)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        root = unnested(folder)
        return bool(_metadata(root)) or any(True for _ in _pictures(root, root))

    def part(self, split: Split) -> str:
        return "all"

    def sources(self, part: str) -> Sequence[Path]:
        return [*_metadata(self.root), *tree(self.root, self.root)]

    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        files = _metadata(self.root)
        given = {name: SPLIT_NAMES[name.casefold()] for name in subfolders(self.root) if name.casefold() in SPLIT_NAMES}
        scratch.fill(
            "picture",
            "path TEXT PRIMARY KEY, size INTEGER",
            (
                found
                for folder in ([self.root / name for name in given] or [self.root])
                for found in _pictures(self.root, folder)
            ),
        )
        if not files:
            for path, size in scratch.rows("SELECT path, size FROM picture ORDER BY path"):
                folders = path.split("/")[:-1]
                split = given[folders[0]] if given else "test"
                group = next((name for name in reversed(folders) if name not in given), "")
                yield Row(identifier(path), path, size, (), split, group=group)
            return
        scratch.fill(
            "line",
            "path TEXT, split TEXT, size INTEGER, number INTEGER, content TEXT",
            _lines(self.root, files, given, tally),
        )
        tally["images that no line of the metadata names"] += scratch.count(
            "SELECT count(*) FROM picture WHERE path NOT IN (SELECT path FROM line)"
        )
        lacks = lacking(given.values())
        hold_out = HoldOut(
            self.name,
            lacks,
            (path for (path,) in scratch.rows("SELECT DISTINCT path FROM line WHERE split = 'train'")),
            scratch.count("SELECT count(DISTINCT path) FROM line WHERE split = 'train'"),
        )
        lines = scratch.rows("SELECT * FROM line ORDER BY path, number")
        for path, same in itertools.groupby(lines, key=lambda line: str(line[0])):
            captions: list[str] = []
            for _, own, size, number, content in same:
                references, question, group = json.loads(content)
                split = hold_out.split(path) if own == "train" else own
                if question is None:
                    captions += references
                else:
                    name = identifier(f"{path}#{number}")
                    yield Row(name, path, size, tuple(references), split, question, group)
            if captions or question is None:
                if not captions and own == "train" and "test" in lacks:
                    split = "test"  # pictures without captions are of no other use
                yield Row(identifier(path), path, size, tuple(captions), split, group=group)


def _metadata(root: Path) -> list[Path]:
    """The metadata files of the folder and of its splits."""
    splits = [root / name for name in subfolders(root) if name.casefold() in SPLIT_NAMES]
    found = [folder / name for folder in (root, *splits) for name in _METADATA if (folder / name).is_file()]
    return [check_inside(root, file) for file in found]


def _lines(
    root: Path, files: Sequence[Path], given: Mapping[str, Split], tally: Counter[str]
) -> Iterator[tuple[str, str, int, int, str]]:
    """(image, its folder's split, its size, number of the line, its texts as JSON) of each line without a fault."""
    finder = Finder(root)
    total = 0
    for file in files:
        folder = file.parent.relative_to(root).as_posix()
        read = _json_lines if file.suffix == ".jsonl" else _csv_lines
        for number, row in read(file):
            total += 1
            found = texts(row, tally)
            if found is None:
                continue
            where = f"{file}, line {number}"
            name = file_name(row.get("file_name"), f'"file_name" in line {number}', file)
            path, size = finder.find(f"{folder}/{name}", where=where)
            label = row.get("label")
            content = [*found, "" if label is None else text(str(label))]
            yield path, given.get(path.split("/")[0], "train"), size, total, json.dumps(content)


def _json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: a {type(row).__name__} instead of a JSON object in braces")
                yield number, row
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: a line is not JSON in UTF-8 ({error}); write one JSON object a line") from None


def _csv_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            if "file_name" not in (reader.fieldnames or ()):
                raise UserError(
                    f"{file}: the first line has no column file_name; write one, and commas between columns"
                )
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{file}, line {reader.line_num}: more cells than columns; put a text that has a comma in "
                        "double quotes"
                    )
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error}); save it as one") from None
