"""`prsl finetune`: one arm from the base checkpoint to the selected model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import ArmConfig, DecodingConfig, FinetuneConfig, as_dict
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json, write_json, write_text
from prsl_kernels.experiments.training.baselines import check_loss
from prsl_kernels.experiments.training.batches import BatchMaker, check_examples, draw_order
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.memory import keep_freed_memory
from prsl_kernels.experiments.training.trainable import assemble, load_trainable
from prsl_kernels.experiments.training.trainer import ArmTrainer, is_sharded, training_arguments

_WORK = "training"  # the folder of checkpoints below `out`, until the work is done
_SETTINGS = "settings.json"
_EVALUATION_BATCH = 64
_COLUMNS = (
    "loss", "cross_entropy", "penalty", "gradient_ratio", "learning_rate", "eval_cross_entropy", "eval_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What was measured at the base checkpoint before the first step.

    `unit_ratios` holds ||grad of the penalty|| / ||grad of cross entropy|| for each batch of the calibration, at b = 1.
    """

    b: float
    unit_ratios: list[float]
    base_eval_cross_entropy: float
    base_eval_penalty: float


def finetune(
    vlm_path: str | Path,
    train: Dataset,
    select: Dataset,
    arm: ArmConfig,
    config: FinetuneConfig,
    out: Path,
    *,
    seed: int,
    device: str,
    decoding: DecodingConfig | None = None,
) -> None:
    """Fine-tunes a copy of the base checkpoint with the arm's loss, and writes the model of the best checkpoint.

    Every arm, cross entropy included, goes through `ArmLoss.apply`, sees the same examples in the same order, and takes
    the same number of steps. The checkpoint with the lowest cross-entropy term on `select` is kept, whatever the arm's
    own loss says. Where the arm asks for a `gradient_ratio`, b is found before the first step on the first
    `config.calibration_batches` batches of `select`: see `Measure.calibrate`. A prompt in `decoding` is what a model
    that takes one is trained with.

    Afterwards `out` holds the whole model as `VisionLanguageModel.save_pretrained` writes it, adapters merged (float32,
    but for frozen weights that were held in less), `train.jsonl` with a row for each logged step, and `arm.json`, which
    is written last: without it the folder is unfinished. An interrupted call leaves its checkpoints in `out/training`,
    and the same call goes on from the last whole one.

    Several ranks make the call together, with an `out` that all of them see: they share the micro-batches of each
    step, and rank 0 writes.

    Raises:
        UserError: data without texts, a k that the vocabulary does not allow, a ratio that cannot be reached, the loss
            `released` with gradient accumulation, ranks that cannot share the micro-batches of a step equally, a model
            without what `config.trainable` names, a device that is not there, a training that diverged, or an `out`
            that holds something else.
    """
    check_loss(arm, config)
    for dataset in (train, select):
        check_examples(dataset)
    arguments = training_arguments(
        config, out / _WORK, seed=seed, device=device, description=f"{train.task}/{arm.name}/seed-{seed}"
    )
    if ranks.is_main():
        prompt = None if decoding is None else decoding.prompt
        _prepare(out, _settings(vlm_path, train, select, arm, config, seed) | {"prompt": prompt})
    ranks.barrier()
    work = out / _WORK
    ranks.await_path(work)
    keep_freed_memory()
    with _quiet_transformers():
        vlm = load_trainable(vlm_path, config, device=device, seed=seed, decoding=decoding)
        if vlm.device.type == "cpu":
            vlm.model.set_attn_implementation("eager")  # the fused backward takes half of a small model's step
        batches = BatchMaker(vlm)
        measure = Measure(vlm, arm, bf16=config.bf16)
        selection = _selection(batches, select)
        found = _start(work, arm, config, measure, selection, batches, select) if ranks.is_main() else None
        start = Start(**ranks.share(found and dataclasses.asdict(found)))
        with measure.loss.apply(vlm.model, start.b) as handle, _events_in(out / "tensorboard"):
            trainer = ArmTrainer(
                vlm.model,
                arguments,
                draws=draw_order(train.examples, config.steps * config.batch_size * config.gradient_accumulation, seed),
                batches=batches,
                handle=handle,
                measure=measure,
                selection=selection,
                description=f"fine-tuning {arm.name}",
            )
            trainer.train(resume_from_checkpoint=ranks.share(_last_checkpoint(work) if ranks.is_main() else None))
        state = trainer.state
        if not state.best_global_step:
            raise UserError(
                f"arm {arm.name!r}: the training diverged, cross entropy on the selection split was never finite; "
                f"lower learning_rate ({config.learning_rate}) or b ({start.b:.3g})"
            )
        if ranks.is_main():
            selected = assemble(vlm_path, config, work / f"checkpoint-{state.best_global_step}", seed=seed)
            selected.write_files(out, dtype=None)
    if ranks.is_main():
        _finish(out, arm, config, start, measure.loss.weight(start.b), state, vlm.vocab_size, seed)
    ranks.barrier()


