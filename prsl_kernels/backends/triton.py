"""Launches the Triton kernels: which ones a call needs, with which arguments and constants.

Nothing here waits for the GPU or reads from it, so that CUDA graphs can capture a call.

The gradient is recomputed from the logits, not kept by forward. In bytes per logit of two: forward reads 2, backward
reads 2 and writes 2, and that is all, whatever the upstream gradient. A forward that writes the gradient moves 4 (its
second reading comes from the L2 cache at best), and where the upstream gradient is not 1, as in every real training,
backward moves another 4. It would also need memory for the gradient while the logits live.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Whether Triton interprets kernels on the CPU, as for debugging. Asked as Triton does, which is imported when needed.
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def why_missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        from . import triton_exact, triton_kernels  # noqa: F401
    except Exception as error:  # whatever a broken or an old installation raises
        return f"Triton cannot be imported ({error}): pip install 'prsl_kernels[triton]' installs it on Linux"
    return None


# Up to this many classes in K the slots keep enough groups; with more, every row goes the exact way.
LARGEST_K = 128
STATS = 6  # RowStats in csrc/closed_form.h


class Launch(NamedTuple):
    """A kernel with its arguments, ready to be launched or compiled."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants and the number of warps
    slow: bool  # belongs to the exact path, which few rows take


class Choices(NamedTuple):
    """The constants of the kernels."""

    vec: int  # classes per group: 16 bytes
    unroll: int  # groups of a lane in a tile
    lanes: int
    keep: int  # group maxima that each of the unroll * lanes slots keeps
    bits: int  # low bits of a group maximum in float32 that hold the tile's number
    value_bits: int  # low bits of a logit in float32 that are always zero
    capacity: int  # places in a list of groups; two are not for groups that were found
    parts: int  # programs per row
    span: int  # groups per part
    warps: int
    exact: bool  # all rows go the exact way


# By dtype: groups of a lane in a tile, bits, value_bits. A thread has 64 bytes under way at a time.
_BY_DTYPE = {
    torch.bfloat16: (4, 16, 16),
    torch.float16: (4, 13, 13),
    torch.float32: (8, 10, 0),
    torch.float64: (1, 0, 0),
}


class Hardware(NamedTuple):
    """What the choices depend on."""

    processors: int
    warp: int = 32  # threads that go together


# Of GPUs for which code is compiled where there is none.
_HARDWARE = {"sm_80": Hardware(108), "sm_90": Hardware(132), "sm_100": Hardware(148), "gfx942": Hardware(304, 64)}


