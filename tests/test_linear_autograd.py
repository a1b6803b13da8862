"""Derivatives of `linear_prsl_cross_entropy`, and its place in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from linear_problem import H, N, Problem, V, budget, relative
from running import DEVICE
from torch import Tensor

from prsl_kernels import LossTerms, linear, linear_prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrix products of the operator, as they come."""
    seen: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (seen.append(name), function(*args, **kwargs))[1]

    for module, name in ((torch, "mm"), (torch, "addmm"), (linear, "add_product")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return seen


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_where_they_are_wanted_alone(reduction: str, products: list[str]) -> None:
    again = int(reduction == "none")  # the logits once more
    for wanted in product((True, False), repeat=3):
        problem = Problem(torch.float32)
        for leaf, want in zip(problem.leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        products.clear()
        loss = problem.linear(k=5, b=1.0, reduction=reduction)
        if not any(wanted):
            assert products == ["addmm"]
            assert not loss.requires_grad
            continue
        loss.sum().backward()
        expected = ["addmm"] * (1 + again) + ["mm"] * wanted[0] + ["add_product"] * wanted[1]
        assert sorted(products) == sorted(expected)
        gradients = torch.autograd.grad(problem.whole(k=5, b=1.0, reduction="sum"), problem.leaves)
        for leaf, gradient in zip(problem.leaves, gradients, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
    products.clear()
    with torch.no_grad():
        assert not Problem(torch.float32).linear(k=5).requires_grad
    assert products == ["addmm"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_as_often_as_you_like(reduction: str) -> None:
    problem = Problem()
    loss = problem.linear(k=5, b=0.7, reduction=reduction, memory_budget=budget(4, torch.float64))
    reference = problem.whole(k=5, b=0.7, reduction=reduction)
    for factor in (3.0, -0.5, 1.0):
        upstream = torch.rand_like(loss) * factor
        actual = torch.autograd.grad(loss, problem.leaves, upstream, retain_graph=True)
        expected = torch.autograd.grad(reference, problem.leaves, upstream, retain_graph=True)
        torch.testing.assert_close(actual, expected)
        actual = torch.autograd.grad(loss, problem.matrix, upstream, retain_graph=True)  # a part of the graph
        torch.testing.assert_close(actual[0], expected[1])


def test_a_tied_matrix_and_accumulation() -> None:
    problem = Problem()
    tokens = torch.randint(V, (N,))
    for function in (problem.linear, problem.whole):
        problem.input = problem.matrix[tokens] * 0.5
        for _ in range(2):
            function(k=5, b=1.0).backward(retain_graph=True)
        gradient, problem.matrix.grad = problem.matrix.grad, None
        if function == problem.linear:
            actual = gradient
    torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(reduction: str) -> None:
    problem = Problem(rows=5)

    def loss(*leaves: Tensor) -> Tensor:
        x, matrix, bias = leaves
        return linear_prsl_cross_entropy(
            x, matrix, problem.target, linear_bias=bias, k=3, b=1.0, reduction=reduction, memory_budget=1
        )

    assert torch.autograd.gradcheck(loss, problem.leaves)
    assert torch.autograd.gradgradcheck(loss, problem.leaves, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("b", [0.0, 2.0])
def test_double_backward_of_a_tied_matrix_with_hooks(b: float, reduction: str) -> None:
    """Hidden states come from the matrix, whose gradient counts them once; and hooks run once."""
    problem, tokens = Problem(bias=False), torch.randint(V, (N,))

    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        problem.input = problem.matrix[tokens].tanh()
        calls: list[int] = []
        problem.input.register_hook(lambda gradient: (calls.append(1), 2 * gradient)[1])
        loss = function(k=5, b=b, reduction=reduction)
        (first,) = torch.autograd.grad(loss, problem.matrix, torch.ones_like(loss), create_graph=True)
        assert len(calls) == 1
        return [first, *torch.autograd.grad(first.square().sum(), problem.matrix)]

    torch.testing.assert_close(gradients(problem.linear), gradients(problem.whole))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_upstream_gradients_at_a_time(reduction: str) -> None:
    problem = Problem()
    results = []
    for function in (problem.linear, problem.whole):
        loss = function(k=5, b=0.7, reduction=reduction)
        upstream = torch.stack([torch.ones_like(loss), torch.full_like(loss, -0.5)])
        batched = torch.autograd.grad(loss, problem.leaves, upstream, is_grads_batched=True, retain_graph=True)
        results.append((*batched, *torch.autograd.grad(loss, problem.leaves, upstream[1])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_of_the_upstream_gradient(reduction: str) -> None:
    problem = Problem()
    forward_ad = torch.autograd.forward_ad
    tangents = []
    for function in (problem.linear, problem.whole):
        loss = function(k=5, b=0.7, reduction=reduction)
        upstream = torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(upstream, 2 * upstream + 1)
            (gradient,) = torch.autograd.grad(loss, problem.input, dual)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    torch.testing.assert_close(tangents[0], tangents[1])


def test_a_gradient_of_the_class_weights() -> None:
    problem = Problem()
    weight = torch.rand(V, dtype=torch.float64, requires_grad=True)
    loss, whole = (function(weight=weight, k=5, b=0.7) for function in (problem.linear, problem.whole))
    inputs = [weight, *problem.leaves]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs))


def test_changes_before_backward_are_noticed() -> None:
    for name in ("input", "matrix"):
        for reduction in ("mean", "none"):
            problem = Problem()
            loss = problem.linear(k=5, reduction=reduction).sum()
            with torch.no_grad():
                getattr(problem, name).mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_upstream_gradients_of_one_term() -> None:
    problem = Problem()
    terms = problem.linear(k=5, b=1.0, return_terms=True)
    assert isinstance(terms, LossTerms)
    assert not terms.cross_entropy.requires_grad
    assert not terms.penalty.requires_grad


# ---- the place in PyTorch --------------------------------------------------------------------------------------------


def test_transforms_go_through_the_whole_logits() -> None:
    problem = Problem(rows=4)
    tensors = (problem.input.detach(), problem.matrix.detach(), problem.bias.detach())

    def loss(of: Callable[..., Any], x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        problem.input, problem.matrix, problem.bias = x, matrix, bias
        return of(k=3, b=1.0)

    def linear_loss(*tensors: Tensor) -> Tensor:
        return loss(problem.linear, *tensors)

    def whole_loss(*tensors: Tensor) -> Tensor:
        return loss(problem.whole, *tensors)

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2))(*tensors),
        lambda f: torch.func.jvp(f, tensors, tensors),
        lambda f: torch.func.hessian(f, argnums=2)(*tensors),
        lambda f: torch.func.vmap(f, in_dims=(0, None, None))(torch.stack([tensors[0], 2 * tensors[0]]), *tensors[1:]),
    ):
        torch.testing.assert_close(transform(linear_loss), transform(whole_loss))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tensors[0])
        tangent = torch.autograd.forward_ad.unpack_dual(linear_loss(dual, *tensors[1:])).tangent
        expected = torch.autograd.forward_ad.unpack_dual(whole_loss(dual, *tensors[1:])).tangent
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile(reduction: str) -> None:
    problem = Problem(torch.float32)

    def step(x: Tensor, matrix: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return (
            linear_prsl_cross_entropy(x.tanh(), matrix, target, linear_bias=bias, k=5, b=1.0, reduction=reduction)
            .square()
            .sum()
        )

    compiled = torch.compile(step, fullgraph=True)
    for rows in (N, 9):
        problem = Problem(torch.float32, rows=rows)
        expected = torch.autograd.grad(step(*problem.leaves, problem.target), problem.leaves)
        actual = torch.autograd.grad(compiled(*problem.leaves, problem.target), problem.leaves)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str) -> None:
    problem = Problem(torch.float32)
    upstream = torch.rand(() if reduction == "mean" else (N,))
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = problem.linear(k=5, b=1.0, reduction=reduction)
        expected = problem.whole(k=5, b=1.0, reduction=reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    exact = torch.autograd.grad(problem.whole(k=5, b=1.0, reduction=reduction), problem.leaves, upstream)
    got = torch.autograd.grad(actual, problem.leaves, upstream)
    want = torch.autograd.grad(expected, problem.leaves, upstream)
    for x, y, e in zip(got, want, exact, strict=True):
        assert x.dtype == torch.float32
        assert relative(x, e) <= 1.5 * relative(y, e)
    with torch.autocast(DEVICE, torch.bfloat16):
        problem.input = (
            problem.input.detach().bfloat16().requires_grad_()
        )  # as a layer before it returns under autocast
        problem.linear(k=5, reduction=reduction).sum().backward()
    assert problem.input.grad.dtype == torch.bfloat16
    assert problem.matrix.grad.dtype == torch.float32
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(TypeError, match=r"linear_weight has dtype torch\.float64"),
    ):
        linear_prsl_cross_entropy(problem.input, problem.matrix.double(), problem.target)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert Problem(torch.float64).linear(k=5).dtype == torch.float64


def test_meta_tensors_have_a_shape() -> None:
    x, matrix = torch.empty(4, H, device="meta"), torch.empty(V, H, device="meta")
    target = torch.empty(4, dtype=torch.long, device="meta")
    assert linear_prsl_cross_entropy(x, matrix, target).shape == ()
    assert linear_prsl_cross_entropy(x, matrix, target, reduction="none").shape == (4,)


def test_activation_checkpointing() -> None:
    problem = Problem()
    expected = torch.autograd.grad(problem.linear(k=5, b=1.0), problem.leaves)
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: linear_prsl_cross_entropy(
                x, problem.matrix, problem.target, linear_bias=problem.bias, k=5, b=1.0
            ),
            problem.input,
            use_reentrant=reentrant,
        )
        for leaf in problem.leaves:
            leaf.grad = None
        loss.backward()
        torch.testing.assert_close(tuple(leaf.grad for leaf in problem.leaves), expected)
