"""How many examples a recipe's splits have, without reading what is large or may not be there."""

from __future__ import annotations

from prsl_kernels.experiments.config import DataConfig, Task

# Images (questions, for Visual Genome) as published: COCO 2017 (https://cocodataset.org), Visual Genome (Krishna et
# al. 2016, arXiv:1602.07332, and https://homes.cs.washington.edu/~ranjay/visualgenome), Natural Images (Roy et al.
# 2018, arXiv:1807.10108).
PUBLISHED = {"coco": (118_287, 5_000), "visual-genome": (1_445_322, 1_445_322), "natural-images": (6_899, 6_899)}
# Train, select, test; a test compares them with what the loaders give
EMBEDDED = {"openmoji": (2978, 361, 361), "easy-vqa": (34788, 3787, 9673)}
_SPLITS = ("train", "select", "test")
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
    from prsl_kernels.experiments.errors import UserError

    try:
        return len(load_dataset(config, split).examples)  # type: ignore[arg-type]
    except UserError:
        return None
