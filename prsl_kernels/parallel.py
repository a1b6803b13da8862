"""The loss of a vocabulary that is split over the ranks of a process group (tensor parallel).

Between the stats of the classes that a rank holds and their merging (row_stats.py), each rank sends its own to all the
others: k + 4 numbers a row, and never the logits. What they merge is the same on every rank, and merged by the same
operations in the order of the ranks, so that all of them hold the same bits of the loss. Backward sends nothing.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from . import eager, ops
from .eager import Distance, Space
from .functional import (
    CHECK_TARGETS,
    DTYPES,
    LossTerms,
    Reduction,
    check_input,
    check_options,
    check_target,
    check_weight,
    token_weights,
    total_of,
)
from .row_stats import COLUMNS, RowStats, in_order, merge, row_gradient, row_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


# ---- the ranks -------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Which rank of a group holds which classes.

    Where the host may look, it has checked all this; elsewhere ``classes`` and ``start`` may be tensors () on the
    device, and ``sound`` says there whether the ranks fit together.
    """

    group: ProcessGroup
    starts: Tensor  # (ranks,) int64: the first class of each rank, and
    sizes: Tensor  # how many it has
    start: int | Tensor  # of this rank
    classes: int | Tensor  # of all ranks
    sound: Tensor | None


class Options(NamedTuple):
    """The options of a loss, in the order in which operators take them."""

    k: int
    space: Space
    distance: Distance
    ignore_index: int
    label_smoothing: float


