"""The attack stage: what one arm says of the clean, the attacked and the control images of a task.

Every recorded image is rounded to 8 bits, and the recorded text and objective are those of the rounded image; the
attack itself goes on from the unrounded one. Of a seeded sample of examples the images are written as PNG, read back,
and it is the images read back that the model is asked about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.bim import BIM
from prsl_kernels.experiments.attacks.budget import LEVELS, Budget, levels, quantize_inside
from prsl_kernels.experiments.attacks.controls import RandomSigns, blank_like
from prsl_kernels.experiments.attacks.iterate import GradientHealth, IterativeAttack
from prsl_kernels.experiments.attacks.objectives import TOKEN_OBJECTIVES, Objective, text_objective
from prsl_kernels.experiments.attacks.store import OUTPUTS, Store
from prsl_kernels.experiments.config import AttackConfig, as_dict
from prsl_kernels.experiments.console import say, track
from prsl_kernels.experiments.data import Dataset, Example, save_png
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel

_FORMAT = 1  # raised whenever rows of an earlier version of this module would mean something else


def attack(
    vlm_path: str | Path,
    test: Dataset,
    config: AttackConfig,
    out: Path,
    *,
    task: str,
    arm: str,
    seed: int,
    base_path: str | Path,
    device: str | torch.device = "cpu",
) -> Path:
    """Attacks `test` with one arm's model and writes `out/outputs.parquet` and `out/images/`.

    The frozen reference of an example is its first ground-truth text; where it has none, what the model at
    `base_path` says of the clean image, the same for all arms. Attacks in float32: in half precision, input
    gradients underflow to zero and look like robustness.

    A run killed at any moment goes on after its last finished batch when called again with the same arguments;
    with a finished result of the same arguments in `out`, nothing is done.

    Args:
        vlm_path: the arm's checkpoint, see `VisionLanguageModel.from_pretrained`.
        test: the examples, in order.
        config: the attack; `config.rounds` are recorded, the clean image (round 0) always.
        out: the folder to write into.
        task: "captions" or "vqa"; must be that of the model and of the data set.
        arm: the arm's name, for the rows.
        seed: the run's seed: draws the random signs and the sample whose images are kept.
        base_path: the checkpoint that all arms started from.
        device: where to attack.

    Returns:
        The path of `outputs.parquet`.

    Raises:
        UserError: a budget out of range, a model of another task, an empty data set, an example that neither has a
            reference nor gets one from the base, or a folder that cannot be used.
    """
    vlm = _load(vlm_path, task, device)
    if test.task != task:
        raise UserError(f"data set {test.name!r} is for {test.task}, the attack for {task}; choose another data set")
    if not test.examples:
        raise UserError(f"data set {test.name!r} has no examples in its split {test.split!r}; raise its limit")
    for example in test.examples:
        if task == "vqa" and not (example.question or "").strip():
            raise UserError(f"example {example.id!r} of data set {test.name!r} has no question; give it one")
    budget = Budget.from_config(config.eps, config.step, config.units, std=vlm.image_std)
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "task": task,
        "arm": arm,
        "seed": seed,
        "attack": as_dict(config),
        "budget": budget.describe(),
        "dataset": test.fingerprint,
        "ids": _sha256(*(example.id.encode() for example in test.examples)),
        "model": fingerprint(vlm),
        "torch": torch.__version__,
        "device": torch.device(device).type,
    }
    if any(not example.references for example in test.examples):
        base = _load(base_path, task, device)
        identity["base"] = fingerprint(base)
    else:
        base = None
    key = _sha256(json.dumps(identity, sort_keys=True).encode())
    store = Store(out, key, {"prsl_kernels.attack": json.dumps(identity, sort_keys=True)})
    if not store.open():
        kept = kept_ids(test, config.keep_images, seed)
        say(f"attack {task}/{arm}: {config.method}, {config.rounds[-1]} rounds, {budget.describe()}")
        AttackStage(vlm, base, config, budget, store, arm=arm, seed=seed, kept=kept).run(test.examples)
    return out / OUTPUTS


def kept_ids(test: Dataset, count: int, seed: int) -> frozenset[str]:
    """Ids of the `count` examples whose images are kept: a random sample that grows without exchanging members."""
    order = sorted((example.id for example in test.examples), key=lambda name: _sha256(f"{seed}/{name}".encode()))
    return frozenset(order[:count])


def fingerprint(vlm: VisionLanguageModel) -> str:
    """SHA-256 of all that decides what a model computes: weights, configuration, tokenizer, normaliser."""
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
    return digest.hexdigest()


@dataclass
class Batch:
    """Examples under attack together; `clean` (N, 3, H, W) holds 8-bit values on the model's device."""

    examples: Sequence[Example]
    references: list[list[str]]
    questions: list[str] | None
    clean: Tensor
    objective: Objective


