"""The attacks of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from prsl_kernels.experiments.config.types import STRICT, Count, Finite, Name, NonNegative

Method = Literal["fgsm", "bim", "pgd", "mi-fgsm", "apgd", "square"]
Objective = Literal["ce", "margin", "margin-max", "dlr", "ce+bd", "ce-bd", "target"]
Role = Literal["ensemble", "query", "eps", "unbounded", "probe"]
Norm = Literal["linf", "l2"]
Control = Literal["zero-step", "random-sign", "gaussian", "jpeg", "blank"]
Rounds = tuple[Annotated[int, Field(ge=0)], ...]
RESERVED = (*get_args(Control), "worst", "none")  # names of rows that no recipe may give to an attack


@dataclass(frozen=True, config=STRICT)
class ExtraAttack:
    """One more attack beside the primary one; what it leaves out (None) it has from there.

    `role` says what its rows are evidence for: "ensemble" attacks, on all images within the primary budget, are those
    over which the worst case is taken; "query" uses no gradient; "eps" is a point of the sweep over budgets;
    "unbounded" has to bring the score to its floor; a "probe" is shown and counts for nothing else.

    `objective`: cross entropy of the reference (`ce`), with the arm's own penalty added or taken off (`ce+bd`,
    `ce-bd`), the margin of the best wrong token's logit as mean or maximum over the reference's tokens, the
    difference-of-logits ratio, or minus the cross entropy of another image's text (`target`). `reference` "secondary"
    attacks what the arm itself says of the clean image. With `stop_above` an image is left alone once its objective
    exceeds that. `images` takes the first so many of the split. One round is one gradient, or one query of Square;
    `restarts` go on counting where the run before them ended.
    """

    name: Name
    method: Method = "bim"
    role: Role = "ensemble"
    objective: Objective = "ce"
    reference: Literal["primary", "secondary"] = "primary"
    norm: Norm = "linf"
    eps: NonNegative | None = None
    step: NonNegative | None = None
    rounds: Rounds | None = None
    restarts: Count = 1
    images: Count | None = None
    stop_above: Finite | None = None

    def __post_init__(self) -> None:
        if self.name in RESERVED or self.name.startswith("transfer"):
            raise ValueError(f"attack name {self.name!r} is reserved; choose another")
        if self.rounds is not None:
            check_rounds(self.rounds)
        if self.role == "query" and self.method != "square":
            raise ValueError(f"attack {self.name!r}: role query is for attacks without gradients; set method: square")
        if self.role in ("eps", "unbounded") and (self.eps is None or self.norm != "linf"):
            raise ValueError(
                f"attack {self.name!r}: role {self.role} needs an eps of its own, in the primary attack's norm, linf"
            )
        if self.role == "ensemble" and (self.eps, self.norm, self.images) != (None, "linf", None):
            raise ValueError(
                f"attack {self.name!r}: the worst case is taken over attacks on all images within the primary budget; "
                "leave out eps, norm and images, or give it another role"
            )


@dataclass(frozen=True, config=STRICT)
class TransferConfig:
    """Images that `attack` made on each arm, shown to every other arm: the first `images` of the split."""

    attack: Name
    images: Count = 64


@dataclass(frozen=True, config=STRICT)
class SurfaceConfig:
    """The objective over a square of +-eps around the first `images` images, on `points` x `points` places.

    One axis is the sign of the gradient at the clean image, the other random signs.
    """

    images: Count = 8
    points: Annotated[int, Field(ge=3, le=101)] = 11


@dataclass(frozen=True, config=STRICT)
class AttackConfig:
    """The primary attack on the images, and the others. `eps` and `step` are in `units`.

    Units are "pixels255" (of 255), "pixels" (of 1), "normalized". `rounds` are the rounds whose outputs are recorded;
    0 is the clean image and always recorded. `keep_images` examples, a seeded sample, have their images of all
    recorded rounds kept as PNG. In `dtype` the attacked model computes; images are float32.
    """

    eps: NonNegative
    step: NonNegative
    rounds: Rounds
    units: Literal["pixels255", "pixels", "normalized"] = "pixels255"
    method: Literal["bim"] = "bim"
    objective: Literal["ce"] = "ce"
    controls: tuple[Control, ...] = ("zero-step", "random-sign", "gaussian", "jpeg", "blank")
    batch_size: Count = 64
    keep_images: Annotated[int, Field(ge=0)] = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    extra: tuple[ExtraAttack, ...] = ()
    transfer: TransferConfig | None = None
    surface: SurfaceConfig | None = None

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        names = [self.method, *(attack.name for attack in self.extra)]
        if len(set(names)) != len(names):
            raise ValueError(f"attack names must differ: {names}")
        if self.transfer is not None and self.transfer.attack not in names:
            raise ValueError(f"transfer.attack {self.transfer.attack!r} is not among the attacks {names}")


def check_rounds(rounds: Rounds) -> None:
    if list(rounds) != sorted(set(rounds)) or not rounds or rounds[-1] == 0:
        raise ValueError(f"rounds must ascend without repetition and end above 0, not {list(rounds)}")
