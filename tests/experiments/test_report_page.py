"""The report's page: that it stands alone, says what it must, and that hostile texts stay texts."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from report_pages import Page, change, only_own_script, outputs_of
from synthetic_run import ARMS, make_run

from prsl_kernels.experiments.report import build_report, headline
from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.examples import choose_examples
from prsl_kernels.experiments.report.style import arm_styles
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import NO_CLAIM, limits


@pytest.fixture(scope="module")
def findings(planted: tuple[Path, dict[str, Any]]) -> dict[str, Findings]:
    run, recipe = planted
    return {tables.task: analyse(tables) for tables in load_run(run, recipe).tasks}


@pytest.fixture(scope="module")
def page(planted: tuple[Path, dict[str, Any]]) -> tuple[Path, str]:
    run, recipe = planted
    path = build_report(run, recipe=recipe)
    return path, path.read_text(encoding="utf-8")


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


def test_arms_look_different_without_colour(planted: tuple[Path, dict[str, Any]]) -> None:
    styles = arm_styles(load_run(*planted).tasks)
    assert set(styles) == set(ARMS)
    assert len({style.marker for style in styles.values()}) == len(ARMS)
    assert len({style.dashes for style in styles.values()}) >= len(ARMS) - 1


def test_what_the_run_does_not_hold_is_said_on_the_first_screen(page: tuple[Path, str]) -> None:
    text = " ".join(Page(page[1]).text.split())
    expected = (
        "Not in this run: a worst case over several attacks, transfer between arms, a query attack, a converged attack "
        "and more than one training seed."
    )
    assert text.index(expected) < text.index("What a sceptic asks")


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