@contextmanager
def _events_in(folder: Path) -> Iterator[None]:
    """TensorBoard's events go to `folder`, where the environment does not say otherwise; the work's is removed."""
    variable = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(variable)
    os.environ.setdefault(variable, str(folder))
    try:
        yield
    finally:
        if given is None:
            del os.environ[variable]


def _finish(
    out: Path,
    arm: ArmConfig,
    config: FinetuneConfig,
    start: Start,
    weight: float,
    state: TrainerState,
    vocab_size: int,
    seed: int,
) -> None:
    """Writes what is beside the model, and removes what was only for the work."""
    work = out / _WORK
    rows = _rows(start, weight, state.log_history)
    write_text(out / "train.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    (work / _SETTINGS).unlink()  # first, so that half of the folder is never taken up again
    shutil.rmtree(work)
    outcome = {"selected_step": state.best_global_step, "eval_cross_entropy": state.best_metric}
    record = _record(arm, config, start, weight, rows, outcome) | {"vocab_size": vocab_size, "seed": seed}
    write_json(out / "arm.json", record)
    ratio = record["gradient_ratio_measured"]
    measured = "not measured" if ratio is None else f"{ratio:.2g}"
    say(
        f"{arm.name}: b = {start.b:.3g}, gradient ratio {measured}, cross entropy on the "
        f"selection split {start.base_eval_cross_entropy:.4f} -> {state.best_metric:.4f}, step {state.best_global_step}"
    )


def _settings(
    vlm_path: str | Path, train: Dataset, select: Dataset, arm: ArmConfig, config: FinetuneConfig, seed: int
) -> dict[str, Any]:
    """Everything that the training depends on: unfinished work is taken up only where all of it agrees."""
    settings = {
        "base": str(vlm_path),
        "data": [train.fingerprint, select.fingerprint],
        "arm": as_dict(arm),
        "config": {key: value for key, value in as_dict(config).items() if key != "report_to"},
        "seed": seed,
        "sharded": is_sharded(),  # whose checkpoints are others
    }
    return json.loads(json.dumps(settings))  # as it is read again, with lists for tuples


def _prepare(out: Path, settings: dict[str, Any]) -> None:
    """Makes `out` ready: its folder for checkpoints holds what an interrupted call of the same left, or nothing."""
    work = out / _WORK
    note = work / _SETTINGS
    ours = any((out / name).exists() for name in (_WORK, "train.jsonl", "arm.json"))
    if out.exists() and not ours and any(out.iterdir()):
        raise UserError(f"{out}: this folder holds other files; choose another one, or an empty one")
    if note.is_file() and not (out / "arm.json").exists():
        try:
            if read_json(note) == settings:
                return
        except UserError:
            pass  # cut short by a kill: begin anew
    if out.exists():
        shutil.rmtree(out)
    work.mkdir(parents=True)
    write_json(note, settings)


def _selection(batches: BatchMaker, select: Dataset) -> list[Batch]:
    """The selection split in its order, each example with its first reference."""
    chunks = [select.examples[i : i + _EVALUATION_BATCH] for i in range(0, len(select.examples), _EVALUATION_BATCH)]
    return [Batch(batches.pixels(chunk), batches.text([(example, 0) for example in chunk])) for chunk in chunks]


def _start(
    work: Path,
    arm: ArmConfig,
    config: FinetuneConfig,
    measure: Measure,
    selection: Sequence[Batch],
    batches: BatchMaker,
    select: Dataset,
) -> Start:
    """Measures at the base checkpoint, or reads what an interrupted call measured there."""
    file = work / "start.json"
    if file.is_file():
        return Start(**read_json(file))
    size = config.batch_size
    chunks = [select.examples[i * size : (i + 1) * size] for i in range(config.calibration_batches)]
    calibration = [
        Batch(batches.pixels(chunk), batches.text([(example, 0) for example in chunk])) for chunk in chunks if chunk
    ]
    b, unit_ratios = measure.calibrate(calibration)
    cross_entropy, penalty = measure.terms(selection)
    start = Start(b, unit_ratios, cross_entropy, penalty)
    write_json(file, dataclasses.asdict(start))
    return start


def _last_checkpoint(work: Path) -> str | None:
    """The last whole checkpoint; what a kill cut short, in writing or in deleting, is removed.

    The Trainer writes `trainer_state.json` last, and deletes whole files.
    """
    files = ("model.safetensors", "optimizer.bin" if is_sharded() else "optimizer.pt", "scheduler.pt")
    steps = {int(folder.name.rpartition("-")[2]): folder for folder in work.glob("checkpoint-*")}
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            whole = all((folder / name).is_file() for name in files)
        except (OSError, ValueError):
            whole = False
        if whole:
            return str(folder)
        shutil.rmtree(folder)
    return None


def _rows(start: Start, weight: float, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step out of the Trainer's log, in which training and evaluation have entries of their own.

    `weight` is that of the penalty in the loss.
    """
    base = {
        "step": 0,
        "eval_cross_entropy": start.base_eval_cross_entropy,
        "eval_penalty": start.base_eval_penalty,
        "gradient_ratio": abs(weight) * statistics.median(start.unit_ratios or [0.0]),
    }
    merged: dict[int, dict[str, Any]] = {}
    for entry in (base, *history):
        values = {name: value for name, value in entry.items() if name in _COLUMNS and _number(value) is not None}
        if values:
            merged.setdefault(entry["step"], {}).update(values)
    return [{"step": step, **{name: row.get(name) for name in _COLUMNS}} for step, row in sorted(merged.items())]


def _number(value: Any) -> float | None:
    """JSON has no infinities and no NaN, which a diverging arm logs."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _record(
    arm: ArmConfig,
    config: FinetuneConfig,
    start: Start,
    weight: float,
    rows: Sequence[dict[str, Any]],
    outcome: dict[str, Any],
) -> dict[str, Any]:
    """The content of `arm.json`.

    `loss` is "ce" wherever b is 0: plain, with `label_smoothing`, or with a `temperature`. `gradient_ratio_measured` is
    the median over the training batches at which it was measured, and `calibration_ratios` are those of the
    calibration's batches at the base checkpoint, both with the penalty's weight in the arm's loss.
    """
    measured = [row["gradient_ratio"] for row in rows if row["step"] and row["gradient_ratio"] is not None]
    return {
        "arm": arm.name,
        "loss": "ce" if start.b == 0 else arm.loss,
        "label_smoothing": arm.label_smoothing,
        "temperature": arm.temperature,
        "k": arm.k,
        "b": start.b,
        "space": arm.space,
        "distance": arm.distance,
        "gradient_ratio_target": arm.gradient_ratio,
        "gradient_ratio_measured": statistics.median(measured) if measured else None,
        "calibration_ratios": [abs(weight) * ratio for ratio in start.unit_ratios],
        **outcome,
        "base_eval_cross_entropy": start.base_eval_cross_entropy,
        "steps": config.steps,
    }


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without a bar for every file that transformers reads or writes, and its warnings across our own bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
