"""The operators ``prsl_native::*`` as PyTorch sees them: declared as they are, and safe against wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_checks import INF, compute_dtype, same_bits
from torch import Tensor

from prsl_kernels import prsl_cross_entropy

pytestmark = pytest.mark.usefixtures("_native", "_single_thread")

OPTIONS = (4, "prob", "l2", -100, 0.1)
OUTSIDE = [-1, 9, 2**31, 2**62, 2**63 - 1, -(2**63)]


def arguments(shape: tuple[int, ...] = (5, 9), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """For all three operators, by name: classes last, the second token ignored."""
    logits = (3 * torch.randn(shape)).to(dtype)
    target = torch.randint(shape[-1], shape[:-1])
    target.view(-1)[1] = -100
    weight = torch.rand(shape[-1]).to(compute_dtype(dtype))
    stats = torch.ops.prsl_native.token_terms(logits, target, weight, *OPTIONS)[2]
    grads = torch.randn(2, *shape[:-1]).to(compute_dtype(dtype))
    return {
        "logits": logits,
        "target": target,
        "weight": weight,
        "stats": stats,
        "grad_cross_entropy": grads[0],
        "grad_penalty": grads[1],
        **dict(zip(("k", "space", "distance", "ignore_index", "label_smoothing"), OPTIONS, strict=True)),
    }


def forward_arguments(named: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in named.items() if name not in ("stats", "grad_cross_entropy", "grad_penalty")}


# ---- what they declare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "change", "dtype"),
    [
        ((5, 9), lambda x: x, torch.float32),
        ((2, 3, 9), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), torch.bfloat16),
        ((3, 2, 2, 9), lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1), torch.float16),
        ((5, 9), lambda x: x.repeat_interleave(2, -1)[:, ::2], torch.float64),
    ],
    ids=["rows", "transposed", "an image", "a step between classes"],
)
def test_opcheck(shape: tuple[int, ...], change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Schema, fake version, autograd, and a compiler's tracing with dynamic shapes, by PyTorch's own checks."""
    named = arguments(shape, dtype)
    named["logits"] = change(named["logits"])
    if dtype == torch.float64:
        named["weight"] = None
    for requires_grad in (False, True):
        named["logits"] = named["logits"].detach().requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.prsl_native.token_terms, tuple(forward_arguments(named).values()))
    named["logits"] = named["logits"].detach()
    torch.library.opcheck(torch.ops.prsl_native.token_gradient, tuple(named.values()))
    torch.library.opcheck(torch.ops.prsl_native.token_gradient_, tuple(named.values()))


def test_a_single_row_has_no_batch() -> None:
    named = arguments()
    row = {"logits": named["logits"][0], "target": named["target"][0]}
    terms = torch.ops.prsl_native.token_terms(**forward_arguments(named | row))
    want = torch.ops.prsl_native.token_terms(**forward_arguments(named))
    assert all(same_bits(got, of_all[0]) for got, of_all in zip(terms, want, strict=True))


def test_in_place_is_the_gradient_in_the_storage_of_the_logits() -> None:
    named = arguments()
    gradient = torch.ops.prsl_native.token_gradient(**named)
    assert torch.ops.prsl_native.token_gradient_(**named) is None
    assert same_bits(named["logits"], gradient)


# ---- what they refuse, before they read or write ---------------------------------------------------------------------


def refused(named: dict[str, Any], words: str, forward: bool = True) -> None:
    """None of the operators runs, and no logit changes."""
    before = named["logits"].detach().clone()
    calls: list[Callable[[], Any]] = [
        lambda: torch.ops.prsl_native.token_gradient(**named),
        lambda: torch.ops.prsl_native.token_gradient_(**named),
    ]
    if forward:
        calls.append(lambda: torch.ops.prsl_native.token_terms(**forward_arguments(named)))
    for call in calls:
        with pytest.raises(RuntimeError, match=words):
            call()
    assert torch.equal(named["logits"].detach(), before)


@pytest.mark.parametrize("index", OUTSIDE)
@pytest.mark.parametrize("at", [0, 4, 2999])
def test_operators_refuse_targets_out_of_range(index: int, at: int) -> None:
    named = arguments((3000, 9))
    named["target"][at] = index
    refused(named, rf"Target {index} is out of bounds: class indices must be in \[0, 9\), or ignore_index=-100")


@pytest.mark.parametrize("index", OUTSIDE)
@pytest.mark.parametrize("backend", ["auto", "native", "eager"])
@pytest.mark.parametrize("b", [0, 0.5])
def test_the_loss_refuses_targets_out_of_range(index: int, backend: str, b: float) -> None:
    """Unless they are what is to be ignored."""
    z, target = torch.randn(5, 9, requires_grad=True), torch.randint(9, (5,))
    target[3] = index
    for inplace in (False, True):
        with pytest.raises(IndexError, match=f"Target {index} is out of bounds"):
            prsl_cross_entropy(z, target, k=4, b=b, backend=backend, inplace_backward=inplace)
    loss = prsl_cross_entropy(z, target, k=4, b=b, backend=backend, ignore_index=index, reduction="none")
    assert loss[3] == 0
    assert loss.isfinite().all()


