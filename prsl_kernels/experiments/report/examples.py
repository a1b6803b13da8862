"""A seeded sample of images, before and after the main attack, with what each arm said of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from prsl_kernels.experiments.report.tables import TaskTables

COUNT = 4
SEED = 0
_LARGEST_SIDE = 128  # pixels; larger images are shrunk for the page, which stays a few megabytes


@dataclass(frozen=True)
class Saying:
    """One arm's part of an example: pictures as data URIs (None where not kept), words, and the primary score."""

    arm: str
    noise: str | None
    after: str | None
    clean_text: str
    attacked_text: str
    clean_score: float | None
    attacked_score: float | None


@dataclass(frozen=True)
class Example:
    """One image of the sample."""

    id: str
    group: str
    question: str | None
    references: tuple[str, ...]
    before: str | None
    sayings: tuple[Saying, ...]


@dataclass(frozen=True)
class Examples:
    """The sample of a task, out of `kept` images that have pictures; `amplification` is that of the noise."""

    shown: tuple[Example, ...]
    kept: int
    amplification: int
    round: int
    unreadable: tuple[str, ...]  # pictures that the tables name but that could not be shown


def choose_examples(tables: TaskTables, run: Path) -> Examples:
    """Draws the sample among the images whose pictures every arm has kept (all images if none has)."""
    number = tables.main_round
    rows = tables.outputs
    rows = rows[(rows["attack"] == tables.main_attack) & (rows["seed"] == tables.seeds[0])]
    rows = rows[rows["round"].isin([0, number])]
    after = rows[rows["round"] == number]
    with_pictures = after.dropna(subset=["image"]).groupby("id")["arm"].nunique()
    kept = sorted(with_pictures.index[with_pictures == len(tables.arms)])
    pool = kept or sorted(after["id"].unique())
    generator = np.random.default_rng(SEED)
    chosen = [pool[i] for i in sorted(generator.choice(len(pool), size=min(COUNT, len(pool)), replace=False))]
    eps = float(after["eps"].max()) * 255
    amplification = max(1, int(127 / eps)) if eps else 1
    unreadable: list[str] = []
    scores = {recorded: _scores(tables, recorded) for recorded in (0, number)}
    shown = [
        _example(rows[rows["id"] == name], tables, run, amplification, scores, unreadable) for name in chosen
    ]  # fmt: skip
    return Examples(tuple(shown), len(kept), amplification, number, tuple(unreadable))


def _scores(tables: TaskTables, number: int) -> pd.DataFrame:
    values, ids = tables.cube(tables.endpoint.score, tables.main_attack, number)
    return pd.DataFrame(values[0], index=list(ids), columns=list(tables.arms)) if ids else pd.DataFrame()


def _example(
    rows: pd.DataFrame, tables: TaskTables, run: Path, amplification: int, scores: Mapping[int, pd.DataFrame],
    unreadable: list[str],
) -> Example:  # fmt: skip
    number = tables.main_round
    first = rows.iloc[0]
    clean = rows[rows["round"] == 0].set_index("arm")
    attacked = rows[rows["round"] == number].set_index("arm")
    before = _picture(clean.loc[tables.baseline], run, unreadable) if tables.baseline in clean.index else None
    sayings = []
    for arm in (arm for arm in tables.arms if arm in attacked.index):
        picture = _picture(attacked.loc[arm], run, unreadable)
        sayings.append(
            Saying(
                arm=arm,
                noise=_noise(before, picture, amplification),
                after=None if picture is None else _data_uri(picture),
                clean_text=_text(clean["text"].get(arm)),
                attacked_text=_text(attacked["text"].get(arm)),
                clean_score=_score(scores[0], first["id"], arm),
                attacked_score=_score(scores[number], first["id"], arm),
            )
        )
    references = first["references"]
    return Example(
        id=str(first["id"]),
        group=_text(first["group"]),
        question=_text(first["question"]) or None,
        references=tuple(str(reference) for reference in references) if references is not None else (),
        before=None if before is None else _data_uri(before),
        sayings=tuple(sayings),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _score(table: pd.DataFrame, name: str, arm: str) -> float | None:
    return float(table.loc[name, arm]) if name in table.index and arm in table.columns else None


def _picture(row: pd.Series, run: Path, unreadable: list[str]) -> np.ndarray | None:
    return read_picture(row["image"], row["folder"], run, unreadable)


def read_picture(name: object, folder: object, run: Path, unreadable: list[str]) -> np.ndarray | None:
    """A row's picture as (H, W, 3) uint8; None where none was kept or it is not a readable image inside the run.

    Args:
        name: the row's path, relative to `folder` or to `run`; hostile, and nothing outside the run is opened.
        folder: that of the table which holds the row.
        run: the run directory.
        unreadable: takes up the name where there should be a picture and none can be shown.
    """
    if not isinstance(name, str) or not name:
        return None
    for base in (Path(str(folder)), run):
        path = (base / name).resolve()
        if path.is_relative_to(run.resolve()) and path.is_file():
            try:
                with Image.open(path) as image:
                    return np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                break
    unreadable.append(name)
    return None


def _noise(before: np.ndarray | None, after: np.ndarray | None, amplification: int) -> str | None:
    """The difference around mid-grey, times `amplification`, as a data URI; None where the two do not compare."""
    if before is None or after is None or before.shape != after.shape:
        return None
    difference = after.astype(np.int32) - before.astype(np.int32)
    return _data_uri(np.clip(128 + amplification * difference, 0, 255).astype(np.uint8))


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > _LARGEST_SIDE:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return png_uri(image)


def png_uri(image: Image.Image) -> str:
    """The picture as a PNG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
