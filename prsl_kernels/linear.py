"""The loss from hidden states and the vocabulary matrix, in chunks of rows: the logits never exist as a whole.

A chunk goes through the steps of every backend in one buffer: a matrix product writes its logits, forward reads them,
and backward overwrites them with their gradient, from which two more products make the gradients of the hidden states
and the vocabulary matrix. Where the loss is a number ("mean", "sum"), its derivative by the logits is known up to one
factor before anybody calls backward, so all of that happens in forward, with three products in all. Where each token
has an upstream gradient of its own ("none"), and for float16, whose small numbers need the upstream scale of a gradient
scaler, backward computes the logits once more.
"""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .eager import Distance, Space
from .functional import (
    BACKENDS,
    DTYPES,
    UNAVAILABLE,
    LossTerms,
    Reduction,
    check_input,
    check_layout,
    check_options,
    check_target,
    check_weight,
    prsl_cross_entropy,
    resolve_backend,
    token_weights,
    total_of,
)
from .ops import EAGER, has_tangent

# Below this a larger chunk costs little, and a smaller one makes the matrix products slow.
SMALLEST_BUDGET = 1 << 25


@overload
def linear_prsl_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: Literal[False] = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor: ...


@overload
def linear_prsl_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: bool,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor | LossTerms: ...


