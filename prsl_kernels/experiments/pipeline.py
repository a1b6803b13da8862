"""A recipe as stages, each cached by the hash of what it depends on.

    finetune/<arm>/seed-<n>  ->  attack/<arm>/seed-<n>  ->  transfer/<arm>/seed-<n>  ->  evaluate  ->  report
    (per task, arm and seed)     (per task, arm and seed)   (where asked for)            (per task)    (one)

A stage whose key or whose files changed is made again (see `execution`), and so is everything after it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.config import ArmConfig, DataConfig, Recipe, Task, TaskConfig, as_dict, save_recipe
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.digests import base_digest, source_digest
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.execution import execute, is_fresh, locked
from prsl_kernels.experiments.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from prsl_kernels.experiments.data import Dataset

TESTS = "tests"  # the folder of the runs on further test sets
HEADLINE = "headline.txt"  # the report's most telling lines, kept so that a second run need not compute them
_FULL = 2**16  # bytes; a disk with less is full


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique; also the stage's folder below the run directory, unless `in_place`.
        kind: "finetune", "attack", "transfer", "evaluate" or "report".
        depends: JSON; everything of the configuration and the data that the result depends on.
        sources: files and folders of the package whose code the result depends on.
        build: makes the result in the folder that it is given. That folder may hold what an interrupted attempt with
            the same key left. An `in_place` stage is given the run directory and returns the files that it wrote.
        needs: the stages whose results this one reads.
        task, arm, seed: what it is a stage of, where it is one task's, arm's or seed's.
    """

    name: str
    kind: str
    depends: dict[str, Any]
    sources: tuple[str, ...]
    build: Callable[[Path], Iterable[Path] | None]
    needs: tuple[Stage, ...] = ()
    in_place: bool = False
    task: str | None = None
    arm: str | None = None
    seed: int | None = None

    @cached_property
    def key(self) -> str:
        """SHA-256 over the configuration, the code, and the keys of the stages before."""
        content = {
            "depends": self.depends,
            "code": [source_digest(source) for source in self.sources],
            "needs": [need.key for need in self.needs],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_LOSS = ("functional.py", "eager.py", "huggingface.py")


@dataclass(frozen=True)
class Experiment:
    """A recipe bound to a run directory and a device. Data sets are loaded once, when a stage first needs them.

    With `trained`, the arms of that experiment are attacked on other data, instead of arms of its own.
    """

    recipe: Recipe
    run: Path
    device: str
    trained: Experiment | None = None
    _datasets: dict[tuple[str, str], Dataset] = field(default_factory=dict)

    def dataset(self, task: Task, split: str) -> Dataset:
        """The split of the task's data set, cut to the recipe's limit."""
        from prsl_kernels.experiments.data import load_dataset

        config: DataConfig = self.recipe.tasks[task].data
        if self.trained is not None and split != config.attacked:
            return self.trained.dataset(task, split)
        if (task, split) not in self._datasets:
            limit = getattr(config, f"{split}_limit")
            dataset = load_dataset(config, split, limit=limit, task=task)  # type: ignore[arg-type]
            if dataset.task != task:
                raise UserError(
                    f"tasks.{task}.data.name: {config.name!r} is a data set for {dataset.task}, not for {task}"
                )
            self._datasets[task, split] = dataset
        return self._datasets[task, split]

    @cached_property
    def stages(self) -> list[Stage]:
        """All stages in an order in which they can run: a whole arm first, so that problems show early."""
        stages: list[Stage] = []
        scored: list[Stage] = []
        for task, config in self.recipe.tasks.items():
            outputs: list[Stage] = []
            for seed in self.recipe.seeds:
                attacks: dict[str, Stage] = {}
                for arm in self.recipe.arms_of(task):
                    finetune = self.finetuned[task, arm.name, seed]
                    attacks[arm.name] = self._attack(task, config, arm, seed, finetune)
                    stages += [attacks[arm.name]] if self.trained is not None else [finetune, attacks[arm.name]]
                outputs += attacks.values()
                if config.attack.transfer is not None and len(attacks) > 1:
                    transfers = [self._transfer(task, config, arm, seed, attacks) for arm in attacks]
                    stages += transfers
                    outputs += transfers
            evaluate = self._evaluate(task, config, outputs)
            stages.append(evaluate)
            scored.append(evaluate)
        return [*stages, self._report(scored)]

    @cached_property
    def finetuned(self) -> dict[tuple[Task, str, int], Stage]:
        """The stage that makes each model, by task, arm and seed."""
        if self.trained is not None:
            return self.trained.finetuned
        return {
            (task, arm.name, seed): self._finetune(task, config, arm, seed)
            for task, config in self.recipe.tasks.items()
            for seed in self.recipe.seeds
            for arm in self.recipe.arms_of(task)
        }

    @property
    def models(self) -> Path:
        """The run directory with the fine-tuned models."""
        return self.run if self.trained is None else self.trained.models

    def _finetune(self, task: Task, config: TaskConfig, arm: ArmConfig, seed: int) -> Stage:
        def build(out: Path) -> None:
            from prsl_kernels.experiments.training.finetune import finetune

            finetune(
                config.base,
                self.dataset(task, "train"),
                self.dataset(task, "select"),
                arm,
                config.finetune,
                out,
                seed=seed,
                device=self.device,
                decoding=config.decoding,
            )

        return Stage(
            name=f"{task}/finetune/{arm.name}/seed-{seed}",
            kind="finetune",
            depends={
                "arm": {key: value for key, value in as_dict(arm).items() if key != "note"},
                "finetune": {key: value for key, value in as_dict(config.finetune).items() if key != "report_to"},
                "base": base_digest(config.base),
                "prompt": config.decoding.prompt,
                "data": [self.dataset(task, split).fingerprint for split in ("train", "select")],
                "seed": seed,
            },
            sources=(*_LOSS, "experiments/training", "experiments/models", "experiments/data"),
            build=build,
            task=task,
            arm=arm.name,
            seed=seed,
        )

    def _attack(self, task: Task, config: TaskConfig, arm: ArmConfig, seed: int, finetune: Stage) -> Stage:
        def build(out: Path) -> None:
            from prsl_kernels.experiments.attacks.run import attack

            record = read_json(self.models / finetune.name / "arm.json")
            attack(
                self.models / finetune.name,
                self.dataset(task, config.data.attacked),
                config.attack,
                out,
                task=task,
                arm=arm.name,
                seed=seed,
                device=self.device,
                base_path=config.base,
                defence=(arm, float(record["b"])),
                decoding=config.decoding,
            )

        return Stage(
            name=f"{task}/attack/{arm.name}/seed-{seed}",
            kind="attack",
            depends=self._attacked(task, config),
            sources=("experiments/attacks", "experiments/models", "experiments/data"),
            build=build,
            needs=(finetune,),
            task=task,
            arm=arm.name,
            seed=seed,
        )

    def _attacked(self, task: Task, config: TaskConfig) -> dict[str, Any]:
        """What the results of an attack and of a transfer depend on, beside the models."""
        return {
            "attack": as_dict(config.attack),
            "decoding": as_dict(config.decoding),
            "data": self.dataset(task, config.data.attacked).fingerprint,
        }

    def _transfer(self, task: Task, config: TaskConfig, arm: str, seed: int, attacks: dict[str, Stage]) -> Stage:
        def build(out: Path) -> None:
            from prsl_kernels.experiments.attacks.transfer import transfer

            transfer(
                self.models / f"{task}/finetune/{arm}/seed-{seed}",
                {
                    source: self.run / stage.name / "outputs.parquet"
                    for source, stage in attacks.items()
                    if source != arm
                },
                self.dataset(task, config.data.attacked),
                config.attack,
                out,
                task=task,
                arm=arm,
                seed=seed,
                device=self.device,
                decoding=config.decoding,
            )

        return Stage(
            name=f"{task}/transfer/{arm}/seed-{seed}",
            kind="transfer",
            depends=self._attacked(task, config),
            sources=("experiments/attacks", "experiments/models", "experiments/data"),
            build=build,
            needs=tuple(attacks.values()),
            task=task,
            arm=arm,
            seed=seed,
        )

    def _evaluate(self, task: Task, config: TaskConfig, outputs: list[Stage]) -> Stage:
        def build(out: Path) -> None:
            from prsl_kernels.experiments.metrics.evaluate import evaluate

            tables = [self.run / stage.name / "outputs.parquet" for stage in outputs]
            evaluate(tables, out, config.evaluate, primary_score=config.primary.score, device=self.device)

        return Stage(
            name=f"{task}/evaluate",
            kind="evaluate",
            depends={"evaluate": as_dict(config.evaluate), "score": config.primary.score},
            sources=("experiments/metrics",),
            build=build,
            needs=tuple(outputs),
            task=task,
        )

    def _report(self, scored: list[Stage]) -> Stage:
        def build(run: Path) -> Iterable[Path]:
            from prsl_kernels.experiments.report import build_report, headline, report_files

            build_report(run, recipe=as_dict(self.recipe))
            write_text(run / HEADLINE, "\n".join(headline(run)) + "\n")
            return [run / HEADLINE, *report_files(run)]

        return Stage(
            name="report",
            kind="report",
            depends={"recipe": as_dict(self.recipe)},
            sources=("experiments/report",),
            build=build,
            needs=tuple(scored),
            in_place=True,
        )

    def further(self) -> list[Experiment]:
        """The same arms on each of the further test sets, in `run/tests/<name>`; tasks without that set drop out."""
        found = []
        for name in dict.fromkeys(name for config in self.recipe.tasks.values() for name in config.tests):
            tasks = {
                task: replace(config, data=replace(config.tests[name], attacked="test"), tests={})
                for task, config in self.recipe.tasks.items()
                if name in config.tests
            }
            recipe = replace(self.recipe, name=f"{self.recipe.name}-on-{name}"[:64], tasks=tasks, grid=None, sweep=None)
            found.append(Experiment(recipe, self.run / TESTS / name, self.device, self))
        return found

    def borrow(self) -> None:
        """Puts what the report says of the training beside the results on a further test set; not the models."""
        for stage in self.finetuned.values() if ranks.is_main() else ():
            for name in ("arm.json", "train.jsonl", "preprocessor_config.json"):
                source = self.models / stage.name / name
                if stage.task in self.recipe.tasks and source.is_file():
                    write_text(self.run / stage.name / name, source.read_text(encoding="utf-8"))

    def check(self, *, tests: bool = True) -> None:
        """Refuses at once what a stage would refuse after hours: bases of another task, damaged, or too small for a k.

        The same holds for data, and with `tests` for that of the further test sets: all of it is read once.

        Raises:
            UserError: the message names the key of the recipe.
        """
        from prsl_kernels.experiments.attacks.plans import plans
        from prsl_kernels.experiments.metrics.evaluate import check_encoders, check_primary_score
        from prsl_kernels.experiments.models.loading import inspect, resolve
        from prsl_kernels.experiments.models.preprocessing import Preprocessing

        for task, config in self.recipe.tasks.items():
            found, vocabulary = inspect(config.base)
            if found != task:
                raise UserError(f"tasks.{task}.base: {config.base!r} is a model for {found}, not for {task}")
            try:
                plans(config.attack, Preprocessing.read(resolve(config.base), 1).std)  # of any size
            except UserError as error:
                raise UserError(f"tasks.{task}.attack: {error}") from None
            check_primary_score(task, config.evaluate, config.primary.score)
            check_encoders(config.evaluate)
            for arm in self.recipe.arms_of(task):
                if arm.b != 0 and arm.loss != "drsl" and arm.k >= vocabulary:
                    raise UserError(
                        f"arms.{arm.name}.k is {arm.k}; the vocabulary of tasks.{task}.base allows 1 to "
                        f"{vocabulary - 1}"
                    )
        for experiment in (self, *(self.further() if tests else ())):
            for task, config in experiment.recipe.tasks.items():
                for split in dict.fromkeys(("train", "select", config.data.attacked)):
                    try:
                        experiment.dataset(task, split)
                    except UserError as error:
                        key = "data" if experiment is self else f"tests.{experiment.run.name}"
                        raise UserError(f"tasks.{task}.{key}: {error}") from None

    def check_training(self, task: Task) -> None:
        """As `check`, of the task's fine-tuning: losses that micro-batches allow, ranks that share a step, packages."""
        from prsl_kernels.experiments.training.baselines import check_loss

        config = self.recipe.tasks[task].finetune
        for arm in self.recipe.arms_of(task):
            check_loss(arm, config)
        if config.trainable == "lora" and find_spec("peft") is None:
            raise UserError(
                f"tasks.{task}.finetune.trainable: lora needs PEFT, which is not installed; run "
                "`pip install 'prsl_kernels[lora]'`"
            )
        ranks.micro_batches(config.gradient_accumulation, f"tasks.{task}.finetune.gradient_accumulation")
        if config.report_to:
            from prsl_kernels.experiments.training.trainer import check_trackers

            check_trackers(config, f"tasks.{task}.finetune.report_to")

    def describe(self) -> dict[str, Any]:
        """What the report says of the machine, the software and the data: the content of `run.json`."""
        packages = ("prsl_kernels", "torch", "transformers", "numpy", "scipy", "bert-score", "pycocoevalcap")
        datasets = {}
        for task in self.recipe.tasks:
            attacked = self.recipe.tasks[task].data.attacked
            splits = {split: self.dataset(task, split) for split in dict.fromkeys(("train", "select", attacked))}
            test = splits[attacked]
            datasets[task] = {
                "name": test.name,
                "license": test.license,
                "attribution": test.attribution,
                "fingerprint": test.fingerprint,
                "sizes": {split: len(dataset.examples) for split, dataset in splits.items()},
            }
        return {
            "name": self.recipe.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, device {self.device}",
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in packages},
            },
            "datasets": datasets,
        }


