"""The loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .eager import Distance, Space
from .functional import LossTerms, Reduction, check_options, check_selection, check_weight, prsl_cross_entropy


class PRSLoss(nn.Module):
    """Cross entropy with the partially recentralized softmax penalty, as a module.

    The arguments are those of :func:`prsl_kernels.prsl_cross_entropy`, with ``top_p`` and ``max_k`` at the end;
    ``weight`` is a buffer, so it moves with the module. Options out of range raise here already; what depends on the
    input (k against the number of classes, shapes, dtypes) raises in the call.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        k: int = 20,
        b: float = 1e-4,
        space: Space = "prob",
        distance: Distance = "l2",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        inplace_backward: bool = False,
        return_terms: bool = False,
        backend: str = "auto",
        top_p: float | None = None,
        max_k: int | None = None,
    ) -> None:
        super().__init__()
        check_options(k, b, space, distance, ignore_index, reduction, label_smoothing, backend)
        check_selection(top_p, max_k, inplace_backward, backend)
        if weight is not None:
            check_weight(weight, None)
        self.register_buffer("weight", weight)
        self.k = k
        self.b = b
        self.space: Space = space
        self.distance: Distance = distance
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.inplace_backward = inplace_backward
        self.return_terms = return_terms
        self.backend = backend
        self.top_p = top_p
        self.max_k = max_k

    def forward(self, input: Tensor, target: Tensor) -> Tensor | LossTerms:
        """The loss of logits (N, C), (C,) or (N, C, d1, ...) against class indices or class probabilities."""
        return prsl_cross_entropy(
            input,
            target,
            self.weight,
            k=self.k,
            b=self.b,
            space=self.space,
            distance=self.distance,
            top_p=self.top_p,
            max_k=self.max_k,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            return_terms=self.return_terms,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        selection = f"k={self.k}" if self.top_p is None else f"top_p={self.top_p:g}, max_k={self.max_k}"
        return (
            f"{selection}, b={self.b:g}, space={self.space!r}, distance={self.distance!r}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing:g}, backend={self.backend!r}"
        )
