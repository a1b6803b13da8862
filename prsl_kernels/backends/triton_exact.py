"""The Triton kernels for any row, in as many passes over it as it takes.

They do what the fast path cannot: rows in which it may have missed a class, or whose numbers are too large for it;
float64; and k beyond what a list can hold.
"""

# mypy: ignore-errors
# The types in kernels are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    GRADIENT_ARGUMENTS,
    ROW_ARGUMENTS,
    STATS,
    between,
    bucket_of,
    cross_entropy_of,
    deviation,
    finish_distance,
    grouped,
    is_flat,
    penalty_gradient,
    row_offset,
    slopes_of,
    smallest_of,
    store_row,
    weights_at,
)


@triton.jit
def block_of(logits, start, y, classes, BLOCK: tl.constexpr):
    """A block of a row (BLOCK,): the classes, which of them exist, their logits, and these without the target's."""
    at = start + tl.arange(0, BLOCK)
    inside = at < classes
    z = tl.load(logits + at, mask=inside, other=float("-inf"))
    z = z.to(tl.float64) if z.dtype.is_fp64() else z.to(tl.float32)
    return at, inside, z, tl.where(at == y, float("-inf"), z)


@triton.jit
def count_row(logits, y, classes, bound, BLOCK: tl.constexpr):
    """How many classes other than the target are at least bound."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, BLOCK):
        at, inside, _, x = block_of(logits, start, y, classes, BLOCK)
        counts += (inside & (at != y) & (x >= bound)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def exact_threshold(logits, y, classes, k, top, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest logit of the row without the target's, by bisection: a pass over the row per step."""
    low = bucket_of(top * 0 + float("-inf"), BITS)  # as find_cut, whose comments hold here
    high = bucket_of(top, BITS) + 1
    middle = high - 1
    count = count_row(logits, y, classes, smallest_of(middle, BITS), BLOCK)
    while (count != k) & (middle > low):
        if count < k:
            high = middle
        else:
            low = middle
        middle = between(low, high)
        count = count_row(logits, y, classes, smallest_of(middle, BITS), BLOCK)
    cut = smallest_of(middle, BITS)
    smallest = tl.full((BLOCK,), float("inf"), top.dtype)
    for start in range(0, classes, BLOCK):
        _, inside, _, x = block_of(logits, start, y, classes, BLOCK)
        smallest = tl.minimum(smallest, tl.where(inside & (x >= cut), x, float("inf")))
    return tl.where(count >= k, tl.min(smallest, 0), float("-inf"))


@triton.jit
def exact_distance(
    logits, y, classes, k, top, LOG_PROB: tl.constexpr, L1: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """As distance_of, from the whole row; ``top`` is its largest logit without the target's."""
    threshold = exact_threshold(logits, y, classes, k, top, BITS, BLOCK)
    scale = deviation(top, top, threshold, LOG_PROB)
    flat = is_flat(scale, threshold, LOG_PROB)
    units = tl.zeros((BLOCK,), top.dtype)
    squares = tl.zeros((BLOCK,), top.dtype)
    above = tl.zeros((BLOCK,), top.dtype)
    tied = tl.zeros((BLOCK,), top.dtype)
    for start in range(0, classes, BLOCK):
        at, inside, _, x = block_of(logits, start, y, classes, BLOCK)
        member = x > threshold
        unit = tl.where(member & (not flat), deviation(x, top, threshold, LOG_PROB) / scale, 0)
        units += unit
        squares += unit * unit
        above += member.to(top.dtype)
        tied += (inside & (at != y) & (x == threshold)).to(top.dtype)
    length, share = finish_distance(tl.sum(units, 0), tl.sum(squares, 0), tl.sum(above, 0), tl.sum(tied, 0), scale, L1)
    return threshold, tl.where(flat, 0, length), tl.where(flat, 0, share), flat


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def exact_kernel(
    logits,  # (outer, inner, classes)
    target,  # (rows,) int64
    weight,  # (classes,) or None
    weight_sum,  # (), or None without weight or label smoothing
    cross_entropy,  # (rows,) out, as the next three
    penalty,
    stats,
    slow,  # (rows,): which rows to do; for ALL, out
    classes,
    first_row,
    inner,
    outer_stride,
    inner_stride,
    ignore_index,
    k,
    EPSILON: tl.constexpr,
    SELECT: tl.constexpr,
    LOG_PROB: tl.constexpr,
    L1: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
):
    """Any row, in as many passes as it takes; one program per row, which leaves at once where the row is right."""
    row = tl.program_id(0)
    y = tl.load(target + row)
    if ALL:
        tl.store(slow + row, 1)
        if y == ignore_index:
            store_row(row, cross_entropy, penalty, stats, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False)
            return
    else:
        if tl.load(slow + row) == 0:
            return
    logits += row_offset(row, first_row, inner, outer_stride, inner_stride)
    T: tl.constexpr = cross_entropy.dtype.element_ty
    known = (y >= 0) & (y < classes)
    z_y = tl.load(logits + y, mask=known, other=float("nan")).to(T)

    maxima = tl.full((BLOCK,), float("-inf"), T)
    tops = maxima
    for start in range(0, classes, BLOCK):
        _, _, z, x = block_of(logits, start, y, classes, BLOCK)
        maxima = tl.maximum(maxima, z)
        tops = tl.maximum(tops, x)
    row_max = tl.max(maxima, 0)
    top = tl.max(tops, 0)
    totals = tl.zeros((BLOCK,), T)
    smoothed = tl.zeros((BLOCK,), T)
    for start in range(0, classes, BLOCK):
        at, inside, z, _ = block_of(logits, start, y, classes, BLOCK)
        totals += tl.where(inside, tl.exp(z - row_max), 0)
        if EPSILON > 0:
            smoothed += tl.where(inside, weights_at(weight, at, inside) * (z - row_max), 0)
    total = tl.sum(totals, 0)
    log_total = tl.log(total)
    w_y = tl.load(weight + y, mask=known, other=0) if weight is not None else 1.0
    nll = log_total - (z_y - row_max)
    loss = cross_entropy_of(nll, log_total, tl.sum(smoothed, 0), w_y, weight_sum, classes, EPSILON)
    d = tl.where((total == total) & known, 0.0, float("nan")).to(T)
    threshold, length, share, flat = tl.zeros((), T), tl.zeros((), T), tl.zeros((), T), row_max == row_max
    if SELECT:
        threshold, length, share, flat = exact_distance(logits, y, classes, k, top, LOG_PROB, L1, BITS, BLOCK)
        unit = 1.0 if LOG_PROB else tl.exp(top - row_max) / total
        d += w_y * (unit * length)
    store_row(row, cross_entropy, penalty, stats, loss, d, row_max, total, top, threshold, length, share, flat)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + GRADIENT_ARGUMENTS)
