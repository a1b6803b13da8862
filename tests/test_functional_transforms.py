"""Everything PyTorch can do to a function it can do to the loss: derivatives of every order and mode, transforms of
torch.func, and compilation."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import DEVICE, KERNELS, RUNNING
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from prsl_kernels import PRSLoss, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
OPTIONS: dict[str, Any] = {"k": 4, "b": 0.7}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Peaked logits without ties; the third target is ignored."""
    return 3 * torch.randn(5, 9, dtype=dtype), torch.tensor([0, 3, -100, 1, 8])


@pytest.mark.parametrize("backend", ["auto", *RUNNING])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_derivatives(space: str, distance: str, backend: str, kind: str) -> None:
    """First and second derivatives in reverse and forward mode, where there is one, against finite differences."""
    if backend in KERNELS and kind == "probabilities":
        pytest.skip("the kernels take class indices alone")
    forward_mode = backend not in KERNELS
    z, target = batch()
    z, target = z[1:4, :7], target[1:4]
    weight = torch.rand(7, dtype=torch.float64)
    inputs = [z.requires_grad_()]
    if kind == "probabilities":
        target = torch.rand(3, 7, dtype=torch.float64)
        inputs.append(target.requires_grad_())

    def loss(z: Tensor, target: Tensor = target) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none", "backend": backend} | OPTIONS
        return prsl_cross_entropy(z, target, weight, space=space, distance=distance, **options)

    torch.autograd.gradcheck(
        loss,
        inputs,
        check_forward_ad=forward_mode,
        check_batched_grad=True,
        check_batched_forward_grad=forward_mode,
    )
    torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=forward_mode, check_rev_over_rev=True)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_torch_func(space: str, distance: str, backend: str) -> None:
    z, target = batch()
    options: dict[str, Any] = {"space": space, "distance": distance, "backend": backend} | OPTIONS

    def loss(z: Tensor, target: Tensor = target) -> Tensor:
        return prsl_cross_entropy(z, target, **options)

    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(grad(loss)(z), expected, **close)
    torch.testing.assert_close(jacrev(loss)(z), expected, **close)
    torch.testing.assert_close(jacfwd(loss)(z), expected, **close)
    tangent = torch.randn_like(z)
    value, slope = jvp(loss, (z,), (tangent,))
    torch.testing.assert_close(value, loss(z), **close)
    torch.testing.assert_close(slope, (expected * tangent).sum(), **close)
    torch.testing.assert_close(vjp(loss, z)[1](torch.tensor(2.0, dtype=torch.float64))[0], 2 * expected, **close)
    curvature = hessian(loss)(z)
    torch.testing.assert_close(curvature, jacrev(jacrev(loss))(z), rtol=1e-10, atol=1e-13)
    (product_,) = torch.autograd.grad((torch.autograd.grad(loss(x), x, create_graph=True)[0] * tangent).sum(), x)
    torch.testing.assert_close(torch.einsum("abcd,cd", curvature, tangent), product_, rtol=1e-10, atol=1e-13)

    # A gradient for each token: nested transforms of rows.
    each = vmap(grad(loss))(z, target.clamp(min=0))
    for row, y, got in zip(z, target.clamp(min=0), each, strict=True):
        torch.testing.assert_close(got, grad(loss)(row, y), **close)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_vmap_over_any_argument(reduction: str, kind: str) -> None:
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1} | OPTIONS
    z = torch.randn(3, 5, 9)
    target = torch.randint(9, (3, 5)) if kind == "indices" else torch.rand(3, 5, 9)
    if kind == "indices":
        target[1, 2] = -100
    weight = torch.rand(3, 9)
    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 0, None)):
        inputs = [x if dim is not None else x[0] for x, dim in zip((z, target, weight), dims, strict=True)]
        inputs[0] = inputs[0].movedim(0, dims[0]) if dims[0] else inputs[0]
        got = vmap(lambda *x: prsl_cross_entropy(*x, **options), in_dims=dims)(*inputs)
        for i in range(3):
            one = [x.select(dim, i) if dim is not None else x for x, dim in zip(inputs, dims, strict=True)]
            torch.testing.assert_close(got[i], prsl_cross_entropy(*one, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU refuses with an assertion, after which it cannot be used")
def test_vmap_does_not_read_the_targets() -> None:
    """No IndexError of ours, as that would need their values; the gather below refuses."""
    z, target = batch()
    with pytest.raises(RuntimeError, match="out of bounds"):
        vmap(lambda z, y: prsl_cross_entropy(z, y, **OPTIONS))(z, target.clamp(min=0) + 9)


def test_forward_mode_of_the_module() -> None:
    z, target = batch()
    loss = PRSLoss(**OPTIONS)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        slope = torch.autograd.forward_ad.unpack_dual(loss(dual, target)).tangent
    assert slope is not None
    assert slope.abs() < 1e-13  # a constant on all logits changes nothing
    assert functional_call(loss, {}, (z, target)) == loss(z, target)


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize(
    ("space", "distance", "dtype", "compiler"),
    [
        ("prob", "l2", torch.bfloat16, "inductor"),
        ("prob", "l1", torch.float16, "aot_eager"),
        ("log_prob", "l2", torch.float64, "aot_eager"),
        ("log_prob", "l1", torch.float32, "aot_eager"),
    ],
)
def test_compile(space: str, distance: str, dtype: torch.dtype, compiler: str, backend: str) -> None:
    """One graph for values and gradients, for sizes that change, with ignored tokens and ties."""
    options: dict[str, Any] = {"space": space, "distance": distance, "label_smoothing": 0.1, "backend": backend}
    options |= OPTIONS
    compiled = torch.compile(prsl_cross_entropy, fullgraph=True, dynamic=True, backend=compiler)
    weight = torch.rand(9)
    for rows in (5, 7, 2):
        z = (3 * torch.randn(rows, 9)).round().to(dtype).requires_grad_()
        target = torch.randint(9, (rows,))
        target[1] = -100
        got = compiled(z, target, weight, return_terms=True, **options)
        want = prsl_cross_entropy(z, target, weight, return_terms=True, **options)
        torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(x.loss, z)[0] for x in (got, want)]
        torch.testing.assert_close(*gradients, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_of_the_module_for_every_shape() -> None:
    """Static shapes, an image's worth of dimensions, and class probabilities."""
    loss = PRSLoss(torch.rand(9), **OPTIONS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = 3 * torch.randn(2, 9, 3)
    for target in (torch.randint(9, (2, 3)), torch.rand(2, 9, 3)):
        torch.testing.assert_close(compiled(z, target), loss(z, target), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", RUNNING)
def test_compile_leaves_inplace_backward_to_the_compiler(backend: str) -> None:
    """The result is right twice over, and the logits are untouched."""
    z, target = batch(torch.float32)
    z.requires_grad_()
    before = z.detach().clone()
    (want,) = torch.autograd.grad(prsl_cross_entropy(z, target, **OPTIONS), z)
    compiled = torch.compile(prsl_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(z, target, inplace_backward=True, backend=backend, **OPTIONS)
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, z, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert torch.equal(z, before)


@pytest.mark.parametrize("backend", RUNNING)
def test_export(backend: str) -> None:
    z, target = batch(torch.float32)
    loss = PRSLoss(backend=backend, **OPTIONS)
    program = torch.export.export(loss, (z, target))
    torch.testing.assert_close(program.module()(z, target), loss(z, target))


def test_b_zero_has_the_derivatives_of_cross_entropy() -> None:
    z, target = batch()
    got = hessian(lambda z: prsl_cross_entropy(z, target, b=0))(z)
    torch.testing.assert_close(got, hessian(lambda z: F.cross_entropy(z, target))(z), rtol=1e-13, atol=1e-16)
