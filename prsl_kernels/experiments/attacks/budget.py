"""How far an attack may move a pixel, and the two projections that hold it to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from prsl_kernels.experiments.errors import UserError

Units = Literal["pixels", "pixels255", "normalized"]
Norm = Literal["linf", "l2"]

LEVELS = 255  # an 8-bit channel has the values 0/255, 1/255, ..., 255/255
# Unit conversions cost an ulp or two; without this, 4/255 given in normalised units could lose its last level.
_RELATIVE_ROUNDING = 1e-12
_OFF_GRID = 1e-3  # in levels; a float32 pixel k/255 is within 2e-5 levels of k


@dataclass(frozen=True)
class Budget:
    """A budget in [0, 1] pixels, per channel: the radius `eps` and the length `step` of one round.

    The normaliser is part of the attacked model, so one number in normalised units is another number of pixels in
    every channel whose `std` differs; that is why both are tuples, one entry a channel. In L2 the radius is that of
    the whole image, (C, H, W) as one vector, and all channels have the same.
    """

    eps: tuple[float, ...]
    step: tuple[float, ...]
    std: tuple[float, ...]
    norm: Norm = field(default="linf", kw_only=True)

    @classmethod
    def from_config(cls, eps: float, step: float, units: str, *, std: Sequence[float], norm: Norm = "linf") -> Budget:
        """Converts a budget as a recipe gives it.

        Args:
            eps: radius of the ball, at least 0, in `units`.
            step: how far one round moves each pixel, at least 0, in `units`; 0 is the control that moves nothing.
            units: "pixels" ([0, 1]), "pixels255" (levels of 8 bits) or "normalized" (what the model sees after
                subtracting its mean and dividing by its standard deviation).
            std: the standard deviation of the model's normaliser, one number a channel, in [0, 1] pixels.
            norm: "linf" or "l2".

        Raises:
            UserError: on another unit or norm, a negative or non-finite number, an L-infinity eps beyond the whole
                pixel range (which is nearly always a mistaken unit), a step longer than the ball is wide, or an L2
                budget in normalised units of which every channel has another.
        """
        if norm not in get_args(Norm):
            raise UserError(f"attack norm {norm!r} is unknown; give one of {', '.join(get_args(Norm))}")
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
            norm=norm,
        )
        if norm == "l2" and len(set(budget.eps)) > 1:
            raise UserError(
                f"an L2 budget in normalised units has no one radius for channels of different std {tuple(std)}; "
                "give it in pixels or pixels255"
            )
        if norm == "linf" and max(budget.eps) > 1:
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

    @property
    def eps_levels_squared(self) -> int:
        """In L2: the largest sum of squared differences, in 8-bit levels, that a saved image may have."""
        return math.floor((self.eps[0] * LEVELS) ** 2 * (1 + _RELATIVE_ROUNDING))

    def describe(self) -> str:
        """Norm, eps and step in pixels and in normalised units, and what 8-bit images keep of eps; one line."""
        normalised_eps = [eps / std for eps, std in zip(self.eps, self.std, strict=True)]
        normalised_step = [step / std for step, std in zip(self.step, self.std, strict=True)]
        norm, kept = "L-inf", _levels([level / LEVELS for level in self.eps_levels])
        if self.norm == "l2":
            norm, kept = "L2", _levels([math.sqrt(self.eps_levels_squared) / LEVELS])
        return (
            f"{norm}, eps {_levels(self.eps)} = {_numbers(self.eps)} of the pixel range = "
            f"{_numbers(normalised_eps)} normalised, step {_levels(self.step)} = {_numbers(self.step)} of the pixel "
            f"range = {_numbers(normalised_step)} normalised (std {_numbers(self.std)}); "
            f"recorded 8-bit images stay within {kept}"
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
    """The nearest images inside the eps-ball around `clean`, brought into [0, 1]; (N, C, H, W), float, not rounded.

    Exact up to the last bit of the floats; `quantize_inside` is what holds a saved image to eps without any tolerance.
    """
    eps = per_channel(budget.eps, images)
    if budget.norm == "linf":
        return images.clamp((clean - eps).clamp_(min=0), (clean + eps).clamp_(max=1))
    delta = images - clean
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    scale = (eps[0] / length).clamp(max=1).nan_to_num(nan=1.0)  # 0 / 0 where nothing has moved and eps is 0
    return (clean + delta * scale).clamp(0, 1)  # clamping only brings an image nearer to the clean one


def ascent(gradient: Tensor, budget: Budget) -> Tensor:
    """The direction of steepest ascent in the budget's norm: (N, C, H, W), of length 1 a pixel, or 1 an image in L2.

    An element that is NaN stays where it is; in L-infinity an infinite one still has a sign and is followed.
    """
    if budget.norm == "linf":
        return gradient.nan_to_num(nan=0.0).sign()
    scaled = of_ordinary_size(gradient)
    return scaled / scaled.flatten(1).norm(dim=1).clamp(min=torch.finfo(scaled.dtype).tiny).view(-1, 1, 1, 1)


def of_ordinary_size(gradient: Tensor) -> Tensor:
    """Each image's gradient over its largest element, and 0 where that is NaN or infinite; (N, C, H, W).

    Norms are taken of this: the squares of small gradients underflow, and sums of large ones overflow.
    """
    finite = torch.where(gradient.isfinite(), gradient, 0)
    return finite / finite.flatten(1).abs().amax(1).clamp(min=torch.finfo(finite.dtype).tiny).view(-1, 1, 1, 1)


def levels(images: Tensor) -> Tensor:
    """8-bit levels nearest to `images`, float pixels in [0, 1]: int16, same shape. Never floors."""
    return (images.double() * LEVELS).round().clamp(0, LEVELS).to(torch.int16)


def quantize_inside(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """`images` as an 8-bit file holds them, still inside the budget.

    Every value is rounded to the nearest of 0/255 ... 255/255. Where that leaves an L-infinity ball, which happens
    when eps is not a whole number of levels, it becomes the outermost level inside; where it leaves an L2 ball, as
    few values as needed are rounded towards the clean image instead, those first that were nearest to that anyway.
    `clean` must hold 8-bit values itself.

    Returns:
        float32 pixels k/255, exactly those that a PNG written from them gives back. Shape as `images`.
    """
    origin = levels(clean)
    if ((clean.double() * LEVELS - origin).abs() > _OFF_GRID).any():
        raise ValueError("clean images must hold 8-bit values (k/255); round them before the attack")
    if budget.norm == "linf":
        radius = per_channel(budget.eps_levels, images).to(origin.dtype)
        rounded = torch.minimum(torch.maximum(levels(images), origin - radius), origin + radius)
    else:
        rounded = _round_inside_l2(images, origin, budget)
    return rounded.clamp(0, LEVELS).to(torch.float32) / LEVELS


def _round_inside_l2(images: Tensor, origin: Tensor, budget: Budget) -> Tensor:
    """8-bit levels next to `images` whose squared distances from `origin` sum to at most eps squared, exactly."""
    wanted = (images.double() * LEVELS).clamp(0, LEVELS) - origin
    # `images` may lie outside, by the rounding of floats or by a caller's mistake; rounding inwards starts inside.
    radius = budget.eps[0] * LEVELS
    length = wanted.flatten(1).norm(dim=1).clamp(min=max(radius, 1e-12))
    wanted = wanted * (radius / length).view(-1, 1, 1, 1)
    result = wanted.round().long().flatten(1)
    inner = wanted.trunc().long().flatten(1)  # rounded towards the clean image: never longer than what was wanted
    for row, (moved, inside, exact) in enumerate(zip(result, inner, wanted.flatten(1), strict=True)):
        excess = int((moved * moved).sum()) - budget.eps_levels_squared
        if excess <= 0:
            continue
        outward = (moved != inside).nonzero().flatten()
        outward = outward[(exact[outward] - inside[outward]).abs().argsort(stable=True)]
        gained = (moved[outward] ** 2 - inside[outward] ** 2).cumsum(0)
        count = int((gained < excess).sum()) + 1
        result[row, outward[:count]] = inside[outward[:count]]
    return origin + result.view(origin.shape).to(origin.dtype)
