"""The Hugging Face Trainer with this experiment's order of data, evaluation, log and progress.

Several ranks share the micro-batches of an optimisation step: micro-batch j of rank r is the step's j * world + r, as
accelerate deals them out. Each is what it would be in one process, its dropout included, so that the sum of their
gradients, and what is learnt, differs by the order of summation alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import FinetuneConfig
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.training.batches import BatchMaker, Draw, Draws
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.trainable import load_weights, save_weights
from prsl_kernels.huggingface import PRSLHandle


def training_arguments(
    config: FinetuneConfig, folder: Path, *, seed: int, device: str, description: str
) -> TrainingArguments:
    """AdamW, linear warm-up and linear decay to zero, gradient norm clipped at 1; a checkpoint at every evaluation.

    `description` is the run's name for trackers.

    Raises:
        UserError: a tracker that is not installed, a device that the Trainer would not use, micro-batches that the
            ranks cannot share, or a sharded model (FSDP) where there is none.
    """
    kind, _, index = device.partition(":")
    if index not in ("", "0" if ranks.world() == 1 else str(ranks.local_rank())):
        raise UserError(
            f"device {device!r}: the Trainer takes the first one that it sees; use CUDA_VISIBLE_DEVICES={index} and "
            f"device {kind!r}"
        )
    check_trackers(config, "finetune.report_to")
    steps = ranks.micro_batches(config.gradient_accumulation)
    ranks.start_group(kind)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=steps,
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
        ddp_find_unused_parameters=True,  # in case a checkpoint has parts that nothing uses
        report_to=list(config.report_to),
        run_name=description,
        disable_tqdm=True,
    )
    if arguments.device.type != kind:
        raise UserError(f"device {device!r} is not there; torch offers {arguments.device.type!r}")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would make it nn.DataParallel
    if is_sharded():
        state: Any = arguments.distributed_state
        if state.distributed_type == DistributedType.MULTI_CPU:
            raise UserError("FSDP is asked for, but accelerate shards models on GPUs alone; leave --use_fsdp out")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP is asked for in its first version, which torch is giving up; add --fsdp_version 2")
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # a checkpoint is a model that anybody can load
    return arguments


def check_trackers(config: FinetuneConfig, name: str) -> None:
    """Refuses (`UserError`) trackers that are not installed; `name` is that of the option."""
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"{name}: {tracker} is not installed; `pip install {tracker}`, or leave it out")


def is_sharded() -> bool:
    """Whether `accelerate launch` asks for a model that is split over the ranks (FSDP)."""
    return "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


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
        draws: Draws,
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
        self._draws = draws
        self._terms: list[Tensor] = []
        self._micro_batch = 0
        self._accumulation = arguments.gradient_accumulation_steps * ranks.world()
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
        return self._make(draws)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores what is trained on resuming, all of it.

        The Trainer's own method loads with `strict=False`, which passes over other names in silence, such as those
        that a ViT had in older versions and is saved under: the encoder would start again from the base. A sharded
        model comes from what FSDP wrote beside, under its own names.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes what is trained, and not the rest of a large model at every checkpoint again."""
        if self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; remembers the two terms of its loss for the log."""
        # Dropout depends on the seed and the micro-batch alone: not on the arm, an interruption, or the rank.
        place = self._micro_batch % self.args.gradient_accumulation_steps * ranks.world() + ranks.rank()
        torch.manual_seed(self.args.seed * 1_000_003 + self.state.global_step * self._accumulation + place)
        self._micro_batch += 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        terms = self.handle.last_terms
        assert terms is not None
        self._terms.append(torch.stack([terms.loss, terms.cross_entropy, terms.penalty]))
        return loss

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: no micro-batch draws from what the one before left, so that any number of ranks can go on."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing was saved."""

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Replaces the Trainer's row of the training loss by the loss and its terms, as means since the last row."""
        if "loss" in logs and self._terms:
            found = torch.tensor(ranks.gather(torch.stack(self._terms).tolist()))
            found = found.transpose(0, 1).flatten(0, 1)  # in the order of one process
            loss, cross_entropy, penalty = (found.sum(0) / (len(found) / self._accumulation)).tolist()
            self._terms = []
            logs |= {"loss": loss, "cross_entropy": cross_entropy, "penalty": penalty if self.handle.b else None}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The two terms on the selection split, and the ratio of their gradients on the step's last micro-batch.

        No rank has the whole gradient of a sharded model, so that one has no ratio. All ranks compute, and take what
        rank 0 found: they must agree on the checkpoint that is kept.
        """
        cross_entropy, penalty = self.measure.terms(self.selection)
        row: dict[str, Any] = {"eval_cross_entropy": cross_entropy, "eval_penalty": penalty}
        size = self.args.per_device_train_batch_size
        end = self.state.global_step * self._accumulation * size
        last = self._draws[end - size : end]
        batch = Batch(self._make.pixels([example for example, _ in last]), self._make.text(last))
        if not self.handle.b:
            # Cross entropy has a penalty, too, only not in its loss: without it there is nothing to compare
            row |= {"gradient_ratio": 0.0, "penalty": self.measure.terms([batch])[1]}
        elif not self.is_fsdp_enabled:
            row["gradient_ratio"] = abs(self.handle.b) * self.measure.unit_ratio(batch)
        row = ranks.share(row)
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
