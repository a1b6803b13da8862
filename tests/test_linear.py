"""`linear_prsl_cross_entropy` against the loss of the whole logits, its memory, and its place in PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import DEVICE, RUNNING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prsl_kernels import LossTerms, linear, linear_prsl_cross_entropy, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

N, H, V = 23, 12, 61
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Problem:
    """Hidden states, a vocabulary matrix and a bias that require gradients, and targets, some of them ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = N, bias: bool = True) -> None:
        self.input = torch.randn(rows, H, dtype=torch.float64).to(dtype).requires_grad_()
        self.matrix = torch.randn(V, H, dtype=torch.float64).to(dtype).requires_grad_()
        self.bias = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        self.target = torch.randint(V, (rows,))
        self.target[1::7] = -100

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.input, self.matrix, self.bias) if x is not None and x.requires_grad]

    def linear(self, **options: Any) -> Any:
        return linear_prsl_cross_entropy(self.input, self.matrix, self.target, linear_bias=self.bias, **options)

    def whole(self, weight: Tensor | None = None, **options: Any) -> Any:
        return prsl_cross_entropy(F.linear(self.input, self.matrix, self.bias), self.target, weight, **options)

    def double(self) -> Problem:
        other = Problem.__new__(Problem)
        other.input, other.matrix = (x.detach().double().requires_grad_() for x in (self.input, self.matrix))
        other.bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        other.target = self.target
        return other


def budget(rows: int, dtype: torch.dtype, backend: str = "native") -> int:
    """For chunks of so many rows."""
    return rows * V * (dtype.itemsize + (24 if backend == "eager" else 0))


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


# ---- against the whole logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNING)
def test_the_loss_of_the_whole_logits(backend: str, dtype: torch.dtype, reduction: str, chunk: int) -> None:
    if backend == "triton" and (chunk, dtype) not in ((5, torch.float32), (8, torch.bfloat16), (1000, torch.float16)):
        pytest.skip("interpreted kernels take their time, and the chunks are the same")
    for bias, smoothing, (space, distance) in zip(
        (True, False, True, False), (0.0, 0.1, 0.2, 0.0), product(("prob", "log_prob"), ("l2", "l1")), strict=True
    ):
        problem = Problem(dtype, bias=bias)
        weight = torch.rand(V).to(torch.promote_types(dtype, torch.float32)) if smoothing else None
        options: dict[str, Any] = {"k": 5, "b": 2.0, "space": space, "distance": distance, "reduction": reduction}
        options |= {"weight": weight, "label_smoothing": smoothing, "backend": backend, "return_terms": True}
        actual = problem.linear(**options, memory_budget=budget(chunk, dtype, backend))
        expected = problem.whole(**options)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        if dtype.itemsize == 2 and chunk < N:  # a logit may round to the other side
            tolerance = 1e-2
        for got, want in zip(actual, expected, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        upstream = torch.rand_like(actual.loss) + 0.2
        got = torch.autograd.grad(actual.loss, problem.leaves, upstream)
        want = torch.autograd.grad(expected.loss, problem.leaves, upstream)
        for x, y, leaf in zip(got, want, problem.leaves, strict=True):
            assert (x.dtype, x.shape) == (leaf.dtype, leaf.shape)
            assert relative(x, y) < (10 * torch.finfo(dtype).eps)


def test_b_zero_is_torchs_linear_cross_entropy() -> None:
    for bias, reduction, smoothing in product((True, False), ("none", "mean", "sum"), (0.0, 0.3)):
        problem = Problem(bias=bias)
        weight = torch.rand(V, dtype=torch.float64)
        options: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        for one in (problem, problem):
            actual = one.linear(b=0, k=10**6, **options)
            expected = F.linear_cross_entropy(
                one.input, one.matrix, one.target, linear_bias=one.bias, ignore_index=-100, **options
            )
            torch.testing.assert_close(actual, expected)


def test_shapes_of_torchs_linear_cross_entropy() -> None:
    x, matrix = torch.randn(H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    one = torch.tensor(3)
    for reduction in ("none", "mean", "sum"):
        loss = linear_prsl_cross_entropy(x, matrix, one, k=5, b=1.0, reduction=reduction)
        assert loss.shape == ()
        torch.testing.assert_close(loss, prsl_cross_entropy(matrix @ x, one, k=5, b=1.0))
    x = torch.randn(4, H, dtype=torch.float64)
    probabilities = torch.rand(4, V, dtype=torch.float64).softmax(-1)
    loss = linear_prsl_cross_entropy(x, matrix, probabilities, k=5, b=1.0)
    torch.testing.assert_close(loss, prsl_cross_entropy(x @ matrix.t(), probabilities, k=5, b=1.0))
    images = torch.randn(V, 2, 3, H, dtype=torch.float64)
    bias = torch.randn(V, 2, 3, dtype=torch.float64)
    target = torch.randint(V, (4, 2, 3))
    loss = linear_prsl_cross_entropy(x, images, target, linear_bias=bias, k=5, b=1.0, reduction="none")
    logits = torch.einsum("nh,cijh->ncij", x, images) + bias
    torch.testing.assert_close(loss, prsl_cross_entropy(logits, target, k=5, b=1.0, reduction="none"))


def test_edges() -> None:
    problem = Problem(rows=0)
    assert problem.linear(k=5, reduction="sum") == 0
    assert problem.linear(k=5).isnan()
    gradients = torch.autograd.grad(problem.linear(k=5, reduction="sum"), problem.leaves)
    assert [(x == 0).all().item() for x in gradients] == [True] * 3
    problem = Problem()
    problem.target[:] = -100
    assert problem.linear(k=5).isnan()
    gradients = torch.autograd.grad(problem.linear(k=5, reduction="sum"), problem.leaves)
    assert [(x == 0).all().item() for x in gradients] == [True] * 3
    problem = Problem()
    with torch.no_grad():
        problem.input[1] = torch.nan  # an ignored token
    (gradient,) = torch.autograd.grad(problem.linear(k=5, b=1.0), problem.input)
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()


def test_any_strides() -> None:
    problem = Problem()
    options: dict[str, Any] = {"k": 5, "b": 1.0, "memory_budget": budget(4, torch.float64)}
    expected = problem.linear(**options)
    x, matrix = torch.randn(2 * H, 2 * N, dtype=torch.float64).t()[::2, ::2], problem.matrix.detach().t().contiguous()
    x.copy_(problem.input.detach())
    bias = torch.empty(V, 3, dtype=torch.float64)[:, 1].copy_(problem.bias.detach())
    leaves = [tensor.requires_grad_() for tensor in (x, matrix, bias)]
    loss = linear_prsl_cross_entropy(x, matrix.t(), problem.target, linear_bias=bias, **options)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, leaves)
    for got, want in zip(actual, torch.autograd.grad(expected, problem.leaves), strict=True):
        torch.testing.assert_close(got if got.shape == want.shape else got.t(), want)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, 0.37, 65536.0])
