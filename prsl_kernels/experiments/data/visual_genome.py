"""Visual Genome's questions (Krishna et al., arXiv:1602.07332), as published, or in LAVIS's flat file.

question_answers.json    108,077 images, 1,445,322 questions: [{"id": 1, "qas": [{"qa_id": ..., "question": ...,
                         "answer": ..., "image_id": 1}, ...]}, ...], in version 1.0 with other names of the two ids
vg_qa.json               or this: [{"image": "image/1.jpg", "question": ..., "answer": ..., "question_id": ...,
                         "dataset": "vg"}, ...]
image_data.json          [{"image_id": 1, "coco_id": null, ...}, ...], needed where COCO's test images are excluded
VG_100K/1.jpg ...        images.zip
VG_100K_2/2.jpg ...      images2.zip; both folders may be in one named after their archive
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from prsl_kernels.experiments.data.base import Split
from prsl_kernels.experiments.data.coco import test_annotations, test_images
from prsl_kernels.experiments.data.folders import Finder, check_inside, image_folder, unnested
from prsl_kernels.experiments.data.jsonstream import file_name, integer, objects, text
from prsl_kernels.experiments.data.layout import SELECTION_SHARE, HoldOut, Layout
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import ABSENT, Row
from prsl_kernels.experiments.errors import UserError

_PAGE = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
_FILES = ("question_answers.json", "vg_qa.json")
_HALVES = {"VG_100K": "images.zip", "VG_100K_2": "images2.zip"}
_FOLDERS = (*_HALVES, "image", "images", *(f"{top}/{half}" for top in ("images", "images2") for half in _HALVES))
_GROUPS = frozenset(("what", "where", "when", "who", "why", "how"))
_WORD = re.compile(r"\w+")
# The last full stop of an answer is no part of it, unless it ends an abbreviation ("p.m.")
_FULL_STOP = re.compile(r"(?<!\.[A-Za-z])\s*\.+$")


class VisualGenome(Layout):
    """Questions about photographs. There is no official split: one is made by a hash of the image's id."""

    name = "visual-genome"
    title = "Visual Genome question answering"
    license = "CC BY 4.0"
    attribution = "Visual Genome by Krishna et al. (arXiv:1602.07332). License: CC BY 4.0"
    description = (
        f"Visual Genome's questions: {SELECTION_SHARE:.0%} of the images each are test and select, chosen by a hash of "
        "their ids, train has the others; all questions of an image are in one split. Full stops at the end of answers "
        "are taken off."
    )

    def __init__(self, folder: Path, exclude: Path | None = None) -> None:
        super().__init__(folder)
        self.root = unnested(folder)
        self.exclude = exclude

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        root = unnested(folder)
        return _questions(root) is not None or any((root / half).is_dir() for half in _HALVES)

    def part(self, split: Split) -> str:
        return "all"

    def options(self) -> dict[str, str]:
        return {} if self.exclude is None else {"exclude_coco": str(self.exclude)}

    def sources(self, part: str) -> Sequence[Path]:
        file = _questions(self.root)
        if file is None:
            raise UserError(
                f"{self.root}: question_answers.json is missing, and LAVIS's vg_qa.json too; download one of them from "
                f"{_PAGE}"
            )
        folders = [folder for name in _FOLDERS if (folder := image_folder(self.root, name)) is not None]
        if not folders:
            raise UserError(
                f"{self.root}: the image folders VG_100K and VG_100K_2 are missing; unpack images.zip and images2.zip "
                f"of {_PAGE} there"
            )
        if self.exclude is None:
            return [file, *folders]
        return [file, *folders, self._image_data(), test_annotations(self.exclude)]

    def missing(self) -> list[str]:
        there = {name.rpartition("/")[2] for name in _FOLDERS if (self.root / name).is_dir()}
        lacks = [half for half in _HALVES if half not in there]
        return [f"the image folder {half}; it is in {_HALVES[half]} of {_PAGE}" for half in lacks if len(lacks) == 1]

    def _image_data(self) -> Path:
        file = _below(self.root, "image_data.json")
        if file is None:
            raise UserError(
                f"{self.root}: image_data.json is missing, which says which images are COCO's; download it from "
                f"{_PAGE}, or leave out exclude_coco and with it the exclusion of COCO's test images"
            )
        return file

    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        file, *folders = self.sources(part)
        check_inside(self.root, file)
        self._fill_excluded(scratch)
        read = _published if file.name == _FILES[0] else _flat
        tally["questions listed twice"] += scratch.fill(
            "question",
            "id INTEGER PRIMARY KEY, image INTEGER, file TEXT, question TEXT, answers TEXT",
            read(file, tally),
        )
        kept = "FROM question"
        if self.exclude is not None:
            tested = "SELECT image FROM pair WHERE coco IN (SELECT id FROM coco)"
            for what, out in (
                ("images excluded, as they are test images of COCO", f"image IN ({tested})"),
                ("images excluded, as image_data.json says nothing of them", "image NOT IN (SELECT image FROM pair)"),
            ):
                tally[what] += scratch.count(f"SELECT count(DISTINCT image) FROM question WHERE {out}")
            kept += f" WHERE image IN (SELECT image FROM pair) AND image NOT IN ({tested})"
        hold_out = HoldOut(
            self.name,
            ("test", "select"),
            (str(number) for (number,) in scratch.rows(f"SELECT DISTINCT image {kept}")),
            scratch.count(f"SELECT count(DISTINCT image) {kept}"),
        )
        query = scratch.rows(f"SELECT * {kept} ORDER BY image, id")
        finder = Finder(self.root)
        names = [folder.relative_to(self.root).as_posix() for folder in folders if folder.is_dir()]
        last, image, size = ABSENT, "", ABSENT
        for identifier, number, name, question, answers in query:
            if number != last:
                last = number
                image, size = _find(finder, names, name, f"{file}, image {number}")
            first = _WORD.match(question.casefold())
            group = first[0] if first and first[0] in _GROUPS else "other"
            yield Row(
                f"vg-{identifier}",
                image,
                size,
                tuple(json.loads(answers)),
                hold_out.split(str(number)),
                question,
                group,
            )

    def _fill_excluded(self, scratch: Scratch) -> None:
        """Fills the tables `coco`, of the images to exclude, and `pair`, of images and their ids there, or none."""
        if self.exclude is not None:
            scratch.fill("coco", "id INTEGER PRIMARY KEY", ((number,) for number in test_images(self.exclude)))
            scratch.fill("pair", "image INTEGER PRIMARY KEY, coco INTEGER", self._pairs())

    def _pairs(self) -> Iterator[tuple[int, int | None]]:
        """(image, its id in COCO), which half of the images have."""
        file = check_inside(self.root, self._image_data())
        for entry in objects(file, "item"):
            number, other = integer(_first(entry, "image_id", "id"), "an image_id", file), entry.get("coco_id")
            yield number, None if other is None else integer(other, f"the coco_id of image {number}", file)


