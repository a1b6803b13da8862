"""`linear_prsl_cross_entropy` against the loss of the whole logits, its memory, and its place in PyTorch."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_problem import H, N, Problem, V, budget, relative
from running import DEVICE, RUNNING

from prsl_kernels import linear, linear_prsl_cross_entropy, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- against the whole logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNING)
def test_the_loss_of_the_whole_logits(backend: str, dtype: torch.dtype, reduction: str, chunk: int) -> None:
    rows = N
    if backend == "triton":  # interpreted, it takes its time
        if (chunk, dtype, reduction) not in ((5, torch.float32, "mean"), (5, torch.bfloat16, "none")):
            pytest.skip("the chunks are the same for every backend")
        rows = 8
    for bias, smoothing, (space, distance) in zip(
        (True, False, True, False), (0.0, 0.1, 0.2, 0.0), product(("prob", "log_prob"), ("l2", "l1")), strict=True
    ):
        problem = Problem(dtype, rows, bias)
        weight = torch.rand(V).to(torch.promote_types(dtype, torch.float32)) if smoothing else None
        options: dict[str, Any] = {"k": 5, "b": 2.0, "space": space, "distance": distance, "reduction": reduction}
        options |= {"weight": weight, "label_smoothing": smoothing, "backend": backend, "return_terms": True}
        actual = problem.linear(**options, memory_budget=budget(chunk, dtype, backend))
        expected = problem.whole(**options)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        if dtype.itemsize == 2 and chunk < rows:  # a logit may round to the other side
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
    loss = Problem(rows=2).linear(k=5, weight=torch.zeros(V, dtype=torch.float64), label_smoothing=0.1)
    assert loss.isnan()  # a mean over no weight
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
    """Divided by the number of tokens but not yet scaled, those of most classes are below the least float16 number."""
    rows, classes, scale = 64, 4096, torch.tensor(65536.0)
    x, matrix = (torch.randn(n, 8).mul(0.1).half().requires_grad_() for n in (rows, classes))
    target = torch.zeros(rows, dtype=torch.long)  # so that the other classes have nothing but their probability
    (gradient,) = torch.autograd.grad(linear_prsl_cross_entropy(x, matrix, target) * 1e-2, matrix, scale)
    exact, of = (tensor.detach().double().requires_grad_() for tensor in (x, matrix))
    loss = prsl_cross_entropy(F.linear(exact, of), target) * 1e-2
    (expected,) = torch.autograd.grad(loss, of, scale.double())
    assert relative(gradient[1:], expected[1:]) < 2e-2


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_chunks_keep_to_the_budget() -> None:
    for rows, classes, memory in product((1, 100, 2048), (7, 50257), (1, 10**5, 10**7, 10**9)):
        for dtype, backend in product((torch.float32, torch.bfloat16), ("native", "eager")):
            chunk = linear.chunk_rows(rows, classes, dtype, backend, memory)
            assert 1 <= chunk <= rows
            assert chunk == 1 or chunk * classes * dtype.itemsize <= memory
    assert linear.chunk_rows(1000, 10, torch.float32, "native", 10**9) == 1000
    assert linear.chunk_rows(1001, 10, torch.float32, "native", 40 * 1000) == 501  # two alike, not 1000 and 1
    # A quarter of the logits, the matrix, 32 MiB.
    assert linear.default_budget(10**9, 10**9) == 10**9 // 4
    assert linear.default_budget(10**10, 10**8) == 4 * 10**8
    assert linear.default_budget(10**6, 10**6) == 2**25
    assert linear.chunk_rows(0, 10, torch.float32, "native", 1) == 0


MEASURE = """
import torch
import torch.nn.functional as F
from prsl_kernels import linear_prsl_cross_entropy

N, H, V = 2048, 256, 50257
x, matrix = (torch.randn(n, H).to(torch.{dtype}).requires_grad_() for n in (N, V))
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
print((peak() - before) / (N * V * x.itemsize))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or DEVICE != "cpu", reason="reads /proc")
def test_peak_memory() -> None:
    """With gradients to add to, the new ones count, too; the logits are 412 MB, and half of it in bfloat16."""

    def share(loss: str, dtype: str = "float32") -> float:
        code = MEASURE.format(loss=loss, dtype=dtype)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
        return float(result.stdout)

    for backend in ("auto", "eager"):
        assert share(f'linear_prsl_cross_entropy(x[:rows], matrix, target[:rows], backend="{backend}")') < 0.35
    assert share("F.cross_entropy(F.linear(x[:rows], matrix), target[:rows])") > 1.5
    # Beyond a chunk of 51 MB there are the matrix's gradient in float32, as much, and in bfloat16.
    assert share("linear_prsl_cross_entropy(x[:rows], matrix, target[:rows])", "bfloat16") < 0.75


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
