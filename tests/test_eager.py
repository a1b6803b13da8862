"""The definition in parts: the choice of K, ties, and derivatives where squares and logarithms would give NaN."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jvp, vmap

from prsl_kernels import eager, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
INF = math.inf


def gradient(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(prsl_cross_entropy(z, target, reduction="sum", **options), z)[0]


@pytest.mark.parametrize("k", [1, 2, 7, 40, 58, 59])
@pytest.mark.parametrize("values", ["distinct", "tied", "masked"])
def test_largest_classes(k: int, values: str) -> None:
    """The k best without the excluded class, and all that are tied with the last, or the word that some are missing."""
    z = torch.randn(50, 60)
    if values == "tied":
        z = (z * 2).round()
    if values == "masked":
        z[torch.rand(50, 60) < 0.5] = -INF
    y = torch.cat((z[:25].argmax(-1), torch.randint(60, (25,))))
    classes, complete = eager.largest_classes(z, y, k)
    for row, excluded, found in zip(z, y.tolist(), classes, strict=True):
        others = [x for i, x in enumerate(row.tolist()) if i != excluded]
        best = sorted(others, reverse=True)
        assert row[found].tolist() == best[: len(found)]
        assert excluded not in found
        assert len(set(found.tolist())) == len(found)
        if complete and best[k - 1] != -INF:
            assert (row[found] == best[k - 1]).sum() == others.count(best[k - 1])
    assert complete or (values == "tied" and 4 * (k + 2) < 60)


def test_it_is_not_known_what_cannot_be_read() -> None:
    assert eager.known(torch.tensor(True)) is True
    assert eager.known(torch.tensor(False)) is False
    assert eager.known(torch.tensor(False, device="meta")) is None
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(eager.known(x.any()))
        return x

    vmap(look)(torch.zeros(2, 3, dtype=torch.bool))
    assert seen == [None]


def test_one_minus_exp() -> None:
    """Value and derivative to the last digits, on both sides of the seam and at infinity."""
    x = torch.cat((torch.logspace(-300, 2, 500, dtype=torch.float64), torch.tensor([0.7, 0.0, INF]))).requires_grad_()
    value = eager.one_minus_exp(x)
    torch.testing.assert_close(
        value, torch.tensor([-math.expm1(-v) for v in x.tolist()], dtype=x.dtype), rtol=1e-15, atol=0
    )
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, (-x.detach()).exp(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-36, 1e30])
def test_norm_neither_underflows_nor_overflows(scale: float) -> None:
    x = (scale * torch.rand(4, 5)).requires_grad_()
    length = eager.norm(x, "l2")
    torch.testing.assert_close(length.double(), x.double().norm(dim=-1), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(length.sum(), x)
    torch.testing.assert_close(slope.double(), x.double() / x.double().norm(dim=-1, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_vocabulary(dtype: torch.dtype, space: str, distance: str, k: int) -> None:
    """float32 arithmetic over 50,257 classes keeps up with float64, the smallest probabilities included."""
    z = (4 * torch.randn(3, 50257)).to(dtype).float()
    target = torch.tensor([0, 50256, int(z[2].argmax())])
    options: dict[str, Any] = {"k": k, "space": space, "distance": distance, "b": 0.5}
    eps = torch.finfo(torch.float32).eps
    got, want = prsl_cross_entropy(z, target, **options), prsl_cross_entropy(z.double(), target, **options)
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=0)
    exact = gradient(z.double(), target, **options)
    error = (gradient(z, target, **options).double() - exact).abs()
    assert (error <= 64 * eps * (exact.abs() + z.double().softmax(-1))).all()


def naive(z: Tensor, target: int, members: tuple[int, ...], minimum: int, space: str, distance: str) -> Tensor:
    """The penalty of a row for K and its smallest member as given."""
    x = z.softmax(-1) if space == "prob" else z.log_softmax(-1)
    difference = x[list(members)] - x[minimum]
    return difference.norm() if distance == "l2" else difference.sum()


@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("way", ["read", "unread", "in place"])
def test_tied_classes_share_the_gradient_of_the_minimum(
    space: str, distance: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the average over every valid choice of K and its minimum, whatever the order of the vocabulary."""
    if way == "unread":
        monkeypatch.setattr(eager, "known", lambda condition: None)
    z = torch.tensor([5.0, 4.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.0, 9.0, 1.0], dtype=torch.float64)
    target = 9  # tied itself, and out
    options: dict[str, Any] = {"k": 6, "space": space, "distance": distance, "inplace_backward": way == "in place"}
    got = gradient(z, torch.tensor(target), b=1.0, **options) - gradient(z, torch.tensor(target), b=0, **options)
    choices = []
    for pair in combinations(range(3, 7), 2):  # 8, 0, 1, 2 are above
        for minimum in pair:
            x = z.clone().requires_grad_()
            choices.append(torch.autograd.grad(naive(x, target, (8, 0, 1, 2, *pair), minimum, space, distance), x)[0])
    torch.testing.assert_close(got, torch.stack(choices).mean(0), rtol=1e-13, atol=1e-16)

    order = torch.randperm(10)
    permuted = gradient(z[order], (order == target).nonzero()[0, 0], b=1.0, **options)
    whole = gradient(z, torch.tensor(target), b=1.0, **options)
    torch.testing.assert_close(permuted, whole[order], rtol=1e-14, atol=1e-16)