def _below(root: Path, name: str) -> Path | None:
    """The file `name` in the folder, in `annotations`, or in a folder of its own name."""
    places = (root / name, root / "annotations" / name, root / name / name)
    return next((place for place in places if place.is_file()), None)


def _questions(root: Path) -> Path | None:
    return next((file for name in _FILES if (file := _below(root, name)) is not None), None)


def _find(finder: Finder, folders: Sequence[str], name: str, where: str) -> tuple[str, int]:
    """The image `name`: where its own path says, or in one of the folders under the last part of it."""
    places = [name] if "/" in name else []
    places += [f"{folder}/{PurePosixPath(name).name}" for folder in folders]
    for place in places:
        image, size = finder.find(place, where=where)
        if size != ABSENT:
            return image, size
    return finder.find(places[0], where=where)


def _published(file: Path, tally: Counter[str]) -> Iterator[tuple[int, int, str, str, str]]:
    for entry in objects(file, "item"):
        number, rows = _first(entry, "id", "image_id"), entry.get("qas")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{file}: the image {str(number)[:60]!r} has no list "qas"; download it again')
        for row in rows:
            texts = _texts(row, tally)
            if texts is not None:
                own = integer(row.get("image_id", number), "an image_id", file)
                yield integer(_first(row, "qa_id", "id"), "a qa_id", file), own, f"{own}.jpg", *texts


def _first(entry: dict[str, Any], *names: str) -> Any:
    """The value under the first of the names that there is: versions 1.0 and 1.2 have different ones."""
    return next((entry[name] for name in names if name in entry), None)


def _flat(file: Path, tally: Counter[str]) -> Iterator[tuple[int, int, str, str, str]]:
    for place, row in enumerate(objects(file, "item")):
        if row.get("dataset", "vg") != "vg":
            tally["questions of other data sets"] += 1
            continue
        texts = _texts(row, tally)
        if texts is None:
            continue
        image = file_name(row.get("image"), "an image", file)
        stem = PurePosixPath(image).stem
        if not re.fullmatch(r"[0-9]{1,18}", stem):
            raise UserError(f"{file}: the image {image[:200]!r} is not named by its number; download the file again")
        yield integer(row.get("question_id", place), "a question_id", file), int(stem), image, *texts


def _texts(row: dict[str, Any], tally: Counter[str]) -> tuple[str, str] | None:
    """(question, its answers as JSON), or None where one of the two is empty."""
    question, given = text(row.get("question")), row.get("answer")
    answers = [_FULL_STOP.sub("", text(answer)) for answer in (given if isinstance(given, list) else [given])]
    answers = [answer for answer in dict.fromkeys(answers) if answer]
    if question and answers:
        return question, json.dumps(answers)
    tally["empty answers" if question else "empty questions"] += 1
    return None
