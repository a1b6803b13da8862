"""Attacks on images, their controls, and the stage that records what a model says of them."""

from prsl_kernels.experiments.attacks.apgd import APGD
from prsl_kernels.experiments.attacks.bim import BIM, MIFGSM
from prsl_kernels.experiments.attacks.budget import Budget, project, quantize_inside
from prsl_kernels.experiments.attacks.controls import RandomSigns, blank_like, gaussian_noise, jpeg
from prsl_kernels.experiments.attacks.iterate import Ensemble, GradientHealth, IterativeAttack, Round
from prsl_kernels.experiments.attacks.objectives import Objective, TextObjective, token_cross_entropy
from prsl_kernels.experiments.attacks.pgd import PGD
from prsl_kernels.experiments.attacks.square import Square

__all__ = [
    "APGD",
    "BIM",
    "MIFGSM",
    "PGD",
    "Budget",
    "Ensemble",
    "GradientHealth",
    "IterativeAttack",
    "Objective",
    "RandomSigns",
    "Round",
    "Square",
    "TextObjective",
    "blank_like",
    "gaussian_noise",
    "jpeg",
    "project",
    "quantize_inside",
    "token_cross_entropy",
]
