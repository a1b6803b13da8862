"""Runs side by side: the same numbers as each run's own report, and a warning for each thing that forbids comparing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from synthetic_run import make_run

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report.analysis import analyse
from prsl_kernels.experiments.report.compare import compare_runs, read_recipe
from prsl_kernels.experiments.report.tables import load_run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("compare") / "one"
    run.mkdir()
    make_run(run, images=10, arms=("ce", "prsl-k20"), tasks=("captions",), keep=0, pixels=8)
    return run


@pytest.fixture
def pair(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that are the same, for each test to change the second."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        shutil.copytree(source, run)
    return one, two


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    held = json.loads(path.read_text())
    edit(held)
    path.write_text(json.dumps(held))


def edit_recipe(run: Path, edit: Callable[[dict], None]) -> None:
    held = yaml.safe_load((run / "recipe.yaml").read_text())
    edit(held)
    (run / "recipe.yaml").write_text(yaml.safe_dump(held, sort_keys=False))


def warnings(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  ! ")]


def test_rows_are_those_of_each_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    edit_recipe(two, lambda recipe: recipe.update(name="other"))
    text = compare_runs(pair)
    assert warnings(text) == []
    assert "A: synthetic" in text
    assert "B: other" in text
    found = analyse(load_run(one, read_recipe(one)).tasks[0])
    effect = found.effects[0]
    lines = [line for line in text.splitlines() if "prsl-k20" in line]
    assert [line.split()[0] for line in lines] == ["A", "B"]
    assert all(effect.attacked.text in line and effect.clean.text in line for line in lines)
    assert re.search(r"name\s+synthetic\s+other", text), "the recipes differ in their name alone"
    assert text.split("Settings that differ")[1].count("\n") == 2


def test_same_runs_differ_in_nothing(pair: tuple[Path, Path]) -> None:
    text = compare_runs(pair)
    assert warnings(text) == []
    assert "Settings that differ: none" in text


def change_endpoint(run: Path) -> None:
    edit_recipe(run, lambda recipe: recipe["tasks"]["captions"]["primary"].update(score="rouge_l"))


def change_images(run: Path) -> None:
    for path in [*run.rglob("outputs.parquet"), *run.rglob("scores.parquet")]:
        rows = pd.read_parquet(path)
        rows[rows["id"] != "captions-0003"].to_parquet(path)


def change_budget(run: Path) -> None:
    for path in run.rglob("outputs.parquet"):
        rows = pd.read_parquet(path)
        rows.assign(eps=rows["eps"] / 2, linf=rows["linf"] / 2).to_parquet(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda run: edit_json(run / "run.json", lambda i: i["datasets"]["captions"].update(fingerprint="c" * 64)),
            ["The data differ", "aaaaaaaaaaaa", "cccccccccccc"],
        ),
        (lambda run: (run / "run.json").unlink(), ["The data differ", "not recorded"]),
        (change_endpoint, ["The endpoints differ", "BERTScore F1", "ROUGE-L"]),
        (
            lambda run: edit_json(run / "captions/evaluate/versions.json", lambda v: v.update(meteor="nltk 3.9")),
            ["back ends differ (meteor)", "not comparable"],
        ),
        (change_images, ["attacked images differ", "A 10, B 9", "9 in all"]),
        (change_budget, ["The budgets differ", "8/255", "4/255"]),
        (
            lambda run: [
                edit_json(path, lambda arm: arm.update(base_eval_cross_entropy=0.5))
                for path in run.rglob("arm.json")
            ],
            ["The bases' cross entropies differ", "0.2310", "0.5000"],
        ),
        (
            lambda run: edit_json(run / "captions/finetune/prsl-k20/seed-0/arm.json", lambda arm: arm.update(k=6)),
            ["Arm prsl-k20 is not the same", "k differ"],
        ),
    ],
)  # fmt: skip
def test_what_forbids_comparing_is_said(
    pair: tuple[Path, Path], change: Callable[[Path], None], words: list[str]
) -> None:
    change(pair[1])
    found = warnings(compare_runs(pair))
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found[0]


def test_no_fingerprint_anywhere_is_said(pair: tuple[Path, Path]) -> None:
    for run in pair:
        (run / "run.json").unlink()
    assert any("No run records its data's fingerprint" in line for line in warnings(compare_runs(pair)))


def test_differing_settings_are_found_by_name(pair: tuple[Path, Path]) -> None:
    def edit(recipe: dict) -> None:
        recipe["arms"].insert(0, {"name": "label-smoothing", "b": 0, "label_smoothing": 0.1})
        recipe["tasks"]["captions"]["finetune"]["learning_rate"] = 5e-5

    edit_recipe(pair[1], edit)
    text = compare_runs(pair).split("Settings that differ")[1]
    assert re.search(r"arms\.label-smoothing\.label_smoothing\s+–\s+0\.1", text)
    assert re.search(r"tasks\.captions\.finetune\.learning_rate\s+0\.0001\s+5e-05", text)
    assert "arms.ce" not in text, "an arm that was put before the others does not change them"


def test_page_stands_alone_and_escapes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    name = "</title><script>alert(1)</script>"
    edit_recipe(pair[1], lambda recipe: recipe.update(name=name, description="<img src=x onerror=alert(1)>"))
    out = tmp_path / "sub" / "compare.html"
    text = compare_runs(pair, out)
    assert name in text
    source = out.read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert source.count("<script") == 1
    assert "<img" not in source
    assert not re.search(r"(src|href)=\"?(http|//)", source)
    assert "Nothing here tests one run against another." in source
    for cell in ("prsl-k20", "Settings that differ", "&lt;script&gt;"):
        assert cell in source


def test_a_task_that_one_run_lacks(source: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    make_run(two, images=6, arms=("ce", "prsl-k20"), tasks=("vqa",), keep=0, pixels=8)
    found = warnings(compare_runs([source, two]))
    assert any(line.endswith("B without this task.") for line in found)
    assert any(line.endswith("A without this task.") for line in found)


def test_mistakes_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more"):
        compare_runs(pair[:1])
    with pytest.raises(UserError, match="given twice"):
        compare_runs([pair[0], pair[0] / ".." / "one"])
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        compare_runs([pair[0], tmp_path / "nowhere"])
    (pair[1] / "recipe.yaml").write_text("{")
    with pytest.raises(UserError, match="not valid YAML"):
        compare_runs(pair)
    with pytest.raises(UserError, match="at most 26"):
        compare_runs([tmp_path / str(number) for number in range(27)])
