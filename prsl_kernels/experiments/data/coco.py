"""COCO 2017 captions (Lin et al., arXiv:1405.0312; Chen et al., arXiv:1504.00325), as published.

    annotations/captions_train2017.json    118,287 images, 591,753 captions
    annotations/captions_val2017.json      5,000 images, 25,014 captions
    train2017/000000000009.jpg ...
    val2017/000000000139.jpg ...

The annotations may also be beside the image folders, or in the folder that is named after their archive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prsl_kernels.experiments.data.base import Split
from prsl_kernels.experiments.data.folders import Finder, check_inside, image_folder, unnested
from prsl_kernels.experiments.data.jsonstream import file_name, integer, objects, text
from prsl_kernels.experiments.data.layout import SELECTION_SHARE, HoldOut, Layout
from prsl_kernels.experiments.data.scratch import Scratch
from prsl_kernels.experiments.data.table import Row
from prsl_kernels.experiments.errors import UserError

_PAGE = "https://cocodataset.org/#download"
_ARCHIVE = "annotations_trainval2017"


class Coco(Layout):
    """Captions of photographs; all captions of an image are one example."""

    name = "coco"
    title = "COCO 2017 captions"
    license = "CC BY 4.0 (captions), Flickr's terms of use (images)"
    attribution = "COCO 2017 by the COCO Consortium (https://cocodataset.org): captions CC BY 4.0"
    description = (
        f"COCO 2017 captions: test is val2017, select {SELECTION_SHARE:.0%} of the images of train2017, chosen by a "
        "hash of their ids, train the others."
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.root = unnested(folder)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        root = unnested(folder)
        return any(_annotations(root, part) is not None or (root / part).is_dir() for part in ("train2017", "val2017"))

    def part(self, split: Split) -> str:
        return "val2017" if split == "test" else "train2017"

    def sources(self, part: str) -> Sequence[Path]:
        file = _annotations(self.root, part)
        if file is None:
            raise UserError(
                f"{self.root}: annotations/captions_{part}.json is missing; it is in {_ARCHIVE}.zip of {_PAGE}"
            )
        return [file, self._images(part)]

    def _images(self, part: str) -> Path:
        folder = image_folder(self.root, part) or image_folder(self.root, f"images/{part}")
        if folder is None:
            raise UserError(f"{self.root}: the image folder {part} is missing; unpack {part}.zip of {_PAGE} there")
        return folder

    def rows(self, part: str, scratch: Scratch, tally: Counter[str]) -> Iterator[Row]:
        file = check_inside(self.root, self.sources(part)[0])
        folder = self._images(part).relative_to(self.root).as_posix()
        tally["images listed twice"] += scratch.fill(
            "image",
            "id INTEGER PRIMARY KEY, file TEXT UNIQUE",
            _names(file),
        )
        tally["captions listed twice"] += scratch.fill(
            "caption",
            "image INTEGER, id INTEGER, content TEXT, PRIMARY KEY (image, id)",
            _captions(file, tally),
        )
        tally["captions of images that are not listed"] += scratch.count(
            "SELECT count(*) FROM caption WHERE image NOT IN (SELECT id FROM image)"
        )
        tally["images without a caption"] += scratch.count(
            "SELECT count(*) FROM image WHERE id NOT IN (SELECT image FROM caption)"
        )
        captioned = "FROM image WHERE id IN (SELECT image FROM caption)"
        hold_out = HoldOut(
            self.name,
            () if part == "val2017" else ("select",),
            (str(number) for (number,) in scratch.rows(f"SELECT id {captioned}")),
            scratch.count(f"SELECT count(*) {captioned}"),
        )
        finder = Finder(self.root)
        query = scratch.rows(
            "SELECT image.id, file, content FROM image JOIN caption ON caption.image = image.id "
            "ORDER BY image.id, caption.id"
        )

        def make(number: int, name: str, captions: list[str]) -> Row:
            image, size = finder.find(f"{folder}/{name}", where=f"{file}, image {number}")
            split: Split = "test" if part == "val2017" else hold_out.split(str(number))
            return Row(f"coco-{number:012d}", image, size, tuple(captions), split)

        current: tuple[int, str] | None = None
        captions: list[str] = []
        for number, name, content in query:
            if current is not None and current[0] != number:
                yield make(*current, captions)
                captions = []
            current = (number, name)
            captions.append(content)
        if current is not None:
            yield make(*current, captions)


def _annotations(root: Path, part: str) -> Path | None:
    name = f"captions_{part}.json"
    folders = (
        "annotations",
        "annotations/annotations",
        ".",
        *(f"{_ARCHIVE}/{below}" for below in ("annotations", ".")),
    )
    return next((place for folder in folders if (place := root / folder / name).is_file()), None)


def _names(file: Path) -> Iterator[tuple[int, str]]:
    for image in objects(file, "images.item"):
        number = integer(image.get("id"), "an image's id", file)
        yield number, file_name(image.get("file_name"), f"the file_name of image {number}", file)


def _captions(file: Path, tally: Counter[str]) -> Iterator[tuple[int, int, str]]:
    """(image, annotation, caption) of those captions that say something."""
    for number, entry in enumerate(objects(file, "annotations.item")):
        content = text(entry.get("caption"))
        if not content:
            tally["empty captions"] += 1
            continue
        identifier = integer(entry.get("id", number), "an annotation's id", file)
        yield integer(entry.get("image_id"), "an annotation's image_id", file), identifier, content


def test_annotations(folder: Path) -> Path:
    """The file that lists the images of val2017; nothing else needs to be in the folder.

    Raises:
        UserError: there is none.
    """
    file = _annotations(unnested(folder), "val2017") if folder.is_dir() else None
    if file is None:
        raise UserError(
            f"exclude_coco {str(folder)!r} has no annotations/captions_val2017.json, which lists the test images; give "
            "the folder of COCO 2017"
        )
    return file


def test_images(folder: Path) -> Iterator[int]:
    """The ids of the images of val2017."""
    file = test_annotations(folder)
    return (number for number, _ in _names(file))
