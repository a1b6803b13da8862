"""A small problem for `linear_prsl_cross_entropy`, and the same with whole logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prsl_kernels import linear_prsl_cross_entropy, prsl_cross_entropy

N, H, V = 23, 12, 61


class Problem:
    """Hidden states, a vocabulary matrix and a bias that require gradients, and targets, some of them ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = N, bias: bool = True) -> None:
        self.input = torch.randn(rows, H, dtype=torch.float64).to(dtype).requires_grad_()
        self.matrix = torch.randn(V, H, dtype=torch.float64).to(dtype).requires_grad_()
        self.bias = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        self.target = torch.randint(V, (rows,))
        self.target[1::7] = -100

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.input, self.matrix, self.bias) if x is not None and x.requires_grad]

    def linear(self, **options: Any) -> Any:
        return linear_prsl_cross_entropy(self.input, self.matrix, self.target, linear_bias=self.bias, **options)

    def whole(self, weight: Tensor | None = None, **options: Any) -> Any:
        return prsl_cross_entropy(F.linear(self.input, self.matrix, self.bias), self.target, weight, **options)

    def double(self) -> Problem:
        other = Problem.__new__(Problem)
        other.input, other.matrix = (x.detach().double().requires_grad_() for x in (self.input, self.matrix))
        other.bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        other.target = self.target
        return other


def budget(rows: int, dtype: torch.dtype, backend: str = "native") -> int:
    """For chunks of so many rows."""
    return rows * V * (dtype.itemsize + (24 if backend == "eager" else 0))


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())
