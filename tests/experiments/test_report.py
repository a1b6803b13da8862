"""What the report finds in runs whose truth is planted, and its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_pages import analyse_small, change, outputs_of
from synthetic_run import make_run

from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import evidence, outcome, verdict


@pytest.fixture(scope="module")
def findings(planted: tuple[Path, dict[str, Any]]) -> dict[str, Findings]:
    run, recipe = planted
    return {tables.task: analyse(tables) for tables in load_run(run, recipe).tasks}


# ---- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["captions", "vqa"])
def test_planted_effects_are_found_and_planted_nulls_are_not(findings: dict[str, Findings], task: str) -> None:
    words = {effect.arm: outcome(effect) for effect in findings[task].effects}
    assert words["prsl-k20"] == "higher"
    assert words["prsl-logprob-k20"] == "lower", "a result against the paper is reported as readily"
    assert all(words[arm].startswith("no change detected") for arm in ("prsl-printed", "prsl-k6", "prsl-k100"))


def test_effects_are_paired_differences(findings: dict[str, Findings]) -> None:
    tables = findings["captions"].tables
    values, _ = tables.cube("bertscore_f1", "bim", 20)
    for column, effect in enumerate(findings["captions"].effects, 1):
        assert effect.attacked.estimate == pytest.approx((values[0, :, column] - values[0, :, 0]).mean(), abs=1e-12)
        unpaired = 1.96 * np.sqrt((values[0, :, column].var() + values[0, :, 0].var()) / values.shape[1])
        assert effect.attacked.high - effect.attacked.low < unpaired, "pairing takes out what the image contributes"


def test_verdict_is_in_the_words_of_the_protocol(findings: dict[str, Findings]) -> None:
    said = verdict(findings["captions"])
    effect = next(effect for effect in findings["captions"].effects if effect.arm == "prsl-k20")
    assert said.headline.startswith("PRSL changed BERTScore F1 at round 20 by ")
    assert f"{effect.attacked.text} (k\u00a0=\u00a020)" in said.headline
    assert "No change detected for the other 3" in said.headline
    assert not said.warnings
    assert any("One training seed" in note for note in said.notes)


def test_a_null_says_no_change_detected(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, arms=("ce", "prsl-printed", "prsl-k6"), tasks=("vqa",), keep=2, pixels=8)
    run = load_run(tmp_path, recipe)
    said = verdict(analyse(run.tasks[0]))
    assert said.headline == "No change detected in answer accuracy at round 20 for any of the 2 PRSL arms."
    assert any("does not show the paper's effect" in note for note in said.notes)


def test_an_effect_must_survive_the_number_of_arms(findings: dict[str, Findings]) -> None:
    for effect in findings["captions"].effects:
        assert effect.p_holm >= effect.p
        assert effect.detected == (effect.attacked.excludes_zero and effect.p_holm < 0.05)


def test_several_seeds_widen_the_question(tmp_path: Path) -> None:
    recipe = make_run(
        tmp_path, images=16, seeds=(0, 1, 2), arms=("ce", "prsl-k20"), tasks=("captions",), keep=2, pixels=8
    )
    found = analyse_small(tmp_path, recipe)
    assert found.tables.seeds == (0, 1, 2)
    assert found.tables.cube("bertscore_f1", "bim", 20)[0].shape == (3, 16, 2)
    assert outcome(found.effects[0]) == "higher"
    assert any("3 training seeds" in note for note in verdict(found).notes)


def test_images_that_one_arm_lacks_are_left_out_of_every_pair(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    path = run / "captions/evaluate/scores.parquet"
    gone = ["captions-0000", "captions-0007"]
    change(path, lambda rows: rows[~((rows["arm"] == "prsl-k20") & rows["id"].isin(gone))])
    assert analyse_small(run, recipe).images == 8


def test_floors_and_corpus_scores(findings: dict[str, Findings]) -> None:
    curves = {curve.metric: curve for curve in findings["captions"].curves}
    assert curves["bertscore_f1"].random_pair == pytest.approx(0.47)
    assert curves["bertscore_f1"].blank == pytest.approx(0.45 + 0.55 * 0.15)
    assert curves["bertscore_f1"].band
    assert curves["bleu_4"].corpus
    assert not curves["bleu_4"].band, "the interval of a mean of sentences is not one of corpus BLEU"
    means = findings["captions"].tables.cube("bleu_4", "bim", 0)[0].mean(axis=(0, 1))
    assert curves["bleu_4"].values["ce"][0] == pytest.approx(0.9 * means[0])


def test_shares_are_those_of_the_paper(findings: dict[str, Findings]) -> None:
    assert [shares.round for shares in findings["captions"].shares] == [2, 20]
    values, _ = findings["captions"].tables.cube("bertscore_f1", "bim", 2)
    assert findings["captions"].shares[0].below["ce"][3].estimate == pytest.approx((values[0, :, 0] < 0.70).mean())


def test_language(findings: dict[str, Findings]) -> None:
    table = findings["vqa"].language.set_index("arm")
    assert (table["words_clean"] == 1).all()
    assert table["blank_attacked"]["ce"] > table["blank_clean"]["ce"], "under attack the answers are the blank's"


# ---- controls --------------------------------------------------------------------------------------------------------


def failed(found: Findings) -> set[str]:
    return {check.name for check in found.checks if check.passed is False}


def test_controls_pass_where_nothing_is_wrong(findings: dict[str, Findings]) -> None:
    passed = {check.name: check.passed for check in findings["captions"].checks}
    assert False not in passed.values()
    assert {name for name, found in passed.items() if found is None} == {
        "The attack beats Gaussian noise", "The attack beats JPEG"
    }, "the run has no such rows"  # fmt: skip


def test_a_step_of_zero_that_changes_an_output_is_noticed(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small

    def edit(rows: pd.DataFrame) -> pd.DataFrame:
        rows.loc[rows.index[rows["attack"] == "zero-step"][0], "text"] = "something else"
        return rows

    change(outputs_of(run, "ce"), edit)
    found = analyse_small(run, recipe)
    assert failed(found) == {"A step of 0 changes nothing"}
    assert any("“A step of 0 changes nothing”" in warning for warning in verdict(found).warnings)


def test_an_image_outside_the_budget_is_noticed(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    change(outputs_of(run, "prsl-k20"), lambda rows: rows.assign(linf=rows["linf"].where(rows["round"] != 20, 9 / 255)))
    assert "No image leaves the budget" in failed(analyse_small(run, recipe))


def test_gradients_that_vanish_are_noticed(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    change(outputs_of(run, "prsl-k20"), lambda rows: rows.assign(zero_gradient_share=rows["zero_gradient_share"] * 100))
    assert failed(analyse_small(run, recipe)) == {"Input gradients are healthy"}


def test_an_attack_that_does_nothing_is_said_first(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    path = run / "captions/evaluate/scores.parquet"
    change(path, lambda rows: rows.assign(value=rows["value"].where(~rows["attack"].isin(["bim", "worst"]), 0.9)))
    found = analyse_small(run, recipe)
    assert "did not lower the score of cross entropy" in verdict(found).warnings[0]
    assert "The attack beats random signs of the same size" in failed(found)


def test_arms_that_were_trained_differently_are_not_compared_in_silence(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    path = run / "captions/finetune/prsl-k20/seed-0/arm.json"
    path.write_text(path.read_text().replace('"base_eval_cross_entropy": 0.231', '"base_eval_cross_entropy": 0.4'))
    found = analyse_small(run, recipe)
    assert any("base checkpoint" in warning for warning in verdict(found).warnings)
    assert next(item for item in evidence(found) if "alike" in item.question).state == "absent"
