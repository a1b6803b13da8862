"""The scores of captions against references: BLEU, ROUGE-L, CIDEr, METEOR and BERTScore, by their reference codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocoevalcap.bleu import bleu_scorer
from pycocoevalcap.rouge.rouge import Rouge

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.metrics import meteor, ptb
from prsl_kernels.experiments.metrics.cider import FrozenCider
from prsl_kernels.experiments.metrics.meteor import Meteor
from prsl_kernels.experiments.metrics.ptb import PTBTokenizer

if TYPE_CHECKING:
    from prsl_kernels.experiments.metrics.bertscore import BertScore

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
ALL = (*BLEU, "rouge_l", "cider", "meteor", "bertscore_f1")

Tokens = dict[str, tuple[str, ...]]  # id -> tokenised texts
Pair = tuple[str, tuple[str, ...]]  # candidate and references, tokenised


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captions.

    Attributes:
        corpus: score of the whole set by metric. BLEU and METEOR are computed from the summed statistics, the others
            are means over the captions.
        items: id -> score by metric, in the order of the candidates.
        versions: what computed them, by back end.
    """

    corpus: dict[str, float]
    items: dict[str, dict[str, float]]
    versions: dict[str, str]


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] = ALL,
    encoder: Path | None = None,
    num_layers: int | None = None,
) -> Scores:
    """Scores captions against their references; see `Scorer`, which is cheaper for more than one set.

    Args:
        candidates: id -> caption; an empty one scores 0.
        references: id -> captions; the same ids.
        metrics: which of `ALL`.
        encoder: the folder of BERTScore's encoder; None is the packaged MiniLM.
        num_layers: the encoder's layer; see `BertScore`.

    Raises:
        UserError: ids that do not agree, an id without a reference, texts that are no strings, an unknown metric, or
            a back end that is missing.
    """
    with Scorer(metrics=metrics, encoder=encoder, num_layers=num_layers) as scorer:
        return scorer.score(candidates, references)


