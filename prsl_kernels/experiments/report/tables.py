"""A run directory as checked tables: everything that the report says is computed from what this module loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json
from prsl_kernels.experiments.report.arms import ArmRun, load_training
from prsl_kernels.experiments.report.statistics import Floats

RANDOM_PAIR = "random-pair"
PRIMARY_REFERENCE = "primary"
SECONDARY_REFERENCE = "secondary"
BLANK_REFERENCE = "blank"  # what the arm itself says of a blank image
WORST = "worst"
TRANSFER_PREFIX = "transfer-from-"
_DEFAULT_SCORE = {"captions": "bertscore_f1", "vqa": "vqa_accuracy"}
_TASK_ORDER = ("captions", "vqa")

_OUTPUT_COLUMNS = (
    "task", "arm", "seed", "attack", "objective", "reference", "eps", "step", "round", "id", "group", "question",
    "references", "text", "objective_value", "linf", "l2", "zero_gradient_share", "nonfinite_gradient_share", "image",
    "role", "method", "norm", "source", "target", "gradient_norm", "restarts",
)  # fmt: skip
_SCORE_COLUMNS = ("task", "arm", "seed", "attack", "round", "id", "group", "reference", "metric", "value")
_CORPUS_COLUMNS = ("task", "arm", "seed", "attack", "round", "reference", "metric", "value")
_WORST_COLUMNS = ("arm", "seed", "id", "attack", "round")
_SURFACE_COLUMNS = ("arm", "seed", "id", "a", "b", "value")
_CELL = ["reference", "attack", "metric", "round"]


@dataclass(frozen=True)
class Endpoint:
    """What one comparison is about: a score at a round of an attack, against the primary reference.

    The attack may be "worst": for each image the lowest score over the attacks that the evaluation chose from, each at
    its last round. Its `round` is then the largest of those rounds and says nothing of its own.
    """

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
    main_attack: str  # of the role "primary": its rounds are the curves, its round 0 is the clean image
    transferred: pd.DataFrame  # outputs on images made on another arm (`source`); may be empty
    worst: pd.DataFrame  # arm, seed, id, attack, round: what the worst case was, image by image; may be empty
    surface: pd.DataFrame  # arm, seed, id, a, b, value: slices of the objective; may be empty
    random_pairs: pd.DataFrame  # metric, id, value: references paired at random; may be empty
    config: Mapping[str, Any]  # the recipe's part on this task; may be empty
    versions: Mapping[str, Any]  # of the scores' back ends; may be empty
    grid: Mapping[str, Any]  # the recipe's grid; empty where it has none
    choice: Mapping[str, Any]  # choice.json: what the grid found and named; empty where there is none
    preprocessing: Mapping[str, Any]  # of the attacked checkpoints: size, image_mean, image_std; may be empty
    gaps: tuple[str, ...]

    @property
    def baseline(self) -> str:
        return self.arms[0]

    @property
    def attacked_split(self) -> str:
        """The split whose images were attacked; a recipe that does not say so attacks the test split."""
        return str((self.config.get("data") or {}).get("attacked") or "test")

    @property
    def others(self) -> tuple[str, ...]:
        return self.arms[1:]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(int(seed) for seed in self.outputs["seed"].unique()))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Scores that were computed, the primary one first; the length of the outputs is not a score."""
        names = set(self.scores.index.unique("metric")) - {"length"}
        order = [self.endpoint.score, *_METRIC_NAMES, *sorted(names)]
        return tuple(name for name in dict.fromkeys(order) if name in names)

    @property
    def main_round(self) -> int:
        """The last round of the main attack, or that of the endpoint where the endpoint is the main attack."""
        return self.endpoint.round if self.endpoint.attack == self.main_attack else self.rounds(self.main_attack)[-1]

    @property
    def main_rows(self) -> pd.DataFrame:
        """Outputs of the main attack, without the clean images: the primary budget is theirs."""
        return self.outputs[(self.outputs["attack"] == self.main_attack) & (self.outputs["round"] > 0)]

    def label(self, arm: str) -> str:
        """How the report calls the arm: different for different arms."""
        return self._labels[arm]

    @cached_property
    def _labels(self) -> dict[str, str]:
        """Labels, with k and b where arms would be called alike without, and their name where that is not enough."""
        fits = {arm: self.runs[arm][0] for arm in self.arms}
        labels = {arm: fit.label for arm, fit in fits.items()}
        additions: tuple[Callable[[ArmRun], str], ...] = (
            lambda fit: f", k\u00a0=\u00a0{fit.k}" if fit.as_printed else "",
            lambda fit: f", b\u00a0=\u00a0{fit.b:.3g}" if fit.b and not fit.as_printed else "",
            lambda fit: f" ({fit.name})",
        )
        for addition in additions:
            counts = Counter(labels.values())
            labels = {arm: label + (addition(fits[arm]) if counts[label] > 1 else "") for arm, label in labels.items()}
        return labels

    def variant(self, arm: str) -> str:
        """What sets a PRSL arm apart from the others, for sentences that say PRSL already."""
        return self.label(arm).removeprefix("PRSL").lstrip(" ,")

    def rounds(self, attack: str) -> tuple[int, ...]:
        """Recorded rounds of an attack, ascending; empty where it was not run."""
        return self._rounds.get(attack, ())

    @cached_property
    def _rounds(self) -> dict[str, tuple[int, ...]]:
        found = self.outputs.groupby("attack")["round"].unique()
        return {str(attack): tuple(sorted(int(number) for number in numbers)) for attack, numbers in found.items()}

    def cube(
        self, metric: str, attack: str, number: int, reference: str = PRIMARY_REFERENCE,
        arms: Sequence[str] | None = None,
    ) -> tuple[Floats, tuple[str, ...]]:  # fmt: skip
        """Scores of the images that all `arms` have under all seeds: ((S, n, arms), ids); n may be 0."""
        columns = tuple(self.arms if arms is None else arms)
        key = (reference, attack, metric, number)
        if (key, columns) not in self._cubes:
            self._cubes[key, columns] = self._cube(key, columns)
        return self._cubes[key, columns]

    def aligned(
        self, cells: Sequence[tuple[str, int, Sequence[str] | None]], reference: str = PRIMARY_REFERENCE
    ) -> tuple[list[Floats], tuple[str, ...]]:
        """The primary score's cubes of several (attack, round, arms), on the images that all of them have."""
        cubes = [self.cube(self.endpoint.score, attack, number, reference, arms) for attack, number, arms in cells]
        shared = sorted(set.intersection(*(set(ids) for _, ids in cubes))) if cubes else []
        places = [{name: place for place, name in enumerate(ids)} for _, ids in cubes]
        picked = [
            values[:, [place[name] for name in shared], :] for (values, _), place in zip(cubes, places, strict=True)
        ]
        return picked, tuple(shared)

    @cached_property
    def _cubes(self) -> dict[tuple[Any, tuple[str, ...]], tuple[Floats, tuple[str, ...]]]:
        return {}

    def _cube(self, key: tuple[str, str, str, int], columns: tuple[str, ...]) -> tuple[Floats, tuple[str, ...]]:
        empty = np.empty((len(self.seeds), 0, len(columns)))
        if key not in self._cells:
            return empty, ()
        rows = self._cells[key].droplevel(_CELL)[list(columns)].unstack("seed").dropna()
        if rows.empty or rows.shape[1] != len(columns) * len(self.seeds):  # a seed that is missing altogether
            return empty, ()
        values = rows.to_numpy(dtype=np.float64).reshape(len(rows), len(columns), -1).transpose(2, 0, 1)
        return values, tuple(str(name) for name in rows.index)

    @cached_property
    def _cells(self) -> dict[Hashable, pd.DataFrame]:
        return dict(iter(self.scores.groupby(level=_CELL, sort=False)))

    def corpus_value(self, arm: str, attack: str, number: int, metric: str) -> float | None:
        """The corpus score against the primary reference, mean over seeds; None where there is none."""
        return self._corpus_means.get((arm, attack, number, metric))

    def main_budget(self) -> float:
        """eps of the main attack, in [0, 1] pixels."""
        return float(self.main_rows["eps"].max())

    def random_pair_value(self, metric: str) -> float | None:
        """The corpus score of references that were paired at random."""
        found = (value for (arm, *_, name), value in self._corpus_means.items() if (arm, name) == (RANDOM_PAIR, metric))
        return next(found, None)

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
    base, _, encoder = metric.partition("bertscore_f1_")
    return f"BERTScore F1 ({encoder})" if encoder and not base else _METRIC_NAMES.get(metric, metric)


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
    outputs = _declared(_stack(paths, _OUTPUT_COLUMNS, "attack", with_folder=True), task, recipe)
    shown = _finished(folder / "transfer", "outputs.parquet")
    transferred = _declared(_stack(shown, _OUTPUT_COLUMNS, "attack", with_folder=True), task, recipe)
    surface = _declared(
        _stack(_finished(folder / "attack", "surface.parquet"), _SURFACE_COLUMNS, "attack"), task, recipe
    )
    worst = _declared(_stack(_finished(folder / "evaluate", "worst.parquet"), _WORST_COLUMNS, "evaluate"), task, recipe)
    raw = _declared(_read_parquet(folder / "evaluate" / "scores.parquet", _SCORE_COLUMNS, "evaluate"), task, recipe)
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
    runs = _load_arms(folder, task, recipe, gaps)
    arms = _order_arms(runs, outputs, raw, folder, _declared_arms(task, recipe), gaps)
    pairs = raw.loc[raw["arm"] == RANDOM_PAIR, ["metric", "id", "value"]].reset_index(drop=True)
    scores = _widen(raw[raw["arm"].isin(arms)], folder / "evaluate" / "scores.parquet")
    outputs = outputs[outputs["arm"].isin(arms)].reset_index(drop=True)
    path = folder / "evaluate" / "scores.parquet"
    return TaskTables(
        task=task,
        folder=folder,
        arms=arms,
        runs=runs,
        outputs=outputs,
        scores=scores,
        corpus=corpus,
        endpoint=_endpoint(task, recipe, scores, path),
        main_attack=_main_attack(outputs, scores, path),
        transferred=transferred[transferred["arm"].isin(arms) & transferred["source"].isin(arms)],
        worst=worst[worst["arm"].isin(arms)],
        surface=surface[surface["arm"].isin(arms)],
        random_pairs=pairs,
        config=(recipe.get("tasks") or {}).get(task) or {},
        grid=recipe.get("grid") or {},
        choice=_optional_json(folder / "choice.json"),
        versions=versions,
        preprocessing=_preprocessing(folder / "finetune"),
        gaps=tuple(gaps),
    )


