"""What every arm said of every image at every recorded round: the data behind the page's image browser, and its bounds.

The page has to stay of a size that opens anywhere, so one seed is taken, and of it as many images and pictures as fit;
what is left out is counted, and the page says so. All rows lie in the run directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from prsl_kernels.experiments.report.examples import png_uri, read_picture
from prsl_kernels.experiments.report.tables import PRIMARY_REFERENCE, TaskTables, metric_name
from prsl_kernels.experiments.report.text import printable, shorten

TEXT_BYTES = 2_000_000  # of the page, for a task's texts and numbers
PICTURE_BYTES = 2_000_000  # of the page, for a task's pictures
_ORDER_SEED = 0  # of the order in which images are let in while they fit
_LARGEST_SIDE = 128  # pixels; of larger images every second, third, ... pixel is taken, so that differences stay exact
_LONGEST_TEXT = 280
_LONGEST_REFERENCES = 5
_ROLES = ("primary", "ensemble", "query", "eps", "unbounded", "probe", "control", "transfer")


@dataclass(frozen=True)
class History:
    """The browser's data as plain JSON types, and what of the run it holds."""

    data: Mapping[str, Any]
    seed: int
    seeds: int
    shown: int  # images
    images: int
    pictures: int
    pictures_left_out: int  # kept in the run but not in the page
    every: int  # of large images, each so manieth pixel is shown

    @property
    def island(self) -> Markup:
        """`data` as JSON that is inert inside a `<script type="application/json">`, whatever its texts hold."""
        return Markup(json_island(self.data))


