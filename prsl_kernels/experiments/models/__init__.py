"""The models of the experiment behind one interface, and the small ones that are shipped with it."""

from prsl_kernels.experiments.models.loading import BASES, SHIPPED
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.models.tiny import tiny_blip2, tiny_vit_gpt2
from prsl_kernels.experiments.models.wrapper import VisionLanguageModel

__all__ = ["BASES", "SHIPPED", "Preprocessing", "VisionLanguageModel", "tiny_blip2", "tiny_vit_gpt2"]
