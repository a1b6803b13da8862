"""The typed configuration of an experiment: dataclasses, read from YAML recipes, overridden by flags.

A recipe is hostile input: it is read with YAML's safe loader, unknown keys and values out of range are refused with
their place in the file, and nothing in it is ever executed. Validation is pydantic's: well kept, typed, and its
errors carry the path of the offending key.
"""

from __future__ import annotations

import itertools
import math
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from prsl_kernels.experiments.errors import UserError

Task = Literal["captions", "vqa"]
TASKS: tuple[Task, ...] = get_args(Task)

_STRICT = ConfigDict(extra="forbid")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # becomes a folder name: no separators, nothing hidden


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Name = Annotated[str, Field(pattern=_NAME)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which images and texts: `name` is an embedded set ("openmoji", "easy-vqa") or the path of a manifest.

    The limits take a seeded random subset of a split; None takes all of it. `attacked` is the split whose images are
    attacked: "test", or "select" for the grid from which hyper-parameters are chosen.
    """

    name: str
    train_limit: Count | None = None
    select_limit: Count | None = None
    test_limit: Count | None = None
    attacked: Literal["test", "select"] = "test"


@dataclass(frozen=True, config=_STRICT)
class ArmConfig:
    """One arm: the loss that a copy of the base checkpoint is fine-tuned with.

    `loss` is PRSL, or a penalty that others have put in its place ("drsl", "released"); see `training.baselines`.
    Exactly one of `b` and `gradient_ratio` is given: the weight itself, or the ratio of the norms of the two
    gradients (penalty over cross entropy) at the base checkpoint, from which the weight is found. `b: 0` is cross
    entropy, which may have `label_smoothing`, or its logits divided by a `temperature`.
    """

    name: Name
    loss: Literal["prsl", "drsl", "released"] = "prsl"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Positive = 1.0
    k: Count = 20
    b: Annotated[float, AfterValidator(_finite)] | None = None
    space: Literal["prob", "log_prob"] = "prob"
    distance: Literal["l2", "l1"] = "l2"
    gradient_ratio: Positive | None = None
    note: str = ""  # shown beside the arm in the report

    def __post_init__(self) -> None:
        if (self.b is None) == (self.gradient_ratio is None):
            raise ValueError(f"arm {self.name!r} needs exactly one of b and gradient_ratio")
        if self.loss != "prsl" and (self.space, self.distance) != ("prob", "l2"):
            raise ValueError(f"arm {self.name!r}: space and distance belong to the loss prsl, not to {self.loss}")
        if (self.label_smoothing, self.temperature) != (0.0, 1.0) and self.b != 0:
            raise ValueError(f"arm {self.name!r}: label_smoothing and temperature are for cross entropy; set b: 0")

    @property
    def is_cross_entropy(self) -> bool:
        """Plain cross entropy, which every other arm is compared with."""
        return self.b == 0 and self.label_smoothing == 0 and self.temperature == 1


@dataclass(frozen=True, config=_STRICT)
class FinetuneConfig:
    """Optimisation that every arm of a task shares. Learning rate: linear warm-up, then linear decay to zero."""

    steps: Count
    learning_rate: Positive
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    evaluate_every: Count = 50
    log_every: Count = 10
    calibration_batches: Count = 4
    bf16: bool = False


Method = Literal["fgsm", "bim", "pgd", "mi-fgsm", "apgd", "square"]
Objective = Literal["ce", "margin", "margin-max", "dlr", "ce+bd", "ce-bd", "target"]
Role = Literal["ensemble", "query", "eps", "unbounded", "probe"]
Norm = Literal["linf", "l2"]
Control = Literal["zero-step", "random-sign", "gaussian", "jpeg", "blank"]
Rounds = tuple[Annotated[int, Field(ge=0)], ...]
RESERVED = (*get_args(Control), "worst", "none")  # names of rows that no recipe may give to an attack


@dataclass(frozen=True, config=_STRICT)
class ExtraAttack:
    """One more attack beside the primary one; what it leaves out (None) it has from there.

    `role` says what its rows are evidence for: "ensemble" attacks, on all images within the primary budget, are those
    over which the worst case is taken; "query" uses no gradient; "eps" is a point of the sweep over budgets;
    "unbounded" has to bring the score to its floor; a "probe" is shown and counts for nothing else.

    `objective`: cross entropy of the reference (`ce`), with the arm's own penalty added or taken off (`ce+bd`,
    `ce-bd`), the margin of the best wrong token's logit as mean or maximum over the reference's tokens, the
    difference-of-logits ratio, or minus the cross entropy of another image's text (`target`). `reference` "secondary"
    attacks what the arm itself says of the clean image. With `stop_above` an image is left alone once its objective
    exceeds that. `images` takes the first so many of the split. One round is one gradient, or one query of Square;
    `restarts` go on counting where the run before them ended.
    """

    name: Name
    method: Method = "bim"
    role: Role = "ensemble"
    objective: Objective = "ce"
    reference: Literal["primary", "secondary"] = "primary"
    norm: Norm = "linf"
    eps: NonNegative | None = None
    step: NonNegative | None = None
    rounds: Rounds | None = None
    restarts: Count = 1
    images: Count | None = None
    stop_above: Annotated[float, AfterValidator(_finite)] | None = None

    def __post_init__(self) -> None:
        if self.name in RESERVED or self.name.startswith("transfer"):
            raise ValueError(f"attack name {self.name!r} is reserved; choose another")
        if self.rounds is not None:
            _check_rounds(self.rounds)
        if self.role == "query" and self.method != "square":
            raise ValueError(f"attack {self.name!r}: role query is for attacks without gradients; set method: square")
        if self.role in ("eps", "unbounded") and (self.eps is None or self.norm != "linf"):
            raise ValueError(
                f"attack {self.name!r}: role {self.role} needs an eps of its own, in the primary attack's norm, linf"
            )
        if self.role == "ensemble" and (self.eps, self.norm, self.images) != (None, "linf", None):
            raise ValueError(
                f"attack {self.name!r}: the worst case is taken over attacks on all images within the primary budget; "
                "leave out eps, norm and images, or give it another role"
            )


@dataclass(frozen=True, config=_STRICT)
class TransferConfig:
    """Images that `attack` made on each arm, shown to every other arm: the first `images` of the split."""

    attack: Name
    images: Count = 64


@dataclass(frozen=True, config=_STRICT)
class SurfaceConfig:
    """The objective over a square of +-eps around the first `images` images, on `points` x `points` places.

    One axis is the sign of the gradient at the clean image, the other random signs.
    """

    images: Count = 8
    points: Annotated[int, Field(ge=3, le=101)] = 11


@dataclass(frozen=True, config=_STRICT)
class AttackConfig:
    """The primary attack on the images, and the others. `eps` and `step` are in `units`.

    Units are "pixels255" (of 255), "pixels" (of 1), "normalized". `rounds` are the rounds whose outputs are recorded;
    0 is the clean image and always recorded. `keep_images` examples, a seeded sample, have their images of all
    recorded rounds kept as PNG. In `dtype` the attacked model computes; images are float32.
    """

    eps: NonNegative
    step: NonNegative
    rounds: Rounds
    units: Literal["pixels255", "pixels", "normalized"] = "pixels255"
    method: Literal["bim"] = "bim"
    objective: Literal["ce"] = "ce"
    controls: tuple[Control, ...] = ("zero-step", "random-sign", "gaussian", "jpeg", "blank")
    batch_size: Count = 64
    keep_images: Annotated[int, Field(ge=0)] = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    extra: tuple[ExtraAttack, ...] = ()
    transfer: TransferConfig | None = None
    surface: SurfaceConfig | None = None

    def __post_init__(self) -> None:
        _check_rounds(self.rounds)
        names = [self.method, *(attack.name for attack in self.extra)]
        if len(set(names)) != len(names):
            raise ValueError(f"attack names must differ: {names}")
        if self.transfer is not None and self.transfer.attack not in names:
            raise ValueError(f"transfer.attack {self.transfer.attack!r} is not among the attacks {names}")


def _check_rounds(rounds: Rounds) -> None:
    if list(rounds) != sorted(set(rounds)) or not rounds or rounds[-1] == 0:
        raise ValueError(f"rounds must ascend without repetition and end above 0, not {list(rounds)}")


Metric = Literal["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor", "bertscore_f1"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, config=_STRICT)
class EvaluateConfig:
    """Scores and the encoder behind BERTScore: None is the packaged MiniLM, else a local folder and its layer."""

    metrics: tuple[Metric, ...] = METRICS
    encoder: str | None = None
    num_layers: Count | None = None


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class TaskConfig:
    """Everything of one task. `base` is a shipped base's name ("captions", "vqa") or a local model folder."""

    data: DataConfig
    base: str
    finetune: FinetuneConfig
    attack: AttackConfig
    primary: PrimaryConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    arms: tuple[Name, ...] | None = None  # those of the recipe's arms that this task has; None is all of them


