"""Sign-gradient attacks from the clean image: one step, many steps, many steps with momentum."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import ascent, of_ordinary_size, per_channel
from prsl_kernels.experiments.attacks.iterate import Draws, IterativeAttack, Point, Step


@dataclass(frozen=True)
class BIM(IterativeAttack):
    """The basic iterative method: x <- project(x + step * sign(gradient of the objective)), from the clean image.

    With a step of 0 it is the control that must change nothing; with one round whose step is eps it is FGSM. In L2
    the sign gives way to the gradient over its length.

    Source: Kurakin, Goodfellow, Bengio, "Adversarial examples in the physical world", 2016, arXiv:1607.02533, eq. 2;
    FGSM: Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", 2014, arXiv:1412.6572, eq. 1.
    """

    def step(self, clean: Tensor, draws: Draws) -> Step:
        length = per_channel(self.budget.step, clean)

        def step(point: Point) -> Tensor:
            assert point.gradient is not None
            return point.images + length * ascent(point.gradient, self.budget)

        return step


@dataclass(frozen=True)
class MIFGSM(IterativeAttack):
    """BIM along an average of all gradients so far, each divided by its L1 norm, the sum decaying by `decay` a round.

    Source: Dong et al., "Boosting adversarial attacks with momentum", 2017, arXiv:1710.06081, eq. 6 and 7; in L2 the
    sign of eq. 7 gives way to eq. 9.
    """

    decay: float = field(default=1.0, kw_only=True)

    def step(self, clean: Tensor, draws: Draws) -> Step:
        length = per_channel(self.budget.step, clean)
        momentum = torch.zeros_like(clean)

        def step(point: Point) -> Tensor:
            nonlocal momentum
            assert point.gradient is not None
            gradient = of_ordinary_size(point.gradient)
            # The mean is the L1 norm but for a factor that all rounds share.
            size = gradient.flatten(1).abs().mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
            momentum = self.decay * momentum + gradient / size.view(-1, 1, 1, 1)
            return point.images + length * ascent(momentum, self.budget)

        return step