def gather(stats: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape and dtype, as (ranks, ...)."""
    from torch import distributed

    # The newer name of the same function; the older one warns where there are both.
    collective = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gathered = stats.new_empty(group.size() * stats.numel())
    if stats.numel() > 0:
        collective(gathered, stats.flatten(), group=group)
    return gathered.view(group.size(), *stats.shape)


# What each rank tells the others of itself, in int64. All but the place of its shard must be the same.
HEADER = ("start", "size", "refused", "number of tokens", "dtype of local_logits", "options", "target")


def header_of(logits: Tensor, target: Tensor, weight: Tensor | None, vocab_start: int | None, *options: Any) -> Tensor:
    """The header (7,) of a rank with logits (V,) or (N, V, ...), on their device."""
    given = (vocab_start is None, target.shape, target.dtype, None if weight is None else weight.shape, options)
    class_dim = min(1, logits.dim() - 1)
    numbers = [
        -1 if vocab_start is None else int(vocab_start),
        logits.shape[class_dim],
        0,
        math.prod(logits.shape[:class_dim] + logits.shape[class_dim + 1 :]),
        DTYPES.index(logits.dtype),
        zlib.crc32(repr(given).encode()),
    ]
    # A sum that changes with the order: ranks that read different data are a common mistake.
    odd = 2 * torch.arange(target.numel(), device=target.device) + 1
    return torch.cat((to_device(numbers, logits.device), (target.flatten().long() * odd).sum()[None]))


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers as an int64 tensor, without waiting for the device."""
    tensor = torch.tensor(numbers, device="cpu")
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def layout_of(headers: Tensor, group: ProcessGroup, vocab_start: int | None, weight: Tensor | None) -> Layout:
    """The layout from the headers (ranks, 7); on the CPU, ValueError where the ranks do not fit together."""
    given, sizes, refused, *_ = headers.T
    starts = sizes.cumsum(0) - sizes if vocab_start is None else given
    # In the order of the vocabulary, each shard starts where those before it end; an empty one may lie anywhere.
    order = starts.where(sizes > 0, torch.iinfo(torch.int64).max).argsort()
    sorted_sizes = sizes[order]
    fits = (starts[order] == sorted_sizes.cumsum(0) - sorted_sizes) | (sorted_sizes == 0)
    equal = (headers == headers[0])[:, 2:]
    sound = fits.all() & equal.all()
    known = sound.item() if CHECK_TARGETS else eager.known(sound)
    if known is None:
        classes = sizes.sum()
        start = starts[group.rank()] if vocab_start is None else vocab_start
        return Layout(
            group, starts, sizes, start, classes, sound if weight is None else sound & (classes == weight.numel())
        )

    if refused.any():
        alone = refused.nonzero().flatten().tolist()
        raise RuntimeError(f"the loss cannot be computed, since ranks {alone} of the group raise an error: see there")
    for name, column in zip(HEADER[3:], headers.T[3:].tolist(), strict=True):
        if len(set(column)) > 1:
            what = "arguments besides local_logits and vocab_start, and shapes" if name == "options" else name
            values = f", but have {column}" if name == "number of tokens" else ""
            raise ValueError(f"all ranks must have the same {what}{values}")
    if not known:
        spans = ", ".join(f"[{s}, {s + n})" for s, n in zip(starts.tolist(), sizes.tolist(), strict=True))
        raise ValueError(
            f"the ranks must hold every class once, but hold {spans}: correct vocab_start, or leave it out where the "
            "shards lie in the order of the ranks"
        )
    return Layout(group, starts, sizes, int(starts[group.rank()]), int(sizes.sum()), None)


def weight_sums(weight: Tensor, layout: Layout) -> Tensor:
    """The sum of the class weights (V,) that each rank holds, (ranks,), the same bits on all of them."""
    i = torch.arange(len(weight), device=weight.device)
    ends = layout.starts + layout.sizes
    inside = ((i >= start) & (i < end) for start, end in zip(layout.starts, ends, strict=True))
    return torch.stack([weight.where(held, 0).sum() for held in inside])


# ---- autograd --------------------------------------------------------------------------------------------------------


def row_pieces(logits: Tensor, prefix: tuple[int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Indices of parts of logits (..., V) of up to ops.PIECE numbers (or a row), so that temporaries stay small."""
    # Smaller ones on a CPU, whose allocator gives larger temporaries new memory each time.
    most = min(ops.PIECE, 1 << 20) if logits.device.type == "cpu" else ops.PIECE
    shape = logits.shape[len(prefix) :]
    per_index = max(1, math.prod(shape[1:]))
    if per_index <= most or len(shape) == 2:
        step = max(1, most // per_index)
        yield from ((*prefix, slice(i, i + step)) for i in range(0, shape[0], step))
    else:
        for i in range(shape[0]):
            yield from row_pieces(logits, (*prefix, i))


class VocabParallelTerms(torch.autograd.Function):
    """The two terms of every token, with a backward in closed form that sends nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, layout: Layout, *options: Any) -> Any:
        """Both terms (...) of this rank's logits (..., V_local) in any floating dtype, global targets (...) in int64.

        ``weight`` (V,) has the terms' dtype. Saved are the logits, and O(k) numbers of each row.
        """
        o = Options(*options)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ignored = target == o.ignore_index
        y = target - layout.start
        y = y.masked_fill((y < 0) | (y >= logits.shape[-1]) | ignored, -1)
        all_weights = local = sums = None
        if o.label_smoothing > 0:
            local = logits.new_ones(logits.shape[-1], dtype=dtype)
            if weight is not None:
                # Clamped, since on a GPU nobody has looked whether the ranks fit together.
                classes = torch.arange(len(local), device=logits.device) + layout.start
                local = weight[classes.clamp(0, len(weight) - 1)]
            sums = layout.sizes.to(dtype) if weight is None else weight_sums(weight, layout)
            all_weights = in_order(sums)

        parts = [row_stats(logits[i].to(dtype), y[i], k=o.k, weight=local) for i in row_pieces(logits)]
        columns = COLUMNS + (o.k + 1 if o.k else 0) + (local is not None)
        stats = torch.cat([logits.new_empty((0, columns), dtype=dtype), *(s.flatten(0, -2) for s, _ in parts)])
        slots = None
        if o.k > 0:
            width = min(o.k + 1, logits.shape[-1])
            found = [cast(Tensor, s).flatten(0, -2) for _, s in parts]
            slots = torch.cat([y.new_empty((0, width)), *found]).reshape(*y.shape, width)
        gathered = gather(stats, layout.group)
        step = max(1, ops.PIECE // (columns * layout.group.size()))
        pieces = gathered.split(step, 1)
        merged = [merge(x, k=o.k, space=o.space, distance=o.distance, weight_sums=sums) for x in pieces]
        rows = RowStats(*(torch.cat(x).reshape(y.shape) for x in zip(*merged, strict=True)))
        if layout.sound is not None:  # where nobody may look, a loss and a gradient of NaN
            outside = (target < 0) | (target >= layout.classes)
            rows = rows._replace(max=rows.max.masked_fill(outside | ~layout.sound, torch.nan))

        w_y = torch.ones_like(rows.max) if weight is None else token_weights(target, weight, o.ignore_index)
        cross_entropy = -rows.log_p(rows.target) * w_y
        if o.label_smoothing > 0:
            uniform = -rows.uniform / layout.classes
            cross_entropy = (1 - o.label_smoothing) * cross_entropy + o.label_smoothing * uniform
        penalty = rows.distance(o.space) * w_y if o.k else torch.zeros_like(w_y)
        ctx.save_for_backward(logits, y, ignored, w_y, slots, local, all_weights, *rows)
        ctx.options, ctx.classes = o, layout.classes
        return cross_entropy.masked_fill(ignored, 0), penalty.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient (..., V_local) in the dtype of the logits, rounded once."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_parallel_prsl_cross_entropy has no second derivative: call backward without create_graph=True, "
                "or gather the logits of all ranks and use prsl_cross_entropy"
            )
        logits, y, ignored, w_y, slots, local, all_weights, *rows = ctx.saved_tensors
        o: Options = ctx.options
        grad_c, grad_d = grads
        q_y = (1 - o.label_smoothing) * grad_c * w_y
        q_all, smooth = q_y, None
        if local is not None:
            smooth = o.label_smoothing * grad_c / ctx.classes
            q_all = q_y + smooth * all_weights
        grad_d = grad_d * w_y
        gradient = torch.empty_like(logits)
        for i in row_pieces(logits):
            piece = row_gradient(
                logits[i].to(grad_c.dtype),
                y[i],
                None if slots is None else slots[i],
                RowStats(*(x[i] for x in rows)),
                grad_d[i],
                q_y[i],
                None if smooth is None else smooth[i].unsqueeze(-1) * local,
                q_all[i],
                space=o.space,
                distance=o.distance,
            )
            gradient[i] = piece.masked_fill_(ignored[i].unsqueeze(-1), 0)
        return gradient, None, None, None, *(None for _ in o)


# ---- the public function ---------------------------------------------------------------------------------------------


@overload
def vocab_parallel_prsl_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: Literal[False] = False,
) -> Tensor: ...


@overload
def vocab_parallel_prsl_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: bool,
) -> Tensor | LossTerms: ...