@ranks.together()
def run_experiment(
    recipe: Recipe,
    run: Path,
    *,
    device: str,
    until: str = "report",
    task: Task | None = None,
    only: Callable[[Stage], bool] = lambda stage: True,
) -> Experiment:
    """Brings every stage up to the kind `until` up to date, skipping what is fresh.

    Several processes may work in one directory, each on a task or an arm of its own.

    Args:
        recipe: the validated recipe; its resolved form is saved as `run/recipe.yaml`.
        run: the run directory.
        device: "cpu", "cuda", ...
        until: the last kind of stage to run.
        task: stages of this task alone; None is all tasks.
        only: which stages of the kind `until`; the stages that these need run as well.

    A recipe with a grid has that run first in `run/grid`, for the task that is asked for; see `study`. Under several
    ranks (see `ranks`) all of them make the call; rank 0 decides what is to be done. On further test sets
    (`TaskConfig.tests`) the same arms are attacked afterwards, each in a run directory `run/tests/<name>`.
    """
    if task is not None and task not in recipe.tasks:
        raise UserError(f"--task {task!r}: the recipe has {', '.join(recipe.tasks)}; choose one of them")
    declared = recipe
    if task is not None:
        recipe = replace(recipe, tasks={task: recipe.tasks[task]})
    if recipe.grid is not None:
        from prsl_kernels.experiments import study

        Experiment(recipe, run, device).check(tests=until != "finetune")  # before the grid, not hours later
        run_experiment(study.grid_recipe(recipe), run / study.GRID, device=device, until="evaluate", task=task)
        recipe = study.confirmed_recipe(recipe, run)
    experiment = Experiment(recipe, run, ranks.device(device))
    _bring_up_to_date(experiment, recipe if task is None else declared, until, only, whole=task is None)
    if until != "finetune":
        for further in experiment.further():
            say(f"on {further.run.name}:")
            further.borrow()
            _bring_up_to_date(further, further.recipe, until, only, whole=task is None)
    return experiment


