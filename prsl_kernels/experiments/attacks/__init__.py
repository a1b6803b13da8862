"""Attacks on images, their controls, and the stage that records what a model says of them."""

from prsl_kernels.experiments.attacks.bim import BIM
from prsl_kernels.experiments.attacks.budget import Budget, project, quantize_inside
from prsl_kernels.experiments.attacks.controls import RandomSigns, blank_like
from prsl_kernels.experiments.attacks.iterate import GradientHealth, IterativeAttack, Round
from prsl_kernels.experiments.attacks.objectives import Objective, text_objective, token_cross_entropy

__all__ = [
    "BIM",
    "Budget",
    "GradientHealth",
    "IterativeAttack",
    "Objective",
    "RandomSigns",
    "Round",
    "blank_like",
    "project",
    "quantize_inside",
    "text_objective",
    "token_cross_entropy",
]
