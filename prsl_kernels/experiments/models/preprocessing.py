"""What a checkpoint wants done to pixels, read from the JSON of its image processor without running any of its code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Preprocessing:
    """Square images of `size` pixels, and the channels' mean and standard deviation in units of [0, 1] pixels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def read(cls, folder: Path, image_size: Any) -> Preprocessing:
        """Reads `preprocessor_config.json`, or the image processor inside of `processor_config.json`.

        `image_size` is that of the model's vision configuration, the one that the model can take.

        Raises:
            UserError: no such file, no mean or deviation of three finite numbers, or no square image.
        """
        file, values = processor_settings(folder)
        sides = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
        if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
            raise UserError(f"{folder}: the image size {image_size!r} is not square; only square images are supported")
        if not values.get("do_normalize", True):
            return cls(sides[0], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        mean, std = (_triple(file, name, values.get(name)) for name in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise UserError(f"{file}: image_std is {list(std)}; every entry must be positive")
        return cls(sides[0], mean, std)

    def to_json(self, image_processor: str, **settings: Any) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that transformers' image processors read as well.

        `settings` are those that the image processor has beside the common ones.
        """
        return {
            "image_processor_type": image_processor,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
            **settings,
        }


def processor_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a checkpoint's image processor, and its settings as they are there.

    Raises:
        UserError: no such file, or another content.
    """
    present = [folder / name for name in FILES if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: no {FILES[0]}; copy it from the checkpoint that the model comes from")
    file = present[0]
    values = read_json(file)
    if isinstance(values, dict) and "image_mean" not in values and isinstance(values.get("image_processor"), dict):
        values = values["image_processor"]
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no JSON object; copy it from the checkpoint that the model comes from")
    return file, values


def _triple(file: Path, name: str, value: Any) -> tuple[float, float, float]:
    valid = isinstance(value, list) and len(value) == 3
    if not valid or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value
    ):
        raise UserError(f"{file}: {name} is {value!r}; it must be three finite numbers, one for each colour")
    return float(value[0]), float(value[1]), float(value[2])
