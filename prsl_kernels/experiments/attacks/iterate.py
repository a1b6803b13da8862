"""The loop that every attack shares. An attack replaces parts of it: start, step, projection, acceptance, stopping.

What is maximised is a parameter (`Objective`), and whoever reads the rounds may stop when it has seen enough, since
they are made one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prsl_kernels.experiments.attacks.budget import Budget, project
from prsl_kernels.experiments.attacks.objectives import Objective, select


@dataclass(frozen=True)
class GradientHealth:
    """Per image: shares of the input gradient's elements that are exactly zero, and NaN or infinite; its norm. (N,).

    A high share of either makes an attack weak for a reason that is not robustness, and so may a norm that is far
    from those of other models. `norm` is Euclidean, over the finite elements.
    """

    zero: Tensor
    nonfinite: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Round:
    """Where an attack stands after `index` rounds; 0 is its start.

    `images` (N, C, H, W) are float pixels inside the budget, detached, not rounded to 8 bits: where the attack is, or
    the best that it has seen so far, as its `keep` says. `health` averages all gradients that were taken up to here,
    and is None where there were none.
    """

    index: int
    images: Tensor
    health: GradientHealth | None


@dataclass(frozen=True)
class Point:
    """Images (N, C, H, W), the objective there (N,), and its gradient; None for an attack that takes none."""

    images: Tensor
    values: Tensor
    gradient: Tensor | None


class Draws:
    """Random numbers for N images, each from a generator of its own on the CPU.

    So an image's numbers depend on its seed alone: not on the batch, the order, or the device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in [0, 1), (N, *shape)."""
        return self._stack(lambda generator: torch.rand(shape, generator=generator, dtype=torch.float32))

    def normal(self, *shape: int) -> Tensor:
        """Float32 of mean 0 and variance 1, (N, *shape)."""
        return self._stack(lambda generator: torch.randn(shape, generator=generator, dtype=torch.float32))

    def signs(self, *shape: int) -> Tensor:
        """-1.0 or 1.0, (N, *shape)."""
        return self._stack(lambda generator: 2 * torch.randint(0, 2, shape, generator=generator).float() - 1)

    def _stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self._device)


class Step(Protocol):
    """One round's move, with whatever memory it keeps from round to round."""

    def __call__(self, point: Point, /) -> Tensor:
        """Moved images, not yet projected."""


