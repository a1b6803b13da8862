"""K chosen by a share of the probability: against the definition in loops, against fixed k, and at the edges."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vmap

from prsl_kernels import PRSLoss, eager, prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_single_thread")

SPREADS = list(product(("prob", "log_prob"), ("l2", "l1")))
SHARES = [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]
LIMITS = [None, 1, 3, 1000]
INF, NAN = math.inf, math.nan


def size_of_k(logits: list[float], excluded: int, top_p: float, max_k: int | None) -> int:
    """The number of classes in K by the definition; 0 where no class but the excluded one has p > 0."""
    others = sorted((x for i, x in enumerate(logits) if i != excluded and x != -INF), reverse=True)
    if not others:
        return 0
    mass = [math.exp(x - others[0]) for x in others]
    total = math.fsum(mass)
    size = 1
    while size < len(others) and (top_p == 1 or math.fsum(mass[:size]) < top_p * total):
        size += 1
    while size < len(others) and others[size] == others[size - 1]:
        size += 1
    return size if max_k is None else min(size, max_k)


def gradient(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(prsl_cross_entropy(z, target, reduction="sum", **options), z)[0]


def rows(kind: str, count: int = 8, classes: int = 12) -> tuple[Tensor, Tensor]:
    """Logits (count, classes) in float64 that every dtype holds exactly, and targets."""
    z = (3 * torch.randn(count, classes)).bfloat16().half().double()
    target = torch.randint(classes, (count,))
    if kind == "tied":
        z = torch.randint(-3, 4, (count, classes)).double()
    if kind == "all tied":
        z = torch.ones(count, classes, dtype=torch.float64)
    if kind == "target on top":
        target = z.argmax(-1)
    if kind == "target 60 ahead":
        z[torch.arange(count), target] = 60 + z.amax(-1).round()
    if kind == "far apart":
        z = (z * 100).round().bfloat16().half().double()
    if kind == "masked":
        for i in range(count):  # from all the others to none of them
            z[i, torch.randperm(classes)[: classes * i // (count - 1)]] = -INF
        z[torch.arange(count), target] = 0.5
    return z, target


KINDS = ["distinct", "tied", "all tied", "target on top", "target 60 ahead", "far apart", "masked"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("way", ["read", "unread"])
def test_definition(kind: str, space: str, distance: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient of every row, in every dtype, whether ties at the limit are looked at or not."""
    if way == "unread":
        monkeypatch.setattr(eager, "known", lambda condition: None)
    b = 0.7
    for top_p, max_k in product(SHARES, LIMITS if way == "read" else [2, 3]):
        z, target = rows(kind)
        exact = []
        for x, y in zip(z.tolist(), target.tolist(), strict=True):
            q = [float(i == y) for i in range(len(x))]
            size = size_of_k(x, y, top_p, max_k)
            exact.append(oracle.row(x, q, y, k=size, space=space, distance=distance))
        penalty = torch.tensor([r.penalty for r in exact], dtype=torch.float64)
        slopes = torch.tensor(
            [[c + b * d for c, d in zip(r.cross_entropy_grad, r.penalty_grad, strict=True)] for r in exact],
            dtype=torch.float64,
        )
        options: dict[str, Any] = {"b": b, "top_p": top_p, "max_k": max_k, "space": space, "distance": distance}
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            computed = torch.finfo(torch.promote_types(dtype, torch.float32))
            eps = computed.eps
            terms = prsl_cross_entropy(z.to(dtype), target, reduction="none", return_terms=True, **options)
            scale = 1 + z.masked_fill(z == -INF, 0).abs().amax()  # of the rounding in exp(z - max)
            torch.testing.assert_close(
                terms.penalty.double(), penalty, rtol=float(16 * scale * eps), atol=computed.tiny
            )
            torch.testing.assert_close(terms.loss, terms.cross_entropy + b * terms.penalty)
            got = gradient(z.to(dtype), target, **options)
            assert got.dtype == dtype
            rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
            atol = float(32 * scale * eps) + (1e-7 if dtype == torch.float16 else 0)  # half a step of its subnormals
            torch.testing.assert_close(got.double(), slopes, rtol=rounding, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_row_is_that_of_its_own_k(kind: str, space: str, distance: str, dtype: torch.dtype) -> None:
    z, target = rows(kind, 16, 120)
    options: dict[str, Any] = {"b": 0.7, "space": space, "distance": distance, "reduction": "none"}
    sizes = set()
    for top_p, max_k in product(SHARES, LIMITS):
        x = z.to(dtype).requires_grad_()
        got = prsl_cross_entropy(x, target, top_p=top_p, max_k=max_k, **options)
        slopes = torch.autograd.grad(got.sum(), x)[0]
        for i, (row, y) in enumerate(zip(z, target, strict=True)):
            size = size_of_k(row.tolist(), int(y), top_p, max_k)
            sizes.add(size)
            same = row.to(dtype).requires_grad_()
            want = prsl_cross_entropy(same, y, **{**options, "k": max(1, size), "backend": "eager"})
            torch.testing.assert_close(got[i], want, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
            torch.testing.assert_close(
                slopes[i],
                torch.autograd.grad(want, same)[0],
                rtol=1e-12 if dtype == torch.float64 else 2**-7,  # a step of bfloat16
                atol=1e-15 if dtype == torch.float64 else 1e-8,
            )
    assert len(sizes) >= {"all tied": 3, "far apart": 3}.get(kind, 6)


@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_the_smallest_share_has_no_distance(space: str, distance: str) -> None:
    """K is the largest class and those that are tied with it."""
    z, target = torch.tensor([[9.0, 5, 5, 1, 0], [1.0, 5, 3, 2, -INF]]), torch.tensor([0, 1])
    options: dict[str, Any] = {"top_p": 1e-12, "space": space, "distance": distance}
    terms = prsl_cross_entropy(z, target, return_terms=True, reduction="none", b=0.7, **options)
    assert terms.penalty.tolist() == [0, 0]
    torch.testing.assert_close(terms.loss, F.cross_entropy(z, target, reduction="none"))
    if distance == "l2":
        assert torch.equal(gradient(z, target, b=0.7, **options), gradient(z, target, b=0, backend="eager", **options))


def penalty_slope(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The derivative of the distance alone, "l1" between log-probabilities: 1 for each class above the minimum."""
    z = z.clone().requires_grad_()
    _, d = eager.token_terms(
        z,
        target,
        None,
        k=1,
        space="log_prob",
        distance="l1",
        ignore_index=-100,
        label_smoothing=0.0,
        **options,
    )
    return torch.autograd.grad(d.sum(), z)[0]


def test_all_the_classes_with_a_probability() -> None:
    """A share of 1 takes a class whose probability underflows, and none that is masked, nor the target."""
    z = torch.tensor([[9.0, 5, -5000, -INF, 4, -3000, -INF], [9.0, 5, -5000, -INF, 4, -3000, -6000]])
    slope = penalty_slope(z, torch.tensor([0, 0]), top_p=1.0)
    assert slope.tolist() == [[0, 1, -3, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, -4]]


def test_a_limit_at_a_tie_shares_the_minimum_with_all_that_are_tied() -> None:
    """Those beyond the limit, too, as for k; below the limit the tied classes are all in K."""
    z, target = torch.tensor([9.0, 5, 3, 3, 3, 3, 1]), torch.tensor(0)
    assert penalty_slope(z, target, top_p=1.0, max_k=3).tolist() == [0, 1, -0.25, -0.25, -0.25, -0.25, 0]
    assert penalty_slope(z, target, top_p=0.8, max_k=1000).tolist() == [0, 1, -0.25, -0.25, -0.25, -0.25, 0]
    assert penalty_slope(z, target, top_p=0.8, max_k=1).tolist() == [0] * 7


@pytest.mark.parametrize("max_k", [None, 25_000])
def test_a_long_sum_is_not_rounded_to_float32(max_k: int | None) -> None:
    """The tail holds 3e-4 of the largest class, a part in 1e8 each: which of them is the edge is known to the class."""
    tail = -math.log(1e8) - torch.arange(30_000) * 4e-6
    z = torch.cat((torch.tensor([3.0, 0.0]), tail)).float()
    target = torch.tensor(0)
    total = math.fsum(map(math.exp, z[1:].tolist()))
    top_p = (1 + 1.5e-4) / total
    size = size_of_k(z.tolist(), 0, top_p, max_k)
    assert 10_000 < size < 20_000
    assert int((penalty_slope(z, target, top_p=top_p, max_k=max_k) == 1).sum()) == size - 1


@pytest.mark.parametrize("max_k", [None, 4])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_the_gradient_follows_a_permutation(space: str, distance: str, max_k: int | None) -> None:
    for kind, top_p in product(KINDS, (0.3, 0.9, 1.0)):
        z, target = rows(kind)
        options: dict[str, Any] = {"b": 1.0, "top_p": top_p, "max_k": max_k, "space": space, "distance": distance}
        order = torch.randperm(12)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(12))
        permuted = gradient(z[:, order], place[target], **options)
        torch.testing.assert_close(permuted, gradient(z, target, **options)[:, order], rtol=1e-12, atol=1e-15)


def test_the_loss_jumps_where_k_changes() -> None:
    """And the choice has no derivative: on each side the gradient is that of a fixed k."""
    y = torch.tensor(0)
    z = torch.tensor([0.0, 2, 1, 0], dtype=torch.float64)
    top_p = float(z[1:].softmax(0)[0])  # what the largest class holds by itself
    losses = []
    for step, size in ((1e-9, 1), (-1e-9, 2)):
        x = z.clone()
        x[1] += step
        losses.append(prsl_cross_entropy(x, y, top_p=top_p, b=1.0))
        fixed: dict[str, Any] = {"k": size, "b": 1.0, "backend": "eager"}
        torch.testing.assert_close(losses[-1], prsl_cross_entropy(x, y, **fixed), rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient(x, y, top_p=top_p, b=1.0), gradient(x, y, **fixed), rtol=1e-13, atol=1e-15)
    p = z.softmax(0)
    torch.testing.assert_close(losses[1] - losses[0], p[1] - p[2], rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 9, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_shapes_weights_smoothing_and_reductions(shape: tuple[int, ...], reduction: str, kind: str) -> None:
    """As with a k of its own for each row, in both its terms."""
    z = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(9, dtype=torch.float64)
    rest = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(9, rest) if kind == "indices" else torch.rand(shape, dtype=torch.float64)
    flat = (z if len(shape) == 1 else z.movedim(1, -1)).reshape(-1, 9)
    if kind == "indices":
        targets, total = target.reshape(-1), weight[target].sum()
        excluded = targets
    else:
        targets = (target if len(shape) == 1 else target.movedim(1, -1)).reshape(-1, 9)
        total, excluded = torch.tensor(len(targets)), targets.argmax(-1)
    options: dict[str, Any] = {"b": 0.7, "label_smoothing": 0.1, "return_terms": True, "reduction": "sum"}
    want = []
    for x, y, out in zip(flat, targets, excluded, strict=True):
        size = size_of_k(x.tolist(), int(out), 0.8, 5)
        want.append(torch.stack(prsl_cross_entropy(x, y, weight, **{**options, "k": size, "backend": "eager"})))
    each = torch.stack(want)
    expected = {"none": each.unflatten(0, rest or (1,)), "sum": each.sum(0), "mean": each.sum(0) / total}[reduction]
    expected = expected.squeeze(0) if reduction == "none" and not rest else expected
    got = prsl_cross_entropy(z, target, weight, **{**options, "top_p": 0.8, "max_k": 5, "reduction": reduction})
    torch.testing.assert_close(torch.stack(got, -1), expected, rtol=1e-13, atol=1e-14)
    upstream = torch.randn_like(got.loss)
    slopes = (torch.autograd.grad(x, z, upstream, retain_graph=True)[0] for x in (got.loss, expected[..., 0]))
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("max_k", [None, 3])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_nan_and_ignored_rows(space: str, distance: str, max_k: int | None) -> None:
    z = torch.randn(5, 9)
    z[0, 4] = NAN  # not the target
    z[1, 3] = INF
    z[2, 5] = NAN  # ignored
    z[3, :] = NAN
    target = torch.tensor([0, 3, -100, 8, 1])
    options: dict[str, Any] = {"b": 0.7, "top_p": 0.8, "max_k": max_k, "space": space, "distance": distance}
    loss = prsl_cross_entropy(z, target, reduction="none", **options)
    assert loss.isnan().tolist() == [True, True, False, True, False]
    assert loss[2] == 0
    slopes = gradient(z, target, **options)
    assert slopes.isnan().all(-1).tolist() == [True, True, False, True, False]
    assert not slopes[2].any()
    assert slopes[4].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 1), (1,), (0, 5), (0, 1)])
def test_no_other_classes_and_no_rows(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.long)
    for reduction in ("none", "sum", "mean"):
        options: dict[str, Any] = {"reduction": reduction, "b": 0.7, "top_p": 0.5}
        got = prsl_cross_entropy(z, target, **options)
        torch.testing.assert_close(got, F.cross_entropy(z, target, reduction=reduction), equal_nan=True)
        assert torch.autograd.grad(got.sum(), z)[0].shape == shape


def test_b_zero_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no choice then, and no sorting."""
    z, target = rows("distinct")
    monkeypatch.setattr(eager, "largest_classes", None)
    terms = prsl_cross_entropy(z, target, b=0, top_p=0.5, max_k=2, return_terms=True)
    torch.testing.assert_close(terms.loss, F.cross_entropy(z, target))
    assert terms.penalty == 0


def test_k_is_ignored() -> None:
    """Even where there are not as many classes."""
    z, target = rows("distinct")
    options: dict[str, Any] = {"top_p": 0.9, "b": 0.7}
    want = prsl_cross_entropy(z, target, **options)
    assert want > prsl_cross_entropy(z, target, b=0)
    for k in (1, 5, 1000):
        assert torch.equal(prsl_cross_entropy(z, target, k=k, **options), want)


@pytest.mark.parametrize("max_k", [None, 3])
@pytest.mark.parametrize(("space", "distance"), SPREADS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_derivatives(space: str, distance: str, kind: str, max_k: int | None) -> None:
    """First and second, in reverse and forward mode, against finite differences, away from the jumps."""
    z, target = 3 * torch.randn(3, 7, dtype=torch.float64), torch.tensor([3, -100, 1])
    weight = torch.rand(7, dtype=torch.float64)
    inputs = [z.requires_grad_()]
    if kind == "probabilities":
        target = torch.rand(3, 7, dtype=torch.float64)
        inputs.append(target.requires_grad_())

    def loss(z: Tensor, target: Tensor = target) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none", "b": 0.7, "top_p": 0.97}
        options |= {"space": space, "distance": distance, "max_k": max_k}
        return prsl_cross_entropy(z, target, weight, **options)

    torch.autograd.gradcheck(
        loss, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("max_k", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("space", "distance"), SPREADS)
def test_torch_func(kind: str, space: str, distance: str, max_k: int | None) -> None:
    """The transforms agree with one another on rows of every kind, where every derivative is finite."""
    z, target = rows(kind, 4)

    def loss(z: Tensor, y: Tensor, top_p: float = 0.8) -> Tensor:
        options: dict[str, Any] = {"space": space, "distance": distance, "b": 0.7, "top_p": top_p, "max_k": max_k}
        return prsl_cross_entropy(z, y, **options)

    for top_p in (0.8, 1.0):
        each = vmap(lambda z, y, top_p=top_p: grad(loss)(z, y, top_p))(z, target)
        for x, y, first in zip(z, target, each, strict=True):
            assert first.isfinite().all()
            scale = 1 + float(x.masked_fill(x == -INF, 0).abs().amax())
            close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14 * scale}
            w = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(w, y, top_p), w, create_graph=True)
            torch.testing.assert_close(first, slope.detach(), **close)
            tangent = torch.linspace(-1, 1, 12, dtype=torch.float64)
            value, along = jvp(lambda z, y=y, top_p=top_p: loss(z, y, top_p), (x,), (tangent,))
            assert along.dtype == torch.float64
            torch.testing.assert_close(value, loss(x, y, top_p), **close)
            torch.testing.assert_close(along, slope.detach() @ tangent, **close)
            second = hessian(loss)(x, y, top_p)
            assert second.isfinite().all()
            (twice,) = torch.autograd.grad(slope @ tangent, w)
            torch.testing.assert_close(twice, second @ tangent, **close)
    got = vmap(lambda z, y: loss(z, y))(z.expand(2, 4, 12), target.expand(2, 4))
    torch.testing.assert_close(got, loss(z, target).expand(2), rtol=1e-14, atol=0)


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("space", "distance", "dtype", "max_k", "compiler"),
    [
        ("prob", "l2", torch.bfloat16, None, "inductor"),
        ("prob", "l1", torch.float16, 3, "aot_eager"),
        ("log_prob", "l2", torch.float64, None, "aot_eager"),
        ("log_prob", "l1", torch.float32, 3, "aot_eager"),
    ],
)
def test_compile(space: str, distance: str, dtype: torch.dtype, max_k: int | None, compiler: str) -> None:
    """One graph for values and gradients, for sizes and shares that change, with ignored tokens and ties."""
    options: dict[str, Any] = {"space": space, "distance": distance, "max_k": max_k, "b": 0.7, "return_terms": True}
    compiled = torch.compile(prsl_cross_entropy, fullgraph=True, dynamic=True, backend=compiler)
    for count, classes, top_p in ((5, 9, 0.8), (7, 9, 0.8), (2, 8, 0.6)):
        z = (3 * torch.randn(count, classes)).round().to(dtype).requires_grad_()
        target = torch.randint(classes, (count,))
        target[1] = -100
        got, want = (f(z, target, top_p=top_p, **options) for f in (compiled, prsl_cross_entropy))
        torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(x.loss, z)[0] for x in (got, want)]
        torch.testing.assert_close(*gradients, rtol=torch.finfo(dtype).eps, atol=1e-7)


GOOD = torch.zeros(4, 6)
INDEX = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, ["top_p", "'0.9'", "number"], {"top_p": "0.9"}),
        (TypeError, ["top_p", "True", "number"], {"top_p": True}),
        (TypeError, ["top_p", "Tensor", "number"], {"top_p": torch.tensor(0.5)}),
        (ValueError, ["top_p", "is 0:", "above 0"], {"top_p": 0}),
        (ValueError, ["top_p", "-0.5", "above 0"], {"top_p": -0.5}),
        (ValueError, ["top_p", "1.5", "at most 1"], {"top_p": 1.5}),
        (ValueError, ["top_p", "nan", "at most 1"], {"top_p": NAN}),
        (TypeError, ["max_k", "2.5", "integer"], {"top_p": 0.9, "max_k": 2.5}),
        (TypeError, ["max_k", "True", "integer"], {"top_p": 0.9, "max_k": True}),
        (ValueError, ["max_k", "is 0:", "None"], {"top_p": 0.9, "max_k": 0}),
        (ValueError, ["max_k=7", "top_p"], {"max_k": 7}),
        (ValueError, ["inplace_backward=True", "top_p=0.9", "False"], {"top_p": 0.9, "inplace_backward": True}),
        *(
            (
                RuntimeError,
                [f"backend='{name}' cannot run: top_p is computed by eager alone; use backend='auto'"],
                {"top_p": 0.9, "backend": name},
            )
            for name in ("native", "triton")
        ),
    ],
)
def test_refused(error: type[Exception], words: list[str], options: dict[str, Any]) -> None:
    """By the function and when the module is made; every message names the argument, its value and the remedy."""
    for call in (lambda: prsl_cross_entropy(GOOD, INDEX, k=2, **options), lambda: PRSLoss(**options)):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


