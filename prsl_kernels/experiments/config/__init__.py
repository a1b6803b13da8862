"""The typed configuration of an experiment: dataclasses, read from YAML recipes, overridden by flags.

A recipe is hostile input: it is read with YAML's safe loader, unknown keys and values out of range are refused with
their place in the file, and nothing in it is ever executed. Validation is pydantic's: well kept, typed, and its
errors carry the path of the offending key.
"""

from prsl_kernels.experiments.config.attack import (
    RESERVED,
    AttackConfig,
    Control,
    ExtraAttack,
    Method,
    Norm,
    Objective,
    Role,
    Rounds,
    SurfaceConfig,
    TransferConfig,
)
from prsl_kernels.experiments.config.loading import as_dict, load_recipe, recipe_names, save_recipe
from prsl_kernels.experiments.config.recipe import (
    METRICS,
    EncoderConfig,
    EvaluateConfig,
    GridConfig,
    Metric,
    PrimaryConfig,
    Recipe,
    ResourcesConfig,
    StageKind,
    SweepConfig,
    TaskConfig,
)
from prsl_kernels.experiments.config.training import ArmConfig, DataConfig, DecodingConfig, FinetuneConfig
from prsl_kernels.experiments.config.types import TASKS, Task

__all__ = [
    "METRICS",
    "RESERVED",
    "TASKS",
    "ArmConfig",
    "AttackConfig",
    "Control",
    "DataConfig",
    "DecodingConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "ExtraAttack",
    "FinetuneConfig",
    "GridConfig",
    "Method",
    "Metric",
    "Norm",
    "Objective",
    "PrimaryConfig",
    "Recipe",
    "ResourcesConfig",
    "Role",
    "Rounds",
    "StageKind",
    "SurfaceConfig",
    "SweepConfig",
    "Task",
    "TaskConfig",
    "TransferConfig",
    "as_dict",
    "load_recipe",
    "recipe_names",
    "save_recipe",
]