@pytest.mark.parametrize("k", [-1, 9, 10, 2**31, 2**62, -(2**63)])
def test_operators_refuse_k(k: int) -> None:
    refused(arguments() | {"k": k}, f"k must be between 1 and V - 1, or 0, but k={k} and V=9")


@pytest.mark.parametrize("k", [9, 2**31, 2**62])
def test_the_loss_refuses_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and V - 1, but k={k} and V=9"):
        prsl_cross_entropy(torch.randn(5, 9), torch.randint(9, (5,)), k=k, backend="native")


WRONG: dict[str, tuple[str, Callable[[Tensor], Any], bool]] = {
    "logits of integers": ("logits", lambda x: x.long(), True),
    "logits of complex numbers": ("logits", lambda x: x.cfloat(), True),
    "logits without a dimension": ("logits", lambda x: x[0, 0], True),
    "logits without a class": ("logits", lambda x: x[:, :0], True),
    "logits in double": ("logits", lambda x: x.double(), True),
    "more rows than targets": ("logits", lambda x: torch.cat((x, x)), True),
    "fewer rows than targets": ("logits", lambda x: x[:4], True),
    "more classes than weights": ("logits", lambda x: torch.cat((x, x), 1), True),
    "target in int32": ("target", lambda x: x.int(), True),
    "target in float32": ("target", lambda x: x.float(), True),
    "target in bool": ("target", lambda x: x > 0, True),
    "target too short": ("target", lambda x: x[:4], True),
    "target too long": ("target", lambda x: torch.cat((x, x)), True),
    "weight in double": ("weight", lambda x: x.double(), True),
    "weight in half": ("weight", lambda x: x.half(), True),
    "weight too short": ("weight", lambda x: x[:8], True),
    "weight empty": ("weight", lambda x: x[:0], True),
    "stats too short": ("stats", lambda x: x[:, :5], False),
    "stats of fewer rows": ("stats", lambda x: x[:4], False),
    "stats empty": ("stats", lambda x: x.new_empty(0), False),
    "stats in double": ("stats", lambda x: x.double(), False),
    "gradient of fewer rows": ("grad_cross_entropy", lambda x: x[:4], False),
    "gradient in double": ("grad_cross_entropy", lambda x: x.double(), False),
    "gradient of one number": ("grad_cross_entropy", lambda x: x.sum(), False),
    "gradient of the penalty of fewer rows": ("grad_penalty", lambda x: x[:4], False),
    "gradient of the penalty in half": ("grad_penalty", lambda x: x.half(), False),
    "space": ("space", lambda x: "logits", True),
    "distance": ("distance", lambda x: "linf", True),
}


@pytest.mark.parametrize("name", WRONG)
def test_operators_refuse_what_does_not_fit(name: str) -> None:
    """A wrong size or dtype raises, where a kernel would read beyond the end."""
    argument, change, forward = WRONG[name]
    named = arguments()
    refused(named | {argument: change(named[argument])}, ".", forward)


def test_arguments_of_any_layout() -> None:
    """What the kernels take for contiguous is made so."""
    named = arguments((6, 9))
    want = torch.ops.prsl_native.token_gradient(**named)
    for name in ("target", "weight", "stats", "grad_cross_entropy", "grad_penalty"):
        apart = torch.stack((named[name], torch.full_like(named[name], 7)), -1)[..., 0]
        assert not apart.is_contiguous()
        assert same_bits(torch.ops.prsl_native.token_gradient(**(named | {name: apart})), want)
        if name in ("target", "weight"):
            pair = [torch.ops.prsl_native.token_terms(**forward_arguments(x)) for x in (named, named | {name: apart})]
            assert all(same_bits(*terms) for terms in zip(*pair, strict=True))


def test_a_lazy_sign_is_resolved() -> None:
    """The imaginary part of a conjugate is a view that PyTorch has marked as negative."""
    z = torch.randn(5, 9, dtype=torch.cfloat).conj().imag
    assert z.is_neg()
    target = torch.randint(9, (5,))
    want = prsl_cross_entropy(z.resolve_neg(), target, k=4, b=0.5, backend="native")
    assert same_bits(prsl_cross_entropy(z, target, k=4, b=0.5, backend="native"), want)


def test_stats_of_another_row_write_nothing_beyond_the_gradient() -> None:
    """Backward trusts its statistics for the numbers alone, not for an address."""
    named = arguments((4, 9))
    for value in (INF, -INF, torch.nan, 1e38):
        named["stats"] = torch.full_like(named["stats"], value)
        room = torch.full((6, 9), 3.0)
        room[1:5] = named["logits"]
        torch.ops.prsl_native.token_gradient_(**(named | {"logits": room[1:5]}))
        assert (room[0] == 3).all()
        assert (room[5] == 3).all()
