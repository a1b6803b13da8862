"""The loss in plain differentiable PyTorch, written to be read.

For one token with logits ``z``, target ``y`` and probabilities ``p = softmax(z)``::

    K = the k classes with the largest p, the target y left out
    m = the smallest p over K
    d = || p_K - m ||_2        (distance="l2"; the sum of p_K - m for "l1")
    loss = -log p_y + b * d

after Eq. 1 and 2 of Wang, Jiang, Zhang, Li, "Partially Recentralization Softmax Loss for Vision-Language Models
Robustness", arXiv:2402.03627. With ``space="log_prob"`` the distance is between the log-probabilities instead. With
``top_p`` each token has a k of its own: as many classes as hold that share of the probability that is not the target's.

Every transform of PyTorch works on these functions, and in float64 they are the oracle of every other backend. They
take logits of shape (..., V), classes last, and treat every row on its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Space = Literal["prob", "log_prob"]
Distance = Literal["l2", "l1"]


def token_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    k: int,
    space: Space,
    distance: Distance,
    ignore_index: int,
    label_smoothing: float,
    top_p: float | None = None,
    max_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of every token's loss, cross entropy and (weighted) distance, each of shape (...).

    ``logits`` is (..., V) in any floating dtype; half precision is computed in float32, which the terms have too.
    ``target`` is (...) int64 class indices or (..., V) class probabilities; ``weight`` is (V,) or None. With class
    indices the distance of a token counts ``weight[target]`` times; ignored tokens get 0 and 0. ``k=0`` leaves the
    distance out. Otherwise ``top_p``, in (0, 1], takes the place of k: K is the smallest set that holds this share of
    the probability of all the classes but the target, ties at its edge included, and at most the ``max_k`` largest.
    """
    if k > 0 and top_p is not None:
        others = max(0, logits.shape[-1] - 1)
        k = others if max_k is None else min(max_k, others)  # the most that K may have; 0 where there is but one class
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = None if target.is_floating_point() else target == ignore_index
    if ignored is None:
        y = target.argmax(-1)
    else:
        y = target.masked_fill(ignored, 0)
        logits = blank_ignored(logits, ignored)
    log_p = logits.log_softmax(-1)
    if k == 0:
        log_p_y = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        d = torch.zeros_like(log_p_y)
    else:
        candidates, complete = largest_classes(logits, y, k)
        # One gather for both, since in backward each one costs a pass over the whole vocabulary.
        log_p_y, log_p_1 = log_p.gather(-1, torch.stack((y, candidates[..., 0]), -1)).unbind(-1)
        z = logits.gather(-1, candidates)
        t = z[..., k - 1 : k] if top_p is None else edge_of_share(z[..., :k], logits, y, top_p)
        log_m = threshold(t, z, logits, y, complete=complete, space=space)
        d = spread(z, log_m, log_p_1, space=space, distance=distance)

    if ignored is None:
        return probability_cross_entropy(log_p, target, weight, label_smoothing), d
    # Ignored tokens stand at class 0, whose weight may be anything, infinite too.
    w_y = None if weight is None else weight[y].masked_fill(ignored, 0)
    cross_entropy = index_cross_entropy(log_p_y, log_p, w_y, weight, label_smoothing)
    if w_y is not None and k > 0:
        d = d * w_y
    return cross_entropy.masked_fill(ignored, 0), d.masked_fill(ignored, 0)


