"""What is trained, on what, and how: data, arms, optimisation, decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from prsl_kernels.experiments.config.types import STRICT, Count, Finite, Name, NonNegative, Positive


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which images and texts.

    `name` is an embedded set ("openmoji", "easy-vqa"), the path of a manifest, or one of the published layouts
    ("coco", "visual-genome", "natural-images", "imagefolder", "datasets"), whose folder is `path`. With the path
    "embedded" the embedded drawings are written in that layout first: the same code on any machine. `question` is
    what a question answerer is asked where the set has no questions. Images of Visual Genome that are test images of
    the COCO folder `exclude_coco` are left out. Unreadable images are an error, or listed and left out where
    `skip_unreadable` says so.

    The limits take a seeded random subset of a split; None takes all of it. `attacked` is the split whose images are
    attacked: "test", or "select" for the grid from which hyper-parameters are chosen.
    """

    name: str
    path: str | None = None
    question: str | None = None
    exclude_coco: str | None = None
    skip_unreadable: bool = False
    train_limit: Count | None = None
    select_limit: Count | None = None
    test_limit: Count | None = None
    attacked: Literal["test", "select"] = "test"


@dataclass(frozen=True, config=STRICT)
class ArmConfig:
    """One arm: the loss that a copy of the base checkpoint is fine-tuned with.

    `loss` is PRSL, or a penalty that others have put in its place ("drsl", "released"); see `training.baselines`.
    Exactly one of `b` and `gradient_ratio` is given: the weight itself, or the ratio of the norms of the two
    gradients (penalty over cross entropy) at the base checkpoint, from which the weight is found. `b: 0` is cross
    entropy, which may have `label_smoothing`, or its logits divided by a `temperature`.
    """

    name: Name
    loss: Literal["prsl", "drsl", "released"] = "prsl"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Positive = 1.0
    k: Count = 20
    b: Finite | None = None
    space: Literal["prob", "log_prob"] = "prob"
    distance: Literal["l2", "l1"] = "l2"
    gradient_ratio: Positive | None = None
    note: str = ""  # shown beside the arm in the report

    def __post_init__(self) -> None:
        if (self.b is None) == (self.gradient_ratio is None):
            raise ValueError(f"arm {self.name!r} needs exactly one of b and gradient_ratio")
        if self.loss != "prsl" and (self.space, self.distance) != ("prob", "l2"):
            raise ValueError(f"arm {self.name!r}: space and distance belong to the loss prsl, not to {self.loss}")
        if (self.label_smoothing, self.temperature) != (0.0, 1.0) and self.b != 0:
            raise ValueError(f"arm {self.name!r}: label_smoothing and temperature are for cross entropy; set b: 0")

    @property
    def is_cross_entropy(self) -> bool:
        """Plain cross entropy, which every other arm is compared with."""
        return self.b == 0 and self.label_smoothing == 0 and self.temperature == 1


@dataclass(frozen=True, config=STRICT)
class FinetuneConfig:
    """Optimisation that every arm of a task shares. Learning rate: linear warm-up, then linear decay to zero.

    `batch_size` images are one forward and backward; `gradient_accumulation` of them make an optimisation step, and
    several processes share those of one step. `trainable`: all weights; the Q-Former with its query tokens and the
    projection into the language model (BLIP-2 alone); or low-rank adapters (LoRA, arXiv:2106.09685) of rank
    `lora_rank` and scale `lora_alpha` / `lora_rank`, merged into the saved model. `bf16` computes under autocast;
    what is trained stays in float32, and what is frozen is held in bfloat16. `report_to` names trackers.
    """

    steps: Count
    learning_rate: Positive
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    evaluate_every: Count = 50
    log_every: Count = 10
    calibration_batches: Count = 4
    bf16: bool = False
    trainable: Literal["full", "qformer", "lora"] = "full"
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    gradient_checkpointing: bool = False
    compile: bool = False
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@dataclass(frozen=True, config=STRICT)
class DecodingConfig:
    """What a model is asked, and how its text is made; what is left out comes from the checkpoint or its family.

    `prompt` has the place "{question}" (question answering). One beam is greedy decoding; nothing is ever sampled.
    """

    prompt: str | None = None
    max_new_tokens: Count | None = None
    num_beams: Count = 1

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt.count("{question}") != 1:
            raise ValueError(f"decoding.prompt {self.prompt!r} needs the place {{question}} exactly once")