@dataclass(frozen=True)
class IterativeAttack(ABC):
    """An attack, configured once, that can be called any number of times with an objective and images.

    It knows nothing of language: `objective` is any function of images (N, C, H, W) in [0, 1] to (N,) values to
    maximise, a classifier's loss for example. Where it has a method `select(indices)`, the objective of those images
    alone, images that are done (`stop_above`) cost nothing more.

    Attributes:
        budget: norm, radius, and the length of a step where the attack has a fixed one.
        rounds: how many; one is one gradient, or one query of an attack without gradients.
        restarts: how often to begin anew, each time with `rounds` rounds that go on counting. With more than one,
            `keep` must be "best".
        keep: what a round's images are: the last, as the original papers of BIM and MI-FGSM have it, or the best of
            all that were seen so far, at the price of one more forward.
        stop_above: an image is left alone once its objective exceeds this; None never stops.
    """

    budget: Budget
    rounds: int
    restarts: int = field(default=1, kw_only=True)
    keep: Literal["last", "best"] = field(default="last", kw_only=True)
    stop_above: float | None = field(default=None, kw_only=True)

    uses_gradient: ClassVar[bool] = True
    accepts_improvements_only: ClassVar[bool] = False  # a move that does not raise the objective is taken back

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.restarts < 1:
            raise ValueError(f"rounds must be at least 0 and restarts at least 1; got {self.rounds}, {self.restarts}")
        if self.restarts > 1 and self.keep == "last":
            raise ValueError('several restarts need keep="best": the last one is not the best one')

    @abstractmethod
    def step(self, clean: Tensor, draws: Draws) -> Step:
        """A fresh step for one run on `clean` (N, C, H, W)."""

    def start(self, clean: Tensor, draws: Draws) -> Tensor:
        """Where a run begins; the clean images unless an attack says otherwise."""
        return clean

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Brings images back into the budget and into [0, 1]."""
        return project(images, clean, self.budget)

    @property
    def total_rounds(self) -> int:
        """The index of the last round, restarts included."""
        return self.rounds * self.restarts

    def iterate(
        self, objective: Objective, images: Tensor, *, seeds: Sequence[int] | None = None, start: Tensor | None = None
    ) -> Iterator[Round]:
        """Yields the start and then each round, `total_rounds` + 1 items.

        Args:
            objective: images (N, C, H, W) to (N,) values to maximise; value i must depend on image i alone.
            images: clean float images in [0, 1]; never changed.
            seeds: a seed an image, for attacks that draw random numbers, so that an image's numbers do not depend
                on its neighbours in the batch. Its index in the batch by default.
            start: where the first run begins, in place of the attack's own start; brought into the budget.

        Raises:
            ValueError: images outside of [0, 1] or not (N, C, H, W), a start of another shape or not finite, an
                objective that is not (N,) or whose graph does not reach the images, or seeds that are not N.
        """
        _check_images(images)
        if start is not None and (start.shape != images.shape or not start.isfinite().all()):
            raise ValueError(f"start must be finite and of the images' shape {tuple(images.shape)}")
        seeds = range(len(images)) if seeds is None else seeds
        if len(seeds) != len(images):
            raise ValueError(f"seeds must hold one number an image, {len(images)}; got {len(seeds)}")
        clean = images.detach()
        draws = Draws(seeds, clean.device)
        view = _View(objective, len(clean), self.stop_above)
        best: Point | None = None
        for restart in range(self.restarts):
            begin = self.start(clean, draws) if start is None or restart else start.detach().to(clean)
            for index, current, point in self._run(view, clean, self.project(begin, clean), draws):
                if point is not None and self.keep == "best":
                    seen = Point(point.images, point.values, None)
                    best = seen if best is None else better(best, seen)
                if index or not restart:
                    shown = current if best is None else best.images
                    yield Round(restart * self.rounds + index, shown, view.health())

    def _run(
        self, view: _View, clean: Tensor, current: Tensor, draws: Draws
    ) -> Iterator[tuple[int, Tensor, Point | None]]:
        """One run: (round, images, and the objective there where it has been computed)."""
        looks_ahead = self.keep == "best" or self.accepts_improvements_only
        step = self.step(clean, draws)
        point = view.evaluate(current, self.uses_gradient and self.rounds > 0) if looks_ahead else None
        yield 0, current, point
        for index in range(1, self.rounds + 1):
            if not view.active.any():
                yield index, current, point
                continue
            if point is None and self.uses_gradient:
                point = view.evaluate(current, True)
            elif point is None:  # it goes where it goes, whatever the objective
                point = Point(current, torch.empty(0), None)
            moved = self.project(step(point).detach(), clean)
            current = moved if view.active.all() else torch.where(_as_mask(view.active, moved), moved, current)
            if not looks_ahead:
                point = None
            elif self.accepts_improvements_only:
                proposed = view.evaluate(current, False)
                point = better(point, proposed)
                current = point.images
            else:
                point = view.evaluate(current, self.uses_gradient and index < self.rounds)
            yield index, current, point

    def __call__(
        self, objective: Objective, images: Tensor, *, seeds: Sequence[int] | None = None, start: Tensor | None = None
    ) -> Tensor:
        """The images after the last round: (N, C, H, W) in [0, 1], inside the budget, not rounded to 8 bits."""
        last = deque(self.iterate(objective, images, seeds=seeds, start=start), maxlen=1).pop()
        return last.images


class _View:
    """The objective as one attack has seen it: which images are still under attack, and how healthy gradients were."""

    def __init__(self, objective: Objective, count: int, stop_above: float | None) -> None:
        self._objective, self._stop_above = objective, stop_above
        self.active = torch.ones(count, dtype=torch.bool)
        self._values: Tensor | None = None
        self._sums = torch.zeros(3, count)
        self._taken = torch.zeros(count)

    def evaluate(self, images: Tensor, gradient: bool) -> Point:
        """Value and gradient of images still under attack; the others keep their value and have a gradient of 0.

        It is the same whether the objective can `select` or not: an image that is done stays as it was.
        """
        if self._values is not None and not self.active.any():  # a restart after which nothing is left to do
            return Point(images, self._values, torch.zeros_like(images) if gradient else None)
        objective, at, kept = self._objective, images, self.active.to(images.device)
        all_active = bool(self.active.all())
        part = None if all_active else select(objective, self.active.nonzero().flatten())
        if part is not None:
            objective, at = part, images[kept]
        found = None
        if gradient:
            values, found, health = input_gradient(objective, at)
            sums = torch.stack([health.zero, health.nonfinite, health.norm]).float().cpu()
            self._sums[:, self.active] += sums if all_active or part is not None else sums[:, self.active]
            self._taken[self.active] += 1
        else:
            with torch.no_grad():
                values = objective(at.detach())
            _check_values(values, len(at))
        if not all_active:
            assert self._values is not None
            mine = values if part is not None else values[kept]
            values = self._values.masked_scatter(kept, mine.to(self._values.dtype))
            if found is not None:
                mine = found if part is not None else found[kept]
                found = torch.zeros_like(images).masked_scatter_(_as_mask(kept, images), mine)
        self._values = values = values.detach()
        if self._stop_above is not None:
            self.active = self.active & ~(values > self._stop_above).cpu()
        return Point(images, values, found)

    def health(self) -> GradientHealth | None:
        """Averages over the gradients taken so far."""
        if not self._taken.any():
            return None
        return GradientHealth(*(self._sums / self._taken.clamp(min=1)))


def _as_mask(chosen: Tensor, images: Tensor) -> Tensor:
    return chosen.to(images.device).view(-1, 1, 1, 1)


def better(old: Point, new: Point) -> Point:
    """Image by image the point of the higher objective; the old one where they are equal or the new one is NaN.

    With the gradients, where both have them.
    """
    higher = (new.values > old.values) | (old.values.isnan() & ~new.values.isnan())
    mask, gradient = _as_mask(higher, new.images), None
    if old.gradient is not None and new.gradient is not None:
        gradient = torch.where(mask, new.gradient, old.gradient)
    return Point(torch.where(mask, new.images, old.images), torch.where(higher, new.values, old.values), gradient)


def input_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor, GradientHealth]:
    """Each image's objective (N,), its gradient with respect to that image (N, C, H, W), and how healthy that is.

    The values are summed before the one backward pass, so each image's gradient is its own, whatever the batch.
    """
    leaf = images.detach().requires_grad_(True)
    with torch.enable_grad():
        values = objective(leaf)
        _check_values(values, len(images))
        gradient = None
        if values.requires_grad:  # and where only the parameters are in the graph, there is none for the images
            (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise ValueError("the objective has no gradient with respect to the images (is it computed under no_grad?)")
    flat = gradient.flatten(1)
    finite = flat.isfinite()
    health = GradientHealth(
        zero=(flat == 0).float().mean(1),
        nonfinite=(~finite).float().mean(1),
        norm=torch.where(finite, flat, 0).double().norm(dim=1),  # squares of small or large floats would leave float32
    )
    return values.detach(), gradient, health


def _check_values(values: Tensor, count: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"the objective must give one value an image, ({count},); got {tuple(values.shape)}")


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point (N, C, H, W); got {images.dtype} {tuple(images.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # written so that NaN fails, too
        raise ValueError("images must lie in [0, 1]: the attack works on pixels, with the normaliser in the model")


@dataclass(frozen=True)
class Ensemble:
    """Several attacks on the same images, and of each image the result with the highest objective.

    The experiment takes its worst case by the score of what the model says, after the attacks; this one is for
    objectives that are the score themselves, a classifier's margin for example.
    """

    attacks: tuple[IterativeAttack, ...]

    def __call__(self, objective: Objective, images: Tensor, *, seeds: Sequence[int] | None = None) -> Tensor:
        """The worst image of all attacks, (N, C, H, W); the clean one where no attack raised the objective."""
        with torch.no_grad():
            best = Point(images.detach(), objective(images.detach()), None)
        for attack in self.attacks:
            found = attack(objective, images, seeds=seeds)
            with torch.no_grad():
                best = better(best, Point(found, objective(found), None))
        return best.images
