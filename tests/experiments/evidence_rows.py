"""A run's rows and the intervals over them in plain loops, to hold the evidence to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

SCORE = "bertscore_f1"


class Rows:
    """The Parquet rows of a run, looked up one by one."""

    def __init__(self, folder: Path, arms: Sequence[str]) -> None:
        task = folder / "captions"
        scores = pd.read_parquet(task / "evaluate" / "scores.parquet")
        self.values: dict[tuple[Any, ...], float] = {}
        self.ids: dict[tuple[Any, ...], set[str]] = {}
        for row in scores.itertuples(index=False):
            cell = (row.attack, row.round, row.reference, row.metric, row.arm, row.seed)
            self.values[(*cell, row.id)] = row.value
            self.ids.setdefault(cell, set()).add(row.id)
        parts = [pd.read_parquet(path) for path in sorted(task.glob("attack/*/*/outputs.parquet"))]
        self.outputs = pd.concat(parts, ignore_index=True)
        self.surface = pd.concat([pd.read_parquet(path) for path in sorted(task.glob("attack/*/*/surface.parquet"))])
        self.corpus = pd.read_parquet(task / "evaluate" / "corpus.parquet")
        self.worst = pd.read_parquet(task / "evaluate" / "worst.parquet")
        self.arms = tuple(arms)

    def names(self, *cells: tuple[str, int], arms: Sequence[str] = (), reference: str = "primary", metric: str = SCORE
              ) -> list[str]:  # fmt: skip
        sets = [
            self.ids[attack, number, reference, metric, arm, seed]
            for attack, number in cells for arm in arms or self.arms for seed in (0, 1, 2)
        ]  # fmt: skip
        return sorted(set.intersection(*sets))

    def of(self, attack: str, number: int, arm: str, ids: Sequence[str], reference: str = "primary",
           metric: str = SCORE) -> np.ndarray:  # fmt: skip
        return np.array(
            [[self.values[attack, number, reference, metric, arm, seed, name] for name in ids] for seed in (0, 1, 2)]
        )


class Checker:
    """Compares intervals with their recomputation and remembers which were compared."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def weights(self, images: int) -> tuple[np.ndarray, np.ndarray]:
        if images not in self.draws:
            by_image = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=10_000) / images
            by_seed = np.random.default_rng(1).multinomial(3, np.full(3, 1 / 3), size=10_000) / 3
            self.draws[images] = (by_image, by_seed)
        return self.draws[images]

    def same(self, node: dict[str, float], values: np.ndarray, transform: Callable[[float], float] = float) -> None:
        """`node` is the interval of the mean of (seeds, images) `values`."""
        by_image, by_seed = self.weights(values.shape[1])
        means = sum(by_seed[:, place] * (by_image @ values[place]) for place in range(3))
        low, high = np.percentile(means, [2.5, 97.5])
        total = sum(float(value) for row in values for value in row) / values.size
        expected = [transform(value) for value in (total, low, high)]
        assert [node["estimate"], node["low"], node["high"]] == pytest.approx(expected, abs=1e-9)
        self.seen.add(id(node))

    def left(self, node: Any, path: str = "") -> Iterator[str]:
        """Paths of the intervals that nobody has compared."""
        if isinstance(node, dict):
            if set(node) == {"estimate", "low", "high"}:
                if id(node) not in self.seen:
                    yield path
                return
            for key, inner in node.items():
                yield from self.left(inner, f"{path}/{key}")
        elif isinstance(node, list):
            for place, inner in enumerate(node):
                yield from self.left(inner, f"{path}/{place}")


def pairs(rows: Rows, check: Checker, node: dict[str, Any], values: Callable[[str], np.ndarray],
          levels: str = "levels", effects: str = "effects") -> None:  # fmt: skip
    """Levels by arm and effects by other arm, of the same values."""
    for arm in rows.arms:
        check.same(node[levels][arm], values(arm))
        if arm != "ce":
            check.same(node[effects][arm], values(arm) - values("ce"))
