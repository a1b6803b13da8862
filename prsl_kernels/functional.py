"""The public functions: check the arguments, choose a backend, reduce."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from . import eager
from .backends import native, triton
from .eager import Distance, Space
from .ops import EAGER, NATIVE, TRITON, InplaceTokenTerms, Kernels

Reduction = Literal["none", "mean", "sum"]

# Whether targets on a GPU are looked at, by an assertion there.
CHECK_TARGETS = os.environ.get("PRSL_CHECK_TARGETS") == "1"

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Fastest first: "auto" takes the first one that can run the input. Interpreted kernels come last, behind eager, which
# runs everything: they are for those who ask for them.
BACKENDS: dict[str, Kernels] = {
    **({} if triton.interpreted else {"triton": TRITON}),
    **({} if NATIVE is None else {"native": NATIVE}),
    "eager": EAGER,
    "triton": TRITON,
}

# Names that are reserved, and why they cannot run.
UNAVAILABLE = {"native": native.reason} if NATIVE is None else {}


class LossTerms(NamedTuple):
    """The loss and what it is made of: ``loss = cross_entropy + b * penalty``, the last two detached."""

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor


@overload
def prsl_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    top_p: float | None = None,
    max_k: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    return_terms: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def prsl_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    top_p: float | None = None,
    max_k: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    return_terms: Literal[True],
    backend: str = "auto",
) -> LossTerms: ...


@overload
def prsl_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    top_p: float | None = None,
    max_k: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    return_terms: bool,
    backend: str = "auto",
) -> Tensor | LossTerms: ...


def prsl_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int = 20,
    b: float = 1e-4,
    space: Space = "prob",
    distance: Distance = "l2",
    top_p: float | None = None,
    max_k: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    return_terms: bool = False,
    backend: str = "auto",
) -> Tensor | LossTerms:
    """Cross entropy plus ``b`` times the spread of the k most probable wrong classes.

    For a token with target ``y`` the loss is ``-log p_y + b * d``, where K are the k classes with the largest
    probability, ``y`` left out, m is the smallest probability over K, and ``d = ||p_K - m||``. Source: Wang, Jiang,
    Zhang, Li, "Partially Recentralization Softmax Loss for Vision-Language Models Robustness", arXiv:2402.03627, Eq. 1
    and 2, with the distance penalised as their text says; a negative ``b`` is Eq. 1 to the letter.

    With ``b=0`` this is :func:`torch.nn.functional.cross_entropy` with two exceptions: the loss of half precision
    logits is float32, and ignored tokens have gradient 0 even where their logits are NaN.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...) in float16, bfloat16, float32 or float64. Half precision is
            computed in float32. Never changed, except by ``inplace_backward``.
        target: class indices (), (N,) or (N, d1, ...) in int64 or uint8, or class probabilities of the input's shape in
            a floating dtype, which may require a gradient. The class left out of K is then the most probable one, the
            first of them if several are.
        weight: a weight for each class (C,), as in ``cross_entropy``; the distance of a token counts
            ``weight[target]`` times, and once with class probabilities.
        k: the number of classes in K, 1 to C - 1. For ``b=0`` there is no K, and k may be larger.
        b: the weight of the distance, any number that is finite in the loss's dtype.
        space: "prob", or "log_prob" for the distance between log-probabilities.
        distance: "l2", or "l1" for the sum of the differences.
        top_p: a share in (0, 1], in place of ``k``, which is then ignored: K is, for each token, the smallest set of
            the most probable wrong classes, ties at its edge included, that holds this share of the probability of all
            wrong classes; 1 takes all with p > 0. How to choose k is an open question of the paper; this answer runs
            in "eager" alone until it has been shown to help. It sorts each row, which costs more than all the rest
            unless ``max_k`` is small. And the loss is not continuous: it jumps where K changes. The choice of K has no
            derivative.
        max_k: with ``top_p``, the largest number of classes in K, besides ties at its edge; None for no limit. It may
            be larger than C - 1.
        ignore_index: the class index of tokens that do not count.
        reduction: "none", "mean" (divided by the sum of the targets' weights, or the number of tokens with class
            probabilities) or "sum".
        label_smoothing: 0 to 1, of the cross entropy alone.
        inplace_backward: let backward write the gradient into the storage of ``input``, which then holds no logits any
            more. Needs class indices; a second backward and ``create_graph=True`` raise. Without effect under
            ``torch.compile``, which plans the memory itself.
        return_terms: return a named tuple ``(loss, cross_entropy, penalty)``; the last two are detached and reduced
            like the loss, and ``loss = cross_entropy + b * penalty``. For ``b=0`` the penalty is not computed, but 0.
        backend: "auto" for the fastest that can run the input, or the name of one. "triton" (for GPUs, by NVIDIA and
            AMD) and "native" (the compiled extension, for CPUs and, where it was built for it, CUDA) take class
            indices; "eager" is plain PyTorch, and runs everywhere and under every transform.

    Returns:
        The loss, a scalar, or of the shape of the class indices for ``reduction="none"``; float64 for float64 logits
        or class probabilities, and float32 otherwise. Classes that are tied for the k-th place share its gradient
        equally.

    Raises:
        ValueError: an argument is out of range, or shapes do not match.
        TypeError: an argument or a tensor is of the wrong type.
        IndexError: a class index on the CPU is neither in [0, C) nor ``ignore_index``. On a GPU, where looking would
            mean waiting, the compiled backends give such a token a loss and a gradient of NaN; with the environment
            variable ``PRSL_CHECK_TARGETS=1`` an assertion on the device fails.
        RuntimeError: the backend asked for cannot run, or a transform does not suit ``inplace_backward``.
    """
    check_options(k, b, space, distance, ignore_index, reduction, label_smoothing, backend)
    check_selection(top_p, max_k, inplace_backward, backend)
    if backend in UNAVAILABLE:
        raise RuntimeError(f"backend={backend!r} cannot run: {UNAVAILABLE[backend]}")
    check_input(input, k if top_p is None else None, b)
    target = check_target(input, target, ignore_index)
    check_weight(weight, input)
    kernels = BACKENDS[resolve_backend(backend, input, target, weight)]
    inplace = inplace_backward and inplace_applies(input, target, weight)

    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    dtype = torch.promote_types(input.dtype, torch.float32)
    if weight is not None:
        weight = weight.to(dtype)
    if target.is_floating_point():
        target = target.to(torch.promote_types(target.dtype, dtype)).movedim(1, -1)
    logits = input.movedim(1, -1)
    options = (0 if b == 0 else int(k), space, distance, int(ignore_index), float(label_smoothing))
    if top_p is not None and b != 0:
        terms = eager.token_terms(
            logits,
            target,
            weight,
            k=int(k),
            space=space,
            distance=distance,
            ignore_index=int(ignore_index),
            label_smoothing=float(label_smoothing),
            top_p=float(top_p),
            max_k=None if max_k is None else int(max_k),
        )
    elif inplace:
        terms = InplaceTokenTerms.apply(logits, target, weight, kernels, *options)
    else:
        terms = kernels.token_terms(logits, target, weight, *options)
    cross_entropy, penalty = (x.squeeze(0) for x in terms) if single else terms
    if reduction != "none":
        total: Tensor | int = 1
        if reduction == "mean":
            total = total_of(token_weights(target, weight, ignore_index)).to(cross_entropy.dtype)
            total = total.where(total != 0, torch.nan)  # label smoothing has a share of its own: x/0, but F gives NaN
        cross_entropy, penalty = total_of(cross_entropy) / total, total_of(penalty) / total
    # Not "+ b * penalty": torch.func.jvp would return a float64 tangent.
    loss = torch.add(cross_entropy, penalty, alpha=float(b)) if b != 0 else cross_entropy
    return LossTerms(loss, cross_entropy.detach(), penalty.detach()) if return_terms else loss


def total_of(x: Tensor) -> Tensor:
    """The sum of all elements, in an order that does not depend on the number of threads."""
    # ATen sums fewer than this in one thread, and more in a part per thread (at::internal::GRAIN_SIZE).
    serial = 1 << 15
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < serial:
        return x.sum()
    return total_of(torch.stack([part.sum() for part in x.flatten().split(serial - 1)]))


def token_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How often each token counts in a mean, (...): for (...) class indices or (..., C) class probabilities."""
    if target.is_floating_point():
        return target.new_ones(target.shape[:-1])
    counted = target != ignore_index
    if weight is None:
        return counted
    # Clamped, since on a GPU nobody has looked at the targets; the loss of one outside is NaN anyway. And not times
    # "counted": an infinite weight of class 0, which stands in for ignored tokens, would give NaN.
    return weight[target.where(counted, 0).clamp(0, len(weight) - 1)].where(counted, 0)


