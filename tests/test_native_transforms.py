"""The compiled extension under autograd, autocast, the compiler and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_checks import SPREADS, same_bits, unsanitized
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.profiler import profile
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx import GraphModule
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from prsl_kernels import PRSLoss, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_native", "_single_thread")

OPTIONS: dict[str, Any] = {"k": 4, "b": 0.7}
NATIVE: dict[str, Any] = OPTIONS | {"backend": "native"}
EAGER: dict[str, Any] = OPTIONS | {"backend": "eager"}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Peaked logits without ties; the third target is ignored."""
    return 3 * torch.randn(5, 9, dtype=dtype), torch.tensor([0, 3, -100, 1, 8])


def operators_of(call: Callable[[], Any]) -> list[str]:
    """The names of the extension's operators that run in the call."""
    with profile() as profiled:
        call()
    names = [event.name for event in profiled.function_events]
    return [name.removeprefix("prsl_native::") for name in names if name.startswith("prsl_native::")]


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives(space: str, distance: str, weighted: bool) -> None:
    """First and second derivatives against finite differences; the second are eager's."""
    z, target = batch()
    z.requires_grad_()
    weight = torch.rand(9, dtype=torch.float64) if weighted else None
    options = {"space": space, "distance": distance, "label_smoothing": 0.1, "reduction": "none"}

    def loss(z: Tensor, backend: str = "native") -> Tensor:
        return prsl_cross_entropy(z, target, weight, **OPTIONS, **options, backend=backend)

    torch.autograd.gradcheck(loss, z, check_batched_grad=True)
    torch.autograd.gradgradcheck(loss, z, check_batched_grad=True)
    upstream, direction = torch.randn(5, dtype=torch.float64), torch.randn_like(z)
    second = []
    for backend in ("native", "eager"):
        (first,) = torch.autograd.grad(loss(z, backend), z, upstream.requires_grad_(), create_graph=True)
        second.append((first, *torch.autograd.grad((first * direction).sum(), (z, upstream), create_graph=True)))
        second[-1] += torch.autograd.grad(second[-1][1].square().sum(), z)
    torch.testing.assert_close(*second, rtol=1e-12, atol=1e-13)


