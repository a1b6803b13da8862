"""CIDEr by pycocoevalcap's code, with document frequencies that belong to one set of references for good.

pycocoevalcap weighs n-grams by the references of the very captions that it scores, and takes the number of documents
from their number. A caption scored among others, or as one of a part of the images, would then score differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

Pair = tuple[str, tuple[str, ...]]  # candidate and references, tokenised


class FrozenCider(CiderScorer):
    """CIDEr (n 4, sigma 6.0) of any pairs, weighed by the references given here. Each distinct pair is scored once."""

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        """`documents`: the tokenised references of each image; an image counts an n-gram once."""
        super().__init__(n=4, sigma=6.0)
        for group in documents:
            for ngram in {ngram for counts in cook_refs(group) for ngram in counts}:
                self.document_frequency[ngram] += 1
        self._has_words = bool(self.document_frequency)
        self._log_documents = np.log(float(len(documents)))
        self._scores: dict[Pair, float] = {}

    @property
    def ref_len(self) -> Any:
        """The logarithm of the number of documents. pycocoevalcap would set it from the number of candidates."""
        return self._log_documents

    @ref_len.setter
    def ref_len(self, value: Any) -> None:
        """Nothing: the number of documents is that of the references given at first."""

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """The score of each pair, in [0, 10]: 0 for all of them where no document has a word."""
        if not self._has_words:
            return [0.0] * len(pairs)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._scores]
        if new:
            self.ctest = [cook_test(candidate) for candidate, _ in new]
            self.crefs = [cook_refs(references) for _, references in new]
            self._scores.update(zip(new, map(float, self.compute_cider()), strict=True))
        return [self._scores[pair] for pair in pairs]
