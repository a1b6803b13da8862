"""The Triton kernels: the loss of a row, and its gradient, in streaming passes over the classes.

**One sweep forward** (:func:`scan_kernel`) keeps three things per slot, all in registers and without a word to the
other slots: the maximum, the sum of exponentials, and for the selection the KEEP largest *group maxima*. A group is
VEC neighbouring classes, 16 bytes, what one thread loads at once; the groups of a row go round over UNROLL * LANES
slots. A maximum per group is needed anyway, so the selection costs 2 KEEP - 1 comparisons per group, none per class.
The group's number rides in the low bits of its maximum: half precision leaves them free, and in float32 the maximum is
rounded down to make room (the classes themselves are read again later). At the end of the row a cut is looked for above
which lie at least k + 1 groups, but no more than a list of CAPACITY holds. The k largest classes without the target's
are in these groups, unless a slot has had to drop one.

**Then** (:func:`loss_kernel`) the listed groups are read again, the k-th largest class is found among them, and the
distance. The row is right if what any slot may have dropped is below the k-th largest class; else it is marked, and
``exact_kernel``, which is always launched, does it over, in passes over the row. Nothing waits for the host.

**One sweep backward** (:func:`gradient_kernel`) writes the softmax's part and nothing else. The target and the members
of K, which are in the list, are computed before it and written after it. Marked rows are left to
``exact_gradient_kernel``.

A row rarely starts at a multiple of 16 bytes (GPT-2 has 50,257 classes). Groups begin at the first class that does, so
that the sweeps have aligned accesses and no masks; the ragged groups at both ends are read and written with the listed
ones.
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
    bucket_of,
    count_from,
    cross_entropy_of,
    deviation,
    find_cut,
    finish_distance,
    grouped,
    is_flat,
    penalty_gradient,
    row_offset,
    slopes_of,
    store_row,
    weights_at,
)

LOG2E = tl.constexpr(1.4426950408889634)
# -2^123, and the next number above it. The fast path takes a smaller maximum of a group for this one, -inf too: it is
# finite, and has room in its last digits. A row with fewer than k classes above LOWEST goes the exact way.
LOWEST = tl.constexpr(-1.0633823966279327e37)
ABOVE_LOWEST = tl.constexpr(-1.0633823332454027e37)
PART = tl.constexpr(5)
NO_GROUP = tl.constexpr(-2)  # in the list: its classes are before the first one

# ---- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def slots(UNROLL: tl.constexpr, LANES: tl.constexpr):
    """The number of each slot (UNROLL, LANES); neighbouring lanes read neighbouring groups."""
    return tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def inside_row(number, VEC: tl.constexpr):
    """The classes (..., VEC) of numbered groups (...), counted from group 0."""
    return number[:, :, None] * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def target_logit(logits, y, classes):
    """z_y, or NaN where the target is outside of the row; nothing is read there."""
    return tl.load(logits + y, mask=(y >= 0) & (y < classes), other=float("nan")).to(tl.float32)


@triton.jit
def exponential_of(x):
    """exp(x) in three instructions: tl.exp takes six, for results below 1e-38, which are 0 here."""
    return tl.exp2(x * LOG2E)


@triton.jit
def listed_classes(groups, first, whole, VEC: tl.constexpr, CAPACITY: tl.constexpr, SLOTS: tl.constexpr):
    """The classes (SLOTS, VEC) of the listed groups, some of them none of the row's; and which are its ragged ends.

    ``groups`` are lists of CAPACITY, one after the other. The last two places of the first one stand for the classes
    before group 0 and behind the last whole group.
    """
    place = tl.arange(0, SLOTS)
    number = tl.load(groups + place, mask=place % CAPACITY < CAPACITY - 2, other=NO_GROUP)
    number = tl.where(place == CAPACITY - 2, -1, tl.where(place == CAPACITY - 1, whole, number))
    ragged = (place == CAPACITY - 2) | (place == CAPACITY - 1)
    return (first + number * VEC)[:, None] + tl.arange(0, VEC)[None, :], ragged[:, None]


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def insert(best, value):
    """Keep the largest values of each slot, in a tuple in descending order."""
    kept = ()
    for i in tl.static_range(len(best)):
        kept = kept + (tl.maximum(best[i], value),)
        value = tl.minimum(best[i], value)
    return kept


@triton.jit
def scan_tile(z, tile, best, lane_max, total, SELECT: tl.constexpr, BITS: tl.constexpr):
    """Take up a tile of logits (UNROLL, LANES, VEC): the best groups, and the online softmax of every lane."""
    group_max = tl.max(z, 2)
    if SELECT:
        kept = tl.maximum(group_max, LOWEST) + 0.0  # not -0, whose bits are no larger than those of 0
        bits = (kept.to(tl.int32, bitcast=True) & (-1 << BITS)) | tile
        best = insert(best, bits.to(tl.float32, bitcast=True))
    before = lane_max
    lane_max = tl.maximum(lane_max, tl.max(group_max, 0))
    exponentials = exponential_of(z - lane_max[None, :, None])
    total = total * exponential_of(before - lane_max) + tl.sum(tl.sum(exponentials, 2), 0)
    return best, lane_max, total


@triton.jit
def smooth_tile(z, weight, at, inside, before, lane_max, smoothed, seen):
    """The sum of weight * (z - lane_max) of every lane, and that of the weights, for label smoothing."""
    weights = weights_at(weight, at, inside)
    difference = tl.where(inside, weights * (z - lane_max[None, :, None]), 0)
    smoothed += seen * (before - lane_max) + tl.sum(tl.sum(difference, 2), 0)
    return smoothed, seen + tl.sum(tl.sum(weights, 2), 0)


@triton.jit
def list_groups(groups, best, begin, least, row_max, BITS: tl.constexpr, CAPACITY: tl.constexpr):
    """List the groups that may hold members of K; return the largest group maximum that may be missing.

    The numbers of at least ``least`` of the groups that the slots have kept, if there are as many, go to ``groups``
    (CAPACITY,), whose last two places are not touched.
    """
    UNROLL: tl.constexpr = best[0].shape[0]
    LANES: tl.constexpr = best[0].shape[1]
    LIMIT: tl.constexpr = CAPACITY - 2
    cut = tl.full((), ABOVE_LOWEST, tl.float32)
    count = count_from(best, cut)
    if count > LIMIT:
        cut, count = find_cut(best, least, LIMIT, tl.min(best[0]), row_max, BITS)

    per_slot = tl.zeros((UNROLL, LANES), tl.int32)
    for i in tl.static_range(len(best)):
        per_slot += (best[i] >= cut).to(tl.int32)
    per_lane = tl.sum(per_slot, 0)
    place = (tl.cumsum(per_lane, 0) - per_lane)[None, :] + (tl.cumsum(per_slot, 0) - per_slot)
    for i in tl.static_range(len(best)):
        tile = best[i].to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
        number = begin + tile * (UNROLL * LANES) + slots(UNROLL, LANES)
        tl.store(groups + place + i, number, mask=(best[i] >= cut) & (place + i < LIMIT))
    places = tl.arange(0, CAPACITY)
    tl.store(groups + places, tl.full((CAPACITY,), NO_GROUP, tl.int32), mask=(places >= count) & (places < LIMIT))
    dropped = tl.max(best[len(best) - 1])
    return tl.where(count > LIMIT, float("inf"), dropped)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def scan_kernel(
    logits,  # (outer, inner, classes), from first_row on; itself at a multiple of 16 bytes
    target,  # (rows,) int64
    weight,  # (classes,) or None
    parts,  # (rows, PARTS, PART) out: maximum, sum of exponentials, largest group that was dropped, and with label
    # smoothing the sums of weight * (z - maximum) and of the weights
    groups,  # (rows, PARTS, CAPACITY) int32 out: the groups that may hold members of K, and in the last place first
    classes,
    first_row,
    inner,
    outer_stride,
    inner_stride,
    ignore_index,
    k,
    span,  # groups per part, a multiple of a tile's
    EPSILON: tl.constexpr,  # label smoothing
    SELECT: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A part of a row in one sweep; the grid is (rows, PARTS)."""
    TILE: tl.constexpr = UNROLL * LANES
    row = tl.program_id(0)
    part = tl.program_id(1)
    y = tl.load(target + row)
    groups += (row.to(tl.int64) * PARTS + part) * CAPACITY
    if y == ignore_index:
        tl.store(groups + tl.arange(0, CAPACITY), tl.full((CAPACITY,), NO_GROUP, tl.int32))
        return
    offset = row_offset(row, first_row, inner, outer_stride, inner_stride)
    first, whole = grouped(offset, classes, VEC)
    begin = tl.minimum(part * span, whole)
    end = tl.minimum(begin + span, whole)
    start = logits + tl.multiple_of(offset + first + begin.to(tl.int64) * VEC, VEC)
    number = slots(UNROLL, LANES)
    at = inside_row(number, VEC)

    best = ()
    for _ in tl.static_range(KEEP):
        best = best + (tl.full((UNROLL, LANES), LOWEST, tl.float32),)
    lane_max = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    smoothed = tl.zeros((LANES,), tl.float32)
    seen = tl.zeros((LANES,), tl.float32)
    tiles = (end - begin) // TILE
    for tile in range(tiles):
        z = tl.load(start + tile * (TILE * VEC) + at).to(tl.float32)
        before = lane_max
        best, lane_max, total = scan_tile(z, tile, best, lane_max, total, SELECT, BITS)
        if EPSILON > 0:
            weight_at = first + (begin + tile * TILE) * VEC + at
            smoothed, seen = smooth_tile(z, weight, weight_at, at >= 0, before, lane_max, smoothed, seen)
    # The rest, with a mask that is one for all the classes of a group.
    left = end - begin - tiles * TILE
    inside = tl.broadcast_to((number < left)[:, :, None], (UNROLL, LANES, VEC))
    z = tl.load(start + tiles * (TILE * VEC) + at, mask=inside, other=float("-inf")).to(tl.float32)
    before = lane_max
    best, lane_max, total = scan_tile(z, tiles, best, lane_max, total, SELECT, BITS)
    if EPSILON > 0:
        weight_at = first + (begin + tiles * TILE) * VEC + at
        smoothed, seen = smooth_tile(z, weight, weight_at, inside, before, lane_max, smoothed, seen)

    parts += (row.to(tl.int64) * PARTS + part) * PART
    row_max = tl.max(lane_max, 0)
    tl.store(parts, row_max)
    tl.store(parts + 1, tl.sum(total * exponential_of(lane_max - row_max), 0))
    if SELECT:
        tl.store(parts + 2, list_groups(groups, best, begin, k + 1, row_max, BITS, CAPACITY))
    if EPSILON > 0:
        tl.store(parts + 3, tl.sum(smoothed + seen * (lane_max - row_max), 0))
        tl.store(parts + 4, tl.sum(seen, 0))
    tl.store(groups + CAPACITY - 2, NO_GROUP)
    tl.store(groups + CAPACITY - 1, first)


