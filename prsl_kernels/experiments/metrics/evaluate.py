"""The evaluate stage: every recorded output of a task's arms, scored against two references and beside two floors.

References: "primary" is the frozen one that the attack recorded (ground truth where there is any), "secondary" the
arm's own clean output. CIDEr's document frequencies are those of the primary references throughout, so that its scores
are comparable between arms, attacks, rounds and references.

Floors: the outputs for a blank image, which stand in the tables as attack "blank" (against the secondary reference:
how much of the clean output needs no image); and arm "random-pair", attack "none", where each image's references are
compared with the first reference of another image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.config import EvaluateConfig
from prsl_kernels.experiments.console import track
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file, write_json
from prsl_kernels.experiments.metrics.scorer import Scorer
from prsl_kernels.experiments.metrics.text import distinct_count, exact_match, vqa_accuracy, word_count

RANDOM_PAIR = "random-pair"
_COLUMNS = ("task", "arm", "seed", "attack", "round", "id", "group", "references", "text")
_KEYS = [
    pa.field("task", pa.string(), nullable=False),
    pa.field("arm", pa.string(), nullable=False),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("attack", pa.string(), nullable=False),
    pa.field("round", pa.int64(), nullable=False),
]
_VALUE = [
    pa.field("reference", pa.string(), nullable=False),
    pa.field("metric", pa.string(), nullable=False),
    pa.field("value", pa.float64(), nullable=False),
]
SCORES_SCHEMA = pa.schema(
    [*_KEYS, pa.field("id", pa.string(), nullable=False), pa.field("group", pa.string(), nullable=False), *_VALUE]
)
CORPUS_SCHEMA = pa.schema([*_KEYS, *_VALUE])


@dataclass(frozen=True, order=True)
class Condition:
    """What one set of outputs is of: an arm under a training seed, an attack and a round of it."""

    arm: str
    seed: int
    attack: str
    round: int


@dataclass
class Outputs:
    """The outputs of a task; every condition has a text for each id."""

    task: str
    references: dict[str, tuple[str, ...]]  # id -> the frozen references
    groups: dict[str, str]  # id -> question type or subset
    texts: dict[Condition, dict[str, str]]

    def clean(self, condition: Condition) -> dict[str, str] | None:
        """What the arm says of the clean images: round 0 of an attack that has one."""
        for other in sorted(self.texts):
            if (other.arm, other.seed, other.round) == (condition.arm, condition.seed, 0) and other.attack != "blank":
                return self.texts[other]
        return None


@dataclass
class _Rows:
    """Columns of a table in the making."""

    schema: pa.Schema
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def add(self, **values: Any) -> None:
        for name in self.schema.names:
            self.columns[name].append(values[name])

    def write(self, path: Path) -> None:
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(dict(self.columns), schema=self.schema), temporary)


def evaluate(outputs: Sequence[Path], out: Path, config: EvaluateConfig) -> None:
    """Scores the outputs of one task's arms; writes `scores.parquet`, `corpus.parquet` and `versions.json` to `out`.

    Beside the configured scores, each text has its `length` in words (primary rows only), `exact_match`, and for
    questions `vqa_accuracy`; each set has `distinct`, its number of different texts, in the corpus table.

    Args:
        outputs: the `outputs.parquet` of every arm and seed of one task.
        out: the folder to write to.
        config: the metrics and BERTScore's encoder.

    Raises:
        UserError: a table is missing, damaged or of another task, two conditions have different ids or references, an
            image has no reference, or a back end of a score is missing.
    """
    data = read_outputs(outputs)
    encoder = None if config.encoder is None else Path(config.encoder)
    scores, corpus = _Rows(SCORES_SCHEMA), _Rows(CORPUS_SCHEMA)
    sets: list[tuple[Condition, str, dict[str, str], Mapping[str, Sequence[str]]]] = []
    for condition, texts in sorted(data.texts.items(), key=lambda item: item[0]):
        sets.append((condition, "primary", texts, data.references))
        clean = data.clean(condition)
        if clean is not None:
            sets.append((condition, "secondary", texts, {name: (text,) for name, text in clean.items()}))
    if len(data.references) > 1:  # there is no other image to take a reference from
        pairs = random_pairs(data.references)
        sets.append((Condition(RANDOM_PAIR, 0, "none", 0), "primary", pairs, data.references))
    with Scorer(metrics=config.metrics, encoder=encoder, num_layers=config.num_layers) as scorer:
        scorer.warm((texts[name], references[name]) for _, _, texts, references in sets for name in texts)
        for condition, reference, texts, references in track(sets, f"score {data.task}"):
            keys = {**vars(condition), "task": data.task, "reference": reference}
            found = scorer.score(
                texts,
                references,
                idf_references=data.references,
                allow_empty_references=reference == "secondary",
                in_context=False,  # the same text must score the same in every condition
            )
            plain = _plain_scores(data.task, texts, references, with_length=reference == "primary")
            for name in texts:
                for metric, value in {**found.items[name], **plain[name]}.items():
                    scores.add(**keys, id=name, group=data.groups[name], metric=metric, value=value)
            rows = list(plain.values())
            means = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
            if reference == "primary":
                means["distinct"] = float(distinct_count(texts.values()))
            for metric, value in {**found.corpus, **means}.items():
                corpus.add(**keys, metric=metric, value=value)
        versions = scorer.versions
    scores.write(out / "scores.parquet")
    corpus.write(out / "corpus.parquet")
    write_json(out / "versions.json", versions)


def read_outputs(paths: Sequence[Path]) -> Outputs:
    """Reads the tables of the attack stage and checks that all conditions are about the same images.

    Raises:
        UserError: see `evaluate`.
    """
    if not paths:
        raise UserError("there are no outputs to score; run the attack stage (`prsl attack`) first")
    data: Outputs | None = None
    origin: dict[Condition, Path] = {}
    for path in paths:
        for row in _read(path).to_pylist():
            if data is None:
                data = Outputs(task=row["task"], references={}, groups={}, texts={})
            if row["task"] != data.task:
                raise UserError(f"{path}: outputs of the task {row['task']!r} among those of {data.task!r}; {_REMEDY}")
            condition = Condition(row["arm"], row["seed"], row["attack"], row["round"])
            name, references = row["id"], tuple(row["references"])
            texts = data.texts.setdefault(condition, {})
            origin.setdefault(condition, path)
            if name in texts:
                raise UserError(f"{path}: id {name!r} has two outputs for {_words(condition)}; {_REMEDY}")
            if data.references.setdefault(name, references) != references:
                raise UserError(f"{path}: the references of {name!r} differ from those in {paths[0]}; {_REMEDY}")
            if not any(text.strip() for text in references):
                raise UserError(f"{path}: id {name!r} has no reference; give the data set one, then {_REMEDY}")
            texts[name] = row["text"]
            data.groups[name] = row["group"]
    if data is None:
        raise UserError(f"{', '.join(map(str, paths))}: no outputs in the tables; {_REMEDY}")
    names = sorted(data.references)
    for condition, texts in data.texts.items():
        missing = [name for name in names if name not in texts]
        if missing:
            raise UserError(
                f"{origin[condition]}: {_words(condition)} lacks {len(missing)} of {len(names)} images, such as "
                f"{missing[0]!r}, so it cannot be compared with the others; {_REMEDY}"
            )
        data.texts[condition] = {name: texts[name] for name in names}
    data.references = {name: data.references[name] for name in names}
    return data


def random_pairs(references: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, str]:
    """id -> the first reference of another id: a random cycle through all ids, so that none meets its own."""
    names = sorted(references)
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[here]: references[names[there]][0] for here, there in zip(order, np.roll(order, -1), strict=True)}


_REMEDY = "delete the attack stage's results and run `prsl attack` again"


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the attack stage (`prsl attack`) first") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); {_REMEDY}") from None
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: the columns {', '.join(missing)} are missing; {_REMEDY}")
    return table.select(list(_COLUMNS))


def _plain_scores(
    task: str, texts: Mapping[str, str], references: Mapping[str, Sequence[str]], *, with_length: bool
) -> dict[str, dict[str, float]]:
    result = {}
    for name, text in texts.items():
        row = {"exact_match": exact_match(text, references[name])}
        if task == "vqa":
            row["vqa_accuracy"] = vqa_accuracy(text, references[name])
        if with_length:
            row["length"] = float(word_count(text))
        result[name] = row
    return result


def _words(condition: Condition) -> str:
    return f"arm {condition.arm!r}, seed {condition.seed}, attack {condition.attack!r}, round {condition.round}"
