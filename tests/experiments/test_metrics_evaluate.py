"""The evaluate stage: tables in, tables out, references and floors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prsl_kernels.experiments.attacks.store import SCHEMA
from prsl_kernels.experiments.config import EvaluateConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import Scorer
from prsl_kernels.experiments.metrics.evaluate import CORPUS_SCHEMA, SCORES_SCHEMA, evaluate, random_pairs

QUICK = EvaluateConfig(metrics=("bleu_1", "rouge_l", "cider"))
REFERENCES = {f"i{n}": f"{color} {thing}" for n, (color, thing) in enumerate(
    (color, thing) for color in ("red", "green", "blue") for thing in ("dog", "cat", "kite", "boat"))}  # fmt: skip
CONDITIONS = [("bim", 0), ("bim", 1), ("bim", 10), ("zero-step", 10), ("random-sign", 10), ("blank", 0)]
Rows = list[dict[str, Any]]


def _rows(arm: str, seed: int = 0, task: str = "captions", references: dict[str, str] = REFERENCES) -> Rows:
    """An arm that loses the color of every second image in round 10, and of a blank image says "person"."""
    rows = []
    for attack, number in CONDITIONS:
        for place, (name, reference) in enumerate(references.items()):
            text = reference
            if attack == "bim" and number == 10 and place % 2:
                text = "black " + reference.split()[-1]
            if attack == "blank":
                text = "person"
            values = dict.fromkeys(SCHEMA.names) | {
                "task": task, "arm": arm, "seed": seed, "attack": attack, "objective": "ce", "reference": "primary",
                "round": number, "id": name, "group": "color" if place % 2 else "shape", "references": [reference],
                "text": text, "objective_value": 0.0, "linf": 0.0, "l2": 0.0,
            }  # fmt: skip
            rows.append(values)
    return rows


def _write(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def _evaluate(tmp_path: Path, arms: list[Rows], config: EvaluateConfig = QUICK) -> tuple[pd.DataFrame, pd.DataFrame]:
    paths = [_write(tmp_path / f"{place}.parquet", rows) for place, rows in enumerate(arms)]
    evaluate(paths, tmp_path / "out", config)
    scores, corpus = (pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("scores", "corpus"))
    assert scores.schema.equals(SCORES_SCHEMA)
    assert corpus.schema.equals(CORPUS_SCHEMA)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus.parquet", "scores.parquet", "versions.json",
    ]  # fmt: skip
    return scores.to_pandas(), corpus.to_pandas()


def _value(table: pd.DataFrame, **keys: Any) -> float:
    for key, value in keys.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return float(table["value"].iloc[0])


def test_a_row_for_every_image_arm_round_and_score(tmp_path: Path) -> None:
    scores, corpus = _evaluate(tmp_path, [_rows("ce"), _rows("prsl"), _rows("ce", seed=1)])
    keys = ["arm", "seed", "attack", "round", "id", "reference", "metric"]
    assert not scores.duplicated(keys).any()
    counts = scores.groupby(["arm", "seed", "reference"]).size()
    sets = len(CONDITIONS) * len(REFERENCES)
    assert counts["ce", 0, "primary"] == counts["prsl", 0, "primary"] == counts["ce", 1, "primary"] == sets * 5
    assert counts["ce", 0, "secondary"] == sets * 4  # without the length
    assert counts["random-pair", 0, "primary"] == len(REFERENCES) * 5
    assert scores["value"].notna().all()
    assert set(corpus["metric"]) == {"bleu_1", "rouge_l", "cider", "exact_match", "length", "distinct"}


def test_values(tmp_path: Path) -> None:
    scores, corpus = _evaluate(tmp_path, [_rows("ce"), _rows("prsl")])
    attacked = {"arm": "ce", "attack": "bim", "round": 10}
    assert _value(corpus, **attacked, reference="primary", metric="exact_match") == 0.5
    assert _value(corpus, **attacked, reference="secondary", metric="exact_match") == 0.5
    assert _value(corpus, **attacked, reference="primary", metric="rouge_l") == pytest.approx(0.75)
    assert _value(corpus, **attacked, reference="primary", metric="length") == 2
    assert _value(corpus, **attacked, reference="primary", metric="distinct") == 6 + 2
    assert _value(corpus, arm="ce", attack="bim", round=0, reference="primary", metric="rouge_l") == pytest.approx(1)
    assert _value(corpus, arm="ce", attack="blank", reference="secondary", metric="rouge_l") == 0
    assert _value(corpus, arm="ce", attack="blank", reference="primary", metric="distinct") == 1
    assert 0 < _value(corpus, arm="random-pair", metric="rouge_l") < 0.5
    assert _value(corpus, arm="random-pair", metric="exact_match") == 0
    assert _value(scores, **attacked, id="i1", reference="primary", metric="rouge_l") == pytest.approx(0.5)
    group = scores.loc[scores["id"] == "i1", "group"]
    assert set(group) == {"color"}


def test_cider_uses_the_primary_references_throughout(tmp_path: Path) -> None:
    _, corpus = _evaluate(tmp_path, [_rows("ce")])
    texts = {row["id"]: row["text"] for row in _rows("ce") if (row["attack"], row["round"]) == ("bim", 10)}
    references = {name: [text] for name, text in REFERENCES.items()}
    with Scorer(metrics=("cider",)) as scorer:
        primary = scorer.score(texts, references).corpus["cider"]
        own = scorer.score(texts, {name: [text] for name, text in texts.items()}, idf_references=references)
    keys = {"arm": "ce", "attack": "bim", "metric": "cider"}
    assert _value(corpus, **keys, round=10, reference="primary") == pytest.approx(primary)
    assert own.corpus["cider"] != pytest.approx(primary)
    # clean against clean, with the clean output equal to the truth: the same score by either reference
    clean = [_value(corpus, **keys, round=0, reference=reference) for reference in ("primary", "secondary")]
    assert clean[0] == pytest.approx(clean[1])


def test_questions_have_an_accuracy(tmp_path: Path) -> None:
    answers = dict(zip(REFERENCES, ["two", "yes", "red"] * 4, strict=True))
    rows = _rows("ce", task="vqa", references=answers)
    for row in rows:
        if row["attack"] == "zero-step":
            row["text"] = {"two": "2", "yes": "Yes.", "red": "blue"}[row["references"][0]]
    scores, corpus = _evaluate(tmp_path, [rows])
    keys = {"arm": "ce", "attack": "zero-step", "reference": "primary"}
    assert _value(corpus, **keys, metric="vqa_accuracy") == pytest.approx(2 / 3)
    assert _value(corpus, **keys, metric="exact_match") == pytest.approx(1 / 3)
    assert {"vqa_accuracy", "exact_match", "bleu_1", "length"} <= set(scores["metric"])


def test_a_model_that_says_nothing(tmp_path: Path) -> None:
    rows = _rows("ce")
    for row in rows:
        row["text"] = ""
    _, corpus = _evaluate(tmp_path, [rows])
    of_arm = corpus[(corpus["arm"] == "ce") & (corpus["metric"] != "distinct")]
    assert (of_arm["value"] == 0).all()


def test_order_of_rows_and_files_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = _evaluate(tmp_path / "a", [_rows("ce"), _rows("prsl")])
    other = _evaluate(tmp_path / "b", [_rows("prsl")[::-1], _rows("ce")[::-1]])
    for left, right in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(left, right)


def test_random_pairs_meet_nobody_twice_and_never_themselves() -> None:
    for count in (2, 3, 50):
        references = {str(n): [f"reference {n}"] for n in range(count)}
        pairs = random_pairs(references)
        assert sorted(pairs.values()) == sorted(group[0] for group in references.values())
        assert all(pairs[name] != references[name][0] for name in references)
        assert random_pairs(dict(reversed(references.items()))) == pairs
    many = {str(n): [str(n)] for n in range(50)}
    assert random_pairs(many) != random_pairs(many, seed=1)


def test_one_image_has_no_random_pair(tmp_path: Path) -> None:
    _, corpus = _evaluate(tmp_path, [_rows("ce", references={"i0": "red dog"})])
    assert set(corpus["arm"]) == {"ce"}


def _drop_one(rows: Rows) -> Rows:
    return rows[:-1]


def _other_references(rows: Rows) -> Rows:
    rows[0]["references"] = ["something else"]
    return rows


def _twice(rows: Rows) -> Rows:
    return [*rows, rows[3]]


def _other_task(rows: Rows) -> Rows:
    return [{**row, "task": "vqa"} for row in rows]


def _no_reference(rows: Rows) -> Rows:
    return [{**row, "references": [" "]} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_one, "arm 'prsl', seed 0, attack 'blank', round 0 lacks 1 of 12 images, such as 'i11'"),
        (_other_references, "the references of 'i0' differ"),
        (_twice, "id 'i3' has two outputs for arm 'prsl'"),
        (_other_task, "outputs of the task 'vqa' among those of 'captions'"),
        (_no_reference, "the references of 'i0' differ"),
    ],
)
def test_tables_that_do_not_fit_together(change: Callable[[Rows], Rows], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _evaluate(tmp_path, [_rows("ce"), change(_rows("prsl"))])
    assert message in str(caught.value)
    assert str(tmp_path / "1.parquet") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "outputs.parquet"
    for content, message in ((None, "no such file"), (b"PAR1 no", "cannot be read as Parquet")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            evaluate([path], tmp_path / "out", QUICK)
    pq.write_table(pa.table({"task": ["captions"]}), path)
    with pytest.raises(UserError, match="columns arm, seed"):
        evaluate([path], tmp_path / "out", QUICK)
    with pytest.raises(UserError, match="no outputs in the tables"):
        evaluate([_write(path, [])], tmp_path / "out", QUICK)
    with pytest.raises(UserError, match="has no reference"):
        evaluate([_write(path, _no_reference(_rows("ce")))], tmp_path / "out", QUICK)
    with pytest.raises(UserError, match="run the attack stage"):
        evaluate([], tmp_path / "out", QUICK)


@pytest.mark.slow
def test_all_scores_of_a_task_of_the_demo(tmp_path: Path) -> None:
    """Six arms, six conditions, 128 images, and every second text new."""
    references = {f"i{n}": f"thing number {n} of many" for n in range(128)}
    arms = [_rows(f"arm{n}", references=references) for n in range(6)]
    for place, row in enumerate(row for rows in arms for row in rows):
        if place % 2:
            row["text"] += f" and thing {place}"
    scores, corpus = _evaluate(tmp_path, arms, EvaluateConfig())
    versions = json.loads((tmp_path / "out" / "versions.json").read_text())
    assert {"java", "meteor", "cider", "bertscore_f1"} <= set(versions)
    assert set(corpus["metric"]) == {*EvaluateConfig().metrics, "exact_match", "length", "distinct"}
    clean = scores[(scores["attack"] == "bim") & (scores["round"] == 0) & (scores["id"] == "i0")]
    assert clean.loc[clean["metric"] == "bertscore_f1", "value"].tolist() == pytest.approx([1] * 12, abs=1e-5)
