"""The tables of the attack stage, read and checked: what every model said under every condition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.errors import UserError

# What is read. The tables have more columns, of which one holds whole images: none of those is loaded.
COLUMNS = ("task", "arm", "seed", "attack", "role", "source", "target", "round", "id", "group", "references", "text")
_NULLABLE = ("source", "target")
_REMEDY = "delete the attack stage's results and run `prsl attack` again"


@dataclass(frozen=True, order=True)
class Condition:
    """What one set of outputs is of: an arm under a training seed, an attack and a round of it."""

    arm: str
    seed: int
    attack: str
    round: int

    @property
    def model(self) -> tuple[str, int]:
        """The arm and its seed."""
        return self.arm, self.seed

    def __str__(self) -> str:
        return f"arm {self.arm!r}, seed {self.seed}, attack {self.attack!r}, round {self.round}"


@dataclass
class Outputs:
    """The outputs of a task. Conditions of the same attack and round have the same ids; see `read_outputs`."""

    task: str
    references: dict[str, tuple[str, ...]] = field(default_factory=dict)  # id -> the frozen references
    groups: dict[str, str] = field(default_factory=dict)  # id -> question type or subset
    texts: dict[Condition, dict[str, str]] = field(default_factory=dict)  # sorted
    targets: dict[Condition, dict[str, str]] = field(default_factory=dict)  # of targeted attacks
    roles: dict[str, str] = field(default_factory=dict)  # attack -> role
    sources: dict[str, str] = field(default_factory=dict)  # transferred attack -> the arm that made the images

    @property
    def models(self) -> list[tuple[str, int]]:
        """Every arm with every seed."""
        return sorted({condition.model for condition in self.texts})

    def last_rounds(self, model: tuple[str, int], roles: Iterable[str]) -> list[Condition]:
        """The last recorded round of each of a model's attacks in these roles, in the order of the attacks' names."""
        found: dict[str, Condition] = {}
        for condition in self.texts:
            if condition.model == model and self.roles[condition.attack] in roles:
                found[condition.attack] = condition
        return list(found.values())

    def clean(self, model: tuple[str, int]) -> Condition:
        """The clean images: round 0 of the primary attack."""
        [primary] = self.last_rounds(model, ["primary"])
        return Condition(*model, primary.attack, 0)


def read_outputs(paths: Sequence[Path]) -> Outputs:
    """Reads the tables of the attack stage and checks that what is compared is about the same images.

    The primary attack's conditions, with its clean images, and those of the ensemble have a text for every id; others
    may be of some images, the same ones for all arms and seeds. A transferred attack is missing only for the arm that
    its images were made on.

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
                data = Outputs(task=row["task"])
            if row["task"] != data.task:
                raise UserError(f"{path}: outputs of the task {row['task']!r} among those of {data.task!r}; {_REMEDY}")
            condition = Condition(row["arm"], row["seed"], row["attack"], row["round"])
            name, references, role = row["id"], tuple(row["references"]), row["role"]
            texts = data.texts.setdefault(condition, {})
            origin.setdefault(condition, path)
            if name in texts:
                raise UserError(f"{path}: id {name!r} has two outputs for {condition}; {_REMEDY}")
            if data.references.setdefault(name, references) != references:
                raise UserError(f"{path}: the references of {name!r} differ from those in {paths[0]}; {_REMEDY}")
            if not any(text.strip() for text in references):
                raise UserError(f"{path}: id {name!r} has no reference; give the data set one, then {_REMEDY}")
            if data.roles.setdefault(row["attack"], role) != role:
                known = data.roles[row["attack"]]
                raise UserError(f"{path}: {condition} has the role {role!r}, and {known!r} elsewhere; {_REMEDY}")
            if row["source"] is not None:
                data.sources[row["attack"]] = row["source"]
            if row["target"] is not None:
                data.targets.setdefault(condition, {})[name] = row["target"]
            texts[name] = row["text"]
            data.groups[name] = row["group"]
    if data is None:
        raise UserError(f"{', '.join(map(str, paths))}: no outputs in the tables; {_REMEDY}")
    names = sorted(data.references)
    data.references = {name: data.references[name] for name in names}
    data.texts = {
        condition: _ordered(texts, names) for condition, texts in sorted(data.texts.items(), key=lambda item: item[0])
    }
    data.targets = {
        condition: _ordered(texts, names) for condition, texts in sorted(data.targets.items(), key=lambda item: item[0])
    }
    _check(data, origin)
    return data


def random_pairs(references: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, str]:
    """id -> the first reference of another id: a random cycle through all ids, so that none meets its own."""
    names = sorted(references)
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[here]: references[names[there]][0] for here, there in zip(order, np.roll(order, -1), strict=True)}


def _read(path: Path) -> pa.Table:
    try:
        present = pq.read_schema(path).names
        missing = [name for name in COLUMNS if name not in present]
        if missing:
            raise UserError(f"{path}: the columns {', '.join(missing)} are missing; {_REMEDY}")
        table = pq.read_table(path, columns=list(COLUMNS))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the attack stage (`prsl attack`) first") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); {_REMEDY}") from None
    for name in COLUMNS:
        if name not in _NULLABLE and table.column(name).null_count:
            raise UserError(f"{path}: the column {name} has rows without a value; {_REMEDY}")
    return table


def _ordered(texts: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    return {name: texts[name] for name in names if name in texts}


def _check(data: Outputs, origin: Mapping[Condition, Path]) -> None:
    """Raises a `UserError` unless the conditions fit together as `read_outputs` promises."""
    of_model = {condition.model: path for condition, path in sorted(origin.items(), reverse=True)}
    primary = sorted(attack for attack, role in data.roles.items() if role == "primary")
    if len(primary) != 1:
        raise UserError(
            f"{', '.join(sorted({str(path) for path in origin.values()}))}: {len(primary)} primary attacks "
            f"({', '.join(primary) or 'none'}) where there must be one; {_REMEDY}"
        )
    ids: dict[tuple[str, int], set[str]] = {(primary[0], 0): set()}
    for condition, texts in data.texts.items():
        ids.setdefault((condition.attack, condition.round), set()).update(texts)
    for (attack, number), shared in ids.items():
        # The worst case over the ensemble, and what all other conditions are compared with, are of all images.
        wanted = set(data.references) if data.roles[attack] in ("primary", "ensemble") else shared
        for model in data.models:
            condition = Condition(*model, attack, number)
            if condition not in data.texts:
                if data.sources.get(attack) == model[0]:
                    continue  # images made on this arm: it has no row where it is its own source
                raise UserError(f"{of_model[model]}: {condition} is missing, which other rows need; {_REMEDY}")
            missing = sorted(wanted.difference(data.texts[condition]))
            if missing:
                raise UserError(
                    f"{origin[condition]}: {condition} lacks {len(missing)} of {len(wanted)} images, such as "
                    f"{missing[0]!r}, so it cannot be compared with the others; {_REMEDY}"
                )
