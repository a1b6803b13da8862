"""Models of transformers' classes, tiny and with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from prsl_kernels import apply_prsl

VOCAB, LENGTH, BATCH, IMAGE = 61, 9, 8, 16
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {
    **SMALL,
    **SPECIAL,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BART = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 1,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def vision_encoder_decoder(seed: int = 0, decoder: Any = None) -> Any:
    torch.manual_seed(seed)
    if decoder is None:
        decoder = tf.GPT2Config(**GPT2, **NO_DROPOUT, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VIT), decoder)
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    return tf.VisionEncoderDecoderModel(config)


def blip2(text_config: Any = None) -> Any:
    torch.manual_seed(0)
    config = tf.Blip2Config(
        vision_config={**VIT, "initializer_range": 0.02, "hidden_act": "gelu"},
        qformer_config={
            **SMALL,
            "intermediate_size": 32,
            "encoder_hidden_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=text_config or tf.OPTConfig(**OPT),
        num_query_tokens=3,
        image_token_index=3,
    )
    model = tf.Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)  # zero in a model made from a configuration
    return model


def causal(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        cls = getattr(tf, name)
        return cls(cls.config_class(**settings))

    return make


# One of each way to call the loss: keywords or positions, config or attribute for the vocabulary, loss_type or none,
# an auxiliary loss added to it (Mixtral), an encoder's class turned decoder (Bert).
SHIFTED: dict[str, Callable[[], Any]] = {
    "Blip2-OPT": blip2,
    "GPT2LMHeadModel": causal("GPT2LMHeadModel", **GPT2, **NO_DROPOUT),
    "OPTForCausalLM": causal("OPTForCausalLM", **OPT),
    "LlamaForCausalLM": causal("LlamaForCausalLM", **LLAMA),
    "Qwen2ForCausalLM": causal("Qwen2ForCausalLM", **LLAMA),
    "GPTNeoXForCausalLM": causal("GPTNeoXForCausalLM", **{**LLAMA, "hidden_dropout": 0.0}),
    "BloomForCausalLM": causal("BloomForCausalLM", vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2),
    "MixtralForCausalLM": causal("MixtralForCausalLM", **LLAMA, num_local_experts=2, output_router_logits=True),
    "BertLMHeadModel": causal(
        "BertLMHeadModel", **SMALL, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}
ALIGNED: dict[str, Callable[[], Any]] = {
    "VisionEncoderDecoder-GPT2": vision_encoder_decoder,
    "VisionEncoderDecoder-TrOCR": lambda: vision_encoder_decoder(
        decoder=tf.TrOCRConfig(**BART, is_decoder=True, add_cross_attention=True, cross_attention_hidden_size=16)
    ),
    **{
        name: causal(name, **BART)
        for name in (
            "BartForCausalLM",
            "BlenderbotForCausalLM",
            "BlenderbotSmallForCausalLM",
            "MBartForCausalLM",
            "MarianForCausalLM",
            "MvpForCausalLM",
            "PLBartForCausalLM",
            "PegasusForCausalLM",
            "TrOCRForCausalLM",
            "WhisperForCausalLM",
        )
    },
    "CpmAntForCausalLM": causal(
        "CpmAntForCausalLM",
        **{**SMALL, "dim_head": 8, "dim_ff": 32, "prompt_length": 2},
    ),
    "BigBirdPegasusForCausalLM": causal("BigBirdPegasusForCausalLM", **BART, attention_type="original_full"),
}
MODELS = {**SHIFTED, **ALIGNED}
FAMILIES = ("VisionEncoderDecoder-GPT2", "Blip2-OPT", "GPT2LMHeadModel")


def batch(model: Any, size: int = BATCH, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs with labels of uneven lengths, padding ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCAB, (size, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
    padding = torch.arange(LENGTH) >= lengths
    labels = tokens.masked_fill(padding, -100)
    pixels = torch.randn(size, 3, IMAGE, IMAGE, generator=generator)
    if isinstance(model, tf.VisionEncoderDecoderModel):
        return {"pixel_values": pixels, "labels": labels}
    inputs = {"input_ids": tokens, "attention_mask": (~padding).long(), "labels": labels}
    if isinstance(model, tf.Blip2ForConditionalGeneration):
        images = torch.full((size, 3), 3)
        return {
            "pixel_values": pixels,
            "input_ids": torch.cat([images, tokens], 1),
            "attention_mask": torch.cat([torch.ones_like(images), inputs["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(images, -100), labels], 1),
        }
    return inputs


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def aligned_logits(model: Any, output: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, V) logits and their targets, from the definition of the two conventions."""
    logits = output.logits
    if not isinstance(model, (tf.VisionEncoderDecoderModel, tf.BartForCausalLM)):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.reshape(-1, VOCAB), labels.reshape(-1)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.inputs.items()}


def first_step(
    name: str, tmp_path: Path, size: int, accumulation: int, b: float | None, fused: bool = False
) -> tuple[dict[str, torch.Tensor], float, float]:
    """The weights after one step of plain gradient descent, the logged loss and gradient norm."""
    model = MODELS[name]()
    inputs = batch(model)
    if b is not None:
        apply_prsl(model, k=5, b=b, fused_linear=fused)
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=1e9,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Rows(inputs),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    return {key: value.clone() for key, value in model.state_dict().items()}, log["loss"], log["grad_norm"]