def index_cross_entropy(
    log_p_y: Tensor, log_p: Tensor, w_y: Tensor | None, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross entropy (...) with class indices: their log-probabilities and weights (...), and those of all (..., V)."""
    loss = -log_p_y if w_y is None else -log_p_y * w_y
    if label_smoothing > 0:
        uniform = -(log_p if weight is None else log_p * weight).mean(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return loss


def probability_cross_entropy(log_p: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """Cross entropy (...) of (..., V) log-probabilities with (..., V) class probabilities."""
    if label_smoothing > 0:
        target = (1 - label_smoothing) * target + label_smoothing / target.shape[-1]
    if weight is not None:
        target = target * weight
    return -(log_p * target).sum(-1)


def spread(z: Tensor, log_m: Tensor, log_p_1: Tensor, *, space: Space, distance: Distance) -> Tensor:
    """The distance d (...) of the largest classes from the smallest of them.

    ``z`` (..., n) holds their logits, in descending order, ``log_m`` (..., 1) the logit of the smallest, and
    ``log_p_1`` (...) the log-probability of the largest. Logits at or below the smallest do not count.
    """
    # A class that is tied with the minimum is at distance 0, whichever of the tied classes are in K.
    above = z > log_m
    gap = torch.where(above, z - log_m, 0)  # log(p_j / m): exact where it is small, and inf where m = 0
    if space == "log_prob":
        # The log-sum-exp cancels. With fewer than k finite logits, m has no logarithm, and there is no penalty.
        return norm(gap.masked_fill(log_m == -torch.inf, 0), distance)

    # p_j - m = p_1 * exp(z_j - z_1) * (1 - m / p_j): relative to the largest, so that no square underflows, and
    # without the cancellation between two nearly equal probabilities.
    relative = torch.where(above, z - z[..., :1], 0).exp() * one_minus_exp(gap)
    return log_p_1.exp() * norm(relative, distance)


def edge_of_share(z: Tensor, logits: Tensor, y: Tensor, top_p: float) -> Tensor:
    """The logit (..., 1) of the last of the fewest largest classes that hold the share ``top_p``.

    The share is of the sum over all the classes of ``logits`` (..., V) without ``y`` (...). ``z`` (..., k) holds the
    largest of them in descending order, and where these k hold less, the last of them with p > 0 is the edge. In rows
    without any it is the first, of logit -inf.
    """
    # Relative to the largest, the sum keeps its digits where the target is far ahead; and in float64, since the edge
    # would jump with the rounding of a long sum in float32.
    values, z_1 = z.detach().double(), z[..., :1].detach().double()
    members = (values != -torch.inf).sum(-1, keepdim=True)
    if top_p < 1:
        total = (logits.detach().double() - z_1).exp().scatter(-1, y.unsqueeze(-1), 0).sum(-1, keepdim=True)
        held = (values - z_1).exp().cumsum(-1)
        members = torch.minimum(members, (held < top_p * total).sum(-1, keepdim=True) + 1)
    return z.gather(-1, members.clamp(min=1) - 1)


def threshold(t: Tensor, z: Tensor, logits: Tensor, y: Tensor, *, complete: bool, space: Space) -> Tensor:
    """The logit (..., 1) of the minimum m, written as the mean over all the classes that are tied for it.

    Its value is ``t`` (..., 1), one of the candidates ``z`` (..., n) of the row. Its derivative is shared by the tied
    classes equally, which is the average over all the valid choices of K, and does not depend on the order of the
    vocabulary. ``complete`` says that the tied classes are all in ``z``; else they are looked for in ``logits``
    (..., V).
    """
    t = t.detach()
    pool = z if complete else logits
    tied = (pool == t) & (t != -torch.inf)  # p = 0 has no derivative
    if not complete:
        tied = tied.scatter(-1, y.unsqueeze(-1), False)
    count = tied.sum(-1, keepdim=True, dtype=t.dtype).clamp(min=1)
    difference = torch.where(tied, pool - t, 0)  # all zeros; what counts is the derivative
    if space == "log_prob":
        return t + difference.sum(-1, keepdim=True) / count  # the mean of the logits
    return t + torch.log1p(difference.expm1().sum(-1, keepdim=True) / count)  # the logarithm of the mean of p


def largest_classes(logits: Tensor, y: Tensor, k: int) -> tuple[Tensor, bool]:
    """The indices (..., n) of the n >= k largest logits without class ``y`` (...), in descending order.

    The second value says whether all the classes that are tied with the k-th one are among them. It is False, too,
    where that cannot be known (in a compiler, under vmap), or not without waiting (on a GPU).
    """
    classes = logits.shape[-1]
    for width in (k + 2, 4 * (k + 2)):  # ties are long in low precision alone
        top = logits.detach().topk(min(width, classes))
        # The candidates behind y move up by one: slot s takes candidate s, or s + 1.
        moved = (top.indices == y.unsqueeze(-1)).cumsum(-1)[..., :-1]
        slots = torch.ones_like(moved).cumsum(-1) - 1 + moved  # not arange, which is no DTensor where logits are
        candidates, values = top.indices.gather(-1, slots), top.values.gather(-1, slots)
        tie_goes_on = (values[..., -1] == values[..., k - 1]) & (values[..., -1] != -torch.inf)
        incomplete = width < classes and known(tie_goes_on.any())
        if not incomplete:
            break
    return candidates, incomplete is False


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(-x) for x >= 0, without cancellation in the value where x is small, or the derivative where it is large.

    (Autograd takes the derivative of expm1 for expm1 + 1.)
    """
    return torch.where(x < 0.7, -torch.expm1(-x), 1 - torch.exp(-x))


def norm(deviation: Tensor, distance: Distance) -> Tensor:
    """The l1 or l2 norm over the last dimension of deviations >= 0; where it is 0, so are both derivatives of "l2"."""
    if distance == "l1":
        return deviation.sum(-1)
    scale = deviation.detach().amax(-1, keepdim=True)
    zero = scale == 0
    # The square root never sees a zero: its infinite derivative times zero would be NaN.
    unit = torch.where(zero, 1, deviation / scale.masked_fill(zero, 1))
    length = scale * unit.square().sum(-1, keepdim=True).sqrt()
    return torch.where(zero, 0, length).squeeze(-1)


def blank_ignored(logits: Tensor, ignored: Tensor) -> Tensor:
    """Logits without NaN and infinity in the ignored tokens, from where they would reach the gradient."""
    if known(ignored.any()) is False or known((ignored & ~logits.detach().sum(-1).isfinite()).any()) is False:
        return logits
    return torch.where(ignored.unsqueeze(-1), 0, logits)


def known(condition: Tensor) -> bool | None:
    """The value of a condition, or None where it cannot be read, or not without waiting for another device.

    Under ``vmap`` and for fake tensors there is no single value, and a compiler would break the graph.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or condition.device.type != "cpu":
        return None
    try:
        return bool(condition)
    except RuntimeError:
        return None
