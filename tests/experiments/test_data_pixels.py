"""Images in and out: exact where they must be, and a named fault where a file is broken."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prsl_kernels.experiments.data import decode_png, encode_png, load_pixels, quantize, save_png
from prsl_kernels.experiments.errors import UserError


def _load(path: Path, size: int = 4) -> np.ndarray:
    pixels = load_pixels([path], size)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, size, size)
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    return (pixels[0] * 255).round().to(torch.int64).permute(1, 2, 0).numpy()


def test_a_png_gives_quantized_pixels_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 16, 16, generator=generator)
    save_png(pixels, tmp_path / "new" / "a.png")
    loaded = load_pixels([tmp_path / "new" / "a.png"], 16)[0]
    assert torch.equal(loaded, quantize(pixels))
    assert torch.equal(quantize(loaded), loaded)
    save_png(loaded, tmp_path / "b.png")
    assert torch.equal(load_pixels([tmp_path / "b.png"], 16)[0], loaded)
    assert float((loaded - pixels).abs().max()) <= 0.5 / 255 + 1e-7
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_quantize_rounds_to_the_nearest_of_all_256_values_and_never_floors() -> None:
    values = torch.arange(256, dtype=torch.float64)
    for offset in (-0.49, -0.2, 0.0, 0.2, 0.49):
        assert torch.equal((quantize((values + offset) / 255) * 255).round(), values)
    assert torch.equal(quantize(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 1.0]))


def test_an_encoded_image_is_the_content_of_its_file(tmp_path: Path) -> None:
    pixels = torch.rand(3, 9, 16, generator=torch.Generator().manual_seed(1))
    content = encode_png(pixels)
    save_png(pixels, tmp_path / "a.png")
    assert content == (tmp_path / "a.png").read_bytes()
    assert torch.equal(decode_png(content), quantize(pixels))
    assert encode_png(decode_png(content)) == content
    every = (torch.arange(256) / 255).view(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(decode_png(encode_png(every)), every)
    half = decode_png(encode_png(pixels.to(torch.bfloat16)))
    assert torch.equal(half, quantize(pixels.to(torch.bfloat16).float()))


def test_damaged_content_is_refused_and_never_anything_else() -> None:
    generator = np.random.default_rng(0)
    content = encode_png(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)))
    refused = 0
    for trial in range(300):
        damaged = bytearray(content[: generator.integers(len(content))] if trial % 2 else content)
        for place in generator.integers(0, max(len(damaged), 1), 3)[: len(damaged)]:
            damaged[place] ^= int(generator.integers(1, 256))
        try:
            assert decode_png(bytes(damaged)).shape[0] == 3  # damage where no checksum reaches
        except UserError:
            refused += 1
    assert refused > 290
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpeg, format="JPEG")
    for other in (b"", b"hello", jpeg.getvalue()):
        with pytest.raises(UserError, match=r"a stored image cannot be read .* run the attack stage again"):
            decode_png(other)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 4, 4), "shape"),
        (torch.zeros(1, 3, 4, 4), "shape"),
        (torch.zeros(3, 0, 4), "shape"),
        (torch.full((3, 2, 2), 1.01), "outside"),
        (torch.full((3, 2, 2), -0.01), "outside"),
        (torch.full((3, 2, 2), float("nan")), "not finite"),
    ],
)
def test_save_png_refuses_what_is_no_image(tmp_path: Path, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_png(pixels, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = (200, 100, 50)
    rgb = Image.new("RGB", (4, 4), colour)
    for mode, suffix in (("RGB", "png"), ("RGB", "bmp"), ("RGBA", "png"), ("P", "gif"), ("P", "png"), ("RGB", "webp")):
        path = tmp_path / f"{mode}.{suffix}"
        rgb.convert(mode).save(path, **({"lossless": True} if suffix == "webp" else {}))
        assert np.abs(_load(path) - colour).max() <= (30 if mode == "P" else 0)
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(_load(tmp_path / "cmyk.tif") - colour).max() <= 2
    rgb.save(tmp_path / "a.jpg", quality=95)
    assert np.abs(_load(tmp_path / "a.jpg") - colour).max() <= 4
    for mode, value in (("1", 1), ("L", 255), ("LA", (255, 255))):
        Image.new(mode, (4, 4), value).save(tmp_path / f"{mode}.png")
        assert (_load(tmp_path / f"{mode}.png") == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 128 * 257, 65535]] * 4, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert _load(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "rgba.png")
    assert _load(tmp_path / "rgba.png")[0, :, 0].tolist() == [0, 127, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert _load(tmp_path / "palette.png")[0, :2, 0].tolist() == [255, 9]


def test_orientation_of_a_photo_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert _load(tmp_path / "turned.png")[0, 3].tolist() == [255, 255, 255]


def test_resizing_is_antialiased_and_makes_a_square(tmp_path: Path) -> None:
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(_load(tmp_path / "stripes.png", 8) - 127.5).max() < 8


def test_no_images_give_an_empty_batch() -> None:
    assert load_pixels([], 8).shape == (0, 3, 8, 8)


def test_broken_files_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif"):
        path = tmp_path / f"truncated.{suffix}"
        good.save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=rf"truncated\.{suffix}: .*replace"):
            load_pixels([path], 64)
    for content in (b"", b"hello", b"<svg/>"):
        (tmp_path / "text.png").write_bytes(content)
        with pytest.raises(UserError, match=r"text\.png: not an image.*replace it"):
            load_pixels([tmp_path / "text.png"], 64)
    with pytest.raises(UserError, match=r"gone\.png: there is no such image; restore"):
        load_pixels([tmp_path / "gone.png"], 64)
    with pytest.raises(UserError, match="replace the file"):
        load_pixels([tmp_path], 64)
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="8 bits per channel"):
        load_pixels([tmp_path / "float.tif"], 4)
    good.save(tmp_path / "big.png")
    for limit in (64 * 64 - 1, 64 * 64 // 2 - 1):  # Pillow warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"big\.png: more than .* pixels; scale"):
            load_pixels([tmp_path / "big.png"], 64)