@functools.lru_cache
def _hardware(device: torch.device, architecture: str | None) -> Hardware:
    if architecture is not None:
        return _HARDWARE[architecture]
    if device.type != "cuda" or interpreted:
        return Hardware(1)
    properties = torch.cuda.get_device_properties(device)
    return Hardware(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def choices(rows: int, classes: int, dtype: torch.dtype, k: int, hardware: Hardware) -> Choices:
    """The constants for logits (rows, classes) and k, or 0 for no selection.

    ``keep``: a row of random logits goes the exact way where one of the slots holds as many of the k + 1 largest groups
    as it keeps. With s slots that is rarer than binomial(k + 1, keep) / s^(keep - 1), which is at most 0.1 % here for
    the 512 slots of half precision; float32 has 1,024. Another one to keep costs a quarter of an instruction per class,
    and 1 % of the rows on the exact path as much as a tenth of the time of all.
    """
    warps = 4
    unroll, bits, value_bits = _BY_DTYPE[dtype]
    lanes = warps * hardware.warp
    unroll = max(1, unroll * 32 // hardware.warp)
    keep = 0 if k == 0 else 3 if k <= 11 else 4 if k <= 42 else 5 if k <= 97 else 6
    capacity = 2 if k == 0 else 64 if k <= 26 else 128 if k <= 75 else 256
    vec = 16 // dtype.itemsize
    tile = unroll * lanes
    tiles = max(1, -(-classes // (vec * tile)))
    # With fewer rows than programs that fit on the GPU at a time, more programs per row; and where the number of a tile
    # would not fit into its bits.
    parts = 1
    while parts * rows < 4 * hardware.processors and 2 * parts <= tiles and 2 * parts * capacity <= 2048:
        parts *= 2
    while -(-tiles // parts) > 1 << bits and 2 * parts * capacity <= 2048:
        parts *= 2
    per_part = -(-tiles // parts)
    exact = dtype == torch.float64 or k > LARGEST_K or per_part > 1 << bits
    return Choices(
        vec=vec,
        unroll=unroll,
        lanes=lanes,
        keep=keep,
        bits=bits,
        value_bits=value_bits,
        capacity=capacity,
        parts=parts,
        span=per_part * tile,
        warps=warps,
        exact=exact,
    )


# ---- rows ------------------------------------------------------------------------------------------------------------


def _row_strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """(inner size, outer stride, inner stride) of the rows of (..., V), or None where two strides do not suffice."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        return None
    (_, outer), (inner, stride) = [(1, 0)] * (2 - len(dims)) + dims
    return inner, outer, stride


def with_rows(logits: Tensor) -> Tensor:
    """The logits (..., V) as they are, or a contiguous copy where the kernels cannot step from row to row."""
    reachable = _row_strides(logits) is not None and _misalignment(logits) <= logits.storage_offset()
    return logits if reachable else logits.clone(memory_format=torch.contiguous_format)


def _from_aligned(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor (...) with rows from the multiple of 16 bytes before it on, and how many elements it is from there.

    Only there does Triton know, on every GPU, which of the classes are at such multiples.
    """
    start = _misalignment(tensor)
    if start == 0:
        return tensor, 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((start + extent,), (1,), tensor.storage_offset() - start), start


def new_gradient(logits: Tensor) -> Tensor:
    """An empty tensor like logits (..., V) whose rows are as far from multiples of 16 bytes as those of logits.

    Few elements lie between its rows, where any do; a slice of longer rows is not copied with its gaps.
    """
    layout = _row_strides(logits)
    if layout is None or logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    inner, outer_stride, inner_stride = layout
    classes, vec = logits.shape[-1], 16 // logits.element_size()
    inner_stride = classes + (inner_stride - classes) % vec
    outer_stride = inner * inner_stride + (outer_stride - inner * inner_stride) % vec
    outer = logits.numel() // (classes * inner)
    start = _misalignment(logits)
    flat = logits.new_empty(start + outer * outer_stride)
    return flat.as_strided((outer, inner, classes), (outer_stride, inner_stride, 1), start).view(logits.shape)


def _misalignment(tensor: Tensor) -> int:
    """In elements from a multiple of 16 bytes."""
    where: Any = tensor.storage_offset()  # a compiler makes sure that storages begin at multiples of 16
    if not isinstance(tensor, torch._subclasses.FakeTensor):
        where = tensor.data_ptr() // tensor.element_size()
    return where % (16 // tensor.element_size())


class _Rows(NamedTuple):
    """What all the kernels take of the logits and the options."""

    choices: Choices
    number: int
    base: Tensor  # what the kernels get as logits
    layout: tuple[int, int, int, int, int]  # classes, first row, inner, outer stride, inner stride
    weight_sum: Tensor | None  # where it is not the number of classes, and is needed


def _rows(logits: Tensor, weight: Tensor | None, k: int, label_smoothing: float, architecture: str | None) -> _Rows:
    classes = logits.shape[-1]
    count = logits.numel() // classes
    strides = _row_strides(logits)
    assert strides is not None
    base, first_row = _from_aligned(logits)
    return _Rows(
        choices(count, classes, logits.dtype, k, _hardware(logits.device, architecture)),
        count,
        base,
        (classes, first_row, *strides),
        weight.sum() if weight is not None and label_smoothing > 0 else None,
    )


# ---- launches --------------------------------------------------------------------------------------------------------


def new_terms(logits: Tensor, k: int, architecture: str | None = None) -> tuple[Tensor, ...]:
    """Empty tensors for what forward returns: two terms (...), statistics (..., 6), lists of groups, marks of rows."""
    rows, dtype = logits.shape[:-1], torch.promote_types(logits.dtype, torch.float32)
    count = math.prod(rows)  # not numel(), which would fix it in a compiler
    c = choices(count, logits.shape[-1], logits.dtype, k, _hardware(logits.device, architecture))
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((*rows, STATS), dtype=dtype),
        logits.new_empty((0 if c.exact else count, c.parts, c.capacity), dtype=torch.int32),
        logits.new_empty((count,), dtype=torch.int8),
    )


def forward_launches(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    k: int,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    *,
    architecture: str | None = None,
) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """What forward returns, still empty (see :func:`new_terms`), and the launches that fill it.

    ``logits`` (..., V) have rows that :func:`with_rows` accepts, at least one of them; ``target`` (...) int64 and
    ``weight`` (V,) or None are contiguous. ``architecture`` ("sm_90", "gfx942") is that of another machine.
    """
    from . import triton_exact, triton_kernels

    c, count, base, layout, weight_sum = _rows(logits, weight, k, label_smoothing, architecture)
    outputs = cross_entropy, penalty, stats, groups, slow = new_terms(logits, k, architecture)
    terms = (cross_entropy, penalty, stats, slow)
    smoothing = {"EPSILON": label_smoothing}
    what = {**smoothing, "SELECT": k > 0, "LOG_PROB": space == "log_prob", "L1": distance == "l1"}
    exact = Launch(
        triton_exact.exact_kernel,
        (count,),
        (base, target, weight, weight_sum, *terms, *layout, ignore_index, k),
        {**what, "BITS": c.value_bits, "BLOCK": 2048, "ALL": c.exact, "num_warps": 8},
        True,
    )
    if c.exact:
        return outputs, [exact]
    parts = logits.new_empty((count, c.parts, 5), dtype=torch.float32)
    scan = Launch(
        triton_kernels.scan_kernel,
        (count, c.parts),
        (base, target, weight, parts, groups, *layout, ignore_index, k, c.span),
        {
            **smoothing,
            "SELECT": k > 0,
            "VEC": c.vec,
            "UNROLL": c.unroll,
            "LANES": c.lanes,
            "KEEP": c.keep,
            "BITS": c.bits,
            "CAPACITY": c.capacity,
            "PARTS": c.parts,
            "num_warps": c.warps,
        },
        False,
    )
    loss = Launch(
        triton_kernels.loss_kernel,
        (count,),
        (base, target, weight, weight_sum, parts, groups, *terms, *layout, ignore_index, k),
        {
            **what,
            "VEC": c.vec,
            "BITS": c.bits,
            "VALUE_BITS": c.value_bits,
            "CAPACITY": c.capacity,
            "PARTS": c.parts,
            "num_warps": min(16, max(1, c.parts * c.capacity * c.vec // 512)),
        },
        False,
    )
    return outputs, [scan, loss, exact]


def gradient_launches(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    groups: Tensor,
    slow: Tensor,
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
    k: int,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    *,
    architecture: str | None = None,
) -> list[Launch]:
    """The launches that fill ``gradient``, which may be ``logits`` itself or comes from :func:`new_gradient`."""
    from . import triton_exact, triton_kernels

    c, count, base, layout, weight_sum = _rows(logits, weight, k, label_smoothing, architecture)
    classes, _, inner = layout[:3]
    gradient_base, gradient_first_row = _from_aligned(gradient)
    # The same rows in the same steps, if these are of other lengths.
    gradient_layout = (gradient_first_row, *gradient.view(-1, inner, classes).stride()[:2])
    grads = (grad_cross_entropy, grad_penalty)
    what = {"EPSILON": label_smoothing, "LOG_PROB": space == "log_prob", "L1": distance == "l1"}
    inputs = (base, gradient_base, target, weight, weight_sum, *grads, stats)
    exact = Launch(
        triton_exact.exact_gradient_kernel,
        (count,),
        (*inputs, groups, slow, *layout, *gradient_layout, ignore_index),
        {
            **what,
            "VEC": c.vec,
            "CAPACITY": c.capacity,
            "PARTS": c.parts,
            "BLOCK": 2048,
            "ALL": c.exact,
            "num_warps": 8,
        },
        True,
    )
    if c.exact:
        return [exact]
    sweep = Launch(
        triton_kernels.gradient_kernel,
        (count, c.parts),
        (*inputs, groups, slow, *layout, *gradient_layout, ignore_index, c.span),
        {
            **what,
            "VEC": c.vec,
            "UNROLL": c.unroll,
            "LANES": c.lanes,
            "CAPACITY": c.capacity,
            "PARTS": c.parts,
            "num_warps": c.warps,
        },
        False,
    )
    return [sweep, exact]


def launch(launches: list[Launch]) -> None:
    """Launch them in order, on the device of their tensors: Triton takes the current one."""
    several = torch.cuda.device_count() > 1
    with torch.cuda.device_of(launches[0].arguments[0]) if several else contextlib.nullcontext():
        for one in launches:
            one.kernel[one.grid](*one.arguments, **one.options)


def token_terms(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """What :func:`new_terms` says, for logits (..., V), target (...) int64, and weight (V,) or None."""
    if logits.numel() == 0:
        return new_terms(logits, options[0])
    outputs, launches = forward_launches(
        with_rows(logits), target.contiguous(), None if weight is None else weight.contiguous(), *options
    )
    launch(launches)
    return outputs


def _write_gradient(logits: Tensor, gradient: Tensor, *rest: Any) -> None:
    if logits.numel() > 0 and interpreted and gradient.dtype == torch.bfloat16:
        wide = torch.empty_like(
            gradient, dtype=torch.float32
        )  # the interpreter does not round to bfloat16, but cuts off
        _write_gradient(logits, wide, *rest)
        gradient.copy_(wide)
    elif logits.numel() > 0:
        contiguous: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in rest]
        launch(gradient_launches(logits, gradient, *contiguous))


def token_gradient(logits: Tensor, *rest: Any) -> Tensor:
    """The gradient (..., V) of logits, where ``rest`` is as in :func:`gradient_launches`."""
    logits = with_rows(logits)
    gradient = new_gradient(logits)
    _write_gradient(logits, gradient, *rest)
    return gradient


def token_gradient_(logits: Tensor, *rest: Any) -> None:
    """As :func:`token_gradient`, in place of the logits."""
    rows = with_rows(logits)
    _write_gradient(rows, rows, *rest)
    if rows is not logits:
        logits.copy_(rows)
