"""The evaluate stage: every recorded output of a task's arms, scored against its references and beside two floors.

References: "primary" is the frozen one that the attack recorded (ground truth where there is any), "secondary" the
arm's own clean output. CIDEr's document frequencies and their number are those of all primary references throughout,
so that its scores are comparable between arms, attacks, rounds, references and parts of the images.

Derived rows: attack "worst" has, of each image, the output of that attack (primary or of the ensemble, at its last
round) which has the lowest primary score. Reference "blank" is what the same arm says of the blank image: how much of
an output needs no image. Reference "target" is what a targeted attack wanted.

Floors: the outputs for a blank image, which stand in the tables as attack "blank"; and arm "random-pair", attack
"none", where each image's references are compared with the first reference of another image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import EvaluateConfig
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, write_json
from prsl_kernels.experiments.metrics.outputs import Condition, Outputs, random_pairs, read_outputs
from prsl_kernels.experiments.metrics.scorer import Scorer
from prsl_kernels.experiments.metrics.text import (
    distinct_count,
    distinct_ngrams,
    exact_match,
    vqa_accuracy,
    word_count,
)
from prsl_kernels.experiments.models.hub import local_folder

RANDOM_PAIR = "random-pair"
WORST = "worst"
BLANK = "blank"
_MODEL = [pa.field("arm", pa.string(), nullable=False), pa.field("seed", pa.int64(), nullable=False)]
_ATTACK = [pa.field("attack", pa.string(), nullable=False), pa.field("round", pa.int64(), nullable=False)]
_KEYS = [pa.field("task", pa.string(), nullable=False), *_MODEL, *_ATTACK]
_VALUE = [
    pa.field("reference", pa.string(), nullable=False),
    pa.field("metric", pa.string(), nullable=False),
    pa.field("value", pa.float64(), nullable=False),
]
_ID = pa.field("id", pa.string(), nullable=False)
SCORES_SCHEMA = pa.schema([*_KEYS, _ID, pa.field("group", pa.string(), nullable=False), *_VALUE])
CORPUS_SCHEMA = pa.schema([*_KEYS, *_VALUE])
WORST_SCHEMA = pa.schema([*_MODEL, _ID, *_ATTACK])

Items = dict[str, dict[str, float]]  # id -> score by metric, the same metrics for each id


class _Set(NamedTuple):
    """Outputs of one condition and what they are compared with."""

    condition: Condition
    reference: str
    texts: dict[str, str]
    references: Mapping[str, Sequence[str]]


@dataclass
class _Table:
    """A table in the making, by blocks of rows."""

    schema: pa.Schema
    blocks: list[pa.Table] = field(default_factory=list)

    def add(self, rows: int, **values: Any) -> None:
        """Adds `rows` rows: a list has a value for each of them, anything else is the same in all."""
        columns = [
            pa.array(values[column.name], column.type)
            if isinstance(values[column.name], list)
            else pa.repeat(pa.scalar(values[column.name], column.type), rows)
            for column in self.schema
        ]
        self.blocks.append(pa.Table.from_arrays(columns, schema=self.schema))

    def write(self, path: Path) -> None:
        table = pa.concat_tables(self.blocks) if self.blocks else self.schema.empty_table()
        with atomic_file(path) as temporary:
            pq.write_table(table, temporary)


def evaluate(
    outputs: Sequence[Path], out: Path, config: EvaluateConfig, *, primary_score: str, device: str = "cpu"
) -> None:
    """Scores the outputs of one task's arms and writes four files to `out`.

    `scores.parquet` has a row for each text and score, `corpus.parquet` one for each set and score, `worst.parquet`
    says which attack was the worst for each image, and `versions.json` what computed the scores.

    Beside the configured scores, each text has `exact_match`, for questions `vqa_accuracy`, and in primary rows its
    `length` in words. The corpus table has for each set, in primary rows, `distinct` (its number of different texts),
    `distinct_1` and `distinct_2` (distinct n-grams over all; left out where no text has n words) and `empty` (share of
    texts without a word). Rows of the reference "blank" stand for the clean images, the primary attack's last round
    and the worst case, with `exact_match` and `bertscore_f1`, the latter where it is configured, as everywhere; rows
    of the reference "target" for every targeted image, with `target_match` and `target_bertscore_f1`.

    Of several ranks, all share BERTScore, and the first does the rest: the worst case over attacks follows from all
    scores.

    Args:
        outputs: the `outputs.parquet` of every arm and seed of one task, those of transferred images included.
        out: the folder to write to.
        config: the metrics and BERTScore's encoder.
        primary_score: the score by which the worst attack on an image is chosen; see `check_primary_score`.
        device: where BERTScore's encoders run.

    Raises:
        UserError: a table is missing, damaged or of another task; conditions that are compared have different ids or
            references; an image has no reference; the primary score is not computed; a back end is missing.
    """
    data = read_outputs(outputs)
    check_primary_score(data.task, config, primary_score)
    encoders = {**encoder_folders(config), "device": device}
    if not ranks.is_main():
        if "bertscore_f1" in config.metrics:
            with Scorer(metrics=("bertscore_f1",), **encoders) as scorer:
                _Evaluation(data, scorer, primary_score).share_in()
        return
    with Scorer(metrics=config.metrics, **encoders) as scorer:
        evaluation = _Evaluation(data, scorer, primary_score)
        evaluation.run()
        versions = {**scorer.versions, "distinct": f"distinct n-grams over all n-grams of {scorer.words_version}"}
    evaluation.scores.write(out / "scores.parquet")
    evaluation.corpus.write(out / "corpus.parquet")
    evaluation.worst.write(out / "worst.parquet")
    write_json(out / "versions.json", versions)


def encoder_folders(config: EvaluateConfig) -> dict[str, Any]:
    """The encoders as `Scorer` takes them.

    Raises:
        UserError: one that is named as on the Hub and not on this machine's disk.
    """
    others = {name: (local_folder(other.folder), other.num_layers) for name, other in config.encoders.items()}
    encoder = None if config.encoder is None else local_folder(config.encoder)
    return {"encoder": encoder, "num_layers": config.num_layers, "encoders": others}


def check_encoders(config: EvaluateConfig) -> None:
    """Refuses what `evaluate` would refuse of the encoders' folders, without loading them.

    Raises:
        UserError: as `encoder_folders`, or a folder without a model in safetensors, or a layer that is not known.
    """
    found = encoder_folders(config)
    for folder, layers in ((found["encoder"], found["num_layers"]), *found["encoders"].values()):
        if folder is not None:
            from prsl_kernels.experiments.metrics.bertscore import check_encoder

            check_encoder(folder, layers)


def check_primary_score(task: str, config: EvaluateConfig, primary_score: str) -> None:
    """Refuses a primary score that `evaluate` would not compute.

    Raises:
        UserError: neither one of the configured metrics, nor exact match, nor, for questions, their accuracy.
    """
    plain = ("exact_match", "vqa_accuracy") if task == "vqa" else ("exact_match",)
    if primary_score not in (*config.metrics, *plain):
        raise UserError(
            f"tasks.{task}.primary.score {primary_score!r} is not computed; add it to tasks.{task}.evaluate.metrics "
            f"where it is one of those, or choose from {', '.join((*config.metrics, *plain))}"
        )


class _Evaluation:
    """All sets of one task, and the tables that they become."""

    def __init__(self, data: Outputs, scorer: Scorer, primary_score: str) -> None:
        self.data, self.scorer, self.primary_score = data, scorer, primary_score
        self.scores, self.corpus, self.worst = _Table(SCORES_SCHEMA), _Table(CORPUS_SCHEMA), _Table(WORST_SCHEMA)
        self._clean = {model: data.texts[data.clean(model)] for model in data.models}
        # The primary score of each output over which the worst case is taken.
        self._candidates: dict[Condition, dict[str, float]] = {
            condition: {} for model in data.models for condition in data.last_rounds(model, ("primary", "ensemble"))
        }

    def run(self) -> None:
        """Scores everything."""
        sets = self._sets()
        self._warm(sets, together="bertscore_f1" in self.scorer.metrics)
        for one in track(sets, f"score {self.data.task}"):
            items = self._score(one)
            if one.reference == "primary" and one.condition in self._candidates:
                self._candidates[one.condition] = {name: row[self.primary_score] for name, row in items.items()}
        worst = dict(map(self._worst, self.data.models))
        for condition, texts in worst.items():
            for one in self._compared(condition, texts):
                self._score(one)
        against = [*self._against_blank(worst), *self._against_target()]
        self._warm(against)
        for one in against:
            self._score_against(one)

    def share_in(self) -> None:
        """What a rank besides the first does: its part of BERTScore."""
        self._warm(self._sets(), together=True)

    def _sets(self) -> list[_Set]:
        """All that is compared, but for what follows from its scores."""
        sets = [one for condition, texts in self.data.texts.items() for one in self._compared(condition, texts)]
        if len(self.data.references) > 1:  # there is no other image to take a reference from
            pairs = random_pairs(self.data.references)
            sets.append(_Set(Condition(RANDOM_PAIR, 0, "none", 0), "primary", pairs, self.data.references))
        return sets

    def _compared(self, condition: Condition, texts: dict[str, str]) -> Iterator[_Set]:
        """A condition's texts against the frozen references, and against what the arm says of the clean images."""
        clean = self._clean[condition.model]
        yield _Set(condition, "primary", texts, {name: self.data.references[name] for name in texts})
        yield _Set(condition, "secondary", texts, {name: (clean[name],) for name in texts})

    def _worst(self, model: tuple[str, int]) -> tuple[Condition, dict[str, str]]:
        """The derived condition: of each image the output with the lowest primary score; ties go to the first name."""
        candidates = [condition for condition in self._candidates if condition.model == model]
        chosen = {
            name: min(candidates, key=lambda condition: self._candidates[condition][name])
            for name in self.data.references
        }
        self.worst.add(
            len(chosen),
            arm=model[0],
            seed=model[1],
            id=list(chosen),
            attack=[condition.attack for condition in chosen.values()],
            round=[condition.round for condition in chosen.values()],
        )
        last = max(condition.round for condition in candidates)
        texts = {name: self.data.texts[condition][name] for name, condition in chosen.items()}
        return Condition(*model, WORST, last), texts

    def _against_blank(self, worst: Mapping[Condition, dict[str, str]]) -> Iterator[_Set]:
        """What tells how far an arm speaks without looking: its texts against its text of the blank image."""
        for condition, texts in worst.items():
            [primary] = self.data.last_rounds(condition.model, ["primary"])
            blank = self.data.texts.get(Condition(*condition.model, BLANK, 0))
            if blank is None:
                continue
            known = {clean: self.data.texts[clean] for clean in (self.data.clean(condition.model), primary)}
            for other, said in {**known, condition: texts}.items():
                shared = {name: text for name, text in said.items() if name in blank}
                yield _Set(other, BLANK, shared, {name: (blank[name],) for name in shared})

    def _against_target(self) -> Iterator[_Set]:
        for condition, targets in self.data.targets.items():
            texts = {name: self.data.texts[condition][name] for name in targets}
            yield _Set(condition, "target", texts, {name: (text,) for name, text in targets.items()})

    def _warm(self, sets: Sequence[_Set], *, together: bool = False) -> None:
        pairs = ((text, one.references[name]) for one in sets for name, text in one.texts.items())
        self.scorer.warm(pairs, together=together)

    def _score(self, one: _Set) -> Items:
        """All scores of one set: puts them into the tables and returns those of the texts."""
        primary = one.reference == "primary"
        found = self.scorer.score(
            one.texts,
            one.references,
            idf_references=self.data.references,
            allow_empty_references=not primary,
            in_context=False,  # the same text must score the same in every condition
        )
        plain = _plain_scores(self.data.task, one.texts, one.references, with_length=primary)
        corpus = {**found.corpus, **_means(plain)}
        if primary:
            corpus |= self._diversity(one.texts)
        items = {name: {**found.items[name], **row} for name, row in plain.items()}
        self._add(one, items, corpus)
        return items

    def _diversity(self, texts: Mapping[str, str]) -> dict[str, float]:
        """How much a set of texts varies, and how much of it says nothing."""
        words = self.scorer.words(texts.values())
        ngrams = {f"distinct_{n}": distinct_ngrams(words, n) for n in (1, 2)}
        return {
            "distinct": float(distinct_count(texts.values())),
            **{metric: share for metric, share in ngrams.items() if share is not None},
            "empty": float(np.mean([not text.strip() for text in texts.values()])),
        }

    def _score_against(self, one: _Set) -> None:
        """The few scores of a set against texts that are no references: what it was to become, or of a blank image."""
        match, bertscore = "exact_match", "bertscore_f1"
        if one.reference == "target":
            match, bertscore = "target_match", "target_bertscore_f1"
        items = {name: {match: exact_match(text, one.references[name])} for name, text in one.texts.items()}
        if "bertscore_f1" in self.scorer.metrics:
            for name, text in one.texts.items():
                items[name][bertscore] = self.scorer.bertscore_f1(text, one.references[name])
        self._add(one, items, _means(items))

    def _add(self, one: _Set, items: Items, corpus: Mapping[str, float]) -> None:
        keys = {**vars(one.condition), "task": self.data.task, "reference": one.reference}
        metrics = list(next(iter(items.values())))
        names = [name for name in items for _ in metrics]
        self.scores.add(
            len(names),
            **keys,
            id=names,
            group=[self.data.groups[name] for name in names],
            metric=metrics * len(items),
            value=[value for row in items.values() for value in row.values()],
        )
        self.corpus.add(len(corpus), **keys, metric=list(corpus), value=list(corpus.values()))


def _plain_scores(
    task: str, texts: Mapping[str, str], references: Mapping[str, Sequence[str]], *, with_length: bool
) -> Items:
    result = {}
    for name, text in texts.items():
        row = {"exact_match": exact_match(text, references[name])}
        if task == "vqa":
            row["vqa_accuracy"] = vqa_accuracy(text, references[name])
        if with_length:
            row["length"] = float(word_count(text))
        result[name] = row
    return result


def _means(items: Items) -> dict[str, float]:
    metrics = next(iter(items.values()))
    return {metric: float(np.mean([row[metric] for row in items.values()])) for metric in metrics}
