"""How far an attack may move a pixel, and the two projections that hold it to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from prsl_kernels.experiments.errors import UserError

Units = Literal["pixels", "pixels255", "normalized"]

LEVELS = 255  # an 8-bit channel has the values 0/255, 1/255, ..., 255/255
# Unit conversions cost an ulp or two; without this, 4/255 given in normalised units could lose its last level.
_RELATIVE_ROUNDING = 1e-12
_OFF_GRID = 1e-3  # in levels; a float32 pixel k/255 is within 2e-5 levels of k


@dataclass(frozen=True)
class Budget:
    """An L-infinity budget in [0, 1] pixels, per channel: the radius `eps` and the length `step` of one round.

    The normaliser is part of the attacked model, so one number in normalised units is another number of pixels in
    every channel whose `std` differs; that is why both are tuples, one entry a channel.
    """

    eps: tuple[float, ...]
    step: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, eps: float, step: float, units: str, *, std: Sequence[float]) -> Budget:
        """Converts a budget as a recipe gives it.

        Args:
            eps: radius of the ball, at least 0, in `units`.
            step: how far one round moves each pixel, at least 0, in `units`; 0 is the control that moves nothing.
            units: "pixels" ([0, 1]), "pixels255" (levels of 8 bits) or "normalized" (what the model sees after
                subtracting its mean and dividing by its standard deviation).
            std: the standard deviation of the model's normaliser, one number a channel, in [0, 1] pixels.

        Raises:
            UserError: on another unit, a negative or non-finite number, an eps beyond the whole pixel range (which
                is nearly always a mistaken unit), or a step longer than the ball is wide.
        """
        if units not in get_args(Units):
            raise UserError(f"attack units {units!r} are unknown; give one of {', '.join(get_args(Units))}")
        for name, value in (("eps", eps), ("step", step)):
            if not math.isfinite(value) or value < 0:
                raise UserError(f"attack {name} is {value!r}; give a finite number of at least 0 (in {units})")
        if not std or any(not math.isfinite(deviation) or deviation <= 0 for deviation in std):
            raise UserError(f"the model's image_std is {tuple(std)!r}; it must hold positive numbers, one a channel")
        if units == "normalized":
            scales = tuple(std)
        else:
            scales = (1.0 / LEVELS if units == "pixels255" else 1.0,) * len(std)
        budget = cls(
            # k / 255 and not k * (1 / 255): only the division is the float nearest to level k.
            eps=tuple(eps / LEVELS if units == "pixels255" else eps * scale for scale in scales),
            step=tuple(step / LEVELS if units == "pixels255" else step * scale for scale in scales),
            std=tuple(std),
        )
        if max(budget.eps) > 1:
            raise UserError(
                f"attack eps is {eps:g} in {units}, which is {max(budget.eps) * LEVELS:g}/255 and more than the whole "
                "pixel range; is the unit the one you meant (pixels255: 8, pixels: 0.0314)?"
            )
        if eps > 0 and step > 2 * eps:
            raise UserError(
                f"attack step is {step:g} in {units}, longer than the ball of eps {eps:g} is wide; "
                f"give at most {2 * eps:g}"
            )
        return budget

    def without_step(self) -> Budget:
        """The same ball with a step of 0."""
        return replace(self, step=(0.0,) * len(self.step))

    @property
    def eps_levels(self) -> tuple[int, ...]:
        """The largest whole number of 8-bit levels inside eps, per channel: what a saved image may differ by."""
        return tuple(math.floor(eps * LEVELS * (1 + _RELATIVE_ROUNDING)) for eps in self.eps)

    def describe(self) -> str:
        """Norm, eps and step in pixels and in normalised units, and what 8-bit images keep of eps; one line."""
        normalised_eps = [eps / std for eps, std in zip(self.eps, self.std, strict=True)]
        normalised_step = [step / std for step, std in zip(self.step, self.std, strict=True)]
        return (
            f"L-inf, eps {_levels(self.eps)} = {_numbers(self.eps)} of the pixel range = "
            f"{_numbers(normalised_eps)} normalised, step {_levels(self.step)} = {_numbers(self.step)} of the pixel "
            f"range = {_numbers(normalised_step)} normalised (std {_numbers(self.std)}); "
            f"recorded 8-bit images stay within {_levels([level / LEVELS for level in self.eps_levels])}"
        )


def _levels(values: Sequence[float]) -> str:
    return _numbers([value * LEVELS for value in values]) + "/255"


def _numbers(values: Sequence[float]) -> str:
    """Numbers to five significant digits, only one where all channels agree: "0.25" or "68.493, 66.632, 70.303"."""
    shown = [f"{value:.5g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else "(" + ", ".join(shown) + ")"


def per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """`values`, one a channel of `images` (N, C, H, W), as (C, 1, 1) of their dtype and device."""
    if images.dim() != 4 or images.shape[1] != len(values):
        raise ValueError(
            f"images must be (N, {len(values)}, H, W), as the budget has {len(values)} channels; "
            f"got {tuple(images.shape)}"
        )
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)


def project(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """The nearest images inside the eps-ball around `clean` and inside [0, 1]; (N, C, H, W), float, not rounded.

    Exact up to the last bit of the floats; `quantize_inside` is what holds a saved image to eps without any tolerance.
    """
    eps = per_channel(budget.eps, images)
    return torch.minimum(torch.maximum(images, clean - eps), clean + eps).clamp(0, 1)


def levels(images: Tensor) -> Tensor:
    """8-bit levels nearest to `images`, float pixels in [0, 1]: int16, same shape. Never floors."""
    return (images.double() * LEVELS).round().clamp(0, LEVELS).to(torch.int16)


def quantize_inside(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """`images` as an 8-bit file holds them, still inside the budget.

    Every value is rounded to the nearest of 0/255 ... 255/255. Where that leaves the ball, which happens when eps is
    not a whole number of levels, it becomes the outermost level inside. `clean` must hold 8-bit values itself.

    Returns:
        float32 pixels k/255, exactly those that a PNG written from them gives back. Shape as `images`.
    """
    origin = levels(clean)
    if ((clean.double() * LEVELS - origin).abs() > _OFF_GRID).any():
        raise ValueError("clean images must hold 8-bit values (k/255); round them before the attack")
    radius = per_channel(budget.eps_levels, images).to(origin.dtype)
    rounded = torch.minimum(torch.maximum(levels(images), origin - radius), origin + radius)
    return rounded.clamp(0, LEVELS).to(torch.float32) / LEVELS