def resolve_backend(backend: str, input: Tensor, target: Tensor, weight: Tensor | None) -> str:
    """The name of the backend to run; RuntimeError with the reason where the one asked for cannot run the input."""
    if backend == "auto":
        return next(name for name, kernels in BACKENDS.items() if kernels.refusal(input, target, weight) is None)
    refusal = BACKENDS[backend].refusal(input, target, weight)
    if refusal is not None:
        raise RuntimeError(f"backend={backend!r} cannot run this input: {refusal}; use backend='auto'")
    return backend


def check_options(
    k: int,
    b: float,
    space: str,
    distance: str,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> None:
    """Raise for an option that no input could make right."""
    for name, value, kind, word in (
        ("k", k, Integral, "an integer"),
        ("ignore_index", ignore_index, Integral, "an integer"),
        ("b", b, Real, "a number"),
        ("label_smoothing", label_smoothing, Real, "a number"),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be {word}, but is {value!r} ({type(value).__name__})")
    for name, text, choices in (
        ("space", space, get_args(Space)),
        ("distance", distance, get_args(Distance)),
        ("reduction", reduction, get_args(Reduction)),
        ("backend", backend, ("auto", *BACKENDS, *UNAVAILABLE)),
    ):
        if text not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {text!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}: it is the number of classes that are compared")
    if not -math.inf < b < math.inf:
        raise ValueError(f"b must be a finite number, but is {b}; b=0 is plain cross entropy")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, but is {ignore_index}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, but is {label_smoothing}")


def check_selection(top_p: float | None, max_k: int | None, inplace_backward: bool, backend: str) -> None:
    """Raise for a choice of K by share that no input could make right, or that does not go with other options."""
    if top_p is None:
        if max_k is not None:
            raise ValueError(f"max_k={max_k!r} limits top_p, which is None: give top_p too, or k for a fixed number")
        return
    if not isinstance(top_p, Real) or isinstance(top_p, bool):
        raise TypeError(f"top_p must be a number or None, but is {top_p!r} ({type(top_p).__name__})")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, but is {top_p}: it is a share; 1 takes every class")
    if max_k is not None:
        if not isinstance(max_k, Integral) or isinstance(max_k, bool):
            raise TypeError(f"max_k must be an integer or None, but is {max_k!r} ({type(max_k).__name__})")
        if max_k < 1:
            raise ValueError(f"max_k must be at least 1, but is {max_k}: use None for no limit")
    if backend not in ("auto", "eager"):
        raise RuntimeError(f"backend={backend!r} cannot run: top_p is computed by eager alone; use backend='auto'")
    if inplace_backward:
        raise ValueError(
            f"inplace_backward=True cannot be used with top_p={top_p}: use inplace_backward=False, or k in its place"
        )


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise for a sparse or nested tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
        raise TypeError(
            f"{name} must be a dense tensor, but is {kind}: convert it, with to_dense() or to_padded_tensor()"
        )


def check_input(input: Tensor, k: int | None, b: float, name: str = "input") -> None:
    """Raise for logits of a shape or dtype that cannot be, or with too few classes for k, where there is one."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, but is {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {DTYPES}, but has {input.dtype}: convert it first")
    check_layout(name, input)
    if input.dim() == 0:
        raise ValueError(f"{name} must have the shape (C,), (N, C) or (N, C, d1, ...), but has no dimension")
    if abs(b) > torch.finfo(torch.promote_types(input.dtype, torch.float32)).max:
        raise ValueError(f"b={b} is not finite in the dtype of the loss: choose a smaller b, or give float64 logits")
    classes = input.shape[min(1, input.dim() - 1)]
    if b != 0 and k is not None and k > classes - 1:
        raise ValueError(
            f"k must be between 1 and V - 1, but k={k} and V={classes} (the classes in dimension "
            f"{min(1, input.dim() - 1)} of {name} {tuple(input.shape)}): choose a smaller k, or b=0 for no penalty"
        )


def check_target(input: Tensor, target: Tensor, ignore_index: int, name: str = "input") -> Tensor:
    """The class indices as int64, or the class probabilities; raise where neither suits the input."""
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be a tensor of class indices or class probabilities, but is {type(target).__name__}"
        )
    check_layout("target", target)
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, but {name} on {input.device}: move one of them")
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"target {tuple(target.shape)} has the shape of {name}, so it must hold class probabilities in a "
                f"floating dtype, but has {target.dtype}: convert it, or give class indices without the class dimension"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} cannot be used with class probabilities as target: leave it out, or give "
                "class indices"
            )
        return target
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if input.dim() == 1 and target.shape == (1,):
        target = target.squeeze(0)  # accepted by F.cross_entropy too
    if target.shape != shape:
        raise ValueError(
            f"target must have the shape {tuple(shape)} for class indices, or {tuple(input.shape)} for class "
            f"probabilities, to go with {name} {tuple(input.shape)}, but has {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"target must hold class indices in torch.int64 or torch.uint8, but has {target.dtype}: convert it"
        )
    target = target.long()
    if input.device.type != "cpu" and not CHECK_TARGETS:
        return target
    classes = input.shape[min(1, input.dim() - 1)]
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if input.device.type != "cpu":
        torch._assert_async(~outside.any(), f"a target is neither in [0, {classes}) nor ignore_index={ignore_index}")
    elif eager.known(outside.any()):
        raise IndexError(
            f"Target {target[outside][0].item()} is out of bounds: class indices must be in [0, {classes}), or "
            f"ignore_index={ignore_index}"
        )
    return target


def check_weight(weight: Tensor | None, input: Tensor | None, name: str = "input") -> None:
    """Raise for a class weight of a wrong type, or one that does not suit the input, where there is one."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor with a number for each class, but is {type(weight).__name__}")
    check_layout("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must have a floating dtype, but has {weight.dtype}: convert it")
    if input is None:
        return
    classes = input.shape[min(1, input.dim() - 1)]
    if weight.shape != (classes,):
        raise ValueError(
            f"weight must have the shape ({classes},), a number for each class of {name} {tuple(input.shape)}, but has "
            f"{tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device}, but {name} on {input.device}: move one of them")


def inplace_applies(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether a backward can come that writes the gradient over the logits; raise where it could not."""
    remedy = "use inplace_backward=False"
    if target.is_floating_point():
        raise ValueError(f"inplace_backward=True cannot be used with class probabilities as target: {remedy}")
    if weight is not None and weight.requires_grad:
        raise ValueError(f"inplace_backward=True has no gradient for weight, which requires one: {remedy}")
    if torch.compiler.is_compiling():
        return False  # a compiler plans the memory itself, and could not refuse a second backward over the logits
    if input.is_neg():
        raise ValueError(
            f"inplace_backward=True cannot write to a negated view: call input.resolve_neg() first, or {remedy}"
        )
    if may_overlap(input):
        raise ValueError(
            "inplace_backward=True needs storage for every logit, but elements of input share theirs (it is expanded "
            f"or unfolded): {remedy}"
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"inplace_backward=True cannot run under the transforms of torch.func: {remedy}")
    return torch.is_grad_enabled() and input.requires_grad


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share storage: False where each dimension steps over all the smaller ones."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
