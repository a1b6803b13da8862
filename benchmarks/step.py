"""What the loss does to a whole fine-tuning step, on this machine's CPU: ``python -m benchmarks.step``.

A step is ``zero_grad(set_to_none=True)``, the forward with labels, the backward with an upstream gradient that is not
1, and AdamW's step. The model's own cross entropy and PRSL through `apply_prsl` take turns on the same model object,
each on the same batch in a round. See NOTES.md for the reasons.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.utils import logging

from prsl_kernels import apply_prsl
from prsl_kernels.experiments.config import load_recipe
from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.training.batches import BatchMaker, draw_order
from prsl_kernels.experiments.training.memory import keep_freed_memory
from prsl_kernels.huggingface import PRSLHandle

from . import machine, race, report
from .cli import announce, exit_status, note_threads, note_waiting, positive
from .contenders import UPSTREAM, native_unavailable
from .report import REFERENCE, BenchmarkError

CSV = report.CSV.with_name("step.csv")
# The logits are batch x length x V, with the median of the lengths where batches differ. loss_ms is the time from the
# logits to their gradient, a part of the step as optimizer_ms is; ratios are to the model's own cross entropy.
COLUMNS = (
    *report.COMMON,
    *("model", "parameters", "data", "batch", "length", "V", "threads", "contender", "k", "b", "rounds"),
    *("median_ms", "p25_ms", "p75_ms", "loss_ms", "optimizer_ms"),
    *("ratio", "ratio_p25", "ratio_p75", "loss_ratio", "loss_ratio_p25", "loss_ratio_p75", "waited"),
)
# The arguments of `apply_prsl`, or None for the loss that the model has by itself.
LOSSES: dict[str, dict[str, Any] | None] = {
    REFERENCE: None,
    "prsl-b0": {"k": 20, "b": 0.0},
    "prsl": {"k": 20, "b": 1e-2},
}
LIMIT = 1.0  # of PRSL's step as a multiple of cross entropy's
BATCHES = 8  # different ones, which the rounds go through again and again
# In place of the demo's data where they are not in the cache: texts of the same kind, on images of noise.
SYNTHETIC: dict[str, Sequence[tuple[str, str | None]]] = {
    "captions": (("woman: medium-dark skin tone", None), ("keycap 7", None), ("flag: Ecuador", None)),
    "vqa": (("blue", "what color is the shape?"), ("no", "does the image not contain a circle?")),
}


@dataclass
class Subject:
    """A model to train, and what to train it on: keywords of its forward, labels included."""

    model: PreTrainedModel
    batches: Sequence[dict[str, Tensor]]
    data: str


def demo(task: str, options: argparse.Namespace) -> Subject:
    """A shipped base and its batches as the demo fine-tunes it: its data, batch size, attention and memory."""
    keep_freed_memory()
    config = load_recipe("demo").tasks[task]  # type: ignore[index]
    vlm = VisionLanguageModel.from_pretrained(config.base)
    vlm.model.set_attn_implementation("eager")
    size = options.batch or config.finetune.batch_size
    try:
        examples = load_dataset(config.data.name, "train", limit=config.data.train_limit).examples
    except UserError:
        texts, name = SYNTHETIC[task], "synthetic"
        references, questions = zip(*(texts[i % len(texts)] for i in range(size)), strict=True)
        text = vlm.encode(references, None if questions[0] is None else questions)
        pixels = [torch.rand(size, 3, vlm.image_size, vlm.image_size) for _ in range(BATCHES)]
        return Subject(vlm.model, [{"pixel_values": vlm.normalize(image), **text} for image in pixels], name)
    draws, make = draw_order(examples, BATCHES * size, options.seed), BatchMaker(vlm)
    batches = [make(draws[first : first + size]) for first in range(0, len(draws), size)]
    return Subject(vlm.model, batches, config.data.name)


def vit_gpt2(options: argparse.Namespace) -> Subject:
    """A ViT-GPT2 with random weights and random batches; BenchmarkError where memory does not do."""
    width, layers, image = options.width, options.layers, options.image_size
    size, length, vocab = options.batch or 4, options.tokens, options.vocab
    if vocab <= max(arguments["k"] for arguments in LOSSES.values() if arguments):
        raise BenchmarkError(f"--vocab {vocab} is too small for the k of PRSL; use a larger one")
    heads = 1 if width % 64 else width // 64
    encoder = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image,
    )
    decoder = GPT2Config(
        vocab_size=vocab,
        n_positions=max(1024, length),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=vocab - 1,
        eos_token_id=vocab - 1,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = vocab - 1
    with torch.device("meta"):
        parameters = VisionEncoderDecoderModel(config).num_parameters()
    # Weights, gradients and AdamW's two moments; activations as measured, which are mostly those of the encoder's
    # patches; and the logits with what cross entropy makes of them.
    positions = size * ((image // encoder.patch_size) ** 2 + 1)
    needed = 16 * parameters + 120 * positions * width * layers + 20 * size * length * vocab
    available = machine.available_memory()
    if available is not None and needed > available:
        raise BenchmarkError(
            f"needs about {needed / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB are available; use a smaller "
            "--width, --layers or --batch"
        )
    torch.manual_seed(options.seed)
    batches = [
        {"pixel_values": torch.randn(size, 3, image, image), "labels": torch.randint(vocab, (size, length))}
        for _ in range(BATCHES)
    ]
    return Subject(VisionEncoderDecoderModel(config), batches, "random")


# In this order whatever the command line says: the demo changes how the C library keeps memory, for good.
MODELS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "vit-gpt2": vit_gpt2,
    "captions": lambda options: demo("captions", options),
    "vqa": lambda options: demo("vqa", options),
}
ROUNDS = {"vit-gpt2": 15, "captions": 61, "vqa": 61}

Times = Mapping[Any, float]  # by the loss; those of the parts by the loss and "loss" or "optimizer"


class Trainee:
    """One model under one optimizer, which any of `LOSSES` can train for a step."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.model = subject.model.train()
        self.parts: dict[Any, float] = {}
        self._batches = subject.batches
        self._seed = seed
        self._name = REFERENCE
        self._handle: PRSLHandle | None = None
        self._batch = subject.batches[0]
        # Without a learning rate the weights stay: all rounds and all losses do the same work.
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self._logits_at = self._gradient_at = 0
        self.model.get_output_embeddings().register_forward_hook(self._on_logits)

    def turn(self, name: str) -> race.Turn:
        """The step with the loss of this name."""

        def prepare(number: int) -> None:
            if self._handle is not None:
                self._handle.remove()
            arguments = LOSSES[name]
            self._handle = None if arguments is None else apply_prsl(self.model, **arguments)
            self._name = name
            self._batch = self._batches[number % len(self._batches)]
            torch.manual_seed(self._seed + number)  # the same dropout for all

        return race.Turn(prepare, self.step)

    def step(self) -> float:
        """One step; returns its cross entropy."""
        self._optimizer.zero_grad(set_to_none=True)
        output = self.model(**self._batch)
        loss = output.loss
        del output  # as the Trainer does, so that the logits can go
        loss.backward(torch.full_like(loss, UPSTREAM))
        start = perf_counter_ns()
        self._optimizer.step()
        self.parts[self._name, "optimizer"] = (perf_counter_ns() - start) / 1e6
        self.parts[self._name, "loss"] = (self._gradient_at - self._logits_at) / 1e6
        terms = None if self._handle is None else self._handle.last_terms
        return float(loss.detach() if terms is None else terms.cross_entropy)

    def _on_logits(self, module: Any, inputs: Any, logits: Tensor) -> None:
        logits.register_hook(self._on_gradient)
        self._logits_at = perf_counter_ns()

    def _on_gradient(self, gradient: Tensor) -> None:
        self._gradient_at = perf_counter_ns()


