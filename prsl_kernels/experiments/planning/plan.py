"""`prsl plan`: the stages of a recipe, what is finished, and what the others will take; nothing is started or written.

What a stage takes is known from, in this order: finished stages of the same kind and task in the run directory; a few
calls of the real model, timed here, where it is small and on disk; its floating-point operations over a chip's peak.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from prsl_kernels.experiments import study
from prsl_kernels.experiments.attacks.plans import plans
from prsl_kernels.experiments.config import DataConfig, Recipe, Task, TaskConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.execution import is_fresh
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.pipeline import Experiment
from prsl_kernels.experiments.planning import sizes
from prsl_kernels.experiments.planning.data import PUBLISHED, REFERENCES, missing, size_of
from prsl_kernels.experiments.planning.gpus import UTILISATION, Chip, Modelled, find_chip, this_processor
from prsl_kernels.experiments.planning.measure import LARGEST, Measured
from prsl_kernels.experiments.planning.model import STD, Shape, find_shape
from prsl_kernels.experiments.planning.table import as_bytes
from prsl_kernels.experiments.planning.work import (
    Operation,
    Work,
    attack_work,
    evaluate_work,
    finetune_work,
    transfer_work,
)

# What was measured of the stages around the models' calls, on one core of a server of 2026: seconds
_STAGE = 0.1  # reading data, writing and hashing results
_STEP = 0.01  # the Trainer's own, per optimisation step
_WRITE = 1 / 300e6  # per byte of a checkpoint
_ROW = 0.0005  # per recorded row: rounding, norms, the table
_PNG = 0.002
_START = 8.0  # of Python and its libraries, once for each process
_SCORING, _SCORED = 6.5, 0.00012  # back ends' start; n-gram scores of one text
_NEW_TEXT = 0.0015  # METEOR, mostly, of a text that was not scored before
_PAIR = 0.003  # BERTScore of a new pair by the packaged encoder
_PAIR_ON_GPU = 0.0003  # what Python does around each pair there
_REPORT, _MODEL = 4.2, 0.18  # the page; bootstrap and figures for each arm with a seed
_REPORTED = 3.5e-6  # per score in the tables
# Share of texts that no arm, attack or round before has said of the same image, and references of an image
_NEW = {"captions": 0.1, "vqa": 0.01}
_NEW_AT_SIZE = 0.5
_SENTENCE = 16  # tokens of a caption for BERTScore, padded
# Parameters of BERTScore's encoders, the packaged one first; its time is in proportion
_PACKAGED_ENCODER = 22e6
_ENCODERS = {"t5-base": 110e6, "deberta-xlarge": 750e6, "roberta-large": 355e6}


@dataclass(frozen=True)
class Row:
    """Stages of one kind and task.

    Attributes:
        part: "" for the recipe itself, "grid", or "tests/<name>".
        task, kind: of the stages.
        number, cached: how many there are, and are finished; None where that cannot be told.
        seconds: of one of them, on average, on an idle machine.
        memory: bytes at the peak of one: of the GPU where the model is there, else of the machine.
        disk, meanwhile: bytes of one, afterwards and beside that while it runs.
        on_gpu: whether it computes on the GPU where there is one.
        basis: where `seconds` is from.
    """

    part: str
    task: str
    kind: str
    number: int
    cached: int | None
    seconds: float
    memory: float
    disk: float
    meanwhile: float
    on_gpu: bool
    basis: str

    @property
    def fills_gpu(self) -> bool:
        """Whether `memory` is the GPU's."""
        return self.on_gpu and self.kind != "evaluate"

    @property
    def left(self) -> float:
        """Seconds of those that are not finished."""
        return self.seconds * (self.number - (self.cached or 0))


