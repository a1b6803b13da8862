"""The loss of a vocabulary that is split over the ranks of a process group (tensor parallel).

Between the stats of the classes that a rank holds and their merging (row_stats.py), each rank sends its own to all the
others: k + 4 numbers a row, and never the logits. What they merge is the same on every rank, and merged by the same
operations in the order of the ranks, so that all of them hold the same bits of the loss. Backward sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from . import eager, ops
from .eager import Distance, Space
from .functional import LossTerms, Reduction, check_options, token_weights, total_of
from .ranks import (
    Arguments,
    Layout,
    agree,
    as_replicated,
    check_local,
    gather,
    header_of,
    mesh_of,
    replicated,
    resolve_group,
    shard_of,
    telling_others,
)
from .row_stats import COLUMNS, RowStats, in_order, merge, row_gradient, row_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Options(NamedTuple):
    """The options of a loss, in the order in which operators take them."""

    k: int
    space: Space
    distance: Distance
    ignore_index: int
    label_smoothing: float


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
        none_ignored = eager.known(ignored.any()) is False
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
            gradient[i] = piece if none_ignored else piece.masked_fill_(ignored[i].unsqueeze(-1), 0)
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
    backward gives the gradient of its own classes. Forward sends k + 4 numbers for each token (one more with label
    smoothing) from every rank to all the others, after a small header; backward sends nothing, and has no second
    derivative. It is plain PyTorch, and a compiler steps out for it.

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
            V - 1, shards that overlap) gives NaN instead, unless the environment has ``PRSL_CHECK_TARGETS=1``; and as
            with any collective, ranks may wait forever for one that has raised or has other k, dtypes or tokens.
        RuntimeError: there is no process group, or another rank has raised an error; in backward, ``create_graph``.
    """
    if torch.compiler.is_compiling():
        # The ranks agree on their arguments by looking at numbers. (A decorator would import the compiler at once.)
        return torch.compiler.disable(vocab_parallel_prsl_cross_entropy)(
            local_logits,
            target,
            weight,
            group=group,
            vocab_start=vocab_start,
            k=k,
            b=b,
            space=space,
            distance=distance,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            return_terms=return_terms,
        )
    mesh = mesh_of(local_logits)
    ranks = resolve_group(group) if mesh is None else mesh.get_group()
    with telling_others(ranks, local_logits, target):
        check_options(k, b, space, distance, ignore_index, reduction, label_smoothing, "auto")
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "the transforms of torch.func cannot go through a process group: gather the logits of all ranks and "
                "use prsl_cross_entropy"
            )
        if mesh is not None:
            local_logits, vocab_start = shard_of(cast("DTensor", local_logits), group, vocab_start)
        choices = (int(k), float(b), space, distance, int(ignore_index), reduction, float(label_smoothing))
        tensors = (local_logits, replicated("target", target), replicated("weight", weight))
        given = Arguments(*tensors, vocab_start, choices)
        check_local(given)
        header = header_of(given)
    logits, target, weight, layout = agree(given, gather(header, ranks), ranks)
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
