"""What is raced: PRSL in its variants, cross entropy, and the copies of the logits that are the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prsl_kernels import prsl_cross_entropy

UPSTREAM = 0.37  # what every backward is called with: training never calls it with 1
B = 1e-4

Step = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Contender:
    """Something to race: ``prepare`` takes logits (N, V), target (N,) and k, and returns one step."""

    what: str
    prepare: Callable[[Tensor, Tensor, int], Step]
    prsl: bool = True  # the step returns the loss, which must be that of the others
    native: bool = False  # needs the compiled extension
    may_fail: bool = False  # needs tools that a machine may lack
    float32_copies: float = 0  # of the logits, at its peak: leave it out where memory would not do
    asked_for: bool = False  # raced only if --contenders names it


def naive_prsl(logits: Tensor, target: Tensor, k: int, b: float = B) -> Tensor:
    """PRSL as one would write it from the paper's equations, for logits (N, V) and class indices (N,)."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    others = log_p.exp().scatter(-1, target.unsqueeze(-1), -torch.inf)
    top = others.topk(k, dim=-1).values
    distance = torch.linalg.vector_norm(top - top[:, -1:], dim=-1)
    return F.nll_loss(log_p, target) + b * distance.mean()


def training_step(loss_of: Callable[[Tensor, Tensor, int], Tensor], logits: Tensor, target: Tensor, k: int) -> Step:
    """Forward, backward, and the gradient given back."""

    def step() -> Tensor:
        loss = loss_of(logits, target, k)
        loss.backward(torch.full_like(loss, UPSTREAM))
        logits.grad = None
        return loss.detach()

    return step


def _prsl(backend: str, *, inplace: bool = False) -> Callable[[Tensor, Tensor, int], Step]:
    def loss_of(logits: Tensor, target: Tensor, k: int) -> Tensor:
        return prsl_cross_entropy(logits, target, k=k, b=B, backend=backend, inplace_backward=inplace)

    return lambda logits, target, k: training_step(loss_of, logits, target, k)


def _forward(logits: Tensor, target: Tensor, k: int) -> Step:
    @torch.no_grad()
    def step() -> Tensor:
        return prsl_cross_entropy(logits, target, k=k, b=B, backend="native")

    return step


def _compiled(logits: Tensor, target: Tensor, k: int) -> Step:
    # After a few configurations the compiler would take the next one for a reason to stop compiling.
    torch.compiler.reset()
    return training_step(torch.compile(naive_prsl, fullgraph=True, dynamic=False), logits, target, k)


def _cross_entropy(logits: Tensor, target: Tensor, k: int) -> Step:
    return training_step(lambda logits, target, k: F.cross_entropy(logits, target), logits, target, k)


def _clone(logits: Tensor, target: Tensor, k: int) -> Step:
    source = logits.detach()

    def step() -> None:
        source.clone()

    return step


def _copy(logits: Tensor, target: Tensor, k: int) -> Step:
    source, buffer = logits.detach(), logits.detach().clone()

    def step() -> None:
        buffer.copy_(source)

    return step


def _naive(logits: Tensor, target: Tensor, k: int) -> Step:
    return training_step(naive_prsl, logits, target, k)


CONTENDERS: dict[str, Contender] = {
    "prsl": Contender("this kernel, a gradient of its own", _prsl("native"), native=True, float32_copies=1),
    "prsl-inplace": Contender(
        "this kernel, the gradient in the logits' storage", _prsl("native", inplace=True), native=True
    ),
    "prsl-forward": Contender("this kernel, the loss alone", _forward, native=True),
    "cross-entropy": Contender("F.cross_entropy", _cross_entropy, prsl=False, float32_copies=3),
    "naive": Contender("PRSL in plain PyTorch", _naive, float32_copies=5),
    "naive-compiled": Contender("torch.compile of it", _compiled, may_fail=True, float32_copies=3),
    "clone": Contender("logits.clone()", _clone, prsl=False, float32_copies=1),
    "copy": Contender("copy_() into an existing buffer", _copy, prsl=False, float32_copies=1),
    "eager": Contender("this library in plain PyTorch", _prsl("eager"), float32_copies=7, asked_for=True),
}


def native_unavailable() -> str | None:
    """Why the compiled extension cannot run here, or None."""
    try:
        prsl_cross_entropy(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), k=1, backend="native")
    except RuntimeError as error:
        return str(error)
    return None