@dataclass(frozen=True)
class RunPlan:
    """All rows of a recipe, the assumptions behind them, and what this machine lacks for a run."""

    recipe: str
    run: str
    device: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def total(self, *, gpu: bool, left: bool = False) -> float:
        """Hours of the stages that run on a GPU, or of the others."""
        chosen = (row for row in self.rows if row.on_gpu == gpu)
        return sum(row.left if left else row.seconds * row.number for row in chosen) / 3600

    def as_json(self) -> dict[str, Any]:
        """For programs: seconds and bytes."""
        return {
            "recipe": self.recipe,
            "run": self.run,
            "device": self.device,
            "stages": [vars(row) | {"seconds_left": row.left} for row in self.rows],
            "totals": {
                "gpu_hours": self.total(gpu=True),
                "gpu_hours_left": self.total(gpu=True, left=True),
                "cpu_hours": self.total(gpu=False),
                "cpu_hours_left": self.total(gpu=False, left=True),
                "gpu_memory": max((row.memory for row in self.rows if row.fills_gpu), default=0.0),
                "memory": max((row.memory for row in self.rows if not row.fills_gpu), default=0.0),
                "disk": sum(row.disk * row.number for row in self.rows),
                "disk_meanwhile": max(row.meanwhile for row in self.rows),
            },
            "notes": self.notes,
            "missing": self.missing,
        }


def make_plan(recipe: Recipe, run: Path, *, device: str, gpu: str | None = None) -> RunPlan:
    """Counts the stages of a recipe and estimates them.

    Args:
        recipe: the validated recipe.
        run: the run directory, which need not exist.
        device: "cpu", "cuda" or "cuda:N": of the run.
        gpu: a chip of `gpus.CHIPS`: plans for that one, whatever is here.

    Raises:
        UserError: an unknown chip, or a base whose size is not known.
    """
    planner = _Planner(recipe, run, device, None if gpu is None else find_chip(gpu))
    return planner.plan()


@dataclass
class _Part:
    """One experiment of the run: the recipe itself, its grid, or a further test set."""

    name: str
    recipe: Recipe
    run: Path
    kinds: tuple[str, ...]
    fresh: dict[str, bool] | None = None  # name of a stage -> whether it is finished; None where that is not known