def run(subject: Subject, rounds: int, seed: int, description: str) -> race.Outcome:
    """Race the losses on one model."""
    trainee = Trainee(subject, seed)
    turns = {name: trainee.turn(name) for name in LOSSES}
    losses = {}
    for name, turn in turns.items():
        for _ in range(race.WARM_UP):
            turn.prepare(0)
            losses[name] = trainee.step()
    race.check_losses(losses, 1e-4)
    return race.race(turns, rounds, seed, description, lambda: trainee.parts)


def summarize(common: Mapping[str, Any], name: str, subject: Subject, rounds: Sequence[Times]) -> list[dict[str, Any]]:
    """The rows of the CSV for one model, one a loss."""
    lengths = [batch["labels"].shape[1] for batch in subject.batches]
    where = {
        "model": name,
        "parameters": subject.model.num_parameters(),
        "data": subject.data,
        "batch": len(subject.batches[0]["labels"]),
        "length": round(report.quartiles(lengths)[1]),
        "V": subject.model.config.get_text_config(decoder=True).vocab_size,
        "threads": torch.get_num_threads(),
    }
    rows = []
    for loss, arguments in LOSSES.items():
        low, median, high = report.quartiles(times[loss] for times in rounds)
        row = {**common, **where, "contender": loss, **(arguments or {}), "rounds": len(rounds)}
        row |= {"p25_ms": low, "median_ms": median, "p75_ms": high}
        for part in ("loss", "optimizer"):
            row[f"{part}_ms"] = report.quartiles(times[loss, part] for times in rounds)[1]
        for prefix, key, reference in (("", loss, REFERENCE), ("loss_", (loss, "loss"), (REFERENCE, "loss"))):
            low, median, high = report.quartiles(times[key] / times[reference] for times in rounds)
            row |= {f"{prefix}ratio": median, f"{prefix}ratio_p25": low, f"{prefix}ratio_p75": high}
        rows.append(row)
    return rows


