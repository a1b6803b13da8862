"""The attacks against those of torchattacks 3.5.1, on the same classifier, the same images and from the same start.

torchattacks carries the published code of Auto-PGD and Square, and its own of the others. All in float64: in float32
the last bit of a gradient decides after some rounds which way an image goes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torchattacks
from colour_classifier import recognised, trained
from torch import Tensor, nn
from torch.nn import functional as F

from prsl_kernels.experiments.attacks import APGD, BIM, MIFGSM, PGD, Budget, Ensemble, IterativeAttack, Square
from prsl_kernels.experiments.attacks.objectives import token_dlr, token_margin

HALF = (0.5, 0.5, 0.5)
EPS, STEP = 8, 2  # levels of 8 bits
COUNT = 64  # a power of two: torchattacks divides its loss by it, which then changes no bit of a sign
LINF = Budget.from_config(EPS, STEP, "pixels255", std=HALF)
L2 = Budget.from_config(1.0, 0.2, "pixels", std=HALF, norm="l2")
NOISE = 1e-9  # of pixels that differ by what the peers add to a length before they divide by it, 1e-12

Attacked = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="module")
def float64_and_one_thread() -> Iterator[None]:
    """The same sums in the same order, whatever the machine; the peers make tensors of the default type."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def attacked(float64_and_one_thread: None) -> Attacked:
    """The colour classifier in float64, 8-bit images that it recognises, and their labels."""
    model = copy.deepcopy(trained(0))
    images, labels = recognised(model, COUNT)
    return model.double(), (images * 255).round().double() / 255, labels


def cross_entropy(model: nn.Module, labels: Tensor, sign: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda images: sign * F.cross_entropy(model(images), labels, reduction="none")


def as_tokens(model: nn.Module, labels: Tensor, objective: Callable[[Tensor, Tensor], Tensor]):
    """A classifier is a model that says one token."""
    return lambda images: objective(model(images)[:, None], labels[:, None])


def accuracy(attacked: Attacked, images: Tensor) -> float:
    model, _, labels = attacked
    return (model(images).argmax(1) == labels).float().mean().item()


def assert_same(ours: Tensor, theirs: Tensor, clean: Tensor, noise: float = NOISE) -> None:
    assert (ours - theirs).abs().max() <= noise
    assert (ours - clean).abs().amax((1, 2, 3)).min() > 1 / 255  # every image has moved


# ---- steps of one length ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ["bim", "fgsm", "mi-fgsm"])
def test_sign_attacks_from_the_clean_image(attacked: Attacked, name: str, sign: int) -> None:
    model, images, labels = attacked
    ours, theirs = {
        "bim": (BIM(LINF, 10), torchattacks.BIM(model, eps=EPS / 255, alpha=STEP / 255, steps=10)),
        "fgsm": (BIM(replace(LINF, step=LINF.eps), 1), torchattacks.FGSM(model, eps=EPS / 255)),
        "mi-fgsm": (
            MIFGSM(LINF, 10, decay=0.9),
            torchattacks.MIFGSM(model, eps=EPS / 255, alpha=STEP / 255, steps=10, decay=0.9),
        ),
    }[name]
    wanted = labels if sign > 0 else (labels + 1) % 8
    if sign < 0:
        theirs.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 8, quiet=True)
    found = ours(cross_entropy(model, wanted, sign), images)
    assert_same(found, theirs(images, labels), images)
    assert accuracy(attacked, found) < 1


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_from_the_same_random_start(attacked: Attacked, norm: str, sign: int) -> None:
    model, images, labels = attacked
    if norm == "linf":
        theirs = torchattacks.PGD(model, eps=EPS / 255, alpha=STEP / 255, steps=10)
        torch.manual_seed(3)
        start = images + torch.empty_like(images).uniform_(-EPS / 255, EPS / 255)
    else:
        theirs = torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=10, eps_for_division=1e-30)
        torch.manual_seed(3)
        direction = torch.empty_like(images).normal_()
        length = torch.empty(COUNT, 1, 1, 1).uniform_(0, 1)
        start = images + direction * (length / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    if sign < 0:
        theirs.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 8, quiet=True)
    torch.manual_seed(3)
    expected = theirs(images, labels)
    objective = cross_entropy(model, labels if sign > 0 else (labels + 1) % 8, sign)
    last = PGD(LINF if norm == "linf" else L2, 10, keep="last")(objective, images, start=start)
    assert_same(last, expected, images)
    best = PGD(LINF if norm == "linf" else L2, 10)(objective, images, start=start)
    assert (objective(best) >= objective(last)).all()


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize("budget", [LINF, L2], ids=["linf", "l2"])
def test_random_starts_are_spread_as_the_peers_are(
    attacked: Attacked, attack: type[IterativeAttack], budget: Budget
) -> None:
    """Compared by the mean and the spread of the distance from the clean image, in the attack's own norm."""
    clean = torch.full((256, 3, 8, 8), 0.5)
    ours = next(iter(attack(budget, 0).iterate(lambda images: images.flatten(1).sum(1), clean))).images - clean
    generator = torch.Generator().manual_seed(5)
    if budget.norm == "linf":
        theirs = 2 * torch.rand(clean.shape, generator=generator) - 1
        if attack is APGD:
            theirs = theirs / theirs.abs().amax((1, 2, 3), keepdim=True)
        ours = ours / (EPS / 255)
        sizes, expected = ours.abs().amax((1, 2, 3)), theirs.abs().amax((1, 2, 3))
    else:
        theirs = torch.randn(clean.shape, generator=generator)
        theirs = theirs / theirs.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        if attack is PGD:
            theirs = theirs * torch.rand(256, 1, 1, 1, generator=generator)
        sizes, expected = ours.flatten(1).norm(dim=1), theirs.flatten(1).norm(dim=1)
    assert sizes.max() <= 1 + 1e-5
    assert sizes.mean().item() == pytest.approx(expected.mean().item(), abs=0.08)
    assert sizes.std().item() == pytest.approx(expected.std().item(), abs=0.05)
    assert ours.mean().abs() < 0.01
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