def vocab_parallel_prsl_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: bool = False,
) -> Tensor | LossTerms:
    """:func:`prsl_kernels.prsl_cross_entropy` of logits whose classes are split over the ranks of a process group.

    Every rank calls it, with its own classes and otherwise the same arguments, and gets the same bits of the loss; its
    backward gives the gradient of its own classes. Forward sends k + 4 numbers for each token and rank (one more with
    label smoothing) and one small header; backward sends nothing, and has no second derivative.

    Args:
        local_logits: logits of this rank's V_local classes, (V_local,), (N, V_local) or (N, V_local, d1, ...), in
            float16, bfloat16, float32 or float64. V_local may differ between ranks, and be 0. Half precision is
            computed in float32. Or a DTensor of all classes that is sharded over them on a mesh of one dimension, as
            for :func:`torch.distributed.tensor.parallel.loss_parallel`; the loss is then a replicated DTensor.
        target: class indices among all V classes, (), (N,) or (N, d1, ...), int64 or uint8; class probabilities are
            not supported. A tensor, or a replicated DTensor, which ``weight`` may be too.
        weight: a weight for each of all classes (V,), without a gradient.
        group: the process group; by default the default one, and the mesh's for a DTensor.
        vocab_start: the first class of this rank. By default the shards lie in the order of the ranks.
        k, b, space, distance, ignore_index, reduction, label_smoothing, return_terms: as in ``prsl_cross_entropy``,
            with all V classes for C.

    Raises:
        ValueError, TypeError, IndexError: as ``prsl_cross_entropy``; ValueError, too, where the ranks' arguments do not
            fit together or the DTensor is not sharded over its classes. On the CPU all ranks raise. On a GPU, where
            looking would mean waiting, what only the numbers of all ranks can tell (a target outside [0, V), k above
            V - 1, shards that overlap) gives NaN instead, unless the environment has ``PRSL_CHECK_TARGETS=1``.
        RuntimeError: there is no process group, or another rank has raised an error; in backward, ``create_graph``.
    """
    check_options(k, b, space, distance, ignore_index, reduction, label_smoothing, "auto")
    mesh: DeviceMesh | None = None
    if is_dtensor(local_logits):
        local_logits, group, vocab_start, mesh = shard_of(cast("DTensor", local_logits), group, vocab_start)
    target, weight = replicated("target", target), replicated("weight", weight)
    logits, target, weight, layout = agree(
        local_logits,
        target,
        weight,
        resolve_group(group),
        vocab_start,
        (int(k), float(b), space, distance, int(ignore_index), reduction, float(label_smoothing)),
    )
    options = Options(0 if b == 0 else int(k), space, distance, int(ignore_index), float(label_smoothing))
    if logits.dim() == 1:
        terms = VocabParallelTerms.apply(logits.unsqueeze(0), target.unsqueeze(0), weight, layout, *options)
        cross_entropy, penalty = (x.squeeze(0) for x in terms)
    else:
        cross_entropy, penalty = VocabParallelTerms.apply(logits.movedim(1, -1), target, weight, layout, *options)
    if reduction != "none":
        total: Tensor | int = 1
        if reduction == "mean":
            total = total_of(token_weights(target, weight, ignore_index)).to(cross_entropy.dtype)
            total = total.where(total != 0, torch.nan)
        cross_entropy, penalty = total_of(cross_entropy) / total, total_of(penalty) / total
    loss = torch.add(cross_entropy, penalty, alpha=float(b)) if b != 0 else cross_entropy
    if mesh is not None:
        loss, cross_entropy, penalty = (as_replicated(x, mesh) for x in (loss, cross_entropy, penalty))
    return LossTerms(loss, cross_entropy.detach(), penalty.detach()) if return_terms else loss


