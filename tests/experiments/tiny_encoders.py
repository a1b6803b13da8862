"""Text encoders of several families, tiny and with random weights, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def _tokenizer(folder: Path) -> None:
    """A word tokenizer without `model_max_length`, as those of DeBERTa and T5."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "dog", "cat", "runs", "the", "is", "running"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def tiny_encoder(folder: Path, family: str, layers: int = 4) -> Path:
    """Writes one: "t5", "deberta" or "bart"."""
    torch.manual_seed(0)
    if family == "t5":
        config = transformers.T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_decoder_layers=2, num_heads=2
        )
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    elif family == "deberta":
        config = transformers.DebertaV2Config(
            vocab_size=20, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
            relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, max_position_embeddings=64,
        )  # fmt: skip
        transformers.DebertaV2Model(config).save_pretrained(folder)
    else:
        config = transformers.BartConfig(
            vocab_size=20, d_model=16, encoder_layers=layers, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        transformers.BartModel(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder
