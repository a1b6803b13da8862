"""From a recipe to attacks: what the stage runs on a model, in which order, and as what evidence its rows count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prsl_kernels.experiments.attacks.apgd import APGD
from prsl_kernels.experiments.attacks.bim import BIM, MIFGSM
from prsl_kernels.experiments.attacks.budget import Budget
from prsl_kernels.experiments.attacks.controls import RandomSigns, blank_like, gaussian_noise, jpeg
from prsl_kernels.experiments.attacks.iterate import IterativeAttack
from prsl_kernels.experiments.attacks.pgd import PGD
from prsl_kernels.experiments.attacks.square import Square
from prsl_kernels.experiments.config import AttackConfig, ExtraAttack
from prsl_kernels.experiments.errors import UserError

# Clean images (N, C, H, W), the budget, a seed an image -> images that moved without an objective.
Still = Callable[[Tensor, Budget, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Plan:
    """One attack or control, on the first `images` examples (None: all).

    `attack` makes rounds, of which `recorded` are kept; a control without rounds has `still` instead. `budget` is
    None where the images are bound to none. The other fields go into the rows as they are.
    """

    name: str
    role: str
    method: str
    budget: Budget | None
    attack: IterativeAttack | None = None
    still: Still | None = None
    recorded: frozenset[int] = frozenset({0})
    objective: str = "ce"
    reference: str = "primary"
    images: int | None = None

    @property
    def last(self) -> int:
        """The last recorded round."""
        return max(self.recorded)

    @property
    def rounds(self) -> int:
        """Items of progress: the rounds and the start."""
        return 1 if self.attack is None else self.attack.total_rounds + 1


def plans(config: AttackConfig, std: Sequence[float]) -> list[Plan]:
    """The primary attack, the others, and the controls, for a model whose normaliser divides by `std`.

    Raises:
        UserError: a budget out of range, restarts or rounds that the method cannot have, or a transfer of more images
            than its attack covers; the message names the attack.
    """
    budget = Budget.from_config(config.eps, config.step, config.units, std=std)
    last = config.rounds[-1]
    found = [
        Plan(
            config.method, "primary", config.method, budget, BIM(budget, last),
            recorded=frozenset({0, *config.rounds}), objective=config.objective,
        )
    ]  # fmt: skip
    found += [_extra(config, extra, std) for extra in config.extra]
    _check_transfer(config)
    # Each round without a step begins where the one before did: what two leave unchanged, all do.
    still = min(2, last)
    rounds: dict[str, IterativeAttack] = {
        "zero-step": BIM(budget.without_step(), still),
        "random-sign": RandomSigns(budget, last),
    }
    stills: dict[str, tuple[Budget | None, Still]] = {
        "gaussian": (budget, gaussian_noise),
        "jpeg": (None, lambda clean, budget, seeds: jpeg(clean)),
        "blank": (None, lambda clean, budget, seeds: blank_like(clean)),
    }
    for name in config.controls:
        if name in rounds:
            attack = rounds[name]
            recorded = frozenset({attack.rounds})
            found.append(Plan(name, "control", name, attack.budget, attack, recorded=recorded))
        else:
            bound, move = stills[name]
            found.append(Plan(name, "control", name, bound, still=move))
    return found


def _check_transfer(config: AttackConfig) -> None:
    for extra in config.extra:
        wanted = 0 if config.transfer is None or config.transfer.attack != extra.name else config.transfer.images
        if extra.images is not None and extra.images < wanted:
            raise UserError(
                f"attack {extra.name!r}: it covers the first {extra.images} images, but transfer.images wants the "
                f"first {wanted}; raise the one or lower the other"
            )


def _extra(config: AttackConfig, extra: ExtraAttack, std: Sequence[float]) -> Plan:
    eps = config.eps if extra.eps is None else extra.eps
    step = extra.step
    if step is None:
        # The primary attack's step for its budget, and for another budget in the same proportion
        step = eps if extra.method == "fgsm" else config.step * eps / config.eps if config.eps else 0.0
        step = min(step, 2 * eps)  # the quotient may be rounded up, out of what a step may be
    try:
        budget = Budget.from_config(eps, step, config.units, std=std, norm=extra.norm)
    except UserError as error:
        raise UserError(f"attack {extra.name!r}: {error}") from None
    rounds = extra.rounds if extra.rounds is not None else (1,) if extra.method == "fgsm" else (config.rounds[-1],)
    last = rounds[-1]
    if extra.method == "fgsm" and rounds != (1,):
        raise UserError(f"attack {extra.name!r}: FGSM has one round; leave out rounds, or take bim")
    if extra.restarts > 1 and extra.method in ("bim", "fgsm", "mi-fgsm"):
        raise UserError(
            f"attack {extra.name!r}: {extra.method} draws nothing at random, so that {extra.restarts} restarts would "
            "repeat the first; leave out restarts, or take pgd or apgd"
        )
    if last % extra.restarts:
        raise UserError(
            f"attack {extra.name!r}: its last round {last} is no multiple of its {extra.restarts} restarts; rounds "
            "go on counting over the restarts, which are equally long"
        )
    length, stop = last // extra.restarts, extra.stop_above
    attack: IterativeAttack
    if extra.method in ("bim", "fgsm"):
        attack = BIM(budget, length, stop_above=stop)
    elif extra.method == "mi-fgsm":
        attack = MIFGSM(budget, length, stop_above=stop)
    elif extra.method == "pgd":
        attack = PGD(budget, length, restarts=extra.restarts, stop_above=stop)
    elif extra.method == "apgd":
        attack = APGD(budget, length, restarts=extra.restarts, stop_above=stop)
    else:
        if extra.norm != "linf":
            raise UserError(f"attack {extra.name!r}: Square is here for norm linf alone; take pgd or apgd for l2")
        attack = Square(budget, length, restarts=extra.restarts, keep="best", stop_above=stop)
    return Plan(
        extra.name, extra.role, extra.method, budget, attack,
        recorded=frozenset(rounds) - {0},  # round 0 is the clean image, which the primary attack records
        objective=extra.objective, reference=extra.reference, images=extra.images,
    )  # fmt: skip