@dataclass(frozen=True, config=_STRICT)
class GridConfig:
    """A first look, on the selection split, from which each task takes further arms.

    Fine-tunes, with one seed, the recipe's own arms, one of PRSL for every combination of `space`, `k` and `b`, and
    `arms`; attacks them with the primary attack alone, at `rounds`; and takes of each family (PRSL in each space, and
    the others together) the arm with the highest attacked primary score among those whose clean one is at most
    `clean_tolerance` below cross entropy's. The rule is fixed here, before the run, and never sees the test split.
    """

    space: tuple[Literal["prob", "log_prob"], ...]
    k: tuple[Count, ...]
    b: tuple[Positive, ...]
    arms: tuple[ArmConfig, ...] = ()
    rounds: Rounds = (20,)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    clean_tolerance: NonNegative = 0.02

    def __post_init__(self) -> None:
        _check_rounds(self.rounds)
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
        product = itertools.product(self.space, self.k, self.b)
        made = [ArmConfig(f"prsl-{_SHORT[space]}-k{k}-b{b:g}", k=k, b=b, space=space) for space, k, b in product]
        return (*made, *self.arms)


_SHORT = {"prob": "prob", "log_prob": "logprob"}


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """An experiment: tasks x arms x seeds; with a `grid`, each task has further arms, which that names first."""

    name: Name
    tasks: dict[Task, TaskConfig]
    arms: tuple[ArmConfig, ...]
    description: str = ""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = (0,)
    grid: GridConfig | None = None

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must differ: {names}")
        # A saved recipe holds the arms that its grid has named, as they are there
        candidates = {} if self.grid is None else {arm.name: arm for arm in self.grid.candidates}
        for arm in self.arms:
            if candidates.get(arm.name, arm) != arm:
                raise ValueError(f"arm {arm.name!r}: the grid has another arm of this name; rename one of them")
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


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON types, defaults included: what is saved and hashed."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("prsl_kernels.experiments") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe by its shipped name or its path, and applies overrides such as "tasks.vqa.attack.eps=4".

    Raises:
        UserError: no such recipe, not YAML, an unknown key, or a value out of range; the message names the key.
    """
    if name_or_path in recipe_names():
        source = Path(str(resources.files("prsl_kernels.experiments") / "recipes" / f"{name_or_path}.yaml"))
    else:
        source = Path(name_or_path)
    try:
        raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"recipe {name_or_path!r}: neither a file nor one of the shipped recipes ({', '.join(recipe_names())})"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"recipe {source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {source}: expected a mapping at the top, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        return TypeAdapter(Recipe).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"recipe {source}: " + _explain(error)) from None


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected KEY=VALUE, such as tasks.vqa.attack.eps=4")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part, key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} is not a mapping")


def _descend(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict) and part in node:
        if node[part] is None:
            node[part] = {}
        return node[part]
    raise UserError(f"override {key!r}: the recipe has no {part!r} there")


def _index(node: list[Any], part: str, key: str) -> int:
    """A list of named things (the arms) is indexed by name as well as by number."""
    for position, item in enumerate(node):
        if isinstance(item, dict) and item.get("name") == part:
            return position
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise UserError(f"override {key!r}: the list has no entry {part!r}")


def _explain(error: ValidationError) -> str:
    """Every complaint on a line of its own, with the key's path; remedies for the commonest."""
    lines = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = "unknown key; remove it or correct its spelling"
        elif item["type"] in ("missing", "missing_argument"):
            message = "required key is missing"
        elif item["type"] != "value_error":
            message += f" (found {item['input']!r:.80})"
        lines.append(f"{place}: {message}")
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text; `load_recipe` reads it back to an equal value."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
