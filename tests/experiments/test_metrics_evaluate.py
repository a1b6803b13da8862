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

from prsl_kernels.experiments.attacks.store import SCHEMA as ATTACK_SCHEMA
from prsl_kernels.experiments.config import EvaluateConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import Scorer
from prsl_kernels.experiments.metrics.evaluate import (
    CORPUS_SCHEMA,
    SCORES_SCHEMA,
    WORST_SCHEMA,
    check_primary_score,
    evaluate,
)
from prsl_kernels.experiments.metrics.outputs import COLUMNS

QUICK = EvaluateConfig(metrics=("bleu_1", "rouge_l", "cider"))
REFERENCES = {f"i{n}": f"{color} {thing}" for n, (color, thing) in enumerate(
    (color, thing) for color in ("red", "green", "blue") for thing in ("dog", "cat", "kite", "boat"))}  # fmt: skip
CONDITIONS = [("bim", 0), ("bim", 1), ("bim", 10), ("zero-step", 10), ("random-sign", 10), ("blank", 0)]
PLAIN = {"exact_match", "length", "distinct", "distinct_1", "distinct_2", "empty"}
# The attack stage's columns that are read, without its own check for null, and one that nobody knows.
SCHEMA = pa.schema([*(pa.field(name, ATTACK_SCHEMA.field(name).type) for name in COLUMNS), pa.field("x", pa.binary())])
Rows = list[dict[str, Any]]


def _row(
    task: str, arm: str, seed: int, condition: tuple[str, int, str], name: str, references: list[str], text: str
) -> dict[str, Any]:
    attack, number, role = condition
    return dict.fromkeys(SCHEMA.names) | {
        "task": task, "arm": arm, "seed": seed, "attack": attack, "round": number, "role": role, "id": name,
        "group": "", "references": references, "text": text,
    }  # fmt: skip


def _more(rows: Rows, condition: tuple[str, int, str], texts: dict[str, str], **columns: str) -> Rows:
    """Rows of one more condition of the same arm."""
    first, known = rows[0], {row["id"]: row["references"] for row in rows}
    return [
        _row(first["task"], first["arm"], first["seed"], condition, name, known[name], text) | columns
        for name, text in texts.items()
    ]


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
            role = "primary" if attack == "bim" else "control"
            values = _row(task, arm, seed, (attack, number, role), name, [reference], text)
            values["group"] = "color" if place % 2 else "shape"
            rows.append(values)
    return rows