# ---- Auto-PGD --------------------------------------------------------------------------------------------------------


def published(model: nn.Module, norm: str, loss: str, rounds: int, *, of_the_paper: bool):
    """The published Auto-PGD; `of_the_paper` takes a quirk out of it.

    At the first checkpoint it asks whether the first round raised the loss by comparing with the last entry of an
    array that has not been filled, 0, where the paper has the loss of the start.
    """

    class Corrected(torchattacks.APGD):
        def check_oscillation(self, x, j, k, y5, k3=0.75):
            if j - k == -1:
                x = x.copy()
                x[-1] = self.start_values
            return super().check_oscillation(x, j, k, y5, k3)

    kind = Corrected if of_the_paper else torchattacks.APGD
    return kind(model, norm=norm, eps=EPS / 255 if norm == "Linf" else 1.0, steps=rounds, loss=loss)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("rounds", [7, 40])
def test_apgd_from_the_same_start(attacked: Attacked, norm: str, loss: str, rounds: int) -> None:
    model, images, labels = attacked
    objective = cross_entropy(model, labels) if loss == "ce" else as_tokens(model, labels, token_dlr)
    torch.manual_seed(7)
    if norm == "Linf":
        offset = 2 * torch.rand(images.shape) - 1
        start = images + EPS / 255 * offset / offset.abs().amax((1, 2, 3), keepdim=True)
    else:
        offset = torch.randn(images.shape)
        start = images + offset / (offset**2).sum((1, 2, 3), keepdim=True).sqrt()
    attack, seen = APGD(LINF if norm == "Linf" else L2, rounds), []

    def recorded(inputs: Tensor) -> Tensor:
        values = objective(inputs)
        seen.append(values.detach())
        return values

    ours = attack(recorded, images, start=start)
    values = torch.stack(seen).amax(0)
    # Where the right class is third, DLR is 1 with a gradient of 0, of which each code sees rounding noise.
    steep = ((torch.stack(seen) - 1).abs() > 1e-9).all(0) if loss == "dlr" else torch.ones(COUNT, dtype=torch.bool)
    assert steep.float().mean() > 0.8

    peer = published(model, norm, loss, rounds, of_the_paper=True)
    peer.start_values = objective(start.clamp(0, 1)).numpy()
    torch.manual_seed(7)
    best_values, best_images = peer.perturb(images, labels, best_loss=True)
    torch.testing.assert_close(values[steep], best_values[steep], rtol=1e-9, atol=1e-9)
    noise = rounds * 1e-10  # the peer adds its 1e-12 three times a round, and later rounds magnify it
    assert_same(ours[steep], best_images[steep], images[steep], noise)

    # As it was published, only those images may differ of which the quirk sees the first round otherwise.
    torch.manual_seed(7)
    best_values, best_images = published(model, norm, loss, rounds, of_the_paper=False).perturb(
        images, labels, best_loss=True
    )
    alike = steep & ((seen[1] > 0) == (seen[1] > seen[0]))
    assert alike.sum() > 5
    torch.testing.assert_close(values[alike], best_values[alike], rtol=1e-9, atol=1e-9)
    assert_same(ours[alike], best_images[alike], images[alike], noise)
    assert accuracy(attacked, ours) == pytest.approx(accuracy(attacked, best_images), abs=0.05)


