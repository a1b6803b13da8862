"""The operators of the compiled backends, and the backward that overwrites the logits.

``prsl_native::token_terms`` is the forward of the compiled extension: the two terms of every token as
:func:`prsl_kernels.eager.token_terms` has them, and what backward needs of a row besides its logits.
``prsl_native::token_gradient`` and, over the logits, ``prsl_native::token_gradient_`` are its backward. The extension
registers their schemas and kernels; shapes for compilers and autograd are registered here. The Triton kernels have the
same three operators in ``prsl_triton``, for any device: who can run them is decided in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import eager
from .backends import native, triton
from .closed_form import token_gradient
from .eager import Distance, Space

# Rows are overwritten in pieces of about this many logits, so that the temporaries stay small beside the logits.
PIECE = 1 << 23

# max, sum, top, threshold, length, share: RowStats in csrc/closed_form.h.
STATS = 6


class Kernels(NamedTuple):
    """What a backend is made of. ``options`` are k, space, distance, ignore_index, label_smoothing, in this order."""

    # (logits, target, weight, *options) -> (cross entropy, penalty), differentiable
    token_terms: Callable[..., tuple[Tensor, Tensor]]
    # (logits, target, weight, *options) -> (cross entropy, penalty, *saved), and
    # (logits, target, weight, *saved, gradients of the two terms, *options) -> None
    forward: Callable[..., tuple[Tensor, ...]]
    gradient_: Callable[..., None]
    # (logits, target, weight) -> why these cannot be computed, or None
    refusal: Callable[[Tensor, Tensor, Tensor | None], str | None]


# ---- eager -----------------------------------------------------------------------------------------------------------


def _options(k: int, space: str, distance: str, ignore_index: int, label_smoothing: float) -> dict[str, Any]:
    return {
        "k": k,
        "space": cast(Space, space),
        "distance": cast(Distance, distance),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }


@torch.library.custom_op("prsl_kernels::token_gradient_", mutates_args=("logits",))
def token_gradient_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
    k: int,
    space: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Overwrite logits (N, ..., V) of any floating dtype with their gradient: the closed form, rounded once."""
    rows = max(1, PIECE // max(1, math.prod(logits.shape[1:])))
    options = _options(k, space, distance, ignore_index, label_smoothing)
    pieces = zip(*(x.split(rows) for x in (logits, target, grad_cross_entropy, grad_penalty)), strict=True)
    for piece, piece_target, piece_grad_cross_entropy, piece_grad_penalty in pieces:
        gradient = token_gradient(
            piece.to(grad_cross_entropy.dtype),
            piece_target,
            weight,
            piece_grad_cross_entropy,
            piece_grad_penalty,
            **options,
        )
        piece.copy_(gradient)


def _eager_terms(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return eager.token_terms(logits, target, weight, **_options(*options))


EAGER = Kernels(_eager_terms, _eager_terms, token_gradient_, lambda logits, target, weight: None)

# ---- compiled backends -----------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *options = inputs
    saved = output[2:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # there would be zeros for what is saved, too
    ctx.save_for_backward(logits, target, weight, *saved)
    ctx.options = options


def _backward_with(token_gradient: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an operator ``token_terms``, where the operator ``token_gradient`` will do."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, *saved = ctx.saved_tensors
        none = (None,) * (2 + len(ctx.options))
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None, *none)
        grad_cross_entropy, grad_penalty = (torch.zeros_like(given[0]) if grad is None else grad for grad in grads[:2])
        create_graph = torch.is_grad_enabled()
        if create_graph or has_tangent(grad_cross_entropy) or has_tangent(grad_penalty):
            # The gradient has to be differentiable itself.
            with torch.enable_grad():
                alias = logits.view_as(logits)  # whose hooks are not those of the logits: these run later
                terms = _eager_terms(alias, target, weight, *ctx.options)
                pairs = zip(terms, (grad_cross_entropy, grad_penalty), strict=True)
                outputs, grad_outputs = zip(*((term, grad) for term, grad in pairs if term.requires_grad), strict=True)
                return (*torch.autograd.grad(outputs, alias, grad_outputs, create_graph=create_graph), *none)
        gradient = token_gradient(logits, target, weight, *saved, grad_cross_entropy, grad_penalty, *ctx.options)
        return (gradient, *none)

    return backward


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation goes through a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _refusal(logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """What no compiled backend can run, whatever the device."""
    tensors = [logits, target] if weight is None else [logits, target, weight]
    if logits.shape[min(1, logits.dim() - 1)] == 0:
        return "it needs at least one class"
    if target.is_floating_point():
        return "it takes class indices alone, and target holds class probabilities"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for weight, which requires one"
    # Of a tangent, compiled code would not know that it was compiled without one; of the level, it does.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "it has no rules for the transforms of torch.func and for forward-mode differentiation"
    if torch.compiler.is_compiling():
        return None
    if any(type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ for x in tensors):
        return f"it takes plain tensors alone, and got {', '.join(type(x).__name__ for x in tensors)}"
    return None


# ---- the compiled extension ------------------------------------------------------------------------------------------


def _native_terms(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    cross_entropy, penalty, _ = torch.ops.prsl_native.token_terms(logits, target, weight, *options)
    return cross_entropy, penalty


def _native_gradient_(logits: Tensor, *rest: Any) -> None:
    torch.ops.prsl_native.token_gradient_(logits, *rest)
    torch.autograd.graph.increment_version(logits)  # so that whoever else has saved them is told


def _terms_fake(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    cross_entropy, penalty = (logits.new_empty(rows, dtype=dtype) for _ in range(2))
    return cross_entropy, penalty, logits.new_empty((*rows, STATS), dtype=dtype)


def _native_refusal(logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if logits.device.type not in ("cpu", "cuda"):
        return f"it has kernels for the CPU and for CUDA, and input is on {logits.device}"
    if logits.device.type == "cuda" and not native.cuda_available:
        return native.cuda_reason
    return _refusal(logits, target, weight)


NATIVE: Kernels | None = None
if native.available:
    torch.library.register_fake("prsl_native::token_terms", _terms_fake)
    torch.library.register_fake("prsl_native::token_gradient", lambda logits, *_: torch.empty_like(logits))
    torch.library.register_fake("prsl_native::token_gradient_", lambda *_: None)
    torch.library.register_autograd(
        "prsl_native::token_terms",
        _backward_with(torch.ops.prsl_native.token_gradient),
        setup_context=_setup_context,
    )
    NATIVE = Kernels(_native_terms, torch.ops.prsl_native.token_terms, _native_gradient_, _native_refusal)

# ---- Triton ----------------------------------------------------------------------------------------------------------


def _triton_terms(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    cross_entropy, penalty, *_ = torch.ops.prsl_triton.token_terms(logits, target, weight, *options)
    return cross_entropy, penalty


def _triton_refusal(logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if logits.device.type != ("cpu" if triton.interpreted else "cuda"):
        where = "the CPU, since TRITON_INTERPRET is set" if triton.interpreted else "GPUs"
        return f"it has kernels for {where}, and input is on {logits.device}"
    if torch.compiler.is_compiling():  # for GPUs the compiler needs Triton itself
        return _refusal(logits, target, weight)
    return triton.why_missing() or _refusal(logits, target, weight)


_OPTIONS = "int k, str space, str distance, int ignore_index, float label_smoothing"
_INPUTS = "Tensor target, Tensor? weight"
_SAVED = "Tensor stats, Tensor groups, Tensor slow, Tensor grad_cross_entropy, Tensor grad_penalty"
_OUTPUTS = "(Tensor cross_entropy, Tensor penalty, Tensor stats, Tensor groups, Tensor slow)"
torch.library.custom_op(
    "prsl_triton::token_terms",
    triton.token_terms,
    mutates_args=(),
    schema=f"(Tensor logits, {_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
).register_fake(lambda logits, target, weight, k, *_: triton.new_terms(logits, k))
torch.library.custom_op(
    "prsl_triton::token_gradient",
    triton.token_gradient,
    mutates_args=(),
    schema=f"(Tensor logits, {_INPUTS}, {_SAVED}, {_OPTIONS}) -> Tensor",
).register_fake(lambda logits, *_: triton.new_gradient(logits))
torch.library.custom_op(
    "prsl_triton::token_gradient_",
    triton.token_gradient_,
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_INPUTS}, {_SAVED}, {_OPTIONS}) -> ()",
).register_fake(lambda *_: None)
torch.library.register_autograd(
    "prsl_triton::token_terms",
    _backward_with(torch.ops.prsl_triton.token_gradient),
    setup_context=_setup_context,
)
TRITON = Kernels(
    _triton_terms, torch.ops.prsl_triton.token_terms, torch.ops.prsl_triton.token_gradient_, _triton_refusal
)

# ---- inplace_backward ------------------------------------------------------------------------------------------------


class InplaceTokenTerms(torch.autograd.Function):
    """The two terms of a backend, with a backward that needs no memory for the gradient, and can run but once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, kernels: Kernels, *options: Any
    ) -> Any:
        """The two terms (...) of logits (..., V) in any floating dtype; nothing of size V is saved but the logits."""
        cross_entropy, penalty, *saved = kernels.forward(logits, target, weight, *options)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.kernels, ctx.options = kernels, options
        ctx.spent = False
        return cross_entropy, penalty

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, in the storage of the logits."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True has no second derivative, since its backward overwrites the logits: "
                "call backward without create_graph=True, or use inplace_backward=False"
            )
        if ctx.spent:
            raise RuntimeError(
                "a second backward through inplace_backward=True: the first one has overwritten the logits with their "
                "gradient; call backward once, or use inplace_backward=False"
            )
        logits, target, weight, *saved = ctx.saved_tensors
        ctx.spent = True
        logits = logits.detach()
        ctx.kernels.gradient_(logits, target, weight, *saved, *grads, *ctx.options)
        return logits, None, None, None, *(None for _ in ctx.options)
