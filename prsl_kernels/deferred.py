"""Logits that a model's training forward does not compute: an output layer that hands on its input instead.

In training, the patched layer returns a :class:`DeferredLogits` in place of the logits. The model passes it on to its
loss, which asks the layer again, now for the loss. The layer's own forward computes it, so that whoever gathers the
layer's parameters around a forward (FSDP, DeepSpeed's ZeRO-3, hooks that move a layer to its device) does so here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .functional import LossTerms
from .linear import linear_prsl_cross_entropy


class LogitsNotComputedError(AttributeError):
    """Somebody asked for logits that were not computed."""

    # An AttributeError, so that hasattr(logits, "dtype") says no instead of failing: accelerate asks so.


class DeferredLogits:
    """Stands where logits (B, T, V) would be. Holds the hidden states (B, T, H) that they would be computed from.

    It can be sliced along B and T, moved and made contiguous, as models do before they compute their loss. Anything
    else raises :class:`LogitsNotComputedError`.
    """

    __slots__ = ("_head", "_hidden")

    def __init__(self, head: nn.Module, hidden: Tensor) -> None:
        self._head, self._hidden = head, hidden

    def loss(self, target: Tensor, options: dict[str, Any]) -> LossTerms:
        """The terms of the loss against class indices (B, T), or as many in another shape."""
        return self._head(_Request(self._hidden.flatten(0, -2), target.flatten(), options))

    @property
    def device(self) -> torch.device:
        """That of the hidden states, and of the logits if there were any."""
        return self._hidden.device

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """On another device; another dtype is refused."""
        if any(isinstance(x, torch.dtype | Tensor) for x in (*args, *kwargs.values())):
            _refuse(".to() another dtype")
        return DeferredLogits(self._head, self._hidden.to(*args, **kwargs))

    def contiguous(self) -> DeferredLogits:
        """Itself."""
        return self

    def __getitem__(self, index: Any) -> DeferredLogits:
        parts = list(index) if isinstance(index, tuple) else [index]
        dim = self._hidden.dim()
        for at in (at for at, part in enumerate(parts) if part is Ellipsis):
            parts[at : at + 1] = [slice(None)] * (dim - len(parts) + 1)
            break
        whole_rows = parts[dim - 1 :] in ([], [slice(None)])
        if not whole_rows or not all(isinstance(part, slice) for part in parts):
            _refuse("an index that is no slice of tokens")
        return DeferredLogits(self._head, self._hidden[tuple(parts[: dim - 1])])

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    def __repr__(self) -> str:
        return f"DeferredLogits(from hidden states {tuple(self._hidden.shape)})"


def _refuse(what: str) -> NoReturn:
    raise LogitsNotComputedError(
        f"{what} needs the logits, but with apply_prsl(..., fused_linear=True) a forward in training computes the loss "
        "without them: call the model with model.eval() or under torch.no_grad(), where there are logits; or use "
        "fused_linear=False, also where the model itself changes its logits before the loss (scales or caps them)"
    )


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: DeferredLogits, *_: Any) -> NoReturn:
        _refuse(name)

    return method


# Python looks these up in the class, past __getattr__.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "matmul", "rmatmul", "and", "rand", "or", "ror", "xor", "rxor", "neg", "abs", "invert", "round"),
    *("lt", "le", "gt", "ge", "eq", "ne", "bool", "len", "iter", "contains", "array", "float", "int", "index"),
    "setitem",
):
    setattr(DeferredLogits, f"__{_name}__", _refusing(f"__{_name}__"))


class _Request(NamedTuple):
    """The input that asks a patched layer for the loss; hooks on the layer see a tuple."""

    hidden: Tensor  # (N, H)
    target: Tensor  # (N,)
    options: dict[str, Any]


def defer_logits(head: nn.Module, active: Callable[[], bool]) -> Callable[[nn.Module], None]:
    """Let a linear layer defer its logits in training, as long as ``active``; returns what undoes that for a layer."""
    base = type(head)

    def forward(self: Any, input: Any) -> Any:
        if not isinstance(input, Tensor | _Request):
            raise TypeError(
                f"the output layer got {type(input).__name__} in place of hidden states: with "
                "apply_prsl(..., fused_linear=True) no forward pre-hook may change its input; use fused_linear=False"
            )
        if isinstance(input, _Request):
            return linear_prsl_cross_entropy(
                input.hidden, self.weight, input.target, linear_bias=self.bias, return_terms=True, **input.options
            )
        # Without gradients nobody trains: generate() wants logits, in training mode, too.
        if active() and self.training and torch.is_grad_enabled():
            return DeferredLogits(self, input)
        return base.forward(self, input)

    # The class and not the instance's `forward`, which would stay bound to the original in copies of the model.
    patched = type(
        base.__name__,
        (base,),
        {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__},
    )
    head.__class__ = patched

    def restore(head: nn.Module) -> None:
        if type(head) is patched:
            head.__class__ = base

    return restore
