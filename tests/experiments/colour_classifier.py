"""A small convolutional network that names the colour of the shape in easy-VQA's images; what attacks are tried on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.data.pixels import load_pixels

SIZE = 32
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@cache
def images_and_colours(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split, float32 of 8-bit values, and their colours' places in COLOURS."""
    colours = {e.image: e.references[0] for e in load_dataset("easy-vqa", split).examples if e.group == "color"}
    chosen = sorted(colours)[:count]
    return load_pixels(chosen, SIZE), torch.tensor([COLOURS.index(colours[image]) for image in chosen])


@cache
def trained(seed: int) -> nn.Module:
    """The network in evaluation mode, float32; it takes two seconds.

    Smoothed labels keep it from being so sure of itself that gradients vanish beside what some attacks add to their
    length before they divide by it.
    """
    images, labels = images_and_colours("train", 1200)
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # it decides what is drawn: the first caller's must not
        model = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.GELU(), nn.Conv2d(16, 24, 3, stride=2), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, len(COLOURS)),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(8):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1).backward()
                optimizer.step()
    torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def recognised(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """`count` images of the test split that the network names rightly, and their labels."""
    images, labels = images_and_colours("test", count * 3)
    right = (model(images).argmax(1) == labels).nonzero().flatten()[:count]
    assert len(right) == count
    return images[right], labels[right]
