"""Images that move without an attack behind them; what an attack must beat, or equal, to mean something."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import LEVELS, Budget, ascent, levels, per_channel, project
from prsl_kernels.experiments.attacks.iterate import Draws, IterativeAttack, Point, Step

_GREY = 128 / LEVELS  # the 8-bit level next to one half
JPEG_QUALITY = 75  # Pillow's default, and what most pictures on the web have at least


@dataclass(frozen=True)
class RandomSigns(IterativeAttack):
    """BIM's walk with coin flips in place of the gradient's signs: as many rounds, the same step, the same ball."""

    uses_gradient = False

    def step(self, clean: Tensor, draws: Draws) -> Step:
        length = per_channel(self.budget.step, clean)

        def step(point: Point) -> Tensor:
            return point.images + length * ascent(draws.signs(*clean.shape[1:]).to(clean), self.budget)

        return step


def gaussian_noise(images: Tensor, budget: Budget, seeds: Sequence[int]) -> Tensor:
    """`images` (N, C, H, W) with Gaussian noise whose standard deviation is eps, cut off at the budget's border.

    In L2 that is a random direction, as far as eps goes.
    """
    noise = Draws(seeds, images.device).normal(*images.shape[1:]).to(images)
    return project(images + per_channel(budget.eps, images) * noise, images, budget)


def jpeg(images: Tensor) -> Tensor:
    """`images` (N, 3, H, W) after one compression as JPEG of quality 75: 8-bit values; bound to no budget."""
    decoded = []
    for image in levels(images).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        with Image.open(file) as opened:
            decoded.append(torch.from_numpy(np.array(opened)))
    return (torch.stack(decoded).permute(0, 3, 1, 2).float() / LEVELS).to(images.device)


def blank_like(images: Tensor) -> Tensor:
    """The same constant grey image, an 8-bit value, for each of `images` (N, C, H, W)."""
    return torch.full_like(images, _GREY)
