"""The report of a run whose pieces are missing, damaged, or of another recipe."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_pages import OUTPUTS, SCORES, Page, analyse_small, change
from synthetic_run import make_run

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report import build_report, headline
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import limits, outcome, verdict

# ---- missing and damaged pieces --------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def edit(name: str, how: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    return lambda run: change(run / name, how)


def nan_score(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[3, "value"] = np.nan
    return rows


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(SCORES), ["scores.parquet", "no such file", "prsl evaluate"]),
        (remove("captions/evaluate"), ["scores.parquet", "prsl evaluate"]),
        (remove("captions/attack"), ["captions/attack", "prsl attack"]),
        (remove("captions"), ["captions/attack", "prsl attack"]),
        (remove("captions/finetune"), ["arm.json", "prsl finetune"]),
        (lambda run: (run / SCORES).write_bytes(b"PAR1 and nothing"), ["scores.parquet", "Parquet", "delete it"]),
        (edit(SCORES, lambda rows: rows.iloc[:0]), ["scores.parquet", "empty"]),
        (edit(OUTPUTS, lambda rows: rows.drop(columns="text")), ["outputs.parquet", "text", "missing"]),
        (edit(SCORES, nan_score), ["scores.parquet", "1 of", "not finite", "prsl evaluate"]),
        (edit(SCORES, lambda rows: pd.concat([rows, rows.head(1)])), ["scores.parquet", "twice"]),
        (edit(SCORES, lambda rows: rows[rows["arm"] != "ce"]), ["cross-entropy arm", "b = 0"]),
        (edit(SCORES, lambda rows: rows[rows["metric"] != "bertscore_f1"]), ["primary score 'bertscore_f1'"]),
        (edit(SCORES, lambda rows: rows[rows["attack"] != "bim"]), ["primary attack 'bim'"]),
        (edit(SCORES, lambda rows: rows[rows["round"] != 0]), ["no image has bertscore_f1 at rounds 0 and 20"]),
        (lambda run: (run / "captions/finetune/ce/seed-0/arm.json").write_text("{}"), ["arm.json", "prsl finetune"]),
        (lambda run: (run / "captions/finetune/ce/seed-0/train.jsonl").write_text("{"), ["train.jsonl", "not JSON"]),
        (lambda run: (run / "run.json").write_text("[]"), ["run.json", "no JSON object"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_without_is_named(
    small: tuple[Path, dict[str, Any]], damage: Callable[[Path], None], words: list[str]
) -> None:
    run, recipe = small
    damage(run)
    with pytest.raises(UserError) as raised:
        build_report(run, recipe=recipe)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not (run / "report.html").exists()


def test_runs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        build_report(tmp_path / "nowhere", recipe={})
    with pytest.raises(UserError, match="holds no task"):
        build_report(tmp_path, recipe={})
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        headline(tmp_path)
    (tmp_path / "recipe.yaml").write_text("{")
    with pytest.raises(UserError, match="not valid YAML"):
        headline(tmp_path)


def test_a_round_that_was_not_recorded_is_refused(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    recipe["tasks"]["captions"]["primary"]["round"] = 7
    with pytest.raises(UserError, match="primary round 7"):
        build_report(run, recipe=recipe)


def test_optional_pieces_leave_a_stated_gap(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    for name in ("run.json", "captions/evaluate/corpus.parquet", "captions/evaluate/versions.json"):
        (run / name).unlink()
    for path in [*run.rglob("train.jsonl"), *run.rglob("preprocessor_config.json"), *run.rglob("*.png")]:
        path.unlink()
    text = " ".join(Page(build_report(run, recipe=recipe).read_text(encoding="utf-8")).text.split())
    for gap in (
        "run.json is missing", "corpus.parquet is missing", "versions.json is missing", "train.jsonl is missing",
        "pictures could not be read", "No training logs were found", "back end not recorded",
        "normalised: not recorded", "does not record which data",
    ):  # fmt: skip
        assert gap in text, gap


@pytest.mark.parametrize("arms", [("prsl-k20",), ("ce", "prsl-k20")])
def test_a_gradient_ratio_that_nobody_measured_is_a_dash(
    small: tuple[Path, dict[str, Any]], arms: tuple[str, ...]
) -> None:
    """As of a model that was split over ranks, of which none had the whole gradient."""
    run, recipe = small
    for arm in arms:
        folder = run / "captions" / "finetune" / arm / "seed-0"
        record = json.loads((folder / "arm.json").read_text())
        (folder / "arm.json").write_text(json.dumps(record | {"gradient_ratio_measured": None}))
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        (folder / "train.jsonl").write_text("".join(json.dumps(row | {"gradient_ratio": None}) + "\n" for row in lines))
    tables = load_run(run, recipe).tasks[0]
    assert [tables.runs[arm][0].gradient_ratio_measured for arm in arms] == [None] * len(arms)
    source = build_report(run, recipe=recipe).read_text(encoding="utf-8")
    row = next(row for row in re.findall(r"<tr.*?</tr>", source, re.S) if "prsl-k20" in row and "0.10" in row)
    cells = re.findall(r'<td class="num">([^<]*)</td>', row)
    assert cells[cells.index("0.10") + 1] == "–"  # the target, and what was measured
    for page in ("None", "nan"):
        assert not re.search(rf">\s*{page}\s*<", source)
    table = pd.read_csv(run / "tables" / "captions-arms.csv").set_index("Arm")
    assert table["Gradient ratio measured"].isna().to_dict() == {arm: arm in arms for arm in ("ce", "prsl-k20")}


def test_an_arm_that_was_not_scored_is_a_stated_gap(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    recipe["arms"].append({**recipe["arms"][1], "name": "prsl-k6"})
    assert any("Arm prsl-k6 was not attacked" in gap for gap in load_run(run, recipe).tasks[0].gaps)


def test_cross_entropy_alone_is_shown_without_a_comparison(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, images=6, arms=("ce",), tasks=("captions",), keep=0, pixels=8)
    source = build_report(tmp_path, recipe=recipe).read_text(encoding="utf-8")
    assert "Nothing to compare" in source
    assert len(headline(tmp_path)) == 5


def test_leftovers_of_other_recipes_and_of_interrupted_stages_are_ignored(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    before = analyse_small(run, recipe).effects
    shutil.copytree(run / "captions/attack/ce/seed-0", run / "captions/attack/ce/seed-0.partial")
    shutil.copytree(run / "captions/finetune/ce/seed-0", run / "captions/finetune/ce/seed-0.partial")
    stale = run / "captions/attack/other/seed-0"
    shutil.copytree(run / "captions/attack/ce/seed-0", stale)
    change(stale / "outputs.parquet", lambda rows: rows.assign(arm="other"))
    found = analyse_small(run, recipe)
    assert found.tables.arms == ("ce", "prsl-k20")
    assert found.effects == before
    assert not found.tables.gaps


def test_no_declared_endpoint_is_said(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    del recipe["tasks"]["captions"]["primary"]
    found = analyse_small(run, recipe)
    assert (found.tables.endpoint.score, found.tables.endpoint.round) == ("bertscore_f1", 20)
    assert any("declares no primary endpoint" in warning for warning in verdict(found).warnings)


def test_arms_that_score_alike_on_every_image_are_said_to(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small

    def edit(rows: pd.DataFrame) -> pd.DataFrame:
        keys = ["attack", "round", "id", "reference", "metric"]
        ours = rows[rows["arm"] == "ce"].set_index(keys)["value"]
        theirs = rows["arm"] == "prsl-k20"
        rows.loc[theirs, "value"] = ours.reindex(pd.MultiIndex.from_frame(rows.loc[theirs, keys])).to_numpy()
        return rows

    change(run / SCORES, edit)
    found = analyse_small(run, recipe)
    assert outcome(found.effects[0]) == "no change detected: alike on every image"
    assert verdict(found).headline == "No change detected in BERTScore F1 at round 20 (k\u00a0=\u00a020)."
    assert any("a change on 30.0\u2009% of all images" in limit for limit in limits(load_run(run, recipe), [found]))
