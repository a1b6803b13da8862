"""The closed form of the gradient against autograd of the definition, and the operator that uses it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from running import RUNNING
from torch import Tensor

from prsl_kernels import ops, prsl_cross_entropy
from prsl_kernels.closed_form import token_gradient
from prsl_kernels.eager import token_terms

pytestmark = pytest.mark.usefixtures("_single_thread")

SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
OPTIONS: dict[str, Any] = {"k": 5, "b": 0.7}


def logits(kind: str) -> Tensor:
    """Rows (6, 40) that are peaked, tied here and there, tied for long, or partly masked."""
    z = 4 * torch.randn(6, 40, dtype=torch.float64)
    if kind == "tied":
        z = (z / 2).round()
    if kind == "long ties":
        z = z.clamp(max=2.5)
    if kind == "masked":
        z[torch.rand(6, 40) < 0.9] = -torch.inf
        z[:, 0] = 1.0
    return z


@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("kind", ["distinct", "tied", "long ties", "masked"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("k", [0, 1, 5, 39])
def test_against_autograd(space: str, distance: str, kind: str, weighted: bool, smoothing: float, k: int) -> None:
    """Element by element, to the last digits, for any upstream gradients of the two terms."""
    z = logits(kind).requires_grad_()
    target = torch.tensor([0, 7, -100, 39, 20, 0])
    if kind == "masked":
        target = torch.where(target > 0, 0, target)
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"k": k, "space": space, "distance": distance, "ignore_index": -100}
    options["label_smoothing"] = smoothing
    upstream = torch.randn(2, 6, dtype=torch.float64)
    terms = token_terms(z, target, weight, **options)
    (expected,) = torch.autograd.grad(terms[: 2 if k else 1], z, list(upstream)[: 2 if k else 1])
    got = token_gradient(z.detach(), target, weight, *upstream, **options)
    row_scale = expected.abs().amax(-1, keepdim=True)
    assert ((got - expected).abs() <= 1e-14 * row_scale + 1e-13 * expected.abs()).all()
    assert (got[2] == 0).all()


@pytest.fixture(params=RUNNING)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Those of every test below, for each backend."""
    return {**OPTIONS, "backend": request.param}


