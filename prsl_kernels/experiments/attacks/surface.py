"""A slice through the objective around an image: where gradients are masked, it looks like no hill to climb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import Budget, per_channel
from prsl_kernels.experiments.attacks.iterate import Draws, input_gradient
from prsl_kernels.experiments.attacks.objectives import Objective
from prsl_kernels.experiments.files import atomic_file

FILE = "surface.parquet"
# `a` and `b` are in units of eps: along the signs of the gradient at the clean image, and along random signs.
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("a", pa.float64(), nullable=False),
        pa.field("b", pa.float64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


def surface(
    objective: Objective, clean: Tensor, budget: Budget, seeds: Sequence[int], points: int
) -> tuple[Tensor, Tensor]:
    """The objective at clip(x + a eps sign(g) + b eps r), with g the gradient at x and r random signs.

    Args:
        objective: images to (N,) values.
        clean: x, (N, C, H, W) in [0, 1].
        budget: eps.
        seeds: a seed an image, for r.
        points: how many values each of a and b takes, evenly from -1 to 1.

    Returns:
        The values of a (and b), (points,), and the objective, (N, points of a, points of b).
    """
    eps = per_channel(budget.eps, clean)
    _, gradient, _ = input_gradient(objective, clean)
    uphill = eps * gradient.nan_to_num(nan=0.0).sign()
    aside = eps * Draws(seeds, clean.device).signs(*clean.shape[1:]).to(clean)
    # Not linspace, whose middle is 0 only up to rounding
    places = torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1)
    values = torch.empty(len(clean), points, points)
    with torch.no_grad():
        for i, a in enumerate(places.tolist()):
            for j, b in enumerate(places.tolist()):
                values[:, i, j] = objective((clean + a * uphill + b * aside).clamp(0, 1)).float().cpu()
    return places, values


def write_surface(out: Path, ids: Sequence[str], places: Tensor, values: Tensor, keys: dict[str, Any]) -> None:
    """Writes `out/surface.parquet`, a row per image and place; `keys` holds task, arm and seed."""
    rows = [
        {**keys, "id": name, "a": a, "b": b, "value": values[n, i, j].item()}
        for n, name in enumerate(ids)
        for i, a in enumerate(places.tolist())
        for j, b in enumerate(places.tolist())
    ]
    with atomic_file(out / FILE) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