@triton.jit
def distance_of(x, k, probe, LOG_PROB: tl.constexpr, L1: tl.constexpr, BITS: tl.constexpr):
    """Top, threshold, length and share of RowStats, from all logits (SLOTS, VEC) that may be in K, and -inf besides."""
    top = tl.max(x)
    cut, count = find_cut((x,), k, k, probe, top, BITS)
    smallest = tl.min(tl.where(x >= cut, x, float("inf")))
    threshold = tl.where(count >= k, smallest, float("-inf"))
    scale = deviation(top, top, threshold, LOG_PROB)
    flat = is_flat(scale, threshold, LOG_PROB)
    above = x > threshold
    unit = tl.where(above & (not flat), deviation(x, top, threshold, LOG_PROB) / tl.where(flat, 1, scale), 0)
    length, share = finish_distance(
        tl.sum(unit),
        tl.sum(unit * unit),
        tl.sum(above.to(tl.float32)),
        tl.sum((x == threshold).to(tl.float32)),
        scale,
        L1,
    )
    return top, threshold, tl.where(flat, 0, length), tl.where(flat, 0, share), flat


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def loss_kernel(
    logits,  # (outer, inner, classes), from first_row on; itself at a multiple of 16 bytes
    target,  # (rows,) int64
    weight,  # (classes,) or None
    weight_sum,  # (), or None without weight or label smoothing
    parts,  # (rows, PARTS, PART) and
    groups,  # (rows, PARTS, CAPACITY) of scan_kernel
    cross_entropy,  # (rows,) out
    penalty,  # (rows,) out
    stats,  # (rows, STATS) out: RowStats
    slow,  # (rows,) int8 out: whether the row has to be done over
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
    VEC: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of a row together; one program per row."""
    SLOTS: tl.constexpr = PARTS * CAPACITY
    row = tl.program_id(0)
    y = tl.load(target + row)
    if y == ignore_index:
        tl.store(slow + row, 0)
        store_row(row, cross_entropy, penalty, stats, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False)
        return
    offset = row_offset(row, first_row, inner, outer_stride, inner_stride)
    first, whole = grouped(offset, classes, VEC)
    logits += offset
    at, ragged = listed_classes(groups + row.to(tl.int64) * SLOTS, first, whole, VEC, CAPACITY, SLOTS)
    inside = (at >= 0) & (at < classes)
    ragged &= inside
    z = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    z_y = target_logit(logits, y, classes)
    known = (y >= 0) & (y < classes)

    parts += (row.to(tl.int64) * PARTS + tl.arange(0, PARTS)) * PART
    maxima = tl.load(parts)
    row_max = tl.maximum(tl.max(maxima, 0), tl.max(tl.where(ragged, z, float("-inf"))))
    total = tl.sum(tl.load(parts + 1) * exponential_of(maxima - row_max), 0)
    total += tl.sum(tl.where(ragged, exponential_of(z - row_max), 0))
    log_total = tl.log(total)
    w_y = tl.load(weight + y, mask=known, other=0) if weight is not None else 1.0
    smoothed = 0.0
    if EPSILON > 0:
        smoothed = tl.sum(tl.load(parts + 3) + tl.load(parts + 4) * (maxima - row_max), 0)
        smoothed += tl.sum(tl.where(ragged, weights_at(weight, at, ragged) * (z - row_max), 0))
    loss = cross_entropy_of(log_total - (z_y - row_max), log_total, smoothed, w_y, weight_sum, classes, EPSILON)

    redo = row_max <= LOWEST
    d = tl.where(total == total, 0.0, total)
    top, threshold, length, share, flat = row_max, 0.0, 0.0, 0.0, True
    if SELECT:
        x = tl.where(inside & (at != y), z, float("-inf"))
        group_maxima = tl.max(tl.where(ragged, float("-inf"), x), 1)
        probe = tl.min(tl.where(group_maxima > float("-inf"), group_maxima, float("inf")), 0)
        top, threshold, length, share, flat = distance_of(x, k, probe, LOG_PROB, L1, VALUE_BITS)
        unit = 1.0 if LOG_PROB else exponential_of(top - row_max) / total
        d += w_y * (unit * length)
        dropped = tl.max(tl.load(parts + 2), 0)
        redo |= bucket_of(dropped, BITS) >= bucket_of(threshold + 0.0, BITS)
    tl.store(slow + row, redo)
    d = tl.where(known, d, float("nan"))
    store_row(row, cross_entropy, penalty, stats, loss, d, row_max, total, top, threshold, length, share, flat)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=ROW_ARGUMENTS + GRADIENT_ARGUMENTS)
def gradient_kernel(
    logits,  # (outer, inner, classes), from first_row on; itself at a multiple of 16 bytes
    gradient,  # (outer, inner, classes) out, its rows as far from multiples of 16 bytes; may be logits
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
    span,
    EPSILON: tl.constexpr,
    LOG_PROB: tl.constexpr,
    L1: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A part of a row in one sweep; the grid is (rows, PARTS)."""
    TILE: tl.constexpr = UNROLL * LANES
    row = tl.program_id(0)
    part = tl.program_id(1)
    y = tl.load(target + row)
    ignored = y == ignore_index
    offset = row_offset(row, first_row, inner, outer_stride, inner_stride)
    first, whole = grouped(offset, classes, VEC)
    groups += (row.to(tl.int64) * PARTS + part) * CAPACITY
    if ((tl.load(slow + row) != 0) | (tl.load(groups + CAPACITY - 1) != first)) & (not ignored):
        return
    gradient_offset = row_offset(row, gradient_first_row, inner, gradient_outer_stride, gradient_inner_stride)
    begin = tl.minimum(part * span, whole)
    end = tl.minimum(begin + span, whole)
    number = slots(UNROLL, LANES)
    at = inside_row(number, VEC)
    source = logits + tl.multiple_of(offset + first + begin.to(tl.int64) * VEC, VEC)
    sink = gradient + tl.multiple_of(gradient_offset + first + begin.to(tl.int64) * VEC, VEC)
    logits += offset
    gradient += gradient_offset
    tiles = (end - begin) // TILE
    left = end - begin - tiles * TILE
    rest = tl.broadcast_to((number < left)[:, :, None], (UNROLL, LANES, VEC))
    if ignored:
        # Zeros even where logits are NaN.
        zeros = tl.zeros((UNROLL, LANES, VEC), gradient.dtype.element_ty)
        ends = tl.arange(0, 2 * VEC)
        ends = tl.where(ends < VEC, ends - VEC, ends - VEC + whole * VEC) + first
        outside = (part == 0) & (ends >= 0) & (ends < classes)
        tl.store(gradient + ends, tl.zeros((2 * VEC,), gradient.dtype.element_ty), mask=outside)
        for tile in range(tiles):
            tl.store(sink + tile * (TILE * VEC) + at, zeros)
        tl.store(sink + tiles * (TILE * VEC) + at, zeros, mask=rest)
        return

    known = (y >= 0) & (y < classes)
    y_group = (y - first + VEC) // VEC - 1  # rounded down; -1 is before the first group
    mine = known & (((y_group >= begin) & (y_group < end)) | ((part == 0) & ((y_group < 0) | (y_group >= whole))))
    stats += row.to(tl.int64) * STATS
    row_max = tl.load(stats)
    w_y = tl.load(weight + y, mask=known, other=0) if weight is not None else 1.0
    scale, member, tied, smoothing, at_target = slopes_of(
        stats,
        tl.where(known, w_y, float("nan")),
        weight_sum,
        tl.load(grad_cross_entropy + row),
        tl.load(grad_penalty + row),
        exponential_of(tl.load(stats + 2) - row_max),
        classes,
        EPSILON,
        LOG_PROB,
    )

    # The classes of K, the ragged ends and the target, before the sweep, which may take the place of their logits.
    listed, ragged = listed_classes(groups, first, whole, VEC, CAPACITY, CAPACITY)
    inside = (listed >= 0) & (listed < classes) & ((part == 0) | (ragged == 0))
    z = tl.load(logits + listed, mask=inside, other=float("-inf")).to(tl.float32)
    z_y = tl.load(logits + y, mask=mine, other=0).to(tl.float32)
    exponential = exponential_of(z - row_max)
    listed_gradient = exponential * scale + penalty_gradient(z, exponential, stats, member, tied, LOG_PROB, L1)
    y_gradient = exponential_of(z_y - row_max) * scale - at_target
    if EPSILON > 0:
        listed_gradient -= smoothing * weights_at(weight, listed, inside)
        y_gradient -= smoothing * weights_at(weight, y, mine)
    tl.debug_barrier()

    for tile in range(tiles):
        z_tile = tl.load(source + tile * (TILE * VEC) + at).to(tl.float32)
        g = exponential_of(z_tile - row_max) * scale
        if EPSILON > 0:
            g -= smoothing * weights_at(weight, first + (begin + tile * TILE) * VEC + at, at >= 0)
        tl.store(sink + tile * (TILE * VEC) + at, g.to(gradient.dtype.element_ty))
    z_tile = tl.load(source + tiles * (TILE * VEC) + at, mask=rest, other=0).to(tl.float32)
    g = exponential_of(z_tile - row_max) * scale
    if EPSILON > 0:
        g -= smoothing * weights_at(weight, first + (begin + tiles * TILE) * VEC + at, rest)
    tl.store(sink + tiles * (TILE * VEC) + at, g.to(gradient.dtype.element_ty), mask=rest)

    tl.debug_barrier()
    written = inside & (listed != y) & ((z >= tl.load(stats + 3)) | ragged)
    tl.store(gradient + listed, listed_gradient.to(gradient.dtype.element_ty), mask=written)
    tl.store(gradient + y, y_gradient.to(gradient.dtype.element_ty), mask=mine)
