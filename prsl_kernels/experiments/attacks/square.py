"""The Square attack: random squares, kept where they raise the objective; no gradient is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import per_channel
from prsl_kernels.experiments.attacks.iterate import Draws, IterativeAttack, Point, Step

# The share of an image's pixels that a square covers is halved after these of 10,000 queries.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square(IterativeAttack):
    """Random search in L-infinity from vertical stripes; a round is a query, `budget.step` is not used.

    Each query sets one square of each image to -eps or +eps a channel, and is taken back where the objective does not
    rise. The squares shrink by the published schedule, stretched to the number of rounds. Since it needs no gradient,
    an attack by gradients that finds less than this one was hindered, not defeated.

    Windows and signs are drawn per image, all at the start of a run.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search",
    2019, arXiv:1912.00049, algorithms 1 and 2. `first_share` is its p.
    """

    first_share: float = field(default=0.8, kw_only=True)

    uses_gradient = False
    accepts_improvements_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget.norm != "linf":
            raise ValueError("Square is here for L-infinity alone; take PGD or APGD for L2")

    def share(self, query: int) -> float:
        """The share of the pixels that the square of a query covers; queries count from 0."""
        return self.first_share / 2 ** sum(query * 10_000 // self.rounds > bound for bound in _HALVED_AFTER)

    def start(self, clean: Tensor, draws: Draws) -> Tensor:
        _, channels, _, width = clean.shape
        return clean + per_channel(self.budget.eps, clean) * draws.signs(channels, 1, width).to(clean)

    def step(self, clean: Tensor, draws: Draws) -> Step:
        eps = per_channel(self.budget.eps, clean)
        lowest, highest = clean - eps, clean + eps
        _, channels, height, width = clean.shape
        rows = torch.arange(height, device=clean.device)
        columns = torch.arange(width, device=clean.device)
        # Two numbers for the window's place and one a channel for the signs; queries are too many to draw one by one.
        drawn = draws.uniform(self.rounds, 2 + channels)
        query = 0

        def step(point: Point) -> Tensor:
            nonlocal query
            side = min(max(round(math.sqrt(self.share(query) * height * width)), 1), height, width)
            numbers = drawn[:, query]
            top = (numbers[:, :1] * (height - side + 1)).long()
            left = (numbers[:, 1:2] * (width - side + 1)).long()
            inside = ((rows >= top) & (rows < top + side))[:, None, :, None]
            inside = inside & ((columns >= left) & (columns < left + side))[:, None, None, :]
            extreme = torch.where(numbers[:, 2:, None, None] < 0.5, lowest, highest)
            query += 1
            return torch.where(inside, extreme, point.images)

        return step
