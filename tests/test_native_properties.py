"""The compiled extension against eager in float64, on tens of thousands of rows that a generator makes up.

The examples are the same in every run; ``HYPOTHESIS_PROFILE=explore`` looks for others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checks import DTYPES, INF, NAN, Exact, compute_dtype, native_result
from torch import Tensor

pytestmark = pytest.mark.usefixtures("_native", "_single_thread")

Levels = Callable[[], Iterator[str]]
COMMON: dict[str, Any] = {
    "deadline": None,  # the machine may be busy
    # The fixture goes through the levels anew for every example.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("deterministic", derandomize=True, database=None, **COMMON)
settings.register_profile("explore", max_examples=20_000, print_blob=True, **COMMON)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "deterministic")


def examples(count: int) -> Any:
    profile = settings.get_profile(PROFILE)
    return settings(profile, max_examples=count) if PROFILE == "deterministic" else settings(profile)


# ---- options ---------------------------------------------------------------------------------------------------------


@st.composite
def losses(draw: st.DrawFn, rows: int, classes: int) -> dict[str, Any]:
    """Everything but the logits: targets (N,), some ignored, class weights, upstream gradients, and the options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    compute = compute_dtype(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    ignore_index = draw(st.sampled_from([-100, 2**63 - 1, int(target[0])]))
    target[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = ignore_index
    weight = None
    if draw(st.booleans()):
        weight = (3 * torch.rand(classes, generator=generator, dtype=torch.float64)).to(compute)
        weight[torch.rand(classes, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0
    b = draw(st.sampled_from([0.0, 1e-4, 0.7, -0.7, 100.0]))
    k = draw(st.one_of(st.integers(1, min(classes - 1, 24)), st.integers(1, classes - 1), st.just(classes - 1)))
    return {
        "dtype": dtype,
        "target": target,
        "weight": weight,
        "upstream": torch.randn(rows, generator=generator).to(compute) * draw(st.sampled_from([1.0, 1e-3, 65536.0])),
        "b": b,
        "k": k if b else 0,
        "space": draw(st.sampled_from(["prob", "log_prob"])),
        "distance": draw(st.sampled_from(["l2", "l1"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "ignore_index": ignore_index,
        "inplace_backward": draw(st.booleans()),
        "columns": draw(st.booleans()),
    }


def check(z: Tensor, loss: dict[str, Any], each_level: Levels) -> None:
    """Terms and gradients of logits (N, V) in float64, rounded to the dtype, on every level."""
    options = dict(loss)
    z = z.to(options.pop("dtype"))
    if options.pop("columns"):
        z = z.t().contiguous().t()
    target, weight, upstream, b = (options.pop(name) for name in ("target", "weight", "upstream", "b"))
    inplace = options.pop("inplace_backward")
    exact = Exact(z, target, weight, **options)
    for level in each_level():
        got = native_result(z, target, weight, upstream, b=b, inplace_backward=inplace, **options)
        exact.check(level, got, upstream, b)


# ---- rows of few values: what ties, masks and their order can do -----------------------------------------------------

VALUES = (0.0, 1.0, -INF, -1.0, 0.5, 2.0, 3.0, 1.0000001, 8.0, -8.0, 1e-3, 60.0, -60.0, 1e4, -1e4, INF, NAN)
FINITE = len(VALUES) - 2


@st.composite
def few_values(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Each logit is one of a few values, and each is drawn."""
    rows, classes = 48, draw(st.one_of(st.integers(2, 20), st.integers(2, 80), st.sampled_from([127, 129, 193])))
    used = draw(st.lists(st.integers(0, FINITE - 1), min_size=1, max_size=5))
    if draw(st.integers(0, 9)) == 9:
        used.append(draw(st.integers(FINITE, len(VALUES) - 1)))
    raw = draw(st.binary(min_size=rows * classes, max_size=rows * classes))
    table = torch.tensor([VALUES[i] for i in used], dtype=torch.float64)
    choice = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() % len(used)
    return table[choice].view(rows, classes), draw(losses(rows, classes))


@examples(400)
@given(few_values())
def test_rows_of_few_values(each_level: Levels, example: tuple[Tensor, dict[str, Any]]) -> None:
    check(*example, each_level)


# ---- rows of many values ---------------------------------------------------------------------------------------------


@st.composite
def rows_of_a_kind(draw: st.DrawFn, rows: int, classes: int) -> Callable[[Tensor], Tensor]:
    """From the targets (N,) to logits (N, V): a distribution, what is done to it, and how far the target is off."""
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1.0, 4.0, 0.0, 1e-6, 1e-2, 30.0, 300.0, 3000.0]))
    offset = draw(st.sampled_from([0.0, 0.0, 10.0, 1e4, -1e4]))
    quantum = draw(st.sampled_from([0.0, 0.0, 0.25, 1.0, 4.0]))
    ceiling = draw(st.sampled_from([INF, INF, 0.5, -1.0]))
    order = draw(st.sampled_from(["any", "any", "ascending", "descending", "up and down"]))
    lanes = draw(st.one_of(st.none(), st.tuples(st.integers(2, 300), st.integers(0, 299), st.integers(1, 40))))
    masked = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
    lead = draw(st.sampled_from([None, None, 0.0, 3.0, 30.0, 60.0, 120.0, -60.0, INF]))
    bad = draw(st.sampled_from([None] * 12 + [NAN, INF]))

    def make(target: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        z = z.clamp(max=ceiling * max(scale, 1e-9))
        if quantum:
            z = (z / quantum).round() * quantum
        if order != "any":
            z = z.sort(-1, descending=order == "descending").values
        if order == "up and down":
            z = torch.cat((z[:, ::2], z[:, 1::2].flip(-1)), -1)
        if lanes is not None:
            period, phase, width = lanes
            z = torch.where((torch.arange(classes) + phase) % period < width, z, z - 9)
        z = torch.where(torch.rand(rows, classes, generator=generator) < masked, -INF, z + offset)
        if lead is not None:
            of_others = z.amax(-1) if lead >= 0 else z.amin(-1)
            far = of_others + lead if lead != INF else torch.full((rows,), 0.3, dtype=torch.float64)
            z = z.scatter(1, target.unsqueeze(-1), far.unsqueeze(-1))
        if bad is not None:
            z[torch.arange(rows), torch.randint(classes, (rows,), generator=generator)] = bad
        return z

    return make


@st.composite
def many_values(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Rows of four kinds in one batch, in turns."""
    widths = st.one_of(st.integers(2, 40), st.integers(2, 300), st.integers(300, 1500), st.sampled_from([4097, 5000]))
    classes, kinds = draw(widths), 4
    rows = 8 if classes < 1500 else 2
    makes = [draw(rows_of_a_kind(rows, classes)) for _ in range(kinds)]
    loss = draw(losses(rows * kinds, classes))
    y = loss["target"].clamp(0, classes - 1)  # of the ignored ones, any
    z = torch.stack([make(y[at::kinds]) for at, make in enumerate(makes)], 1)
    return z.flatten(0, 1), loss


@examples(700)
@given(many_values())
def test_rows_of_many_values(each_level: Levels, example: tuple[Tensor, dict[str, Any]]) -> None:
    check(*example, each_level)