class AttackStage:
    """One arm against one data set, batch by batch."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        base: VisionLanguageModel | None,
        config: AttackConfig,
        budget: Budget,
        store: Store,
        *,
        arm: str,
        seed: int,
        kept: frozenset[str],
    ) -> None:
        self.vlm, self.base, self.config, self.budget, self.store = vlm, base, config, budget, store
        self.arm, self.seed, self.kept = arm, seed, kept
        self.recorded = frozenset({0, *config.rounds})
        self.last = config.rounds[-1]

    def run(self, examples: Sequence[Example]) -> None:
        """Does the batches that are not done yet, with a progress bar that counts rounds of batches, and merges."""
        size = self.config.batch_size
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        todo = [
            index
            for index, batch in enumerate(batches)
            if not self.store.has_part(index, [example.id for example in batch])
        ]
        work = (done for index in todo for done in self._batch(index, batches[index]))
        for _ in track(work, f"attack {self.vlm.task}/{self.arm}", total=len(todo) * self._rounds_per_batch()):
            pass
        self.store.finish(len(batches))

    def _attacks(self) -> dict[str, tuple[IterativeAttack, frozenset[int]]]:
        """Name -> the attack or control, and the rounds at which it is recorded."""
        attacks: dict[str, tuple[IterativeAttack, frozenset[int]]] = {
            self.config.method: (BIM(self.budget, self.last), self.recorded)
        }
        if "random-sign" in self.config.controls:
            attacks["random-sign"] = (RandomSigns(self.budget, self.last), frozenset({self.last}))
        if "zero-step" in self.config.controls:
            # Each round without a step begins where the one before did: what two leave unchanged, all do.
            rounds = min(2, self.last)
            attacks["zero-step"] = (BIM(self.budget.without_step(), rounds), frozenset({rounds}))
        return attacks

    def _rounds_per_batch(self) -> int:
        return sum(attack.rounds + 1 for attack, _ in self._attacks().values()) + ("blank" in self.config.controls)

    def _batch(self, index: int, examples: Sequence[Example]) -> Iterator[None]:
        """Attacks and records one batch; yields after each round."""
        batch = self._open(examples)
        rows: list[dict[str, Any]] = []
        for name, (attack, recorded) in self._attacks().items():
            seeds = [_seed(self.seed, name, example.id) for example in examples]
            for state in attack.iterate(batch.objective, batch.clean, seeds=seeds):
                if state.index in recorded:
                    images = quantize_inside(state.images, batch.clean, attack.budget)
                    rows += self._record(batch, name, state.index, images, attack.budget, state.health)
                yield
        if "blank" in self.config.controls:
            rows += self._record(batch, "blank", 0, blank_like(batch.clean), None, None)
            yield
        self.store.write_part(index, rows)

    def _open(self, examples: Sequence[Example]) -> Batch:
        clean = self.vlm.load_pixels([example.image for example in examples]).to(self.vlm.device)
        questions = None if self.vlm.task == "captions" else [example.question or "" for example in examples]
        references = self._references(examples, clean, questions)
        text = self.vlm.encode([texts[0] for texts in references], questions)
        objective = text_objective(self.vlm, text, TOKEN_OBJECTIVES[self.config.objective])
        return Batch(examples, references, questions, clean, objective)

    def _references(self, examples: Sequence[Example], clean: Tensor, questions: list[str] | None) -> list[list[str]]:
        """The primary references, which do not change with the arm or the round."""
        if all(example.references for example in examples):
            return [list(example.references) for example in examples]
        assert self.base is not None  # loaded whenever an example of the data set has no reference
        with torch.no_grad():
            said = self.base.generate(clean, questions)
        references = []
        for example, text in zip(examples, said, strict=True):
            if not example.references and not text:
                raise UserError(
                    f"example {example.id!r} has no reference and the base checkpoint says nothing of it; "
                    "give it a reference or leave it out"
                )
            references.append(list(example.references) or [text])
        return references

    def _record(
        self,
        batch: Batch,
        attack: str,
        round_index: int,
        images: Tensor,
        budget: Budget | None,
        health: GradientHealth | None,
    ) -> list[dict[str, Any]]:
        """Rows of one recorded round; `images` (N, 3, H, W) hold 8-bit values."""
        images, paths = self._keep(batch, attack, round_index, images)
        with torch.no_grad():
            texts = self.vlm.generate(images, batch.questions)
            values = batch.objective(images)
        moved = (levels(images) - levels(batch.clean)).flatten(1).double() / LEVELS
        columns: dict[str, Sequence[Any]] = {
            "id": [example.id for example in batch.examples],
            "group": [example.group for example in batch.examples],
            "question": [example.question for example in batch.examples],
            "references": batch.references,
            "text": texts,
            "objective_value": values.double().tolist(),
            "linf": moved.abs().amax(1).tolist(),
            "l2": moved.norm(dim=1).tolist(),
            "image": paths,
        }
        if health is not None:
            columns["zero_gradient_share"] = health.zero.tolist()
            columns["nonfinite_gradient_share"] = health.nonfinite.tolist()
        shared = {
            "task": self.vlm.task,
            "arm": self.arm,
            "seed": self.seed,
            "attack": attack,
            "objective": self.config.objective,
            "reference": "primary",
            "eps": budget and max(budget.eps),
            "step": budget and max(budget.step),
            "round": round_index,
        }
        return [shared | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _keep(self, batch: Batch, attack: str, round_index: int, images: Tensor) -> tuple[Tensor, list[str | None]]:
        """Writes the PNGs of the declared sample and puts what they give back in their images' places."""
        paths: list[str | None] = [None] * len(batch.examples)
        places = [place for place, example in enumerate(batch.examples) if example.id in self.kept]
        if not places:
            return images, paths
        files = []
        for place in places:
            file = self.store.image_path(attack, round_index, batch.examples[place].id)
            paths[place] = file.relative_to(self.store.out).as_posix()
            save_png(images[place].cpu(), file)
            files.append(file)
        reloaded = self.vlm.load_pixels(files).to(images)
        if not torch.equal(reloaded, images[places]):
            raise RuntimeError(f"images read back from {files[0].parent} are not those that were written")
        images = images.clone()
        images[places] = reloaded
        return images, paths


def _load(path: str | Path, task: str, device: str | torch.device) -> VisionLanguageModel:
    """A model that is only read: evaluation mode, and no gradients to parameters, which halves a backward pass."""
    vlm = VisionLanguageModel.from_pretrained(path, device=device, dtype=torch.float32)
    if vlm.task != task:
        raise UserError(f"model {path} is for {vlm.task}, the attack for {task}; choose a model of that task")
    vlm.eval()
    vlm.model.requires_grad_(False)
    return vlm


def _seed(seed: int, attack: str, example_id: str) -> int:
    """A seed for one image under one attack, whatever batch it is in: 63 bits."""
    return int(_sha256(f"{seed}/{attack}/{example_id}".encode())[:16], 16) >> 1


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
