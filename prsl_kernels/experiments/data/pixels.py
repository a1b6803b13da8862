"""Images between files and tensors: pixels in [0, 1], float32, exact through an 8-bit PNG."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import atomic_file

WHITE = (255, 255, 255, 255)
_PROGRAM = "EPS"  # a program, which Pillow has Ghostscript run


def load_pixels(paths: Sequence[Path], size: int) -> torch.Tensor:
    """Reads images as float32 pixels in [0, 1] of shape (N, 3, size, size).

    Any mode becomes RGB, transparency is laid over white, EXIF orientation is applied, an animation gives its first
    frame. An image of another size is resized to the square with an antialiased bicubic filter, its proportions not
    kept; one of the right size is taken as it is, to the bit.

    Raises:
        UserError: a file is missing, truncated, too large or no image; it is named with the remedy.
    """
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.float32)
    for index, path in enumerate(paths):
        image = _read_rgb(Path(path))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        pixels[index] = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32) / 255
    return pixels


def image_faults(paths: Sequence[Path]) -> list[str | None]:
    """What keeps `load_pixels` from reading each image, as its message says it, or None.

    Every image is decoded to its end, several at a time; a JPEG at an eighth of its size, which is three times as fast.
    """

    def fault(path: Path) -> str | None:
        try:
            _decode(path, sketch=True)
        except UserError as error:
            return str(error)
        return None

    with _strict_about_bombs(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(fault, paths))


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """The nearest values of an 8-bit image: clamped to [0, 1] and rounded, never floored, to multiples of 1/255."""
    return torch.round(pixels.clamp(0, 1) * 255) / 255


def save_png(pixels: torch.Tensor, path: Path) -> None:
    """Writes pixels (3, H, W) in [0, 1] as an 8-bit RGB PNG, atomically; `load_pixels` gives `quantize(pixels)` back.

    Raises:
        ValueError: another shape, or values that are not finite or outside of [0, 1].
    """
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(encode_png(pixels))


def encode_png(pixels: torch.Tensor) -> bytes:
    """Pixels (3, H, W) in [0, 1] as the content of an 8-bit RGB PNG; see `save_png`."""
    pixels = pixels.detach().to("cpu", torch.float32)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise ValueError(f"pixels has the shape {tuple(pixels.shape)}; give one RGB image as (3, height, width)")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("pixels holds values outside of [0, 1] or not finite; clamp them first")
    content = io.BytesIO()
    Image.fromarray(torch.round(pixels * 255).to(torch.uint8).permute(1, 2, 0).numpy()).save(content, format="PNG")
    return content.getvalue()


def decode_png(content: bytes) -> torch.Tensor:
    """What `encode_png` was given, (3, H, W) float32, rounded to 8 bits.

    Raises:
        UserError: the content is no PNG, or damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"a stored image cannot be read ({error}); run the attack stage again") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255


@contextmanager
def _strict_about_bombs() -> Iterator[None]:
    """Makes an error of Pillow's warning about giant images. The filter is the process's: not for use in threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _read_rgb(path: Path) -> Image.Image:
    with _strict_about_bombs():
        return _decode(path)


def _decode(path: Path, *, sketch: bool = False) -> Image.Image:
    """The image in RGB; with `sketch`, a JPEG may be smaller than it is, but is read to its end all the same."""
    try:
        with Image.open(path) as image:
            if image.format == _PROGRAM:
                raise UnidentifiedImageError
            if sketch:
                image.draft(None, (1, 1))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image; restore the file or remove it from the data set") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image in a format that Pillow reads; replace it by a PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; scale the image down before using it"
        ) from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read this image; change its permissions") from None
    except Exception as error:  # Pillow reports damage by whatever the decoder of the format happens to raise
        raise UserError(f"{path}: truncated or damaged image ({error}); replace the file") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating point pixels have no defined range, save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.round(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, WHITE), opaque).convert("RGB")
    return image.convert("RGB")