def _write(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def _evaluate(
    tmp_path: Path, arms: list[Rows], config: EvaluateConfig = QUICK, score: str = "rouge_l"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    tmp_path.mkdir(exist_ok=True)
    paths = [_write(tmp_path / f"{place}.parquet", rows) for place, rows in enumerate(arms)]
    evaluate(paths, tmp_path / "out", config, primary_score=score)
    scores, corpus = (pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("scores", "corpus"))
    assert scores.schema.equals(SCORES_SCHEMA)
    assert corpus.schema.equals(CORPUS_SCHEMA)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus.parquet", "scores.parquet", "versions.json", "worst.parquet",
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
    sets = (len(CONDITIONS) + 1) * len(REFERENCES)  # and the worst case
    assert counts["ce", 0, "primary"] == counts["prsl", 0, "primary"] == counts["ce", 1, "primary"] == sets * 5
    assert counts["ce", 0, "secondary"] == sets * 4  # without the length
    assert counts["random-pair", 0, "primary"] == len(REFERENCES) * 5
    assert scores["value"].notna().all()
    assert counts["ce", 0, "blank"] == 3 * len(REFERENCES)
    assert set(corpus["metric"]) == {"bleu_1", "rouge_l", "cider", *PLAIN}


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
    of_arm = corpus[corpus["arm"] == "ce"]
    counted = of_arm["metric"].isin(["distinct", "empty"])
    assert (of_arm.loc[counted, "value"] == 1).all()
    assert (of_arm.loc[~counted, "value"] == 0).all()
    assert not of_arm["metric"].isin(["distinct_1", "distinct_2"]).any()  # there are no words


def test_order_of_rows_and_files_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = _evaluate(tmp_path / "a", [_rows("ce"), _rows("prsl")])
    other = _evaluate(tmp_path / "b", [_rows("prsl")[::-1], _rows("ce")[::-1]])
    for left, right in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(left, right)


def test_one_image_has_no_random_pair(tmp_path: Path) -> None:
    _, corpus = _evaluate(tmp_path, [_rows("ce", references={"i0": "red dog"})])
    assert set(corpus["arm"]) == {"ce"}


SUBSET = ["i1", "i4", "i5", "i9"]


def test_scores_of_a_subset_are_those_of_the_whole(tmp_path: Path) -> None:
    """The same texts for part of the images: the same score for each, and the means over the part."""
    arms = [_rows("ce"), _rows("prsl")]
    for rows in arms:
        texts = {row["id"]: row["text"] for row in rows if (row["attack"], row["round"]) == ("bim", 10)}
        rows += _more(rows, ("square", 10, "query"), {name: texts[name] for name in SUBSET})
    scores, corpus = _evaluate(tmp_path, arms, EvaluateConfig(metrics=("bleu_2", "rouge_l", "cider", "meteor")))
    keys = ["arm", "seed", "id", "reference", "metric"]
    whole = scores[(scores["attack"] == "bim") & (scores["round"] == 10) & scores["id"].isin(SUBSET)]
    whole = whole[whole["reference"] != "blank"].set_index(keys)["value"].sort_index()
    part = scores[scores["attack"] == "square"].set_index(keys)["value"].sort_index()
    pd.testing.assert_series_equal(part, whole, check_exact=True)
    assert part.xs("cider", level="metric").nunique() > 1
    for (arm, reference), values in part.xs("cider", level="metric").groupby(["arm", "reference"]):
        found = _value(corpus, arm=arm, attack="square", reference=reference, metric="cider")
        assert found == pytest.approx(values.mean(), abs=1e-12)
    # with document frequencies of the part, the scores would be others
    texts = {row["id"]: row["text"] for row in arms[0] if row["attack"] == "square"}
    with Scorer(metrics=("cider",)) as scorer:
        own = scorer.score(texts, {name: [REFERENCES[name]] for name in SUBSET}).corpus["cider"]
    assert _value(corpus, arm="ce", attack="square", reference="primary", metric="cider") != pytest.approx(own)


def test_a_subset_is_the_same_for_all_arms(tmp_path: Path) -> None:
    arms = [_rows("ce"), _rows("prsl")]
    for rows, names in zip(arms, (SUBSET[:-1], SUBSET), strict=True):
        rows += _more(rows, ("square", 10, "query"), {name: REFERENCES[name] for name in names})
    with pytest.raises(UserError) as caught:
        _evaluate(tmp_path, arms)
    assert str(caught.value).startswith(
        f"{tmp_path / '0.parquet'}: arm 'ce', seed 0, attack 'square', round 10 lacks 1 of 4 images, such as 'i9'"
    )


def test_the_ensemble_is_of_all_images(tmp_path: Path) -> None:
    rows = _rows("ce")
    rows += _more(rows, ("dlr", 10, "ensemble"), {name: REFERENCES[name] for name in SUBSET})
    with pytest.raises(UserError, match="attack 'dlr', round 10 lacks 8 of 12 images"):
        _evaluate(tmp_path, [rows])


@pytest.mark.parametrize(("role", "count"), [("primary", 4), ("control", 0)])
def test_there_is_one_primary_attack(tmp_path: Path, role: str, count: int) -> None:
    with pytest.raises(UserError, match=rf"{count} primary attacks \(.*\) where there must be one"):
        _evaluate(tmp_path, [[{**row, "role": role} for row in _rows("ce")]])


def test_transferred_images_have_no_row_for_their_own_arm(tmp_path: Path) -> None:
    arms = {name: _rows(name) for name in ("ce", "prsl", "other")}
    transferred = [
        _more(rows, (f"transfer-from-{source}", 10, "transfer"), dict.fromkeys(SUBSET, "a dog"), source=source)
        for arm, rows in arms.items() for source in arms if source != arm
    ]  # fmt: skip
    scores, _ = _evaluate(tmp_path, [*arms.values(), *transferred])
    found = scores[scores["attack"] == "transfer-from-ce"]
    assert set(found["arm"]) == {"prsl", "other"}
    assert set(found["id"]) == set(SUBSET)
    kept = [rows for rows in transferred if (rows[0]["arm"], rows[0]["source"]) != ("prsl", "ce")]
    with pytest.raises(UserError, match="arm 'prsl', seed 0, attack 'transfer-from-ce', round 10 is missing"):
        _evaluate(tmp_path / "less", [*arms.values(), *kept])


def _with_ensemble(arm: str, task: str = "captions", references: dict[str, str] = REFERENCES) -> Rows:
    """Each attack is the worst for some images, and some tie; the query attack and earlier rounds are worse yet."""
    rows = _rows(arm, task=task, references=references)
    names = list(references)
    for attack, rounds, role in (("apgd", (5, 20), "ensemble"), ("dlr", (10,), "ensemble"), ("square", (99,), "query")):
        for number in rounds:
            texts = dict(references)
            for place, name in enumerate(names):
                if role == "query" or number == 5:
                    texts[name] = "nothing of it"
                elif attack == "apgd" and place % 3 == 0:
                    texts[name] = "black " + references[name].split()[-1]
                elif attack == "dlr" and place % 4 == 0:
                    texts[name] = f"no {arm}"
            rows += _more(rows, (attack, number, role), texts)
    return rows


@pytest.mark.parametrize("score", ["rouge_l", "exact_match", "cider"])
def test_worst_is_the_lowest_primary_score(tmp_path: Path, score: str) -> None:
    arms = [_with_ensemble("ce"), _with_ensemble("prsl")]
    config = EvaluateConfig(metrics=("bleu_2", "rouge_l", "cider", "meteor"))
    scores, corpus = _evaluate(tmp_path, arms, config, score)
    worst = pq.read_table(tmp_path / "out" / "worst.parquet")
    assert worst.schema.equals(WORST_SCHEMA)
    chosen = {(row["arm"], row["id"]): (row["attack"], row["round"]) for row in worst.to_pylist()}
    assert len(chosen) == worst.num_rows == 2 * len(REFERENCES)
    assert {attack for attack, _ in chosen.values()} == {"apgd", "bim", "dlr"}
    compared = scores[scores["reference"].isin(["primary", "secondary"])]
    values = compared.set_index(["arm", "id", "reference", "attack", "round", "metric"])["value"].sort_index()
    for rows in arms:
        arm = rows[0]["arm"]
        texts = {}
        for name in REFERENCES:
            lowest, expected = 2.0 if score != "cider" else 20.0, ("", 0)
            for attack, number in (("apgd", 20), ("bim", 10), ("dlr", 10)):  # by name: the first of those that tie
                value = values[arm, name, "primary", attack, number, score]
                if value < lowest:
                    lowest, expected = value, (attack, number)
            assert chosen[arm, name] == expected
            for reference in ("primary", "secondary"):
                found = values[arm, name, reference, "worst", 20]
                assert found.to_dict() == values[arm, name, reference, expected[0], expected[1]].to_dict()
            [texts[name]] = [
                row["text"] for row in rows if (row["id"], row["attack"], row["round"]) == (name, *expected)
            ]
        with Scorer(metrics=config.metrics) as scorer:
            references = {name: [text] for name, text in REFERENCES.items()}
            own = scorer.score(texts, references, in_context=False).corpus
        for metric, value in own.items():
            assert _value(corpus, arm=arm, attack="worst", reference="primary", metric=metric) == value


def test_worst_of_one_attack_is_its_last_round(tmp_path: Path) -> None:
    answers = dict(zip(REFERENCES, ["two", "yes", "red"] * 4, strict=True))
    scores, corpus = _evaluate(tmp_path, [_rows("ce", task="vqa", references=answers)], score="vqa_accuracy")
    for table in (scores, corpus):
        keys = [name for name in table.columns if name not in ("attack", "value")]
        last = table[(table["attack"] == "bim") & (table["round"] == 10)].set_index(keys)["value"].sort_index()
        worst = table[table["attack"] == "worst"].set_index(keys)["value"].sort_index()
        assert len(last) > 0
        pd.testing.assert_series_equal(worst, last, check_exact=True)


def test_diversity_by_hand(tmp_path: Path) -> None:
    references = {"i0": "red dog", "i1": "red cat", "i2": "one", "i3": "two"}
    said = {"i0": "A red dog.", "i1": "a red cat", "i2": " ", "i3": "Dog"}
    for metrics, tokens, bigrams in (
        (("rouge_l",), 4 / 7, 3 / 4),  # a red dog / a red cat / dog; "a red" twice
        (("bertscore_f1",), 5 / 7, 3 / 4),  # "dog." is a word of its own
    ):
        rows = _rows("ce", references=references)
        rows += _more(rows, ("dlr", 10, "probe"), said)
        _, corpus = _evaluate(tmp_path / metrics[0], [rows], EvaluateConfig(metrics=metrics), metrics[0])  # type: ignore[arg-type]
        keys = {"attack": "dlr", "reference": "primary"}
        assert _value(corpus, **keys, metric="distinct_1") == pytest.approx(tokens)
        assert _value(corpus, **keys, metric="distinct_2") == pytest.approx(bigrams)
        assert _value(corpus, **keys, metric="distinct") == 4
        assert _value(corpus, **keys, metric="empty") == 1 / 4
        versions = json.loads((tmp_path / metrics[0] / "out" / "versions.json").read_text())
        assert ("PTB" in versions["distinct"]) == (metrics == ("rouge_l",))


def test_blank_images_are_compared_with_what_is_said_of_others(tmp_path: Path) -> None:
    rows = _with_ensemble("ce")
    for row in rows:
        if row["attack"] == "blank" and row["id"] in SUBSET:
            row["text"] = "Black " + row["references"][0].split()[-1] + "!"
    config = EvaluateConfig(metrics=("rouge_l", "bertscore_f1"))
    scores, corpus = _evaluate(tmp_path, [rows], config)
    found = scores[scores["reference"] == "blank"]
    assert set(zip(found["attack"], found["round"], strict=True)) == {("bim", 0), ("bim", 10), ("worst", 20)}
    assert set(found["metric"]) == {"exact_match", "bertscore_f1"}
    assert len(found) == 3 * len(REFERENCES) * 2
    # in round 10 "black thing" stands where the place is odd
    equal = {name for place, name in enumerate(REFERENCES) if place % 2} & set(SUBSET)
    values = found[(found["attack"] == "bim") & (found["round"] == 10)].set_index(["metric", "id"])["value"]
    assert set(values["exact_match"][values["exact_match"] == 1].index) == equal
    assert (values["bertscore_f1"][sorted(equal)] > 0.8).all()
    blank = {"attack": "bim", "reference": "blank", "metric": "exact_match"}
    assert _value(corpus, **blank, round=10) == pytest.approx(len(equal) / len(REFERENCES))
    assert _value(corpus, **blank, round=0) == 0
    assert _value(corpus, attack="worst", reference="blank", metric="bertscore_f1") < 0.9


def test_targets(tmp_path: Path) -> None:
    rows = _rows("ce")
    said = {name: "a blue sky" if name in SUBSET[:1] else text for name, text in REFERENCES.items()}
    more = _more(rows, ("towards", 10, "ensemble"), said)
    for row in more:
        row["target"] = "A blue sky!" if row["id"] in SUBSET else None
    scores, corpus = _evaluate(tmp_path, [rows + more], EvaluateConfig(metrics=("rouge_l", "bertscore_f1")))
    found = scores[scores["reference"] == "target"].set_index(["metric", "id"])["value"]
    assert found["target_match"].to_dict() == {"i1": 1, "i4": 0, "i5": 0, "i9": 0}
    assert found["target_bertscore_f1"]["i1"] == found["target_bertscore_f1"].max()
    assert _value(corpus, attack="towards", reference="target", metric="target_match") == 1 / 4
    mean = found["target_bertscore_f1"].mean()
    assert _value(corpus, reference="target", metric="target_bertscore_f1") == pytest.approx(mean)
    scores, _ = _evaluate(tmp_path / "quick", [rows + more])
    assert set(scores.loc[scores["reference"] == "target", "metric"]) == {"target_match"}


def test_a_primary_score_that_is_not_computed_is_refused(tmp_path: Path) -> None:
    for task, score in (("captions", "meteor"), ("captions", "vqa_accuracy"), ("vqa", "length")):
        with pytest.raises(UserError, match=rf"tasks\.{task}\.primary\.score '{score}' is not computed; add it"):
            _evaluate(tmp_path, [_rows("ce", task=task)], score=score)
    assert not (tmp_path / "out").exists()
    for score in ("rouge_l", "exact_match", "vqa_accuracy"):
        check_primary_score("vqa", QUICK, score)


def test_columns_of_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    whole = pq.read_table

    def spy(path: Path, columns: list[str]) -> pa.Table:
        read.append(columns)
        return whole(path, columns=columns)

    monkeypatch.setattr(pq, "read_table", spy)
    path = _write(tmp_path / "0.parquet", [{**row, "x": b"0"} for row in _rows("ce")])
    evaluate([path], tmp_path / "out", QUICK, primary_score="rouge_l")
    assert read == [list(COLUMNS)]


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


def _without(attack: str, number: int, ids: int = 1) -> Callable[[Rows], Rows]:
    """Without the rows of the first `ids` ids."""

    def change(rows: Rows) -> Rows:
        lost = sorted(REFERENCES)[:ids]
        return [row for row in rows if (row["attack"], row["round"]) != (attack, number) or row["id"] not in lost]

    return change


def _other_role(rows: Rows) -> Rows:
    return [{**row, "role": "query" if row["attack"] == "zero-step" else row["role"]} for row in rows]


def _no_text(rows: Rows) -> Rows:
    return [{**rows[0], "role": None}, *rows[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_one, "arm 'prsl', seed 0, attack 'blank', round 0 lacks 1 of 12 images, such as 'i11'"),
        (_other_references, "the references of 'i0' differ"),
        (_twice, "id 'i3' has two outputs for arm 'prsl'"),
        (_other_task, "outputs of the task 'vqa' among those of 'captions'"),
        (_no_reference, "the references of 'i0' differ"),
        (_without("bim", 1), "attack 'bim', round 1 lacks 1 of 12 images, such as 'i0'"),
        (_without("bim", 1, 12), "arm 'prsl', seed 0, attack 'bim', round 1 is missing"),
        (_without("bim", 0, 12), "arm 'prsl', seed 0, attack 'bim', round 0 is missing"),
        (_without("jpeg", 0), "attack 'jpeg', round 0 is missing"),
        (_other_role, "attack 'zero-step', round 10 has the role 'query', and 'control' elsewhere"),
        (_no_text, "the column role has rows without a value"),
    ],
)
def test_tables_that_do_not_fit_together(change: Callable[[Rows], Rows], message: str, tmp_path: Path) -> None:
    first = _rows("ce")
    if "jpeg" in message:
        first += _more(first, ("jpeg", 0, "control"), REFERENCES)
    with pytest.raises(UserError) as caught:
        _evaluate(tmp_path, [first, change(_rows("prsl"))])
    assert message in str(caught.value)
    assert str(tmp_path / "1.parquet") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "outputs.parquet"
    for content, message in ((None, "no such file"), (b"PAR1 no", "cannot be read as Parquet")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            evaluate([path], tmp_path / "out", QUICK, primary_score="rouge_l")
    pq.write_table(pa.table({"task": ["captions"]}), path)
    with pytest.raises(UserError, match="columns arm, seed"):
        evaluate([path], tmp_path / "out", QUICK, primary_score="rouge_l")
    with pytest.raises(UserError, match="no outputs in the tables"):
        evaluate([_write(path, [])], tmp_path / "out", QUICK, primary_score="rouge_l")
    with pytest.raises(UserError, match="has no reference"):
        evaluate([_write(path, _no_reference(_rows("ce")))], tmp_path / "out", QUICK, primary_score="rouge_l")
    with pytest.raises(UserError, match="run the attack stage"):
        evaluate([], tmp_path / "out", QUICK, primary_score="rouge_l")


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
    assert set(corpus["metric"]) == {*EvaluateConfig().metrics, *PLAIN}
    clean = scores[(scores["attack"] == "bim") & (scores["round"] == 0) & (scores["id"] == "i0")]
    clean = clean[clean["reference"] != "blank"]
    assert clean.loc[clean["metric"] == "bertscore_f1", "value"].tolist() == pytest.approx([1] * 12, abs=1e-5)
