"""What is measured of a model beside its training loss: its two terms on a split, and the ratio of their gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prsl_kernels.experiments.config import ArmConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.training.baselines import ArmLoss
from prsl_kernels.experiments.training.trainable import recomputes_activations


@dataclass(frozen=True)
class Batch:
    """Images (N, 3, size, size) in [0, 1] and what `VisionLanguageModel.encode` made of their texts."""

    pixels: Tensor
    text: dict[str, Tensor]


class Measure:
    """Measures a model under an arm's penalty, in evaluation mode and without touching the generator of dropout.

    Terms and gradients come from logits, not from `model.loss`, and are in the precision of the training: with `bf16`
    the forward runs under autocast. Cross entropy is the plain one in every arm; the penalty is the arm's own, and what
    the loss exceeds cross entropy by where that is smoothed or has a temperature.

    Attributes:
        loss: of the arm.

    Raises:
        UserError: a k that the vocabulary does not allow.
    """

    def __init__(self, vlm: VisionLanguageModel, arm: ArmConfig, *, bf16: bool) -> None:
        self._vlm, self._arm, self._bf16 = vlm, arm, bf16
        self.loss = ArmLoss(arm, vlm.vocab_size)

    def terms(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Cross entropy and penalty, each the mean over all supervised tokens of all batches.

        The penalty of `released` is one number for each batch, and grows with it; here it is the mean of the batches'
        numbers, each counted as often as the batch has tokens.
        """
        cross_entropy = penalty = 0.0
        tokens = 0
        with self._evaluating(), torch.no_grad():
            for batch in batches:
                logits, target = self._logits(batch)
                terms = self.loss.terms(logits, target, b=1.0, reduction="sum")
                cross_entropy += terms.cross_entropy.item()
                penalty += terms.penalty.item()
                tokens += int((target != -100).sum())
        return cross_entropy / tokens, penalty / tokens

    def unit_ratio(self, batch: Batch) -> float:
        """||grad of the penalty|| / ||grad of CE||: Euclidean norms over all trainable parameters together.

        Both terms are reduced over the batch as in the training loss, so that `b` times this is the ratio of what the
        two contribute to its gradient, and linear in `b` for given weights.
        """
        parameters = [parameter for parameter in self._vlm.parameters() if parameter.requires_grad]
        with self._evaluating(), torch.enable_grad(), self._keeping_the_graph():
            logits, target = self._logits(batch)
            # One pass through the loss for each term and one through the model for each: the graph is shared.
            leaf = logits.detach().float().requires_grad_()
            plain = self.loss.terms(leaf, target, b=0.0).loss
            penalised = self.loss.terms(leaf, target, b=1.0).loss
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
        """The arm's b, and the `unit_ratio` of every batch at the present weights, which cross entropy does without.

        Where the arm asks for a ratio of the gradient norms, b is that ratio divided by the median over the batches.

        Raises:
            UserError: the penalty has no gradient, so that no b reaches the ratio.
        """
        arm = self._arm
        if arm.is_cross_entropy:
            return 0.0, []
        ratios = [self.unit_ratio(batch) for batch in batches]
        if arm.gradient_ratio is None:
            assert arm.b is not None
            return arm.b, ratios
        median = statistics.median(ratios)
        if not (math.isfinite(median) and median > 0):
            remedy = f"for k={arm.k}; choose k of 2 or more, or give" if arm.loss == "prsl" else "; give"
            raise UserError(
                f"arm {arm.name!r}: gradient_ratio {arm.gradient_ratio} cannot be reached, since the ratio of the "
                f"gradient norms at b=1 is {median} {remedy} b instead"
            )
        return arm.gradient_ratio / median, ratios

    @contextmanager
    def _keeping_the_graph(self) -> Iterator[None]:
        """For a graph that is gone through twice, which a compiled one cannot be.

        Activations are computed anew in training mode alone: a GPU that needs that would not hold the whole graph.
        """
        offload = self._vlm.device.type != "cpu" and recomputes_activations(self._vlm.model)
        memory: AbstractContextManager[Any] = torch.autograd.graph.save_on_cpu() if offload else nullcontext()
        with torch.compiler.set_stance("force_eager"), memory:
            yield

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._vlm.device.type, torch.bfloat16, enabled=self._bf16):
            logits, target = self._vlm.logits(batch.pixels, batch.text)
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self._vlm.model.training
        self._vlm.eval()
        try:
            yield
        finally:
            self._vlm.train(training)