def agree(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    group: ProcessGroup,
    vocab_start: int | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Layout]:
    """Check the tensors on all ranks; return the logits, int64 targets, weight in the loss's dtype, and the layout.

    An error of this rank is raised when the others have heard of it, since they would wait for its stats forever.
    """
    k, b, *_, ignore_index, _, _ = options
    if not isinstance(logits, Tensor):
        raise TypeError(f"local_logits must be a tensor, but is {type(logits).__name__}")
    try:
        check_local(logits, target, weight, vocab_start, b)
        header = header_of(logits, target, weight, vocab_start, *options)
    except (TypeError, ValueError):
        gather(to_device([int(name == "refused") for name in HEADER], logits.device), group)
        raise
    layout = layout_of(gather(header, group), group, vocab_start, weight)

    # The checks of prsl_cross_entropy, for one number that stands in for the logits of all classes.
    classes = layout.classes
    if isinstance(classes, Tensor):
        classes = max(k + 1, logits.shape[min(1, logits.dim() - 1)]) if weight is None else weight.numel()
        if layout.sound is not None and b != 0:
            layout = layout._replace(sound=layout.sound & (layout.classes > k))
    shape = (classes,) if logits.dim() == 1 else (logits.shape[0], classes, *logits.shape[2:])
    whole = logits.detach().new_empty(()).expand(shape)
    check_input(whole, k, b)
    target = check_target(whole, target, ignore_index)
    check_weight(weight, whole)
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return logits, target, weight, layout


def check_local(logits: Tensor, target: Tensor, weight: Tensor | None, vocab_start: int | None, b: float) -> None:
    """Raise for what is wrong whatever the other ranks have."""
    check_input(logits, -1, b)  # k is compared with the classes of all ranks
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of class indices, but is {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices, but has {target.dtype}: for class probabilities, gather the logits of "
            "all ranks and use prsl_cross_entropy"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, but local_logits on {logits.device}: move one of them")
    check_weight(weight, None)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, and there is none for it here: pass weight.detach()")
    if vocab_start is None:
        return
    if not isinstance(vocab_start, Integral) or isinstance(vocab_start, bool):
        raise TypeError(f"vocab_start must be an integer, but is {vocab_start!r} ({type(vocab_start).__name__})")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be the first class of this rank, but is {vocab_start}")


def resolve_group(group: ProcessGroup | None) -> ProcessGroup:
    """The group, or the default one; raise where there is none, or this process is not in it."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group first, or use prsl_cross_entropy in "
            "a single process"
        )
    if group is None:
        group = distributed.group.WORLD
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group must be a process group with this process in it, but is {group!r}: pass what "
            "torch.distributed.new_group returns on its members, or mesh.get_group()"
        )
    return group


# ---- DTensors --------------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_of(
    logits: DTensor, group: ProcessGroup | None, vocab_start: int | None
) -> tuple[Tensor, ProcessGroup, int, DeviceMesh]:
    """This rank's logits of a DTensor, its group, its first class, and its mesh."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if group is not None or vocab_start is not None:
        raise ValueError("group and vocab_start come with the DTensor local_logits: leave them out, or pass to_local()")
    mesh, placements = logits.device_mesh, logits.placements
    class_dim = min(1, logits.dim() - 1)
    # Not isinstance: there are subclasses that shard in another order.
    if not (len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim % logits.dim() == class_dim):
        raise ValueError(
            f"a DTensor of logits must be sharded over its classes alone, (Shard({class_dim}),), but has {placements} "
            f"on a mesh of shape {tuple(mesh.shape)}: redistribute it, or pass to_local() and the group of the ranks "
            "among which its classes are split"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process is not in the mesh of the DTensor local_logits, {mesh}")
    _, offset = compute_local_shape_and_global_offset(logits.shape, mesh, placements)
    return logits.to_local(), mesh.get_group(), offset[class_dim], mesh


def replicated(name: str, tensor: Any) -> Any:
    """A DTensor that is the same on all ranks as a plain tensor; anything else as it is."""
    if not is_dtensor(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name} must be the same on all ranks, but is a DTensor with the placements {tensor.placements}: "
            "redistribute it to Replicate()"
        )
    return tensor.to_local()


def as_replicated(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that is the same on all ranks as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
