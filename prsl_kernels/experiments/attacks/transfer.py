"""The transfer stage: what one arm says of images that were made to mislead the others.

An arm that falls for others' images more than for those made on itself has hidden its gradients rather than lost its
weakness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.attacks.plans import plans
from prsl_kernels.experiments.attacks.record import Batch, fingerprint, load_model, rows_of, sha256_of
from prsl_kernels.experiments.attacks.store import OUTPUTS, Store
from prsl_kernels.experiments.config import AttackConfig, DecodingConfig, as_dict
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.data import Dataset, Example, decode_png
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256
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
    decoding: DecodingConfig | None = None,
) -> Path:
    """Shows one arm the images that `config.transfer.attack` made on others, and writes `out/outputs.parquet`.

    It goes on after a kill, and several ranks share its batches, as in the attack stage.

    Args:
        vlm_path: the arm that is asked.
        sources: the other arms' `outputs.parquet`, by the arm's name; their rows hold the images.
        test: the examples, as in the attack stage.
        config: the attacks, as in the attack stage.
        out: the folder to write to.
        task, arm, seed, device, decoding: as in the attack stage.

    Returns:
        The path of the table; its rows are named "transfer-from-<source>".

    Raises:
        UserError: a table that is missing, damaged, or lacks images, or a model of another task.
    """
    assert config.transfer is not None
    asked: dict[str, Any] = {} if decoding is None else {"decoding": decoding}
    vlm = load_model(vlm_path, task, device, getattr(torch, config.dtype), **asked)
    examples = test.examples[: config.transfer.images]
    size = config.batch_size
    chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
    found = next(plan for plan in plans(config, vlm.image_std) if plan.name == config.transfer.attack)
    identity: dict[str, Any] = {
        "task": task,
        "arm": arm,
        "seed": seed,
        "attack": as_dict(config),
        "dataset": test.fingerprint,
        "model": fingerprint(vlm),
        "sources": {source: _digest(path) for source, path in sources.items()},
        "decoding": None if decoding is None else as_dict(decoding),
        "torch": torch.__version__,
        "device": torch.device(device).type,
    }
    key = sha256_of(json.dumps(identity, sort_keys=True).encode())
    store = Store(out, key, {"prsl_kernels.transfer": json.dumps(identity, sort_keys=True)})
    if not ranks.share(store.open() if ranks.is_main() else None):
        ranks.await_path(out)
        units = [(source, index) for source in sources for index in range(len(chunks))]
        mine = units[ranks.rank() :: ranks.world()]
        made: dict[str, dict[str, dict[str, Any]]] = {}
        for source, index in track(mine, f"transfer to {task}/{arm}", total=len(mine)):
            # Whatever the images were made for, the recorded objective is that of `_objective`.
            plan = replace(found, name=f"transfer-from-{source}", role="transfer", objective="ce", reference="primary")
            if store.has_part(plan.name, index, [example.id for example in chunks[index]]):
                continue
            if source not in made:  # one table of images at a time
                made = {source: _images(sources[source], found.name, found.last)}
            batch, images = _shown(vlm, chunks[index], made[source], sources[source])
            rows = rows_of(
                vlm, batch, _objective(vlm, batch), plan, found.last, images, arm=arm, seed=seed,
                source=[source] * len(images),
            )  # fmt: skip
            store.write_part(plan.name, index, rows)
        ranks.barrier()
        if ranks.is_main():
            store.finish([(f"transfer-from-{source}", index) for source, index in units])
        ranks.barrier()
    return out / OUTPUTS


def _shown(
    vlm: VisionLanguageModel, chunk: Sequence[Example], made: Mapping[str, dict[str, Any]], path: Path
) -> tuple[Batch, Tensor]:
    """A batch, and the images (N, 3, H, W) that its examples have in the table of another arm."""
    missing = [example.id for example in chunk if example.id not in made]
    if missing:
        raise UserError(f"{path}: has no transferable image of {missing[0]!r}; run `prsl attack` again")
    held = [made[example.id] for example in chunk]
    clean = vlm.load_pixels([example.image for example in chunk]).to(vlm.device)
    images = torch.stack([decode_png(row["png"]) for row in held]).to(vlm.device)
    if images.shape != clean.shape:
        raise UserError(f"{path}: its images are {tuple(images.shape[1:])}; run `prsl attack` again")
    questions = None if vlm.task == "captions" else [example.question or "" for example in chunk]
    return Batch(chunk, [row["references"] for row in held], questions, clean), images


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run `prsl attack` again") from None


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
