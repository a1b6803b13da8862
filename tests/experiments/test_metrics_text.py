"""Scores of two strings: exact match, word F1, VQA accuracy, and the cleaning of text."""

from __future__ import annotations

import itertools
import sys

import pytest

from prsl_kernels.experiments.metrics.outputs import random_pairs
from prsl_kernels.experiments.metrics.text import (
    distinct_count,
    distinct_ngrams,
    exact_match,
    normalize,
    normalize_answer,
    one_line,
    vqa_accuracy,
    word_count,
    word_f1,
)


def test_one_line_is_one_valid_line_whatever_is_in_it() -> None:
    text = one_line("".join(f"{chr(code)}a" for code in range(sys.maxunicode + 1)))
    assert len(text.splitlines()) == 1
    text.encode()  # lone surrogates would raise
    assert one_line("\x00") == "\x00"


def test_one_line_keeps_white_space_that_breaks_no_line() -> None:
    assert one_line("a  b\tc\u00a0d\u3000e") == "a  b\tc\u00a0d\u3000e"
    assert one_line("a \r\n\u2028 b") == "a b"
    assert one_line("\ud83d\udc36 \ud83d x") == "\U0001f436 � x"


def test_normalize() -> None:
    assert normalize(" Woman:  RED-hair, Straße\u2028ﬁn ") == "woman red hair strasse fin"
    assert normalize("?!") == "?!"
    assert normalize(" \u2029 ") == ""
    assert normalize("🐶 + 日本") == "🐶 + 日本"


def test_exact_match() -> None:
    assert exact_match("Flag: FRANCE", ["flag of france", "flag france"]) == 1
    assert exact_match("flag", ["flag france"]) == 0
    assert exact_match("", ["", "a"]) == 0
    assert exact_match("?", ["!"]) == 0
    assert exact_match("!", ["!"]) == 1


def test_word_f1() -> None:
    assert word_f1("a a b", ["a b c"]) == pytest.approx(2 * 2 / 6)
    assert word_f1("a b", ["x", "b a", "a"]) == 1
    assert word_f1("", ["a"]) == 0
    assert word_f1("a", ["?"]) == 0


def test_counts() -> None:
    assert word_count(" two\u2028words ") == 2
    assert word_count("") == 0
    assert distinct_count(["A dog.", "a dog", "a cat", ""]) == 3


def test_distinct_ngrams() -> None:
    texts = [["a", "dog"], ["a", "dog", "runs"], ["a"], []]
    assert distinct_ngrams(texts, 1) == 3 / 6
    assert distinct_ngrams(texts, 2) == 2 / 3  # n-grams do not reach over the end of a text
    assert distinct_ngrams(texts, 3) == 1
    assert distinct_ngrams(texts, 4) is None
    assert distinct_ngrams([], 1) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),  # a comma between digits: punctuation is dropped
        ("black/white", "black white"),  # otherwise it becomes a space
        ("black, white", "black white"),
        ("3.5", "3.5"),
        ("5 p.m.", "5 pm"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # lacks two apostrophes
        ("couldn'tve", "couldn't've"),
        ("shed", "shed"),
        ("a", "a"),
        ("red\nand\tblue", "red and blue"),
        ("", ""),
    ],
)
def test_normalize_answer(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected
    assert normalize_answer(expected) == expected


def test_vqa_accuracy_with_ten_answers_is_the_official_one() -> None:
    for matches in range(11):
        answers = ["Yes."] * matches + ["no"] * (10 - matches)
        leave_one_out = [answers[:place] + answers[place + 1 :] for place in range(10)]
        official = sum(min(1, others.count("Yes.") / 3) for others in leave_one_out) / 10
        assert vqa_accuracy("yes", answers) == pytest.approx(official, abs=1e-15)
    assert vqa_accuracy("yes", ["yes"] * 10) == 1


def test_vqa_accuracy_with_few_answers_is_equality() -> None:
    assert vqa_accuracy("The circle", ["circle"]) == 1
    assert vqa_accuracy("square", ["circle"]) == 0
    assert vqa_accuracy("a circle", ["square", "circle", "line"]) == 1
    assert vqa_accuracy("", ["circle"]) == 0
    assert vqa_accuracy("an", ["the"]) == 0  # nothing but articles


def test_scores_stay_in_range_for_hostile_text() -> None:
    texts = ["", " ", "\x00", "\ud800", "?", "a", "a" * 10_000, "مرحبا\u200f", "日本", "\u2028", "🐶" * 100, "|||"]
    for candidate, reference in itertools.product(texts, texts):
        for score in (exact_match, word_f1, vqa_accuracy):
            value = score(candidate, [reference])
            assert 0 <= value <= 1
            assert value == (1 if candidate == reference and candidate.strip() else 0)


def test_random_pairs_meet_nobody_twice_and_never_themselves() -> None:
    for count in (2, 3, 50):
        references = {str(n): [f"reference {n}"] for n in range(count)}
        pairs = random_pairs(references)
        assert sorted(pairs.values()) == sorted(group[0] for group in references.values())
        assert all(pairs[name] != references[name][0] for name in references)
        assert random_pairs(dict(reversed(references.items()))) == pairs
    many = {str(n): [str(n)] for n in range(50)}
    assert random_pairs(many) != random_pairs(many, seed=1)