def test_second_derivatives_through_a_model() -> None:
    """A penalty on the gradient, as for smoothness, in a graph around the loss, and with terms used apart."""
    hidden, matrix = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    target = torch.randint(9, (5,))
    results = []
    for options in (NATIVE, EAGER):
        h, m = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        loss = prsl_cross_entropy((h @ m).tanh(), target, **options)
        (first,) = torch.autograd.grad(loss, h, create_graph=True)
        (loss + first.square().sum()).backward()
        results.append((h.grad, m.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_hooks_run_once_in_second_derivatives() -> None:
    z = (3 * torch.randn(4, 12, dtype=torch.float64)).requires_grad_()
    calls: list[int] = []
    z.register_hook(lambda gradient: calls.append(1))
    torch.autograd.grad(prsl_cross_entropy(z, torch.arange(4), k=3, backend="native"), z, create_graph=True)
    assert len(calls) == 1


def test_b_zero_has_second_derivatives() -> None:
    z, target = batch()
    z.requires_grad_()
    curvatures = []
    for backend in ("native", "eager"):
        (first,) = torch.autograd.grad(prsl_cross_entropy(z, target, b=0, backend=backend), z, create_graph=True)
        curvatures.append(torch.autograd.grad(first.square().sum(), z))
    torch.testing.assert_close(*curvatures, rtol=1e-12, atol=1e-15)


def test_backward_as_often_as_wanted() -> None:
    """The same bits each time, in parts of the graph, and the logits stay."""
    hidden = torch.randn(6, 4, requires_grad=True)
    matrix = torch.randn(4, 9, requires_grad=True)
    logits = hidden @ matrix
    before = logits.detach().clone()
    loss = prsl_cross_entropy(logits, torch.randint(9, (6,)), **NATIVE)
    first = torch.autograd.grad(loss, (hidden, matrix), retain_graph=True)
    (part,) = torch.autograd.grad(loss, matrix, retain_graph=True)
    (at_logits,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert same_bits(part, first[1])
    torch.testing.assert_close(at_logits @ matrix.t(), first[0])
    loss.backward(retain_graph=True)
    loss.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, 2 * first[0])
    assert torch.equal(logits, before)


def test_logits_that_change_before_backward_are_noticed() -> None:
    z, target = batch(torch.float32)
    logits = z.requires_grad_() * 1
    loss = prsl_cross_entropy(logits, target, **NATIVE)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_tells_whoever_else_needs_the_logits() -> None:
    z, target = batch(torch.float32)
    logits = z.requires_grad_() * 1
    other = logits.square().sum()
    loss = prsl_cross_entropy(logits, target, inplace_backward=True, **NATIVE)
    assert operators_of(lambda: loss.backward(retain_graph=True)) == ["token_gradient_"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_backward_runs_once_and_has_no_second_derivative() -> None:
    z, target = batch(torch.float32)
    loss = prsl_cross_entropy(z.requires_grad_(), target, inplace_backward=True, **NATIVE)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_batch_of_upstream_gradients() -> None:
    """vmap over backward alone, as in torch.autograd.functional.jacobian(vectorize=True)."""
    z, target = batch(torch.float32)
    loss = prsl_cross_entropy(z.requires_grad_(), target, reduction="none", **NATIVE)
    (got,) = torch.autograd.grad(loss, z, torch.eye(5), is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(loss, z, row, retain_graph=True)[0] for row in torch.eye(5)]
    assert same_bits(got, torch.stack(want))


def test_hooks_and_checkpoints() -> None:
    z, target = batch(torch.float32)
    (want,) = torch.autograd.grad(prsl_cross_entropy(z.requires_grad_(), target, **NATIVE), z)
    for reentrant in (False, True):
        loss = checkpoint(lambda z: prsl_cross_entropy(z, target, **NATIVE), z, use_reentrant=reentrant)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert z.grad is not None
        assert same_bits(z.grad, want)
        z.grad = None
    saved: list[Tensor] = []

    def pack(x: Tensor) -> int:
        saved.append(x)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: saved[at].clone()):
        loss = prsl_cross_entropy(z, target, **NATIVE)
    assert [x.shape for x in saved if x.numel() >= z.numel()] == [z.shape]  # the logits alone
    assert same_bits(torch.autograd.grad(loss, z)[0], want)
    with torch.autograd.set_detect_anomaly(True):
        (got,) = torch.autograd.grad(prsl_cross_entropy(z, target, **NATIVE), z)
    assert same_bits(got, want)


def test_without_a_gradient() -> None:
    """no_grad and inference mode: the same loss, and nothing to call backward on; class weights may want a gradient."""
    z, target = batch(torch.float32)
    weight = torch.rand(9)
    want = prsl_cross_entropy(z, target, weight, **NATIVE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = z.clone().requires_grad_()
            loss = prsl_cross_entropy(x, target, weight.clone().requires_grad_(), **NATIVE)
            inplace = prsl_cross_entropy(x, target, inplace_backward=True, **NATIVE)
        assert same_bits(loss, want)
        assert not loss.requires_grad
        assert not inplace.requires_grad
        assert same_bits(x, z)
    assert loss.is_inference()


def test_autocast() -> None:
    """Half precision logits of a linear layer: the loss in float32, the gradient of the weight in its own dtype."""
    layer = nn.Linear(6, 9)
    hidden, target = torch.randn(5, 6), torch.randint(9, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(hidden)
        loss = prsl_cross_entropy(logits, target, **NATIVE)
        reference = prsl_cross_entropy(logits, target, **EAGER)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    got, want = (torch.autograd.grad(x, layer.weight, retain_graph=True)[0] for x in (loss, reference))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-3)


# ---- what goes to eager ----------------------------------------------------------------------------------------------


def test_auto_takes_the_extension_where_it_can() -> None:
    z, target = batch(torch.float32)
    names = operators_of(lambda: prsl_cross_entropy(z.requires_grad_(), target, **OPTIONS).backward())
    assert names == ["token_terms", "token_gradient"]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, z: grad(f)(z),
    "vmap": lambda f, z: vmap(lambda noise: f(z + noise))(torch.stack((z, 2 * z))),
    "jvp": lambda f, z: jvp(f, (z,), (z.cos(),)),
    "vmap of grad": lambda f, z: vmap(grad(f))(torch.stack((z, 2 * z))),
    "jacfwd": lambda f, z: jacfwd(f)(z),
    "jacrev": lambda f, z: jacrev(f)(z),
    "hessian": lambda f, z: hessian(f)(z),
}
IN_A_COMPILER = [pytest.param(name, True, marks=unsanitized) for name in ("grad", "vmap", "jvp", "vmap of grad")]


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in TRANSFORMS), *IN_A_COMPILER])
def test_transforms(name: str, compiled: bool) -> None:
    """With "auto" they are eager's, compiled too; asking for the extension is refused, and not answered wrongly."""
    z, target = batch()
    torch._dynamo.reset()

    def run(backend: str, compiled: bool = compiled) -> Any:
        def call(z: Tensor) -> Any:
            return TRANSFORMS[name](lambda z: prsl_cross_entropy(z, target, **OPTIONS, backend=backend), z)

        return (torch.compile(call, fullgraph=True, backend="eager") if compiled else call)(z)

    results: list[Any] = []
    assert operators_of(lambda: results.append(run("auto"))) == []
    torch.testing.assert_close(results[0], run("eager", False), rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="no rules for the transforms of"):
        run("native")


