"""What is measured of a model beside its training loss: the two terms on a split, and the ratio of their gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prsl_kernels import prsl_cross_entropy
from prsl_kernels.experiments.config import ArmConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.functional import LossTerms


@dataclass(frozen=True)
class Batch:
    """Images (N, 3, size, size) in [0, 1] and what `VisionLanguageModel.encode` made of their texts."""

    pixels: Tensor
    text: dict[str, Tensor]


class Measure:
    """Measures a model under an arm's penalty, in evaluation mode and without touching the generator of dropout.

    Terms and gradients come from logits, not from `model.loss`, and are in the precision of the training: with `bf16`
    the forward runs under autocast.
    """

    def __init__(self, vlm: VisionLanguageModel, arm: ArmConfig, *, bf16: bool) -> None:
        self._vlm, self._arm, self._bf16 = vlm, arm, bf16
        # The cross-entropy arm may carry a k that the penalty could not have; its penalty is only looked at.
        self._k = min(arm.k, vlm.vocab_size - 1)

    def terms(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Cross entropy and penalty d, each the mean over all supervised tokens of all batches."""
        cross_entropy = penalty = 0.0
        tokens = 0
        with self._evaluating(), torch.no_grad():
            for batch in batches:
                logits, target = self._logits(batch)
                terms = self._loss(logits, target, b=1.0, reduction="sum")
                cross_entropy += terms.cross_entropy.item()
                penalty += terms.penalty.item()
                tokens += int((target != -100).sum())
        return cross_entropy / tokens, penalty / tokens

    def unit_ratio(self, batch: Batch) -> float:
        """||grad of d|| / ||grad of cross entropy||: Euclidean norms over all trainable parameters together.

        Both terms are means over the batch's supervised tokens, so that `b` times this is the ratio of what the two
        contribute to the gradient of the training loss, and linear in `b` for given weights.
        """
        parameters = [parameter for parameter in self._vlm.parameters() if parameter.requires_grad]
        with self._evaluating(), torch.enable_grad():
            logits, target = self._logits(batch)
            # One pass through the loss for each term and one through the model for each: the graph is shared.
            leaf = logits.detach().float().requires_grad_()
            plain = self._loss(leaf, target, b=0.0).loss
            penalised = self._loss(leaf, target, b=1.0).loss
            norms: list[float] = []
            for term in (penalised - plain, plain):
                (upstream,) = torch.autograd.grad(term, leaf, retain_graph=True)
                gradients = torch.autograd.grad(
                    logits, parameters, upstream.to(logits.dtype), retain_graph=not norms, allow_unused=True
                )
                norms.append(torch.nn.utils.get_total_norm([g.float() for g in gradients if g is not None]).item())
        penalty, cross_entropy = norms
        return penalty / cross_entropy if cross_entropy > 0 else math.nan

    def calibrate(self, batches: Sequence[Batch]) -> tuple[float, list[float]]:
        """The arm's weight b, and the `unit_ratio` of every batch at the present weights.

        Where the arm asks for a ratio of the gradient norms, b is that ratio divided by the median over the batches.

        Raises:
            UserError: the penalty has no gradient, so that no b reaches the ratio.
        """
        arm = self._arm
        if arm.b == 0:
            return 0.0, []
        ratios = [self.unit_ratio(batch) for batch in batches]
        if arm.gradient_ratio is None:
            assert arm.b is not None
            return arm.b, ratios
        median = statistics.median(ratios)
        if not (math.isfinite(median) and median > 0):
            raise UserError(
                f"arm {arm.name!r}: gradient_ratio {arm.gradient_ratio} cannot be reached, since the ratio of the "
                f"gradient norms at b=1 is {median} for k={arm.k}; choose k of 2 or more, or give b instead"
            )
        return arm.gradient_ratio / median, ratios

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._vlm.device.type, torch.bfloat16, enabled=self._bf16):
            logits, target = self._vlm.logits(batch.pixels, batch.text)
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)

    def _loss(
        self, logits: Tensor, target: Tensor, *, b: float, reduction: Literal["mean", "sum"] = "mean"
    ) -> LossTerms:
        arm = self._arm
        return prsl_cross_entropy(
            logits,
            target,
            k=self._k,
            b=b,
            space=arm.space,
            distance=arm.distance,
            reduction=reduction,
            return_terms=True,
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self._vlm.model.training
        self._vlm.eval()
        try:
            yield
        finally:
            self._vlm.train(training)