class _Planner:
    def __init__(self, recipe: Recipe, run: Path, device: str, chip: Chip | None) -> None:
        self.recipe, self.run, self.device, self.chip = recipe, run, device, chip
        self.gpu = chip is not None or device.startswith("cuda")
        self.notes: list[str] = []
        self.shapes: dict[Task, tuple[Shape, Path | None]] = {}
        self.works: dict[tuple[str, Task, str], list[Work]] = {}
        self.costs: dict[Task, Measured | Modelled] = {}

    def plan(self) -> RunPlan:
        for task, config in self.recipe.tasks.items():
            self.shapes[task] = find_shape(config.base, task)
        parts = self._parts()
        for part in parts:
            for task, config in part.recipe.tasks.items():
                self._count(part, task, config)
        rows: list[Row] = []
        for part in parts:
            part.fresh = self._fresh(part)
            for task, config in part.recipe.tasks.items():
                rows += self._rows(part, task, config)
            if "report" in part.kinds:
                rows.append(self._report(part))
        where = self.chip.name if self.chip is not None else self.device
        self._check_memory(rows)
        self._note(f"{_START:.0f} s more for each process: `prsl run` is one, `prsl sweep` starts one for each stage")
        return RunPlan(
            self.recipe.name, str(self.run), where, rows, list(dict.fromkeys(self.notes)), list(missing(self.recipe))
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)

    def _parts(self) -> list[_Part]:
        """In the order in which they run."""
        found = []
        recipe = self.recipe
        if recipe.grid is not None:
            found.append(
                _Part("grid", study.grid_recipe(recipe), self.run / study.GRID, ("finetune", "attack", "evaluate"))
            )
            recipe = self._confirmed(recipe)
        self._whole = recipe
        found.append(_Part("", recipe, self.run, ("finetune", "attack", "transfer", "evaluate", "report")))
        names = dict.fromkeys(name for config in recipe.tasks.values() for name in config.tests)
        for name in names:
            tasks = {
                task: replace(config, data=config.tests[name], tests={})
                for task, config in recipe.tasks.items()
                if name in config.tests
            }
            part = replace(recipe, tasks=tasks)
            kinds = ("attack", "transfer", "evaluate", "report")
            found.append(_Part(f"tests/{name}", part, self.run / "tests" / name, kinds))
        return found

    def _confirmed(self, recipe: Recipe) -> Recipe:
        """With the arms that the grid has named, or, before it has run, with one of each family."""
        assert recipe.grid is not None
        own = study.own_arms(recipe)
        families = {study.family(arm, recipe.grid.each_k): arm.name for arm in reversed(recipe.grid.candidates)}
        tasks = {}
        for task, config in recipe.tasks.items():
            chosen: Iterable[str | None] = families.values()
            try:
                chosen = json.loads((self.run / task / study.CHOICE).read_text(encoding="utf-8"))["chosen"].values()
            except (OSError, ValueError, KeyError):
                self._note("the grid has not named its arms yet: one of each family is counted, which is the most")
            tasks[task] = replace(config, arms=(*(arm.name for arm in own), *(name for name in chosen if name)))
        named = {name for config in tasks.values() for name in config.arms or ()}
        arms = (*own, *(arm for arm in recipe.grid.candidates if arm.name in named))
        return replace(recipe, tasks=tasks, arms=arms)

    def _count(self, part: _Part, task: Task, config: TaskConfig) -> None:
        """The work of one stage of each kind; of fine-tuning, which differs between arms, of each arm's."""
        shape, folder = self.shapes[task]
        arms = part.recipe.arms_of(task)
        std = STD[task] if folder is None else Preprocessing.read(folder, shape.image_size).std
        attacks = plans(config.attack, std)
        images, known = self._images(config.data, config.data.attacked, task)
        select, _ = self._images(config.data, "select", task)
        if known != "embedded":
            self._note(f"{part.name or part.recipe.name}, {task}: {images:,} images are attacked ({known})")
        if "finetune" in part.kinds:
            self.works[part.name, task, "finetune"] = [finetune_work(arm, config.finetune, select) for arm in arms]
        # A question of the recipe's own has no answers
        referenced = config.data.name != "natural-images" and config.data.question is None
        self.works[part.name, task, "attack"] = [attack_work(attacks, config.attack, images, referenced=referenced)]
        if config.attack.transfer is not None and len(arms) > 1 and "transfer" in part.kinds:
            self.works[part.name, task, "transfer"] = [transfer_work(config.attack, images, len(arms))]
        models = len(arms) * len(part.recipe.seeds)
        scored = evaluate_work(attacks, config.attack, images, models, len(arms))
        self.works[part.name, task, "evaluate"] = [scored]

    def _images(self, data: DataConfig, split: str, task: Task) -> tuple[int, str]:
        return size_of(data, split, task)

    def _fresh(self, part: _Part) -> dict[str, bool] | None:
        """Which stages are finished; None where the data or the base that their keys depend on is not here."""
        if not (part.run / "stages").is_dir():
            return {}
        try:
            experiment = Experiment(part.recipe, part.run, self.device)
            if part.name.startswith("tests/"):
                whole = Experiment(self._whole, self.run, self.device)
                experiment = next(further for further in whole.further() if further.run == part.run)
            stages = experiment.stages
            return {stage.name: is_fresh(part.run, stage) for stage in stages}
        except UserError as error:
            self._note(f"what is cached cannot be told: {error}")
            return None

    def _rows(self, part: _Part, task: Task, config: TaskConfig) -> list[Row]:
        shape, _ = self.shapes[task]
        arms, seeds = len(part.recipe.arms_of(task)), len(part.recipe.seeds)
        train, _ = self._images(config.data, "train", task)
        select, _ = self._images(config.data, "select", task)
        images, _ = self._images(config.data, config.data.attacked, task)
        rows = []
        for kind in ("finetune", "attack", "transfer", "evaluate"):
            works = self.works.get((part.name, task, kind))
            if works is None or kind not in part.kinds:
                continue
            if kind == "finetune":
                size = sizes.finetune_size(shape, config.finetune, select, train, gpu=self.gpu)
            elif kind == "evaluate":
                size = sizes.evaluate_size(works[0])
            else:
                gradients = kind == "attack"
                size = sizes.attack_size(shape, config, images, works[0], gradients=gradients, gpu=self.gpu)
            seconds, basis = self._seconds(part, task, config, kind, works)
            number = 1 if kind == "evaluate" else arms * seeds
            cached = self._cached(part, f"{task}/{kind}")
            on_gpu = self.gpu and (kind != "evaluate" or "bertscore_f1" in config.evaluate.metrics)
            rows.append(
                Row(
                    part.name, task, kind, number, cached, seconds, size.memory, size.disk, size.meanwhile, on_gpu,
                    basis,
                )
            )  # fmt: skip
        return rows

    def _cached(self, part: _Part, prefix: str) -> int | None:
        if part.fresh is None:
            return None
        return sum(fresh for name, fresh in part.fresh.items() if name == prefix or name.startswith(f"{prefix}/"))

    def _seconds(
        self, part: _Part, task: Task, config: TaskConfig, kind: str, works: Sequence[Work]
    ) -> tuple[float, str]:
        found = None if self.chip is not None else _finished(part, f"{task}/{kind}")
        if found is not None:
            return found
        if kind == "evaluate":
            basis = "modelled" if self.gpu else "rates measured on one core"
            return self._evaluation(part, task, config, works[0]), basis
        costs = self._costs(task)
        each = [_stage_seconds(work, costs, self.shapes[task][0], config) for work in works]
        return sum(each) / len(each), costs.basis

    def _costs(self, task: Task) -> Measured | Modelled:
        """Seconds of the model's calls, measured at most once for a task."""
        if task in self.costs:
            return self.costs[task]
        shape, folder = self.shapes[task]
        config = self.recipe.tasks[task]
        if self.chip is None and folder is not None and shape.parameters < LARGEST:
            calls: Counter[tuple[Operation, int]] = Counter()
            for (_, other, kind), works in self.works.items():
                if other == task and kind in ("finetune", "attack", "transfer"):
                    for work in works:
                        calls.update(work.calls)
            try:
                self.costs[task] = Measured(config, task, self.device).measure(calls)
                return self.costs[task]
            except UserError as error:  # as a run would say, too
                self._note(f"{task}: nothing could be measured: {error}")
        chip = self._chip
        from prsl_kernels.experiments.planning import gpus

        self._note(
            f"{task}, modelled: {shape.parameters / 1e6:,.0f} M parameters ({shape.source}), {gpus.UTILISATION:.0%} of "
            f"the peak of {chip.name} ({chip.bf16 / 1e12:,.3g} TFLOP/s in bfloat16, {chip.fp32 / 1e12:,.3g} in "
            f"float32), {gpus.BANDWIDTH_UTILISATION:.0%} of its memory's {chip.bandwidth / 1e12:.3g} TB/s, texts of "
            f"{gpus.TEXT_TOKENS[task]} tokens, {1000 * gpus.IMAGE_SECONDS:.0f} ms to read an image"
        )
        if self.chip is None and not self.device.startswith("cuda"):
            self._note("modelled for this processor; give --gpu NAME to plan for a GPU")
        new = (config.decoding.max_new_tokens or shape.new_tokens) * config.decoding.num_beams
        self.costs[task] = Modelled(shape, chip, config.finetune, config.attack.dtype, new)
        return self.costs[task]

    @cached_property
    def _chip(self) -> Chip:
        return self.chip or _chip_here(self.device)

    def _check_memory(self, rows: Sequence[Row]) -> None:
        """Notes the stages that do not fit into the GPU."""
        if not self.gpu:
            return
        there = self._chip.memory
        for row in rows:
            if row.fills_gpu and row.memory > there:
                place = f"tasks.{row.task}.{'finetune' if row.kind == 'finetune' else 'attack'}.batch_size"
                more = " and raise gradient_accumulation as much" if row.kind == "finetune" else ""
                self._note(
                    f"{row.task}/{row.kind}: needs about {as_bytes(row.memory)}, and this GPU has {as_bytes(there)}; "
                    f"lower {place}{more}"
                )

    def _evaluation(self, part: _Part, task: Task, config: TaskConfig, work: Work) -> float:
        at_size = config.data.name in PUBLISHED and config.data.path != "embedded"
        new = work.scored * (_NEW_AT_SIZE if at_size else _NEW[task])
        captioned = at_size and config.data.question is None
        pairs = new * (REFERENCES.get(config.data.name, 1.0) if captioned else 1.0)
        encoders = [config.evaluate.encoder] if "bertscore_f1" in config.evaluate.metrics else []
        if encoders:
            encoders += [encoder.folder for encoder in config.evaluate.encoders.values()]
        parameters = sum(map(_encoder_size, encoders))
        each = _PAIR * parameters / _PACKAGED_ENCODER
        if self.gpu and encoders:  # both sentences of a pair, in float32
            each = _PAIR_ON_GPU + 4 * parameters * _SENTENCE / (UTILISATION * self._chip.fp32)
        self._note(
            f"{part.name or part.recipe.name}, {task}: {work.scored:,} texts are scored, of which {new:,.0f} are taken "
            f"to be new, with {pairs:,.0f} pairs for BERTScore"
        )
        return _SCORING + work.scored * _SCORED + new * _NEW_TEXT + pairs * each

    def _report(self, part: _Part) -> Row:
        models = sum(len(part.recipe.arms_of(task)) for task in part.recipe.tasks) * len(part.recipe.seeds)
        scored = sum(self.works[part.name, task, "evaluate"][0].scored for task in part.recipe.tasks)
        size = sizes.report_size(scored)
        seconds, basis = _REPORT + _MODEL * models + _REPORTED * sizes.METRICS * scored, "rates measured on one core"
        found = None if self.chip is not None else _finished(part, "report")
        if found is not None:
            seconds, basis = found
        cached = self._cached(part, "report")
        return Row(part.name, "", "report", 1, cached, seconds, size.memory, size.disk, 0.0, False, basis)


