"""What the fine-tuning reads, and in which order: the same for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from prsl_kernels.experiments.data import Dataset, Example
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel

# Images stay in memory up to this many bytes; what goes beyond is read again each time.
CACHE_BYTES = 2 << 30

Draw = tuple[Example, int]  # an example and how often it was drawn before


def check_examples(dataset: Dataset) -> None:
    """Raises a `UserError` for a data set that cannot be trained on, before any work is done."""
    where = f"{dataset.name}, split {dataset.split}"
    if not dataset.examples:
        raise UserError(f"{where}: there are no examples; training needs at least one")
    kind = "an answer" if dataset.task == "vqa" else "a caption"
    for example in dataset.examples:
        name = f"{where}, example {example.id!r}"
        if not example.references or not all(reference.strip() for reference in example.references):
            raise UserError(f"{name}: the text is missing or empty; give it {kind} or remove it")
        if dataset.task == "vqa" and not (example.question or "").strip():
            raise UserError(f"{name}: the question is missing or empty; give it one or remove it")


class Draws(Sequence[Draw]):
    """What is trained on, in this order; an example is looked up when its turn comes."""

    def __init__(self, examples: Sequence[Example], order: Tensor) -> None:
        """`order` (N,) holds places in `examples`, as many passes over them as it takes."""
        self._examples, self._order = examples, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Draw: ...

    @overload
    def __getitem__(self, place: slice) -> list[Draw]: ...

    def __getitem__(self, place: int | slice) -> Draw | list[Draw]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(f"draw {place} of {len(self)}")
        return self._examples[int(self._order[place])], place // len(self._examples)


def draw_order(examples: Sequence[Example], count: int, seed: int) -> Draws:
    """The first `count` draws from an endless sequence of shuffled passes over the examples, by `seed` alone.

    An example that has several references shows one in each pass, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(len(examples), generator=generator) for _ in range(-(-count // len(examples)))]
    return Draws(examples, torch.cat(passes)[:count])


class BatchMaker:
    """Makes the model's inputs, labels included, from drawn examples; images are read once and kept as 8 bits."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self._vlm = vlm
        self._images: dict[Path, Tensor] = {}
        self._room = CACHE_BYTES

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """Pixels (N, 3, size, size) in [0, 1]."""
        missing = list(dict.fromkeys(e.image for e in examples if e.image not in self._images))
        fresh: dict[Path, Tensor] = {}
        if missing:  # `load_pixels` gives multiples of 1/255, so 8 bits hold them exactly
            fresh = dict(zip(missing, (self._vlm.load_pixels(missing) * 255).round().byte(), strict=True))
        for path, image in fresh.items():
            if image.nbytes <= self._room:
                self._images[path] = image.clone()
                self._room -= image.nbytes
        images = [self._images[e.image] if e.image in self._images else fresh[e.image] for e in examples]
        return torch.stack(images).float() / 255

    def text(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """The model's inputs besides the image, of one reference each."""
        references = [example.references[turn % len(example.references)] for example, turn in draws]
        questions = [example.question or "" for example, _ in draws] if self._vlm.task == "vqa" else None
        return self._vlm.encode(references, questions)

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Keywords for the model's forward."""
        pixels = self.pixels([example for example, _ in draws])
        return {"pixel_values": self._vlm.normalize(pixels), **self.text(draws)}
