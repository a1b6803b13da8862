"""Scores and statistics that are computed from two strings alone: no tokenizer process, no model.

Exact match and word F1 compare texts after `normalize`; VQA accuracy after `normalize_answer`, which is the
normalisation of the official VQA evaluation. Both are the same for candidate and reference.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")
_WHITE_SPACE = re.compile(r"\s+")
_LINE_BREAKS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")  # what str.splitlines() breaks at


def one_line(text: str) -> str:
    """The text as valid Unicode on a single line: what every tokenizer here is given.

    White space around a line break of any kind (those of `str.splitlines`) becomes one space; other white space
    stays, since a tokenizer may read it. Surrogates are joined where they are a pair and become U+FFFD where they are
    alone.
    """
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _WHITE_SPACE.sub(lambda run: run[0] if _LINE_BREAKS.isdisjoint(run[0]) else " ", text)


@functools.lru_cache(maxsize=2**15)  # the same references meet every arm, attack and round
def normalize(text: str) -> str:
    """Compatibility-composed, case-folded text without punctuation (Unicode categories P*), words parted by one space.

    A text of nothing but punctuation keeps it: "?" and "!" differ.
    """
    folded = unicodedata.normalize("NFKC", one_line(text)).casefold()
    bare = "".join(" " if unicodedata.category(character).startswith("P") else character for character in folded)
    return " ".join(bare.split()) or " ".join(folded.split())


def exact_match(candidate: str, references: Iterable[str]) -> float:
    """1.0 if the candidate equals one of the references after `normalize`, else 0.0; an empty candidate equals none."""
    wanted = normalize(candidate)
    return float(bool(wanted) and any(wanted == normalize(reference) for reference in references))


def word_f1(candidate: str, references: Iterable[str]) -> float:
    """Harmonic mean of precision and recall over the multisets of words after `normalize`; best over the references."""
    words = Counter(normalize(candidate).split())
    best = 0.0
    for reference in references:
        expected = Counter(normalize(reference).split())
        shared = (words & expected).total()
        if shared:
            best = max(best, 2 * shared / (words.total() + expected.total()))
    return best


def word_count(text: str) -> int:
    """Number of words parted by white space."""
    return len(text.split())


def distinct_count(texts: Iterable[str]) -> int:
    """Number of different texts after `normalize`: a model that says the same of every image scores 1."""
    return len({normalize(text) for text in texts})


def distinct_ngrams(texts: Iterable[Sequence[str]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a set of texts, given as words.

    After the "distinct-n" of Li et al. 2016 (arXiv:1510.03055), who divide by the number of words for every n. In
    (0, 1]; None where no text has n words. It falls with the size of a set: compare sets of the same images only.
    """
    ngrams = [tuple(words[start : start + n]) for words in texts for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


# The rules of the official evaluation of VQA v1 and v2 (https://visualqa.org/evaluation.html).
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
# A contraction that lacks one of its apostrophes is given it back. Those which are words without it are not listed.
_REPAIRED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
}


@functools.lru_cache(maxsize=2**15)
def normalize_answer(answer: str) -> str:
    """Normalises an answer as the official VQA evaluation does.

    Lower case; punctuation becomes a space, or nothing where it touches a space or where the answer has a comma
    between digits; periods that no digit follows are dropped; number words up to ten become digits; articles are
    dropped; contractions get their apostrophe back. An answer of which nothing would be left ("a") is only lower-cased.
    """
    text = " ".join(one_line(answer).split())
    stripped = text
    joins_digits = _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if touches_space or joins_digits else " ")
    words = _PERIOD.sub("", stripped).lower().split()
    kept = [_NUMBERS.get(word, word) for word in words]
    kept = [_REPAIRED.get(word, word) for word in kept if word not in _ARTICLES]
    return " ".join(kept) or text.lower()


def vqa_accuracy(candidate: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer against those of the annotators, in [0, 1], after `normalize_answer`.

    With four answers or more (VQA has ten) it is the official min(matches / 3, 1), averaged over leaving each
    annotator out in turn. With fewer, that formula would give a right answer less than 1: there it is 1.0 if the
    candidate equals one of the answers, else 0.0. An empty candidate scores 0.
    """
    said = normalize_answer(candidate)
    if not said:
        return 0.0
    matches = [said == normalize_answer(answer) for answer in answers]
    if len(matches) < 4:
        return float(any(matches))
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)