def _finished(part: _Part, prefix: str) -> tuple[float, str] | None:
    """The median of the seconds in the markers of finished stages, and how many these are."""
    seconds = []
    for file in sorted((part.run / "stages").glob(f"{prefix.replace('/', '--')}*.json")):
        name = file.stem.replace("--", "/")
        if name != prefix and not name.startswith(f"{prefix}/"):
            continue
        if part.fresh is not None and not part.fresh.get(name, False):
            continue
        try:
            seconds.append(float(json.loads(file.read_text(encoding="utf-8"))["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return (median(seconds), f"{len(seconds)} finished here") if seconds else None


def _stage_seconds(work: Work, costs: Measured | Modelled, shape: Shape, config: TaskConfig) -> float:
    """One stage: its calls, and what stands around them."""
    seconds = _STAGE + sum(
        times * costs.seconds(operation, images) for (operation, images), times in work.calls.items()
    )
    seconds += work.loads * costs.load()
    if work.saves:
        checkpoints = work.saves * sizes.checkpointed(shape, config.finetune)
        seconds += (checkpoints + sizes.written(shape, config.finetune)) * _WRITE
    seconds += _STEP * sum(times for (operation, _), times in work.calls.items() if operation == "update")
    return seconds + work.rows * _ROW + work.pngs * _PNG * (shape.image_size / 64) ** 2


def _chip_here(device: str) -> Chip:
    if not device.startswith("cuda"):
        return this_processor()
    import torch

    name = torch.cuda.get_device_name(torch.device(device))
    try:
        return find_chip(name)
    except UserError as error:
        raise UserError(f"this machine's GPU is {name!r}. {error}, with --gpu") from None


def _encoder_size(folder: str | None) -> float:
    if folder is None:
        return _PACKAGED_ENCODER
    return next((size for name, size in _ENCODERS.items() if name in folder), _ENCODERS["t5-base"])
