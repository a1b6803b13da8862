"""The compiled extension: exact on hostile rows in every dtype and layout, and always the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_checks import (
    ADDITIONS,
    DTYPES,
    HOSTILE,
    INF,
    NAN,
    ROUNDINGS,
    SPREADS,
    Exact,
    Result,
    close,
    compute_dtype,
    hostile,
    native_result,
    same_bits,
)
from torch import Tensor

from prsl_kernels import prsl_cross_entropy
from prsl_kernels.backends import native

pytestmark = pytest.mark.usefixtures("_native", "_single_thread")

Levels = Callable[[], Iterator[str]]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
PLAIN: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0}

# From two classes on, and around the lengths of vectors, of blocks of them, and of the groups of a selection.
WIDTHS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 521, 1031)


def test_the_library_says_what_it_runs() -> None:
    assert native.levels()[-1] == "baseline"
    assert native.level() in native.levels()
    with pytest.raises(ValueError, match=r"'sse9' is none of the instruction sets that can run here: .*baseline"):
        native.use_level("sse9")


# ---- values ----------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_rows(width: int, dtype: torch.dtype, each_level: Levels) -> None:
    """Two rows of every kind: values and gradients, out of place and in place, in every space and distance."""
    kinds = list(HOSTILE)
    target = torch.randint(width, (2 * len(kinds),))
    upstream = torch.randn(len(target)).to(compute_dtype(dtype))
    for k in sorted({1, min(4, width - 1), width // 2, width - 1}):
        z = hostile(kinds, target, width, k).to(dtype)
        for space, distance in SPREADS:
            options: dict[str, Any] = {"k": k, "space": space, "distance": distance, **PLAIN}
            exact = Exact(z, target, None, **options)
            for level in each_level():
                got = native_result(z, target, None, upstream, b=0.7, **options)
                exact.check(f"{level}, k={k}, {space}, {distance}", got, upstream, 0.7)
                inplace = native_result(z, target, None, upstream, b=0.7, inplace_backward=True, **options)
                assert all(same_bits(*pair) for pair in zip(got, inplace, strict=True))


LONG = {
    torch.float32: (32767, 32768, 32769, 65535, 65537, 131073),
    torch.float64: (16383, 16384, 16385, 32769, 65537),
    torch.bfloat16: (65537, 131073),
    torch.float16: (50257, 131073),
}


# Hard on the arithmetic of a single class.
SAME_FOR_ALL_LENGTHS = {
    "very peaked",
    "all equal at 1e4",
    "around -1e4",
    "plus and minus 1e4",
    "neighbours",
    "minute",
    "one lane of 16",
    "target 60 ahead",
    "target 120 behind",
    "target tied",
    "masked, one finite",
    "masked, none besides",
}


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(dtype, width) for dtype, widths in LONG.items() for width in widths],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_rows_of_several_chunks(width: int, dtype: torch.dtype, each_level: Levels) -> None:
    """What one chunk of a row says of the maximum and of the members of K, the next one may overturn."""
    few = 4  # rows at a time: what is larger than a cache, and fresh from the system, takes several times as long
    kinds = [kind for kind in HOSTILE if kind not in SAME_FOR_ALL_LENGTHS]
    weight = torch.rand(width).to(compute_dtype(dtype))
    cases = [
        (20, "prob", "l2", 0.0, None),
        (300, "log_prob", "l1", 0.1, None),
        (width // 3, "prob", "l1", 0.1, weight),
    ]
    for at, (k, space, distance, smoothing, w) in product(range(0, len(kinds), few), cases):
        target = torch.randint(width, (len(kinds[at : at + few]),))
        upstream = torch.randn(len(target)).to(compute_dtype(dtype))
        z = hostile(kinds[at : at + few], target, width, k).to(dtype)
        options: dict[str, Any] = {"k": k, "space": space, "distance": distance}
        options |= {"label_smoothing": smoothing, "ignore_index": -100}
        exact = Exact(z, target, w, **options)
        for level in each_level():
            got = native_result(z, target, w, upstream, b=0.7, **options)
            exact.check(f"{level}, {kinds[at : at + few]}, k={k}", got, upstream, 0.7)


@by_dtype
def test_the_bound_of_a_selection_knows_of_the_target(dtype: torch.dtype, each_level: Levels) -> None:
    """Large logits in fewer groups of classes than K has members, up to any class, and the target among the first.

    There is always a row in which the bound rises for the last time as the last member is found.
    """
    width, k = 8192, 20
    for begin in range(0, 3600, 600):
        ends = 4096 + torch.arange(begin, begin + 600, 16).unsqueeze(-1)
        classes = torch.arange(width)
        z = torch.where((classes % 64 < 20) & (classes < ends), classes / 256, torch.randn(len(ends), width) - 9)
        z[:, 7] = 40
        z, target = z.to(dtype), torch.full((len(ends),), 7)
        upstream = torch.randn(len(target)).to(compute_dtype(dtype))
        options: dict[str, Any] = {"k": k, "space": "log_prob", "distance": "l2", **PLAIN}
        exact = Exact(z, target, None, **options)
        for level in each_level():
            got = native_result(z, target, None, upstream, b=0.7, **options)
            exact.check(f"{level}, from {begin}", got, upstream, 0.7)


def test_sums_of_many_equal_numbers(each_level: Levels) -> None:
    """Where each addition to a float rounds the same way: the target ahead of equals by so much."""
    width = 131_073
    lead = torch.linspace(0.03, 3, 37)
    z = -lead.unsqueeze(-1).expand(-1, width).clone()
    z[:, 5] = 0
    target = torch.full((len(lead),), 5)
    exact = torch.log1p((width - 1) * torch.exp(-lead.double()))
    allowed = torch.finfo(torch.float32).eps / 2 * (ADDITIONS + 4 + ROUNDINGS * 2 * (1 + exact))
    for level in each_level():
        loss = prsl_cross_entropy(z, target, b=0, reduction="none", backend="native")
        close(level, loss, exact, allowed)


@by_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_and_weights(weighted: bool, smoothing: float, dtype: torch.dtype, each_level: Levels) -> None:
    """With ignored tokens, NaN ones too; large logits must not cost the sums over all classes their digits."""
    kinds = list(HOSTILE)
    for width in (2, 9, 130, 1031):
        target = torch.randint(width, (2 * len(kinds),))
        ignored = torch.rand(len(target)) < 0.2
        target[ignored] = 2**62
        upstream = torch.randn(len(target)).to(compute_dtype(dtype))
        weight = None
        if weighted:
            weight = (3 * torch.rand(width)).to(compute_dtype(dtype))
            weight[::3] = 0
        for b, k in ((0.0, 0), (-0.7, min(7, width - 1))):
            z = hostile(kinds, target.masked_fill(ignored, 0), width, k).to(dtype)
            options: dict[str, Any] = {"k": k, "space": "prob", "distance": "l2"}
            options |= {"ignore_index": 2**62, "label_smoothing": smoothing}
            exact = Exact(z, target, weight, **options)
            for level in each_level():
                got = native_result(z, target, weight, upstream, b=b, **options)
                exact.check(f"{level}, V={width}, k={k}", got, upstream, b)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_does_what_it_does_in_cross_entropy(value: float, each_level: Levels) -> None:
    """In every place of a row, by itself and in the target: to this row alone."""
    width = 70
    z = torch.randn(width + 2, width)
    z[torch.arange(width), torch.arange(width)] = value
    z[width] = value
    target = torch.randint(width, (width + 2,))
    target[::7] = torch.arange(0, width + 2, 7).clamp(max=width - 1)
    expected = z.clone().requires_grad_()
    loss = F.cross_entropy(expected, target, reduction="none")
    loss.sum().backward()
    assert expected.grad is not None
    for _ in each_level():
        for space, distance in SPREADS:
            x = z.clone().requires_grad_()
            options: dict[str, Any] = {"k": 5, "b": 0.5, "space": space, "distance": distance, "reduction": "none"}
            got = prsl_cross_entropy(x, target, backend="native", **options)
            got.sum().backward()
            assert x.grad is not None
            assert torch.equal(got.isnan(), loss.isnan())
            assert torch.equal(got.isinf(), loss.isinf())
            assert torch.equal(x.grad.isnan(), expected.grad.isnan())


# ---- half precision, bit by bit --------------------------------------------------------------------------------------


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_as_it_is(dtype: torch.dtype, each_level: Levels) -> None:
    """The maximum of a row, which backward gets: of one that is shorter than a vector, and of a longer one."""
    halves = all_halves(dtype)
    halves = halves[~halves.isnan()]
    for width in (2, 64):
        z = torch.full((len(halves), width), -INF, dtype=dtype)
        z[:, width // 2] = halves
        target = torch.zeros(len(halves), dtype=torch.long)
        for level in each_level():
            stats = torch.ops.prsl_native.token_terms(z, target, None, 0, "prob", "l2", -100, 0.0)[2]
            wrong = stats[:, 0] != halves.float()
            assert not wrong.any(), (level, width, halves[wrong][:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_gradient_is_rounded_to_the_nearest_half(dtype: torch.dtype, each_level: Levels) -> None:
    """Ties go to even and too much to infinity: the halves, what lies in the middle of two, and a bit beside it."""
    halves = all_halves(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:] / 2 + halves[:-1] / 2)[halves[1:] != halves[:-1]]
    beside = [torch.nextafter(middles, torch.tensor(to)) for to in (-INF, INF)]
    others = torch.tensor([INF, -INF, NAN, 65519.9, 65520.0, 3e38, 1e-45])
    others = torch.cat((others, torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)))  # NaN, all ones
    values = torch.cat((halves, middles, *beside, others))
    for width in (2, 64):  # p is 1 / V exactly
        exact = values[(values.abs() * width <= torch.finfo(torch.float32).max) | ~values.isfinite()]
        exact = exact[~(exact.abs() < torch.finfo(torch.float32).tiny) | (exact == 0)]
        z = torch.zeros(len(exact), width, dtype=dtype)
        target = torch.zeros(len(exact), dtype=torch.long)
        arguments = (z, target, None)
        for level in each_level():
            stats = torch.ops.prsl_native.token_terms(*arguments, 0, "prob", "l2", -100, 0.0)[2]
            upstream = exact * width, torch.zeros_like(exact)
            gradient = torch.ops.prsl_native.token_gradient(*arguments, stats, *upstream, 0, "prob", "l2", -100, 0.0)
            want = exact.to(dtype)[:, None].expand(-1, width - 1)
            wrong = (gradient[:, 1:] != want) & ~(gradient[:, 1:].isnan() & want.isnan())
            assert not wrong.any(), (level, width, exact[wrong.any(-1)][:5], gradient[wrong.any(-1)][:5, 1])


# ---- the same bits ---------------------------------------------------------------------------------------------------

# From random numbers (12, 3, 70): logits (N, V), and whether each has its own storage.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "transposed": (lambda x: x[:, 0].contiguous().t()[:12], True),
    "a step between classes": (lambda x: x[:, 1, ::3], True),
    "a step between rows": (lambda x: x[::5, 2], True),
    "classes first": (lambda x: x[:, 0].t().contiguous().t(), True),
    "not aligned": (lambda x: x.flatten()[1:841].view(12, 70), True),
    "one row for all": (lambda x: x[3, 2].expand(9, 70), False),
    "one logit for all classes": (lambda x: x[:, 1, 4:5].expand(12, 70), False),
    "windows": (lambda x: x[0, 0].unfold(0, 20, 3), False),
    "a diagonal": (lambda x: torch.diagonal(x, 0, 0, 1).t(), True),
}


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, each_level: Levels) -> None:
    """Terms, gradients, and gradients in place do not depend on where the logits lie."""
    view, own = LAYOUTS[layout]
    base = (2 * torch.randn(12, 3, 70)).to(dtype)
    z = view(base)
    target = torch.randint(z.shape[1], (len(z),))
    target[1] = -100
    upstream = torch.randn(len(z)).to(compute_dtype(dtype))
    options: dict[str, Any] = {"k": 6, "b": 0.7, "label_smoothing": 0.1, "reduction": "none", "backend": "native"}
    for level in each_level():
        want = native_result(z.contiguous(), target, None, upstream, k=6, b=0.7, label_smoothing=0.1)
        for inplace in (False, True) if own else (False,):
            x = view(base.clone())
            assert not x.is_contiguous() or layout == "not aligned"
            loss, *terms = prsl_cross_entropy(
                x.requires_grad_(), target, return_terms=True, inplace_backward=inplace, **options
            )
            (gradient,) = torch.autograd.grad(loss, x, upstream)
            assert all(same_bits(*pair) for pair in zip((*terms, gradient), want, strict=True)), (level, inplace)
            assert (gradient.data_ptr() == x.data_ptr()) == inplace


@pytest.mark.parametrize("shape", [(70,), (1, 70), (5, 70, 3), (2, 70, 3, 4), (2, 70, 1, 2, 3), (0, 70), (2, 70, 0)])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels last"])
def test_shapes(shape: tuple[int, ...], memory_format: str) -> None:
    """Any number of dimensions is rows, in the order of the targets; none at all is nothing."""
    z = torch.randn(shape)
    if memory_format == "channels last" and z.dim() > 2:
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
    target = torch.randint(70, shape[:1] + shape[2:] if len(shape) > 1 else ())
    rows = z if z.dim() == 1 else z.movedim(1, -1)
    upstream = torch.randn(target.shape)
    want = native_result(rows.reshape(-1, 70), target.flatten(), None, upstream.flatten(), k=6, b=0.7)
    for inplace in (False, True):
        x = z.clone(memory_format=torch.preserve_format).requires_grad_()
        assert x.stride() == z.stride()
        options: dict[str, Any] = {"k": 6, "b": 0.7, "reduction": "none", "backend": "native"}
        loss, c, d = prsl_cross_entropy(x, target, return_terms=True, inplace_backward=inplace, **options)
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        assert loss.shape == target.shape
        assert gradient.shape == shape
        gradient = gradient if z.dim() == 1 else gradient.movedim(1, -1)
        got = Result(c.flatten(), d.flatten(), gradient.reshape(-1, 70))
        assert all(same_bits(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize(("rows", "width"), [(7, 50257), (33000, 33), (101, 2049), (1, 300000)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_any_number_of_threads(rows: int, width: int, reduction: str) -> None:
    """More than 2^15 rows, too, from where on PyTorch's own sum depends on it."""
    z, target = torch.randn(rows, width), torch.randint(width, (rows,))
    target[rows // 2 + 1 :: 5] = -100
    weight = torch.rand(width)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            x = z.clone().requires_grad_()
            loss, *terms = prsl_cross_entropy(
                x, target, weight, label_smoothing=0.1, reduction=reduction, return_terms=True, backend="native"
            )
            results.append((loss, *terms, *torch.autograd.grad(loss.sum(), x)))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert all(same_bits(*pair) for pair in zip(got, results[0], strict=True))


def test_from_several_threads_at_once() -> None:
    """As under DataParallel, and where losses are computed in a pool."""
    z, target, upstream = torch.randn(300, 999), torch.randint(999, (300,)), torch.randn(300)
    want = native_result(z, target, None, upstream, k=20, b=0.5)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: native_result(z, target, None, upstream, k=20, b=0.5), range(40)):
            assert all(same_bits(*pair) for pair in zip(got, want, strict=True))


