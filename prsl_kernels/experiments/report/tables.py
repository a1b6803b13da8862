"""A run directory as checked tables: everything that the report says is computed from what this module loads."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json
from prsl_kernels.experiments.report.statistics import Floats

RANDOM_PAIR = "random-pair"
PRIMARY_REFERENCE = "primary"
SECONDARY_REFERENCE = "secondary"
_DEFAULT_SCORE = {"captions": "bertscore_f1", "vqa": "vqa_accuracy"}
_TASK_ORDER = ("captions", "vqa")

_OUTPUT_COLUMNS = (
    "task", "arm", "seed", "attack", "objective", "reference", "eps", "step", "round", "id", "group", "question",
    "references", "text", "objective_value", "linf", "l2", "zero_gradient_share", "nonfinite_gradient_share", "image",
)  # fmt: skip
_SCORE_COLUMNS = ("task", "arm", "seed", "attack", "round", "id", "group", "reference", "metric", "value")
_CORPUS_COLUMNS = ("task", "arm", "seed", "attack", "round", "reference", "metric", "value")
_CELL = ["reference", "attack", "metric", "round"]


@dataclass(frozen=True)
class ArmRun:
    """One fine-tuning: an arm under one training seed, as `arm.json` and `train.jsonl` record it."""

    name: str
    loss: str
    k: int
    b: float
    space: str
    distance: str
    gradient_ratio_target: float | None
    gradient_ratio_measured: float | None
    selected_step: int
    eval_cross_entropy: float
    base_eval_cross_entropy: float
    vocab_size: int
    seed: int
    steps: int
    training: pd.DataFrame = field(repr=False)

    @property
    def is_cross_entropy(self) -> bool:
        return self.b == 0

    @property
    def as_printed(self) -> bool:
        """PRSL to the letter of the paper: probabilities, Euclidean distance, and a weight of 1e-4."""
        return self.space == "prob" and self.distance == "l2" and math.isclose(self.b, 1e-4, rel_tol=1e-6)

    @property
    def label(self) -> str:
        """How the report calls the arm, beside its name in the recipe."""
        if self.is_cross_entropy:
            return "Cross entropy"
        if self.as_printed:
            return "PRSL as printed, b\u00a0=\u00a01e-4"
        space = "" if self.space == "prob" else " log-prob"
        distance = "" if self.distance == "l2" else f" {self.distance.upper()}"
        return f"PRSL{space}{distance}, k\u00a0=\u00a0{self.k}"

    @property
    def k_over_v(self) -> str:
        """The share of the vocabulary that the penalty acts on; an en dash for cross entropy, which has no k."""
        if self.is_cross_entropy:
            return "–"
        return f"{self.k}/{self.vocab_size:,} = {self.k / self.vocab_size:.2%}".replace("%", "\u2009%")


@dataclass(frozen=True)
class Endpoint:
    """What one comparison is about: a score at a round of an attack, against the primary reference."""

    score: str
    attack: str
    round: int
    declared: bool  # in the recipe, so before the run; otherwise the default


@dataclass(frozen=True)
class TaskTables:
    """Everything of one task. `scores` has a row per reference, attack, metric, round, seed, id; a column per arm."""

    task: str
    folder: Path
    arms: tuple[str, ...]  # those with outputs and scores, cross entropy first
    runs: Mapping[str, tuple[ArmRun, ...]]
    outputs: pd.DataFrame
    scores: pd.DataFrame
    corpus: pd.DataFrame
    endpoint: Endpoint
    versions: Mapping[str, Any]  # of the scores' back ends; may be empty
    preprocessing: Mapping[str, Any]  # of the attacked checkpoints: size, image_mean, image_std; may be empty
    gaps: tuple[str, ...]

    @property
    def baseline(self) -> str:
        return self.arms[0]

    @property
    def others(self) -> tuple[str, ...]:
        return self.arms[1:]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(int(seed) for seed in self.outputs["seed"].unique()))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Scores that were computed, the primary one first; the length of the outputs is not a score."""
        names = set(self.scores.index.unique("metric")) - {"length"}
        order = [self.endpoint.score, *_METRIC_NAMES, *sorted(names)]
        return tuple(name for name in dict.fromkeys(order) if name in names)

    def label(self, arm: str) -> str:
        """How the report calls the arm."""
        return self.runs[arm][0].label

    def variant(self, arm: str) -> str:
        """What sets a PRSL arm apart from the others, for sentences that say PRSL already."""
        return self.label(arm).removeprefix("PRSL").lstrip(" ,")

    def rounds(self, attack: str) -> tuple[int, ...]:
        """Recorded rounds of an attack, ascending; empty where it was not run."""
        present = self.outputs.loc[self.outputs["attack"] == attack, "round"]
        return tuple(sorted(int(number) for number in present.unique()))

    def cube(
        self, metric: str, attack: str, number: int, reference: str = PRIMARY_REFERENCE,
        arms: Sequence[str] | None = None,
    ) -> tuple[Floats, tuple[str, ...]]:  # fmt: skip
        """Scores of the images that all `arms` have under all seeds: ((S, n, arms), ids); n may be 0."""
        columns = list(self.arms if arms is None else arms)
        empty = np.empty((len(self.seeds), 0, len(columns)))
        key = (reference, attack, metric, number)
        if key not in self._cells:
            return empty, ()
        rows = self._cells[key].droplevel(_CELL)[columns].unstack("seed").dropna()
        if rows.empty:
            return empty, ()
        values = rows.to_numpy(dtype=np.float64).reshape(len(rows), len(columns), -1).transpose(2, 0, 1)
        return values, tuple(str(name) for name in rows.index)

    @cached_property
    def _cells(self) -> dict[Hashable, pd.DataFrame]:
        return dict(iter(self.scores.groupby(level=_CELL, sort=False)))

    def corpus_value(self, arm: str, attack: str, number: int, metric: str) -> float | None:
        """The corpus score against the primary reference, mean over seeds; None where there is none."""
        return self._corpus_means.get((arm, attack, number, metric))

    def random_pair_value(self, metric: str) -> float | None:
        """The corpus score of references that were paired at random."""
        found = [
            value for (arm, _, _, name), value in self._corpus_means.items() if (arm, name) == (RANDOM_PAIR, metric)
        ]
        return found[0] if found else None

    @cached_property
    def _corpus_means(self) -> dict[tuple[str, str, int, str], float]:
        rows = self.corpus[self.corpus["reference"] == PRIMARY_REFERENCE]
        means = rows.groupby(["arm", "attack", "round", "metric"])["value"].mean()
        return {key: float(value) for key, value in means.items()}