def _bring_up_to_date(
    experiment: Experiment, declared: Recipe, until: str, only: Callable[[Stage], bool], *, whole: bool
) -> None:
    """Runs what is not fresh of the stages up to `until`; `declared` is saved as the run's recipe."""
    run = experiment.run
    with ranks.main_first():
        experiment.stages  # noqa: B018 (which reads the data)
    wanted = _with_needs([stage for stage in experiment.stages if stage.kind == until and only(stage)])
    if not wanted:
        raise UserError("no stage of the recipe matches the given arm and seed; `prsl run` shows them")
    stages = [stage for stage in experiment.stages if stage.name in wanted]
    with locked(run, stages) if ranks.is_main() else nullcontext():
        fresh: dict[str, bool] = {}
        if ranks.is_main():
            fresh = {stage.name: is_fresh(run, stage) for stage in stages}
            # Before anything is written: a refused recipe must not replace the one of the results.
            for name in {stage.task for stage in stages if stage.kind == "finetune" and not fresh[stage.name]}:
                experiment.check_training(name)  # type: ignore[arg-type]
            if not all(fresh.values()):
                experiment.check(tests=until != "finetune")
            write_text(run / "recipe.yaml", save_recipe(declared))
            if whole:
                write_json(run / "run.json", experiment.describe())
        fresh = ranks.share(fresh)
        started = time.monotonic()
        for number, stage in enumerate(stages, 1):
            place = f"[{number:>2}/{len(stages)}] {stage.name}"
            if fresh[stage.name]:
                say(f"{place}: up to date")
                continue
            say(f"{place} ...")
            begun = time.monotonic()
            try:
                execute(run, stage)
            except Exception as error:
                # Libraries in other languages wrap a full disk into exceptions of their own, or lose the reason.
                if "No space left" in str(error) or shutil.disk_usage(run).free < _FULL:
                    raise OSError(errno.ENOSPC, "No space left on device", str(run)) from error
                raise
            now = time.monotonic()
            say(f"{place}: {now - begun:.1f} s ({(now - started) / 60:.1f} min in all)")


def whole_run(folder: Path) -> Path | None:
    """The run of whose further test sets `folder` is one; None where it belongs to none."""
    folder = folder.resolve()
    if folder.parent.name != TESTS:
        return None
    whole = folder.parents[1]
    return whole if (whole / "recipe.yaml").is_file() and (whole / "stages").is_dir() else None


def _with_needs(stages: Iterable[Stage]) -> set[str]:
    names: set[str] = set()
    for stage in stages:
        names |= {stage.name} | _with_needs(stage.needs)
    return names
