"""Seconds of a call, modelled: floating-point operations over a chip's peak, and bytes over its memory's."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from prsl_kernels.experiments.config import FinetuneConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.planning.model import Shape
from prsl_kernels.experiments.planning.work import Operation

# Shares of the peaks that such models reach in practice: matrix products in training, and weights read in decoding
UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.6
# Seconds of one core to read, decode and scale a photograph of 640 x 480 for a model of 224 x 224; the Trainer reads
# in the same process. Smaller models are taken to have smaller photographs.
IMAGE_SECONDS = 0.008
# Tokens of a text where no data set is at hand: COCO's captions are 12 long, questions with their prompt 14
TEXT_TOKENS = {"captions": 12, "vqa": 18}
ANSWER_TOKENS = {"captions": 12, "vqa": 4}
# Kernels of a layer are launched one after the other: what a decoded token takes at least, per layer
_LAUNCH = 60e-6


@dataclass(frozen=True)
class Chip:
    """Peaks: FLOP/s of dense matrix products in bfloat16 and float32 (without TF32), bytes/s, bytes of memory."""

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float


# Of the makers' data sheets: A100 80 GB SXM, H100 SXM, H200 SXM, GeForce RTX 4090, L40S
CHIPS = {
    "A100": Chip("A100", 312e12, 19.5e12, 2.0e12, 80e9),
    "H100": Chip("H100", 989e12, 67e12, 3.35e12, 80e9),
    "H200": Chip("H200", 989e12, 67e12, 4.8e12, 141e9),
    "RTX 4090": Chip("RTX 4090", 165e12, 82.6e12, 1.008e12, 24e9),
    "L40S": Chip("L40S", 362e12, 91.6e12, 0.864e12, 48e9),
}


def find_chip(name: str) -> Chip:
    """A chip by its name, or by a part of a device's name such as "NVIDIA H100 80GB HBM3".

    Raises:
        UserError: it is not in the table.
    """
    plain = name.upper().replace(" ", "").replace("-", "").replace("_", "")
    for known, chip in CHIPS.items():
        if known.upper().replace(" ", "") in plain:
            return chip
    raise UserError(f"--gpu {name!r}: not in the table; choose one of {', '.join(CHIPS)}")


def this_processor() -> Chip:
    """This machine's processor: a matrix product is timed for a moment, with the threads that torch uses."""
    import torch

    size = 768
    left = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        wall, busy = time.perf_counter(), time.process_time()
        torch.mm(left, left)
        best = min(best, time.perf_counter() - wall, max(time.process_time() - busy, 1e-6))
    # A product reaches the peak, which the share in UTILISATION is taken of
    peak = 2 * size**3 / best
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Chip(f"this processor ({peak / 1e9:.0f} GFLOP/s in a matrix product)", peak, peak, 10e9, float(pages))


@dataclass(frozen=True)
class Modelled:
    """Seconds of calls from a model's shape and a chip's peaks."""

    shape: Shape
    chip: Chip
    finetune: FinetuneConfig
    attack_dtype: str
    new_tokens: int
    basis = "modelled"

    def seconds(self, operation: Operation, images: int) -> float:
        """Of one call with so many images."""
        shape, task = self.shape, self.shape.task
        if operation == "update":
            # AdamW reads and writes weight, gradient and two moments in float32
            trained = shape.trained(self.finetune.trainable, self.finetune.lora_rank)
            return 28 * trained / (self.chip.bandwidth * BANDWIDTH_UTILISATION)
        if operation in ("generate", "base"):
            return self._generation(images)
        encoder, qformer, decoder = shape.forward(TEXT_TOKENS[task], logits=ANSWER_TOKENS[task])
        training = operation in ("train", "ratio")
        bf16 = self.finetune.bf16 if training else self.attack_dtype == "bfloat16"
        forward = encoder + qformer + decoder
        if operation == "forward":
            flops = forward
        elif operation == "gradient":  # parameters need none: a backward costs as much as a forward
            flops = 2 * forward
        else:
            flops = forward + (2 if operation == "ratio" else 1) * self._backward(encoder, qformer, decoder)
            if self.finetune.gradient_checkpointing:
                flops += forward
        seconds = images * flops / self._rate(bf16=bf16)
        reading = images * IMAGE_SECONDS * min(1.0, (shape.image_size / 224) ** 2)
        return seconds + (reading if operation == "train" else 0.0)

    def _backward(self, encoder: float, qformer: float, decoder: float) -> float:
        """FLOPs of one backward: once a forward for the activations' gradients, once more for those of what trains.

        Nothing flows into an image encoder below which nothing trains.
        """
        if self.finetune.trainable == "full":
            return 2 * (encoder + qformer + decoder)
        return (2 * qformer + decoder) if self.finetune.trainable == "qformer" else qformer + decoder

    def _rate(self, *, bf16: bool) -> float:
        return UTILISATION * (self.chip.bf16 if bf16 else self.chip.fp32)

    def _generation(self, images: int) -> float:
        """One pass over image and prompt, then token by token: products, weights read, or launches, whichever lasts."""
        bf16 = self.attack_dtype == "bfloat16"
        prompt = TEXT_TOKENS[self.shape.task] if self.shape.task == "vqa" else 1
        first = images * sum(self.shape.forward(prompt, logits=1)) / self._rate(bf16=bf16)
        stack = self.shape.decoder
        weights = stack.per_token + stack.width * self.shape.vocabulary
        products = images * 2 * weights / self._rate(bf16=bf16)
        read = (2 if bf16 else 4) * weights / (self.chip.bandwidth * BANDWIDTH_UTILISATION)
        return first + self.new_tokens * max(products, read, _LAUNCH * stack.layers)

    def load(self) -> float:
        """Of reading a checkpoint from disk at 1 GB/s, and hashing it."""
        return 2.0 + 4 * self.shape.parameters / 0.5e9
