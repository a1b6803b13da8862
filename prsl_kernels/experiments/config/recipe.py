"""A whole experiment: tasks, arms, seeds, and what is declared before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from prsl_kernels.experiments.config.attack import AttackConfig, Rounds, check_rounds
from prsl_kernels.experiments.config.training import ArmConfig, DataConfig, DecodingConfig, FinetuneConfig
from prsl_kernels.experiments.config.types import STRICT, Count, Name, NonNegative, Positive, Task

Metric = Literal["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor", "bertscore_f1"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A text encoder: its folder or Hub id, and its layer, which may be left out where bert-score knows the best."""

    folder: str
    num_layers: Count | None = None


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Scores and the encoder behind BERTScore: None is the packaged MiniLM, else a local folder and its layer.

    Where BERTScore is among the metrics, each of `encoders` gives one more, `bertscore_f1_<name>`.
    """

    metrics: tuple[Metric, ...] = METRICS
    encoder: str | None = None
    num_layers: Count | None = None
    encoders: dict[Name, EncoderConfig] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class PrimaryConfig:
    """The one endpoint declared before the run; every other comparison is exploratory.

    `attack` is "worst", for each image the lowest score over all attacks of the role "ensemble" at their last round,
    or the name of one attack, at its recorded `round` (None: the last).
    """

    score: Literal[
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "rouge_l",
        "cider",
        "meteor",
        "bertscore_f1",
        "exact_match",
        "vqa_accuracy",
    ]
    attack: Name = "worst"
    round: Count | None = None


@dataclass(frozen=True, config=STRICT)
class TaskConfig:
    """Everything of one task.

    `base` is a shipped base's name ("captions", "vqa"), a local model folder, or a Hub id ("owner/name", with
    "@revision" where that is not main), which has to be on disk already. `tests` are further data sets on which the
    fine-tuned arms are attacked, each with a report of its own in `<run>/tests/<name>`.
    """

    data: DataConfig
    base: str
    finetune: FinetuneConfig
    attack: AttackConfig
    primary: PrimaryConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    decoding: DecodingConfig = DecodingConfig()
    tests: dict[Name, DataConfig] = field(default_factory=dict)
    arms: tuple[Name, ...] | None = None  # those of the recipe's arms that this task has; None is all of them


@dataclass(frozen=True, config=STRICT)
class GridConfig:
    """A first look, on the selection split, from which each task takes further arms.

    Fine-tunes, with one seed, the recipe's own arms, one of PRSL for every combination of `space`, `k` and `b`, and
    `arms`; attacks them with the primary attack alone, at `rounds`; and takes of each family (PRSL in each space, and
    the others together) the arm with the highest attacked primary score among those whose clean one is at most
    `clean_tolerance` below cross entropy's; with `each_k`, every k of PRSL is a family of its own. The rule is fixed
    here, before the run, and never sees the test split.
    """

    space: tuple[Literal["prob", "log_prob"], ...]
    k: tuple[Count, ...]
    b: tuple[Positive, ...]
    arms: tuple[ArmConfig, ...] = ()
    rounds: Rounds = (20,)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    clean_tolerance: NonNegative = 0.02
    each_k: bool = False

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        names = [arm.name for arm in self.candidates]
        if not names:
            raise ValueError("grid: names no arm; give space, k and b at least one value each, or arms")
        if len(set(names)) != len(names):
            raise ValueError(f"grid: arm names must differ: {names}")
        for arm in self.candidates:
            if arm.is_cross_entropy:
                raise ValueError(f"grid: arm {arm.name!r} is cross entropy, which belongs to the recipe's own arms")

    @property
    def candidates(self) -> tuple[ArmConfig, ...]:
        """All arms that the grid adds to the recipe's own."""
        return (*prsl_arms(self.space, self.k, self.b), *self.arms)


@dataclass(frozen=True, config=STRICT)
class SweepConfig:
    """Arms of PRSL for every combination of `space`, `k` and `b`, beside those that the recipe names."""

    k: tuple[Count, ...]
    b: tuple[Positive, ...]
    space: tuple[Literal["prob", "log_prob"], ...] = ("prob",)

    @property
    def arms(self) -> tuple[ArmConfig, ...]:
        """The combinations, in the order in which they are written."""
        return prsl_arms(self.space, self.k, self.b)