class Scorer:
    """Holds one METEOR process, one encoder, and what was computed before, for any number of sets of captions.

    A context manager: leaving it ends the METEOR process. Not safe for use by several threads; several scorers are
    independent of each other.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = ALL,
        encoder: Path | None = None,
        num_layers: int | None = None,
        encoders: Mapping[str, tuple[Path, int | None]] | None = None,
        device: str = "cpu",
    ) -> None:
        """`encoders` are further ones, each with its layer, for `bertscore_f1_<name>` where BERTScore is asked for.

        They run on `device`, and nothing else does.
        """
        self._device = device
        unknown = sorted(set(metrics) - set(ALL))
        if unknown or not metrics:
            raise UserError(f"metrics {', '.join(unknown) or 'none'}: choose from {', '.join(ALL)}")
        self.metrics = tuple(metric for metric in ALL if metric in metrics)
        self._encoder, self._num_layers = encoder, num_layers
        self._encoders = dict(encoders or {}) if "bertscore_f1" in self.metrics else {}
        self._rouge: dict[Pair, float] = {}
        self._bleu: dict[Pair, dict[str, Any]] = {}
        self._cider: tuple[list[tuple[str, ...]], FrozenCider] | None = None
        self._meteor = Meteor() if "meteor" in self.metrics else None
        if self._meteor is not None:
            self._meteor.start()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the METEOR process."""
        if self._meteor is not None:
            self._meteor.close()

    def warm(self, pairs: Iterable[tuple[str, Sequence[str]]], *, together: bool = False) -> None:
        """Tokenises and embeds many (candidate, references) pairs at once, ahead of the sets that hold them.

        They are tokenised for `score(..., in_context=False)`. Ranks that make the call `together` share the embedding.
        """
        pairs = list(pairs)
        if self._needs_tokens:
            self._tokenizer.add((text, ptb.ALONE) for candidate, group in pairs for text in (candidate, *group))
        for bertscore in self._bertscores.values():
            texts = [(candidate, reference) for candidate, group in pairs for reference in group]
            bertscore.add(texts, together=together)

    def score(
        self,
        candidates: Mapping[str, str],
        references: Mapping[str, Sequence[str]],
        *,
        idf_references: Mapping[str, Sequence[str]] | None = None,
        allow_empty_references: bool = False,
        in_context: bool = True,
    ) -> Scores:
        """Scores one set of captions.

        What pycocoevalcap can digest scores as there. A blank candidate scores 0. With a single caption, or where
        every n-gram is in all references, CIDEr is 0, since log(N / N) weighs nothing.

        Args:
            candidates: id -> caption.
            references: id -> captions, at least one of them not blank; the same ids in any order.
            idf_references: the references whose number and document frequencies CIDEr weighs n-grams by, of these or
                of other images; None takes `references`. With the same ones, a caption's score is the same in any set.
            allow_empty_references: score 0 against references that are all blank instead of refusing them.
            in_context: tokenise each caption as one of the given order, as pycocoevalcap does: its tokenizer looks at
                the beginning of the next caption to decide about a final period after a single letter or "No". Without,
                a caption's tokens depend on the caption alone, and so do its scores, wherever it stands.

        Raises:
            UserError: see `score_captions`.
        """
        _check(candidates, references, allow_empty_references)
        items: dict[str, dict[str, float]] = {name: {} for name in candidates}
        corpus: dict[str, float] = {}

        def put(metric: str, total: float, values: Iterable[float]) -> None:
            corpus[metric] = _number(total)
            for name, value in zip(candidates, values, strict=True):
                items[name][metric] = _number(value)

        embedded = {}
        for metric, bertscore in self._bertscores.items():  # first, while METEOR reads its paraphrases
            bertscore.add([(text, other) for name, text in candidates.items() for other in references[name]])
            embedded[metric] = [bertscore.score(text, references[name]) for name, text in candidates.items()]
        if self._needs_tokens:
            self._score_tokens(candidates, references, idf_references or references, in_context, put)
        for metric, values in embedded.items():
            put(metric, float(np.mean(values)), values)
        return Scores(corpus=corpus, items=items, versions=self.versions)

    def _score_tokens(
        self,
        candidates: Mapping[str, str],
        references: Mapping[str, Sequence[str]],
        idf_references: Mapping[str, Sequence[str]],
        in_context: bool,
        put: Callable[[str, float, Iterable[float]], None],
    ) -> None:
        said, expected, idf = self._tokens(
            ({name: (text,) for name, text in candidates.items()}, references, idf_references), in_context
        )
        pairs = [(text, expected[name]) for name, (text,) in said.items()]
        if set(BLEU) & set(self.metrics):
            total, values = self._bleu_scores(pairs)
            for order, metric in enumerate(BLEU):
                if metric in self.metrics:
                    put(metric, total[order], values[order])
        if "rouge_l" in self.metrics:
            # pycocoevalcap takes a blank text for one word, which is empty and equals that of another blank text.
            rouge = [
                self._rouge_l(pair) if text.strip() else 0.0
                for pair, text in zip(pairs, candidates.values(), strict=True)
            ]
            put("rouge_l", float(np.mean(np.array(rouge))), rouge)
        if "cider" in self.metrics:
            cider = self._frozen_cider(list(idf.values())).score(pairs)
            put("cider", float(np.mean(cider)), cider)
        if self._meteor is not None:
            put("meteor", *self._meteor.score(pairs))

    def _tokens(self, sets: Iterable[Mapping[str, Sequence[str]]], in_context: bool) -> list[Tokens]:
        sets = list(sets)
        entries = [_entries(texts, in_context) for texts in sets]
        self._tokenizer.add(entry for group in entries for entry in group)
        found = []
        for texts, group in zip(sets, entries, strict=True):
            tokens = (self._tokenizer(text, follower) for text, follower in group)
            found.append({name: tuple(next(tokens) for _ in texts[name]) for name in texts})
        return found

    def _bleu_scores(self, pairs: Sequence[Pair]) -> tuple[list[float], list[list[float]]]:
        """(corpus scores, scores of each pair) by order, as pycocoevalcap's `Bleu` computes them."""
        for candidate, references in dict.fromkeys(pairs):
            if (candidate, references) not in self._bleu:
                cooked = bleu_scorer.cook_test(candidate, bleu_scorer.cook_refs(references))
                self._bleu[candidate, references] = cooked
        scorer = bleu_scorer.BleuScorer(n=4)
        scorer.ctest = [self._bleu[pair] for pair in pairs]
        total, values = scorer.compute_score(option="closest", verbose=0)
        return total, values

    def _rouge_l(self, pair: Pair) -> float:
        if pair not in self._rouge:
            candidate, references = pair
            self._rouge[pair] = float(Rouge().calc_score([candidate], list(references)))
        return self._rouge[pair]

    def _frozen_cider(self, documents: list[tuple[str, ...]]) -> FrozenCider:
        """The scorer of these documents. The last one is kept: sets that are compared share their documents."""
        if self._cider is None or self._cider[0] != documents:
            self._cider = documents, FrozenCider(documents)
        return self._cider[1]

    def words(self, texts: Iterable[str]) -> list[list[str]]:
        """Words of each text: its PTB tokens where a configured metric needs them, else parted by white space.

        Both in lower case; PTB tokens are without punctuation.
        """
        texts = list(texts)
        if not self._needs_tokens:
            return [text.lower().split() for text in texts]
        self._tokenizer.add((text, ptb.ALONE) for text in texts)
        return [self._tokenizer(text).split() for text in texts]

    @property
    def words_version(self) -> str:
        """What `words` are."""
        return "PTB tokens" if self._needs_tokens else "lower-case words parted by white space"

    def bertscore_f1(self, candidate: str, references: Sequence[str]) -> float:
        """BERTScore F1 of one caption; see `BertScore.score`. `warm` computes many at once."""
        return _number(self._bertscores["bertscore_f1"].score(candidate, references))

    @property
    def _needs_tokens(self) -> bool:
        return set(self.metrics) != {"bertscore_f1"}

    @cached_property
    def _tokenizer(self) -> PTBTokenizer:
        return PTBTokenizer()

    @cached_property
    def _bertscores(self) -> dict[str, BertScore]:
        """By metric; empty where BERTScore is not asked for."""
        if "bertscore_f1" not in self.metrics:
            return {}
        # Here, because importing it takes two seconds: it brings transformers and the package's plots.
        from prsl_kernels.experiments.metrics.bertscore import BertScore

        others = {
            f"bertscore_f1_{name}": BertScore(*encoder, device=self._device) for name, encoder in self._encoders.items()
        }
        return {"bertscore_f1": BertScore(self._encoder, self._num_layers, device=self._device), **others}

    @cached_property
    def versions(self) -> dict[str, str]:
        """Back end of each score, with versions and checksums: scores of different back ends are not comparable."""
        found: dict[str, str] = {}
        package = f"pycocoevalcap {metadata.version('pycocoevalcap')}"
        if self._needs_tokens:
            found["tokenizer"] = f"{package}, {ptb.JAR.name} (sha256 {sha256(ptb.JAR)}), PTBTokenizer -lowerCase"
            found["java"] = f"{self._tokenizer.java_version} ({self._tokenizer.java})"
        names = {"bleu": "BLEU, closest reference length", "rouge_l": "ROUGE-L, beta 1.2",
                 "cider": "CIDEr, n 4, sigma 6.0, idf of the given references"}  # fmt: skip
        for name, description in names.items():
            if any(metric.startswith(name) for metric in self.metrics):
                found[name] = f"{package}, {description}"
        if self._meteor is not None:
            found["meteor"] = f"{package}, {meteor.JAR.name} (sha256 {sha256(meteor.JAR)}), {meteor.SETTINGS}"
        return found | {metric: bertscore.version for metric, bertscore in self._bertscores.items()}