def exact_gradient_kernel(
    logits,  # (outer, inner, classes)
    gradient,  # (outer, inner, classes) out, may be logits
    target,  # (rows,) int64
    weight,  # (classes,) or None
    weight_sum,  # (), or None without weight or label smoothing
    grad_cross_entropy,  # (rows,)
    grad_penalty,  # (rows,)
    stats,  # (rows, STATS) and
    groups,  # (rows, PARTS, CAPACITY) and
    slow,  # (rows,) from forward
    classes,
    first_row,
    inner,
    outer_stride,
    inner_stride,
    gradient_first_row,
    gradient_outer_stride,
    gradient_inner_stride,
    ignore_index,
    EPSILON: tl.constexpr,
    LOG_PROB: tl.constexpr,
    L1: tl.constexpr,
    VEC: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
):
    """The gradient of a row; one program per row, which leaves at once where gradient_kernel has written it."""
    row = tl.program_id(0)
    y = tl.load(target + row)
    offset = row_offset(row, first_row, inner, outer_stride, inner_stride)
    if not ALL:
        # The lists are of no use where the logits lie elsewhere than in forward: a copy of them has taken their place.
        first = grouped(offset, classes, VEC)[0]
        moved = tl.load(groups + row.to(tl.int64) * (PARTS * CAPACITY) + CAPACITY - 1) != first
        if (y == ignore_index) | ((tl.load(slow + row) == 0) & (not moved)):
            return
    logits += offset
    gradient += row_offset(row, gradient_first_row, inner, gradient_outer_stride, gradient_inner_stride)
    known = (y >= 0) & (y < classes)
    stats += row.to(tl.int64) * STATS
    row_max = tl.load(stats)
    w_y = tl.load(weight + y, mask=known, other=0) if weight is not None else 1.0
    scale, member, tied, smoothing, at_target = slopes_of(
        stats,
        tl.where(known, w_y, float("nan")).to(row_max.dtype),
        weight_sum,
        tl.load(grad_cross_entropy + row),
        tl.load(grad_penalty + row),
        tl.exp(tl.load(stats + 2) - row_max),
        classes,
        EPSILON,
        LOG_PROB,
    )
    for start in range(0, classes, BLOCK):
        at, inside, z, _ = block_of(logits, start, y, classes, BLOCK)
        exponential = tl.exp(z - row_max)
        g = penalty_gradient(z, exponential, stats, member, tied, LOG_PROB, L1)
        g = exponential * scale + tl.where(at == y, -at_target, g)
        if EPSILON > 0:
            g -= smoothing * weights_at(weight, at, inside)
        g = tl.where(y == ignore_index, 0, g)
        tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=inside)
