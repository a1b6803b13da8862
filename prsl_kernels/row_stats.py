"""A row in three steps, of which different ranks hold different classes: its stats, their merging, and its gradient.

:func:`row_stats` looks at the classes that one rank holds, :func:`merge` makes the stats of whole rows from those of
all ranks, and :func:`row_gradient` has the gradient of the classes that one rank holds. Plain PyTorch, on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import eager
from .eager import Distance, Space

# The columns of a rank's stats: the largest of its logits; the sum of exp(z - largest); the target's logit, or 0 where
# another rank has it; with a penalty, how many of its non-target classes are tied with the smallest candidate, and the
# k candidates in descending order; and with label smoothing, the weighted sum of z - largest.
COLUMNS = 3


class RowStats(NamedTuple):
    """What the loss and backward need of a whole row besides its logits, each (...): RowStats in csrc/closed_form.h."""

    max: Tensor  # the largest logit, and
    log_sum: Tensor  # log of the sum of exp(z - max): apart, since their sum loses its digits for logits around 1e4
    target: Tensor  # the target's logit
    uniform: Tensor  # with label smoothing, the sum of the class weights times log p
    top: Tensor  # the largest non-target logit
    threshold: Tensor  # the k-th largest non-target logit; +inf where the penalty has no derivative
    length: Tensor  # d in units of p_top, or d itself in "log_prob"
    share: Tensor  # -A / n: what each of the n classes that are tied for the minimum gets

    def log_p(self, z: Tensor) -> Tensor:
        """The log-probability of logits z that are (...) too."""
        return (z - self.max) - self.log_sum

    def distance(self, space: Space) -> Tensor:
        """The distance d (...)."""
        return self.log_p(self.top).exp() * self.length if space == "prob" else self.length


def row_stats(logits: Tensor, y: Tensor, *, k: int, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The stats (..., columns) of rows of which this rank holds the logits (..., V) in float32 or float64; V may be 0.

    ``y`` (...) is the target among these V classes, or -1 where it is elsewhere. ``weight`` (V,) asks for the column of
    label smoothing. ``k=0`` leaves the penalty out. Also returned are the indices (..., min(k + 1, V)) of the largest
    classes, the target perhaps among them, for :func:`row_gradient`.
    """
    rows, classes = logits.shape[:-1], logits.shape[-1]
    y = y.unsqueeze(-1)
    if classes == 0:
        largest, z_y = logits.new_full((*rows, 1), -torch.inf), logits.new_zeros((*rows, 1))
    else:
        largest = logits.amax(-1, keepdim=True)
        z_y = logits.gather(-1, y.clamp(min=0)).where(y >= 0, 0)
    # Of a row of -inf alone the sum is 0, not that of exp(-inf - -inf).
    relative = logits - largest.masked_fill(largest == -torch.inf, 0)
    smoothing = []
    if weight is not None:  # an infinite one does not make NaN of the largest class
        smoothing = [torch.where(relative == 0, 0, relative * weight).sum(-1, keepdim=True)]
    columns = [largest, relative.exp_().sum(-1, keepdim=True), z_y]
    slots = None
    if k > 0:
        values, slots = logits.topk(min(k + 1, classes))
        missing = (0, k + 1 - values.shape[-1])
        is_y = torch.nn.functional.pad((slots == y) & (y >= 0), missing)
        values = torch.nn.functional.pad(values, missing, value=-torch.inf)
        # The candidates behind y move up by one; without y, the last one is too many.
        moved = is_y.cumsum(-1)[..., :-1]
        candidates = values.gather(-1, torch.arange(k, device=y.device) + moved)
        smallest = candidates[..., -1:]
        # As numbers, and into memory that is there: four times as fast as the sum of a bool tensor.
        tied = torch.eq(logits, smallest, out=relative).sum(-1, keepdim=True)
        columns += [tied - ((y >= 0) & (z_y == smallest)).to(logits.dtype), candidates]
    return torch.cat(columns + smoothing, -1), slots


