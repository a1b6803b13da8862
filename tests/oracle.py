"""The loss by brute force, one row at a time in 80 digits: what every implementation is compared with.

Nothing here is shared with the package, neither code nor formulas: K is found by sorting, the gradient goes through the
Jacobian of the softmax, and ties are resolved by averaging over every class that could be the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath

mp = mpmath.mp.clone()
mp.dps = 80


@dataclass
class Row:
    """The exact terms of a row and their gradients, and how much one rounding may move each of these."""

    cross_entropy: float
    penalty: float
    cross_entropy_grad: list[float]
    penalty_grad: list[float]
    # Per unit of relative rounding error, from |dp/p| <= |log p| and the like. Infinitesimals of first order.
    cross_entropy_condition: float
    penalty_condition: float
    cross_entropy_grad_condition: list[float]
    penalty_grad_condition: list[float]


def row(logits: list[float], q: list[float], excluded: int, *, k: int, space: str, distance: str) -> Row:
    """A row with finite or -inf logits. ``q`` are the weights of -log p; ``k=0`` leaves the penalty out."""
    z = [mp.mpf(x) for x in logits]
    top = max(z)
    e = [mp.exp(x - top) for x in z]
    total = sum(e)
    p = [x / total for x in e]
    log_p = [x - top - mp.log(total) for x in z]
    classes = range(len(z))
    size = [1 + abs(x) if x != -mp.inf else mp.mpf(1) for x in log_p]

    cross_entropy = sum((-q[i] * log_p[i] for i in classes if q[i] != 0), mp.mpf(0))
    q_sum = sum(mp.mpf(x) for x in q)
    cross_entropy_grad = [p[i] * q_sum - q[i] for i in classes]

    penalty, g = mp.mpf(0), [mp.mpf(0)] * len(z)
    others = sorted((i for i in classes if i != excluded), key=lambda i: -z[i])
    members = others[:k]
    x = p if space == "prob" else z
    if k and (space == "prob" or z[members[-1]] != -mp.inf):
        m = x[members[-1]]
        deviations = [x[j] - m for j in members]
        penalty = mp.sqrt(sum(v * v for v in deviations)) if distance == "l2" else sum(deviations)
        tied = [i for i in others if z[i] == z[members[-1]]]
        if penalty != 0:
            for j, v in zip(members, deviations, strict=True):
                if v == 0:
                    continue
                slope = v / penalty if distance == "l2" else mp.mpf(1)
                g[j] += slope
                for i in tied:
                    g[i] -= slope / len(tied)
    if space == "prob":  # dp_j/dz_i = p_j ([i = j] - p_i)
        inner = sum(g[j] * p[j] for j in classes)
        penalty_grad = [p[i] * (g[i] - inner) for i in classes]
        bound = sum(abs(g[j]) * p[j] * size[j] for j in classes)
        penalty_grad_condition = [size[i] * p[i] * (abs(g[i]) + bound) for i in classes]
        penalty_condition = penalty * max((size[j] for j in members if p[j] > 0), default=mp.mpf(1))
    else:
        penalty_grad, penalty_condition = g, penalty
        penalty_grad_condition = [abs(v) for v in g]
    return Row(
        float(cross_entropy),
        float(penalty),
        [float(v) for v in cross_entropy_grad],
        [float(v) for v in penalty_grad],
        float(sum((abs(q[i]) * size[i] for i in classes if q[i] != 0), mp.mpf(0))),
        float(penalty_condition),
        [float(size[i] * p[i] * q_sum + abs(q[i])) for i in classes],
        [float(v) for v in penalty_grad_condition],
    )


@dataclass
class Loss:
    """The exact loss of a batch (N, C), its gradient, and the conditions of both (see :class:`Row`)."""

    loss: list[float]
    grad: list[list[float]]
    loss_condition: list[float]
    grad_condition: list[list[float]]
    cross_entropy: list[float]
    penalty: list[float]
    total: float  # what a mean divides by


def batch(
    logits: list[list[float]],
    target: list[int] | list[list[float]],
    weight: list[float] | None,
    *,
    k: int,
    b: float,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Loss:
    """Every token's loss and gradient for logits (N, C) and class indices (N,) or class probabilities (N, C)."""
    out = Loss([], [], [], [], [], [], 0.0)
    count = len(logits[0]) if logits else 0
    w = weight or [1.0] * count
    for z, y in zip(logits, target, strict=True):
        if y == ignore_index:
            out.loss.append(0.0)
            out.grad.append([0.0] * count)
            out.loss_condition.append(0.0)
            out.grad_condition.append([0.0] * count)
            out.cross_entropy.append(0.0)
            out.penalty.append(0.0)
            continue
        smooth = [label_smoothing / count * w[i] for i in range(count)]
        if isinstance(y, int):
            q = [s + ((1 - label_smoothing) * w[i] if i == y else 0) for i, s in enumerate(smooth)]
            excluded, w_y = y, w[y]
            out.total += w_y
        else:
            q = [s + (1 - label_smoothing) * w[i] * y[i] for i, s in enumerate(smooth)]
            excluded, w_y = max(range(count), key=lambda i: y[i]), 1.0
            out.total += 1
        r = row(z, q, excluded, k=k if b else 0, space=space, distance=distance)
        c = b * w_y
        out.loss.append(r.cross_entropy + c * r.penalty)
        out.loss_condition.append(r.cross_entropy_condition + abs(c) * r.penalty_condition)
        out.grad.append([x + c * v for x, v in zip(r.cross_entropy_grad, r.penalty_grad, strict=True)])
        pairs = zip(r.cross_entropy_grad_condition, r.penalty_grad_condition, strict=True)
        out.grad_condition.append([x + abs(c) * v for x, v in pairs])
        out.cross_entropy.append(r.cross_entropy)
        out.penalty.append(w_y * r.penalty)
    return out
