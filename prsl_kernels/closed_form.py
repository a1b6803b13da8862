r"""The derivative of the loss in closed form: what a backward pass computes without recording the forward.

The loss of a token is ``l = c + b * d``, with the cross entropy ``c = -log p_y`` and the distance ``d``.

**Cross entropy.** ``dc/dz_i = p_i - [i = y]``. In general, ``c = -sum_j q_j log p_j`` for weights ``q`` that need not
sum to one (class weights, label smoothing), and ``dc/dz_i = p_i * sum_j q_j - q_i``.

**Distance between probabilities.** ``d`` is a function of ``p``. Let ``g_i = dd/dp_i``. With ``a_j = (p_j - m) / d``
for the members of K above the minimum (``a_j = 1`` for "l1") and ``A = sum_j a_j``, the chain rule through ``p_j - m``
gives

    g_i = a_i                       for a member above the minimum,
    g_i = -A / n                    for each of the n classes tied for the minimum m, the mean of their p,
    g_i = 0                         elsewhere, the target included.

The softmax has ``dp_j/dz_i = p_j * ([i = j] - p_i)``, hence ``dd/dz_i = p_i * g_i - p_i * sum_j p_j g_j``. ``d`` is
homogeneous of degree 1, that is ``d(s p) = s d(p)``, and Euler's theorem says ``sum_j p_j g_j = d``. (Directly:
``sum_j a_j p_j - A m = sum_j a_j (p_j - m) = d``.) So

    dd/dz_i = p_i * (g_i - d),      dl/dz_i = p_i * (1 - b * d) - [i = y] + b * p_i * g_i.

**Distance between log-probabilities.** In ``log p_j - log p_m = z_j - z_m`` the log-sum-exp cancels: ``d`` is a
function of the logits of K alone, so with ``a_j = (z_j - t) / d``, or 1, and the same ``g``,

    dd/dz_i = g_i,                  dl/dz_i = p_i - [i = y] + b * g_i.

A row therefore needs no list of members: membership is ``z_i > t`` and ``i != y`` for the threshold ``t``, the k-th
largest logit without the target's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .eager import Distance, Space, known, largest_classes, norm


def token_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
    *,
    k: int,
    space: Space,
    distance: Distance,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient (..., V) of the logits from those of the two terms (...) of :func:`prsl_kernels.eager.token_terms`.

    ``logits`` is (..., V) in float32 or float64, ``target`` (...) int64 class indices. ``k=0`` leaves the penalty out.
    The upstream gradients take the places of the 1 and the b of the formula.
    """
    ignored = (target == ignore_index).unsqueeze(-1)
    y = target.unsqueeze(-1).masked_fill(ignored, 0)
    w_y = logits.new_ones(1) if weight is None else weight[y]
    uniform = (logits.new_ones(logits.shape[-1]) if weight is None else weight) / logits.shape[-1]
    grad_c = grad_cross_entropy.unsqueeze(-1)
    q_y = (1 - label_smoothing) * w_y
    q = label_smoothing * uniform  # besides q_y at the target

    log_p = logits.log_softmax(-1)
    scale = grad_c * (q_y + q.sum())
    slopes = None
    if k > 0:
        grad_d = grad_penalty.unsqueeze(-1) * w_y
        slopes = penalty_slopes(logits, log_p, y, k=k, space=space, distance=distance)
        scale = scale - grad_d * slopes.of_p
    gradient = log_p.exp_().mul_(scale)
    if slopes is not None:
        gradient.scatter_add_(-1, slopes.candidates, grad_d * slopes.of_candidates)
        if slopes.tied is not None:
            gradient += torch.where(slopes.tied, grad_d * slopes.of_tied, 0)
    gradient.scatter_add_(-1, y, -grad_c * q_y)
    if label_smoothing > 0:
        gradient -= grad_c * q
    return gradient.masked_fill_(ignored, 0) if known(ignored.any()) is not False else gradient


class PenaltySlopes(NamedTuple):
    """dd/dz of each row in sparse form: ``-of_p * p``, plus ``of_candidates`` at ``candidates``.

    Where more classes are tied for the minimum than there are candidates, ``tied`` marks them, and each has ``of_tied``
    besides; else it is None.
    """

    of_p: Tensor  # (..., 1): d, or 0 in "log_prob"
    candidates: Tensor  # (..., n), without repetition
    of_candidates: Tensor  # (..., n): p_i * g_i, or g_i in "log_prob"
    tied: Tensor | None  # (..., V)
    of_tied: Tensor  # (..., 1)


def penalty_slopes(
    logits: Tensor, log_p: Tensor, y: Tensor, *, k: int, space: Space, distance: Distance
) -> PenaltySlopes:
    """dd/dz for logits (..., V), their log-probabilities (..., V) and the classes left out of K (..., 1)."""
    candidates, complete = largest_classes(logits, y.squeeze(-1), k)
    z = logits.gather(-1, candidates)
    z_1, t = z[..., :1], z[..., k - 1 : k]
    above = z > t
    # p_j - m in units of p_1, or z_j - t
    deviation = (z - z_1).exp() * -torch.expm1(t - z) if space == "prob" else z - t
    deviation = torch.where(above, deviation, 0)
    length = norm(deviation, distance).unsqueeze(-1)
    flat = length == 0 if space == "prob" else (length == 0) | (t == -torch.inf)  # no derivative

    a = deviation / length if distance == "l2" else torch.ones_like(deviation)
    a = torch.where(above & ~flat, a, 0)
    tied = z == t if complete else (logits == t).scatter_(-1, y, False)
    share = -a.sum(-1, keepdim=True) / tied.sum(-1, keepdim=True)
    g = torch.where(tied, share, a) if complete else a
    if space == "log_prob":
        return PenaltySlopes(torch.zeros_like(length), candidates, g, None if complete else tied, share)
    p = log_p.gather(-1, candidates).exp()
    d = (p[..., :1] * length).masked_fill_(flat, 0)
    return PenaltySlopes(d, candidates, p * g, None if complete else tied, p[..., k - 1 : k] * share)
