"""Bytes that a stage needs: in memory at its peak, on disk afterwards, and on disk meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from prsl_kernels.experiments.config import FinetuneConfig, TaskConfig
from prsl_kernels.experiments.planning.gpus import ANSWER_TOKENS, TEXT_TOKENS
from prsl_kernels.experiments.planning.model import Shape
from prsl_kernels.experiments.planning.work import SELECTION_BATCH, Work

_PROCESS = 0.7e9  # Python with torch and transformers; on a GPU about as much is CUDA's own
_SCORING = 1.5e9  # BERTScore's packaged encoder, METEOR's and the tokenizer's Java
_IMAGE_CACHE = 2 << 30  # as in training.batches
# An attacked image as PNG against its bytes: noise in the lower bits cannot be compressed
_PNG = 0.6
_ROW, _SCORE = 150, 1.5  # bytes of a row of outputs, and of a score, in compressed Parquet
_TEXT_FILES = 1.5e6  # tokenizer, configuration and log beside the weights
_REPORT = 5e6
_REPORTED = 450  # of a score, in the report's memory
METRICS = 11


@dataclass(frozen=True)
class Size:
    """Bytes: at the peak on the device, on disk afterwards, and on disk beside that while the stage runs."""

    memory: float
    disk: float
    meanwhile: float = 0.0


def finetune_size(shape: Shape, config: FinetuneConfig, select: int, train: int, *, gpu: bool) -> Size:
    """Weights, gradients and AdamW's two moments of what trains, activations and logits of a micro-batch.

    What trains is in float32, what is frozen in bfloat16 under `bf16`. On a CPU the images that are kept in memory
    count as well.
    """
    total, trained = shape.parameters, shape.trained(config.trainable, config.lora_rank)
    width = 2 if config.bf16 else 4
    weights = 4 * trained + (total - min(trained, total)) * width
    if config.trainable == "full":
        weights = 4 * total
    states = (4 + 8) * trained
    text, answer = TEXT_TOKENS[shape.task], ANSWER_TOKENS[shape.task]
    if config.gradient_checkpointing:
        activations = config.batch_size * shape.checkpointed_activations(text, width)
    else:
        # On a CPU it trains with the attention that keeps its scores, the quicker one there
        activations = config.batch_size * shape.widest_activations(
            text, width, encoder=config.trainable == "full", scores=not gpu
        )
    # The logits, their float32 copy and its gradient
    logits = config.batch_size * answer * shape.vocabulary * (width + 8)
    memory = _PROCESS + weights + states + max(activations + logits, SELECTION_BATCH * answer * shape.vocabulary * 12)
    if not gpu:
        pixels = 3 * shape.image_size**2
        seen = min(train, config.steps * config.batch_size * config.gradient_accumulation)
        memory += min((seen + select) * pixels, _IMAGE_CACHE) + 4 * select * pixels
    # The best one and the last one, and before the last one goes the next
    return Size(memory, written(shape, config) + _TEXT_FILES, 3 * checkpointed(shape, config))


def checkpointed(shape: Shape, config: FinetuneConfig) -> float:
    """Bytes of a checkpoint in training: what trains, and its two moments."""
    return 12.0 * shape.trained(config.trainable, config.lora_rank)


def written(shape: Shape, config: FinetuneConfig) -> float:
    """Bytes of the fine-tuned model: float32 what trained or had an adapter merged into it, the rest as it was held."""
    if config.trainable == "full" or not config.bf16:
        return 4.0 * shape.parameters
    adapted = 4 * (shape.decoder.layers + shape.decoder.crossed) * shape.decoder.width**2
    return 2.0 * (shape.parameters + (adapted if config.trainable == "lora" else shape.trained(config.trainable)))


def attack_size(shape: Shape, config: TaskConfig, images: int, work: Work, *, gradients: bool, gpu: bool) -> Size:
    """Weights, and for a batch the activations, the logits with copies in float32, and the attack's pixels."""
    attack = config.attack
    width = 2 if attack.dtype == "bfloat16" else 4
    batch = min(attack.batch_size, images)
    text, answer = TEXT_TOKENS[shape.task], ANSWER_TOKENS[shape.task]
    activations = shape.widest_activations(text, width)
    if not gradients:  # one layer at a time
        activations /= max(shape.encoder.layers, shape.decoder.layers)
    logits = answer * shape.vocabulary * (width + 12 if gradients else width + 4)
    cache = 2 * width * shape.decoder.layers * shape.decoder.width * (shape.queries + text + shape.new_tokens)
    pixels = 3 * shape.image_size**2
    memory = _PROCESS + width * shape.parameters + batch * (max(activations + logits, cache) + 4 * 10 * pixels)
    if work.images("base"):
        memory += 4 * shape.parameters
    return Size(memory, work.rows * _ROW + work.pngs * pixels * _PNG)


def evaluate_size(work: Work) -> Size:
    """Back ends, the texts, and the table in the making."""
    return Size(_SCORING + work.rows * 1000 + work.scored * METRICS * 60, work.scored * METRICS * _SCORE)


def report_size(scored: int) -> Size:
    """The scores of all tasks as one table, and the page with its figures."""
    return Size(_PROCESS + scored * METRICS * _REPORTED, _REPORT)
