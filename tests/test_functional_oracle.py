"""Values and gradients on hostile inputs, against the exact ones, in units of the arithmetic's rounding error.

An error is allowed to be a few roundings of the exact intermediate values (the oracle's ``condition``), and for half
precision logits half a unit in the last place of their gradient, which is rounded once. What underflows may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from running import RUNNING
from torch import Tensor

from prsl_kernels import eager, linear_prsl_cross_entropy, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

INF = math.inf
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32, torch.bfloat16)  # with the range that float16 lacks
SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
# Roundings of one result, each of at most eps / 2 in the worst case.
ROUNDINGS = 4


@dataclass
class Case:
    """Three rows of logits, unless told otherwise, with the options of the loss."""

    logits: Callable[[], Tensor]
    target: Any = (0, 3, 1)
    k: int = 4
    b: float = 0.7
    weight: Callable[[], Tensor] | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    dtypes: tuple[torch.dtype, ...] = DTYPES


def peaked(v: int = 12, scale: float = 4.0, rows: int = 3) -> Tensor:
    """Logits as of a trained model: few classes have nearly all the probability."""
    return torch.randn(rows, v, dtype=torch.float64) * scale


def ahead(nats: float, v: int = 12, target: tuple[int, ...] = (0, 3, 1)) -> Tensor:
    """The target so far ahead of all the others."""
    z = torch.randn(3, v, dtype=torch.float64)
    for row, y in enumerate(target):
        z[row, y] = z[row].max() + nats
    return z


def put(z: Tensor, classes: Any, value: float | Tensor) -> Tensor:
    """The logits with some of the classes replaced in every row."""
    z[:, classes] = value
    return z


def distribution(v: int = 12, rows: int = 3) -> Tensor:
    """Class probabilities with one clear favourite."""
    return torch.softmax(3 * torch.randn(rows, v, dtype=torch.float64), -1)


CASES: dict[str, Case] = {
    "peaked": Case(peaked),
    "peaked, right": Case(lambda: ahead(3)),
    "peaked, wrong": Case(lambda: put(peaked(), 7, 20.0)),
    "very peaked": Case(lambda: peaked(scale=30)),
    "flat": Case(lambda: peaked(scale=0.01)),
    "zeros": Case(lambda: torch.zeros(3, 12)),
    "all equal at 1e4": Case(lambda: torch.full((3, 12), 1e4)),
    "all equal at -1e4": Case(lambda: torch.full((3, 12), -1e4)),
    "around 1e4": Case(lambda: 1e4 + peaked()),
    "around -1e4": Case(lambda: -1e4 + peaked()),
    "plus and minus 1e4": Case(lambda: peaked().sign() * 1e4 + peaked()),
    "spread over 1e4": Case(lambda: peaked(scale=4e3)),
    "two at 1e4, equal": Case(lambda: put(1e4 - 50 + peaked(), [5, 6], 1e4)),
    "target 30 ahead": Case(lambda: ahead(30)),
    "target 52 ahead": Case(lambda: ahead(52)),
    "target 80 ahead": Case(lambda: ahead(80)),
    "target 100 ahead": Case(lambda: ahead(100)),
    "target 140 ahead": Case(lambda: ahead(140)),
    "target 1e4 ahead": Case(lambda: ahead(1e4)),
    "target 1e4 behind": Case(lambda: ahead(-1e4)),
    "target 60 ahead of equals": Case(lambda: put(torch.zeros(3, 12), 0, 60.0), target=(0, 0, 0)),
    "target 60 ahead of near equals": Case(lambda: put(10 + 1e-4 * peaked(), 0, 60.0), target=(0, 0, 0)),
    "neighbours at 10": Case(lambda: 10 + 1e-5 * peaked()),
    "neighbours at 0": Case(lambda: 1e-6 * peaked()),
    "minute": Case(lambda: 1e-30 * peaked(), dtypes=WIDE),
    "huge": Case(lambda: 1e30 * peaked(), dtypes=(torch.float64,)),
    "two classes": Case(lambda: peaked(2), target=(0, 1, 1), k=1),
    "three classes": Case(lambda: peaked(3), target=(0, 1, 2), k=2),
    "k = 1": Case(peaked, k=1),
    "k = V - 1": Case(peaked, k=11),
    "k = V - 2": Case(peaked, k=10),
    "wide": Case(lambda: peaked(400), k=20),
    "wide, wrong": Case(lambda: put(peaked(400), 7, 25.0), k=100),
    "integers": Case(lambda: peaked().round()),
    "integers, many": Case(lambda: peaked(60, 2).round(), k=9),
    "tie at the threshold": Case(lambda: put(peaked(scale=1), [2, 4, 5, 6, 7], 1.25)),
    "tie at the top": Case(lambda: put(peaked(scale=1), [4, 5], 9.5)),
    "tie over all of K": Case(lambda: put(peaked(scale=1), [4, 5, 6, 7, 8], 9.5)),
    "two ties": Case(lambda: put(put(peaked(scale=1), [4, 5], 9.5), [6, 7, 8, 9], 4.5), k=3),
    "others tied": Case(lambda: put(torch.full((3, 12), -2.5), 0, 1.0), target=(0, 0, 0)),
    "others tied but one": Case(lambda: put(put(torch.full((3, 12), -2.5), 0, 1.0), 1, 2.0), target=(0, 0, 0)),
    "target in the tie": Case(lambda: put(peaked(scale=1), [0, 1, 3, 5, 7, 9], 1.25)),
    "target tied for the top": Case(lambda: put(peaked(scale=1), [0, 1, 3], 9.0)),
    "long tie": Case(lambda: put(peaked(80), list(range(2, 62)), 3.5), k=3, target=(0, 3, 70)),
    "long tie, wide K": Case(lambda: put(peaked(80), list(range(2, 62)), 3.5), k=30, target=(0, 3, 70)),
    "masked": Case(lambda: put(peaked(), [2, 5, 8], -INF)),
    "masked, k finite": Case(lambda: put(peaked(), [2, 4, 5, 6, 8, 9, 10], -INF), target=(0, 0, 0)),
    "masked, fewer than k": Case(lambda: put(peaked(), [2, 4, 5, 6, 7, 8, 9, 10, 11], -INF)),
    "masked, one besides": Case(lambda: put(peaked(), list(range(1, 11)), -INF), target=(0, 0, 0)),
    "masked, none besides": Case(lambda: put(peaked(), list(range(1, 12)), -INF), target=(0, 0, 0)),
    "masked, top tied": Case(lambda: put(put(peaked(), [2, 4, 5, 6, 8, 9, 10], -INF), [1, 3, 7], 2.0), target=(0,) * 3),
    "masked at 1e4": Case(lambda: put(1e4 + peaked(), [2, 5, 8], -INF)),
    "weight": Case(peaked, weight=lambda: torch.rand(12) * 3),
    "weight with zeros": Case(peaked, weight=lambda: torch.tensor([0.0, 2.0, 1.0, 0.5] * 3)),
    "smoothing": Case(peaked, label_smoothing=0.1),
    "smoothing, target 52 ahead": Case(lambda: ahead(52), label_smoothing=0.1),
    "all smooth": Case(peaked, label_smoothing=1.0),
    "smoothing and weight": Case(peaked, weight=lambda: torch.rand(12) * 3, label_smoothing=0.2),
    "probabilities": Case(peaked, target=distribution),
    "probabilities, smoothing": Case(peaked, target=distribution, label_smoothing=0.1),
    "probabilities, weight": Case(peaked, target=distribution, weight=lambda: torch.rand(12), label_smoothing=0.1),
    "probabilities, tied": Case(peaked, target=lambda: put(torch.zeros(3, 12), [4, 7], 0.5)),
    "probabilities, ties": Case(lambda: peaked(scale=1.5).round(), target=lambda: torch.full((3, 12), 1 / 12)),
    "ignored": Case(peaked, target=(0, -100, 1)),
    "ignored class": Case(peaked, target=(0, 3, 1), ignore_index=3),
    "ignored, all": Case(peaked, target=(-100, -100, -100)),
    "ignored, NaN": Case(lambda: torch.cat((peaked(rows=2), torch.full((1, 12), math.nan))), target=(0, 3, -100)),
    "ignored, inf": Case(lambda: torch.cat((peaked(rows=2), torch.full((1, 12), INF))), target=(0, 3, -100)),
    "ignored, weight": Case(peaked, target=(0, -100, 1), weight=lambda: torch.rand(12), label_smoothing=0.1),
    "b < 0": Case(peaked, b=-0.7),
    "b large": Case(peaked, b=1e4, dtypes=WIDE),
    "b large, 52 ahead": Case(lambda: ahead(52), b=1e6, dtypes=WIDE),
    "b small": Case(peaked, b=1e-4),
    "b = 0": Case(peaked, b=0.0, k=99),
    "b = 0, smoothing": Case(peaked, b=0.0, label_smoothing=0.1, weight=lambda: torch.rand(12)),
}


@dataclass
class Way:
    """One way to compute the loss and its gradient."""

    backend: str
    level: str = ""  # the instruction set of "native"
    unread: bool = False  # as in a compiler, under vmap and on a GPU, where eager cannot look at numbers
    inplace: bool = False
    linear: bool = False


def ways(case: Case, backend: str, each_level: Callable[[], Iterator[str]]) -> Iterator[Way]:
    """Every way of a backend, each while the level it names is in use; class probabilities are eager's alone."""
    if backend == "eager":
        yield Way("eager")
        yield Way("eager", unread=True)
    for level in each_level() if backend == "native" else [""]:
        if not callable(case.target):
            if backend != "eager":
                yield Way(backend, level)
            if backend != "triton":  # interpreted, it takes its time; in place and in chunks, the kernels are the same
                yield Way(backend, level, inplace=True)
                yield Way(backend, level, linear=True)


