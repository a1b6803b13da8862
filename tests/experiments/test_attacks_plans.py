"""From a recipe to attacks: names, rounds, budgets, and the recipes that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from prsl_kernels.experiments.attacks import APGD, BIM, MIFGSM, PGD, Square
from prsl_kernels.experiments.attacks.plans import plans
from prsl_kernels.experiments.config import AttackConfig, ExtraAttack, TransferConfig
from prsl_kernels.experiments.errors import UserError

STD = (0.5, 0.5, 0.25)


def config(*extra: ExtraAttack, **changes: Any) -> AttackConfig:
    return AttackConfig(**({"eps": 8, "step": 2, "rounds": (0, 1, 4), "extra": extra} | changes))


def test_the_primary_attack_comes_first_then_the_others_then_the_controls() -> None:
    found = plans(config(ExtraAttack("b"), ExtraAttack("a", role="probe")), STD)
    controls = ["zero-step", "random-sign", "gaussian", "jpeg", "blank"]
    assert [plan.name for plan in found] == ["bim", "b", "a", *controls]
    assert [plan.role for plan in found] == ["primary", "ensemble", "probe", *["control"] * 5]
    assert found[0].recorded == {0, 1, 4}
    assert [plan.recorded for plan in found[1:]] == [{4}, {4}, {2}, {4}, {0}, {0}, {0}]
    assert [plan.rounds for plan in found] == [5, 5, 5, 3, 5, 1, 1, 1]
    assert [plan.budget is None for plan in found] == [False] * 6 + [True] * 2
    assert plans(config(controls=("jpeg",), rounds=(1,)), STD)[-1].name == "jpeg"
    assert plans(config(controls=("zero-step",), rounds=(1,)), STD)[-1].recorded == {1}


@pytest.mark.parametrize(
    ("extra", "kind", "rounds", "recorded"),
    [
        (ExtraAttack("x", "fgsm"), BIM, 1, {1}),
        (ExtraAttack("x", "bim", rounds=(2, 9)), BIM, 9, {2, 9}),
        (ExtraAttack("x", "bim", rounds=(0, 9)), BIM, 9, {9}),  # the clean image is recorded once
        (ExtraAttack("x", "mi-fgsm"), MIFGSM, 4, {4}),
        (ExtraAttack("x", "pgd", restarts=4), PGD, 1, {4}),
        (ExtraAttack("x", "pgd", restarts=3, rounds=(4, 6)), PGD, 2, {4, 6}),
        (ExtraAttack("x", "apgd", restarts=2, rounds=(20,)), APGD, 10, {20}),
        (ExtraAttack("x", "square", role="query", rounds=(100,), images=3), Square, 100, {100}),
    ],
)
def test_methods_and_rounds(extra: ExtraAttack, kind: type, rounds: int, recorded: set[int]) -> None:
    plan = plans(config(extra), STD)[1]
    assert type(plan.attack) is kind
    assert plan.attack is not None
    assert plan.attack.rounds == rounds
    assert plan.attack.restarts == extra.restarts
    assert plan.attack.total_rounds == plan.last == max(recorded)
    assert plan.recorded == recorded
    assert plan.attack.budget == plan.budget
    assert plan.images == extra.images


@pytest.mark.parametrize(
    ("extra", "eps", "step"),
    [
        ({}, 8, 2),
        ({"eps": 2}, 2, 0.5),
        ({"eps": 64}, 64, 16),
        ({"eps": 255}, 255, 63.75),
        ({"eps": 4, "step": 3}, 4, 3),
        ({"step": 1}, 8, 1),
        ({"eps": 0}, 0, 0),
        ({"method": "fgsm"}, 8, 8),
        ({"method": "fgsm", "eps": 2}, 2, 2),
        ({"method": "fgsm", "step": 3}, 8, 3),
        ({"method": "pgd", "norm": "l2", "eps": 400}, 400, 100),
    ],
)
def test_a_step_that_is_left_out_is_the_primary_ones_share_of_eps(
    extra: dict[str, Any], eps: float, step: float
) -> None:
    budget = plans(config(ExtraAttack("x", role="probe", **extra)), STD)[1].budget
    assert budget is not None
    assert budget.eps == (eps / 255,) * 3
    assert budget.step == pytest.approx((step / 255,) * 3)
    assert budget.norm == extra.get("norm", "linf")


def test_units_are_the_primary_attacks() -> None:
    budget = plans(config(ExtraAttack("x", role="eps", eps=0.4), eps=0.2, step=0.1, units="normalized"), STD)[1].budget
    assert budget is not None
    assert budget.eps == (0.2, 0.2, 0.1)
    assert budget.step == pytest.approx((0.1, 0.1, 0.05), rel=1e-12)


@pytest.mark.parametrize(
    ("extra", "changes", "words"),
    [
        (ExtraAttack("x", "bim", restarts=2), {}, "'x': bim draws nothing at random"),
        (ExtraAttack("x", "mi-fgsm", restarts=4), {}, "'x': mi-fgsm draws nothing at random"),
        (ExtraAttack("x", "fgsm", restarts=1, rounds=(1, 2)), {}, "'x': FGSM has one round"),
        (ExtraAttack("x", "pgd", restarts=3), {}, "'x': its last round 4 is no multiple of its 3 restarts"),
        (ExtraAttack("x", "square", role="query", norm="l2"), {}, "'x': Square is here for norm linf"),
        (ExtraAttack("x", step=17), {}, "'x': attack step is 17 in pixels255, longer than the ball"),
        (ExtraAttack("x", role="eps", eps=300), {}, "'x': attack eps is 300 in pixels255"),
        (
            ExtraAttack("x", "pgd", role="probe", norm="l2", eps=0.1),
            {"units": "normalized", "eps": 0.1, "step": 0.1},
            "'x': an L2 budget in normalised units",
        ),
        (
            ExtraAttack("x", role="probe", images=3),
            {"transfer": TransferConfig("x", images=4)},
            "'x': it covers the first 3 images, but transfer.images wants the first 4",
        ),
    ],
)
def test_recipes_that_cannot_be_name_the_attack(extra: ExtraAttack, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plans(config(extra, **changes), STD)
