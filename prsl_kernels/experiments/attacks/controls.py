"""Images that move without an attack behind them; what an attack must beat, or equal, to mean something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import LEVELS, per_channel
from prsl_kernels.experiments.attacks.iterate import IterativeAttack, Step
from prsl_kernels.experiments.attacks.objectives import Objective

_GREY = 128 / LEVELS  # the 8-bit level next to one half


@dataclass(frozen=True)
class RandomSigns(IterativeAttack):
    """BIM's walk with coin flips in place of the gradient's signs: as many rounds, the same step, the same ball.

    Each image draws from its own generator on the CPU: its numbers depend on its seed alone, not on the batch, the
    order, or the device.
    """

    def step(self, images: Tensor, seeds: Sequence[int]) -> Step:
        length = per_channel(self.budget.step, images)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def step(objective: Objective, current: Tensor) -> tuple[Tensor, None]:
            shape = current.shape[1:]
            flips = torch.stack([torch.randint(0, 2, shape, generator=generator) for generator in generators])
            return current + length * (2 * flips - 1).to(current), None

        return step


def blank_like(images: Tensor) -> Tensor:
    """The same constant grey image, an 8-bit value, for each of `images` (N, C, H, W)."""
    return torch.full_like(images, _GREY)