def _entries(texts: Mapping[str, Sequence[str]], in_context: bool) -> list[ptb.Entry]:
    flat = [text for group in texts.values() for text in group]
    return ptb.in_file_order(flat) if in_context else [(text, ptb.ALONE) for text in flat]


def _number(value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"a score is {value}")
    return value


def _check(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], allow_empty_references: bool
) -> None:
    if not candidates and not references:
        raise UserError("there are no captions to score; give at least one candidate with its references")
    for sort, here, there in (
        ("candidates without references", candidates, references),
        ("references without a candidate", references, candidates),
    ):
        missing = sorted(set(here) - set(there), key=str)
        if missing:
            shown = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(f"{len(missing)} {sort}: {shown}; both must have the same ids")
    for name, text in candidates.items():
        if not isinstance(text, str):
            raise UserError(f"candidate {name!r} is a {type(text).__name__}; a caption must be a string")
    for name, group in references.items():
        is_list = isinstance(group, Sequence) and not isinstance(group, str)
        if not is_list or not all(isinstance(text, str) for text in group):
            raise UserError(f"the references of {name!r} must be a list of strings, not {group!r:.80}")
        if not group or not (allow_empty_references or any(text.strip() for text in group)):
            what = "an empty list" if not group else "all empty"
            raise UserError(f"the references of {name!r} are {what}; give at least one caption, or leave the id out")
