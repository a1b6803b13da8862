"""The Hugging Face Trainer with this experiment's order of data, evaluation, log and progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prsl_kernels.experiments.config import FinetuneConfig
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.training.batches import BatchMaker, Draw
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.trainable import load_weights, save_weights
from prsl_kernels.huggingface import PRSLHandle


def training_arguments(config: FinetuneConfig, folder: Path, *, seed: int, device: str) -> TrainingArguments:
    """AdamW, linear warm-up and linear decay to zero, gradient norm clipped at 1; a checkpoint at every evaluation.

    Raises:
        UserError: a device that the Trainer would not use.
    """
    kind, _, index = device.partition(":")
    if index not in ("", "0"):
        raise UserError(
            f"device {device!r}: the Trainer takes the first one that it sees; use CUDA_VISIBLE_DEVICES={index} and "
            f"device {kind!r}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        bf16=config.bf16,
        logging_strategy="steps",
        logging_steps=config.log_every,
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_strategy="steps",
        save_steps=config.evaluate_every,
        save_total_limit=1,  # and the best one, which is never deleted
        metric_for_best_model="eval_cross_entropy",
        greater_is_better=False,
        seed=seed,
        use_cpu=kind == "cpu",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    if arguments.device.type != kind:
        raise UserError(f"device {device!r} is not there; torch offers {arguments.device.type!r}")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would make it nn.DataParallel
    return arguments


class ArmTrainer(Trainer):
    """Trains one arm; `state.log_history`, which checkpoints carry, holds one row per logged step.

    Args:
        draws: what to train on, in this order.
        batches: makes the model's inputs from draws.
        handle: of `ArmLoss.apply` on the model.
        measure: of the arm.
        selection: batches of the selection split.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        *,
        draws: Sequence[Draw],
        batches: BatchMaker,
        handle: PRSLHandle,
        measure: Measure,
        selection: Sequence[Batch],
        description: str,
    ) -> None:
        self.handle = handle
        self.measure = measure
        self.selection = selection
        self._make = batches
        self._sums: list[Tensor] = []
        self._last: Sequence[Draw] = ()
        self._micro_batch = 0
        super().__init__(
            model,
            arguments,
            data_collator=self._collate,
            train_dataset=draws,
            eval_dataset=draws,  # asked for, but `evaluate` below has its own
            callbacks=[_Boundaries(), _Progress(description)],
        )
        # They write to stdout, which is for results.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def _collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        return {**self._make(draws), "draws": draws}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores what is trained on resuming, all of it.

        The Trainer's own method loads with `strict=False`, which passes over other names in silence, such as those
        that a ViT had in older versions and is saved under: the encoder would start again from the base.
        """
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes what is trained, and not the rest of a large model at every checkpoint again."""
        if self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; remembers it, and the two terms of its loss, for the log."""
        self._last = inputs.pop("draws")
        # Dropout depends on the seed and the micro-batch alone: not on the arm, nor on an interruption.
        steps = self.args.gradient_accumulation_steps
        torch.manual_seed(self.args.seed * 1_000_003 + self.state.global_step * steps + self._micro_batch % steps)
        self._micro_batch += 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        terms = self.handle.last_terms
        assert terms is not None
        self._sums.append(torch.stack([terms.loss, terms.cross_entropy, terms.penalty]))
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Replaces the Trainer's row of the training loss by the loss and its terms, as means since the last row."""
        if "loss" in logs and self._sums:
            steps = len(self._sums) / self.args.gradient_accumulation_steps
            loss, cross_entropy, penalty = (torch.stack(self._sums).sum(0) / steps).tolist()
            self._sums = []
            logs |= {"loss": loss, "cross_entropy": cross_entropy, "penalty": penalty if self.handle.b else None}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The two terms on the selection split, and the ratio of their gradients on the last training batch."""
        cross_entropy, penalty = self.measure.terms(self.selection)
        row: dict[str, Any] = {"eval_cross_entropy": cross_entropy, "eval_penalty": penalty}
        if self._last:
            batch = Batch(self._make.pixels([example for example, _ in self._last]), self._make.text(self._last))
            if self.handle.b:
                row["gradient_ratio"] = abs(self.handle.b) * self.measure.unit_ratio(batch)
            else:  # cross entropy has a penalty, too, only not in its loss: without it there is nothing to compare
                row |= {"gradient_ratio": 0.0, "penalty": self.measure.terms([batch])[1]}
        self.log(row)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row


class _Boundaries(TrainerCallback):
    """Evaluates and saves at the last step, and logs wherever a checkpoint is made: a row never spans two sessions."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if control.should_save:
            control.should_log = True
        return control


class _Progress(TrainerCallback):
    """A bar of optimisation steps on stderr."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._steps: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps = iter(track(range(state.global_step, state.max_steps), self._description))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._steps, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._steps, None)
