"""`prsl train-base`: the base checkpoints that every arm of the experiment starts from, trained from nothing."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prsl_kernels.experiments.console import say, track
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_directory, sha256, write_text
from prsl_kernels.experiments.training.base_card import model_card
from prsl_kernels.experiments.training.base_state import load_state, save_state
from prsl_kernels.experiments.training.base_tasks import TASKS, BaseTask
from prsl_kernels.experiments.training.memory import keep_freed_memory

VOCABULARY = 2048
SAVE_EVERY = 100
LOG_EVERY = 25
SCORE_EVERY = 500
TRAIN_EXAMPLES = 1000
SCORE_EXAMPLES = 96  # of the selection split, to watch the training; nothing is chosen by it


def train_base(task: str, out: str | Path, *, seed: int = 0, steps: int | None = None) -> Path:
    """Trains a base checkpoint for "captions" or "vqa" and writes it to the folder `out`.

    The folder gets the weights in half precision, configuration, tokenizer, preprocessing, the log, and a model card
    with the scores on all splits. Unfinished work lies beside it in `<out>-training`: the same call goes on from
    there, to the same weights that an undisturbed run gives on that machine. `steps` shortens or prolongs the recipe.

    Raises:
        UserError: an unknown task, no positive number of steps, an `out` that is in use, or unfinished work of
            another seed or number of steps.
    """
    out = Path(out)
    if task not in TASKS:
        raise UserError(f"the task {task!r} does not exist; choose one of {', '.join(TASKS)}")
    steps = TASKS[task].default_steps if steps is None else steps
    if steps < 1:
        raise UserError(f"steps is {steps}; give at least 1, or leave it out to train for {TASKS[task].default_steps}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not empty; move it away or choose another folder")
    keep_freed_memory()
    torch.manual_seed(seed)
    trainee = TASKS[task](seed, steps, build_tokenizer(VOCABULARY))
    # On a CPU the fused attention's backward takes half of a step at this size
    trainee.wrapper.model.set_attn_implementation("eager")
    work = out.with_name(f"{out.name}-training")
    work.mkdir(parents=True, exist_ok=True)
    rows = _optimize(trainee, work, json.dumps({"task": task, "seed": seed, "steps": steps}))
    trainee.eval()
    with torch.no_grad():  # scored as it is shipped, in half precision
        for parameter in trainee.wrapper.parameters():
            parameter.copy_(parameter.half())
    scores = [trainee.score("train", TRAIN_EXAMPLES), trainee.score("select"), trainee.score("test")]
    with atomic_directory(out) as folder:
        trainee.wrapper.write_files(folder)
        (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        card = model_card(trainee, rows, scores, sha256(folder / "model.safetensors"))
        (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(work)
    for score in scores:
        say(f"{task}, {score['split']}: {score['image']}; of grey images {score['blank']}")
    return out


def _optimize(trainee: BaseTask, work: Path, settings: str) -> list[dict[str, Any]]:
    """Runs all steps that are not done yet; returns the log."""
    optimizer = _optimizer(trainee)
    done = load_state(work, trainee, optimizer, settings)
    log = work / "train_log.jsonl"
    rows = [row for row in _read_log(log) if row["step"] <= done]
    losses: list[float] = []
    begun = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    for step in track(range(done, trainee.steps), f"training {trainee.task}"):
        trainee.train()
        rate = trainee.recipe["peak learning rate"] * learning_rate_factor(step, trainee)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Dropout and augmentation of a step depend on nothing but seed and step
        torch.manual_seed(trainee.seed * 1_000_003 + step)
        loss = trainee.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        last = step + 1 == trainee.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            rows.append(
                {
                    "step": step + 1,
                    "loss": round(sum(losses) / len(losses), 4),
                    "learning_rate": float(f"{rate:.3g}"),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            losses = []
            if (step + 1) % SCORE_EVERY == 0:
                trainee.eval()
                score = trainee.score("select", SCORE_EXAMPLES)["image"]
                rows[-1]["select"] = {name: round(value, 3) for name, value in score.items()}
                say(f"step {step + 1} of {trainee.steps}: loss {rows[-1]['loss']}, {rows[-1]['select']}")
        if (step + 1) % SAVE_EVERY == 0 or last:
            write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
            save_state(work, trainee, optimizer, step + 1, settings)
    return rows


def learning_rate_factor(step: int, trainee: BaseTask) -> float:
    """Linear warm-up and half a cosine to zero, in each phase of the training anew."""
    for length in trainee.phases():
        if step < length:
            warmup: int = min(trainee.recipe["warm-up steps"], length // 4)
            return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / length))
        step -= length
    return 0.0


def _optimizer(trainee: BaseTask) -> torch.optim.Optimizer:
    """AdamW; matrices decay, while embeddings, biases and the scales of normalisations do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        plain = parameter.ndim < 2 or any(part in name for part in ("wte", "wpe", "embed", "query_tokens"))
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": trainee.recipe["weight decay"]},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def _read_log(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]
