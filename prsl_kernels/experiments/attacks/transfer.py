"""The transfer stage: what one arm says of images that were made to mislead the others.

An arm that falls for others' images more than for those made on itself has hidden its gradients rather than lost its
weakness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.attacks.plans import plans
from prsl_kernels.experiments.attacks.record import Batch, load_model, rows_of
from prsl_kernels.experiments.attacks.store import OUTPUTS, SCHEMA, write_rows
from prsl_kernels.experiments.config import AttackConfig
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.data import Dataset, decode_png
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel


def transfer(
    vlm_path: str | Path,
    sources: Mapping[str, Path],
    test: Dataset,
    config: AttackConfig,
    out: Path,
    *,
    task: str,
    arm: str,
    seed: int,
    device: str | torch.device = "cpu",
) -> Path:
    """Shows one arm the images that `config.transfer.attack` made on others, and writes `out/outputs.parquet`.

    Args:
        vlm_path: the arm that is asked.
        sources: the other arms' `outputs.parquet`, by the arm's name; their rows hold the images.
        test: the examples, as in the attack stage.
        config: the attacks, as in the attack stage.
        out: the folder to write to.
        task, arm, seed, device: as in the attack stage.

    Returns:
        The path of the table; its rows are named "transfer-from-<source>".

    Raises:
        UserError: a table that is missing, damaged, or lacks images, or a model of another task.
    """
    assert config.transfer is not None
    vlm = load_model(vlm_path, task, device, getattr(torch, config.dtype))
    examples = test.examples[: config.transfer.images]
    size = config.batch_size
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    found = next(plan for plan in plans(config, vlm.image_std) if plan.name == config.transfer.attack)

    def work() -> Iterator[list[dict[str, Any]]]:
        for source, path in sources.items():
            made = _images(path, config.transfer.attack if config.transfer else "", found.last)
            # Whatever the images were made for, the recorded objective is that of `_objective`.
            plan = replace(found, name=f"transfer-from-{source}", role="transfer", objective="ce", reference="primary")
            for chunk in batches:
                missing = [example.id for example in chunk if example.id not in made]
                if missing:
                    raise UserError(f"{path}: has no transferable image of {missing[0]!r}; run `prsl attack` again")
                held = [made[example.id] for example in chunk]
                clean = vlm.load_pixels([example.image for example in chunk]).to(vlm.device)
                images = torch.stack([decode_png(row["png"]) for row in held]).to(vlm.device)
                if images.shape != clean.shape:
                    raise UserError(f"{path}: its images are {tuple(images.shape[1:])}; run `prsl attack` again")
                questions = None if vlm.task == "captions" else [example.question or "" for example in chunk]
                batch = Batch(chunk, [row["references"] for row in held], questions, clean)
                yield rows_of(
                    vlm, batch, _objective(vlm, batch), plan, found.last, images, arm=arm, seed=seed,
                    source=[source] * len(chunk),
                )  # fmt: skip

    total = len(sources) * len(batches)
    rows = [row for rows in track(work(), f"transfer to {task}/{arm}", total=total) for row in rows]
    write_rows(out / OUTPUTS, pa.Table.from_pylist(rows, schema=SCHEMA))
    return out / OUTPUTS


def _objective(vlm: VisionLanguageModel, batch: Batch) -> TextObjective:
    """Cross entropy of the primary reference, the same for images of all attacks."""
    return TextObjective(vlm, vlm.encode([references[0] for references in batch.references], batch.questions))


def _images(path: Path, attack: str, last: int) -> dict[str, dict[str, Any]]:
    """id -> the row with the image that the transferred attack ended at."""
    filters = [("attack", "=", attack), ("round", "=", last)]
    try:
        table = pq.read_table(path, columns=["id", "references", "png"], filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `prsl attack` again") from None
    return {row["id"]: row for row in table.to_pylist() if row["png"] is not None}
