"""What a recipe will take, before it is run: stages, hours, memory, disk, each with the basis of its estimate."""

from prsl_kernels.experiments.planning.plan import Row, RunPlan, make_plan
from prsl_kernels.experiments.planning.table import render

__all__ = ["Row", "RunPlan", "make_plan", "render"]
