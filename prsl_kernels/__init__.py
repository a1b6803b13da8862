"""Cross entropy with the partially recentralized softmax loss (PRSL) penalty, for PyTorch.

Importing this package needs torch alone: ``apply_prsl`` is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .functional import LossTerms, prsl_cross_entropy
from .linear import linear_prsl_cross_entropy
from .modules import PRSLoss
from .parallel import vocab_parallel_prsl_cross_entropy
from .version import __version__

if TYPE_CHECKING:
    from .huggingface import apply_prsl

__all__ = [
    "LossTerms",
    "PRSLoss",
    "__version__",
    "apply_prsl",
    "linear_prsl_cross_entropy",
    "prsl_cross_entropy",
    "vocab_parallel_prsl_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name == "apply_prsl":
        from .huggingface import apply_prsl

        return apply_prsl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
