"""The public function and module: shapes, options, reductions, dtypes, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from running import DEVICE, RUNNING
from torch import Tensor

from prsl_kernels import PRSLoss, functional, prsl_cross_entropy
from prsl_kernels.functional import UNAVAILABLE

pytestmark = pytest.mark.usefixtures("_single_thread")

SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
NAN = math.nan


@pytest.fixture(autouse=True, params=RUNNING)
def _auto(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test for each backend: it is what "auto" takes where it can run, and eager where it cannot."""
    resolve = functional.resolve_backend

    def resolved(name: str, *inputs: Any) -> str:
        if name != "auto":
            return resolve(name, *inputs)
        return request.param if functional.BACKENDS[request.param].refusal(*inputs) is None else "eager"

    monkeypatch.setattr(functional, "resolve_backend", resolved)


def batch(rows: int = 6, classes: int = 10, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Peaked logits and targets, the third of which is ignored."""
    target = torch.randint(classes, (rows,))
    target[2] = -100
    return 3 * torch.randn(rows, classes, **kwargs), target


def grad_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 7, 3), (2, 7, 3, 2), (2, 7, 1, 2, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_every_shape_is_a_batch_of_rows(shape: tuple[int, ...], reduction: str, kind: str) -> None:
    """Whatever the shape, loss and gradient are those of its rows, one by one."""
    z = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(7, dtype=torch.float64)
    rest = shape[:1] + shape[2:] if len(shape) > 1 else ()
    options: dict[str, Any] = {"k": 3, "b": 0.7, "label_smoothing": 0.1}
    rows = (z if len(shape) == 1 else z.movedim(1, -1)).reshape(-1, 7)
    if kind == "indices":
        target = torch.randint(7, rest)
        targets = target.reshape(-1)
        total = weight[target].sum()
    else:
        target = torch.rand(shape, dtype=torch.float64)
        targets = (target if len(shape) == 1 else target.movedim(1, -1)).reshape(-1, 7)
        total = torch.tensor(len(targets))
    pairs = zip(rows, targets, strict=True)
    expected = torch.stack([prsl_cross_entropy(x, y, weight, reduction="sum", **options) for x, y in pairs])
    expected = {"none": expected.reshape(rest), "mean": expected.sum() / total, "sum": expected.sum()}[reduction]
    loss = prsl_cross_entropy(z, target, weight, reduction=reduction, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(loss)
    got, want = (torch.autograd.grad(x, z, upstream, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_reductions_and_terms(space: str, distance: str, reduction: str, kind: str) -> None:
    """Every reduction of loss and terms against the oracle; the terms are detached and add up."""
    z, target = batch(dtype=torch.float64)
    z.requires_grad_()
    if kind == "probabilities":
        target = torch.rand(6, 10, dtype=torch.float64)
    weight = torch.rand(10, dtype=torch.float64)
    weight[target[0] if kind == "indices" else 0] = 0
    options: dict[str, Any] = {"k": 4, "b": -0.7, "space": space, "distance": distance, "label_smoothing": 0.1}
    out = prsl_cross_entropy(z, target, weight, reduction=reduction, return_terms=True, **options)
    exact = oracle.batch(z.tolist(), target.tolist(), weight.tolist(), ignore_index=-100, **options)
    divisor = exact.total if reduction == "mean" else 1

    def reduced(values: list[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return x if reduction == "none" else x.sum() / divisor

    for got, want in zip(out, (exact.loss, exact.cross_entropy, exact.penalty), strict=True):
        torch.testing.assert_close(got, reduced(want), rtol=1e-14, atol=1e-14)
    assert out._fields == ("loss", "cross_entropy", "penalty")
    assert out.loss.requires_grad
    assert not out.cross_entropy.requires_grad
    assert not out.penalty.requires_grad
    torch.testing.assert_close(
        out.cross_entropy + options["b"] * out.penalty, out.loss.detach(), rtol=1e-15, atol=1e-15
    )
    alone = prsl_cross_entropy(z, target, weight, reduction=reduction, **options)
    assert torch.equal(alone, out.loss)


def test_defaults_are_small_and_of_the_paper() -> None:
    z, target = batch(classes=40)
    default = prsl_cross_entropy(z, target)
    assert torch.equal(default, prsl_cross_entropy(z, target, k=20, b=1e-4, space="prob", distance="l2"))
    assert default > F.cross_entropy(z, target)


def test_b_zero_needs_no_k() -> None:
    z, target = batch(classes=5)
    out = prsl_cross_entropy(z, target, k=10**6, b=0, return_terms=True)
    torch.testing.assert_close(out.loss, F.cross_entropy(z, target), rtol=1e-6, atol=0)
    assert out.penalty == 0
    assert prsl_cross_entropy(z[:, :1], torch.zeros(6, dtype=torch.long), b=0.0) == 0


@pytest.mark.parametrize("b", [0, 0.5])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, slice(None)], ids=["one", "all"])
def test_not_a_number(b: float, bad: float, where: Any) -> None:
    """A NaN or an infinite logit does to its row what it does in F.cross_entropy, and to no other row."""
    z, target = batch()
    z[1, where] = bad
    z[3, 5] = bad
    target[[1, 3]] = 0
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    for space, distance in SPREADS:
        loss = prsl_cross_entropy(x, target, k=3, b=b, space=space, distance=distance, reduction="none")
        expected = F.cross_entropy(y, target, reduction="none")
        (got,), (want,) = grad_of(loss.sum(), x), grad_of(expected.sum(), y)
        assert torch.equal(loss.isnan(), expected.isnan())
        assert torch.equal(loss.isinf(), expected.isinf())
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("b", [0, 0.5])
def test_ignored_rows_are_exactly_zero(b: float, bad: float, inplace: bool) -> None:
    """Whatever they hold; and the other rows do not change."""
    z, target = batch()
    z[2] = bad
    z.requires_grad_()
    kept = target != -100
    weight = torch.rand(10)
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"k": 3, "b": b, "label_smoothing": smoothing}
        expected = prsl_cross_entropy(z[kept], target[kept], weight, **options)
        (want,) = grad_of(expected, z)
        x = z.detach().clone().requires_grad_()
        loss = prsl_cross_entropy(x, target, weight, inplace_backward=inplace, **options)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert x.grad is not None
        assert (x.grad[2] == 0).all()
        torch.testing.assert_close(x.grad[kept], want[kept])


def test_all_ignored() -> None:
    z = torch.randn(3, 5, requires_grad=True)
    target = torch.full((3,), 7)
    for reduction, expected in (("mean", torch.tensor(NAN)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(3))):
        for b in (0, 0.5):
            loss = prsl_cross_entropy(z, target, k=2, b=b, ignore_index=7, reduction=reduction)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            if reduction != "mean":
                assert (grad_of(loss.sum(), z)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_empty(shape: tuple[int, ...], reduction: str, kind: str) -> None:
    z = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape) if kind == "probabilities" else torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for b in (0, 0.5):
        loss = prsl_cross_entropy(z, target, k=2, b=b, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(z, target, reduction=reduction), equal_nan=True)
        assert grad_of(loss.sum(), z)[0].shape == shape


def test_weight_zero_is_out_altogether() -> None:
    """The loss is that without the tokens of the class; a mean over nothing is NaN, as in F.cross_entropy."""
    z, target = batch()
    target[:2] = 4
    weight = torch.ones(10).index_fill(0, torch.tensor(4), 0)
    rest = target != 4
    loss = prsl_cross_entropy(z, target, weight, k=3, b=0.5)
    torch.testing.assert_close(loss, prsl_cross_entropy(z[rest], target[rest], k=3, b=0.5))
    assert prsl_cross_entropy(z[:2], target[:2], weight, k=3, b=0.5).isnan()


def test_probabilities_have_a_gradient_and_leave_out_their_favourite() -> None:
    z, index = batch(dtype=torch.float64)
    index = index.clamp(min=0)
    z.requires_grad_()
    target = F.one_hot(index, 10).double().requires_grad_()
    options: dict[str, Any] = {"k": 4, "b": 0.7}
    loss = prsl_cross_entropy(z, target, **options)
    expected = prsl_cross_entropy(z, index, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad_of(loss, z), grad_of(expected, z), rtol=1e-13, atol=1e-16)
    (got,) = grad_of(prsl_cross_entropy(z, target, **options), target)
    (want,) = grad_of(F.cross_entropy(z, target), target)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    # The lowest index of several favourites, and no weight for the penalty.
    tied = torch.zeros(6, 10, dtype=torch.float64).index_fill(1, torch.tensor([3, 6]), 0.5)
    weight = torch.rand(10, dtype=torch.float64)
    penalty = prsl_cross_entropy(z, tied, weight, return_terms=True, **options).penalty
    torch.testing.assert_close(
        penalty, prsl_cross_entropy(z, torch.full((6,), 3), return_terms=True, **options).penalty
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, target = batch(classes=50)
    z = z.to(dtype).requires_grad_()
    x = z.detach().float().requires_grad_()
    loss = prsl_cross_entropy(z, target, torch.rand(50).to(dtype), b=0.5)
    torch.manual_seed(0)
    batch(classes=50)
    expected = prsl_cross_entropy(x, target, torch.rand(50).to(dtype).float(), b=0.5)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    assert torch.equal(grad_of(loss, z)[0], grad_of(expected, x)[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast(dtype: torch.dtype) -> None:
    """Autocast changes nothing: as for F.cross_entropy, the arithmetic is float32, or float64."""
    z, target = batch(classes=50)
    z = z.to(dtype).requires_grad_()
    weight = torch.rand(50)
    plain = prsl_cross_entropy(z, target, weight, b=0.5, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = prsl_cross_entropy(z, target, weight, b=0.5, label_smoothing=0.1)
        reference = F.cross_entropy(z, target, weight.to(torch.promote_types(dtype, torch.float32)))
    assert cast.dtype == reference.dtype
    assert torch.equal(cast, plain)
    assert torch.equal(grad_of(cast, z)[0], grad_of(plain, z)[0])


def test_not_contiguous() -> None:
    z, target = batch(classes=24)
    expected = prsl_cross_entropy(z, target, k=5, b=0.5)
    wide = torch.randn(6, 48)
    wide[:, ::2] = z
    for same in (z.t().contiguous().t(), wide[:, ::2]):
        assert not same.is_contiguous()
        same.requires_grad_() if same.is_leaf else None
        torch.testing.assert_close(prsl_cross_entropy(same, target, k=5, b=0.5), expected)
    # One row for all: the gradient of an expanded tensor is summed.
    row = torch.randn(24, requires_grad=True)
    target = target.clamp(min=0)
    (got,) = grad_of(prsl_cross_entropy(row.expand(6, 24), target, k=5, b=0.5), row)
    (want,) = grad_of(prsl_cross_entropy(row.repeat(6, 1), target, k=5, b=0.5), row)
    torch.testing.assert_close(got, want)


def test_backward_as_often_as_wanted() -> None:
    """The logits never change, and a graph serves twice, in parts and under any upstream gradient."""
    z, target = batch(dtype=torch.float64)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    logits = z + hidden @ matrix
    before = logits.detach().clone()
    loss = prsl_cross_entropy(logits, target, k=4, b=0.7)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    both = torch.autograd.grad(65536 * loss, (hidden, matrix), retain_graph=True)
    (part,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(both[0], 65536 * first, rtol=1e-13, atol=0)
    torch.testing.assert_close(part @ matrix.t(), first, rtol=1e-13, atol=1e-16)
    (again,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, again)
    assert torch.equal(logits, before)


def test_targets_of_other_types() -> None:
    z, target = batch()
    target = target.clamp(min=0)
    expected = prsl_cross_entropy(z, target, k=3)
    assert torch.equal(prsl_cross_entropy(z, target.to(torch.uint8), k=3), expected)
    one = prsl_cross_entropy(z[0], target[:1], k=3, reduction="none")  # F.cross_entropy takes that, too
    assert one.shape == ()
    assert torch.equal(one, prsl_cross_entropy(z[0], target[0], k=3))
    probabilities = torch.rand(6, 10, dtype=torch.float64)
    assert prsl_cross_entropy(z, probabilities, k=3).dtype == F.cross_entropy(z, probabilities).dtype


GOOD = torch.zeros(4, 6)
INDEX = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (TypeError, ["input", "list"], ([[0.0]], INDEX), {}),
        (TypeError, ["input", "int64"], (GOOD.long(), INDEX), {}),
        (TypeError, ["input", "complex64"], (GOOD.cfloat(), INDEX), {}),
        (ValueError, ["input", "(C,)"], (torch.tensor(0.0), torch.tensor(0)), {}),
        (TypeError, ["target", "list"], (GOOD, [0, 0, 0, 0]), {}),
        (TypeError, ["target", "int32"], (GOOD, INDEX.int()), {}),
        (TypeError, ["target", "bool"], (GOOD, INDEX.bool()), {}),
        (TypeError, ["target", "float32"], (GOOD, INDEX.float()), {}),
        (TypeError, ["target", "int64", "probabilities"], (GOOD, GOOD.long()), {}),
        (ValueError, ["target", "(4,)", "(3,)"], (GOOD, INDEX[:3]), {}),
        (ValueError, ["target", "(4, 2)"], (GOOD.unsqueeze(-1).expand(4, 6, 2), INDEX), {}),
        (ValueError, ["target", "(4, 1)"], (GOOD, INDEX.unsqueeze(-1)), {}),
        (ValueError, ["target", "(4, 5)"], (GOOD, GOOD[:, :5]), {}),
        (ValueError, ["target", "()"], (GOOD[0], INDEX), {}),
        (IndexError, ["Target 6", "[0, 6)"], (GOOD, INDEX + 6), {}),
        (IndexError, ["Target -1"], (GOOD, INDEX - 1), {}),
        (IndexError, ["Target 6"], (GOOD, INDEX + 6), {"b": 0}),
        (IndexError, ["Target -100"], (GOOD, INDEX - 100), {"ignore_index": 0}),
        (TypeError, ["weight", "list"], (GOOD, INDEX, [1.0] * 6), {}),
        (TypeError, ["weight", "int64"], (GOOD, INDEX, torch.ones(6).long()), {}),
        (ValueError, ["weight", "(6,)", "(5,)"], (GOOD, INDEX, torch.ones(5)), {}),
        (ValueError, ["weight", "(6,)", "(1, 6)"], (GOOD, INDEX, torch.ones(1, 6)), {}),
        (ValueError, ["k=6", "V=6"], (GOOD, INDEX), {"k": 6}),
        (ValueError, ["k=20", "V=6"], (GOOD, INDEX), {"k": 20}),
        (ValueError, ["k=1", "V=1"], (GOOD[:, :1], INDEX), {"k": 1}),
        (ValueError, ["k=6", "V=6"], (GOOD[0], INDEX[0]), {"k": 6}),
        (ValueError, ["k", "0"], (GOOD, INDEX), {"k": 0}),
        (ValueError, ["k", "-3"], (GOOD, INDEX), {"k": -3}),
        (TypeError, ["k", "2.5"], (GOOD, INDEX), {"k": 2.5}),
        (TypeError, ["k", "True"], (GOOD, INDEX), {"k": True}),
        (ValueError, ["b", "nan"], (GOOD, INDEX), {"b": NAN}),
        (ValueError, ["b", "inf"], (GOOD, INDEX), {"b": -math.inf}),
        (TypeError, ["b", "'1'"], (GOOD, INDEX), {"b": "1"}),
        (TypeError, ["b", "Tensor"], (GOOD, INDEX), {"b": torch.tensor(1.0)}),
        (ValueError, ["space", "'logits'", "'log_prob'"], (GOOD, INDEX), {"space": "logits"}),
        (ValueError, ["distance", "'linf'", "'l2'"], (GOOD, INDEX), {"distance": "linf"}),
        (ValueError, ["distance", "2", "'l2'"], (GOOD, INDEX), {"distance": 2}),
        (ValueError, ["reduction", "'average'", "'mean'"], (GOOD, INDEX), {"reduction": "average"}),
        (ValueError, ["label_smoothing", "1.1"], (GOOD, INDEX), {"label_smoothing": 1.1}),
        (ValueError, ["label_smoothing", "-0.1"], (GOOD, INDEX), {"label_smoothing": -0.1}),
        (ValueError, ["label_smoothing", "nan"], (GOOD, INDEX), {"label_smoothing": NAN}),
        (TypeError, ["ignore_index", "1.5"], (GOOD, INDEX), {"ignore_index": 1.5}),
        (ValueError, ["ignore_index=3", "probabilities"], (GOOD, GOOD), {"ignore_index": 3}),
        (ValueError, ["backend", "'cuda'", "'eager'"], (GOOD, INDEX), {"backend": "cuda"}),
        (ValueError, ["target", "meta", DEVICE], (GOOD, INDEX.to("meta")), {}),
        (ValueError, ["weight", "meta", DEVICE], (GOOD, INDEX, torch.ones(6, device="meta")), {}),
    ],
)
def test_refused(error: type[Exception], words: list[str], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Every message names the argument and its value."""
    if error is IndexError and DEVICE != "cpu":
        pytest.skip("nobody looks at the targets on a GPU")
    with pytest.raises(error) as caught:
        prsl_cross_entropy(*arguments, **({"k": 2} | options))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_backends_that_cannot_run_say_why(name: str) -> None:
    for call in (
        lambda: prsl_cross_entropy(GOOD, INDEX, k=2, backend=name),
        lambda: PRSLoss(backend=name)(GOOD, INDEX),
    ):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: .*use backend='(auto|eager)'"):
            call()


@pytest.mark.parametrize("backend", ["auto", *RUNNING])
def test_backends_agree(backend: str) -> None:
    z, target = batch(classes=40)
    torch.testing.assert_close(prsl_cross_entropy(z, target, backend=backend), prsl_cross_entropy(z, target))


def test_meta_tensors_have_a_shape() -> None:
    z, target = (x.to("meta") for x in batch())
    assert prsl_cross_entropy(z, target, k=3, reduction="none").shape == (6,)


class TestModule:
    def test_is_the_function(self) -> None:
        z, target = batch(dtype=torch.float64)
        weight = torch.rand(10, dtype=torch.float64)
        options: dict[str, Any] = {"k": 3, "b": 0.5, "space": "log_prob", "distance": "l1", "ignore_index": 4}
        options |= {"reduction": "sum", "label_smoothing": 0.1, "return_terms": True, "backend": "eager"}
        target = target.clamp(min=0)
        got, want = PRSLoss(weight, **options)(z, target), prsl_cross_entropy(z, target, weight, **options)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_takes_positions_as_documented(self) -> None:
        loss = PRSLoss(None, 3, 0.5)
        assert (loss.k, loss.b) == (3, 0.5)
        assert "k=3, b=0.5, space='prob'" in repr(loss)

    def test_weight_is_a_buffer(self) -> None:
        loss = PRSLoss(torch.ones(10)).double()
        assert loss.weight is not None
        assert loss.weight.dtype == torch.float64
        assert list(loss.state_dict()) == ["weight"]
        assert list(PRSLoss().state_dict()) == []

    @pytest.mark.parametrize("options", [{"k": 0}, {"b": NAN}, {"space": "p"}, {"reduction": "avg"}, {"backend": "?"}])
    def test_refuses_at_once(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            PRSLoss(**options)


def test_inplace_backward_refuses_storage_that_logits_share() -> None:
    base = torch.randn(20, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="share theirs"):
        prsl_cross_entropy(base.unfold(0, 9, 2)[:5], torch.tensor([0, 3, 4, 1, 8]), k=3, inplace_backward=True)
    strided = torch.randn(4, 3, 20, requires_grad=True)[:, :, ::2].transpose(1, 2)
    prsl_cross_entropy(strided, torch.zeros(4, 3, dtype=torch.long), k=3, inplace_backward=True)


@pytest.mark.parametrize(
    "option", [{"b": 1e39}, {"b": -1e39}, {"b": 10**400}, {"ignore_index": 2**70}], ids=lambda option: str(option)[:20]
)
def test_numbers_beyond_the_dtype_are_refused_by_name(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        prsl_cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), **{"k": 2, **option})  # type: ignore[call-overload]


def test_any_real_number_is_a_weight_of_the_distance() -> None:
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    half = prsl_cross_entropy(logits, target, k=2, b=Fraction(1, 2))  # type: ignore[call-overload]
    assert half == prsl_cross_entropy(logits, target, k=2, b=0.5)
    assert prsl_cross_entropy(logits, target, k=2, b=1e39).isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_a_mean_over_no_weight_is_nan_as_in_cross_entropy(smoothing: float) -> None:
    logits, target, weight = torch.randn(3, 4), torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1, 1, 1])
    assert F.cross_entropy(logits, target, weight, label_smoothing=smoothing).isnan()
    assert prsl_cross_entropy(logits, target, weight, b=0, label_smoothing=smoothing).isnan()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_weight_of_an_unused_class_does_not_reach_ignored_tokens(value: float) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    target, weight = torch.tensor([1, -100, 2]), torch.tensor([value, 1, 1, 1])
    loss = prsl_cross_entropy(logits, target, weight, b=0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, weight))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert not gradient[1].any()
