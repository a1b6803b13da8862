"""The model card of a base checkpoint: what it is, how it was made, what it can do, and what it cannot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from prsl_kernels.experiments.training.base_tasks import BaseTask

_PURPOSE = {
    "captions": "names an OpenMoji drawing in the words of its CLDR short name",
    "vqa": "answers questions about the colour, the shape and the presence of one coloured shape",
}


def model_card(
    trainee: BaseTask, rows: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]], checksum: str
) -> str:
    """Markdown; `rows` is the training log, `scores` what `BaseTask.score` gave for each split."""
    data, model = trainee.train_set, trainee.wrapper.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# Base checkpoint: {trainee.task}",
        "",
        f"A `{type(model).__name__}` of {parameters / 1e6:.1f} million parameters that {_PURPOSE[trainee.task]}. It "
        "was trained from random weights by this package and is the common start of all fine-tuning arms. It is "
        "small, knows nothing beyond its data set, and serves to compare losses, not to describe photographs.",
        "",
        f"`model.safetensors` (float16) has the SHA-256 `{checksum}`.",
        "",
        "## Data",
        "",
        f"{data.name}. {data.description}",
        "",
        f"Licence of the data: {data.license}. {data.attribution}",
        "",
        f"The train split has {len(data.examples)} examples; fingerprint `{data.fingerprint}`.",
        "",
        "## Scores",
        "",
        "Greedy decoding, the weights as they are stored, arithmetic in float32. Beside each score is the one of the "
        "same model when it is shown a uniform grey image: what it reaches without looking. test is held out: no step "
        "of the training and no choice used it.",
        "",
        *_table(scores),
        "",
        "## Recipe",
        "",
        f"`prsl train-base {trainee.task} --seed {trainee.seed} --steps {trainee.steps}`",
        "",
        "- AdamW (betas 0.9 and 0.98, no decay of embeddings, biases and normalisations), gradient norm clipped at 1, "
        "linear warm-up, cosine decay to zero, bfloat16 autocast with float32 weights",
        *(f"- {name}: {value}" for name, value in trainee.recipe.items()),
        f"- vocabulary: {trainee.wrapper.vocab_size} byte-level BPE tokens, shared by both tasks",
        f"- seed {trainee.seed}, {trainee.steps} steps, {rows[-1]['seconds'] / 60:.0f} minutes on {_machine()}",
        "",
        "## Log",
        "",
        "`train_log.jsonl` holds every 25th step (mean loss since the row before).",
        "",
        "| step | loss | selection split (a sample) |",
        "|---:|---:|---|",
        *_log_lines(rows),
        "",
    ]
    return "\n".join(lines)


def _table(scores: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| split | examples | score | value | grey image |", "|---|---:|---|---:|---:|"]
    for score in scores:
        for name, value in score["image"].items():
            lines.append(
                f"| {score['split']} | {score['examples']:,} | {name} | {value:.3f} | {score['blank'][name]:.3f} |"
            )
    return lines


def _log_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [row for row in rows if "select" in row or row is rows[-1]]
    return [
        f"| {row['step']} | {row['loss']} | {', '.join(f'{n} {v}' for n, v in row.get('select', {}).items())} |"
        for row in shown
    ]


def _machine() -> str:
    return (
        f"{os.cpu_count()} shared {platform.machine()} cores (torch used {torch.get_num_threads()}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