def _finished(folder: Path, name: str) -> list[Path]:
    """Files of that name anywhere below `folder`, but not those of an interrupted stage."""
    return [path for path in sorted(folder.rglob(name)) if not any(part.endswith(".partial") for part in path.parts)]


def _stack(paths: Sequence[Path], columns: Sequence[str], stage: str, *, with_folder: bool = False) -> pd.DataFrame:
    """The tables below each other, with the folder that each row came from where wanted; empty where there is none."""
    parts = [_read_parquet(path, columns, stage) for path in paths]
    if with_folder:
        parts = [part.assign(folder=str(path.parent)) for part, path in zip(parts, paths, strict=True)]
    empty = pd.DataFrame(columns=[*columns, "folder"] if with_folder else list(columns))
    return pd.concat(parts, ignore_index=True) if parts else empty


def _declared_arms(task: str, recipe: Mapping[str, Any]) -> list[str]:
    """Names of the arms that the recipe gives to a task, in its order; empty where it declares none."""
    names = [str(arm.get("name")) for arm in recipe.get("arms") or []]
    wanted = ((recipe.get("tasks") or {}).get(task) or {}).get("arms")
    return names if wanted is None else [name for name in names if name in wanted]


def _declared(rows: pd.DataFrame, task: str, recipe: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of arms and seeds that the recipe declares for the task; all of them where it declares none."""
    arms = _declared_arms(task, recipe)
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


def _load_arms(folder: Path, task: str, recipe: Mapping[str, Any], gaps: list[str]) -> dict[str, tuple[ArmRun, ...]]:
    runs: dict[str, list[ArmRun]] = {}
    arms = set(_declared_arms(task, recipe))
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
                label_smoothing=float(raw.get("label_smoothing") or 0.0),
                temperature=float(raw.get("temperature") or 1.0),
                training=load_training(path.with_name("train.jsonl"), folder, gaps),
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


def _preprocessing(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings beside any of the checkpoints; they share the base and so the settings."""
    for path in _finished(folder, "preprocessor_config.json"):
        return _optional_json(path)
    return {}


def _order_arms(
    runs: Mapping[str, tuple[ArmRun, ...]], outputs: pd.DataFrame, scores: pd.DataFrame, folder: Path,
    declared: Sequence[str], gaps: list[str],
) -> tuple[str, ...]:  # fmt: skip
    attacked, scored = set(outputs["arm"]), set(scores["arm"]) - {RANDOM_PAIR}
    present = attacked & scored
    for arm in sorted(present - set(runs)):
        raise UserError(
            f"{folder / 'finetune' / arm / 'arm.json'}: there is no such file, but the arm has scores; run "
            "`prsl finetune` again, or delete the arm's attack and scores"
        )
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


def _endpoint(task: str, recipe: Mapping[str, Any], scores: pd.DataFrame, path: Path) -> Endpoint:
    """The primary endpoint: the task's `primary` in the recipe, else the default of the protocol."""
    declared = ((recipe.get("tasks") or {}).get(task) or {}).get("primary") or {}
    available = sorted(scores.index.unique("metric"))
    score = str(declared.get("score") or _DEFAULT_SCORE.get(task, available[0]))
    attack = str(declared.get("attack") or WORST)
    if score not in available:
        raise UserError(f"{path}: the primary score {score!r} was not computed; there are {', '.join(available)}")
    rounds = _scored_rounds(scores, attack, path)
    number = declared.get("round")
    if number is not None and int(number) not in rounds:
        raise UserError(f"{path}: has no rows of the primary round {number}; recorded are {rounds}")
    return Endpoint(score, attack, rounds[-1] if number is None else int(number), bool(declared))


def _main_attack(outputs: pd.DataFrame, scores: pd.DataFrame, path: Path) -> str:
    """The attack of the role "primary"."""
    names = sorted(str(name) for name in outputs.loc[outputs["role"] == "primary", "attack"].unique())
    if len(names) != 1:
        raise UserError(
            f"{path.parent.parent / 'attack'}: one attack must have the role primary, and {names or 'none'} "
            f"{'have' if len(names) > 1 else 'has'}; delete it and run `prsl attack` again"
        )
    _scored_rounds(scores, names[0], path)
    return names[0]


def _scored_rounds(scores: pd.DataFrame, attack: str, path: Path) -> list[int]:
    """Rounds of an attack that have scores, ascending."""
    cells = scores.loc[scores.index.get_level_values("attack") == attack]
    rounds = sorted(int(number) for number in cells.index.unique("round"))
    if not rounds:
        raise UserError(f"{path}: has no rows of the primary attack {attack!r}; run `prsl attack` and `prsl evaluate`")
    return rounds