@dataclass(frozen=True)
class RunTables:
    """A run: its tasks, and what it records of itself."""

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    info: Mapping[str, Any]  # run.json; empty where there is none
    tasks: tuple[TaskTables, ...]
    gaps: tuple[str, ...]


_METRIC_NAMES = {
    "bertscore_f1": "BERTScore F1",
    "vqa_accuracy": "Answer accuracy",
    "exact_match": "Exact match",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
}


def metric_name(metric: str) -> str:
    """A score's name for people."""
    return _METRIC_NAMES.get(metric, metric)


def load_run(folder: Path, recipe: Mapping[str, Any]) -> RunTables:
    """Reads and checks a run directory.

    Raises:
        UserError: the directory holds no task, or a table that the report cannot do without is missing, damaged, of
            another layout, empty, or holds numbers that are not finite.
    """
    if not folder.is_dir():
        raise UserError(f"run directory {folder}: there is no such directory; `prsl run RECIPE` makes one")
    # What the recipe no longer declares may still lie in the directory, from an earlier run of another recipe.
    found = {path.parent.name for stage in ("attack", "evaluate") for path in folder.glob(f"*/{stage}")}
    wanted = {str(task) for task in recipe.get("tasks") or {}} or found
    names = sorted(wanted, key=lambda task: (_TASK_ORDER.index(task) if task in _TASK_ORDER else 9, task))
    if not names:
        raise UserError(f"run directory {folder}: holds no task; `prsl run RECIPE` makes a run to report on")
    info = _optional_json(folder / "run.json")
    gaps = () if info else ("run.json is missing, so the machine, the date and the data's licences are not shown.",)
    return RunTables(
        folder=folder,
        name=str(recipe.get("name") or info.get("name") or folder.name),
        recipe=recipe,
        info=info,
        tasks=tuple(_load_task(folder / name, name, recipe) for name in names),
        gaps=gaps,
    )


def _optional_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; delete it and run `prsl run` again")
    return content