def prsl_arms(spaces: Iterable[str], ks: Iterable[int], bs: Iterable[float]) -> tuple[ArmConfig, ...]:
    """An arm for each combination, named after it."""
    return tuple(
        ArmConfig(f"prsl-{_SHORT[space]}-k{k}-b{b:g}", k=k, b=b, space=space)  # type: ignore[arg-type]
        for space, k, b in itertools.product(spaces, ks, bs)
    )


_SHORT = {"prob": "prob", "log_prob": "logprob"}


StageKind = Literal["finetune", "attack", "transfer", "evaluate", "report"]


@dataclass(frozen=True, config=STRICT)
class ResourcesConfig:
    """What one stage needs while it runs, for a scheduler: cores, GPUs (a fraction shares one), and GiB of memory.

    `gpus` is by default one where the run's device is a GPU. A stage that fails for a reason outside of it (a worker
    that died) is tried again `retries` times.
    """

    cpus: NonNegative = 1.0
    gpus: NonNegative | None = None
    memory_gib: Positive | None = None
    retries: Annotated[int, Field(ge=0)] = 2


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """An experiment: tasks x arms x seeds.

    With a `grid`, each task has further arms, which that names first; with a `sweep`, all of its combinations are
    arms. `resources` are what a stage of a kind needs where a scheduler starts it.
    """

    name: Name
    tasks: dict[Task, TaskConfig]
    arms: tuple[ArmConfig, ...]
    description: str = ""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = (0,)
    grid: GridConfig | None = None
    sweep: SweepConfig | None = None
    resources: dict[StageKind, ResourcesConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must differ: {names}")
        # A saved recipe holds the arms that its grid has named, or those of its sweep, as they are there
        candidates = {} if self.grid is None else {arm.name: arm for arm in self.grid.candidates}
        candidates |= {} if self.sweep is None else {arm.name: arm for arm in self.sweep.arms}
        for arm in self.arms:
            if candidates.get(arm.name, arm) != arm:
                raise ValueError(
                    f"arm {arm.name!r}: the grid or the sweep has another arm of this name; rename one of them"
                )
        if not any(arm.is_cross_entropy for arm in self.arms):
            raise ValueError("one arm must be cross entropy (b: 0): every comparison is made against it")
        if not self.tasks:
            raise ValueError("at least one task is needed")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different and at least one: {list(self.seeds)}")
        for name, task in self.tasks.items():
            _check_task(name, task, self.arms)

    def arms_of(self, task: Task) -> tuple[ArmConfig, ...]:
        """The arms that a task has, in the recipe's order."""
        wanted = self.tasks[task].arms
        return tuple(arm for arm in self.arms if wanted is None or arm.name in wanted)


def _check_task(name: str, task: TaskConfig, arms: tuple[ArmConfig, ...]) -> None:
    rounds: dict[str, Rounds] = {str(task.attack.method): task.attack.rounds}
    for attack in task.attack.extra:
        rounds[attack.name] = attack.rounds or ((1,) if attack.method == "fgsm" else task.attack.rounds[-1:])
    primary = task.primary
    if any(attack.name == primary.attack and attack.role != "ensemble" for attack in task.attack.extra):
        raise ValueError(
            f"tasks.{name}.primary.attack {primary.attack!r} must be one of role ensemble: on all images, within the "
            "primary budget"
        )
    if primary.attack == "worst":
        if primary.round is not None:
            raise ValueError(
                f"tasks.{name}.primary.round: the worst case has no round; leave it out, or name an attack"
            )
    elif primary.attack not in rounds:
        raise ValueError(f"tasks.{name}.primary.attack {primary.attack!r} is not among worst, {', '.join(rounds)}")
    elif primary.round is not None and primary.round not in rounds[primary.attack]:
        raise ValueError(
            f"tasks.{name}.primary.round {primary.round} is not among the recorded rounds "
            f"{list(rounds[primary.attack])}"
        )
    if task.arms is not None:
        unknown = [arm for arm in task.arms if arm not in {known.name for known in arms}]
        if unknown:
            raise ValueError(f"tasks.{name}.arms: {', '.join(unknown)} are not among the recipe's arms")
        if not any(arm.is_cross_entropy for arm in arms if arm.name in task.arms):
            raise ValueError(f"tasks.{name}.arms: cross entropy (b: 0) must be one of them")
