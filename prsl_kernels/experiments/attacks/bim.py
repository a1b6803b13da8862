"""The basic iterative method: Kurakin, Goodfellow, Bengio, "Adversarial examples in the physical world" (2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prsl_kernels.experiments.attacks.budget import per_channel
from prsl_kernels.experiments.attacks.iterate import GradientHealth, IterativeAttack, Step, input_gradient
from prsl_kernels.experiments.attacks.objectives import Objective


@dataclass(frozen=True)
class BIM(IterativeAttack):
    """Un-targeted BIM in L-infinity: x <- clip(x + step * sign(gradient of the objective)), from the clean image.

    With a step of 0 it is the control that must change nothing. An element whose gradient is NaN stays where it is;
    an infinite one still has a sign and is followed.
    """

    def step(self, images: Tensor, seeds: Sequence[int]) -> Step:
        length = per_channel(self.budget.step, images)

        def step(objective: Objective, current: Tensor) -> tuple[Tensor, GradientHealth]:
            gradient, health = input_gradient(objective, current)
            return current + length * gradient.nan_to_num(nan=0.0).sign(), health

        return step