def arguments(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Logits, target, weight and options."""
    torch.manual_seed(1)
    compute = torch.promote_types(dtype, torch.float32)
    z = case.logits().to(dtype)
    target = case.target().to(compute) if callable(case.target) else torch.tensor(case.target)
    weight = None if case.weight is None else case.weight().to(compute)
    options = {"k": case.k, "b": case.b, "label_smoothing": case.label_smoothing, "ignore_index": case.ignore_index}
    return z, target, weight, options


def through_linear(z: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """The terms (N,) of each row by itself: hidden states (1, 1) of one, and the logits as the vocabulary matrix."""
    del options["inplace_backward"]
    # Of one row. What "sum" computes ahead of the upstream gradient is rounded to half precision before it is scaled.
    options["reduction"] = "sum" if z.itemsize > 2 else "none"
    rows = zip(z, target, strict=True)
    terms = [
        linear_prsl_cross_entropy(z.new_ones(1, 1), row.unsqueeze(1), y.unsqueeze(0), weight=weight, **options)
        for row, y in rows
    ]
    return tuple(torch.stack(parts).flatten() for parts in zip(*terms, strict=True))


def close(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """No error is larger than allowed."""
    got = got.detach().double()
    error = torch.where(got == want, 0, (got - want).abs().nan_to_num(INF))
    wrong = [(tuple(at), got[tuple(at)].item(), want[tuple(at)].item()) for at in (error > allowed).nonzero().tolist()]
    assert not wrong, f"{name}: (index, result, exact) = {wrong}; {(error / allowed).nan_to_num().max():.3g} x too far"


def check(case: Case, way: Way, exact: oracle.Loss, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compare one way of computing the loss and its gradient with the exact ones."""
    logits, target, weight = inputs
    dtype, compute = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    z = logits.clone().requires_grad_()
    upstream = torch.tensor([1.0, -0.5, 3.0], dtype=compute)
    options = {"reduction": "none", "return_terms": True, "inplace_backward": way.inplace, **options}
    with pytest.MonkeyPatch.context() as patch:
        if way.unread:
            patch.setattr(eager, "known", lambda condition: None)
        function = through_linear if way.linear else prsl_cross_entropy
        loss, cross_entropy, penalty = function(z, target, weight, backend=way.backend, **options)
        assert loss.dtype == compute
        assert torch.equal(z.detach(), logits) or logits.isnan().any()
        loss.backward(upstream)
    assert z.grad is not None
    assert z.grad.dtype == dtype

    def double(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    unit = ROUNDINGS * torch.finfo(compute).eps
    lost = 16 * torch.finfo(compute).tiny * (1 + abs(case.b))
    condition = double(exact.loss_condition)
    close(f"{way}: loss", loss, double(exact.loss), unit * condition + lost)
    close(f"{way}: cross entropy", cross_entropy, double(exact.cross_entropy), unit * condition + lost)
    allowed = unit * condition / abs(case.b) if case.b else torch.zeros(3, dtype=torch.float64)
    close(f"{way}: penalty", penalty, double(exact.penalty), allowed + lost)

    scale = upstream.double().unsqueeze(-1)
    grad = double(exact.grad) * scale
    allowed = unit * double(exact.grad_condition) * scale.abs() + lost
    if dtype != compute:
        finfo = torch.finfo(dtype)
        allowed = allowed * (1 + finfo.eps) + grad.abs() * finfo.eps / 2 + finfo.tiny * finfo.eps
    close(f"{way}: gradient", z.grad, grad, allowed)
    if not target.is_floating_point():
        ignored = target == case.ignore_index
        assert (z.grad[ignored] == 0).all()
        assert (loss[ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", RUNNING)
def test_against_the_oracle(
    backend: str, name: str, dtype: torch.dtype, each_level: Callable[[], Iterator[str]]
) -> None:
    case = CASES[name]
    if dtype not in case.dtypes:
        pytest.skip(f"{dtype} cannot hold these logits")
    z, target, weight, options = arguments(case, dtype)
    numbers = (z.tolist(), target.tolist(), None if weight is None else weight.tolist())
    # Interpreted kernels take their time, and their own tests go through the others.
    for space, distance in [SPREADS[0], SPREADS[3]] if backend == "triton" else SPREADS:
        options |= {"space": space, "distance": distance}
        exact = oracle.batch(*numbers, **options)
        for way in ways(case, backend, each_level):
            check(case, way, exact, (z, target, weight), options)
