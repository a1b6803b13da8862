"""Gradients that are masked, and a model that is robust: what tells one from the other.

The report suspects masking where an image made on another model, or by queries alone, does more than gradients do.
Here classifiers whose masks are known must show that, each in its way, and one whose robustness is proved must not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from colour_classifier import images_and_colours, recognised, trained
from torch import Tensor, nn
from torch.nn import functional as F

from prsl_kernels.experiments.attacks import (
    APGD,
    BIM,
    PGD,
    Budget,
    Ensemble,
    IterativeAttack,
    Square,
    quantize_inside,
)
from prsl_kernels.experiments.attacks.objectives import token_dlr, token_margin

BUDGET = Budget.from_config(48, 12, "pixels255", std=(0.5, 0.5, 0.5))
COUNT = 64

Model = Callable[[Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("_single_thread")


@pytest.fixture(scope="module")
def plain(_single_thread: None) -> tuple[nn.Module, Tensor, Tensor]:
    model = trained(0)
    return model, *recognised(model, COUNT)


def cross_entropy(model: Model, labels: Tensor):
    return lambda images: F.cross_entropy(model(images), labels, reduction="none")


def margin(model: Model, labels: Tensor):
    return lambda images: token_margin(model(images)[:, None], labels[:, None])


def dlr(model: Model, labels: Tensor):
    return lambda images: token_dlr(model(images)[:, None], labels[:, None])


def accuracy(model: Model, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def robust(attack: IterativeAttack, objective, model: Model, images: Tensor, labels: Tensor) -> float:
    """Accuracy under an attack, of the images as they would be saved."""
    return accuracy(model, quantize_inside(attack(objective, images), images, attack.budget), labels)


def health(objective, images: Tensor):
    return list(BIM(BUDGET, 10).iterate(objective, images))[-1].health


def transferred(model: Model, other: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy on images that were made on another network."""
    found = BIM(BUDGET, 10)(cross_entropy(other, labels), images)
    return accuracy(model, quantize_inside(found, images, BUDGET), labels)


# ---- nothing masked: what the attacks can do -------------------------------------------------------------------------