def linear_prsl_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_terms: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor | LossTerms:
    """:func:`prsl_kernels.prsl_cross_entropy` of ``linear(input, linear_weight, linear_bias)``, without the logits.

    The arguments are those of :func:`torch.nn.functional.linear_cross_entropy`, with ``ignore_index=-100`` and without
    ``options``, and ``k``, ``b``, ``space``, ``distance``, ``return_terms`` and ``backend`` of ``prsl_cross_entropy``,
    which has the definition (arXiv:2402.03627, Eq. 1 and 2). The values are those of the whole logits in the same
    dtype, but for the order in which products are summed. Of bfloat16 and float16, the gradients of ``linear_weight``
    and ``linear_bias`` are summed over the chunks in float32. For "mean" and "sum", forward computes the gradients
    where something requires them, and holds them (that of a half precision matrix in float32) until backward.

    Class probabilities, a ``weight`` that requires a gradient, more than one output dimension, double backward, and the
    transforms of ``torch.func`` and forward-mode differentiation hold the whole logits after all, in plain PyTorch.

    Args:
        input: hidden states (H,) or (N, H) in float16, bfloat16, float32 or float64. Flatten more dimensions.
        linear_weight: the vocabulary matrix (C, H), of the same dtype; (C, d1, ..., H) for logits (N, C, d1, ...).
            Under autocast the dtypes may differ, and the logits have autocast's.
        target: class indices () or (N,) in int64 or uint8, or class probabilities (C,) or (N, C).
        linear_bias: (C,), or the shape of ``linear_weight`` without H.
        weight, k, b, space, distance, ignore_index, reduction, label_smoothing, return_terms, backend: as in
            ``prsl_cross_entropy``.
        memory_budget: so many bytes for the logits that are held at a time, at least one row. By default a quarter of
            all logits, but no more than ``linear_weight`` has in float32, and no less than 32 MiB.

    Returns:
        What ``prsl_cross_entropy`` returns. Gradients are computed for those tensors alone that require one. As from
        whole logits, a NaN in the hidden state of an ignored token reaches the gradient of ``linear_weight``.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as ``prsl_cross_entropy``, and for shapes, dtypes and devices
            of the matrix product that do not match.
    """
    check_options(k, b, space, distance, ignore_index, reduction, label_smoothing, backend)
    if backend in UNAVAILABLE:
        raise RuntimeError(f"backend={backend!r} cannot run: {UNAVAILABLE[backend]}")
    check_budget(memory_budget)
    dtype = check_linear(input, linear_weight, linear_bias)
    # In the place of the logits, for everything that is asked of their shape, dtype and device.
    outer = linear_weight.shape[:-1]
    logits = input.new_empty((), dtype=dtype).expand(*input.shape[:-1], *outer)
    check_input(logits, k, b, "the logits")
    target = check_target(logits, target, ignore_index, "the logits")
    check_weight(weight, logits, "the logits")
    if needs_all_logits(logits, target, weight):
        whole = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
        same: dict[str, Any] = {"k": k, "b": b, "space": space, "distance": distance, "ignore_index": ignore_index}
        same |= {"reduction": reduction, "label_smoothing": label_smoothing, "backend": backend}
        return prsl_cross_entropy(whole.reshape(logits.shape), target, weight, return_terms=return_terms, **same)

    name = resolve_backend(backend, logits, target, weight)
    compute = torch.promote_types(dtype, torch.float32)
    if weight is not None:
        weight = weight.to(compute)
    options = (0 if b == 0 else int(k), space, distance, int(ignore_index), float(label_smoothing))
    how = How(dtype, name, None if memory_budget is None else int(memory_budget), options)
    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    inputs = (input, linear_weight, linear_bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    total: Tensor | int = 1
    if reduction == "mean":
        total = total_of(token_weights(target, weight, ignore_index)).to(compute)
        total = total.where(total != 0, torch.nan)
    # An exported program keeps the derivative of an operator, but not that of a torch.autograd.Function.
    ahead = differentiable and reduction != "none" and dtype != torch.float16 and not torch.compiler.is_exporting()
    if ahead:
        share = torch.ones((), dtype=compute, device=input.device) / total
        loss, cross_entropy, penalty = _ReducedLoss.apply(*inputs, target, weight, share, float(b), how)
        cross_entropy, penalty = total_of(cross_entropy) / total, total_of(penalty) / total
    else:
        cross_entropy, penalty, *_ = _terms_and_gradients((*inputs, target, weight), (None, None), [False] * 3, how)
        if reduction != "none":
            cross_entropy, penalty = total_of(cross_entropy) / total, total_of(penalty) / total
        elif single:
            cross_entropy, penalty = cross_entropy.squeeze(0), penalty.squeeze(0)
        loss = torch.add(cross_entropy, penalty, alpha=float(b)) if b != 0 else cross_entropy
    return LossTerms(loss, cross_entropy.detach(), penalty.detach()) if return_terms else loss


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_budget(memory_budget: int | None) -> None:
    """Raise for a memory budget that is no number of bytes."""
    if memory_budget is not None and (not isinstance(memory_budget, Integral) or isinstance(memory_budget, bool)):
        raise TypeError(f"memory_budget must be a number of bytes, an integer, or None, but is {memory_budget!r}")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, but is {memory_budget}: leave it out for the default")


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """The dtype of the logits; raise where the tensors cannot be multiplied."""
    tensors = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, but is {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must have one of the dtypes {DTYPES}, but has {x.dtype}: convert it first")
        check_layout(name, x)
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{name} must be a plain tensor, but is a {type(x).__name__}: gather it with full_tensor(), or, for a "
                "vocabulary that is split over ranks, compute the local logits and use "
                "prsl_kernels.vocab_parallel_prsl_cross_entropy"
            )
        if x.device != input.device:
            raise ValueError(f"{name} is on {x.device}, but input on {input.device}: move one of them")
    if input.dim() not in (1, 2):
        raise ValueError(
            f"input must have the shape (H,) or (N, H), but has {tuple(input.shape)}: flatten it, and target with it, "
            "as in input.flatten(0, -2) and target.flatten()"
        )
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have the shape (C, {input.shape[-1]}), or (C, d1, ..., {input.shape[-1]}), to go with "
            f"input {tuple(input.shape)}, but has {tuple(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(
            f"linear_weight {tuple(linear_weight.shape)} with more than two dimensions needs an input (N, H), but it "
            f"has the shape {tuple(input.shape)}: give it a dimension with unsqueeze(0)"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must have the shape {tuple(linear_weight.shape[:-1])}, to go with linear_weight "
            f"{tuple(linear_weight.shape)}, but has {tuple(linear_bias.shape)}"
        )
    kind = input.device.type
    if (
        torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and all(x.dtype != torch.float64 for x in tensors.values())
    ):
        return torch.get_autocast_dtype(kind)
    for name, x in tensors.items():
        if x.dtype != input.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype}, but input {input.dtype}: convert one of them, or run under torch.autocast"
            )
    return input.dtype