@pytest.mark.parametrize("chunk", [1, 16, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, chunk: int, upstream: float) -> None:
    problem = Problem(dtype, rows=512)
    factor = torch.tensor(upstream)
    options: dict[str, Any] = {"k": 20, "b": 1.0}
    exact_problem = problem.double()
    exact = torch.autograd.grad(exact_problem.whole(**options), exact_problem.leaves, factor.double())
    whole = torch.autograd.grad(problem.whole(**options), problem.leaves, factor)
    loss = problem.linear(**options, memory_budget=budget(chunk, dtype))
    chunked = torch.autograd.grad(loss, problem.leaves, factor)
    for name, a, w, e in zip(("input", "matrix", "bias"), chunked, whole, exact, strict=True):
        assert relative(a, e) <= 1.5 * relative(w, e), name


def test_float16_gradients_survive_under_a_gradient_scaler() -> None:
    """Unscaled, they would be below the smallest float16 number."""
    problem = Problem(torch.float16, rows=512)
    (gradient,) = torch.autograd.grad(problem.linear(k=5) * 1e-3, problem.input, torch.tensor(65536.0))
    exact = problem.double()
    (expected,) = torch.autograd.grad(exact.whole(k=5) * 1e-3, exact.input, torch.tensor(65536.0).double())
    assert relative(gradient, expected) < 1e-2


# ---- gradients -------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_where_they_are_wanted_alone(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "linear_terms", linear.linear_terms._init_fn)  # to see into the operator
    again = int(reduction == "none")  # the logits once more
    for wanted in product((True, False), repeat=3):
        problem = Problem(torch.float32)
        for leaf, want in zip(problem.leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        with Products() as forward_products:
            loss = problem.linear(k=5, b=1.0, reduction=reduction)
        if not any(wanted):
            assert forward_products.count == 1
            assert not loss.requires_grad
            continue
        with Products() as backward_products:
            loss.sum().backward()
        assert forward_products.count + backward_products.count == 1 + again + wanted[0] + wanted[1]
        expected = torch.autograd.grad(problem.whole(k=5, b=1.0, reduction="sum"), problem.leaves)
        for leaf, gradient in zip(problem.leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
    with torch.no_grad(), Products() as products:
        assert not Problem(torch.float32).linear(k=5).requires_grad
    assert products.count == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_as_often_as_you_like(reduction: str) -> None:
    problem = Problem()
    loss = problem.linear(k=5, b=1.0, reduction=reduction, memory_budget=budget(4, torch.float64))
    reference = problem.whole(k=5, b=1.0, reduction=reduction)
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
        return linear_prsl_cross_entropy(
            x.tanh(), matrix, target, linear_bias=bias, k=5, b=1.0, reduction=reduction
        ).sum()

    compiled = torch.compile(step, fullgraph=True)
    for rows in (N, 9):
        problem = Problem(torch.float32, rows=rows)
        expected = torch.autograd.grad(step(*problem.leaves, problem.target), problem.leaves)
        actual = torch.autograd.grad(compiled(*problem.leaves, problem.target), problem.leaves)
        torch.testing.assert_close(actual, expected)


def test_opcheck() -> None:
    problem = Problem(torch.float32)
    tensors = (problem.input.detach(), problem.matrix.detach(), problem.bias.detach(), problem.target, None)
    upstream = torch.ones(N)
    for backend, grads, wanted in product(
        (name for name in RUNNING if name != "triton"),
        ((None, None), (upstream, upstream)),
        ([True, True, True], [True, False, False]),
    ):
        rest = (torch.float32, backend, budget(5, torch.float32), 5, "prob", "l2", -100, 0.0)
        torch.library.opcheck(torch.ops.prsl_kernels.linear_terms.default, (*tensors, *grads, wanted, *rest))


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


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_chunks_keep_to_the_budget() -> None:
    for rows, classes, memory in product((1, 100, 2048), (7, 50257), (1, 10**5, 10**7, 10**9)):
        for dtype, backend in product((torch.float32, torch.bfloat16), ("native", "eager")):
            chunk = linear.chunk_rows(rows, classes, dtype, backend, memory)
            assert 1 <= chunk <= rows
            assert chunk == 1 or chunk * classes * dtype.itemsize <= memory
    assert linear.chunk_rows(1000, 10, torch.float32, "native", 10**9) == 1000
    assert linear.chunk_rows(1001, 10, torch.float32, "native", 40 * 1000) == 501  # two alike, not 1000 and 1
    assert linear.chunk_rows(0, 10, torch.float32, "native", 1) == 0


MEASURE = """
import torch
import torch.nn.functional as F
from prsl_kernels import linear_prsl_cross_entropy

N, H, V = 2048, 256, 50257
x, matrix = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
target = torch.randint(V, (N,))

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

def run(rows):
    {loss}.backward()

run(64)  # whatever is loaded and started at first
x.grad.zero_(), matrix.grad.zero_()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
run(N)
print((peak() - before) / (N * V * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or DEVICE != "cpu", reason="reads /proc")
def test_peak_memory() -> None:
    """With gradients to add to, the new ones count, too; the logits are 412 MB."""

    def share(loss: str) -> float:
        code = MEASURE.format(loss=loss)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
        return float(result.stdout)

    for backend in ("auto", "eager"):
        assert share(f'linear_prsl_cross_entropy(x[:rows], matrix, target[:rows], backend="{backend}")') < 0.35
    assert share("F.cross_entropy(F.linear(x[:rows], matrix), target[:rows])") > 1.5


# ---- errors ----------------------------------------------------------------------------------------------------------

X, W, T = torch.zeros(4, H), torch.zeros(V, H), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.zeros(2, 2, H), W, T),
            {},
            ValueError,
            r"input must have the shape.*flatten it.*input\.flatten\(0, -2\)",
        ),
        ((X, torch.zeros(V, H + 1), T), {}, ValueError, r"linear_weight must have the shape \(C, 12\).*\(61, 13\)"),
        ((X, torch.zeros(H), T), {}, ValueError, "linear_weight must have the shape"),
        ((X[0], torch.zeros(V, 2, H), T[0]), {}, ValueError, "needs an input"),
        ((X, W, T), {"linear_bias": torch.zeros(V + 1)}, ValueError, r"linear_bias must have the shape \(61,\)"),
        ((X, W.double(), T), {}, TypeError, "linear_weight has dtype torch.float64, but input torch.float32"),
        ((X, W, T), {"linear_bias": torch.zeros(V).bfloat16()}, TypeError, "linear_bias has dtype torch.bfloat16"),
        ((X.long(), W, T), {}, TypeError, "input must have one of the dtypes"),
        ((X, W.tolist(), T), {}, TypeError, "linear_weight must be a tensor, but is list"),
        ((X, W.to("meta"), T), {}, ValueError, "linear_weight is on meta, but input on"),
        ((X, W.to_sparse(), T), {}, TypeError, "linear_weight must be a dense tensor"),
        ((X, W, T[:3]), {}, ValueError, r"target must have the shape \(4,\)"),
        ((X, W, T + V), {}, IndexError, "Target 61 is out of bounds"),
        ((X, W, T), {"k": V}, ValueError, "k=61 and V=61"),
        ((X, W, T), {"weight": torch.zeros(3)}, ValueError, r"weight must have the shape \(61,\)"),
        ((X, W, T), {"memory_budget": 0}, ValueError, "memory_budget must be at least 1 byte, but is 0"),
        ((X, W, T), {"memory_budget": 1e9}, TypeError, "memory_budget must be a number of bytes"),
        ((X, W, T), {"backend": "cuda"}, ValueError, "backend must be one of"),
        ((X, W, T), {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_errors(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    if error is IndexError and DEVICE != "cpu":
        pytest.skip("targets on a GPU are not looked at")
    with pytest.raises(error, match=message):
        linear_prsl_cross_entropy(*arguments, **{"k": 5, **options})
