"""Small members of the families that chat, made from nothing: the code paths of large models in a second on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from prsl_kernels.experiments.files import cache_root

_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tiny_llava(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 64, layers: int = 2, side: int = 64, patch: int = 16
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights from torch's generator, of a CLIP and a Llama of the same width."""
    heads = max(1, width // 32)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        **_ids(tokenizer),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, num_beams=1, **_ids(tokenizer))
    return model


def tiny_qwen2_vl(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 64, layers: int = 2, patch: int = 8
) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL with random weights from torch's generator; adds the tokens of its chat to the tokenizer.

    It takes images of any size that is a multiple of two patches.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN_TOKENS)})
    tokenizer.eos_token = "<|im_end|>"
    tokens = dict(zip(_QWEN_TOKENS, tokenizer.convert_tokens_to_ids(list(_QWEN_TOKENS)), strict=True))
    heads = max(1, width // 32)
    head = width // heads
    config = Qwen2VLConfig(
        vision_config={
            "depth": layers,
            "embed_dim": width,
            "hidden_size": width,
            "num_heads": heads,
            "mlp_ratio": 2,
            "patch_size": patch,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 512,
            # Shares of half a head for the place in time, in rows and in columns
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 8, head // 8 + head // 16, head // 8 + head // 16],
            },
            **_ids(tokenizer),
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, num_beams=1, **_ids(tokenizer))
    return model


_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and deviation
MADE: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "tiny-llava": tiny_llava,
    "tiny-qwen2-vl": tiny_qwen2_vl,
}


def made_base(name: str) -> Path:
    """The folder of a model in `MADE`, random weights of seed 0, made in the cache where it is not there yet."""
    from prsl_kernels.experiments.data.cache import build_verified
    from prsl_kernels.experiments.data.tokenizer import build_tokenizer
    from prsl_kernels.experiments.models.preprocessing import Preprocessing
    from prsl_kernels.experiments.models.wrapper import VisionLanguageModel

    def build(folder: Path) -> None:
        tokenizer = build_tokenizer(2000)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MADE[name](tokenizer)
        VisionLanguageModel(model, tokenizer, Preprocessing(64, *_CLIP)).write_files(folder, dtype=torch.float32)

    folder = cache_root() / "bases" / name
    build_verified(folder, build, stamp={"transformers": metadata.version("transformers")})
    return folder


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