def _load_task(folder: Path, task: str, recipe: Mapping[str, Any]) -> TaskTables:
    gaps: list[str] = []
    paths = _finished(folder / "attack", "outputs.parquet")
    if not paths:
        raise UserError(f"{folder / 'attack'}: no arm has an outputs.parquet; run the attack stage (`prsl attack`)")
    parts = [_read_parquet(path, _OUTPUT_COLUMNS, "attack").assign(folder=str(path.parent)) for path in paths]
    outputs = _declared(pd.concat(parts, ignore_index=True), recipe)
    raw = _declared(_read_parquet(folder / "evaluate" / "scores.parquet", _SCORE_COLUMNS, "evaluate"), recipe)
    _finite(raw, folder / "evaluate" / "scores.parquet")
    corpus_path = folder / "evaluate" / "corpus.parquet"
    if corpus_path.exists():
        corpus = _read_parquet(corpus_path, _CORPUS_COLUMNS, "evaluate")
        _finite(corpus, corpus_path)
    else:
        corpus = pd.DataFrame({name: [] for name in _CORPUS_COLUMNS})
        gaps.append("evaluate/corpus.parquet is missing: no corpus scores and no random-pair floor.")
    versions = _optional_json(folder / "evaluate" / "versions.json")
    if not versions:
        gaps.append("evaluate/versions.json is missing: the back ends of the scores are not known.")
    runs = _load_arms(folder, recipe, gaps)
    arms = _order_arms(runs, outputs, raw, folder, recipe, gaps)
    scores = _widen(raw[raw["arm"].isin(arms)], folder / "evaluate" / "scores.parquet")
    outputs = outputs[outputs["arm"].isin(arms)].reset_index(drop=True)
    return TaskTables(
        task=task,
        folder=folder,
        arms=arms,
        runs=runs,
        outputs=outputs,
        scores=scores,
        corpus=corpus,
        endpoint=_endpoint(task, recipe, scores, folder),
        versions=versions,
        preprocessing=_preprocessing(folder / "finetune"),
        gaps=tuple(gaps),
    )


def _finished(folder: Path, name: str) -> list[Path]:
    """Files of that name anywhere below `folder`, but not those of an interrupted stage."""
    return [path for path in sorted(folder.rglob(name)) if not any(part.endswith(".partial") for part in path.parts)]


