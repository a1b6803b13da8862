"""Budgets, the loop, BIM and its controls, on tensors and on a small trained classifier."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from prsl_kernels.experiments.attacks import (
    BIM,
    Budget,
    RandomSigns,
    blank_like,
    project,
    quantize_inside,
    token_cross_entropy,
)
from prsl_kernels.experiments.errors import UserError

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


pytestmark = pytest.mark.usefixtures("_single_thread")


def images_8bit(count: int, size: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator).float() / 255


def pixels255(eps: float, step: float) -> Budget:
    return Budget.from_config(eps, step, "pixels255", std=HALF)


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "step", "units", "std", "eps_255", "step_255", "whole_levels"),
    [
        (8, 1, "pixels255", HALF, (8, 8, 8), (1, 1, 1), (8, 8, 8)),
        (8, 1, "pixels255", CLIP_STD, (8, 8, 8), (1, 1, 1), (8, 8, 8)),
        (0.5, 0.0625, "pixels", HALF, (127.5,) * 3, (15.9375,) * 3, (127,) * 3),
        # The paper, captions: normalised with std 0.5.
        (0.5, 0.01, "normalized", HALF, (63.75,) * 3, (1.275,) * 3, (63,) * 3),
        # The paper, question answering: BLIP-2's normaliser differs per channel.
        (1.0, 0.5, "normalized", CLIP_STD, (68.5005327, 66.6321579, 70.32316305),
         (34.25026635, 33.31607895, 35.161581525), (68, 66, 70)),
        (2, 2, "pixels255", HALF, (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        (255, 255, "pixels255", HALF, (255,) * 3, (255,) * 3, (255,) * 3),
        (0, 0, "pixels255", HALF, (0,) * 3, (0,) * 3, (0,) * 3),
        (0.75, 0.25, "pixels255", HALF, (0.75,) * 3, (0.25,) * 3, (0,) * 3),
        (8 / 255 / 0.5, 1 / 255 / 0.5, "normalized", HALF, (8, 8, 8), (1, 1, 1), (8, 8, 8)),
    ],
)  # fmt: skip
def test_budget_arithmetic(
    eps: float, step: float, units: str, std: tuple[float, ...], eps_255: tuple[float, ...],
    step_255: tuple[float, ...], whole_levels: tuple[int, ...],
) -> None:  # fmt: skip
    budget = Budget.from_config(eps, step, units, std=std)
    assert [value * 255 for value in budget.eps] == pytest.approx(eps_255, rel=1e-12, abs=0)
    assert [value * 255 for value in budget.step] == pytest.approx(step_255, rel=1e-12, abs=0)
    assert budget.eps_levels == whole_levels


@pytest.mark.parametrize("std", [HALF, CLIP_STD, (0.229, 0.224, 0.225)])
def test_whole_levels_survive_every_unit(std: tuple[float, ...]) -> None:
    for level in range(256):
        assert Budget.from_config(level, 0, "pixels255", std=std).eps_levels == (level,) * 3
        assert Budget.from_config(level / 255, 0, "pixels", std=std).eps_levels == (level,) * 3
        for channel, deviation in enumerate(std):
            budget = Budget.from_config(level / 255 / deviation, 0, "normalized", std=(deviation,) * 3)
            assert budget.eps_levels[channel] == level


def test_description_prints_both_units_and_channels_that_differ() -> None:
    captions = Budget.from_config(0.5, 0.01, "normalized", std=HALF).describe()
    for part in ("L-inf", "eps 63.75/255", "0.5 normalised", "step 1.275/255", "0.01 normalised", "within 63/255"):
        assert part in captions
    vqa = Budget.from_config(1.0, 0.5, "normalized", std=CLIP_STD).describe()
    assert "eps (68.501, 66.632, 70.323)/255" in vqa
    assert "= 1 normalised" in vqa
    assert "within (68, 66, 70)/255" in vqa
    assert "(0.058394, 0.060031, 0.05688) normalised" in Budget.from_config(4, 1, "pixels255", std=CLIP_STD).describe()


@pytest.mark.parametrize(
    ("eps", "step", "units", "std", "message"),
    [
        (-1, 1, "pixels255", HALF, "eps is -1"),
        (math.nan, 1, "pixels255", HALF, "eps is nan"),
        (math.inf, 1, "pixels255", HALF, "eps is inf"),
        (8, -0.5, "pixels255", HALF, "step is -0.5"),
        (8, math.nan, "pixels255", HALF, "step is nan"),
        (8, 1, "pixels", HALF, "more than the whole pixel range"),
        (256, 1, "pixels255", HALF, "more than the whole pixel range"),
        (2.5, 1, "normalized", HALF, "more than the whole pixel range"),
        (8, 17, "pixels255", HALF, "give at most 16"),
        (8, 1, "percent", HALF, "'percent' are unknown"),
        (8, 1, "pixels255", (0.5, 0.0, 0.5), "image_std"),
        (8, 1, "pixels255", (), "image_std"),
    ],
)
def test_budgets_out_of_range_are_refused(
    eps: float, step: float, units: str, std: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Budget.from_config(eps, step, units, std=std)


# ---- projections -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    eps=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    std=st.sampled_from([HALF, CLIP_STD]),
    units=st.sampled_from(["pixels", "normalized"]),
)
def test_eight_bit_images_keep_the_budget_exactly(eps: float, seed: int, std: tuple[float, ...], units: str) -> None:
    budget = Budget.from_config(eps, 0, units, std=std)
    clean = images_8bit(2, 4, seed)
    wild = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) * max(budget.eps)
    inside = project(wild, clean, budget)
    assert (inside >= 0).all()
    assert (inside <= 1).all()
    recorded = quantize_inside(inside, clean, budget)
    numerators, origin = (recorded * 255).round().long(), (clean * 255).round().long()
    assert torch.equal(numerators.float() / 255, recorded)  # values that a PNG holds
    for channel in range(3):
        radius = Fraction(budget.eps[channel]) * 255 * (1 + Fraction(1, 10**11))
        worst = int((numerators - origin)[:, channel].abs().max())
        assert worst <= radius
        # Not needlessly far inside either: rounding may cost at most the level that is only partly inside.
        free = project(wild, clean, budget)[:, channel] * 255 - recorded[:, channel] * 255
        assert free.abs().max() <= 0.5 + (float(radius) - math.floor(radius) if radius % 1 >= 0.5 else 0) + 1e-3


def test_rounding_that_would_leave_the_ball_goes_to_the_outermost_level_inside() -> None:
    clean = torch.full((1, 3, 1, 1), 100 / 255)
    budget = pixels255(2.75, 1)
    above = project(clean + 1, clean, budget)
    assert above.mul(255).flatten().tolist() == pytest.approx([102.75] * 3)
    assert quantize_inside(above, clean, budget).mul(255).round().flatten().tolist() == [102] * 3
    assert quantize_inside(project(clean - 1, clean, budget), clean, budget).mul(255).round()[0, 0, 0, 0] == 98


def test_rounding_is_to_the_nearest_level_and_never_down() -> None:
    clean = torch.full((1, 3, 1, 4), 100 / 255)
    moved = torch.tensor([100.4, 100.6, 99.6, 99.4]) / 255
    recorded = quantize_inside(moved.expand_as(clean), clean, pixels255(8, 1))
    assert recorded[0, 0, 0].mul(255).round().tolist() == [100, 101, 100, 99]


def test_quantizing_wants_an_eight_bit_origin() -> None:
    with pytest.raises(ValueError, match="8-bit values"):
        quantize_inside(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.3), pixels255(8, 1))


def test_budget_and_images_must_agree_on_channels() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        project(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), pixels255(8, 1))


# ---- the loop --------------------------------------------------------------------------------------------------------


def linear(weights: Tensor):
    return lambda images: (images * weights).flatten(1).sum(1)


def test_one_round_is_the_sign_formula() -> None:
    clean = images_8bit(4)
    weights = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(1))
    for budget in (pixels255(8, 3), Budget.from_config(0.2, 0.05, "normalized", std=CLIP_STD)):
        step, eps = (torch.tensor(value).view(3, 1, 1) for value in (budget.step, budget.eps))
        expected = (clean + step * weights.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
        assert torch.equal(BIM(budget, 1)(linear(weights), clean), expected)


def test_many_rounds_end_on_the_boundary_and_ascend() -> None:
    clean = images_8bit(3)
    weights = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(2))
    rounds = list(BIM(pixels255(4, 1), 10).iterate(linear(weights), clean))
    assert [state.index for state in rounds] == list(range(11))
    assert rounds[0].health is None
    values = torch.stack([linear(weights)(state.images) for state in rounds])
    assert (values.diff(dim=0) >= -1e-5).all()
    corner = (clean + 4 / 255 * weights.sign()).clamp(0, 1)
    torch.testing.assert_close(rounds[-1].images, corner, atol=1e-6, rtol=0)
    torch.testing.assert_close(rounds[4].images, corner, atol=1e-6, rtol=0)
    assert not torch.equal(rounds[3].images, corner)


def test_a_step_of_zero_changes_no_bit() -> None:
    clean = images_8bit(3)
    objective = linear(torch.full(clean.shape[1:], math.nan))
    for budget in (pixels255(8, 1), Budget.from_config(0.31, 0.1, "normalized", std=CLIP_STD), pixels255(0, 0)):
        attacked = BIM(budget.without_step(), 7)(objective, clean)
        assert torch.equal(attacked, clean)
        assert torch.equal(quantize_inside(attacked, clean, budget.without_step()), clean)


def test_images_are_never_changed_in_place_nor_left_with_gradients() -> None:
    clean = images_8bit(2)
    before = clean.clone()
    last = list(BIM(pixels255(8, 2), 3).iterate(linear(torch.ones(clean.shape[1:])), clean))[-1]
    assert torch.equal(clean, before)
    assert clean.grad is None
    assert not clean.requires_grad
    assert not last.images.requires_grad


def test_gradient_is_taken_even_where_the_caller_turned_gradients_off() -> None:
    clean = images_8bit(2)
    with torch.no_grad():
        attacked = BIM(pixels255(8, 8), 1)(linear(torch.ones(clean.shape[1:])), clean)
    assert torch.equal(attacked, (clean + 8 / 255).clamp(0, 1).minimum(clean + 8 / 255))


def test_an_image_does_not_feel_its_neighbours() -> None:
    clean = images_8bit(5)
    attack = BIM(pixels255(8, 1), 6)

    def objective(images: Tensor) -> Tensor:
        return (images * 40).sin().flatten(1).sum(1)

    together = attack(objective, clean)
    apart = torch.cat([attack(objective, image[None]) for image in clean])
    assert torch.equal(together, apart)

    def poisoned(images: Tensor) -> Tensor:  # the middle image's value and gradient are NaN
        return objective(images) * torch.tensor([1, 1, math.nan, 1, 1])

    attacked = attack(poisoned, clean)
    assert torch.equal(attacked[[0, 1, 3, 4]], together[[0, 1, 3, 4]])
    assert torch.equal(attacked[2], clean[2])


def test_zero_and_nonfinite_gradients_are_counted_per_image_and_do_not_spread() -> None:
    clean = torch.full((3, 3, 2, 2), 0.5)
    weights = torch.ones(3, 3, 2, 2)
    weights[1, 0] = 0  # a third of the second image's elements
    weights[2, 0, 0, 0] = math.nan
    weights[2, 0, 0, 1] = math.inf
    weights[2, 1, 0, 0] = -math.inf
    budget = pixels255(8, 2)
    last = list(BIM(budget, 3).iterate(linear(weights), clean))[-1]
    assert last.health is not None
    assert last.health.zero.tolist() == pytest.approx([0, 1 / 3, 0])
    assert last.health.nonfinite.tolist() == pytest.approx([0, 0, 3 / 12])
    assert last.images.isfinite().all()
    moved = ((last.images - clean) * 255).round()
    assert (moved[0] == 6).all()
    assert (moved[1, 0] == 0).all()
    assert moved[2, 0, 0].tolist() == [0, 6]  # NaN stays, infinity has a sign
    assert moved[2, 1, 0, 0] == -6


def test_health_averages_the_rounds() -> None:
    clean = torch.full((1, 3, 2, 2), 0.5)
    rounds = BIM(pixels255(8, 2), 4).iterate(
        lambda images: (images - 0.5).relu().flatten(1).sum(1) + 0 * images.sum((1, 2, 3)), clean
    )
    shares = [state.health.zero.item() for state in rounds if state.health is not None]
    assert shares == [1, 1, 1, 1]
    calls = iter([1.0, 0.0, 0.0, 1.0])
    rounds = BIM(pixels255(8, 2), 4).iterate(lambda images: next(calls) * images.flatten(1).sum(1), clean)
    shares = [state.health.zero.item() for state in rounds if state.health is not None]
    assert shares == pytest.approx([0, 1 / 2, 2 / 3, 1 / 2])


@pytest.mark.parametrize(
    ("objective", "images", "message"),
    [
        (lambda images: images.sum(), images_8bit(2), "one value an image"),
        (lambda images: images.flatten(1), images_8bit(2), "one value an image"),
        (lambda images: images.detach().flatten(1).sum(1), images_8bit(2), "no gradient"),
        (lambda images: images.flatten(1).sum(1), images_8bit(2) * 255, r"lie in \[0, 1\]"),
        (lambda images: images.flatten(1).sum(1), images_8bit(2) - 0.5, r"lie in \[0, 1\]"),
        (lambda images: images.flatten(1).sum(1), images_8bit(2) * math.nan, r"lie in \[0, 1\]"),
        (lambda images: images.flatten(1).sum(1), images_8bit(2)[0], "floating point"),
        (lambda images: images.flatten(1).sum(1), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "floating point"),
    ],
)
def test_unusable_objectives_and_images_are_refused(objective, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BIM(pixels255(8, 1), 2)(objective, images)


def test_seeds_must_be_one_an_image() -> None:
    with pytest.raises(ValueError, match="one number an image, 3"):
        RandomSigns(pixels255(8, 1), 2)(linear(torch.ones(3, 6, 6)), images_8bit(3), seeds=[1, 2])


# ---- controls --------------------------------------------------------------------------------------------------------


def test_random_signs_depend_on_the_seed_alone() -> None:
    clean = images_8bit(6)
    attack, seeds = RandomSigns(pixels255(8, 1), 9), [11, 12, 13, 14, 2**63 - 1, 0]

    def objective(images: Tensor) -> Tensor:
        raise AssertionError("random signs ask for no gradient")

    together = attack(objective, clean, seeds=seeds)
    assert torch.equal(together, attack(objective, clean, seeds=seeds))
    order = [4, 0, 5, 2, 1, 3]
    split = torch.cat(
        [attack(objective, clean[part], seeds=[seeds[i] for i in part]) for part in (order[:1], order[1:3], order[3:])]
    )
    assert torch.equal(split, together[order])
    other = attack(objective, clean, seeds=[seed ^ 1 for seed in seeds])
    assert all(not torch.equal(a, b) for a, b in zip(other, together, strict=True))


def test_random_signs_walk_as_far_as_bim_in_one_round_and_stay_in_the_ball() -> None:
    clean = torch.full((4, 3, 16, 16), 0.5)
    rounds = list(RandomSigns(pixels255(4, 1), 60).iterate(linear(torch.ones(3, 16, 16)), clean))
    first = ((rounds[1].images - clean) * 255).round()
    assert first.unique().tolist() == [-1, 1]
    assert abs(first.mean()) < 0.1  # 3,072 coin flips: five standard deviations
    assert ((rounds[-1].images - clean).abs() * 255).max() == pytest.approx(4, abs=1e-4)
    assert rounds[-1].health is None
    assert not torch.equal(rounds[2].images - rounds[1].images, rounds[1].images - clean)


def test_blank_is_one_grey_eight_bit_image() -> None:
    blank = blank_like(images_8bit(2))
    assert blank.shape == (2, 3, 6, 6)
    assert blank.unique().mul(255).tolist() == [128]


# ---- objectives ------------------------------------------------------------------------------------------------------


def test_token_cross_entropy_is_each_references_own_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    targets[1, 2:] = -100
    targets[2, :4] = -100
    values = token_cross_entropy(logits, targets)
    for row in range(3):
        assert values[row] == pytest.approx(F.cross_entropy(logits[row], targets[row]).item(), rel=1e-6)
    half = token_cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_cross_entropy(logits.bfloat16().float(), targets), rtol=0, atol=0)


def test_padding_does_not_change_the_objective_even_where_its_logits_are_nan() -> None:
    logits, targets = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(4)), torch.tensor([[1, 2], [3, 4]])
    padded = F.pad(targets, (0, 2), value=-100)
    broken = logits.clone()
    broken[:, 2:] = math.nan
    torch.testing.assert_close(token_cross_entropy(broken, padded), token_cross_entropy(logits[:, :2], targets))


# ---- any classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network that tells three textures apart, its test images (8-bit) and their labels."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(12.0)
    waves = torch.stack([torch.sin(grid * 0.9), torch.sin(grid * 1.7), torch.sin(grid * 2.5)])
    labels = torch.randint(0, 3, (240,), generator=generator)
    images = 0.5 + 0.12 * waves[labels][:, None, None, :] + 0.08 * torch.randn(240, 3, 12, 12, generator=generator)
    images = images.clamp(0, 1).mul(255).round() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.GELU(), nn.Flatten(), nn.Linear(8 * 64, 3))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images[:160]), labels[:160]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    return model, images[160:], labels[160:]


def naive_bim(model: nn.Module, images: Tensor, labels: Tensor, eps: float, step: float, rounds: int) -> Tensor:
    """BIM as a textbook writes it, one image at a time and through the loss's mean."""
    results = []
    for image, label in zip(images, labels, strict=True):
        adversarial = image.clone()
        for _ in range(rounds):
            adversarial = adversarial.clone().requires_grad_(True)
            F.cross_entropy(model(adversarial[None]), label[None]).backward()
            moved = adversarial.detach() + step * torch.sign(adversarial.grad)
            adversarial = torch.clamp(image + torch.clamp(moved - image, -eps, eps), 0, 1)
        results.append(adversarial)
    return torch.stack(results)


def test_bim_equals_a_naive_one_on_a_classifier_and_beats_random_signs(
    classifier: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = classifier
    budget = pixels255(32, 4)

    def accuracy(inputs: Tensor) -> float:
        return (model(inputs).argmax(1) == labels).float().mean().item()

    def objective(inputs: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), labels, reduction="none")

    attacked = BIM(budget, 12)(objective, images)
    expected = naive_bim(model, images, labels, 32 / 255, 4 / 255, 12)
    # A gradient within float noise of zero may change sign with the batch; all other pixels must agree.
    same = ((attacked - expected).abs() < 1e-5).float().mean()
    assert same > 0.999
    assert accuracy(images) > 0.95
    assert accuracy(quantize_inside(attacked, images, budget)) < 0.2
    assert accuracy(RandomSigns(budget, 12)(objective, images)) > 0.9