HOSTILE: dict[str, tuple[Tensor, int]] = {
    "zeros": (torch.zeros(8), 0),
    "others tied": (torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 1]), 0),
    "tie at the threshold": (torch.tensor([3.0, 5, 4, 1, 1, 1, 1, 0]), 0),
    "tie at the top": (torch.tensor([3.0, 5, 5, 5, 1, 1, 1, 0]), 0),
    "tie over all of K": (torch.tensor([3.0, 5, 5, 5, 5, 1, 1, 0]), 0),
    "target tied": (torch.tensor([1.0, 5, 4, 1, 1, 1, 1, 0]), 0),
    "target 100 ahead": (torch.tensor([100.0, 1, 2, 3, 4, 5, 6, 7]), 0),
    "target 1e4 ahead": (torch.tensor([1e4, 1, 2, 3, 4, 5, 6, 7]), 0),
    "at 1e4": (1e4 + torch.arange(8.0), 3),
    "at plus and minus 1e4": (1e4 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1]), 1),
    "masked": (torch.tensor([1.0, 5, 4, 3, 2, -INF, -INF, -INF]), 0),
    "fewer than k": (torch.tensor([1.0, 5, 4, -INF, -INF, -INF, -INF, -INF]), 0),
    "one besides": (torch.tensor([1.0, 5, -INF, -INF, -INF, -INF, -INF, -INF]), 0),
    "none besides": (torch.tensor([1.0, -INF, -INF, -INF, -INF, -INF, -INF, -INF]), 0),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("way", ["read", "unread"])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_every_derivative_is_finite(
    name: str, way: str, space: str, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both modes and second order, and they agree with each other; where d is 0, it adds nothing to them."""
    if way == "unread":
        monkeypatch.setattr(eager, "known", lambda condition: None)
    z, target = HOSTILE[name]
    y = torch.tensor(target)
    for dtype, k in ((torch.float32, 4), (torch.float64, 4), (torch.float64, 1)):
        x = z.to(dtype)
        options: dict[str, Any] = {"k": k, "b": 0.7, "space": space, "distance": distance}

        def loss(z: Tensor, options: dict[str, Any] = options) -> Tensor:
            return prsl_cross_entropy(z, y, **options)

        first = gradient(x, y, **options)
        assert first.isfinite().all()
        tangent = torch.linspace(-1, 1, 8, dtype=dtype)
        _, slope = jvp(loss, (x,), (tangent,))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(slope, first @ tangent, rtol=64 * eps, atol=64 * eps)
        second = hessian(loss)(x)
        assert second.isfinite().all()
        torch.testing.assert_close(second, second.T, rtol=64 * eps, atol=64 * eps)
        w = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
        (twice,) = torch.autograd.grad(g @ tangent, w)
        torch.testing.assert_close(twice, second @ tangent, rtol=64 * eps, atol=64 * eps)
        if prsl_cross_entropy(x, y, return_terms=True, **options).penalty == 0 and distance == "l2":
            plain = {**options, "b": 0}
            assert torch.equal(first, gradient(x, y, **plain))
            torch.testing.assert_close(second, hessian(lambda z: loss(z, plain))(x), rtol=0, atol=eps)  # noqa: B023