def test_without_a_mask_gradients_do_the_most(plain: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = plain
    white = robust(BIM(BUDGET, 10), cross_entropy(model, labels), model, images, labels)
    assert white < 0.2
    assert robust(Square(BUDGET, 300), margin(model, labels), model, images, labels) >= white
    assert transferred(model, trained(1), images, labels) >= white + 0.1
    found = health(cross_entropy(model, labels), images)
    assert found.zero.mean() < 0.2
    assert found.nonfinite.max() == 0
    assert found.norm.min() > 1e-3


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_logits_out_of_scale_hide_from_cross_entropy_and_not_from_differences_of_logits(
    plain: tuple[nn.Module, Tensor, Tensor],
) -> None:
    """The same decisions as without the mask: softmax is 1 to the last bit, and cross entropy has no gradient."""
    model, images, labels = plain

    def masked(inputs: Tensor) -> Tensor:
        return 1e4 * model(inputs)

    white = robust(BIM(BUDGET, 10), cross_entropy(masked, labels), masked, images, labels)
    assert white > 0.9
    assert robust(PGD(BUDGET, 10, restarts=2), cross_entropy(masked, labels), masked, images, labels) > 0.7
    found = health(cross_entropy(masked, labels), images)
    assert (found.zero > 0.99).float().mean() > 0.9  # and this is how a report would see it
    honest = robust(BIM(BUDGET, 10), margin(model, labels), model, images, labels)
    assert robust(BIM(BUDGET, 10), margin(masked, labels), masked, images, labels) == pytest.approx(honest, abs=0.05)
    assert robust(APGD(BUDGET, 20), dlr(masked, labels), masked, images, labels) < white - 0.5
    assert robust(Square(BUDGET, 300), margin(masked, labels), masked, images, labels) < white - 0.3
    assert transferred(masked, model, images, labels) < white - 0.5


class Coarse(nn.Module):
    """Rounds pixels to 32 levels before the network sees them: the gradient is zero wherever it exists."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 31).round() / 31)


def test_a_front_end_without_gradient_hides_from_all_of_them_but_not_from_queries_and_transfer(
    plain: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = plain
    masked = Coarse(model)
    before = accuracy(masked, images, labels)
    assert before > 0.9
    for objective in (cross_entropy, margin, dlr):
        assert robust(BIM(BUDGET, 10), objective(masked, labels), masked, images, labels) == before
        assert (health(objective(masked, labels), images).zero == 1).all()
        assert robust(APGD(BUDGET, 10), objective(masked, labels), masked, images, labels) > before - 0.3
    assert robust(Square(BUDGET, 300), margin(masked, labels), masked, images, labels) < before - 0.3
    assert transferred(masked, model, images, labels) < before - 0.5


class Ripples(nn.Module):
    """Adds to each pixel a ripple of a third of a level, so steep that it turns the gradient's sign at random."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 0.33 / 255 * (images * 255 * 40 + 1).sin())


def test_shattered_gradients_look_healthy_and_only_other_attacks_tell(
    plain: tuple[nn.Module, Tensor, Tensor],
) -> None:
    """The forward pass hardly changes; no gradient is zero or infinite, and each points somewhere else."""
    model, images, labels = plain
    masked = Ripples(model)
    before = accuracy(masked, images, labels)
    assert before > 0.9
    white = min(
        robust(BIM(BUDGET, 10), objective(masked, labels), masked, images, labels)
        for objective in (cross_entropy, margin, dlr)
    )
    found, plain_health = (health(cross_entropy(which, labels), images) for which in (masked, model))
    assert (found.zero <= plain_health.zero + 0.01).all()
    assert found.nonfinite.max() == 0
    assert found.norm.median() > 0.1 * plain_health.norm.median()
    assert white > 0.5
    assert robust(Square(BUDGET, 300), margin(masked, labels), masked, images, labels) < white - 0.2
    assert transferred(masked, model, images, labels) < white - 0.4


# ---- a model that is robust ------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Tells two classes apart by weights alone, so that the worst image in a ball is known exactly."""

    def __init__(self, weights: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weights, self.bias = weights, bias

    def forward(self, images: Tensor) -> Tensor:
        difference = (images * self.weights).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(difference), difference], 1)

    def worst(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Of each image the one in the L-infinity ball, inside [0, 1], that is furthest on the wrong side."""
        side = (1 - 2 * labels).view(-1, 1, 1, 1)  # towards the other class
        return (images + eps * side * self.weights.sign()).clamp(0, 1)


@pytest.fixture(scope="module")
def linear(_single_thread: None) -> tuple[Linear, Tensor, Tensor]:
    """Yellow against blue, trained at the worst images in the ball: adversarial training, exactly."""
    images, labels = images_and_colours("train", 1200)
    weights, bias = torch.zeros(images.shape[1:], requires_grad=True), torch.zeros((), requires_grad=True)

    def two(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (labels == 7) | (labels == 1)
        return images[chosen], (labels[chosen] == 7).long()

    images, labels = two(images, labels)
    model = Linear(weights, bias)
    optimizer = torch.optim.Adam([weights, bias], 1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(model.worst(images, labels, 4 / 255).detach()), labels).backward()
        optimizer.step()
    return Linear(weights.detach(), bias.detach()), *two(*images_and_colours("test", 400))


@pytest.mark.parametrize("eps", [4, 16, 48])
def test_on_a_robust_model_no_attack_finds_more_than_gradients_do(
    linear: tuple[Linear, Tensor, Tensor], eps: int
) -> None:
    model, images, labels = linear
    budget = Budget.from_config(eps, eps / 4, "pixels255", std=(0.5, 0.5, 0.5))
    proved = accuracy(model, model.worst(images, labels, eps / 255), labels)
    assert proved > {4: 0.8, 16: 0.3, 48: 0}[eps]
    white = BIM(budget, 10)(cross_entropy(model, labels), images)
    assert accuracy(model, white, labels) == pytest.approx(proved, abs=0.02)
    everyone = Ensemble((APGD(budget, 20), Square(budget, 200), PGD(budget, 10)))
    found = everyone(margin(model, labels), images)
    assert accuracy(model, found, labels) >= proved
    assert (margin(model, labels)(found) <= margin(model, labels)(white) + 1e-3).all()
    other = trained(0)
    places = torch.tensor([1, 7])[labels]
    transfer = BIM(budget, 10)(cross_entropy(other, places), images)
    assert accuracy(model, transfer, labels) >= accuracy(model, white, labels)
    assert robust(Square(budget, 200), margin(model, labels), model, images, labels) >= proved