@unsanitized
def test_forward_mode_of_what_was_compiled_without_it() -> None:
    z, target = batch()
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: prsl_cross_entropy(z, target, **OPTIONS), backend="eager")
    compiled(z)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, z.cos())
        want = forward_ad.unpack_dual(prsl_cross_entropy(dual, target, **OPTIONS, backend="eager")).tangent
        torch.testing.assert_close(forward_ad.unpack_dual(compiled(dual)).tangent, want, rtol=1e-12, atol=1e-14)


def test_forward_mode() -> None:
    z, target = batch()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, z.cos())
        losses = [prsl_cross_entropy(dual, target, **OPTIONS, backend=backend) for backend in ("auto", "eager")]
        slopes = [forward_ad.unpack_dual(loss).tangent for loss in losses]
        assert None not in slopes
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)
        with pytest.raises(RuntimeError, match=r"no rules for .* forward-mode"):
            prsl_cross_entropy(dual, target, **OPTIONS, backend="native")


def test_forward_mode_of_the_upstream_gradient() -> None:
    """The gradient is linear in it, so its tangent is the gradient for the tangent."""
    z, target = batch()
    loss = prsl_cross_entropy(z.requires_grad_(), target, reduction="none", **NATIVE)
    upstream, tangent = torch.randn(2, 5, dtype=torch.float64)
    (want,) = torch.autograd.grad(loss, z, tangent, retain_graph=True)
    for create_graph in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(upstream, tangent)
            (gradient,) = torch.autograd.grad(loss, z, dual, retain_graph=True, create_graph=create_graph)
            got = forward_ad.unpack_dual(gradient).tangent
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


class Wrapper(TwoTensor):
    """A tensor that implements the operators of PyTorch itself, as DTensor and quantised ones do."""


def refused_inputs() -> dict[str, tuple[tuple[Any, ...], str]]:
    z, target = batch(torch.float32)
    return {
        "probabilities": ((z, z.softmax(-1)), "it takes class indices alone, and target holds class probabilities"),
        "weight": ((z, target, torch.rand(9, requires_grad=True)), "it has no gradient for weight, which requires one"),
        "logits of another class": ((Wrapper(z, z), target), "it takes plain tensors alone, and got Wrapper, Tensor"),
        "targets of another class": ((z, Wrapper(target, target)), "it takes plain tensors alone, and got Tensor, Wr"),
        "meta": ((z.to("meta"), target.to("meta")), "it has kernels for the CPU and for CUDA, and input is on meta"),
    }


