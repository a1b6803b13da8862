"""What the tests of the compiled extension share: hostile rows, and how far from the exact result one may be.

The exact result is eager's in float64, of the logits after their rounding to the dtype under test, so that both see the
same ties. The bounds follow from the arithmetic, as in tests/oracle.py, but for whole batches of long rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prsl_kernels import eager, prsl_cross_entropy

INF, NAN = math.inf, math.nan
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPREADS = [("prob", "l2"), ("prob", "l1"), ("log_prob", "l2"), ("log_prob", "l1")]
# Roundings of one result, each of at most eps / 2 in the worst case.
ROUNDINGS = 4
# Sums over K run in as many parts as 16 bytes hold, and those over all classes in four times as many, of which none is
# added to more often than this before it goes into a double.
LANES = {torch.float32: 4, torch.float64: 2}
ADDITIONS = 256

unsanitized = pytest.mark.skipif(
    os.environ.get("PRSL_SANITIZED") == "1", reason="not under the sanitizers: slow, timed, or a process of its own"
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of a dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


# ---- rows that are hard on a selection, on a sum or on an exponential ------------------------------------------------


def _put(z: Tensor, classes: Any, value: Any) -> Tensor:
    z[:, classes] = value
    return z


def _keep(z: Tensor, target: Tensor, count: int) -> Tensor:
    """All masked but the target and about so many others."""
    kept = torch.rand_like(z).topk(min(count, z.shape[1])).indices
    return torch.full_like(z, -INF).scatter(1, kept, z.gather(1, kept)).scatter(1, target[:, None], 0.3)


def _ahead(z: Tensor, target: Tensor, nats: float) -> Tensor:
    """The target so far ahead of all others, or behind them."""
    best = z.amax(-1, keepdim=True) if nats > 0 else z.amin(-1, keepdim=True)
    return z.scatter(1, target[:, None], best + nats)


def _ramp(z: Tensor, height: float) -> Tensor:
    return torch.linspace(0, height, z.shape[1], dtype=z.dtype).expand_as(z)


# From standard normal logits (N, V) in float64, targets (N,) and k.
HOSTILE: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "random": lambda z, y, k: z,
    "peaked": lambda z, y, k: 4 * z,
    "very peaked": lambda z, y, k: 30 * z,
    "ties": lambda z, y, k: (2 * z).round(),
    "long ties": lambda z, y, k: z.clamp(max=0.5),
    "all equal": lambda z, y, k: torch.full_like(z, 10.0),
    "all equal at 1e4": lambda z, y, k: torch.full_like(z, 1e4),
    "around 1e4": lambda z, y, k: 4 * z + 1e4,
    "around -1e4": lambda z, y, k: 4 * z - 1e4,
    "plus and minus 1e4": lambda z, y, k: z.sign() * 1e4 + z,
    "neighbours": lambda z, y, k: 10 + 1e-5 * z,
    "minute": lambda z, y, k: 1e-6 * z,
    "two values": lambda z, y, k: 3.0 * (z > 1),
    "ascending": lambda z, y, k: _ramp(z, 16) - 8,
    "ascending, steep": lambda z, y, k: _ramp(z, 300),
    "ascending, noisy": lambda z, y, k: _ramp(z, 40) + z,
    "ascending in steps": lambda z, y, k: _ramp(z, 40).round(),
    "descending": lambda z, y, k: -_ramp(z, 16),
    "one lane of 16": lambda z, y, k: _put(z - 9, slice(k % 16, None, 16), z[:, k % 16 :: 16]),
    "one lane of 64": lambda z, y, k: _put(z - 9, slice(k % 64, None, 64), z[:, k % 64 :: 64]),
    "one lane of 64, ties": lambda z, y, k: _put(z - 9, slice(k % 64, None, 64), z[:, k % 64 :: 64].round()),
    "one lane of 256": lambda z, y, k: _put(z - 9, slice(k % 256, None, 256), z[:, k % 256 :: 256]),
    "20 of 64 lanes, ascending": lambda z, y, k: torch.where(torch.arange(z.shape[1]) % 64 < 20, _ramp(z, 40), z - 9),
    "largest last": lambda z, y, k: _put(z, slice(-2, None), 9.0),
    "target 60 ahead": lambda z, y, k: _ahead(z, y, 60),
    "target 120 ahead": lambda z, y, k: _ahead(z, y, 120),
    "target 120 ahead of equals": lambda z, y, k: _ahead(torch.zeros_like(z), y, 120),
    "target 120 behind": lambda z, y, k: _ahead(z, y, -120),
    "target tied": lambda z, y, k: z.round().scatter(1, y[:, None], z.round().amax(-1, keepdim=True)),
    "masked": lambda z, y, k: torch.where(torch.rand_like(z) < 0.7, -INF, z),
    "masked, k finite": lambda z, y, k: _keep(z, y, k),
    "masked, one finite": lambda z, y, k: _keep(z, y, 1),
    "masked, none besides": lambda z, y, k: torch.full_like(z, -INF).scatter(1, y[:, None], 1.0),
    "masked at first": lambda z, y, k: _put(z, slice(0, z.shape[1] * 2 // 3), -INF).scatter(1, y[:, None], 0.3),
    "masked in the end": lambda z, y, k: _put(z, slice(z.shape[1] // 3, None), -INF),
    "masked, all": lambda z, y, k: torch.full_like(z, -INF),
    "NaN": lambda z, y, k: _put(z, k, NAN),
    "NaN among masked": lambda z, y, k: _put(torch.full_like(z, -INF), z.shape[1] // 2, NAN),
    "inf": lambda z, y, k: _put(z, k, INF),
}


def hostile(kinds: list[str], target: Tensor, classes: int, k: int) -> Tensor:
    """Rows (N, V) in float64 of these kinds in turn, for targets (N,) in [0, V)."""
    z = torch.randn(len(target), classes, dtype=torch.float64)
    for at, kind in enumerate(kinds):
        rows = slice(at, None, len(kinds))
        z[rows] = HOSTILE[kind](z[rows].clone(), target[rows], k)
    return z


# ---- the exact result and its bounds ---------------------------------------------------------------------------------


class Result(NamedTuple):
    """The terms (N,) of every token and the gradient (N, V) of the logits."""

    cross_entropy: Tensor
    penalty: Tensor
    gradient: Tensor


def native_result(
    z: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, *, k: int, b: float, **options: Any
) -> Result:
    """What the compiled extension makes of logits (N, V); upstream gradients (N,) reach the loss."""
    z = z.detach().clone().requires_grad_()
    arguments: dict[str, Any] = {"k": max(k, 1), "b": b, "reduction": "none", "backend": "native", **options}
    terms = prsl_cross_entropy(z, target, weight, return_terms=True, **arguments)
    terms.loss.backward(upstream)
    assert z.grad is not None
    return Result(terms.cross_entropy, terms.penalty, z.grad)


class Exact:
    """The exact result for logits (N, V), with bounds on the error of each number. ``k=0`` leaves the penalty out."""

    def __init__(self, z: Tensor, target: Tensor, weight: Tensor | None, *, k: int, **options: Any) -> None:
        self.dtype, self.compute, self.k = z.dtype, compute_dtype(z.dtype), k
        self.space, self.distance = options["space"], options["distance"]
        self.ignored = target == options["ignore_index"]
        x = z.detach().double().requires_grad_()
        w = None if weight is None else weight.double()
        c, d = eager.token_terms(x, target, w, k=k, **options)
        (self.c_grad,) = torch.autograd.grad(c.sum(), x, retain_graph=True)
        self.d_grad = torch.autograd.grad(d.sum(), x)[0] if k else torch.zeros_like(x)
        self.c, self.d = c.detach(), d.detach()

        x, y = x.detach(), target.masked_fill(self.ignored, 0).unsqueeze(-1)
        classes, lanes = x.shape[1], LANES[self.compute]
        self.eps = torch.finfo(self.compute).eps
        adds = 4 + min(classes / (4 * lanes), ADDITIONS)
        if z.dtype == torch.float64:  # the exact result has roundings of its own, and sums in four lanes
            self.eps, adds = 2 * self.eps, adds + classes / 4
        unit, half_unit = ROUNDINGS * self.eps, self.eps / 2
        log_p = x.log_softmax(-1)
        p = log_p.exp()
        size = 1 + log_p.abs().nan_to_num(posinf=0)
        away = (x - x.amax(-1, keepdim=True)).abs().nan_to_num(posinf=0)
        # Each exponential and each addition moves the sum of the exponentials, and with it every p.
        of_sum = half_unit * ((p * (1 + away)).sum(-1, keepdim=True) + adds)
        of_p = unit * size + of_sum  # the relative error of p, and the absolute one of log p

        w = torch.ones(classes, dtype=torch.float64) if w is None else w
        smoothed = options["label_smoothing"] / classes * w
        self.w_y = w[y].squeeze(-1)
        q = smoothed.expand_as(x).scatter_add(1, y, (1 - options["label_smoothing"]) * w[y])
        self.q_sum = q.sum(-1, keepdim=True)
        self.c_allowed = torch.where(q == 0, 0, q * of_p).sum(-1) + half_unit * adds * (smoothed * away).sum(-1)
        self.c_grad_allowed = of_p * p * self.q_sum + unit * q
        self.d_allowed, self.d_grad_allowed = torch.zeros_like(self.d), torch.zeros_like(x)
        if k:
            self._bound_penalty(x.scatter(1, y, -INF), p, size, of_p, of_sum)

    def _bound_penalty(self, others: Tensor, p: Tensor, size: Tensor, of_p: Tensor, of_sum: Tensor) -> None:
        """Where the target's logit among the ``others`` (N, V) is -inf; the rest is as above."""
        unit = ROUNDINGS * self.eps
        top = others.topk(self.k)
        gap = top.values - top.values[:, -1:]  # NaN where all of K is masked, or NaN itself
        if self.space == "prob":
            deviation, of_deviation = p.gather(1, top.indices) * -torch.expm1(-gap), unit * size.gather(1, top.indices)
        else:
            deviation, of_deviation = gap.masked_fill(gap == INF, 0), torch.full_like(gap, unit)
        deviation = deviation.nan_to_num()
        # d is a sum of positive parts, and each carries its error in.
        parts = deviation / deviation.amax(-1, keepdim=True).clamp(min=1e-300)
        parts = parts.square() if self.distance == "l2" else parts
        of_d = (parts * of_deviation).sum(-1, keepdim=True) / parts.sum(-1, keepdim=True).clamp(min=1e-300)
        of_d = of_d + self.eps / 2 * self.k / LANES[self.compute]
        if self.space == "prob":
            of_d = of_d + of_sum
            slopes = self.d_grad.abs() + 2 * p * self.d.unsqueeze(-1)  # p |g| and p d at least
            if self.dtype == torch.float64:
                # Autograd of eager has sum p g in the place of d, and its terms cancel: in every class in proportion to
                # p, and in the largest, relative to which it computes, altogether.
                largest = others == top.values[:, :1]
                slopes = slopes + torch.where(largest, 1, p) * slopes.sum(-1, keepdim=True)
            self.d_grad_allowed = (of_p + of_d) * slopes
        else:
            self.d_grad_allowed = (unit + of_d) * self.d_grad.abs()
        self.d_allowed = of_d.squeeze(-1) * self.d

    def check(self, where: str, got: Result, upstream: Tensor, b: float) -> None:
        """All of a result is within the bounds."""
        lost = 16 * torch.finfo(self.compute).tiny  # what underflows
        assert got.cross_entropy.dtype == got.penalty.dtype == self.compute
        assert got.gradient.dtype == self.dtype
        close(f"{where}: cross entropy", got.cross_entropy, self.c, self.c_allowed + lost)
        known = ~self.c.isnan()  # the loss is NaN in the other rows, whatever the penalty
        close(f"{where}: penalty", got.penalty[known], self.d[known], (self.d_allowed + lost * (1 + self.w_y))[known])

        u_c = upstream.double().unsqueeze(-1)
        u_d = (upstream * b).double().unsqueeze(-1)
        expected = u_c * self.c_grad + (u_d * self.d_grad if self.k else 0)
        steepest = self.w_y.unsqueeze(-1) * (self.k if self.distance == "l1" else math.sqrt(self.k))
        allowed = u_c.abs() * self.c_grad_allowed + u_d.abs() * self.d_grad_allowed
        allowed = allowed + lost * (1 + u_c.abs() * self.q_sum + u_d.abs() * steepest)
        if self.dtype != self.compute:  # rounded once, and perhaps to infinity
            half = torch.finfo(self.dtype)
            allowed = allowed * (1 + half.eps) + expected.abs() * half.eps / 2 + half.tiny * half.eps
            beyond = expected.abs() + allowed >= half.max * (1 + half.eps / 4)
            expected = torch.where(beyond & got.gradient.isinf(), expected.sign() * INF, expected)
        close(f"{where}: gradient", got.gradient, expected, allowed)
        assert (got.gradient[self.ignored] == 0).all(), where


def close(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Every number is as near to what it should be as allowed, and infinite or NaN where that is."""
    got = got.double()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0, (got - want).abs().nan_to_num(INF))
    wrong = error > allowed.nan_to_num(0)  # NaN in rows that are NaN altogether
    if wrong.any():
        at = [tuple(index) for index in wrong.nonzero()[:5].tolist()]
        found = [(index, got[index].item(), want[index].item(), allowed[index].item()) for index in at]
        raise AssertionError(f"{name}: {int(wrong.sum())} wrong; (index, result, exact, allowed) = {found}")


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether all the numbers are the same to the last bit, NaNs included."""
    raw = [x.detach().reshape(-1).view(torch.uint8) for x in (got, want)]
    return got.shape == want.shape and got.dtype == want.dtype and torch.equal(*raw)