# ---- random search ---------------------------------------------------------------------------------------------------


def test_square_succeeds_as_often_as_the_published_one(attacked: Attacked) -> None:
    """Ours draws a window for each image, theirs one for all of them: other numbers, the same attack."""
    model, images, labels = attacked
    objective = as_tokens(model, labels, token_margin)
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(3):
        found = Square(LINF, 100, stop_above=0.0)(
            objective, images, seeds=[seed * COUNT + number for number in range(COUNT)]
        )
        rates["ours"].append(1 - accuracy(attacked, found))
        peer = torchattacks.Square(model, norm="Linf", eps=EPS / 255, n_queries=100, seed=seed, loss="margin")
        peer.rescale_schedule = True
        rates["theirs"].append(1 - accuracy(attacked, peer(images, labels)))
    ours, theirs = (torch.tensor(rates[name]) for name in ("ours", "theirs"))
    assert 0.1 < theirs.mean() < 0.95, "the budget must leave something to tell apart"
    # Three runs over 64 images: the standard error of each mean is below 0.5 / sqrt(192).
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=3 * 2**0.5 * 0.5 / 192**0.5)
    assert ours.std() < 0.1


@pytest.mark.parametrize("queries", [64, 150, 1000, 10_000])
def test_squares_schedule_is_the_published_one(attacked: Attacked, queries: int) -> None:
    peer = torchattacks.Square(attacked[0], n_queries=queries)
    peer.rescale_schedule = True
    ours = Square(LINF, queries)
    assert [ours.share(query) for query in range(queries)] == [peer.p_selection(query) for query in range(queries)]


# ---- the worst of several --------------------------------------------------------------------------------------------


def test_robust_accuracy_of_the_ensemble_is_that_of_the_peers_worst_case(attacked: Attacked) -> None:
    model, images, labels = attacked
    budget = Budget.from_config(4, 1, "pixels255", std=HALF)
    margin = as_tokens(model, labels, token_margin)
    found = Ensemble((APGD(budget, 30, stop_above=0.0), Square(budget, 60, stop_above=0.0)))(margin, images)
    peers = [
        torchattacks.APGD(model, eps=4 / 255, steps=30, loss="ce"),
        torchattacks.APGD(model, eps=4 / 255, steps=30, loss="dlr"),
        torchattacks.APGDT(model, eps=4 / 255, steps=30, n_classes=8),
        torchattacks.Square(model, eps=4 / 255, n_queries=60),
    ]
    survivors = torch.stack([model(peer(images, labels)).argmax(1) == labels for peer in peers]).all(0)
    ours = model(found).argmax(1) == labels
    assert 0 < survivors.float().mean() < 1
    assert (ours != survivors).sum() <= 2
