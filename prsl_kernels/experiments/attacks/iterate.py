"""The loop that every iterative attack shares. An attack replaces parts of it: its start, its step, its projection.

What is maximised is a parameter (`Objective`), and whoever reads the rounds may stop when it has seen enough, since
they are made one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import Budget, project
from prsl_kernels.experiments.attacks.objectives import Objective


@dataclass(frozen=True)
class GradientHealth:
    """Per image, the shares of the input gradient's elements that are exactly zero, and NaN or infinite; (N,) each.

    A high share of either makes an attack weak for a reason that is not robustness.
    """

    zero: Tensor
    nonfinite: Tensor


@dataclass(frozen=True)
class Round:
    """Where an attack stands after `index` rounds; 0 is its start.

    `images` (N, C, H, W) are float pixels inside the budget, detached, not rounded to 8 bits. `health` averages all
    gradients that were taken up to here, and is None where there were none.
    """

    index: int
    images: Tensor
    health: GradientHealth | None


class Step(Protocol):
    """One round's move, with whatever memory it keeps from round to round."""

    def __call__(self, objective: Objective, images: Tensor, /) -> tuple[Tensor, GradientHealth | None]:
        """Moved images, not yet projected, and the health of the gradient that was taken, if one was."""


@dataclass(frozen=True)
class IterativeAttack(ABC):
    """An attack, configured once, that can be called any number of times with an objective and images.

    It knows nothing of language: `objective` is any function of images (N, C, H, W) in [0, 1] to (N,) values to
    maximise, a classifier's loss for example.
    """

    budget: Budget
    rounds: int

    @abstractmethod
    def step(self, images: Tensor, seeds: Sequence[int]) -> Step:
        """A fresh step for one run on `images` (N, C, H, W); `seeds` holds a random seed an image."""

    def start(self, clean: Tensor) -> Tensor:
        """Where the attack begins; the clean images unless an attack says otherwise."""
        return clean

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Brings images back into the budget and into [0, 1]."""
        return project(images, clean, self.budget)

    def iterate(self, objective: Objective, images: Tensor, *, seeds: Sequence[int] | None = None) -> Iterator[Round]:
        """Yields the start and then each round, `rounds` + 1 items.

        Args:
            objective: images (N, C, H, W) to (N,) values to maximise; value i must depend on image i alone.
            images: clean float images in [0, 1]; never changed.
            seeds: a seed an image, for attacks that draw random numbers, so that an image's numbers do not depend
                on its neighbours in the batch. Its index in the batch by default.

        Raises:
            ValueError: images outside of [0, 1] or not (N, C, H, W), an objective that is not (N,) or whose graph
                does not reach the images, or seeds that are not N.
        """
        _check_images(images)
        seeds = range(len(images)) if seeds is None else seeds
        if len(seeds) != len(images):
            raise ValueError(f"seeds must hold one number an image, {len(images)}; got {len(seeds)}")
        clean = images.detach()
        step = self.step(clean, seeds)
        current = self.start(clean).detach()
        zero, nonfinite, taken = torch.zeros(len(clean)), torch.zeros(len(clean)), 0
        yield Round(0, current, None)
        for index in range(1, self.rounds + 1):
            moved, health = step(objective, current)
            current = self.project(moved.detach(), clean)
            if health is not None:
                zero, nonfinite, taken = zero + health.zero.cpu(), nonfinite + health.nonfinite.cpu(), taken + 1
            yield Round(index, current, GradientHealth(zero / taken, nonfinite / taken) if taken else None)

    def __call__(self, objective: Objective, images: Tensor, *, seeds: Sequence[int] | None = None) -> Tensor:
        """The images after the last round: (N, C, H, W) in [0, 1], inside the budget, not rounded to 8 bits."""
        last = deque(self.iterate(objective, images, seeds=seeds), maxlen=1).pop()
        return last.images


def input_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, GradientHealth]:
    """Gradient of each image's objective with respect to that image (N, C, H, W), and how healthy it is.

    The values are summed before the one backward pass, so each image's gradient is its own, whatever the batch.
    """
    leaf = images.detach().requires_grad_(True)
    with torch.enable_grad():
        values = objective(leaf)
        if values.shape != (len(images),):
            raise ValueError(f"the objective must give one value an image, ({len(images)},); got {tuple(values.shape)}")
        if not values.requires_grad:
            raise ValueError("the objective has no gradient with respect to the images (is it computed under no_grad?)")
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    flat = gradient.flatten(1)
    return gradient, GradientHealth((flat == 0).float().mean(1), (~flat.isfinite()).float().mean(1))


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point (N, C, H, W); got {images.dtype} {tuple(images.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # written so that NaN fails, too
        raise ValueError("images must lie in [0, 1]: the attack works on pixels, with the normaliser in the model")