def json_island(data: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`: no text can end the element, open a comment, or break a line."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def image_history(
    tables: TaskTables, run: Path, *, text_bytes: int = TEXT_BYTES, picture_bytes: int = PICTURE_BYTES
) -> History:
    """Collects the histories of the images under the first seed, within the given numbers of bytes.

    Images whose pictures were kept come first, the others in a seeded order, until the next would not fit.
    """
    seed = tables.seeds[0]
    rows = (
        pd.concat([tables.outputs, tables.transferred], ignore_index=True)
        if len(tables.transferred)
        else (tables.outputs)
    )
    rows = rows[(rows["seed"] == seed) & rows["arm"].isin(tables.arms)]
    rows = rows.assign(
        score=_scores(rows, tables, seed), spoken=[_said(text) for text in rows["text"]],
        position=rows["arm"].map({arm: i for i, arm in enumerate(tables.arms)}),
        rank=[_ROLES.index(role) if role in _ROLES else len(_ROLES) for role in rows["role"]],
    ).sort_values(["id", "position", "rank", "attack", "round"], kind="stable")  # fmt: skip
    names = rows["id"].drop_duplicates().tolist()
    kept = set(rows.loc[rows["image"].notna() & (rows["image"] != ""), "id"])
    chosen = _fitting(rows, names, kept, text_bytes)
    rows = rows[rows["id"].isin(chosen)].reset_index(drop=True)
    data = _columns(rows, tables)
    pictures, left_out, every = _add_pictures(data, rows, tables, run, picture_bytes)
    return History(
        data=data, seed=seed, seeds=len(tables.seeds), shown=len(chosen), images=len(names), pictures=pictures,
        pictures_left_out=left_out, every=every,
    )  # fmt: skip


def _said(text: object) -> str:
    return shorten(printable(text), _LONGEST_TEXT) if isinstance(text, str) else ""


def _scores(rows: pd.DataFrame, tables: TaskTables, seed: int) -> list[float]:
    """The primary score of each row against the primary reference; NaN where it was not scored."""
    levels = tables.scores.index
    wanted = (
        (levels.get_level_values("reference") == PRIMARY_REFERENCE)
        & (levels.get_level_values("metric") == tables.endpoint.score)
        & (levels.get_level_values("seed") == seed)
    )
    scores = tables.scores[wanted].droplevel(["reference", "metric", "seed"])
    lookup = scores.stack().to_dict()
    keys = zip(rows["attack"], rows["round"], rows["id"], rows["arm"], strict=True)
    return [float(lookup.get(key, math.nan)) for key in keys]


def _fitting(rows: pd.DataFrame, names: Sequence[str], kept: set[str], budget: int) -> set[str]:
    """As many images as the budget takes, estimated by their texts and five numbers a row."""
    sizes = rows.groupby("id")["spoken"].agg(lambda texts: sum(len(json.dumps(text)) for text in set(texts)))
    sizes = sizes + 28 * rows.groupby("id").size() + 200
    shuffled = [names[i] for i in np.random.default_rng(_ORDER_SEED).permutation(len(names))]
    order = [name for name in shuffled if name in kept] + [name for name in shuffled if name not in kept]
    fits = int((np.cumsum([sizes[name] for name in order]) <= budget).sum())
    return set(order[: max(1, fits)])


def _columns(rows: pd.DataFrame, tables: TaskTables) -> dict[str, Any]:
    """Rows as columns of small numbers: indices into lists, scores in thousandths, changes in tenths of a level."""
    texts = {text: index for index, text in enumerate(dict.fromkeys(rows["spoken"]))}
    attacks = {attack: index for index, attack in enumerate(rows.sort_values("rank", kind="stable")["attack"].unique())}
    worst = tables.worst[tables.worst["seed"] == tables.seeds[0]] if len(tables.worst) else tables.worst
    by_image = {
        str(name): {tables.arms.index(arm): attacks[attack] for arm, attack in zip(group["arm"], group["attack"],
                    strict=True) if arm in tables.arms and attack in attacks}
        for name, group in worst.groupby("id")
    }  # fmt: skip
    images, start = [], [0]
    for name, group in rows.groupby("id", sort=False):
        first = group.iloc[0]
        references = first["references"]
        images.append({
            "id": shorten(printable(str(name)), 120), "group": shorten(_said(first["group"]), 60),
            "question": _said(first["question"]) or None,
            "references": [_said(text) for text in list(references if references is not None else ())]
            [:_LONGEST_REFERENCES], "worst": by_image.get(str(name), {}),
        })  # fmt: skip
        start.append(start[-1] + len(group))
    return {
        "score_name": metric_name(tables.endpoint.score),
        "arms": [printable(f"{tables.label(arm)} ({arm})") for arm in tables.arms],
        "attacks": [printable(str(attack)) for attack in attacks],
        "primary": attacks[tables.main_attack],
        "texts": list(texts),
        "images": images,
        "start": start,
        "arm": rows["position"].tolist(),
        "attack": [attacks[attack] for attack in rows["attack"]],
        "round": [int(number) for number in rows["round"]],
        "text": [texts[text] for text in rows["spoken"]],
        "score": _scaled(rows["score"], 1000),
        "objective": _scaled(rows["objective_value"], 1000),
        "linf": _scaled(rows["linf"], 2550),
        "pictures": {},
    }


def _scaled(values: pd.Series, factor: float) -> list[int | None]:
    numbers = values.astype(float).to_numpy() * factor
    return [round(float(number)) if math.isfinite(number) else None for number in numbers]


def _add_pictures(
    data: dict[str, Any], rows: pd.DataFrame, tables: TaskTables, run: Path, budget: int
) -> tuple[int, int, int]:
    """Enters pictures into `data` while they fit; returns how many, how many not, and the factor they are thinned by.

    First every image's clean picture and, under each arm, that of the main attack's last round; then the last rounds
    of the other attacks; then the rounds between.
    """
    with_picture = rows[rows["image"].notna() & (rows["image"] != "")]
    if with_picture.empty:
        return 0, 0, 1
    last = with_picture.groupby(["id", "arm", "attack"])["round"].transform("max") == with_picture["round"]
    main = with_picture["rank"] == 0
    clean = main & (with_picture["round"] == 0) & (with_picture["arm"] == tables.baseline)
    redundant = main & (with_picture["round"] == 0) & (with_picture["arm"] != tables.baseline)
    turn = np.select([clean, main & last, last], [0, 1, 2], default=3)
    queue = with_picture.assign(turn=turn)[~redundant].sort_values(["turn", "rank"], kind="stable")
    place = {name: index for index, name in enumerate(rows["id"].drop_duplicates())}
    used, shown, every = 0, 0, 1
    for row in queue.itertuples():
        if used >= budget:
            break
        pixels = read_picture(row.image, row.folder, run, [])
        if pixels is None:
            continue
        factor = math.ceil(max(pixels.shape[:2]) / _LARGEST_SIDE)
        every = max(every, factor)
        uri = png_uri(Image.fromarray(np.ascontiguousarray(pixels[::factor, ::factor])))
        used += len(uri)
        shown += 1
        if row.turn == 0:
            data["images"][place[row.id]]["picture"] = uri
        else:
            data["pictures"][str(row.Index)] = uri
    return shown, len(queue) - shown, every
