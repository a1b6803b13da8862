"""Projected gradient descent: BIM from random starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from prsl_kernels.experiments.attacks.bim import BIM
from prsl_kernels.experiments.attacks.budget import ascent, per_channel
from prsl_kernels.experiments.attacks.iterate import Draws


@dataclass(frozen=True)
class PGD(BIM):
    """BIM from a random place in the ball, any number of times, keeping of each image the best that was seen.

    The start is uniform in the L-infinity ball; in L2 its direction is, and its distance from the clean image.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2017, arXiv:1706.06083.
    """

    keep: Literal["last", "best"] = field(default="best", kw_only=True)

    def start(self, clean: Tensor, draws: Draws) -> Tensor:
        eps = per_channel(self.budget.eps, clean)
        if self.budget.norm == "linf":
            return clean + eps * (2 * draws.uniform(*clean.shape[1:]) - 1).to(clean)
        direction = ascent(draws.normal(*clean.shape[1:]).to(clean), self.budget)
        return clean + eps[0] * draws.uniform(1, 1, 1).to(clean) * direction
