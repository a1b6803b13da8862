"""Auto-PGD: no step size to choose, since it halves itself where the objective stops rising."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import ascent, per_channel
from prsl_kernels.experiments.attacks.iterate import Draws, IterativeAttack, Point, Step, better

_MOMENTUM = 0.75  # alpha: the share of the new step; the rest is the step before
_RHO = 0.75  # the share of rounds since the last checkpoint that have to raise the objective


@dataclass(frozen=True)
class APGD(IterativeAttack):
    """Auto-PGD with momentum; `budget.step` is not used.

    The step begins at 2 eps. At checkpoints, ever closer to each other, an image's step is halved and its search goes
    on from its best point, if either fewer than 75 % of the rounds since the last checkpoint raised the objective,
    or neither the step nor the best value changed since then. The start is a random point of the ball whose farthest
    pixel (in L2: which itself) is at its border, and the best image is kept.

    Source: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", 2020, arXiv:2003.01690, algorithm 1 and section 4, with the checkpoints' rounding of its published code.
    That code compares the first round with 0 instead of with the start's value; here it is the start's, as in the
    paper.
    """

    keep: Literal["last", "best"] = field(default="best", kw_only=True)

    def start(self, clean: Tensor, draws: Draws) -> Tensor:
        eps = per_channel(self.budget.eps, clean)
        if self.budget.norm == "linf":
            offset = (2 * draws.uniform(*clean.shape[1:]) - 1).to(clean)
            farthest = offset.flatten(1).abs().amax(1).clamp(min=torch.finfo(clean.dtype).tiny)
            return clean + eps * offset / farthest.view(-1, 1, 1, 1)
        return clean + eps[0] * ascent(draws.normal(*clean.shape[1:]).to(clean), self.budget)

    def step(self, clean: Tensor, draws: Draws) -> Step:
        return _Step(self, clean)


class _Step:
    """One run's memory: the images before, the best so far, and what happened since the last checkpoint."""

    def __init__(self, attack: APGD, clean: Tensor) -> None:
        self._attack, self._clean = attack, clean
        self._length = 2 * per_channel(attack.budget.eps, clean).repeat(len(clean), 1, 1, 1)
        rounds = attack.rounds
        self._period, self._shortest = max(int(0.22 * rounds), 1), max(int(0.06 * rounds), 1)
        self._shorter = max(int(0.03 * rounds), 1)
        self._before = clean  # the images of the round before
        self._best: Point | None = None
        self._value = self._at_checkpoint = torch.empty(0)
        self._rises = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
        self._halved = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
        self._since = 0

    def __call__(self, point: Point) -> Tensor:
        assert point.gradient is not None
        images, gradient, share = point.images, point.gradient, _MOMENTUM
        if self._best is None:
            self._best, self._value, self._at_checkpoint = point, point.values, point.values
            self._before, share = images, 1.0
        else:
            images, gradient = self._look(point)
        momentum = images - self._before
        self._before = images
        ahead = self._project(images + self._length * ascent(gradient, self._attack.budget))
        return images + (ahead - images) * share + momentum * (1 - share)

    def _look(self, point: Point) -> tuple[Tensor, Tensor]:
        """Takes note of what the last round led to; images and gradients to go on from."""
        assert self._best is not None
        assert point.gradient is not None
        self._rises += point.values > self._value
        self._value = point.values
        best = self._best = better(self._best, point)
        assert best.gradient is not None
        self._since += 1
        if self._since < self._period:
            return point.images, point.gradient
        stuck = ~self._halved & (self._at_checkpoint >= best.values)
        self._halved = (self._rises <= _RHO * self._period) | stuck
        self._at_checkpoint = best.values
        self._period, self._since = max(self._period - self._shorter, self._shortest), 0
        self._rises.zero_()
        mask = self._halved.view(-1, 1, 1, 1)
        self._length = torch.where(mask, self._length / 2, self._length)
        return torch.where(mask, best.images, point.images), torch.where(mask, best.gradient, point.gradient)

    def _project(self, images: Tensor) -> Tensor:
        return self._attack.project(images, self._clean)
