"""The operator behind ``inplace_backward=True``: a backward pass that writes the gradient over the logits."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .closed_form import token_gradient
from .eager import Distance, Space, token_terms

# Rows are overwritten in pieces of about this many logits, so that the temporaries stay small beside the logits.
PIECE = 1 << 23


@torch.library.custom_op("prsl_kernels::token_gradient_", mutates_args=("logits",))
def token_gradient_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
    k: int,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Overwrite logits (N, ..., V) of any floating dtype with their gradient: the closed form, rounded once."""
    rows = max(1, PIECE // max(1, math.prod(logits.shape[1:])))
    pieces = zip(*(x.split(rows) for x in (logits, target, grad_cross_entropy, grad_penalty)), strict=True)
    for piece, piece_target, piece_grad_cross_entropy, piece_grad_penalty in pieces:
        gradient = token_gradient(
            piece.to(grad_cross_entropy.dtype),
            piece_target,
            weight,
            piece_grad_cross_entropy,
            piece_grad_penalty,
            k=k,
            space=cast(Space, space),
            distance=cast(Distance, distance),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        piece.copy_(gradient)


class InplaceTokenTerms(torch.autograd.Function):
    """``eager.token_terms`` with a backward that needs no memory for the gradient, and can run but once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Any:
        """The two terms (...) of logits (..., V) in any floating dtype; nothing of size V is saved but the logits."""
        ctx.save_for_backward(logits, target, weight)
        ctx.options = options
        ctx.spent = False
        return token_terms(logits, target, weight, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, in the storage of the logits."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True has no second derivative, since its backward overwrites the logits: "
                "call backward without create_graph=True, or use inplace_backward=False"
            )
        if ctx.spent:
            raise RuntimeError(
                "a second backward through inplace_backward=True: the first one has overwritten the logits with their "
                "gradient; call backward once, or use inplace_backward=False"
            )
        logits, target, weight = ctx.saved_tensors
        ctx.spent = True
        logits = logits.detach()
        token_gradient_(logits, target, weight, *grads, **ctx.options)
        return logits, None, None, None
