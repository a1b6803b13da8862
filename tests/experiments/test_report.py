"""The report against runs whose truth is planted, whose texts are hostile, and whose pieces are missing."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from synthetic_run import ARMS, make_run

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report import build_report, headline
from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.examples import choose_examples
from prsl_kernels.experiments.report.html import script_hash
from prsl_kernels.experiments.report.style import arm_styles
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import NO_CLAIM, evidence, limits, outcome, verdict


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


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("planted")
    return run, make_run(run)


@pytest.fixture(scope="module")
def findings(planted: tuple[Path, dict[str, Any]]) -> dict[str, Findings]:
    run, recipe = planted
    return {tables.task: analyse(tables) for tables in load_run(run, recipe).tasks}


@pytest.fixture(scope="module")
def page(planted: tuple[Path, dict[str, Any]]) -> tuple[Path, str]:
    run, recipe = planted
    path = build_report(run, recipe=recipe)
    return path, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("small")
    make_run(run, images=10, arms=("ce", "prsl-k20"), tasks=("captions",), keep=4, pixels=16)
    return run


@pytest.fixture
def small(small_source: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run of its own for each test that damages it."""
    run = tmp_path / "run"
    shutil.copytree(small_source, run)
    return run, yaml.safe_load((run / "recipe.yaml").read_text())


def analyse_small(run: Path, recipe: dict[str, Any]) -> Findings:
    return analyse(load_run(run, recipe).tasks[0])


def change(path: Path, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    edit(pd.read_parquet(path)).to_parquet(path)


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


def outputs_of(run: Path, arm: str) -> Path:
    return run / f"captions/attack/{arm}/seed-0/outputs.parquet"


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


def only_own_script(source: str, *, islands: int) -> bool:
    """Whether the page's scripts are its own, which its policy names by hash, and that many inert islands of data."""
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", source, flags=re.DOTALL)
    own = [text for attributes, text in scripts if not attributes]
    data = [attributes for attributes, _ in scripts if attributes.startswith(' type="application/json" id="history-')]
    policy = f"script-src '{script_hash(own[0])}'\""
    tags = [tag for tag, _ in Page(source).elements if tag == "script"]
    return len(own) == 1 and len(data) == islands and len(tags) == islands + 1 and policy in source


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone(page: tuple[Path, str]) -> None:
    path, source = page
    parsed = Page(source)
    assert path.stat().st_size < 5_000_000
    assert not [tag for tag, _ in parsed.elements if tag in {"link", "iframe", "object", "embed", "base"}]
    assert only_own_script(source, islands=2)
    assert all(value.startswith("data:image/") for value in parsed.values("src"))
    assert all(value.startswith("#") for value in parsed.values("href"))
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'" in source


def test_links_lead_somewhere_and_pictures_have_words(page: tuple[Path, str]) -> None:
    parsed = Page(page[1])
    names = parsed.values("id")
    assert len(names) == len(set(names))
    assert {href[1:] for href in parsed.values("href")} <= set(names)
    pictures = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(pictures) > 60
    assert all(attributes["alt"].strip() for attributes in pictures)


def test_more_robust_is_not_said_of_a_small_run(page: tuple[Path, str], planted: tuple[Path, dict[str, Any]]) -> None:
    """One seed, one attack: the sentence that says when it is said stands, and every arm has reasons against it."""
    text = " ".join(Page(page[1]).text.split())
    assert NO_CLAIM in text
    assert "more robust than" not in text.replace(NO_CLAIM, "").lower()
    assert text.count("against “more robust”") == 10, "the reasons of five arms in two tasks"
    assert "more robust" not in " ".join(headline(planted[0]))


def test_every_table_with_arms_prints_k_over_v(page: tuple[Path, str]) -> None:
    tables = re.findall(r"<table.*?</table>", page[1], flags=re.DOTALL)
    with_arms = [table for table in tables if 'class="arm"' in table and "PRSL" in table]
    assert len(with_arms) >= 16
    assert all("20/2,048" in table for table in with_arms)


def test_the_inert_arm_is_labelled(page: tuple[Path, str]) -> None:
    text = Page(page[1]).text
    assert "PRSL as printed, b\u00a0=\u00a01e-4" in text
    assert "next to inert" in text
    assert "1.7 × 10⁻⁵" in text


def test_threat_model_gives_both_units(page: tuple[Path, str]) -> None:
    text = " ".join(Page(page[1]).text.split())
    assert "8/255 = 0.03137 of the pixel range = 0.062745 normalised" in text
    assert "1/255 = 0.003922 of the pixel range = 0.0078431 normalised" in text


def test_scores_name_their_back_ends_and_data_their_licences(page: tuple[Path, str]) -> None:
    text = Page(page[1]).text
    assert "bert-score 0.3.13" in text
    assert "BLEU, closest reference length" in text
    assert "CC BY-SA 4.0" in text
    assert "HfG Schwäbisch Gmünd" in text


def test_figures_are_there_as_files(page: tuple[Path, str]) -> None:
    figures = page[0].parent / "figures"
    names = {
        f"{task}-{figure}"
        for task in ("captions", "vqa")
        for figure in ("rounds", "shares", "tradeoff", "attack", "training", "convergence")
    }
    assert {path.stem for path in figures.glob("*.svg")} == names == {path.stem for path in figures.glob("*.png")}
    for path in figures.glob("*.svg"):
        ElementTree.parse(path)


def test_the_same_run_gives_the_same_page(small: tuple[Path, dict[str, Any]]) -> None:
    run, recipe = small
    first = build_report(run, recipe=recipe).read_bytes()
    drawn = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    (run / "figures" / "stale.png").write_bytes(b"of an earlier run")
    assert build_report(run, recipe=recipe).read_bytes() == first
    assert {path.name: path.read_bytes() for path in (run / "figures").iterdir()} == drawn


def test_headline_has_five_lines(planted: tuple[Path, dict[str, Any]], small: tuple[Path, dict[str, Any]]) -> None:
    lines = headline(planted[0])
    assert len(lines) == 5
    assert lines[0].startswith("Captions: PRSL changed BERTScore F1 at round 20 by +")
    assert lines[1].startswith("Visual question answering: PRSL changed answer accuracy at round 20 by +")
    assert lines[4].startswith("No claim of robustness: one training seed")
    assert len(headline(small[0])) == 5
    assert all("\n" not in line for line in lines)


def test_limits_are_computed(planted: tuple[Path, dict[str, Any]], findings: dict[str, Findings]) -> None:
    text = " ".join(limits(load_run(*planted), list(findings.values())))
    assert "k = 100 is 4.9\u2009% of this vocabulary of 2,048" in text
    assert "with 64 images" in text
    assert "8/255" in text


# ---- hostile texts ---------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' & &amp; {{ 7 * 7 }} {% raw %} ]]> <!--",
    "\u202eright to left override\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f680 emoji \U0001f1e9\U0001f1ea $\\frac{1}{2}$ \\input{/etc/passwd}",
    "long " * 2_000,
    "NUL \x00 bell \x07 escape \x1b[31m line\u2028separator\r\nbreak",
    "",
)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    recipe = make_run(
        tmp_path, images=18, arms=("ce", "prsl-k20"), tasks=("vqa",), keep=18, pixels=8, texts=HOSTILE, seeds=(0, 1)
    )
    source = build_report(tmp_path, recipe=recipe).read_text(encoding="utf-8")
    parsed = Page(source)
    assert only_own_script(source, islands=1)
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in parsed.text or "49" not in parsed.text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]", source)
    assert "long " * 200 not in parsed.text, "a caption of ten thousand characters is cut"
    assert "(10,000 characters)" in parsed.text
    assert parsed.text.count("</script>") == source.count("&lt;/script&gt;") > 0


