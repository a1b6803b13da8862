"""The Triton kernels against eager in float64: in Triton's interpreter, under ttsem, or on a GPU (tests/running.py).

The kernels choose among paths by the length of a row and by k. So that short rows, which an interpreter can afford,
take all of them, most tests shrink the slots and the lists: then 300 classes are many for them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checks import DTYPES, HOSTILE, INF, NAN, SPREADS, Exact, Result, compute_dtype, hostile, same_bits
from running import DEVICE, RUNNING
from torch import Tensor

from prsl_kernels import functional, prsl_cross_entropy
from prsl_kernels.backends import triton

pytestmark = [
    pytest.mark.usefixtures("_single_thread"),
    pytest.mark.skipif("triton" not in RUNNING, reason="Triton's kernels do not run here: set TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of the interpreter
]
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def on_device(*tensors: Any) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in tensors]


def result(
    z: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, *, k: int, b: float, **options: Any
) -> Result:
    """What the kernels make of logits (N, V); upstream gradients (N,) reach the loss."""
    z, target, weight, upstream = on_device(z.detach().clone(), target, weight, upstream)
    z.requires_grad_()
    terms = prsl_cross_entropy(
        z, target, weight, k=max(k, 1), b=b, reduction="none", backend="triton", return_terms=True, **options
    )
    terms.loss.backward(upstream)
    assert z.grad is not None
    return Result(terms.cross_entropy.cpu(), terms.penalty.cpu(), z.grad.cpu())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """8 slots of 4 lanes and short lists; gives the marks of the rows that went the exact way."""
    choices = triton.choices

    def smaller(rows: int, classes: int, dtype: torch.dtype, k: int, hardware: triton.Hardware) -> triton.Choices:
        c = choices(rows, classes, dtype, k, hardware)
        if c.exact:
            return c
        capacity = 2 if k == 0 else 16 if k < 8 else 64
        span = 8 * -(-classes // (8 * c.vec * c.parts))
        return c._replace(unroll=2, lanes=4, capacity=capacity, span=max(8, span))

    marks: list[Tensor] = []
    launches = triton.launch

    def launch_and_keep(which: list[triton.Launch]) -> None:
        launches(which)
        for one in which:
            if one.kernel.__name__ == "loss_kernel":
                marks.append(one.arguments[9].detach().cpu().bool())

    monkeypatch.setattr(triton, "choices", smaller)
    monkeypatch.setattr(triton, "launch", launch_and_keep)
    return marks


# ---- hostile rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("k", [1, 6, 20])
def test_hostile_rows(k: int, space: str, distance: str, dtype: torch.dtype, small: list[Tensor]) -> None:
    """One row of each kind; 333 classes are 41 or 83 groups for 8 slots, and both ends are ragged."""
    kinds = [kind for kind in HOSTILE if dtype != torch.float16 or "1e4" not in kind]
    target = torch.randint(333, (len(kinds),))
    z = hostile(kinds, target, 333, k).to(dtype)
    upstream = torch.randn(len(kinds)).to(compute_dtype(dtype))
    options: dict[str, Any] = {"space": space, "distance": distance, "ignore_index": -100, "label_smoothing": 0.0}
    exact = Exact(z, target, None, k=k, **options)
    exact.check("triton", result(z, target, None, upstream, k=k, b=0.7, **options), upstream, 0.7)
    if dtype != torch.float64:
        marks = torch.cat(small)
        assert 0 < marks.sum() < len(kinds)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("k", [0, 5])
def test_options(k: int, smoothing: float, weighted: bool, dtype: torch.dtype, small: list[Tensor]) -> None:
    """Class weights, label smoothing and ignored tokens whose logits are NaN, with and without a penalty."""
    target = torch.tensor([0, 7, 3, 206, 100])
    z = hostile(["random", "peaked", "ties", "around 1e4" if dtype != torch.float16 else "minute"], target, 207, 5)
    z[2] = NAN
    z = z.to(dtype)
    weight = (3 * torch.rand(207)).to(compute_dtype(dtype)) if weighted else None
    upstream = torch.randn(5).to(compute_dtype(dtype))
    options: dict[str, Any] = {"space": "prob", "distance": "l2", "ignore_index": 3, "label_smoothing": smoothing}
    exact = Exact(z, target, weight, k=k, **options)
    for inplace in (False, True):
        got = result(z, target, weight, upstream, k=k, b=0.7 if k else 0, inplace_backward=inplace, **options)
        exact.check("triton", got, upstream, 0.7)


VALUES = (0.0, 1.0, -INF, -1.0, 0.5, 2.0, 3.0, 1.0000001, 8.0, -8.0, 1e-3, 60.0, -60.0, 3e38, -3e38, INF, NAN)


@st.composite
def few_values(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, tuple[str, str]]:
    """Rows whose logits are each one of a few values: what ties, masks and their order can do."""
    classes = draw(st.sampled_from([2, 3, 9, 17, 64, 65, 130]))
    used = draw(st.lists(st.integers(0, len(VALUES) - 3), min_size=1, max_size=5))
    if draw(st.integers(0, 9)) == 9:
        used.append(draw(st.integers(len(VALUES) - 2, len(VALUES) - 1)))
    raw = draw(st.binary(min_size=4 * classes, max_size=4 * classes))
    choice = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() % len(used)
    z = torch.tensor([VALUES[i] for i in used], dtype=torch.float64)[choice].view(4, classes)
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=4, max_size=4)))
    return z, target, draw(st.integers(1, classes - 1)), draw(st.sampled_from(SPREADS))


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(few_values(), st.sampled_from(HALF_AND_SINGLE))
def test_rows_of_few_values(
    small: list[Tensor], example: tuple[Tensor, Tensor, int, tuple[str, str]], dtype: torch.dtype
) -> None:
    z, target, k, (space, distance) = example
    z = z.to(dtype)
    options: dict[str, Any] = {"space": space, "distance": distance, "ignore_index": -100, "label_smoothing": 0.0}
    upstream = torch.tensor([1.0, -0.5, 3.0, 65536.0])
    got = result(z, target, None, upstream, k=k, b=0.3, **options)
    if space == "log_prob" and (z.abs() > 1e38).any():
        return  # the distance overflows, and float64's does not
    Exact(z, target, None, k=k, **options).check("triton", got, upstream, 0.3)


# ---- the real constants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("classes", "k"), [(50_257, 20), (5_003, 100), (5_003, 129), (2, 1), (8, 7)])
def test_real_sizes(classes: int, k: int, dtype: torch.dtype) -> None:
    """GPT-2's vocabulary; as many and more classes in K than the lists hold; and rows without a whole group."""
    rows = 2
    z = (2 * torch.randn(rows, classes)).to(dtype)
    target = torch.randint(classes, (rows,))
    upstream = torch.randn(rows).to(compute_dtype(dtype))
    options: dict[str, Any] = {"space": "prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.0}
    exact = Exact(z, target, None, k=k, **options)
    exact.check("triton", result(z, target, None, upstream, k=k, b=0.7, **options), upstream, 0.7)


@pytest.mark.parametrize("k", [11, 42, 97, 128])
def test_few_random_rows_go_the_exact_way(k: int) -> None:
    """At most 0.1 % by the bound in choices(); here none of 12."""
    z = torch.randn(12, 50_257).bfloat16()
    _, _, _, _, slow = triton.token_terms(*on_device(z, torch.randint(50_257, (12,)), None), k, "prob", "l2", -100, 0.0)
    assert slow.sum() == 0
    slots, keep = 512, triton.choices(12, 50_257, z.dtype, k, triton.Hardware(1)).keep
    assert math.comb(k + 1, keep) / slots ** (keep - 1) < 1.05e-3


def test_choices() -> None:
    """A slot's number fits into the bits that it is given, and lists hold k + 1 groups at least."""
    for dtype in HALF_AND_SINGLE:
        for k in (0, 1, 26, 27, 75, 76, 128):
            for rows in (1, 7, 10_000):
                for classes in (2, 50_257, 1 << 20):
                    c = triton.choices(rows, classes, dtype, k, triton.Hardware(132))
                    tile = c.unroll * c.lanes
                    assert c.span * c.parts * c.vec >= classes
                    assert c.span % tile == 0
                    assert c.span // tile < 1 << c.bits
                    assert c.capacity - 2 > k or k == 0
                    assert c.parts & (c.parts - 1) == 0
                    assert c.parts == 1 or rows < 4 * 132
                    assert not c.exact
        assert triton.choices(100, 50_257, dtype, 129, triton.Hardware(132)).exact


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_split_over_programs(rows: int, small: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a row together give what one program gives."""
    z = (2 * torch.randn(rows, 1_003)).half()
    target, upstream = torch.randint(1_003, (rows,)), torch.randn(rows)
    options: dict[str, Any] = {"space": "prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.1}
    exact = Exact(z, target, None, k=6, **options)
    for processors, parts in ((1, 1), (1_000, 16)):
        monkeypatch.setattr(triton, "_hardware", lambda *_, n=processors: triton.Hardware(n))
        monkeypatch.setitem(triton._BY_DTYPE, torch.float16, (1 if parts > 1 else 4, 13, 13))
        small.clear()
        exact.check(f"{processors}", result(z, target, None, upstream, k=6, b=0.7, **options), upstream, 0.7)


# ---- where rows lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_alignment(dtype: torch.dtype, small: list[Tensor]) -> None:
    """Rows that start anywhere between two multiples of 16 bytes; nothing around them is touched."""
    steps = 16 // dtype.itemsize
    target, upstream = torch.randint(77, (2,)), torch.randn(2).to(compute_dtype(dtype))
    options: dict[str, Any] = {"k": 5, "space": "prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.0}
    for start in range(steps):
        for stride in (77, 80) if start == 1 else (77,):
            buffer = torch.full((start + 2 * stride + steps,), 123.0, dtype=dtype)
            z = buffer.as_strided((2, 77), (stride, 1), start)
            z.copy_(3 * torch.randn(2, 77))
            exact = Exact(z, target, None, **options)
            exact.check(f"{start}, {stride}", result(z, target, None, upstream, b=0.7, **options), upstream, 0.7)

            on, y, u = on_device(buffer.clone(), target, upstream)
            rows = on.as_strided((2, 77), (stride, 1), start)
            terms = triton.token_terms(rows, y, None, *options.values())
            gradient = triton.token_gradient(rows, y, None, *terms[2:], u, 0.7 * u, *options.values())
            assert (gradient.data_ptr() - rows.data_ptr()) % 16 == 0
            triton.token_gradient_(rows, y, None, *terms[2:], u, 0.7 * u, *options.values())
            assert torch.equal(rows, gradient)
            rows.copy_(z)
            assert torch.equal(on.cpu(), buffer)


def test_slices_are_not_copied(small: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits without their last token, as language models take them, and without padded classes."""
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("copied") if 77 in x.shape else contiguous(x))
    whole = torch.randn(2, 5, 80)[..., :77]
    for z in (whole[:, :-1], whole[:, 1:], whole.transpose(0, 1), whole[0], whole[:, 2]):
        target = torch.randint(77, z.shape[:-1])
        source = z.to(DEVICE).detach()
        assert triton.with_rows(source) is source
        logits = source.requires_grad_()
        terms = [
            prsl_cross_entropy(logits.movedim(-1, 1), target.to(DEVICE), k=3, b=0.5, backend=backend)
            for backend in ("triton", "eager")
        ]
        got, want = (torch.autograd.grad(loss, logits)[0] for loss in terms)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU would have to have the memory")
def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 logits apart; the pages between them are never touched."""
    distance = (1 << 31) + 5
    z = torch.empty(distance + 100, dtype=torch.bfloat16).as_strided((2, 90), (distance, 1))
    z.copy_(torch.randn(2, 90))
    target, upstream = torch.tensor([3, 89]), torch.ones(2)
    options: dict[str, Any] = {"k": 5, "space": "prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.0}
    saved = triton.token_terms(z, target, None, *options.values())
    exact = Exact(z.contiguous(), target, None, **options)
    triton.token_gradient_(z, target, None, *saved[2:], upstream, 0.7 * upstream, *options.values())
    exact.check("far", Result(saved[0], saved[1], z.contiguous()), upstream, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_signed_zeros_are_tied(dtype: torch.dtype) -> None:
    """At the threshold; their bits, in which a list's cut is looked for, have another order. Not in the first tile."""
    z = -1 - torch.rand(4, 8_192)
    order = torch.randperm(4_096)[:240] + 4_096
    z[:, order[:10]], z[:, order[10:40]], z[:, order[40:]] = 1.0, 0.0, -0.0
    z, target, upstream = z.to(dtype), torch.tensor([0, 1, 2, 4_097]), torch.ones(4)
    options: dict[str, Any] = {"space": "prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.0}
    got = result(z, target, None, upstream, k=20, b=0.7, **options)
    Exact(z, target, None, k=20, **options).check("zeros", got, upstream, 0.7)


def test_logits_that_come_back_elsewhere(small: list[Tensor]) -> None:
    """As from a hook that keeps what is saved for backward on another device, without the gaps between rows."""
    whole = torch.randn(4, 80)
    z, target = whole[:, 1:78], torch.randint(77, (4,))
    want = result(z, target, None, torch.ones(4), k=5, b=0.7)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x
    ):
        logits = whole.to(DEVICE)[:, 1:78].requires_grad_()
        loss = prsl_cross_entropy(logits, target.to(DEVICE), k=5, b=0.7, reduction="sum", backend="triton")
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got.cpu(), want.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_distances_beyond_float32(dtype: torch.dtype) -> None:
    """In float64 they are ordinary numbers; in float32 such rows go the exact way."""
    z = torch.tensor([[5.0, 4, 3, 2, 1, 0]], dtype=dtype) * (1e39 if dtype == torch.float64 else 1e37)
    options: dict[str, Any] = {"space": "log_prob", "distance": "l2", "ignore_index": -100, "label_smoothing": 0.0}
    upstream = torch.ones(1, dtype=dtype)
    got = result(z, torch.tensor([2]), None, upstream, k=3, b=0.7, **options)
    Exact(z, torch.tensor([2]), None, k=3, **options).check("far", got, upstream, 0.7)


def test_every_tile_has_a_number() -> None:
    """Rows so long that the numbers of a part's tiles would not fit into their bits are split, or go the exact way."""
    many = triton.choices(10_000, 5_000_000, torch.float32, 20, triton.Hardware(132))
    assert many.parts > 1
    assert many.span // (many.unroll * many.lanes) <= 1 << many.bits
    assert triton.choices(10_000, 1 << 28, torch.float32, 20, triton.Hardware(132)).exact


@pytest.mark.skipif(DEVICE != "cpu", reason="interpreted, on any machine")
def test_compiled_code_takes_any_number_of_rows() -> None:
    """Not a new compilation for each."""
    compiled = torch.compile(
        lambda z, y: prsl_cross_entropy(z, y, k=3, backend="triton"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 6, 9):
            z, target = torch.randn(rows, 40), torch.randint(40, (rows,))
            want = prsl_cross_entropy(z, target, k=3, backend="eager")
            torch.testing.assert_close(compiled(z, target), want, rtol=1e-5, atol=1e-6)


# ---- targets out of range, memory that nobody wrote, and order -------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [5, 200])
def test_targets_out_of_range(k: int, weighted: bool, small: list[Tensor]) -> None:
    """Their rows are NaN, the others right; the rows of the exact path (k=200) too. Nothing is read outside."""
    target = torch.tensor([3, -1, 333, 2**40, -(2**62), 332])
    z = torch.randn(6, 333)
    weight = torch.rand(333) if weighted else None
    options = (k, "prob", "l2", -100, 0.1)
    upstream = torch.ones(6)
    on, y, w, u = on_device(z, target, weight, upstream)
    terms = triton.token_terms(on, y, w, *options)
    gradient = triton.token_gradient(on, y, w, *terms[2:], u, u, *options)
    wrong = torch.tensor([False, True, True, True, True, False])
    for x in (terms[0], terms[1], gradient[:, 0], gradient[:, -1]):
        assert torch.equal(x.cpu().isnan(), wrong)
    exact = Exact(
        z[~wrong], target[~wrong], weight, k=k, space="prob", distance="l2", ignore_index=-100, label_smoothing=0.1
    )
    got = Result(*(x.cpu()[~wrong] for x in (terms[0], terms[1], gradient)))
    exact.check("the others", got, upstream[~wrong], 1.0)


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU a target out of range raises, whatever the backend")
def test_targets_on_a_gpu_are_not_looked_at_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    z, target, weight = on_device(torch.randn(3, 20), torch.tensor([1, 20, 2]), torch.rand(20))
    for w in (None, weight):
        loss = prsl_cross_entropy(z, target, w, k=3, reduction="none", backend="triton")
        assert loss.isnan().tolist() == [False, True, False]
        assert prsl_cross_entropy(z, target, w, k=3, backend="triton").isnan()
    if torch.cuda.is_initialized():
        return  # a failing assertion would end this process's use of the GPU
    monkeypatch.setattr(functional, "CHECK_TARGETS", True)
    with pytest.raises(RuntimeError, match="a target is neither in"):
        prsl_cross_entropy(z, target, k=3, backend="triton")


def test_every_number_is_written(small: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into memory full of NaN, twice: the same bits."""
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = empty(self, *args, **kwargs)
        return x.fill_(NAN) if x.is_floating_point() else x.fill_(77)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    kinds = ["random", "ties", "peaked", "long ties", "masked"]
    target = torch.randint(333, (5,))
    target[3] = -100
    z = hostile(kinds, target.clamp(min=0), 333, 6).bfloat16()
    first, second = (result(z, target, None, torch.ones(5), k=6, b=0.7) for _ in range(2))
    assert not any(x.isnan().any() for x in first)
    assert all(same_bits(*pair) for pair in zip(first, second, strict=True))


def test_empty_batches() -> None:
    for shape in ((0, 9), (0, 9, 3), (2, 9, 0)):
        z = torch.randn(shape, device=DEVICE, requires_grad=True)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=DEVICE)
        loss = prsl_cross_entropy(z, target, k=3, backend="triton", reduction="sum")
        loss.backward()
        assert loss == 0
        assert z.grad is not None
        assert z.grad.shape == shape


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks compare devices by name")
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)])
@pytest.mark.parametrize("k", [4, 0])
def test_opcheck(shape: tuple[int, ...], k: int) -> None:
    """Schema, fake version, autograd, and a compiler's tracing with dynamic shapes, by PyTorch's own checks."""
    options = (k, "prob", "l2", -100, 0.1)
    for logits in (
        torch.randn(shape),
        torch.randn(*shape[:-1], 43)[..., :40],
        torch.randn(40, *shape[:-1]).movedim(0, -1),
    ):
        target, weight = torch.randint(40, shape[:-1]), torch.rand(40)
        for requires_grad in (False, True):
            inputs = (logits.detach().requires_grad_(requires_grad), target, weight, *options)
            torch.library.opcheck(torch.ops.prsl_triton.token_terms, inputs)
        saved = torch.ops.prsl_triton.token_terms(logits, target, weight, *options)[2:]
        rest = (target, weight, *saved, *torch.randn(2, *shape[:-1]), *options)
        torch.library.opcheck(torch.ops.prsl_triton.token_gradient, (logits.detach(), *rest))
        torch.library.opcheck(torch.ops.prsl_triton.token_gradient_, (logits.detach(), *rest))
