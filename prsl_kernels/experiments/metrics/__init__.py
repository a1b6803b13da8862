"""Scores: what the models said against what people wrote, by the field's own reference codes."""

from __future__ import annotations

from prsl_kernels.experiments.metrics.captions_json import load_captions_json, score_files
from prsl_kernels.experiments.metrics.scorer import ALL, Scorer, Scores, score_captions
from prsl_kernels.experiments.metrics.text import (
    distinct_count,
    exact_match,
    normalize,
    normalize_answer,
    vqa_accuracy,
    word_count,
    word_f1,
)

__all__ = [
    "ALL",
    "Scorer",
    "Scores",
    "distinct_count",
    "exact_match",
    "load_captions_json",
    "normalize",
    "normalize_answer",
    "score_captions",
    "score_files",
    "vqa_accuracy",
    "word_count",
    "word_f1",
]
