"""One fine-tuned arm as its records tell, and what the report calls it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from prsl_kernels.experiments.errors import UserError


@dataclass(frozen=True)
class ArmRun:
    """One fine-tuning: an arm under one training seed, as `arm.json` and `train.jsonl` record it."""

    name: str
    loss: str
    k: int
    b: float
    space: str
    distance: str
    gradient_ratio_target: float | None
    gradient_ratio_measured: float | None
    selected_step: int
    eval_cross_entropy: float
    base_eval_cross_entropy: float
    vocab_size: int
    seed: int
    steps: int
    training: pd.DataFrame = field(repr=False)
    label_smoothing: float = 0.0
    temperature: float = 1.0

    @property
    def is_cross_entropy(self) -> bool:
        """Plain cross entropy, which every other arm is compared with; smoothed or tempered is another arm."""
        return self.b == 0 and self.label_smoothing == 0 and self.temperature == 1

    @property
    def has_k(self) -> bool:
        """Whether the loss picks out k classes: cross entropy does not, and DRSL takes all that are not the target."""
        return self.b != 0 and self.loss != "drsl"

    @property
    def as_printed(self) -> bool:
        """PRSL to the letter of the paper: probabilities, Euclidean distance, and a weight of 1e-4."""
        printed = self.loss == "prsl" and self.space == "prob" and self.distance == "l2"
        return printed and math.isclose(self.b, 1e-4, rel_tol=1e-6)

    @property
    def label(self) -> str:
        """How the report calls the arm, beside its name in the recipe."""
        if self.is_cross_entropy:
            return "Cross entropy"
        if self.b == 0:
            smoothing = [f"Label smoothing {self.label_smoothing:g}"] if self.label_smoothing else []
            temperature = [f"Temperature {self.temperature:g}"] if self.temperature != 1 else []
            return ", ".join([*smoothing, *temperature])
        if self.loss == "drsl":
            return "DRSL"
        if self.loss == "released":
            return f"Released form, k\u00a0=\u00a0{self.k}"
        if self.as_printed:
            return "PRSL as printed, b\u00a0=\u00a01e-4"
        space = "" if self.space == "prob" else " log-prob"
        distance = "" if self.distance == "l2" else f" {self.distance.upper()}"
        return f"PRSL{space}{distance}, k\u00a0=\u00a0{self.k}"

    @property
    def k_over_v(self) -> str:
        """The share of the vocabulary that the penalty acts on; an en dash for losses that have no k."""
        if not self.has_k:
            return "–"
        return f"{self.k}/{self.vocab_size:,} = {self.k / self.vocab_size:.2%}".replace("%", "\u2009%")


def load_training(path: Path, task_folder: Path, gaps: list[str]) -> pd.DataFrame:
    """The log of one fine-tuning, a row a step; empty, and a gap, where there is none."""
    if not path.exists():
        gaps.append(f"{path.relative_to(task_folder).as_posix()} is missing: no training curves for this arm.")
        return pd.DataFrame()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON lines ({error}); delete it and run `prsl finetune` again") from None
    return pd.DataFrame(rows)