def _declared(rows: pd.DataFrame, recipe: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of arms and seeds that the recipe declares; all of them where it declares none."""
    arms = [str(arm.get("name")) for arm in recipe.get("arms") or []]
    seeds = [int(seed) for seed in recipe.get("seeds") or []]
    kept = rows["arm"].isin([*arms, RANDOM_PAIR]) if arms else pd.Series(True, index=rows.index)
    if seeds:
        kept &= rows["seed"].isin(seeds) | (rows["arm"] == RANDOM_PAIR)
    return rows[kept]


def _read_parquet(path: Path, columns: Sequence[str], stage: str) -> pd.DataFrame:
    remedy = f"delete it and run `prsl {stage}` again"
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the {stage} stage (`prsl {stage}`)") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); {remedy}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: the columns {', '.join(missing)} are missing; {remedy}")
    if not table.num_rows:
        raise UserError(f"{path}: the table is empty; {remedy}")
    return table.select(list(columns)).to_pandas()


def _finite(table: pd.DataFrame, path: Path) -> None:
    broken = table[~np.isfinite(table["value"].astype(float))]
    if len(broken):
        first = broken.iloc[0]
        raise UserError(
            f"{path}: {len(broken)} of {len(table)} scores are not finite numbers, the first being "
            f"{first['metric']} of arm {first['arm']} at round {first['round']}; delete the file and run "
            "`prsl evaluate` again"
        )


def _load_arms(folder: Path, recipe: Mapping[str, Any], gaps: list[str]) -> dict[str, tuple[ArmRun, ...]]:
    runs: dict[str, list[ArmRun]] = {}
    arms = {str(arm.get("name")) for arm in recipe.get("arms") or []}
    seeds = {int(seed) for seed in recipe.get("seeds") or []}
    for path in _finished(folder / "finetune", "arm.json"):
        raw = read_json(path)
        try:
            run = ArmRun(
                name=str(raw["arm"]), loss=str(raw["loss"]), k=int(raw["k"]), b=float(raw["b"]),
                space=str(raw["space"]), distance=str(raw["distance"]),
                gradient_ratio_target=_optional(raw["gradient_ratio_target"]),
                gradient_ratio_measured=_optional(raw["gradient_ratio_measured"]),
                selected_step=int(raw["selected_step"]), eval_cross_entropy=float(raw["eval_cross_entropy"]),
                base_eval_cross_entropy=float(raw["base_eval_cross_entropy"]), vocab_size=int(raw["vocab_size"]),
                seed=int(raw["seed"]), steps=int(raw["steps"]),
                training=_load_training(path.with_name("train.jsonl"), folder, gaps),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not the record of an arm ({type(error).__name__}: {error}); delete it and run "
                "`prsl finetune` again"
            ) from None
        if run.name in (arms or {run.name}) and run.seed in (seeds or {run.seed}):
            runs.setdefault(run.name, []).append(run)
    return {name: tuple(sorted(found, key=lambda run: run.seed)) for name, found in runs.items()}


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _load_training(path: Path, task_folder: Path, gaps: list[str]) -> pd.DataFrame:
    if not path.exists():
        gaps.append(f"{path.relative_to(task_folder).as_posix()} is missing: no training curves for this arm.")
        return pd.DataFrame()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON lines ({error}); delete it and run `prsl finetune` again") from None
    return pd.DataFrame(rows)


def _preprocessing(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings beside any of the checkpoints; they share the base and so the settings."""
    for path in _finished(folder, "preprocessor_config.json"):
        return _optional_json(path)
    return {}


def _order_arms(
    runs: Mapping[str, tuple[ArmRun, ...]], outputs: pd.DataFrame, scores: pd.DataFrame, folder: Path,
    recipe: Mapping[str, Any], gaps: list[str],
) -> tuple[str, ...]:  # fmt: skip
    attacked, scored = set(outputs["arm"]), set(scores["arm"]) - {RANDOM_PAIR}
    present = attacked & scored
    for arm in sorted(present - set(runs)):
        raise UserError(
            f"{folder / 'finetune' / arm / 'arm.json'}: there is no such file, but the arm has scores; run "
            "`prsl finetune` again, or delete the arm's attack and scores"
        )
    declared = [str(arm.get("name")) for arm in recipe.get("arms") or []]
    for arm in sorted((set(declared) | set(runs) | attacked | scored) - present):
        lacking = "attacked" if arm not in attacked else "scored"
        gaps.append(f"Arm {arm} was not {lacking}: it is missing from everything below.")
    order = [*declared, *sorted(present)]
    ordered = [arm for arm in dict.fromkeys(order) if arm in present]
    baselines = [arm for arm in ordered if runs[arm][0].is_cross_entropy]
    if not baselines:
        raise UserError(
            f"{folder}: no cross-entropy arm (b = 0) has outputs and scores, and every comparison is with it; "
            "add one to the recipe and run again"
        )
    return (baselines[0], *(arm for arm in ordered if arm != baselines[0]))


def _widen(scores: pd.DataFrame, path: Path) -> pd.DataFrame:
    keys = [*_CELL, "seed", "id"]
    repeated = scores.duplicated([*keys, "arm"])
    if repeated.any():
        row = scores[repeated].iloc[0]
        raise UserError(
            f"{path}: {row['metric']} of {row['id']} under arm {row['arm']} at round {row['round']} occurs twice; "
            "delete the file and run `prsl evaluate` again"
        )
    return scores.set_index([*keys, "arm"])["value"].unstack("arm").sort_index()


def _endpoint(task: str, recipe: Mapping[str, Any], scores: pd.DataFrame, folder: Path) -> Endpoint:
    """The primary endpoint: the task's `primary` in the recipe, else the default of the protocol."""
    declared = ((recipe.get("tasks") or {}).get(task) or {}).get("primary") or {}
    available = sorted(scores.index.unique("metric"))
    score = str(declared.get("score") or _DEFAULT_SCORE.get(task, available[0]))
    attack = str(declared.get("attack") or "bim")
    cells = scores.loc[scores.index.get_level_values("attack") == attack]
    rounds = sorted(int(number) for number in cells.index.unique("round"))
    number = declared.get("round")
    path = folder / "evaluate" / "scores.parquet"
    if score not in available:
        raise UserError(f"{path}: the primary score {score!r} was not computed; there are {', '.join(available)}")
    if not rounds:
        raise UserError(f"{path}: has no rows of the primary attack {attack!r}; run `prsl attack` and `prsl evaluate`")
    if number is not None and int(number) not in rounds:
        raise UserError(f"{path}: has no rows of the primary round {number}; recorded are {rounds}")
    return Endpoint(score, attack, rounds[-1] if number is None else int(number), bool(declared))