def needs_all_logits(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether only plain PyTorch on the whole logits has what is asked for."""
    return (
        target.is_floating_point()
        or logits.dim() > 2
        or (weight is not None and weight.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# ---- the chunks ------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """What the operator needs to know besides its tensors."""

    dtype: torch.dtype  # of the logits
    backend: str
    memory_budget: int | None
    options: tuple[Any, ...]  # k, space, distance, ignore_index, label_smoothing


def default_budget(logits: int, weights: int) -> int:
    """Bytes for the logits of a chunk, of ``logits`` bytes of them all and ``weights`` numbers in the matrix.

    Each chunk reads and writes the matrix's gradient once, which hides behind the products where the chunk is as large.
    """
    return max(SMALLEST_BUDGET, min(4 * weights, logits // 4))


def chunk_rows(rows: int, classes: int, dtype: torch.dtype, backend: str, memory_budget: int) -> int:
    """How many rows of logits are computed at a time: chunks of one size that stay within the budget."""
    # What eager holds of each class besides, at its worst: five float32 numbers, and candidates.
    held = dtype.itemsize + (24 if backend == "eager" else 0)
    most = max(1, memory_budget // max(1, classes * held))
    return -(-rows // max(1, -(-rows // most)))


def add_product(total: Tensor, left: Tensor, right: Tensor, memory_budget: int) -> None:
    """``total += left @ right``, summed in the dtype of ``total`` (M, H), for half precision (M, N) and (N, H), too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    # In slices of a quarter of the budget, since a whole product, or factor in float32, may be as large as the logits.
    count = max(1, memory_budget // (4 * total.dtype.itemsize * max(1, *left.shape[1:], *right.shape[1:])))
    for part, rows in zip(total.split(count), left.split(count), strict=True):
        if left.is_cuda and torch.version.hip is None:
            part += torch.mm(rows, right, out_dtype=total.dtype)
        elif left.dtype == torch.bfloat16 and _multiplies_bfloat16():
            part += torch.mm(rows, right)  # summed in float32, and rounded before it gets here: once a chunk
        else:
            part.addmm_(rows.t().to(total.dtype).t(), right.to(total.dtype))


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 on this CPU are no slower than those of float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.library.custom_op("prsl_kernels::linear_terms", mutates_args=())
def linear_terms(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_penalty: Tensor | None,
    wanted: list[bool],
    dtype: torch.dtype,
    backend: str,
    memory_budget: int | None,
    k: int,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The two terms (N,) of hidden states (N, H), and the gradients of input, linear_weight and linear_bias.

    The gradients are those for the upstream gradients of the terms (N,), where these are given; ``wanted`` says which
    of the three to compute, and the others are empty. That of the input has its dtype, that of the vocabulary matrix
    and the bias float32 for half precision, since it may still be scaled.
    """
    kernels = BACKENDS[backend]
    options = (k, space, distance, ignore_index, label_smoothing)
    rows, classes = input.shape[0], linear_weight.shape[0]
    compute = torch.promote_types(dtype, torch.float32)
    outputs = _new_outputs(input, linear_weight, grad_cross_entropy, wanted, dtype)
    cross_entropy, penalty, grad_input, grad_weight, grad_bias = outputs
    want_input, want_weight, want_bias = wanted
    matrix = linear_weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    if memory_budget is None:
        memory_budget = default_budget(rows * classes * dtype.itemsize, linear_weight.numel())
    chunk = chunk_rows(rows, classes, dtype, backend, memory_budget)
    buffer = input.new_empty((chunk, classes), dtype=dtype)
    with torch.autocast(input.device.type, enabled=False):
        for begin in range(0, rows, max(1, chunk)):
            these = slice(begin, min(begin + chunk, rows))
            hidden, y = input[these].to(dtype), target[these]
            logits = buffer[: len(hidden)]
            if bias is None:
                torch.mm(hidden, matrix.t(), out=logits)
            else:
                torch.addmm(bias, hidden, matrix.t(), out=logits)
            cross_entropy[these], penalty[these], *saved = kernels.forward(logits, y, weight, *options)
            if grad_cross_entropy is None or grad_penalty is None or not any(wanted):
                continue
            grads = (grad_cross_entropy[these].contiguous(), grad_penalty[these].contiguous())
            kernels.gradient_(logits, y, weight, *saved, *grads, *options)  # logits no more, but their gradient
            if want_input:
                grad_input[these] = torch.mm(logits, matrix)
            if want_weight:
                add_product(grad_weight, logits.t(), hidden, memory_budget)
            if want_bias:
                grad_bias += logits.sum(0, dtype=compute)
    return outputs


def _new_outputs(
    input: Tensor, linear_weight: Tensor, grad_cross_entropy: Tensor | None, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(dtype, torch.float32)
    cross_entropy, penalty = (input.new_empty(input.shape[:1], dtype=compute) for _ in range(2))
    want_input, want_weight, want_bias = (want and grad_cross_entropy is not None for want in wanted)
    grad_input = input.new_empty(input.shape if want_input else 0)
    grad_weight = input.new_zeros(linear_weight.shape if want_weight else 0, dtype=compute)
    grad_bias = input.new_zeros(linear_weight.shape[:1] if want_bias else 0, dtype=compute)
    return cross_entropy, penalty, grad_input, grad_weight, grad_bias


@linear_terms.register_fake
def _(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, grad_cross_entropy, _, wanted, dtype, *_ = rest
    return _new_outputs(input, linear_weight, grad_cross_entropy, wanted, dtype)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _terms_and_gradients(tensors: tuple[Any, ...], grads: tuple[Any, ...], wanted: list[bool], how: How) -> Any:
    return linear_terms(*tensors, *grads, wanted, how.dtype, how.backend, how.memory_budget, *how.options)


def _like(gradients: Any, wanted: tuple[bool, ...], inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients in the inputs' dtypes, None where they are not wanted."""
    pairs = zip(gradients, wanted, inputs, strict=True)
    return tuple(gradient.to(x.dtype) if want else None for gradient, want, x in pairs)


def _differentiable(grads: Any) -> bool:
    """Whether the gradients have to be differentiable themselves."""
    return torch.is_grad_enabled() or any(has_tangent(grad) for grad in grads)


def _through_all_logits(inputs: Any, target: Any, weight: Any, how: How, wanted: Any, grads: Any) -> Any:
    """The gradients as something that can be differentiated again, through the whole logits."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One of the inputs may come from another, as hidden states from a tied matrix; and hooks on them run later.
        aliases: Any = [None if x is None else x.view_as(x) for x in inputs]
        operands: Any = [None if x is None else x.to(how.dtype) for x in aliases]
        logits = F.linear(*operands)
        terms = EAGER.token_terms(logits, target, weight, *how.options)
        some = [x for x, want in zip(aliases, wanted, strict=True) if want]
        pairs = [(term, grad) for term, grad in zip(terms, grads, strict=True) if term.requires_grad]
        outputs, grad_outputs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, some, grad_outputs, create_graph=create_graph))
        return tuple(next(found) if want else None for want in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, dtype, backend, memory_budget, k, space, distance, ignore_index, label_smoothing = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors)
    ctx.how = How(dtype, backend, memory_budget, (k, space, distance, ignore_index, label_smoothing))


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradients from those of the two terms (N,); the logits are computed again."""
    *inputs, target, weight = ctx.saved_tensors
    wanted, none = ctx.needs_input_grad[:3], (None,) * 13
    if _differentiable(grads[:2]):
        return *_through_all_logits(inputs, target, weight, ctx.how, wanted, grads[:2]), *none
    _, _, *gradients = _terms_and_gradients((*inputs, target, weight), grads[:2], list(wanted), ctx.how)
    return *_like(gradients, wanted, inputs), *none


linear_terms.register_autograd(_backward, setup_context=_setup_context)


class _ReducedLoss(torch.autograd.Function):
    """``share`` times the sum of the losses, and the terms (N,) without a gradient; forward computes the gradients.

    The first backward scales them in place and gives them away; a second one computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Any,
        linear_weight: Any,
        linear_bias: Any,
        target: Any,
        weight: Any,
        share: Any,
        b: float,
        how: How,
    ) -> Any:
        tensors = (input, linear_weight, linear_bias, target, weight)
        ctx.b, ctx.how = b, how
        wanted = list(ctx.needs_input_grad[:3])
        grads = [(share * scale).expand(input.shape[:1]) for scale in (1, b)]
        cross_entropy, penalty, *gradients = _terms_and_gradients(tensors, tuple(grads), wanted, how)
        ctx.mark_non_differentiable(cross_entropy, penalty)
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:  # a compiler follows what is saved, and not what changes from one backward to the next
            ctx.save_for_backward(*tensors, share, *gradients)
        else:
            ctx.save_for_backward(*tensors, share)
            ctx.gradients = gradients
        loss = torch.add(total_of(cross_entropy), total_of(penalty), alpha=b) if b != 0 else total_of(cross_entropy)
        return loss * share, cross_entropy, penalty

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        input, linear_weight, linear_bias, target, weight, share, *saved = ctx.saved_tensors
        inputs = (input, linear_weight, linear_bias)
        wanted = ctx.needs_input_grad[:3]
        none = (None,) * 5
        if ctx.compiled:
            return *_like([x * grad for x in saved], wanted, inputs), *none
        functorch = torch._C._functorch
        batched = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)  # several at a time
        if batched and ctx.gradients is not None:
            return *_like([x * grad for x in ctx.gradients], wanted, inputs), *none
        grads = [(grad * share * scale).expand(input.shape[:1]) for scale in (1, ctx.b)]
        if _differentiable(grads):
            return *_through_all_logits(inputs, target, weight, ctx.how, wanted, grads), *none
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, _, *gradients = _terms_and_gradients((*inputs, target, weight), tuple(grads), list(wanted), ctx.how)
        else:
            for gradient in gradients:
                gradient.mul_(grad)
        return *_like(gradients, wanted, inputs), *none
