"""Types that the settings share, with their bounds."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field

Task = Literal["captions", "vqa"]
TASKS: tuple[Task, ...] = get_args(Task)

STRICT = ConfigDict(extra="forbid")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # becomes a folder name: no separators, nothing hidden


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Name = Annotated[str, Field(pattern=_NAME)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(finite)]
Positive = Annotated[float, Field(gt=0), AfterValidator(finite)]

Finite = Annotated[float, AfterValidator(finite)]
