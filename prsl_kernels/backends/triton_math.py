"""What the Triton kernels of the fast path and of the exact path share: the mathematics of csrc/closed_form.h.

The statistics of a row are RowStats there: max, sum, top, threshold, length, share.
"""

# mypy: ignore-errors
# The types in kernels are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

# Arguments that differ from call to call: no kernels of their own for multiples of 16 and for 1.
ROW_ARGUMENTS = ("classes", "inner", "outer_stride", "inner_stride", "first_row", "ignore_index", "k", "span")
GRADIENT_ARGUMENTS = ("gradient_first_row", "gradient_outer_stride", "gradient_inner_stride")
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)
STATS = tl.constexpr(6)


@triton.jit
def row_offset(row, first_row, inner, outer_stride, inner_stride):
    """Of logits (outer, inner, V), in elements; 64 bits, since N * V may exceed 2^31."""
    row = row.to(tl.int64)
    return first_row + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def grouped(offset, classes, VEC: tl.constexpr):
    """The first class at a multiple of 16 bytes, and the number of whole groups from there."""
    first = ((VEC - offset % VEC) % VEC).to(tl.int32)
    return first, tl.maximum(classes - first, 0) // VEC


# ---- order -----------------------------------------------------------------------------------------------------------


@triton.jit
def bucket_of(value, BITS: tl.constexpr):
    """Integers in the order of the floating-point numbers; one for all that differ in their lowest BITS bits alone."""
    if value.dtype.is_fp64():
        bits = value.to(tl.int64, bitcast=True)
        return (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)) >> BITS
    else:
        bits = value.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> BITS


@triton.jit
def smallest_of(bucket, BITS: tl.constexpr):
    """The smallest number of a bucket, with which the others can be found by comparing."""
    bits = bucket << BITS
    if bits.dtype.is_int64():
        return (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high):
    """The middle of two integers, rounded down; their sum might overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def count_from(values, bound):
    """How many of the values, in a tuple of tensors of one shape, are at least bound."""
    counts = (values[0] >= bound).to(tl.int32)
    for i in tl.static_range(1, len(values)):
        counts += (values[i] >= bound).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def find_cut(values, least, most, probe, top, BITS: tl.constexpr):
    """A number with ``least`` to ``most`` values at or above it, and how many there are.

    By bisection between ``probe``, a first guess, and ``top``, the largest value. Where ties leave no such number, it
    is the largest one with more than ``most``; with fewer than ``least`` finite values, one with too few.
    """
    low = bucket_of(tl.full((), float("-inf"), tl.float32), BITS)
    high = bucket_of(top, BITS) + 1
    middle = tl.minimum(tl.maximum(bucket_of(probe, BITS), low + 1), high - 1)
    count = count_from(values, smallest_of(middle, BITS))
    while ((count < least) | (count > most)) & (middle > low):
        if count < least:
            high = middle
        else:
            low = middle
        middle = between(low, high)  # low itself where nothing is left
        count = count_from(values, smallest_of(middle, BITS))
    return smallest_of(middle, BITS), count


# ---- the loss --------------------------------------------------------------------------------------------------------


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, to the last digits where x is small: there by its series."""
    TERMS: tl.constexpr = 14 if x.dtype.is_fp64() else 8  # x^TERMS / (TERMS + 1)! is next
    series = 1 - x * (1 / TERMS)
    for i in tl.static_range(1, TERMS - 1):
        series = 1 - x * (1 / (TERMS - i)) * series
    return tl.where(x < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def deviation(z, top, threshold, LOG_PROB: tl.constexpr):
    """What p - m is in units of p_top, or log p - log m, for z above the threshold."""
    if LOG_PROB:
        return z - threshold
    else:
        return tl.exp(z - top) * one_minus_exp(z - threshold)


@triton.jit
def finish_distance(units, squares, above, tied, scale, L1: tl.constexpr):
    """Length and share of RowStats, from sums over K in units of the largest deviation: small squares underflow."""
    norm = units if L1 else tl.sqrt(squares)
    slopes = above if L1 else units / norm
    largest: tl.constexpr = LARGEST_DOUBLE if scale.dtype.is_fp64() else LARGEST
    return tl.minimum(scale * norm, largest), -slopes / tl.maximum(tied, 1)


@triton.jit
def is_flat(scale, threshold, LOG_PROB: tl.constexpr):
    """Whether the distance has no derivative, by its largest deviation, and in "log_prob" for want of k classes."""
    flat = (scale > 0) == 0  # not scale <= 0: it is NaN where all of K is -inf
    if LOG_PROB:
        flat |= threshold == float("-inf")
    return flat


@triton.jit
def weights_at(weight, at, inside):
    """The weights of classes ``at``, 0 outside."""
    if weight is not None:
        return tl.load(weight + at, mask=inside, other=0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def cross_entropy_of(nll, log_total, smoothed, w_y, weight_sum, classes, EPSILON: tl.constexpr):
    """Weighted and smoothed: from -log p_y, the log of the sum of exponentials, and the sum of weight * (z - max)."""
    loss = w_y * nll
    if EPSILON > 0:
        weights = tl.load(weight_sum) if weight_sum is not None else classes
        loss = (1 - EPSILON) * loss + EPSILON * ((weights * log_total - smoothed) / classes)
    return loss


@triton.jit
def store_row(row, cross_entropy, penalty, stats, loss, d, row_max, total, top, threshold, length, share, flat):
    """The outputs of a row: two terms and RowStats."""
    tl.store(cross_entropy + row, loss)
    tl.store(penalty + row, d)
    stats += row.to(tl.int64) * STATS
    tl.store(stats, row_max)
    tl.store(stats + 1, total)
    tl.store(stats + 2, top)
    tl.store(stats + 3, tl.where(flat, float("inf"), threshold))
    tl.store(stats + 4, length)
    tl.store(stats + 5, share)


# ---- its gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def slopes_of(stats, w_y, weight_sum, grad_c, grad_d, unit, classes, EPSILON: tl.constexpr, LOG_PROB: tl.constexpr):
    """The factors of the gradient's parts: of exp(z - max), of a_i and of 1 at ties, of weights, and at the target.

    ``unit`` is p_top * sum. Those of a_i and ties are for exp(z - max) times them in "prob".
    """
    total = tl.load(stats + 1)
    length = tl.load(stats + 4)
    q_y = (1 - EPSILON) * w_y
    scale = grad_c * q_y
    smoothing = grad_c * 0
    if EPSILON > 0:
        smoothing = grad_c * EPSILON / classes
        scale += smoothing * (tl.load(weight_sum) if weight_sum is not None else classes)
    grad_d = tl.where(length != 0, w_y * grad_d, 0)  # else there is no penalty, and 0 * inf would make NaN of it
    if not LOG_PROB:
        grad_d /= total
        scale -= grad_d * unit * length
    return scale / total, grad_d, grad_d * tl.load(stats + 5), smoothing, grad_c * q_y


@triton.jit
def penalty_gradient(z, exponential, stats, member, tied, LOG_PROB: tl.constexpr, L1: tl.constexpr):
    """What the penalty adds to the gradient: at and above the threshold, 0 below it."""
    threshold = tl.load(stats + 3)
    length = tl.load(stats + 4)
    slope = member
    if not L1:
        slope = member * (deviation(z, tl.load(stats + 2), threshold, LOG_PROB) / length)
    gradient = tl.where(z > threshold, slope, tl.where(z == threshold, tied, 0))
    return gradient if LOG_PROB else gradient * exponential
