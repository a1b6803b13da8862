"""Small members of both families, made from nothing, that a machine without a GPU trains in under an hour."""

from __future__ import annotations

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

IMAGE_SIZE = 64
PATCH_SIZE = 8
_WEIGHT_STD = 0.02


def tiny_vit_gpt2(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 192, vision_layers: int = 4, text_layers: int = 2
) -> VisionEncoderDecoderModel:
    """A ViT-GPT2 with random weights from torch's generator: 3.5 million parameters, images of 64 x 64 pixels.

    Heads are 64 wide: at a given width, few wide heads cost a CPU half of what many narrow ones do.
    """
    ids = _special_ids(tokenizer)
    heads = max(1, width // 64)
    encoder = ViTConfig(
        hidden_size=width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=text_layers,
        n_head=heads,
        add_cross_attention=True,
        is_decoder=True,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,
        **ids,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = ids["bos_token_id"]
    config.pad_token_id = ids["pad_token_id"]
    config.eos_token_id = ids["eos_token_id"]
    model = VisionEncoderDecoderModel(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=24, decoder_start_token_id=ids["bos_token_id"], do_sample=False, num_beams=1, **ids
    )
    return model


def tiny_blip2(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int = 128,
    vision_layers: int = 4,
    text_layers: int = 2,
    query_tokens: int = 8,
) -> Blip2ForConditionalGeneration:
    """A BLIP2-OPT with random weights from torch's generator: 2 million parameters, images of 64 x 64 pixels."""
    ids = _special_ids(tokenizer)
    heads = max(1, width // 64)
    vision = Blip2VisionConfig(
        hidden_size=width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_range=_WEIGHT_STD,  # the default of 1e-10 is made for loading weights: nothing learns from there
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        cross_attention_frequency=1,
        encoder_hidden_size=width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=ids["pad_token_id"],
    )
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        max_position_embeddings=96,
        dropout=0.0,
        **ids,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        # They start at zero, all alike: the queries would never become different from one another
        model.query_tokens.normal_(std=_WEIGHT_STD)
    model.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, num_beams=1, **ids)
    return model


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
