"""The scores against pycocoevalcap itself, and on what it cannot digest."""

from __future__ import annotations

import os
import random
import site
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor as UpstreamMeteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer as UpstreamTokenizer

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import ALL, Scorer, Scores, ptb, score_captions
from prsl_kernels.experiments.metrics.java import find_java
from prsl_kernels.experiments.metrics.scorer import BLEU

TEXT = """a man woman dog cat riding wave surfboard on in the park with red blue hat sitting table Two people's isn't
    don't "quoted" (small) U.S. 5 3.5 10:30 1/2 it's, standing; near: building. — red-haired o'clock & $5 50% #tag
    http://x.com @user é ñandú 日本 🐶 مرحبا\u200f नमस्ते cannot gonna ` '' ... - -- / \\ | * ½ C++ [x] {y} < > = ~ ^ _
    (555) 123-4567"""
WORDS = [*TEXT.split(), "no-break\u00a0space", "ideographic\u3000space"]
TOKEN_METRICS = ALL[:-1]


def _captions(seed: int, count: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = random.Random(seed)

    def caption() -> str:
        return rng.choice([" ", "  "]).join(rng.choices(WORDS, k=rng.randint(1, 14))) + rng.choice(["", ".", " dog!"])

    names = [f"{rng.randrange(10**6)}-{place}" for place in range(count)]
    return {name: caption() for name in names}, {name: [caption() for _ in range(rng.randint(1, 5))] for name in names}


def _upstream(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """Scores by pycocoevalcap's own classes, as its `eval.py` calls them."""
    tokenizer = UpstreamTokenizer()
    expected = tokenizer.tokenize({name: [{"caption": text} for text in group] for name, group in references.items()})
    said = tokenizer.tokenize({name: [{"caption": text}] for name, text in candidates.items()})
    said = {name: said[name] for name in expected}
    corpus, columns = {}, {}
    total, values = Bleu(4).compute_score(expected, said, verbose=0)
    for order, metric in enumerate(BLEU):
        corpus[metric], columns[metric] = total[order], values[order]
    for metric, scorer in (("rouge_l", Rouge()), ("cider", Cider()), ("meteor", UpstreamMeteor())):
        corpus[metric], columns[metric] = scorer.compute_score(expected, said)
    items = {name: {metric: columns[metric][place] for metric in columns} for place, name in enumerate(expected)}
    return Scores(corpus, items, {})


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(metrics=TOKEN_METRICS) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def _java_on_path() -> Iterator[None]:
    """pycocoevalcap takes what is called `java`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PATH", str(Path(find_java()[0]).parent), prepend=os.pathsep)
        yield


@pytest.mark.usefixtures("_java_on_path")
def test_equals_pycocoevalcap(scorer: Scorer) -> None:
    candidates, references = _captions(1, 300)
    expected = _upstream(candidates, references)
    ours = scorer.score(candidates, references)
    assert ours.corpus == pytest.approx(expected.corpus, rel=0, abs=1e-12)
    assert ours.items.keys() == candidates.keys()
    for name in candidates:
        assert ours.items[name] == pytest.approx(expected.items[name], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "line_break", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_line_breaks_are_white_space(scorer: Scorer, line_break: str) -> None:
    broken = {
        "a": f"{line_break}a man{line_break}rides",
        "b": f"a cat{line_break}",
        "c": f"two{line_break}{line_break}dogs",
    }
    whole = {"a": "a man rides", "b": "a cat", "c": "two dogs"}
    references = {"a": ["the man rides"], "b": ["one cat", "a cat sits"], "c": ["two black dogs"]}
    broken_references = {name: [text.replace(" ", line_break) for text in group] for name, group in references.items()}
    expected = scorer.score(whole, references)
    found = scorer.score(broken, broken_references)
    assert found.items == expected.items
    assert found.corpus == expected.corpus


def test_empty_candidates_score_nothing_and_shift_nothing(scorer: Scorer) -> None:
    candidates, references = _captions(2, 20)
    expected = scorer.score(candidates, references)
    names = list(candidates)
    for place, blank in zip((0, 1, 10, 19), ("", " \t", "? .", "\u2028"), strict=True):
        candidates[names[place]] = blank
    found = scorer.score(candidates, references)
    for place, name in enumerate(names):
        if place in (0, 1, 10, 19):
            assert set(found.items[name].values()) == {0.0}
        else:
            assert found.items[name] == expected.items[name]
    assert scorer.score(dict.fromkeys(names, ""), references).corpus == dict.fromkeys(TOKEN_METRICS, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "dog", "\x00", "a\x00dog", "\ud800", "a \udfff dog", "🐶", "👩🏽\u200d🚀", "日本", "كلب\u200f", "\u202eabc",
        "|||", "a ||| dog",
        "SCORE ||| a ||| a", "EVAL ||| 1.0", "Error", '"', "''", "``", "-LRB-", "<b>dog</b>", "&lt;", "\\", "%s {0}",
        "\ufeffdog", " ".join(map(str, range(2000))),
        "x" * 50_000, "İ", "½", "a" * 3 + "\u0301" * 100, "\u3000", "1" * 400,
    ],
)  # fmt: skip
def test_hostile_captions_neither_crash_nor_shift(scorer: Scorer, text: str) -> None:
    candidates = {"1": "a man rides", "2": text, "3": "two dogs"}
    references = {"1": ["the man rides"], "2": ["a dog", text + " dog"], "3": ["two dogs run"]}
    items = scorer.score(candidates, references).items
    plain = scorer.score({**candidates, "2": "a cat"}, {**references, "2": ["a dog"]}).items
    for name in ("1", "3"):
        for metric in set(TOKEN_METRICS) - {"cider"}:  # whose idf belongs to the set
            assert items[name][metric] == plain[name][metric]
    assert all(0 <= value <= (10 + 1e-9 if metric == "cider" else 1) for metric, value in items["2"].items())
    same = scorer.score({"1": "a man", "2": f"{text} dog", "3": "two"}, {**references, "2": [f"{text} dog"]}).items["2"]
    assert same["rouge_l"] == pytest.approx(1)
    assert same["bleu_1"] == pytest.approx(1)
    assert same["meteor"] > 0.3


def test_an_empty_reference_beside_another_counts_as_in_pycocoevalcap(scorer: Scorer) -> None:
    items = scorer.score({"1": "a dog", "2": "x"}, {"1": ["", "a dog"], "2": ["y"]}).items["1"]
    alone = scorer.score({"1": "a dog", "2": "x"}, {"1": ["a dog"], "2": ["y"]}).items["1"]
    assert items["cider"] == pytest.approx(alone["cider"] / 2)
    assert items["rouge_l"] == alone["rouge_l"]
    assert items["meteor"] == alone["meteor"]


def test_references_of_nothing_but_punctuation(scorer: Scorer) -> None:
    result = scorer.score({"1": "a dog", "2": "", "3": "?"}, {"1": ["!"], "2": ["!"], "3": ["?"]})
    assert result.items["1"] == pytest.approx(dict.fromkeys(TOKEN_METRICS, 0), abs=1e-9)
    assert result.items["2"] == dict.fromkeys(TOKEN_METRICS, 0)
    assert result.items["3"] == dict.fromkeys(TOKEN_METRICS, 0) | {"rouge_l": pytest.approx(1)}  # as pycocoevalcap


def test_cider_of_one_image_is_zero_and_its_idf_can_be_frozen(scorer: Scorer) -> None:
    assert scorer.score({"1": "a dog"}, {"1": ["a dog"]}).corpus["cider"] == 0
    candidates = {"1": "a dog", "2": "a cat"}
    truth = {"1": ["a dog"], "2": ["a cat"]}
    own = {"1": ["a dog"], "2": ["a dog"]}
    assert scorer.score(candidates, own).items["1"]["cider"] == 0  # "dog" is in all references
    assert scorer.score(candidates, own, idf_references=truth).items["1"]["cider"] > 4
    assert scorer.score(candidates, truth, idf_references={"1": ["a dog"]}).corpus["cider"] == 0  # log 1


def test_cider_with_frozen_documents_does_not_depend_on_the_company(scorer: Scorer) -> None:
    candidates, references = _captions(7, 60)
    whole = scorer.score(candidates, references)
    rng = random.Random(0)
    for count in (1, 2, 30):
        names = rng.sample(list(candidates), count)
        part = scorer.score(
            {name: candidates[name] for name in names},
            {name: references[name] for name in names},
            idf_references=references,
            in_context=False,
        )
        for name in names:
            if not candidates[name].endswith("."):  # whose tokens depend on the next caption
                assert part.items[name]["cider"] == whole.items[name]["cider"]
        assert part.corpus["cider"] == pytest.approx(sum(part.items[n]["cider"] for n in names) / count)
    assert any(row["cider"] > 0.1 for row in whole.items.values())


def test_killed_in_the_middle_and_two_at_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second scorer in a German, Latin-1 environment, whose Java is killed, beside the first one."""
    candidates, references = _captions(3, 60)
    expected = scorer.score(candidates, references)
    others, their_references = _captions(5, 60)
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-1")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR -Dfile.encoding=ISO-8859-1")
    with Scorer(metrics=("bleu_1", "meteor")) as second, ThreadPoolExecutor(1) as pool:
        process = second._meteor._server._process  # type: ignore[union-attr]
        answers = pool.submit(second.score, candidates, references)
        process.kill()  # while it starts, or in the middle of its answers
        first = scorer.score(others, their_references)
        found = answers.result()
        assert second._meteor._server._process is not process  # type: ignore[union-attr]
        assert second.score(others, their_references).corpus["meteor"] == first.corpus["meteor"]
        # METEOR's alignment of repetitions with repetitions takes cubic time: for 20,000 words, years.
        endless = "dog " * 20_000
        second._meteor._timeout = 0.5  # type: ignore[union-attr]
        with pytest.raises(UserError, match=r"did not answer within 0\.5 seconds at a caption of 20000 words"):
            second.score({"1": "a dog", "2": endless}, {"1": ["a dog"], "2": [endless]})
    for name in candidates:
        assert found.items[name]["meteor"] == expected.items[name]["meteor"]
        assert found.items[name]["bleu_1"] == expected.items[name]["bleu_1"]
    assert found.corpus["meteor"] == expected.corpus["meteor"]


def test_nothing_is_written_beside_the_packages(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ptb.JAR.parents[1]
    before = {path: path.stat().st_mtime_ns for path in package.rglob("*") if "__pycache__" not in path.parts}
    monkeypatch.chdir(package)
    scorer.score({"1": "never seen before", "2": "nor this"}, {"1": ["seen once"], "2": ["this"]})
    after = {path: path.stat().st_mtime_ns for path in package.rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert str(package).startswith(tuple(site.getsitepackages()))


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({"a": "x", "b": "y"}, {"a": ["x"]}, "1 candidates without references: 'b'"),
        (
            {"a": "x"},
            {"a": ["x"], **{f"r{n}": ["x"] for n in range(9)}},
            "9 references without a candidate: 'r0', 'r1'",
        ),
        ({"a": None}, {"a": ["x"]}, "candidate 'a' is a NoneType"),
        ({"a": "x"}, {"a": "x"}, "references of 'a' must be a list of strings"),
        ({"a": "x"}, {"a": None}, "references of 'a' must be a list of strings"),
        ({"a": "x"}, {"a": ["x", 1]}, "references of 'a' must be a list of strings"),
        ({"a": "x"}, {"a": []}, "references of 'a' are an empty list"),
        ({"a": "x"}, {"a": ["", "\u2028"]}, "references of 'a' are all empty"),
    ],
)
def test_wrong_input_is_named(candidates: dict[str, str], references: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        score_captions(candidates, references, metrics=("bleu_1",))
    assert message in str(caught.value)


def test_metrics_are_chosen_and_checked() -> None:
    scores = score_captions({"a": "a dog"}, {"a": ["a dog"]}, metrics=("rouge_l", "bleu_2"))
    assert scores.corpus == {"bleu_2": pytest.approx(1, abs=1e-8), "rouge_l": pytest.approx(1)}
    assert set(scores.versions) == {"tokenizer", "java", "bleu", "rouge_l"}
    for wrong in (("spice",), ()):
        with pytest.raises(UserError, match="choose from bleu_1"):
            score_captions({"a": "a dog"}, {"a": ["a dog"]}, metrics=wrong)


def test_versions_name_every_back_end(scorer: Scorer) -> None:
    assert set(scorer.versions) == {"tokenizer", "java", "bleu", "rouge_l", "cider", "meteor"}
    assert "stanford-corenlp-3.4.1.jar (sha256 2fcb91bb" in scorer.versions["tokenizer"]
    assert "meteor-1.5.jar (sha256 1e57b4c7" in scorer.versions["meteor"]
    assert "version" in scorer.versions["java"]
