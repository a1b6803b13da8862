"""What a model says of images, as rows: the part that the attack and the transfer stage share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import LEVELS, levels
from prsl_kernels.experiments.attacks.iterate import GradientHealth
from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.attacks.plans import Plan
from prsl_kernels.experiments.config import DecodingConfig
from prsl_kernels.experiments.data import Example
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel


@dataclass
class Batch:
    """Examples under attack together; `clean` (N, 3, H, W) holds 8-bit values on the model's device."""

    examples: Sequence[Example]
    references: list[list[str]]  # the primary ones
    questions: list[str] | None
    clean: Tensor

    def first(self, count: int) -> Batch:
        """Its first examples alone."""
        if count >= len(self.examples):
            return self
        questions = None if self.questions is None else self.questions[:count]
        return Batch(self.examples[:count], self.references[:count], questions, self.clean[:count])


def rows_of(
    vlm: VisionLanguageModel,
    batch: Batch,
    objective: TextObjective,
    plan: Plan,
    round_index: int,
    images: Tensor,
    *,
    arm: str,
    seed: int,
    health: GradientHealth | None = None,
    **columns: Sequence[Any],
) -> list[dict[str, Any]]:
    """One row per image of `images` (N, 3, H, W), which hold 8-bit values; `columns` has further ones."""
    with torch.no_grad():
        texts = vlm.generate(images, batch.questions)
        values = objective(images)
    moved = (levels(images) - levels(batch.clean)).flatten(1).double() / LEVELS
    found: dict[str, Sequence[Any]] = {
        "id": [example.id for example in batch.examples],
        "group": [example.group for example in batch.examples],
        "question": [example.question for example in batch.examples],
        "references": batch.references,
        "text": texts,
        "objective_value": values.double().tolist(),
        "linf": moved.abs().amax(1).tolist(),
        "l2": moved.norm(dim=1).tolist(),
        **columns,
    }
    if health is not None:
        found["zero_gradient_share"] = health.zero.tolist()
        found["nonfinite_gradient_share"] = health.nonfinite.tolist()
        found["gradient_norm"] = health.norm.tolist()
    shared = {
        "task": vlm.task,
        "arm": arm,
        "seed": seed,
        "attack": plan.name,
        "role": plan.role,
        "method": plan.method,
        "objective": plan.objective,
        "reference": plan.reference,
        "norm": plan.budget and plan.budget.norm,
        "eps": plan.budget and max(plan.budget.eps),
        "step": plan.budget and max(plan.budget.step),
        "restarts": plan.attack and plan.attack.restarts,
        "round": round_index,
    }
    return [shared | dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def load_model(
    path: str | Path,
    task: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    decoding: DecodingConfig | None = None,
) -> VisionLanguageModel:
    """A model that is only read: evaluation mode, and no gradients to parameters, which halves a backward pass."""
    vlm = VisionLanguageModel.from_pretrained(path, device=device, dtype=dtype, decoding=decoding)
    if vlm.task != task:
        raise UserError(f"model {path} is for {vlm.task}, the attack for {task}; choose a model of that task")
    vlm.eval()
    vlm.model.requires_grad_(False)
    return vlm


def fingerprint(vlm: VisionLanguageModel) -> str:
    """SHA-256 of all that decides what a model says: weights, configuration, tokenizer, normaliser, decoding."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vlm.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for config in (vlm.model.config, vlm.model.generation_config):
        settings = {} if config is None else config.to_dict()
        settings.pop("_name_or_path", None)  # where it lies does not change what it is
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(json.dumps(vlm.tokenizer.get_vocab(), sort_keys=True).encode())
    digest.update(repr((vlm.task, vlm.image_size, tuple(vlm.image_mean), tuple(vlm.image_std))).encode())
    digest.update(repr(vlm.decoding).encode())
    return digest.hexdigest()


def sha256_of(*parts: bytes) -> str:
    """Hexadecimal SHA-256 of several byte strings, which cannot be confused with other divisions of the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
