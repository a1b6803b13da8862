"""The tables as files, and the image browser's data: the same numbers as the findings, whatever the texts hold."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_run import make_run

from prsl_kernels.experiments.report import build_report, report_files
from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.datatable import ArmCell, DataTable, Level, PValue, Ratio, Share, shown
from prsl_kernels.experiments.report.export import as_csv, as_latex, latex, write_tables
from prsl_kernels.experiments.report.history import image_history, json_island
from prsl_kernels.experiments.report.sections import sections
from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.tables import RunTables, load_run
from prsl_kernels.experiments.report.tabulate import page_tables

INTERVAL = Interval(0.031, -0.012, 0.0491234567)
HOSTILE = '</script><!--<script> &amp; \u2028 \u2029 "quoted" \x00 \u202e \ud800 \\ [x] 100 % $x_1^2$ #~{}'


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with every kind of row, three arms and two seeds of one task."""
    run = tmp_path_factory.mktemp("full")
    recipe = make_run(
        run, images=12, seeds=(0, 1), arms=("ce", "prsl-k20", "prsl-k6"), tasks=("captions",), keep=4, pixels=16,
        full=True,
    )  # fmt: skip
    return run, recipe


@pytest.fixture(scope="module")
def loaded(full: tuple[Path, dict[str, Any]]) -> RunTables:
    return load_run(*full)


@pytest.fixture(scope="module")
def findings(loaded: RunTables) -> Findings:
    return analyse(loaded.tasks[0])


def table(*rows: tuple[Any, ...], columns: tuple[str, ...], key: str = "t") -> DataTable:
    return DataTable(key, "A caption of 5 % & more", columns, rows)


# ---- cells, CSV, LaTeX -----------------------------------------------------------------------------------------------


def test_csv_has_all_digits_and_three_columns_for_an_interval() -> None:
    made = table(("ce", INTERVAL, 7), ("prsl, k20", None, None), columns=("Arm", "Change", "Images"))
    frame = pd.read_csv(io.StringIO(as_csv(made)))
    assert list(frame.columns) == ["Arm", "Change", "Change low", "Change high", "Images"]
    assert frame.iloc[0].tolist() == ["ce", 0.031, -0.012, 0.0491234567, 7]
    assert frame.iloc[1, 1:].isna().all()
    assert frame["Arm"][1] == "prsl, k20"