@pytest.mark.parametrize("name", refused_inputs())
def test_inputs_that_are_left_to_eager(name: str) -> None:
    inputs, reason = refused_inputs()[name]
    with pytest.raises(RuntimeError, match=f"backend='native' cannot run this input: {reason}.*; use backend='auto'"):
        prsl_cross_entropy(*inputs, **NATIVE)
    assert operators_of(lambda: prsl_cross_entropy(*inputs, **OPTIONS)) == []
    got, want = prsl_cross_entropy(*inputs, **OPTIONS), prsl_cross_entropy(*inputs, **EAGER)
    assert type(got) is type(want)
    if not want.is_meta:
        got, want = (x.a if isinstance(x, TwoTensor) else x for x in (got, want))
        assert torch.equal(got, want)


def test_subclasses_without_operators_of_their_own() -> None:
    """A parameter, or a tensor that carries a name around, is a plain one to a kernel."""

    class Named(Tensor):
        pass

    z, target = batch(torch.float32)
    want = prsl_cross_entropy(z, target, **NATIVE)
    assert same_bits(prsl_cross_entropy(nn.Parameter(z), target, **NATIVE).detach(), want)
    assert torch.equal(prsl_cross_entropy(z.as_subclass(Named), target, **NATIVE).as_subclass(Tensor), want)


# ---- the compiler ----------------------------------------------------------------------------------------------------


def graphs_of(function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, list[list[str]]]:
    """The result, and the operators of each graph that the compiler made, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[list[str]] = []

    def record(graph: GraphModule, _: Any) -> Any:
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(function, fullgraph=True, backend=backend, **options)(*inputs), found


@unsanitized
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_training_step(dynamic: bool, inplace: bool) -> None:
    """One graph forward and one backward, each with the extension's operator, and none of eager's selection."""
    layer = nn.Linear(6, 9)
    hidden, target = torch.randn(5, 6), torch.tensor([0, 3, -100, 1, 8])

    def step(hidden: Tensor, target: Tensor) -> Tensor:
        return prsl_cross_entropy(layer(hidden), target, inplace_backward=inplace, **OPTIONS)

    loss, graphs = graphs_of(step, hidden, target, dynamic=dynamic)
    loss.backward()
    assert layer.weight.grad is not None
    forward, backward = graphs
    assert "prsl_native.token_terms.default" in forward
    assert "prsl_native.token_gradient.default" in backward
    assert not [name for name in forward + backward if "topk" in name or "log_softmax" in name]
    want = prsl_cross_entropy(layer(hidden), target, **EAGER)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, torch.autograd.grad(want, layer.weight)[0], rtol=1e-5, atol=1e-6)


@unsanitized
def test_compiled_by_default() -> None:
    """Inductor, module and optimizer step in one function, for sizes that change."""
    torch._dynamo.reset()
    loss = PRSLoss(torch.rand(9), reduction="sum", label_smoothing=0.1, **NATIVE)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (5, 7, 2):
        z, target = torch.randn(rows, 9, requires_grad=True), torch.randint(9, (rows,))
        got, want = compiled(z, target), loss(z, target)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        pair = [torch.autograd.grad(x, z)[0] for x in (got, want)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-7)


@unsanitized
def test_export() -> None:
    z, target = batch(torch.float32)
    program = torch.export.export(PRSLoss(**NATIVE), (z, target))
    assert "prsl_native.token_terms" in program.graph_module.code
    torch.testing.assert_close(program.module()(z, target), PRSLoss(**NATIVE)(z, target))


@unsanitized
def test_compiled_targets_out_of_range_raise() -> None:
    """The compiler leaves out what the loss checks in Python; the operator checks, too."""
    torch._dynamo.reset()
    compiled = torch.compile(prsl_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"Target 9 is out of bounds: class indices must be in \[0, 9\)"):
        compiled(torch.randn(5, 9), torch.full((5,), 9), **NATIVE)
