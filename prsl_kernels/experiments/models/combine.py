"""`prsl model combine`: a captioner from an image encoder and a language model that have not met."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, VisionEncoderDecoderModel

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models.loading import (
    check_weights,
    no_progress_bars,
    read_config,
    read_tokenizer,
    resolve,
)
from prsl_kernels.experiments.models.preprocessing import Preprocessing
from prsl_kernels.experiments.models.wrapper import VisionLanguageModel


def combine(encoder: str | Path, decoder: str | Path, out: Path, *, seed: int = 0) -> Path:
    """Writes a `VisionEncoderDecoderModel` of the weights of an image encoder and of a language model to `out`.

    Both are local folders or downloaded checkpoints of the Hub. As in the recipe by which
    nlpconnect/vit-gpt2-image-captioning was made of google/vit-base-patch16-224-in21k and gpt2 (transformers,
    examples/flax/image-captioning): the decoder gets a cross attention of new weights, drawn from `seed`; it starts
    with its own first token where it names no other; and where it has no padding it pads with its end of sequence.

    Raises:
        UserError: a checkpoint is missing, damaged or pickled, the encoder's images are not square, or the decoder
            cannot attend to an encoder or names no first or last token.
    """
    folders = resolve(encoder), resolve(decoder)
    check_weights(folders[0], "AutoModel")
    check_weights(folders[1], "AutoModelForCausalLM")
    tokenizer = read_tokenizer(folders[1])
    side = getattr(read_config(folders[0]), "image_size", None)
    preprocessing = Preprocessing.read(folders[0], side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _join(*folders)
    _settle_tokens(folders[1], model, tokenizer)
    VisionLanguageModel(model, tokenizer, preprocessing).save_pretrained(out, dtype=torch.float32)
    return out


def _join(encoder: Path, decoder: Path) -> VisionEncoderDecoderModel:
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    attending = read_config(decoder)
    attending.is_decoder = attending.add_cross_attention = True
    try:
        with no_progress_bars():
            model = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(
                str(encoder),
                str(decoder),
                decoder_config=attending,
                **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in options.items()},
            )
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{encoder} and {decoder} do not make an image encoder and a language model ({error}); give, for example, "
            "google/vit-base-patch16-224-in21k and openai-community/gpt2"
        ) from error
    if not any("crossattention" in name or "encoder_attn" in name for name, _ in model.decoder.named_parameters()):
        raise UserError(f"{decoder}: a {type(model.decoder).__name__} cannot attend to an encoder; take GPT-2")
    return model


def _settle_tokens(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = model.config.decoder
    start = getattr(decoder, "decoder_start_token_id", None)
    start = decoder.bos_token_id if start is None else start
    end = decoder.eos_token_id
    if start is None or not isinstance(end, int):
        raise UserError(
            f"{folder}: bos_token_id is {start} and eos_token_id {end} in config.json; set both to ids of the tokenizer"
        )
    pad = end if decoder.pad_token_id is None else decoder.pad_token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