@pytest.mark.parametrize("said", ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_has_no_formulas(said: str) -> None:
    cell, label = ArmCell(said, "x"), said
    frame = pd.read_csv(io.StringIO(as_csv(table((said, cell, -0.5), columns=("Text", "Arm", label)))), dtype=str)
    inert = f"'{said.strip()}"
    assert frame.iloc[0].tolist() == [inert, inert, "-0.5"], "a number that is below zero stays a number"
    assert frame.columns[2] == inert


def test_csv_has_the_recipe_s_name_of_an_arm_and_the_page_its_label() -> None:
    cell = ArmCell("prsl-k20", "PRSL, k = 20")
    assert "prsl-k20" in as_csv(table((cell, 1), columns=("Arm", "n")))
    assert shown(cell) == "PRSL, k = 20"


def test_cells_are_rounded_for_people() -> None:
    assert shown(INTERVAL) == "+0.031 [−0.012,\u00a0+0.049]"
    assert shown(Level(INTERVAL)) == "0.031 [−0.012,\u00a00.049]"
    assert shown(Level(Interval(0.5, 0.25, 0.75), percent=True)) == "50.0\u2009% [25.0\u2009%,\u00a075.0\u2009%]"
    assert [shown(cell) for cell in (Share(0.5), Share(None), PValue(1e-5), Ratio(1.7e-5), None, 12345, -0.25)] == [
        "50.0\u2009%", "–", "< 0.001", "1.7 × 10⁻⁵", "–", "12,345", "−0.250",
    ]  # fmt: skip
    assert shown("two\r\nlines\u2028and more\x00") == "two lines and more\ufffd"


def test_latex_is_booktabs_and_escapes_everything() -> None:
    text = as_latex(table((HOSTILE, INTERVAL), ("[optional", 0.5), columns=("Arm_1", "Change %")), "tab:x")
    body = text.split("\n", 1)[1]
    assert all(rule in body for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:x}"))
    assert r"\caption{A caption of 5 \% \& more}" in body
    assert r"Arm\_1" in body
    assert r"100 \% \$x\_1\textasciicircum{}2\$ \#\textasciitilde{}\{\}" in body
    assert r"\textless{}/script\textgreater{}" in body
    assert "$-$0.012" in body
    assert r"\\" + "\n[" not in body, "LaTeX would take the bracket for the argument of the line break"
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u2029\u202e\ud800]", body)
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the path to compile the tables with")
def test_latex_compiles(tmp_path: Path, findings: Findings) -> None:
    parts = [as_latex(made, f"tab:{made.key}") for made in page_tables(findings)]
    parts.append(as_latex(table((HOSTILE.replace("\ud800", ""), INTERVAL), columns=("Arm_1", "%")), "tab:hostile"))
    preamble = r"\documentclass{article}\usepackage{booktabs,textcomp}\usepackage[T1]{fontenc}"
    source = preamble + r"\begin{document}" + "\n\\clearpage\n".join(parts) + r"\end{document}"
    (tmp_path / "t.tex").write_text(source, encoding="utf-8")
    ran = subprocess.run(
        ["pdflatex", "-no-shell-escape", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout[-2000:]


def test_latex_of_plain_text_is_itself() -> None:
    assert latex("PRSL, k = 20 (n = 3)") == "PRSL, k = 20 (n = 3)"
    assert latex("a\u00a0b → 2 × 10⁻⁵") == r"a~b $\to$ 2 $\times$ 10$^{-}$$^{5}$"


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    made = table(("a",), columns=("A",))
    with pytest.raises(ValueError, match="one file"):
        write_tables(tmp_path, "captions", [made, made])
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        table(("a",), columns=("A", "B"))


# ---- the exported tables of a run ------------------------------------------------------------------------------------


def test_every_section_of_a_full_run_has_an_answer_and_its_numbers(findings: Findings) -> None:
    found = sections(findings)
    assert not [anchor for anchor, section in found.items() if section.absent]
    assert all(re.search(r"\d", section.answer) for section in found.values())
    effects = next(made for made in found["ensemble"].tables if made.key == "attack-effects")
    worst = next(row for row in effects.rows if row[1] == "worst")
    for cell, effect in zip(worst[3:], findings.effects, strict=True):
        assert isinstance(cell, Interval)
        told, wanted = ([found.estimate, found.low, found.high] for found in (cell, effect.attacked))
        assert told == pytest.approx(wanted), "the endpoint is the worst case"
    matrix = next(made for made in found["transfer"].tables if made.key == "transfer")
    transfer = findings.scepticism.masking.transfer
    assert transfer is not None
    arms = findings.tables.arms
    for i, target in enumerate(arms):
        for j, source in enumerate(arms):
            cell = matrix.rows[i][j + 1]
            assert isinstance(cell, Level)
            assert cell.interval == transfer.matrix[source, target]


def test_a_small_run_has_one_line_for_what_it_lacks(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, images=6, arms=("ce", "prsl-k20"), tasks=("captions",), keep=2, pixels=8)
    found = sections(analyse(load_run(tmp_path, recipe).tasks[0]))
    absent = [section.title for section in found.values() if section.absent]
    expected = {"Ensemble of attacks", "Transfer between arms", "Query attack", "Score against eps", "Unbounded attack"}
    assert expected | {"Loss surface", "Training seeds"} == set(absent)
    source = build_report(tmp_path, recipe=recipe).read_text(encoding="utf-8")
    assert source.count(": not in this run.</p>") == len(absent)


def test_files_of_a_report(full: tuple[Path, dict[str, Any]], findings: Findings) -> None:
    run, recipe = full
    page = build_report(run, recipe=recipe)
    files = report_files(run)
    assert files[0] == page
    assert all(path.is_file() for path in files)
    names = {path.relative_to(run).as_posix() for path in files}
    assert "evidence/captions.json" in names
    expected = {made.key for made in page_tables(findings)}
    expected |= {made.key for section in sections(findings).values() for made in section.tables}
    for suffix in (".csv", ".tex"):
        assert {f"tables/captions-{key}{suffix}" for key in expected} <= names
    effects = pd.read_csv(run / "tables/captions-effects.csv").set_index("Arm")
    for effect in findings.effects:
        row = effects.loc[effect.arm]
        told = [row["Worst case"], row["Worst case low"], row["Worst case high"], row["p Holm"]]
        wanted = [effect.attacked.estimate, effect.attacked.low, effect.attacked.high, effect.p_holm]
        assert told == pytest.approx(wanted)
    for path in run.glob("tables/*.csv"):
        assert len(pd.read_csv(path)), path
    source = page.read_text(encoding="utf-8")
    assert all(f"tables/captions-{key}.csv" in source for key in ("transfer", "convergence", "eps", "query"))


# ---- the image browser's data ----------------------------------------------------------------------------------------


class Islands(HTMLParser):
    """The JSON islands of a page, as a browser would cut them out."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.inside = False
        self.found: list[str] = []
        self.scripts = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.inside = tag == "script" and ("type", "application/json") in attrs
        if self.inside:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def test_an_island_cannot_be_left() -> None:
    held = {"text": HOSTILE, HOSTILE: [None, 1.5]}
    text = json_island(held)
    assert text.isascii()
    assert not re.search("[<>&\n\r]", text)
    assert json.loads(text) == held
    assert json.loads(Islands(f'<script type="application/json">{text}</script>').found[0]) == held


def row_of(data: Any, image: int, arm: int, attack: str, number: int) -> int:
    rows = [
        row for row in range(data["start"][image], data["start"][image + 1])
        if (data["arm"][row], data["attack"][row], data["round"][row]) == (arm, data["attacks"].index(attack), number)
    ]  # fmt: skip
    assert len(rows) == 1
    return rows[0]


def test_history_has_every_row_of_the_first_seed(full: tuple[Path, dict[str, Any]], loaded: RunTables) -> None:
    tables = loaded.tasks[0]
    made = image_history(tables, full[0])
    data = made.data
    rows = pd.concat([tables.outputs, tables.transferred])
    assert data["start"][-1] == len(data["text"]) == int((rows["seed"] == 0).sum())
    assert (made.shown, made.images, made.seed, made.seeds) == (12, 12, 0, 2)
    place = next(i for i, image in enumerate(data["images"]) if image["id"] == "captions-0003")
    for attack, number in (("bim", 0), ("bim", 20), ("pgd", 40), ("transfer-from-ce", 40)):
        row = row_of(data, place, 1, attack, number)
        picked = (rows["arm"] == "prsl-k20") & (rows["id"] == "captions-0003") & (rows["seed"] == 0)
        wanted = rows[picked & (rows["attack"] == attack) & (rows["round"] == number)].iloc[0]
        assert data["texts"][data["text"][row]] == wanted["text"]
        assert data["objective"][row] == pytest.approx(1000 * wanted["objective_value"], abs=0.51)
        values, ids = tables.cube("bertscore_f1", attack, number, arms=["prsl-k20"])
        assert data["score"][row] == pytest.approx(1000 * values[0, ids.index("captions-0003"), 0], abs=0.51)
    chosen = tables.worst[(tables.worst["seed"] == 0) & (tables.worst["id"] == "captions-0003")]
    said = {tables.arms[arm]: data["attacks"][attack] for arm, attack in data["images"][place]["worst"].items()}
    assert said == dict(zip(chosen["arm"], chosen["attack"], strict=True))


def test_history_keeps_to_its_bytes_and_says_what_it_left_out(
    full: tuple[Path, dict[str, Any]], loaded: RunTables
) -> None:
    tables = loaded.tasks[0]
    whole = image_history(tables, full[0])
    assert whole.pictures > 4
    less = image_history(tables, full[0], text_bytes=20_000, picture_bytes=6_000)
    assert 0 < less.shown < less.images == 12
    assert 0 < less.pictures < whole.pictures
    assert less.pictures_left_out > 0
    shown = [image["id"] for image in less.data["images"]]
    kept = {f"captions-{number:04d}" for number in range(4)}
    assert kept & set(shown), "images with pictures come first"
    for seen in (whole, less):
        pictures = [*seen.data["pictures"].values(), *(i["picture"] for i in seen.data["images"] if "picture" in i)]
        assert len(pictures) == seen.pictures
        assert all(uri.startswith("data:image/png;base64,") for uri in pictures)
    assert sum(map(len, less.data["pictures"].values())) < 8_000
    size = len(json_island({**less.data, "pictures": {}}))
    assert size < 30_000 + sum(len(image.get("picture", "")) for image in less.data["images"])


def test_histories_of_a_page_are_read_back_whole(tmp_path: Path) -> None:
    texts = (HOSTILE.replace("\ud800", ""), "</SCRIPT>", "plain", "long " * 500)
    recipe = make_run(tmp_path, images=6, arms=("ce", "prsl-k20"), tasks=("captions",), keep=2, pixels=8, texts=texts)
    source = build_report(tmp_path, recipe=recipe).read_text(encoding="utf-8")
    page = Islands(source)
    assert page.scripts == len(page.found) + 1, "one island a task, and the page's own script"
    (data,) = [json.loads(found) for found in page.found]
    assert any(text.startswith("</script><!--<script>") for text in data["texts"])
    assert max(map(len, data["texts"])) < 310
    assert np.all(np.diff(data["start"]) > 0)