@by_dtype
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, each_level: Levels) -> None:
    kinds = list(HOSTILE)
    target = torch.randint(130, (len(kinds),))
    z = hostile(kinds, target, 130, 9).to(dtype)
    upstream = torch.randn(len(kinds)).to(compute_dtype(dtype))
    for level in each_level():
        together = native_result(z, target, None, upstream, k=9, b=0.5)
        for i in range(len(kinds)):
            row = slice(i, i + 1)
            alone = native_result(z[row], target[row], None, upstream[row], k=9, b=0.5)
            assert all(same_bits(got, want[row]) for got, want in zip(alone, together, strict=True)), (level, kinds[i])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 65536.0, -1 / 3])
def test_any_upstream_gradient(scale: float) -> None:
    """The trainer's division and the scaling for half precision: not once more rounded, but computed with it."""
    z, target = torch.randn(40, 90, dtype=torch.float64), torch.randint(90, (40,))
    exact = Exact(z, target, None, k=20, space="prob", distance="l2", **PLAIN)
    upstream = torch.randn(40, dtype=torch.float64) * scale
    exact.check("float64", native_result(z, target, None, upstream, k=20, b=0.5), upstream, 0.5)
    for reduction, divisor in (("sum", 1), ("mean", 40)):
        x = z.clone().requires_grad_()
        loss = prsl_cross_entropy(x, target, b=0.5, reduction=reduction, backend="native")
        (gradient,) = torch.autograd.grad(loss * scale, x)
        each = torch.full((40,), scale, dtype=torch.float64) / divisor
        got = Result(exact.c, exact.d, gradient)
        exact.check(reduction, got, each, 0.5)
        torch.testing.assert_close(loss, (exact.c + 0.5 * exact.d).sum() / divisor, rtol=1e-14, atol=0)
