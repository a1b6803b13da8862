"""`prsl data check`: what is in a folder of data, what is missing, and what it can be used for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from prsl_kernels.experiments.data import manifest
from prsl_kernels.experiments.data.base import SPLITS, Split, Task
from prsl_kernels.experiments.data.folders import entries, named_folder
from prsl_kernels.experiments.data.index import Index
from prsl_kernels.experiments.data.layout import Layout
from prsl_kernels.experiments.data.pixels import image_faults
from prsl_kernels.experiments.data.published import EMBEDDED, LAYOUTS, open_layout
from prsl_kernels.experiments.data.table import first_of_each
from prsl_kernels.experiments.errors import UserError

_SHOWN = 20
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".gz", ".7z", ".rar")
_USES: dict[Split, str] = {
    "train": "fine-tuning",
    "select": "choosing checkpoints and hyper-parameters",
    "test": "the attack",
}


def check(path: str, layout: str | None = None, exclude_coco: str | None = None) -> tuple[list[str], bool]:
    """(what to tell the user, whether any of it can be used). Every image of the folder is decoded once.

    Raises:
        UserError: no such folder or layout, or a folder in which no layout is recognised.
    """
    place = Path(os.path.expanduser(path))
    if layout is None and (place.suffix == ".jsonl" or (place / manifest.FILE_NAME).is_file()):
        return _check_manifest(path)
    found = open_layout(_name(path, layout), path, exclude_coco)
    lines = [f"{found.root}: {found.title} (layout {found.name})"]
    usable: dict[Split, bool] = {}
    task: Task = "captions"
    skipping = False
    images = 0
    for part in dict.fromkeys(found.part(split) for split in SPLITS):
        own: list[Split] = [split for split in SPLITS if found.part(split) == part]
        try:
            index = Index(found, part)
        except UserError as error:
            lines.append(f"  {' and '.join(own)}: cannot be used: {error}")
            usable.update(dict.fromkeys(own, False))
            continue
        task = "vqa" if index.has_questions else task
        for split in own:
            images += index.counts[split]["images"]
            usable[split], faulty, told = _split(index, split)
            lines += told
            skipping = skipping or faulty
        for what, count in index.left_out.items():
            lines.append(f"  left out: {count:,} {what}")
    if isinstance(found, LAYOUTS["visual-genome"]) and exclude_coco is None:
        lines.append("  nothing is excluded as a test image of COCO: name COCO's folder with --exclude-coco")
    lines += [f"  missing: {what}" for what in found.missing()]
    if images and found.published not in (None, images):
        lines.append(f"  {images:,} of the {found.published:,} images that were published")
    return [*lines, *_uses(found, path, usable, task, exclude_coco, skipping)], any(usable.values())


def _check_manifest(path: str) -> tuple[list[str], bool]:
    """As `check`, of a manifest: there an unreadable image cannot be skipped."""
    lines, usable = [f"{path}: a manifest of one's own"], False
    for split in SPLITS:
        try:
            data = manifest.load(path, split, limit=None, seed=0)
        except UserError as error:
            lines.append(f"  {split}: cannot be used: {error}")
            continue
        images = list(dict.fromkeys(example.image for example in data.examples))
        faults = [fault for fault in image_faults(images) if fault is not None]
        lines.append(f"  {split} ({_USES[split]}): {len(images):,} images, {len(data.examples):,} rows for {data.task}")
        lines += _list("unreadable", faults, len(faults))
        usable = usable or not faults
    return [*lines, _in_recipe({"name": path})] if usable else [*lines, "It cannot be used."], usable


def _in_recipe(config: Mapping[str, str | bool]) -> str:
    text = yaml.safe_dump(dict(config), default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000)
    return f"In a recipe: data: {text.strip()}"


def _name(path: str, layout: str | None) -> str:
    if layout is not None:
        if layout not in LAYOUTS:
            raise UserError(f"--layout {layout!r} does not exist; choose one of {', '.join(LAYOUTS)}")
        return layout
    if path == EMBEDDED:
        raise UserError(f"PATH {EMBEDDED!r} needs --layout: one of {', '.join(LAYOUTS)}")
    folder = named_folder(path, "PATH")
    name = next((name for name, each in LAYOUTS.items() if each.recognises(folder)), None)
    if name is None:
        archives = sorted(entry.name for entry in entries(folder) if entry.name.casefold().endswith(_ARCHIVES))
        unpack = f"; unpack the archives that are in it ({', '.join(archives[:_SHOWN])})" if archives else ""
        raise UserError(
            f"{path}: no layout is recognised, among {', '.join(LAYOUTS)}{unpack}; name the one that it should be with "
            "--layout, which says what is missing"
        )
    return name


def _split(index: Index, split: Split) -> tuple[bool, bool, list[str]]:
    """(can be used, has faulty images, lines) of one split."""
    rows, counts = index.rows(split), index.counts[split]
    if not len(rows):
        return False, False, [f"  {split}: nothing"]
    text = f"{counts['questions']:,} questions" if counts["questions"] else f"{counts['references']:,} captions"
    lines = [f"  {split}: {counts['images']:,} images, {text}"]
    absent = index.absent(rows)
    folder = index.layout.images(index.part)
    first = first_of_each(index.pictures, absent)[:, 1]
    lines += _list("missing", [str(folder / name) for name in index.names(first[:_SHOWN])], len(first))
    there = rows if not len(absent) else np.setdiff1d(rows, absent, assume_unique=True)
    faults = index.faults(there)
    lines += _list("unreadable", list(faults.values()), len(faults))
    images = counts["images"] - counts["absent"] - len(faults)
    captionless = split != "test" and not counts["references"]
    if captionless:
        lines.append("    no captions to train on or to select by")
    return images > 0 and not captionless, bool(faults) or len(first) > 0, lines


def _list(what: str, names: list[str], count: int) -> list[str]:
    lines = [f"    {what}: {name}" for name in names[:_SHOWN]]
    return lines if count <= _SHOWN else [*lines, f"    {what}: {count - _SHOWN:,} more"]


def _uses(
    layout: Layout, path: str, usable: dict[Split, bool], task: Task, exclude: str | None, skipping: bool
) -> list[str]:
    good = [split for split in SPLITS if usable.get(split)]
    if not good:
        return ["It cannot be used."]
    lines = [f"It can be used for {task}: " + ", ".join(f"{split} ({_USES[split]})" for split in good)]
    if task == "captions" and usable["test"]:
        lines.append("and, with a question that is asked of every image, for the attack of question answering (test)")
    config: dict[str, str | bool] = {"name": layout.name, "path": path}
    config |= {} if exclude is None else {"exclude_coco": exclude}
    config |= {"skip_unreadable": True} if skipping else {}
    return [*lines, _in_recipe(config)]
