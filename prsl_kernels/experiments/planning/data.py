"""How many examples a recipe's splits have, without reading what is large or may not be there; and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prsl_kernels.experiments.config import DataConfig, Recipe, Task
from prsl_kernels.experiments.errors import UserError

# Images (questions, for Visual Genome) as published: COCO 2017 (https://cocodataset.org), Visual Genome (Krishna et
# al. 2016, arXiv:1602.07332, and https://homes.cs.washington.edu/~ranjay/visualgenome), Natural Images (Roy et al.
# 2018, arXiv:1807.10108).
PUBLISHED = {"coco": (118_287, 5_000), "visual-genome": (1_445_322, 1_445_322), "natural-images": (6_899, 6_899)}
# Train, select, test; a test compares them with what the loaders give
EMBEDDED = {"openmoji": (2978, 361, 361), "easy-vqa": (34788, 3787, 9673)}
_SPLITS = ("train", "select", "test")
# References of an image, in the mean of those of the set and the one that its own clean output is
REFERENCES = {"coco": 3.0}
ASSUMED = 5_000  # where neither the recipe nor a publication says


def size_of(config: DataConfig, split: str, task: Task) -> tuple[int, str]:
    """Examples of a split, and what that is known from."""
    limit: int | None = getattr(config, f"{split}_limit")
    name = config.name
    if config.path == "embedded":
        name = "openmoji" if task == "captions" else "easy-vqa"
    if name in EMBEDDED:
        there = EMBEDDED[name][_SPLITS.index(split)]
        return (there, "embedded") if limit is None else (min(limit, there), "the recipe's limit")
    if name in PUBLISHED:
        there = PUBLISHED[name][0 if split == "train" else 1]
        return (there, f"published size of {name}, at most") if limit is None else (min(limit, there), "the limit")
    if limit is not None:
        return limit, "the recipe's limit"
    counted = _counted(config, split)
    return (ASSUMED, "assumed") if counted is None else (counted, "counted")


def _counted(config: DataConfig, split: str) -> int | None:
    """Rows of a manifest's split; None where there is none to read."""
    from prsl_kernels.experiments.data import load_dataset

    try:
        return len(load_dataset(config, split).examples)  # type: ignore[arg-type]
    except UserError:
        return None


def missing(recipe: Recipe) -> Iterator[str]:
    """What a run would look for on this machine and not find, each with its key and what to do about it."""
    from prsl_kernels.experiments.models.hub import local_folder
    from prsl_kernels.experiments.models.loading import resolve

    for task, config in recipe.tasks.items():
        place = f"tasks.{task}"
        try:
            resolve(config.base)
        except UserError as error:
            yield f"{place}.base: {error}"
        for key, data in (("data", config.data), *((f"tests.{name}", test) for name, test in config.tests.items())):
            named = {"path": data.path, "exclude_coco": data.exclude_coco}
            if data.path is None and data.name not in EMBEDDED:
                named["name"] = data.name
            for field, path in named.items():
                if path not in (None, "embedded") and not Path(path).expanduser().exists():
                    yield f"{place}.{key}.{field}: {path} is not there; put the data there, or name where it is"
        encoders = {"encoder": config.evaluate.encoder} | {
            f"encoders.{name}": other.folder for name, other in config.evaluate.encoders.items()
        }
        for key, folder in encoders.items() if "bertscore_f1" in config.evaluate.metrics else ():
            try:
                there = folder is None or local_folder(folder).is_dir()
                if not there:
                    yield f"{place}.evaluate.{key}: {folder} is not there; give the folder of an encoder"
            except UserError as error:
                yield f"{place}.evaluate.{key}: {error}"
