"""What the tests of the report share: a page's elements, and the edits that damage a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from synthetic_run import make_run

from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.html import script_hash
from prsl_kernels.experiments.report.tables import load_run

SCORES = "captions/evaluate/scores.parquet"
OUTPUTS = "captions/attack/ce/seed-0/outputs.parquet"
ARMS = ("ce", "prsl-k20", "prsl-k6", "prsl-k100", "prsl-logprob-k20")
PLANT = {"prsl-k20": "robust", "prsl-k6": "masked", "prsl-logprob-k20": "harmed"}


class Page(HTMLParser):
    """Elements with their attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def full_recipe(folder: Path, **settings: Any) -> dict[str, Any]:
    """Writes a run of captions with every kind of attack, and returns its recipe."""
    return make_run(folder, **{"tasks": ("captions",), "keep": 0, "pixels": 8, "full": True, **settings})


def findings_of(folder: Path, **settings: Any) -> Findings:
    return analyse(load_run(folder, full_recipe(folder, **settings)).tasks[0])


def analyse_saved(run: Path) -> Findings:
    """A run of one task, by the recipe that lies in it."""
    return analyse_small(run, yaml.safe_load((run / "recipe.yaml").read_text()))


def analyse_small(run: Path, recipe: dict[str, Any]) -> Findings:
    return analyse(load_run(run, recipe).tasks[0])


def change(path: Path, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    edit(pd.read_parquet(path)).to_parquet(path)


def outputs_of(run: Path, arm: str) -> Path:
    return run / f"captions/attack/{arm}/seed-0/outputs.parquet"


def only_own_script(source: str, *, islands: int) -> bool:
    """Whether the page's scripts are its own, which its policy names by hash, and that many inert islands of data."""
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", source, flags=re.DOTALL)
    own = [text for attributes, text in scripts if not attributes]
    data = [attributes for attributes, _ in scripts if attributes.startswith(' type="application/json" id="history-')]
    policy = f"script-src '{script_hash(own[0])}'\""
    tags = [tag for tag, _ in Page(source).elements if tag == "script"]
    return len(own) == 1 and len(data) == islands and len(tags) == islands + 1 and policy in source
