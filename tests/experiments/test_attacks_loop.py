"""The loop that the attacks share: what it counts, keeps, stops and never does, over all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prsl_kernels.experiments.attacks import (
    APGD,
    BIM,
    MIFGSM,
    PGD,
    Budget,
    Ensemble,
    IterativeAttack,
    RandomSigns,
    Square,
    project,
    quantize_inside,
)

HALF = (0.5, 0.5, 0.5)
LINF = Budget.from_config(8, 3, "pixels255", std=HALF)
L2 = Budget.from_config(0.6, 0.25, "pixels", std=HALF, norm="l2")
SEEDS = [7, 2**40, 0, 3, 99]


def everyone(rounds: int = 7) -> dict[str, IterativeAttack]:
    found: dict[str, IterativeAttack] = {"square": Square(LINF, rounds)}
    for name, budget in (("linf", LINF), ("l2", L2)):
        found[f"bim-{name}"] = BIM(budget, rounds)
        found[f"mi-fgsm-{name}"] = MIFGSM(budget, rounds)
        found[f"pgd-{name}"] = PGD(budget, rounds)
        found[f"apgd-{name}"] = APGD(budget, rounds)
        found[f"random-{name}"] = RandomSigns(budget, rounds)
    return found


ATTACKS = sorted(everyone())


pytestmark = pytest.mark.usefixtures("_single_thread")


def images_8bit(count: int, size: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator).float() / 255


class Waves:
    """A bumpy objective that counts how it is asked, and can be asked of some images alone."""

    def __init__(self, count: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.phases = torch.arange(count).view(-1, 1, 1, 1).float()
        self.scale, self.dtype = scale, dtype
        self.forwards = self.gradients = self.images = 0

    def value(self, images: Tensor, phases: Tensor) -> Tensor:
        self.forwards += 1
        self.gradients += images.requires_grad
        self.images += len(images)
        weights = torch.linspace(-1, 1, images[0].numel()).view(images.shape[1:])
        scale = self.scale * torch.where(phases == 4, 0.1, 1.0)  # the fifth never gets as far as the others
        return ((images * 60 + phases).sin() * weights * scale).flatten(1).mean(1).to(self.dtype)

    def __call__(self, images: Tensor) -> Tensor:
        return self.value(images, self.phases)


class SelectableWaves(Waves):
    def select(self, indices: Tensor):
        assert len(indices), "an empty batch is nothing that a model should be asked"
        return lambda images: self.value(images, self.phases[indices])


def values_of(waves: Waves, images: Tensor) -> Tensor:
    return Waves(len(images), scale=waves.scale)(images)


# ---- the budget ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(ATTACKS),
    eps=st.one_of(st.floats(0, 0.5), st.sampled_from([0.0, 1 / 255, 8 / 255, 1e-9, 1.0])),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from([1, 2, 5]),
)
def test_every_round_of_every_attack_keeps_the_budget_and_its_file_does_to_the_last_bit(
    name: str, eps: float, seed: int, dtype: torch.dtype, size: int
) -> None:
    plain = everyone(4)[name]
    length = eps * 3 if plain.budget.norm == "l2" else eps
    budget = Budget.from_config(length, length / 2, "pixels", std=HALF, norm=plain.budget.norm)
    clean = (images_8bit(3, size, seed).double() * 255).round().to(dtype) / 255
    for state in replace(plain, budget=budget).iterate(Waves(3), clean, seeds=[seed, seed + 1, seed + 2]):
        assert state.images.dtype == dtype
        assert state.images.min() >= 0
        assert state.images.max() <= 1
        moved = (state.images - clean).double()
        recorded = quantize_inside(state.images, clean, budget)
        pixels, origin = (recorded.double() * 255).round().long(), (clean.double() * 255).round().long()
        assert torch.equal(pixels.float() / 255, recorded)
        if budget.norm == "linf":
            assert moved.abs().max() <= length + 1e-7
            assert (pixels - origin).abs().max() <= math.floor(length * 255 * (1 + 1e-12))
        else:
            assert moved.flatten(1).norm(dim=1).max() <= length * (1 + 1e-5) + 1e-6
            squares = ((pixels - origin) ** 2).flatten(1).sum(1)
            assert squares.max() <= (length * 255) ** 2 * (1 + 1e-12)
            # Each value is one of the two levels beside it, and all are the nearest where that stays inside.
            wanted = state.images.double() * 255
            assert (pixels - wanted).abs().max() < 1 + 1e-3
            nearest = wanted.round().long()
            fits = ((nearest - origin) ** 2).flatten(1).sum(1) <= math.floor((length * 255) ** 2)
            halves = ((wanted % 1) - 0.5).abs() < 1e-3
            assert torch.equal(pixels[fits] * ~halves[fits], nearest[fits] * ~halves[fits])


def test_rounding_in_l2_takes_back_as_few_values_as_it_must() -> None:
    clean = torch.full((1, 3, 1, 2), 100 / 255)
    moved = clean + torch.tensor([2.65, 1.7, -1.6, 0.4, 0.2, 0.9]).view(1, 3, 1, 2) / 255
    for limit, expected in (
        (18.0, [3, 2, -2, 0, 0, 1]),  # 9 + 4 + 4 + 1: nothing to take back
        (17.9, [3, 2, -1, 0, 0, 1]),  # -1.6 is the one nearest to where it came from
        (15.0, [3, 2, -1, 0, 0, 1]),
        (14.9, [2, 2, -1, 0, 0, 1]),
    ):
        budget = Budget.from_config(math.sqrt(limit) / 255, 0, "pixels", std=HALF, norm="l2")
        found = quantize_inside(moved, clean, budget)
        assert ((found - clean) * 255).round().flatten().tolist() == expected


def test_an_image_far_outside_an_l2_ball_is_brought_in_at_once() -> None:
    clean = torch.full((1, 3, 96, 96), 0.0)
    budget = Budget.from_config(2, 0, "pixels255", std=HALF, norm="l2")
    found = quantize_inside(torch.ones_like(clean), clean, budget)
    assert ((found * 255).round() ** 2).sum() <= 4


# ---- what it costs, keeps, and stops ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "forwards", "gradients"),
    [
        (BIM(LINF, 6), 6, 6),
        (MIFGSM(L2, 6), 6, 6),
        (PGD(LINF, 6, keep="last"), 6, 6),
        (BIM(LINF, 6, keep="best"), 7, 6),
        (APGD(LINF, 6), 7, 6),
        (PGD(L2, 6, restarts=3), 21, 18),
        (Square(LINF, 6), 7, 0),
        (RandomSigns(LINF, 6), 0, 0),
        (BIM(LINF, 0), 0, 0),
        (BIM(LINF, 6, stop_above=1e9), 6, 6),
    ],
)
def test_what_an_attack_costs(attack: IterativeAttack, forwards: int, gradients: int) -> None:
    waves = Waves(2)
    assert len(list(attack.iterate(waves, images_8bit(2)))) == attack.total_rounds + 1
    assert (waves.forwards, waves.gradients) == (forwards, gradients)


@pytest.mark.parametrize("name", ATTACKS)
def test_who_stops_reading_stops_paying(name: str) -> None:
    waves, attack = Waves(2), everyone(50)[name]
    for state in attack.iterate(waves, images_8bit(2)):
        if state.index == 3:
            break
    assert waves.forwards <= 4


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(ATTACKS), seed=st.integers(0, 2**31), nans=st.booleans())
def test_the_best_so_far_never_falls_and_restarts_never_hurt(name: str, seed: int, nans: bool) -> None:
    clean, waves = images_8bit(4, 4, seed), Waves(4)
    attack = replace(everyone(6)[name], keep="best")
    seeds = [seed + number for number in range(4)]

    def objective(images: Tensor) -> Tensor:
        values = waves(images)
        bad = nans & (images.detach().flatten(1).sum(1) * 1e4 % 3 < 1)  # a third of all places
        return torch.where(bad, math.nan, values)

    def value(images: Tensor) -> Tensor:
        return objective(images).nan_to_num(nan=-math.inf)

    once = [value(state.images) for state in attack.iterate(objective, clean, seeds=seeds)]
    assert (torch.stack(once).diff(dim=0).nan_to_num(nan=0.0) >= 0).all()
    thrice = [value(state.images) for state in replace(attack, restarts=3).iterate(objective, clean, seeds=seeds)]
    assert len(thrice) == 19
    assert torch.equal(torch.stack(thrice[:7]), torch.stack(once))
    assert (torch.stack(thrice).diff(dim=0).nan_to_num(nan=0.0) >= 0).all()


def test_restarts_of_a_random_attack_find_more_and_count_on() -> None:
    clean, waves = images_8bit(12), Waves(12)
    attack = PGD(LINF, 3, restarts=5)
    rounds = list(attack.iterate(waves, clean))
    assert [state.index for state in rounds] == list(range(16))
    first, last = values_of(waves, rounds[3].images), values_of(waves, rounds[-1].images)
    assert (last > first).float().mean() > 0.5
    with pytest.raises(ValueError, match='keep="best"'):
        BIM(LINF, 3, restarts=2)


@pytest.mark.parametrize("chooses", [True, False], ids=["select", "plain"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_does_not_feel_its_neighbours(name: str, restarts: int, chooses: bool) -> None:
    """Alone or in company, whether others are done or not, whether the objective can choose images or not."""
    clean, kind = images_8bit(5), SelectableWaves if chooses else Waves
    middle = values_of(Waves(5), clean).median().item()
    for stop in (None, middle + 0.05, middle - 0.05):  # reached by none, on the way, and by some at their start
        attack = replace(everyone(8)[name], stop_above=stop, restarts=restarts, keep="best")
        rounds = list(attack.iterate(kind(5), clean, seeds=SEEDS))
        together = torch.stack([state.images for state in rounds])
        for number in range(5):
            waves = kind(1)
            waves.phases = torch.full((1, 1, 1, 1), float(number))
            alone = list(attack.iterate(waves, clean[number : number + 1], seeds=SEEDS[number : number + 1]))
            assert torch.equal(torch.stack([state.images for state in alone])[:, 0], together[:, number])
            for one, all_of_them in zip(alone, rounds, strict=True):
                if one.health is not None and all_of_them.health is not None:
                    for field in ("zero", "nonfinite", "norm"):
                        assert getattr(one.health, field)[0] == getattr(all_of_them.health, field)[number]


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith("random")])
def test_images_that_are_done_rest_and_cost_nothing(name: str, keep: str) -> None:
    clean, rounds = images_8bit(5), 12
    attack = replace(everyone(rounds)[name], keep=keep)
    free = SelectableWaves(5)
    tops = torch.stack([values_of(free, state.images) for state in attack.iterate(free, clean, seeds=SEEDS)])
    stop = tops[: rounds // 2].amax(0).sort().values[2].item() - 1e-4  # three of five get there, half way
    waves = SelectableWaves(5)
    states = list(replace(attack, stop_above=stop).iterate(waves, clean, seeds=SEEDS))
    assert len(states) == rounds + 1
    values = torch.stack([values_of(waves, state.images) for state in states])
    done = values > stop
    assert done.any(0).sum() >= 3
    assert not done.all()
    assert waves.images < free.images
    for number in range(5):
        if done[:, number].any():
            first = int(done[:, number].nonzero()[0])
            assert all(torch.equal(state.images[number], states[first].images[number]) for state in states[first:])


def test_when_all_are_done_nothing_more_is_asked() -> None:
    clean = images_8bit(4)
    for restarts in (1, 4):
        for attack in (PGD(LINF, 9), APGD(L2, 9), Square(LINF, 9), BIM(LINF, 9)):
            waves = SelectableWaves(4)
            rounds = list(
                replace(attack, stop_above=-1e9, restarts=restarts, keep="best").iterate(waves, clean, seeds=SEEDS[:4])
            )
            assert waves.forwards == 1
            assert len(rounds) == 9 * restarts + 1
            assert torch.equal(rounds[0].images, rounds[-1].images)


def test_a_start_is_where_the_first_run_begins_inside_the_budget() -> None:
    clean = images_8bit(3)
    start = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for attack in (BIM(LINF, 2), APGD(L2, 2), Square(LINF, 2)):
        first = next(iter(attack.iterate(Waves(3), clean, start=start)))
        assert torch.equal(first.images, project(start, clean, attack.budget))
    for wrong in (start[0], start[:2], start * math.nan, start / 0):
        with pytest.raises(ValueError, match="start must be finite"):
            BIM(LINF, 2)(Waves(3), clean, start=wrong)


def test_an_objective_that_knows_parameters_but_not_the_images_is_refused() -> None:
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        BIM(LINF, 2)(lambda images: weight * images.detach().flatten(1).sum(1), images_8bit(2))


# ---- numbers at the ends of what floats hold -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e30, 1e36])
def test_the_scale_of_the_objective_changes_no_move(name: str, scale: float) -> None:
    clean, attack = images_8bit(3), everyone(5)[name]
    expected = attack(Waves(3, scale=2.0**-4), clean)
    found = attack(Waves(3, scale=2.0 ** round(math.log2(scale))), clean)
    if scale < 1e-35:  # gradients have only some bits left
        moved = (found - clean).flatten(1)
        assert (moved.abs().amax(1) > 1 / 255).all()
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_gradients_norm_is_told_at_any_scale() -> None:
    clean = images_8bit(2)
    for scale in (1e-30, 1.0, 1e25):
        health = list(BIM(LINF, 1).iterate(lambda images, s=scale: (s * images).flatten(1).sum(1), clean))[-1].health
        assert health is not None
        assert health.norm.tolist() == pytest.approx([scale * math.sqrt(108)] * 2, rel=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_half_precision_values_are_enough(name: str) -> None:
    clean, attack = images_8bit(3), replace(everyone(5)[name], keep="best")
    found = attack(Waves(3, dtype=torch.bfloat16), clean)
    assert found.dtype == torch.float32
    first = next(iter(attack.iterate(Waves(3), clean))).images
    assert (values_of(Waves(3), found) >= values_of(Waves(3), first) - 0.01).all()
    stopped = replace(attack, stop_above=-1e9)(SelectableWaves(3, dtype=torch.bfloat16), clean)
    assert torch.equal(stopped, first)


def test_apgd_leaves_a_start_that_is_not_a_number() -> None:
    clean = torch.full((1, 3, 2, 2), 0.5)
    calls = iter([math.nan] + [1.0] * 40)
    found = APGD(LINF, 40)(lambda images: next(calls) * images.flatten(1).sum(1), clean)
    assert ((found - clean) * 255).flatten().tolist() == pytest.approx([8.0] * 12, abs=1e-3)


# ---- the pieces of each attack ---------------------------------------------------------------------------------------


def test_squares_shrink_by_the_published_schedule_and_hold_extremes() -> None:
    clean = torch.full((6, 3, 40, 40), 0.5)
    calls = 0

    def rising(images: Tensor) -> Tensor:  # whatever is proposed is accepted
        nonlocal calls
        calls += 1
        return torch.full((len(images),), float(calls))

    rounds = [state.images for state in Square(LINF, 500).iterate(rising, clean)]
    assert all((images - clean).abs().sub(8 / 255).abs().max() < 1e-6 for images in rounds)
    assert all((rounds[0][:, :, :1] == rounds[0]).flatten())  # vertical stripes
    areas: dict[int, int] = {}
    places = set()
    for query, (before, after) in enumerate(itertools.pairwise(rounds)):
        for image in range(6):
            changed = (before[image] != after[image]).any(0).nonzero()
            if len(changed):
                height, width = (changed.amax(0) - changed.amin(0) + 1).tolist()
                areas[query] = max(areas.get(query, 0), height, width)
                places.add((image, *changed.amin(0).tolist()))
    for query, side in areas.items():
        at = query * 20  # of 10,000
        halvings = sum(at > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        assert side <= max(round(math.sqrt(0.8 / 2**halvings * 1600)), 1), query
    assert areas[0] >= 34  # of 36
    assert max(side for query, side in areas.items() if 51 <= query <= 100) == 6
    assert max(side for query, side in areas.items() if 101 <= query <= 200) == 4
    assert len({place[1:] for place in places}) > 300  # each image has windows of its own
    assert max(place[1] for place in places) == 39  # and they reach the border
    assert max(place[2] for place in places) == 39


def test_square_is_linf_alone() -> None:
    with pytest.raises(ValueError, match="L-infinity alone"):
        Square(L2, 5)


def test_random_signs_in_l2_walk_as_far_as_bim() -> None:
    clean = torch.full((2, 3, 8, 8), 0.5)
    rounds = list(RandomSigns(L2, 40).iterate(Waves(2), clean))
    steps = (rounds[1].images - clean).flatten(1).norm(dim=1)
    assert steps.tolist() == pytest.approx([0.25] * 2, rel=1e-5)
    assert (rounds[-1].images - clean).flatten(1).norm(dim=1).max() <= 0.6 + 1e-5


def test_the_ensemble_takes_of_each_image_the_worst() -> None:
    clean, waves = images_8bit(8), Waves(8)
    attacks = (BIM(LINF, 2), APGD(LINF, 9), Square(LINF, 9))
    seeds = list(range(8))
    singles = torch.stack([values_of(waves, attack(waves, clean, seeds=seeds)) for attack in attacks])
    both = values_of(waves, Ensemble(attacks)(waves, clean, seeds=seeds))
    assert torch.equal(both, torch.maximum(singles.amax(0), values_of(waves, clean)))
    assert len(set(singles.argmax(0).tolist())) > 1, "one attack won everywhere; the test would see no choice"
    assert torch.equal(Ensemble((BIM(LINF.without_step(), 2),))(waves, clean), clean)