class TestInplaceBackward:
    """``inplace_backward=True``, the operator that has the closed form for its gradient."""

    @pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 12, 3), (2, 12, 3, 2)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("b", [0, 0.7])
    def test_the_gradient_takes_the_storage_of_the_logits(
        self, shape: tuple[int, ...], dtype: torch.dtype, b: float, options: dict[str, Any]
    ) -> None:
        options |= {"k": 4, "b": b}
        source = (3 * torch.randn(shape)).to(dtype).requires_grad_()
        target = torch.randint(12, shape[:1] + shape[2:] if len(shape) > 1 else ())
        (expected,) = torch.autograd.grad(prsl_cross_entropy(source, target, **options | {"backend": "eager"}), source)
        passed: list[Tensor] = []
        z = source * 1
        z.register_hook(passed.append)
        before = z.detach().clone()
        terms = prsl_cross_entropy(z, target, inplace_backward=True, return_terms=True, **options)
        assert torch.equal(z, before)
        plain = prsl_cross_entropy(source, target, return_terms=True, **options)
        assert all(torch.equal(got, want) for got, want in zip(terms, plain, strict=True))
        terms.loss.backward()
        assert passed[0].data_ptr() == z.data_ptr()
        assert source.grad is not None
        assert source.grad.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(source.grad, expected, rtol=4 * unit, atol=4 * unit * expected.abs().max().item())
        torch.testing.assert_close(z.detach(), source.grad, rtol=0, atol=0)

    def test_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eager overwrites large logits a few rows at a time."""
        options: dict[str, Any] = {**OPTIONS, "backend": "eager"}
        z = logits("tied")
        target = torch.tensor([0, 7, -100, 39, 20, 0])
        (expected,) = torch.autograd.grad(prsl_cross_entropy(x := z.clone().requires_grad_(), target, **options), x)
        for piece in (1, 81, 10**6):
            monkeypatch.setattr(ops, "PIECE", piece)
            x = z.clone().requires_grad_()
            prsl_cross_entropy(x, target, inplace_backward=True, **options).backward()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, expected, rtol=1e-13, atol=1e-16)

    def test_any_upstream_gradient_and_a_part_of_the_graph(self, options: dict[str, Any]) -> None:
        hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        matrix = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)
        target = torch.randint(40, (6,))
        upstream = 65536 * torch.randn(6, dtype=torch.float64)
        plain = prsl_cross_entropy(hidden @ matrix, target, reduction="none", **options | {"backend": "eager"})
        want = torch.autograd.grad(plain, (hidden, matrix), upstream)
        for inputs, expected in (((hidden, matrix), want), ((matrix,), want[1:])):
            loss = prsl_cross_entropy(hidden @ matrix, target, reduction="none", inplace_backward=True, **options)
            torch.testing.assert_close(torch.autograd.grad(loss, inputs, upstream), expected, rtol=1e-12, atol=1e-9)

    def test_a_second_backward_raises(self, options: dict[str, Any]) -> None:
        z = logits("distinct").requires_grad_()
        loss = prsl_cross_entropy(z, torch.arange(6), inplace_backward=True, **options)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward through inplace_backward=True"):
            loss.backward()

    def test_create_graph_raises_before_anything_changes(self, options: dict[str, Any]) -> None:
        z = logits("distinct").requires_grad_()
        before = z.detach().clone()
        loss = prsl_cross_entropy(z, torch.arange(6), inplace_backward=True, **options)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, z, create_graph=True)
        assert torch.equal(z, before)
        loss.backward()

    def test_whoever_else_needs_the_logits_is_told(self, options: dict[str, Any]) -> None:
        """The mutation is declared, so PyTorch sees that a saved tensor is no longer what it was."""
        z = logits("distinct").requires_grad_() * 1
        other = z.square().sum()
        prsl_cross_entropy(z, torch.arange(6), inplace_backward=True, **options).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_without_a_gradient_nothing_changes(self, options: dict[str, Any]) -> None:
        z = logits("distinct")
        before = z.clone()
        prsl_cross_entropy(z, torch.arange(6), inplace_backward=True, **options)
        with torch.no_grad():
            prsl_cross_entropy(z.requires_grad_(), torch.arange(6), inplace_backward=True, **options)
        assert torch.equal(z, before)

    def test_refusals(self) -> None:
        z, target = logits("distinct").requires_grad_(), torch.arange(6)
        options: dict[str, Any] = {"inplace_backward": True, **OPTIONS}
        with pytest.raises(ValueError, match="inplace_backward=True cannot be used with class probabilities"):
            prsl_cross_entropy(z, torch.rand(6, 40), **options)
        with pytest.raises(ValueError, match="inplace_backward=True has no gradient for weight"):
            prsl_cross_entropy(z, target, torch.rand(40, requires_grad=True), **options)
        with pytest.raises(ValueError, match="inplace_backward=True needs storage for every logit"):
            prsl_cross_entropy(z[:1].expand(6, 40), target, **options)
        with pytest.raises(RuntimeError, match="cannot run under the transforms of"):
            torch.func.grad(lambda z: prsl_cross_entropy(z, target, **options))(z.detach())

    def test_the_operator_declares_what_it_does(self) -> None:
        """PyTorch's own checks of a custom operator: its schema and its fake version."""
        z, target = logits("distinct"), torch.arange(6)
        grads = torch.randn(2, 6, dtype=torch.float64)
        arguments = (z, target, None, *grads, 5, "prob", "l2", -100, 0.0)
        torch.library.opcheck(ops.token_gradient_, arguments, test_utils=("test_schema", "test_faketensor"))
