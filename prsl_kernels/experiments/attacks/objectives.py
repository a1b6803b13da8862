"""What an attack maximises: one value an image, computed from logits.

Never from `model.loss`: a model fine-tuned with PRSL returns that as its loss, and each arm would be attacked
through another quantity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
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
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return losses.sum(1) / (targets != IGNORED).sum(1)


TOKEN_OBJECTIVES: dict[str, TokenObjective] = {"ce": token_cross_entropy}


def text_objective(
    vlm: VisionLanguageModel, text: dict[str, Tensor], token_objective: TokenObjective = token_cross_entropy
) -> Objective:
    """`token_objective` of a frozen reference under `vlm`, as a function of the images alone.

    Args:
        vlm: the attacked model; in evaluation mode, since dropout would make the objective another at every call.
        text: what `vlm.encode` made of N references (and questions). It is fixed here once: a reference that moved
            with the rounds would be a different attack.
        token_objective: logits (N, T, V) and targets (N, T) to (N,).

    Returns:
        A function of N images, in the order of the references.
    """

    def objective(images: Tensor) -> Tensor:
        logits, targets = vlm.logits(images, text)
        return token_objective(logits, targets)

    return objective