def step_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians with quartiles, and the parts of a step."""
    cells = [
        (
            row["contender"],
            f"{row['median_ms']:.1f}",
            f"{row['p25_ms']:.1f}-{row['p75_ms']:.1f}",
            f"{row['loss_ms']:.2f}",
            f"{row['optimizer_ms']:.1f}",
        )
        for row in rows
    ]
    return report.table("", ("contender", "step: median ms", "quartiles", "of it loss", "optimizer"), cells)


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether PRSL makes the step slower than the model's own cross entropy, and the same of the loss alone."""
    cells = []
    for row in rows:
        name = row["contender"]
        whole = (row["ratio_p25"], row["ratio"], row["ratio_p75"])
        loss = (row["loss_ratio_p25"], row["loss_ratio"], row["loss_ratio_p75"])
        if name != REFERENCE:
            limit = LIMIT if name == "prsl" else None
            cells.append((f"step: {name} / {REFERENCE}", *report.judge(whole, limit, row["waited"])))
            cells.append((f"loss alone: {name} / {REFERENCE}", *report.judge(loss, None, row["waited"])))
    return report.table("", ("ratio", *report.JUDGED), cells)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Race whole fine-tuning steps: the model's own cross entropy, cross entropy through apply_prsl "
        "(prsl-b0) and PRSL through apply_prsl (prsl: k = 20, b = 0.01), interleaved in one process on the same model "
        "and batches; append medians and quartiles to a CSV.",
        epilog="Models: captions and vqa, the demo's bases with its data and batch size; vit-gpt2, a ViT with a GPT-2 "
        "decoder and random weights, of the size that the options give.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="X", choices=MODELS, default=list(MODELS), help="see below (all)")
    rounds = ", ".join(f"{number} for {name}" for name, number in ROUNDS.items())
    add("--rounds", metavar="X", type=positive, help=f"steps of each contender ({rounds})")
    add("--batch", metavar="X", type=positive, help="examples in a batch (the demo's for its bases, 4 for vit-gpt2)")
    add("--threads", metavar="X", type=positive, default=min(2, machine.CORES), help="(2, or 1 on one core)")
    add("--seed", metavar="X", type=int, default=0, help="of batches, random weights, dropout and order (0)")
    add("--csv", metavar="PATH", type=Path, default=CSV, help="where to append (benchmarks/results/step.csv)")
    size = parser.add_argument_group("the size of vit-gpt2")
    size.add_argument("--tokens", metavar="X", type=positive, default=32, help="in a text (32)")
    size.add_argument("--vocab", metavar="X", type=positive, default=50_257, help="words (50257)")
    size.add_argument("--width", metavar="X", type=positive, default=768, help="of encoder and decoder (768)")
    size.add_argument("--layers", metavar="X", type=positive, default=12, help="of encoder and decoder each (12)")
    size.add_argument("--image-size", metavar="X", type=positive, default=224, help="pixels along a side (224)")
    return parser


def measure(options: argparse.Namespace) -> int:
    """Race the losses in all models, append to the CSV as they finish, print tables; the exit status."""
    if reason := native_unavailable():
        raise BenchmarkError(f"PRSL's step is that of the compiled extension: {reason}")
    report.check_csv(options.csv, COLUMNS)
    common = machine.describe_machine()
    announce(common)
    note_threads([options.threads])
    torch.set_num_threads(options.threads)
    appended = 0
    for name in (name for name in MODELS if name in options.models):
        torch.manual_seed(options.seed)
        try:
            subject = MODELS[name](options)
        except (BenchmarkError, UserError) as error:
            print(f"\nleft out: {name} ({error})")
            continue
        outcome = run(subject, options.rounds or ROUNDS[name], options.seed, name)
        if outcome.rounds:
            dated = {"date": machine.now(), **common, "waited": outcome.waited}
            rows = summarize(dated, name, subject, outcome.rounds)
            report.append(options.csv, rows, COLUMNS)
            appended += len(rows)
            first = rows[0]
            print(
                f"\n{name}: {first['parameters'] / 1e6:.1f} million parameters, logits {first['batch']} x "
                f"{first['length']} x {first['V']:,}, data: {first['data']}, {options.threads} threads, "
                f"{len(outcome.rounds)} rounds\n{step_table(rows)}\n{verdict_table(rows)}",
                flush=True,
            )
            note_waiting(outcome.waited)
        if outcome.interrupted:
            raise KeyboardInterrupt
        del subject
    if not appended:
        raise BenchmarkError("none of the models can run here; choose others with --models, or smaller sizes")
    print(f"\n{appended} rows appended to {options.csv}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return exit_status(lambda: measure(options), options.csv)
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
