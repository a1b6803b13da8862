"""The models of the experiment behind one interface, and small ones: shipped, or made where they are needed."""

from prsl_kernels.experiments.models.loading import BASES, SHIPPED
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.models.tiny import tiny_blip2, tiny_vit_gpt2
from prsl_kernels.experiments.models.tiny_chat import tiny_llava, tiny_qwen2_vl
from prsl_kernels.experiments.models.wrapper import VisionLanguageModel

__all__ = [
    "BASES",
    "SHIPPED",
    "Preprocessing",
    "VisionLanguageModel",
    "tiny_blip2",
    "tiny_llava",
    "tiny_qwen2_vl",
    "tiny_vit_gpt2",
]
