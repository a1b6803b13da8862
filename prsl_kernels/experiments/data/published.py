"""The published layouts behind `load_dataset`: which there are, and one split of one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prsl_kernels.experiments.config import DataConfig
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.data import embedded_layouts
from prsl_kernels.experiments.data.base import Dataset, Integers, Split, Task
from prsl_kernels.experiments.data.coco import Coco
from prsl_kernels.experiments.data.folders import named_folder
from prsl_kernels.experiments.data.hub import HubDatasets
from prsl_kernels.experiments.data.index import Index
from prsl_kernels.experiments.data.layout import Layout
from prsl_kernels.experiments.data.picture_folders import ImageFolder, NaturalImages
from prsl_kernels.experiments.data.table import TableExamples, first_of_each
from prsl_kernels.experiments.data.visual_genome import VisualGenome
from prsl_kernels.experiments.errors import UserError

# In the order in which a folder is tried for them: any folder of pictures is an imagefolder
_ORDER: tuple[type[Layout], ...] = (Coco, VisualGenome, NaturalImages, HubDatasets, ImageFolder)
LAYOUTS = {layout.name: layout for layout in _ORDER}
EMBEDDED = "embedded"
_SHOWN = 10


def open_layout(name: str, path: str | None, exclude_coco: str | None = None) -> Layout:
    """The layout `name` in the folder `path`; `exclude_coco` is the folder of COCO whose test images are left out.

    Raises:
        UserError: no folder, or `exclude_coco` for another layout than Visual Genome.
    """
    if path is None:
        raise UserError(f"path is missing, which {name} needs: give its folder, or {EMBEDDED!r} for drawings")
    folder = _folder(name, path, "path")
    if name == VisualGenome.name:
        exclude = None if exclude_coco is None else _folder(Coco.name, exclude_coco, "exclude_coco")
        return VisualGenome(folder, exclude)
    if exclude_coco is not None:
        raise UserError(f"exclude_coco {exclude_coco!r} belongs to visual-genome, not to {name}; leave it out")
    return LAYOUTS[name](folder)


def _folder(name: str, path: str, key: str) -> Path:
    return embedded_layouts.folder(name).resolve() if path == EMBEDDED else named_folder(path, key)


def load(config: DataConfig, split: Split, *, limit: int | None, seed: int, task: Task | None) -> Dataset:
    """One split of a published set; see `data.load_dataset`.

    The fingerprint covers ids, texts and the sizes of the images' files, but not the content of the images: hashing 18
    gigabytes at every start would serve nobody.

    Raises:
        UserError: what is missing or unreadable in the folder, or what the set cannot be used for.
    """
    layout = open_layout(config.name, config.path, config.exclude_coco)
    index = Index(layout, layout.part(split))
    where = f"{layout.root}, {split}"
    kind: Task = "vqa" if index.has_questions or config.question is not None else "captions"
    _check_task(config, kind, task, index.has_questions, where)
    rows = index.rows(split)
    if not len(rows):
        raise UserError(
            f"{where}: there is no example. {layout.description} `prsl data check` says which splits are there"
        )
    if split != "test" and not index.counts[split]["references"]:
        raise UserError(f"{where}: there are no captions to train on or to select by; use test alone")
    if config.question is not None and split != "test":
        raise UserError(f"{where}: the question {config.question!r} has no answers to train on; use test alone")
    chosen, left_out = choose(index, rows, limit, seed, stratify=kind == "vqa", skip=config.skip_unreadable)
    examples = TableExamples(index.table, layout.images(index.part), chosen, config.question)
    license, attribution = layout.license, layout.attribution
    name = layout.name
    if config.path == EMBEDDED:
        license, attribution = embedded_layouts.rights(layout.name)
        name = f"{layout.name} (embedded drawings)"
    description = layout.description
    if left_out:
        description += f" {left_out} unreadable or missing images of this split are left out."
    return Dataset(
        name=name,
        task=kind,
        split=split,
        examples=examples,
        license=license,
        attribution=attribution,
        fingerprint=examples.fingerprint(),
        description=description,
    )


def _check_task(config: DataConfig, kind: Task, wanted: Task | None, own_questions: bool, where: str) -> None:
    if config.question is not None and own_questions:
        raise UserError(f"question {config.question!r}: {where} has questions of its own; leave it out")
    if wanted is None or wanted == kind:
        return
    if wanted == "vqa":
        raise UserError(
            f"{where}: there are no questions; give the one that is asked of every image as `question`, or use the set "
            "for captions"
        )
    raise UserError(f"{where}: this is question answering, and captions are wanted; use it for vqa, or another set")


def choose(
    index: Index, rows: Integers, limit: int | None, seed: int, *, stratify: bool, skip: bool
) -> tuple[Integers, int]:
    """The rows that are used, all with an image that can be read, and how many images were left out for that.

    Only what is chosen is decoded: where that has a fault, the choice is made again without it, until none has. The
    result is that of checking everything first, since what comes before in the order does not depend on what follows.
    """
    folder, left_out = index.layout.images(index.part), 0
    absent = index.absent(rows)
    if len(absent):
        first = first_of_each(index.pictures, absent)[:, 1]
        left_out = len(first)
        names = index.names(first[:_SHOWN])
        _report([f"{folder / name}: there is no such image" for name in names], left_out, skip)
        rows = np.setdiff1d(rows, absent, assume_unique=True)
    while True:
        chosen = index.draw(rows, limit, seed, stratify=stratify)
        faults = index.faults(chosen)
        if not faults:
            break
        _report(list(faults.values()), len(faults), skip)
        left_out += len(faults)
        rows = rows[~np.isin(index.pictures[rows], np.fromiter(faults, np.int64))]
    if not len(chosen):
        raise UserError(f"{folder}: no image of the split can be read; download the images again")
    return chosen, left_out


def _report(faults: list[str], count: int, skip: bool) -> None:
    """Names the faulty images, or raises the first one as an error."""
    more = f" ({count - 1} more images of the split are missing or unreadable)" if count > 1 else ""
    if not skip:
        raise UserError(
            f"{faults[0]}{more}; restore it, or leave such images out with skip_unreadable: true. `prsl data check` "
            "lists them all"
        )
    for fault in faults[:_SHOWN]:
        say(f"left out: {fault}")
    if count > _SHOWN:
        say(f"left out: {count - _SHOWN} more images; `prsl data check` lists them all")