def test_no_input_is_refused_for_k_or_max_k() -> None:
    choices: list[dict[str, Any]] = [{"max_k": 1000}, {"k": 1000, "backend": "eager"}, {"top_p": 1}]
    for options in choices:
        assert prsl_cross_entropy(GOOD, INDEX, **{"top_p": 0.9, **options}).isfinite()


def test_module() -> None:
    z, target = rows("distinct")
    weight = torch.rand(12, dtype=torch.float64)
    options: dict[str, Any] = {"b": 0.5, "top_p": 0.9, "max_k": 2, "space": "log_prob", "return_terms": True}
    loss = PRSLoss(weight, **options)
    want = prsl_cross_entropy(z, target, weight, **options)
    assert all(torch.equal(x, y) for x, y in zip(loss(z, target), want, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(functional_call(loss, {}, (z, target)), want, strict=True))
    assert want.penalty != prsl_cross_entropy(z, target, weight, **{**options, "max_k": None}).penalty
    assert "top_p=0.9, max_k=2, b=0.5, space='log_prob'" in repr(loss)
    assert "top_p" not in repr(PRSLoss())
    # The two come last, behind every position there was before.
    last = PRSLoss(None, 3, 0.5, "prob", "l1", -1, "sum", 0.1, False, True, "eager", 0.7, 5)
    assert (last.return_terms, last.backend, last.top_p, last.max_k) == (True, "eager", 0.7, 5)
