"""The attack stage: what one arm says of the clean, the attacked and the control images of a task.

Every recorded image is rounded to 8 bits, and the recorded text and objective are those of the rounded image; the
attack itself goes on from the unrounded one. Of a seeded sample of examples the images are written as PNG, read back,
and it is the images read back that the model is asked about.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.attacks.budget import Budget, quantize_inside
from prsl_kernels.experiments.attacks.objectives import TOKEN_OBJECTIVES, TextObjective, TokenObjective, defence_aware
from prsl_kernels.experiments.attacks.plans import Plan, plans
from prsl_kernels.experiments.attacks.record import Batch, fingerprint, load_model, rows_of, sha256_of
from prsl_kernels.experiments.attacks.store import OUTPUTS, SURFACE, Store
from prsl_kernels.experiments.attacks.surface import surface, write_surface
from prsl_kernels.experiments.config import ArmConfig, AttackConfig, DecodingConfig, as_dict
from prsl_kernels.experiments.console import say, track
from prsl_kernels.experiments.data import Dataset, Example, encode_png, save_png
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel

_FORMAT = 2  # raised whenever rows of an earlier version of this module would mean something else
_VANISHING = 0.1  # share of exactly zero input gradients, above which an attack's weakness proves nothing


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
    defence: tuple[ArmConfig, float] | None = None,
    decoding: DecodingConfig | None = None,
) -> Path:
    """Attacks `test` with one arm's model and writes `out/outputs.parquet`, `out/images/` and `out/surface.parquet`.

    The frozen reference of an example is its first ground-truth text; where it has none, what the model at
    `base_path` says of the clean image, the same for all arms. The model computes in `config.dtype`, float32 or
    bfloat16: in float16, input gradients underflow to zero and look like robustness.

    A run killed at any moment goes on after its last finished batch of an attack when called again with the same
    arguments; with a finished result of the same arguments in `out`, nothing is done. Several ranks make the call
    together, with an `out` that all of them see: rank r does every batch i with i % world == r, so that the batches,
    and the rows to the last bit, are those of one process.

    Args:
        vlm_path: the arm's checkpoint, see `VisionLanguageModel.from_pretrained`.
        test: the examples, in order.
        config: the attacks; their `rounds` are recorded, the clean image (round 0 of the primary attack) always.
        out: the folder to write into.
        task: "captions" or "vqa"; must be that of the model and of the data set.
        arm: the arm's name, for the rows.
        seed: the run's seed: draws random numbers, and the sample whose images are kept.
        base_path: the checkpoint that all arms started from.
        device: where to attack.
        defence: the arm's loss and the weight b that it was trained with, for attacks that know them; None is cross
            entropy.
        decoding: what the models are asked, and how they generate; None is as their checkpoints say.

    Returns:
        The path of `outputs.parquet`.

    Raises:
        UserError: a budget out of range, a model of another task, an empty data set, an example that neither has a
            reference nor gets one from the base, or a text that a targeted attack could want, or a folder that cannot
            be used.
    """
    asked: dict[str, Any] = {} if decoding is None else {"decoding": decoding}
    vlm = load_model(vlm_path, task, device, getattr(torch, config.dtype), **asked)
    _check(test, task)
    todo = plans(config, vlm.image_std)
    budget = todo[0].budget
    assert budget is not None
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "task": task,
        "arm": arm,
        "seed": seed,
        "attack": as_dict(config),
        "budget": budget.describe(),
        "dataset": test.fingerprint,
        "ids": sha256_of(*(example.id.encode() for example in test.examples)),
        "model": fingerprint(vlm),
        "torch": torch.__version__,
        "device": torch.device(device).type,
        "defence": None if defence is None else [as_dict(defence[0]) | {"note": ""}, defence[1]],
    }
    if any(not example.references for example in test.examples):
        base = load_model(base_path, task, device, **asked)
        identity["base"] = fingerprint(base)
    else:
        base = None
    if decoding is not None:
        identity["decoding"] = as_dict(decoding)
    key = sha256_of(json.dumps(identity, sort_keys=True).encode())
    beside = () if config.surface is None else (SURFACE,)
    store = Store(out, key, {"prsl_kernels.attack": json.dumps(identity, sort_keys=True)}, beside)
    if not ranks.share(store.open() if ranks.is_main() else None):
        ranks.await_path(out)
        kept = kept_ids(test, config.keep_images, seed)
        say(f"attack {task}/{arm}: {config.method}, {config.rounds[-1]} rounds, {budget.describe()}")
        if config.extra:
            say(f"attack {task}/{arm}: and {', '.join(extra.name for extra in config.extra)}")
        AttackStage(vlm, base, config, todo, store, arm=arm, seed=seed, kept=kept, defence=defence).run(test.examples)
        if ranks.is_main():
            _warn_of_vanishing_gradients(out / OUTPUTS, f"{task}/{arm}")
    return out / OUTPUTS


def _check(test: Dataset, task: str) -> None:
    """Refuses a data set that cannot be attacked."""
    if test.task != task:
        raise UserError(f"data set {test.name!r} is for {test.task}, the attack for {task}; choose another data set")
    if not test.examples:
        raise UserError(f"data set {test.name!r} has no examples in its split {test.split!r}; raise its limit")
    for example in test.examples:
        if task == "vqa" and not (example.question or "").strip():
            raise UserError(f"example {example.id!r} of data set {test.name!r} has no question; give it one")


def kept_ids(test: Dataset, count: int, seed: int) -> frozenset[str]:
    """Ids of the `count` examples whose images are kept: a random sample that grows without exchanging members."""
    order = sorted((example.id for example in test.examples), key=lambda name: sha256_of(f"{seed}/{name}".encode()))
    return frozenset(order[:count])


def wanted_texts(examples: Sequence[Example]) -> dict[str, str]:
    """id -> the text that a targeted attack wants: the first one of another example of the same group.

    It depends on the id and on what texts there are, so it is the same for all arms and seeds, and never the
    example's own. Where its group has no other text, those of all groups count; where there is none at all, the id is
    missing.
    """
    by_group: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        by_group[example.group].add(example.references[0])
    everywhere = set().union(*by_group.values())
    wanted = {}
    for example in examples:
        own = set(example.references)
        others = sorted(by_group[example.group] - own) or sorted(everywhere - own)
        if others:
            wanted[example.id] = others[int(sha256_of(example.id.encode())[:16], 16) % len(others)]
    return wanted


@dataclass
class AttackStage:
    """One arm against one data set: batch by batch, and of each batch attack by attack."""

    vlm: VisionLanguageModel
    base: VisionLanguageModel | None
    config: AttackConfig
    plans: Sequence[Plan]
    store: Store
    arm: str = field(kw_only=True)
    seed: int = field(kw_only=True)
    kept: frozenset[str] = field(kw_only=True)
    defence: tuple[ArmConfig, float] | None = field(default=None, kw_only=True)

    def run(self, examples: Sequence[Example]) -> None:
        """Does this rank's batches that are not done yet, with a bar that counts rounds of batches, and merges."""
        size = self.config.batch_size
        transfer = self.config.transfer
        self._transferred = {example.id for example in examples[: transfer.images]} if transfer is not None else set()
        self._wanted = wanted_texts([example for example in examples if example.references])
        self._check_targets(examples)
        starts = list(enumerate(range(0, len(examples), size)))
        units: list[tuple[int, list[Plan]]] = []
        for index, start in starts[ranks.rank() :: ranks.world()]:
            held = [plan for plan in self.plans if plan.images is None or plan.images > start]
            ids = {plan.name: [e.id for e in self._share(plan, examples, start)] for plan in held}
            units.append((index, [plan for plan in held if not self.store.has_part(plan.name, index, ids[plan.name])]))
        work = (
            done
            for index, held in units
            for done in self._batch(index, held, examples, index * size)
        )  # fmt: skip
        total = sum(plan.rounds for _, held in units for plan in held)
        for _ in track(work, f"attack {self.vlm.task}/{self.arm}", total=total):
            pass
        ranks.barrier()
        if ranks.is_main():
            self._surface(examples)
            self.store.finish([(plan.name, index) for index, start in starts
                               for plan in self.plans if plan.images is None or plan.images > start])  # fmt: skip
        ranks.barrier()

    def _share(self, plan: Plan, examples: Sequence[Example], start: int) -> Sequence[Example]:
        stop = start + self.config.batch_size
        return examples[start : stop if plan.images is None else min(stop, plan.images)]

    def _batch(self, index: int, held: Sequence[Plan], examples: Sequence[Example], start: int) -> Iterator[None]:
        """The attacks of one batch that are still to be done; yields after each round."""
        if not held:
            return
        whole = self._open(examples[start : start + self.config.batch_size])
        secondary: list[str] | None = None
        for plan in held:
            if plan.reference == "secondary" and secondary is None:
                secondary = self.vlm.generate(whole.clean, whole.questions)
            batch = whole.first(len(self._share(plan, examples, start)))
            rows: list[dict[str, Any]] = []
            for done in self._attack(plan, batch, secondary):
                rows += done
                yield
            self.store.write_part(plan.name, index, rows)

    def _attack(self, plan: Plan, batch: Batch, secondary: list[str] | None) -> Iterator[list[dict[str, Any]]]:
        """One attack on one batch: after each round the rows that are recorded of it."""
        columns: dict[str, list[Any]] = {}
        texts = [references[0] for references in batch.references]
        if plan.reference == "secondary" and secondary is not None:
            # A model that says nothing has no words that an attack could take from it.
            own = secondary[: len(texts)]
            columns["reference"] = ["secondary" if said else "primary" for said in own]
            texts = [said or text for said, text in zip(own, texts, strict=True)]
        if plan.objective == "target":
            texts = [self._wanted[example.id] for example in batch.examples]
            columns["target"] = texts
        objective = TextObjective(self.vlm, self.vlm.encode(texts, batch.questions), self._token_objective(plan))
        seeds = [_seed(self.seed, plan.name, example.id) for example in batch.examples]
        if plan.attack is None:
            assert plan.still is not None
            budget = plan.budget or self.plans[0].budget
            assert budget is not None
            images = plan.still(batch.clean, budget, seeds)
            if plan.budget is not None:
                images = _rounded(images, batch.clean, plan.budget)
            yield self._record(plan, batch, objective, 0, images, None, columns)
            return
        for state in plan.attack.iterate(objective, batch.clean, seeds=seeds):
            if state.index not in plan.recorded:
                yield []
                continue
            images = _rounded(state.images, batch.clean, plan.attack.budget)
            yield self._record(plan, batch, objective, state.index, images, state.health, columns)

    def _record(
        self, plan: Plan, batch: Batch, objective: TextObjective, index: int, images: Tensor, health: Any,
        columns: dict[str, list[Any]],
    ) -> list[dict[str, Any]]:  # fmt: skip
        images, paths = self._keep(batch, plan.name, index, images)
        transfer = self.config.transfer
        pngs: list[bytes | None] = [None] * len(images)
        if transfer is not None and plan.name == transfer.attack and index == plan.last:
            pngs = [encode_png(image) if example.id in self._transferred else None
                    for example, image in zip(batch.examples, images, strict=True)]  # fmt: skip
        return rows_of(
            self.vlm, batch, objective, plan, index, images,
            arm=self.arm, seed=self.seed, health=health, image=paths, png=pngs, **columns,
        )  # fmt: skip

    def _check_targets(self, examples: Sequence[Example]) -> None:
        """Refuses at once a targeted attack on an example for which there is nothing to want."""
        for plan in self.plans:
            for example in examples[: plan.images] if plan.objective == "target" else ():
                if example.id not in self._wanted:
                    own = repr(example.references[0]) if example.references else "what the base says"
                    raise UserError(
                        f"attack {plan.name!r}, example {example.id!r}: there is no other text than {own} that a "
                        "targeted attack could want; leave that attack out, or take more examples, with references"
                    )

    def _token_objective(self, plan: Plan) -> TokenObjective:
        if plan.objective in TOKEN_OBJECTIVES:
            return TOKEN_OBJECTIVES[plan.objective]
        if self.defence is None:
            return TOKEN_OBJECTIVES["ce"]
        arm, b = self.defence
        return defence_aware(arm, b, 1 if plan.objective == "ce+bd" else -1)

    def _surface(self, examples: Sequence[Example]) -> None:
        config = self.config.surface
        if config is None:
            return
        budget = self.plans[0].budget
        assert budget is not None
        size, found = self.config.batch_size, []
        shown = examples[: config.images]
        for start in range(0, len(shown), size):
            # The whole batch is opened, so that what the base says of it is to the bit what it said before.
            batch = self._open(examples[start : start + size]).first(config.images - start)
            texts = self.vlm.encode([references[0] for references in batch.references], batch.questions)
            seeds = [_seed(self.seed, "surface", example.id) for example in batch.examples]
            places, values = surface(TextObjective(self.vlm, texts), batch.clean, budget, seeds, config.points)
            found.append(values)
        keys = {"task": self.vlm.task, "arm": self.arm, "seed": self.seed}
        write_surface(self.store.out, [example.id for example in shown], places, torch.cat(found), keys)

    def _open(self, examples: Sequence[Example]) -> Batch:
        clean = self.vlm.load_pixels([example.image for example in examples]).to(self.vlm.device)
        questions = None if self.vlm.task == "captions" else [example.question or "" for example in examples]
        return Batch(examples, self._references(examples, clean, questions), questions, clean)

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


def _rounded(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """`quantize_inside` on the CPU: k / 255 as a PNG gives it back, where a GPU multiplies by a rounded 1 / 255."""
    return quantize_inside(images.cpu(), clean.cpu(), budget).to(clean.device)


def _warn_of_vanishing_gradients(outputs: Path, name: str) -> None:
    rows = pq.read_table(outputs, columns=["attack", "zero_gradient_share", "nonfinite_gradient_share"]).to_pandas()
    shares = rows.dropna().groupby("attack", sort=False).mean()
    for attack, (zero, broken) in zip(shares.index, shares.to_numpy(), strict=True):
        if zero > _VANISHING or broken > 0:
            say(
                f"warning: attack {attack} on {name}: {zero:.1%} of the input gradients are exactly zero and "
                f"{broken:.1%} not finite, so that its weakness would prove nothing; try dtype: float32, or "
                "the objective margin"
            )


def _seed(seed: int, attack: str, example_id: str) -> int:
    """A seed for one image under one attack, whatever batch it is in: 63 bits."""
    return int(sha256_of(f"{seed}/{attack}/{example_id}".encode())[:16], 16) >> 1
