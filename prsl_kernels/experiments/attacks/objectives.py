"""What an attack maximises: one value an image, computed from logits.

Never from `model.loss`: a model fine-tuned with PRSL returns that as its loss, and each arm would be attacked
through another quantity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from prsl_kernels import prsl_cross_entropy

if TYPE_CHECKING:
    from prsl_kernels.experiments.config import ArmConfig
    from prsl_kernels.experiments.models import VisionLanguageModel

# Images (N, C, H, W) in [0, 1] -> (N,) values to maximise; value i depends on image i alone.
Objective = Callable[[Tensor], Tensor]
# Logits (N, T, V) and aligned targets (N, T), -100 ignored -> (N,).
TokenObjective = Callable[[Tensor, Tensor], Tensor]

IGNORED = -100


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the reference, the mean over its tokens: (N, T, V), (N, T) -> (N,) float32.

    The mean and not the sum, so that recorded values of long and short references compare; an attack that follows
    the sign of the gradient takes the same steps with either.
    """
    losses = F.cross_entropy(
        _wide(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return losses.sum(1) / (targets != IGNORED).sum(1)


def token_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Largest other logit minus the reference token's, the mean over tokens: (N, T, V), (N, T) -> (N,) float32.

    The margin of Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2016, arXiv:1608.04644
    (their f_6 without its bound), token by token. Its gradient does not fade where the model is sure of itself.
    """
    return _mean_over_tokens(_margins(logits, targets), targets)


def token_margin_maximum(logits: Tensor, targets: Tensor) -> Tensor:
    """`token_margin` of the weakest token in place of the mean; (N,) float32.

    Above 0 exactly where greedy decoding leaves the reference.
    """
    return _margins(logits, targets).masked_fill(targets == IGNORED, -torch.inf).amax(1)


def token_dlr(logits: Tensor, targets: Tensor) -> Tensor:
    """Difference-of-logits ratio, the mean over tokens: (N, T, V), (N, T) -> (N,) float32.

    -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3): unlike the margin, it does not change with the logits' scale. Where
    the reference's token is third it is 1 whatever the logits, and has no gradient. Source: Croce, Hein, 2020,
    arXiv:2003.01690, eq. 6.
    """
    top = _wide(logits).topk(3, dim=-1).values
    ratio = _margins(logits, targets) / (top[..., 0] - top[..., 2]).clamp(min=1e-12)
    return _mean_over_tokens(ratio, targets)


def target_text(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the cross entropy of a text that the attacker wants to hear; (N,) float32."""
    return -token_cross_entropy(logits, targets)


def defence_aware(arm: ArmConfig, b: float, sign: int) -> TokenObjective:
    """Cross entropy plus (`sign` 1) or minus (-1) the penalty that the arm was trained with, as the arm weighed it.

    An attacker who knows the defence can follow its loss, or go where the penalty is small, which the defence does
    not expect. `b` is the arm's weight; cross entropy itself has none, and for it this is cross entropy.
    """

    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        cross_entropy = token_cross_entropy(logits, targets)
        if b == 0 or arm.loss != "prsl":
            return cross_entropy
        terms = prsl_cross_entropy(
            _wide(logits).flatten(0, 1), targets.flatten(), k=min(arm.k, logits.shape[-1] - 1), b=sign * b,
            space=arm.space, distance=arm.distance, ignore_index=IGNORED, reduction="none",
        )  # fmt: skip
        return terms.view(targets.shape).sum(1) / (targets != IGNORED).sum(1)

    return objective


TOKEN_OBJECTIVES: dict[str, TokenObjective] = {
    "ce": token_cross_entropy,
    "margin": token_margin,
    "margin-max": token_margin_maximum,
    "dlr": token_dlr,
    "target": target_text,
}


def _wide(logits: Tensor) -> Tensor:
    """Half precision as float32, which is what the (N,) values are then; float64 as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    logits = _wide(logits)
    place = targets.clamp(min=0)[..., None]
    own = logits.gather(-1, place)[..., 0]
    return logits.scatter(-1, place, -torch.inf).amax(-1) - own


def _mean_over_tokens(values: Tensor, targets: Tensor) -> Tensor:
    counted = targets != IGNORED
    return values.masked_fill(~counted, 0).sum(1) / counted.sum(1)


@dataclass(frozen=True)
class TextObjective:
    """`token_objective` of a frozen text under `vlm`, as a function of the images alone: (N, C, H, W) -> (N,).

    Attributes:
        vlm: the attacked model; in evaluation mode, since dropout would make the objective another at every call.
        text: what `vlm.encode` made of N texts (and questions). It is fixed here once: a reference that moved with
            the rounds would be a different attack.
        token_objective: logits (N, T, V) and targets (N, T) to (N,).
    """

    vlm: VisionLanguageModel
    text: dict[str, Tensor]
    token_objective: TokenObjective = token_cross_entropy

    def __call__(self, images: Tensor) -> Tensor:
        return self.token_objective(*self.vlm.logits(images, self.text))

    def select(self, indices: Tensor) -> TextObjective:
        """The objective of some of the texts, for as many images."""
        text = {name: value[indices.to(value.device)] for name, value in self.text.items()}
        return TextObjective(self.vlm, text, self.token_objective)


def select(objective: Objective, indices: Tensor) -> Objective | None:
    """The objective of the images at `indices` alone, where it can tell; None where it is a plain function."""
    chosen = getattr(objective, "select", None)
    return None if chosen is None else chosen(indices)
