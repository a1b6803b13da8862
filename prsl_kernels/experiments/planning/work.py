"""How often each stage calls the model, on how many images: counted as the stages' own code does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prsl_kernels.experiments.attacks.iterate import IterativeAttack
from prsl_kernels.experiments.attacks.plans import Plan
from prsl_kernels.experiments.config import ArmConfig, AttackConfig, FinetuneConfig

# train: forward and backward of a micro-batch. update: the optimiser's step. forward: logits alone. ratio: a forward
# and a backward for each of the two terms. gradient: forward and backward to the images. generate: one output each.
# base: one output each of the base checkpoint.
Operation = Literal["train", "update", "forward", "ratio", "gradient", "generate", "base"]
SELECTION_BATCH = 64  # as in training.finetune


@dataclass
class Work:
    """Calls of one stage.

    Attributes:
        calls: (operation, images in the call) -> how often.
        loads: checkpoints that are read.
        saves: checkpoints that are written, optimiser included.
        rows: rows of the output table.
        pngs: images written as PNG, those in the table included.
        scored: texts that are scored against their references.
    """

    calls: Counter[tuple[Operation, int]] = field(default_factory=Counter)
    loads: int = 0
    saves: int = 0
    rows: int = 0
    pngs: int = 0
    scored: int = 0

    def add(self, operation: Operation, sizes: Iterable[int], times: int = 1) -> None:
        """Counts `times` calls for each of these batches."""
        for size in sizes:
            if size and times:
                self.calls[operation, size] += times

    def images(self, operation: Operation) -> int:
        """Images that went through an operation, each as often as it did."""
        return sum(size * times for (name, size), times in self.calls.items() if name == operation)


def batches(count: int, size: int) -> list[int]:
    """The sizes of the batches that `count` images make."""
    return [min(size, count - start) for start in range(0, count, size)]


def finetune_work(arm: ArmConfig, config: FinetuneConfig, select: int) -> Work:
    """One arm's fine-tuning; `select` is the size of the selection split.

    At every evaluation: the terms on the selection split, and the ratio of the gradients on the last micro-batch, or,
    for plain cross entropy, the terms on that. Before the first step the same on the split, and the calibration.
    """
    work = Work(loads=2)
    size, steps = config.batch_size, config.steps
    evaluations = -(-steps // config.evaluate_every)
    work.add("train", [size], steps * config.gradient_accumulation)
    work.add("update", [1], steps)
    work.add("forward", batches(select, SELECTION_BATCH), evaluations + 1)
    work.add("forward" if arm.is_cross_entropy else "ratio", [size], evaluations)
    if not arm.is_cross_entropy:
        work.add("ratio", batches(min(select, config.calibration_batches * size), size))
    work.saves = evaluations
    return work


def attack_work(plans: Sequence[Plan], config: AttackConfig, images: int, *, referenced: bool = True) -> Work:
    """One arm under all attacks and controls.

    Args:
        plans: what `attacks.plans.plans` made of `config`.
        config: the attacks.
        images: how many images are attacked.
        referenced: whether the data set has references; else the base is asked for them.
    """
    work = Work(loads=1 if referenced else 2)
    kept = min(config.keep_images, images)
    for plan in plans:
        sizes = batches(min(images, plan.images or images), config.batch_size)
        gradients, forwards, recorded = _calls(plan)
        work.add("gradient", sizes, gradients)
        work.add("forward", sizes, forwards + recorded)
        work.add("generate", sizes, recorded)
        work.rows += recorded * sum(sizes)
        # A plan of fewer images keeps those of the sample that are among them
        work.pngs += recorded * round(kept * sum(sizes) / images)
    # What an arm says of the clean images is asked once a batch, if an attack there wants it
    reach = max((plan.images or images for plan in plans if plan.reference == "secondary"), default=0)
    starts = range(0, min(reach, images), config.batch_size)
    work.add("generate", [min(config.batch_size, images - start) for start in starts])
    if not referenced:
        work.add("base", batches(images, config.batch_size))
    if config.transfer is not None:
        work.pngs += min(config.transfer.images, images)
    if config.surface is not None:
        shown = min(config.surface.images, images)
        sizes = batches(shown, config.batch_size)
        work.add("gradient", sizes)
        work.add("forward", sizes, config.surface.points**2)
        if not referenced:
            opened = [min(config.batch_size, images - start) for start in range(0, shown, config.batch_size)]
            work.add("base", opened)
    return work


def _calls(plan: Plan) -> tuple[int, int, int]:
    """(gradients, forwards, recorded rounds) of one image; a bound from above where `stop_above` may end it early."""
    if plan.attack is None:
        return 0, 0, 1
    attack: IterativeAttack = plan.attack
    recorded = sum(1 for index in plan.recorded if index <= attack.total_rounds)
    looks_ahead = attack.keep == "best" or attack.accepts_improvements_only
    if not looks_ahead:
        return (attack.total_rounds if attack.uses_gradient else 0), 0, recorded
    if attack.uses_gradient:  # at the start and after every round, the last of which needs no direction any more
        return attack.total_rounds, attack.restarts, recorded
    return 0, attack.total_rounds + attack.restarts, recorded


def transfer_work(config: AttackConfig, images: int, arms: int) -> Work:
    """One arm asked about what the transferred attack made on each of the others."""
    assert config.transfer is not None
    work = Work(loads=1)
    sizes = batches(min(config.transfer.images, images), config.batch_size)
    work.add("forward", sizes, arms - 1)
    work.add("generate", sizes, arms - 1)
    work.rows = (arms - 1) * sum(sizes)
    return work


def evaluate_work(plans: Sequence[Plan], config: AttackConfig, images: int, models: int, arms: int) -> Work:
    """All outputs of a task, each against the references and against what the arm says of the clean image.

    Beside them the worst case per image, and the floor of random pairs. What is compared with a blank image's text and
    with a target is not counted: it is scored by two of the scores alone.

    Args:
        models: arms times seeds.
        arms: how many of them there are for each seed.
    """
    work = Work()
    outputs = sum(_calls(plan)[2] * min(images, plan.images or images) for plan in plans)
    if config.transfer is not None and arms > 1:
        outputs += (arms - 1) * min(config.transfer.images, images)
    work.scored = models * 2 * (outputs + images) + (images if images > 1 else 0)
    work.rows = models * outputs
    return work
