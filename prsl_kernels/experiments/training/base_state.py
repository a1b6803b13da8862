"""The state of an unfinished training in one safetensors file, so that a kill at any moment costs a minute."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file

_FILE = "state.safetensors"


def save_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: str) -> None:
    """Writes parameters, buffers and the optimizer's state after `step` steps, all or nothing."""
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, value in module.state_dict().items():
        if value.data_ptr() not in stored:  # tied weights once; loading one of them sets both
            tensors[f"module.{name}"] = value.contiguous()
            stored.add(value.data_ptr())
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{index}.{key}"] = value.contiguous()
    with atomic_file(folder / _FILE) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "settings": settings})


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: str) -> int:
    """Restores what `save_state` wrote and returns the number of steps done; 0 where there is nothing.

    Raises:
        UserError: the file is damaged, or belongs to a training with other settings.
    """
    file = folder / _FILE
    if not file.is_file():
        return 0
    remedy = f"delete the folder {folder} to begin anew"
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); {remedy}") from None
    if metadata.get("settings") != settings:
        raise UserError(
            f"{file}: belongs to a training with other settings ({metadata.get('settings')} instead of {settings}); "
            f"use the same ones, or {remedy}"
        )
    state = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    module.load_state_dict(state, strict=False)
    for index, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer.{index}."
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if found:
            optimizer.state[parameter] = found
    return int(metadata["step"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
