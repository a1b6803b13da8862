"""The losses that PRSL is compared with, in plain differentiable PyTorch, and every arm's loss in one form.

A loss is cross entropy (CE) plus a weight times a penalty, for N supervised tokens with logits z and target y:

    prsl      mean CE + b * mean d                                              `prsl_kernels.prsl_cross_entropy`
    drsl      mean CE + b * mean over tokens of the sum of (z_j - mean z)^2 over the classes j other than y
    released  mean CE + b * (-sum over tokens n of log_softmax(m)_n), m_n the mean of the k largest z_j other than z_y
    rescaled  mean CE of z / temperature, with label smoothing, which is mean CE + 1 * (that - mean CE)

`drsl` is Wang, Wang, "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363. There is one
sum of squares for each token, and the mean over tokens is taken as that of CE, so that b means the same for every size
and division of a batch.

`released` is what the code that was published with PRSL (arXiv:2402.03627) computes, written from a description of
it: from logits, with ranks [0, k) for the description's [start, end), and with a softmax over the *tokens* of the
batch. Its penalty is about N log N, beside a CE that is a mean, so that b depends on the size of the batch; a single
token has none; and since every token's share depends on all the others, micro-batches cannot make it up.

Label smoothing is torch's: the target's share is 1 - s, and s is spread over all classes. A model that was trained at a
temperature generates, and is attacked, with its logits as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prsl_kernels import apply_prsl, prsl_cross_entropy
from prsl_kernels.experiments.config import ArmConfig, FinetuneConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.functional import LossTerms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prsl_kernels.huggingface import PRSLHandle


def check_loss(arm: ArmConfig, config: FinetuneConfig) -> None:
    """Raises a `UserError` for an arm whose loss the optimisation cannot compute."""
    if arm.loss == "released" and arm.b != 0 and config.gradient_accumulation > 1:
        raise UserError(
            f"arm {arm.name!r}: gradient_accumulation is {config.gradient_accumulation}, but the softmax of the loss "
            f"'released' runs over the tokens of the whole batch, which micro-batches do not see; set "
            f"gradient_accumulation: 1 and batch_size: {config.batch_size * config.gradient_accumulation}, or leave "
            "the arm out"
        )


class ArmLoss:
    """The loss of one arm, as a function of logits and in a model.

    Raises:
        UserError: the penalty compares k classes beside the target, and the vocabulary has fewer.
    """

    def __init__(self, arm: ArmConfig, vocab_size: int) -> None:
        if arm.b != 0 and arm.loss != "drsl" and arm.k >= vocab_size:
            raise UserError(f"arm {arm.name!r}: k is {arm.k}; the base's vocabulary allows 1 to {vocab_size - 1}")
        self._arm = arm
        # The cross-entropy arm may carry a k that the penalty could not have; its penalty is only looked at.
        self._k = min(arm.k, vocab_size - 1)
        self._rescaled = arm.b == 0 and not arm.is_cross_entropy

    def weight(self, b: float) -> float:
        """What the penalty is multiplied with in the loss: the arm's b, and 1 for a rescaled cross entropy."""
        return 1.0 if self._rescaled else b

    def apply(self, model: PreTrainedModel, b: float) -> PRSLHandle:
        """Puts the loss into a model, as `apply_prsl` does; the handle's `b` is the `weight`."""
        arm = self._arm
        handle = apply_prsl(model, k=self._k, b=self.weight(b), space=arm.space, distance=arm.distance)
        if self._rescaled or (arm.loss != "prsl" and not arm.is_cross_entropy):
            handle._terms = self._of_handle
        return handle

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        b: float,
        reduction: Literal["mean", "sum"] = "mean",
        ignore_index: int = -100,
    ) -> LossTerms:
        """The loss, CE and the penalty of logits (N, V) and targets (N,) int64; the last two are detached.

        `b` is the penalty's `weight`: with 0 the loss is CE, and with 1 that of a rescaled cross entropy. Terms are
        float32, and float64 for float64 logits. "sum" is "mean" times the number of supervised tokens, for the penalty
        of `released` too, which is no mean. Without a supervised token means are NaN, as CE's in torch, and sums 0.
        """
        arm = self._arm
        if arm.loss == "prsl" and not self._rescaled:
            return prsl_cross_entropy(
                logits,
                target,
                k=self._k,
                b=b,
                space=arm.space,
                distance=arm.distance,
                ignore_index=ignore_index,
                reduction=reduction,
                return_terms=True,
            )
        kept = target != ignore_index
        logits, target = logits[kept], target[kept]  # before any arithmetic: ignored logits may be anything
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy = F.cross_entropy(logits, target, reduction="sum")
        if self._rescaled:
            rescaled = F.cross_entropy(
                logits / arm.temperature, target, reduction="sum", label_smoothing=arm.label_smoothing
            )
            penalty = rescaled - cross_entropy
            if b != 0:  # by itself, without the rounding of a difference that is added again
                loss = rescaled if b == 1 else torch.add(cross_entropy, penalty, alpha=b)
        else:
            if arm.loss == "drsl":
                penalty = drsl_deviation(logits, target).sum()
            else:
                penalty = released_penalty(logits, target, self._k) * len(target)
            if b != 0:
                loss = torch.add(cross_entropy, penalty, alpha=b)
        if reduction == "mean":
            loss, cross_entropy, penalty = loss / len(target), cross_entropy / len(target), penalty / len(target)
        return LossTerms(loss, cross_entropy.detach(), penalty.detach())

    def _of_handle(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        b: float,
        reduction: Literal["mean", "sum"],
        ignore_index: int,
        **_of_prsl: Any,
    ) -> LossTerms:
        """`terms` with the keywords with which a model's forward calls `prsl_cross_entropy`."""
        return self.terms(logits, target, b=b, reduction=reduction, ignore_index=ignore_index)


def drsl_deviation(logits: Tensor, target: Tensor) -> Tensor:
    """The sum of squared deviations of the other classes' logits from their mean, (N,), of (N, V) and (N,).

    It is infinite, and without a gradient, where another class has the logit -inf.
    """
    index = target.unsqueeze(-1)
    others = logits.scatter(-1, index, 0)
    infinite = (others == -torch.inf).any(-1)
    others = others.masked_fill(infinite.unsqueeze(-1), 0)
    mean = others.sum(-1, keepdim=True) / max(1, logits.shape[-1] - 1)
    # Two passes: a mean of squares less a squared mean would cancel where logits are far from 0.
    return (others - mean).scatter(-1, index, 0).square().sum(-1).masked_fill(infinite, torch.inf)


def released_penalty(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """-sum_n log_softmax(m)_n, a scalar, of logits (N, V) and targets (N,), none of them ignored.

    m_n is the mean of the k largest logits of token n without its target's, and the softmax runs over the N tokens.
    Classes that are tied for the k-th place are chosen as `torch.topk` does. A token with fewer than k other classes of
    a logit above -inf makes the penalty infinite.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"k must be between 1 and V - 1, but k={k} and V={logits.shape[-1]}")
    m = logits.scatter(-1, target.unsqueeze(-1), -torch.inf).topk(k).values.mean(-1)
    return -m.log_softmax(0).sum()