def merge(stats: Tensor, *, k: int, space: Space, distance: Distance, weight_sums: Tensor | None) -> RowStats:
    """The stats of whole rows from those of all ranks (ranks, ..., columns), in float32 or float64.

    ``weight_sums`` (ranks,) are the sums of the class weights that each rank holds, for label smoothing.
    """
    maxima, sums, targets = stats[..., :COLUMNS].unbind(-1)
    largest = maxima.amax(0)
    factors = (maxima - largest).exp()
    # In the order of the ranks, which a reduction does not promise.
    log_sum = in_order(sums * factors).log()
    uniform = torch.zeros_like(largest)
    if weight_sums is not None:
        w = weight_sums.reshape(-1, *(1 for _ in largest.shape))
        shifts = maxima.masked_fill(maxima == -torch.inf, 0) - largest
        uniform = in_order(stats[..., -1] + torch.where(shifts == 0, 0, w * shifts)) - in_order(w) * log_sum
    merged = RowStats(largest, log_sum, in_order(targets), uniform, *(torch.zeros_like(largest) for _ in range(4)))
    if k == 0:
        return merged

    each = stats[..., COLUMNS + 1 : COLUMNS + 1 + k]
    z = each.movedim(0, -2).flatten(-2).topk(k).values
    t = z[..., k - 1 :]
    # The smallest candidate of a rank is not above t. If it is at t, others of the rank may be there that it did not
    # send, and it sent their number; if it is below, all its classes at t are candidates.
    at_t = (each == t).sum(-1, dtype=stats.dtype)
    tied = in_order(torch.where(each[..., -1] == t.squeeze(-1), stats[..., COLUMNS], at_t))

    length = eager.spread(z, t, torch.zeros_like(largest), space=space, distance=distance)
    flat = length == 0 if space == "prob" else (length == 0) | (t.squeeze(-1) == -torch.inf)
    a = slopes(z, t, z[..., :1], length.unsqueeze(-1), space=space, distance=distance)
    share = torch.where(flat, 0, -a.sum(-1) / tied.clamp(min=1))
    threshold = t.squeeze(-1).masked_fill(flat, torch.inf)
    return merged._replace(top=z[..., 0], threshold=threshold, length=length, share=share)


def row_gradient(
    logits: Tensor,
    y: Tensor,
    slots: Tensor | None,
    stats: RowStats,
    grad_d: Tensor,
    q_y: Tensor,
    q: Tensor | None,
    q_sum: Tensor,
    *,
    space: Space,
    distance: Distance,
) -> Tensor:
    """The gradient (..., V) of this rank's logits, for the loss sum_i -q_i log p_i + grad_d * d of every row.

    ``logits``, ``y`` and ``slots`` are those of :func:`row_stats`. Of the weights q, which need not sum to one, a row
    has ``q_y`` (...) at its target, ``q`` (..., V) or None besides, and ``q_sum`` (...) in all. closed_form.py derives
    the formulas.
    """
    if logits.shape[-1] == 0:
        return logits.clone()
    rows = RowStats(*(x.unsqueeze(-1) for x in stats))
    y, grad_d, q_y, q_sum = (x.unsqueeze(-1) for x in (y, grad_d, q_y, q_sum))
    of_p = q_sum if slots is None or space == "log_prob" else q_sum - grad_d * rows.distance(space)
    p = (logits - rows.max).sub_(rows.log_sum).exp_()
    target = y.clamp(min=0)
    at_target = p.gather(-1, target) * of_p - q_y
    if slots is not None:
        # Sparse above the threshold, where there are fewer than k classes, and dense at it, where there may be many.
        z = logits.gather(-1, slots)
        above = slopes(z, rows.threshold, rows.top, rows.length, space=space, distance=distance)
        tied = rows.share
        if space == "prob":
            above, tied = p.gather(-1, slots) * above, rows.log_p(rows.threshold).exp() * tied
    gradient = p.mul_(of_p)
    if slots is not None:
        gradient.scatter_add_(-1, slots, grad_d * above)
        at_threshold = torch.eq(logits, rows.threshold, out=torch.empty_like(logits))
        gradient.addcmul_(at_threshold, (grad_d * tied).where(rows.threshold.isfinite(), 0))
    # The target is not in K: what the penalty has put there goes.
    gradient.scatter_(-1, target, at_target.where(y >= 0, gradient.gather(-1, target)))
    return gradient if q is None else gradient.sub_(q)


def slopes(z: Tensor, t: Tensor, top: Tensor, length: Tensor, *, space: Space, distance: Distance) -> Tensor:
    """The derivative a (..., n) of d by p (by z in "log_prob") for classes with logits z above the threshold t."""
    if distance == "l1":
        return (z > t).to(z.dtype)
    deviation = (z - top).exp() * -torch.expm1(t - z) if space == "prob" else z - t
    return torch.where(z > t, deviation / length, 0)


def in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, from the first to the last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