def test_hostile_names_stay_names(small: tuple[Path, dict[str, Any]]) -> None:
    """A recipe cannot hold such a name, but a run directory from elsewhere can."""
    run, recipe = small
    name = "<script>$x$\x00</script>"
    for path in [*run.rglob("*.parquet")]:
        change(path, lambda rows: rows.assign(arm=rows["arm"].replace("prsl-k20", name)))
    arm = run / "captions/finetune/prsl-k20/seed-0/arm.json"
    arm.write_text(arm.read_text().replace('"arm": "prsl-k20"', '"arm": "<script>$x$\\u0000</script>"'))
    arm.write_text(arm.read_text().replace('"distance": "l2"', '"distance": "<b>$_$\\u0000"'))
    recipe["arms"][1]["name"] = name
    source = build_report(run, recipe=recipe).read_text(encoding="utf-8")
    assert only_own_script(source, islands=1)
    assert "\x00" not in source
    for path in (run / "tables").iterdir():
        assert not re.search("[\x00-\x08\x0b-\x1f]", path.read_text(encoding="utf-8")), path
    for path in (run / "figures").glob("*.svg"):
        ElementTree.parse(path)


def test_pictures_outside_of_the_run_are_not_shown(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, recipe = small
    secret = tmp_path / "secret.png"
    shutil.copy(next(run.rglob("*.png")), secret)
    change(
        outputs_of(run, "ce"), lambda rows: rows.assign(image=rows["image"].where(rows["image"].isna(), str(secret)))
    )
    examples = choose_examples(load_run(run, recipe).tasks[0], run)
    assert set(examples.unreadable) == {str(secret)}
    assert all(example.before is None for example in examples.shown)


# ---- missing and damaged pieces --------------------------------------------------------------------------------------

SCORES = "captions/evaluate/scores.parquet"
OUTPUTS = "captions/attack/ce/seed-0/outputs.parquet"


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


def test_arms_look_different_without_colour(planted: tuple[Path, dict[str, Any]]) -> None:
    styles = arm_styles(load_run(*planted).tasks)
    assert set(styles) == set(ARMS)
    assert len({style.marker for style in styles.values()}) == len(ARMS)
    assert len({style.dashes for style in styles.values()}) >= len(ARMS) - 1


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


def test_what_the_run_does_not_hold_is_said_on_the_first_screen(page: tuple[Path, str]) -> None:
    text = " ".join(Page(page[1]).text.split())
    expected = (
        "Not in this run: a worst case over several attacks, transfer between arms, a query attack, a converged attack "
        "and more than one training seed."
    )
    assert text.index(expected) < text.index("What a sceptic asks")
