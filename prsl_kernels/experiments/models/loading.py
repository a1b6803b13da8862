"""Reading a checkpoint's folder: what is wrong with it is said before transformers would fail on it, or guess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from prsl_kernels.experiments.data.base import Task
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import read_json
from prsl_kernels.experiments.models.families import Family
from prsl_kernels.experiments.models.hub import conversion, is_hub_name, snapshot
from prsl_kernels.experiments.models.preprocessing import Preprocessing, processor_settings
from prsl_kernels.experiments.models.prompted import FAMILIES
from prsl_kernels.experiments.models.tiny_chat import MADE, made_base

BASES = Path(__file__).parent / "bases"
SHIPPED = ("captions", "vqa")
# Embedding matrices are often padded, to a multiple of 64 or by a share of their rows (Qwen2-VL's 407 of 152,064); more
# mean another tokenizer.
_SPARE_ROWS, _SPARE_SHARE = 64, 0.02
# What transformers raises over a configuration that makes no sense, or that does not fit the weights
_UNFIT = (
    RuntimeError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError, ImportError,
    StrictDataclassError,
)  # fmt: skip


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars for loading and saving off the terminal: these models take a blink."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve(path: str | Path) -> Path:
    """The folder of a shipped base's name, of a local path, or of a downloaded checkpoint's name on the Hub.

    "tiny-llava" and "tiny-qwen2-vl" are models with random weights, for trials; they are made where they are asked for.

    Raises:
        UserError: there is no such folder.
    """
    if isinstance(path, str) and path in SHIPPED:
        folder = BASES / path
        if not folder.is_dir():
            raise UserError(
                f"the base {path!r} is missing from this installation ({folder}); install the package again"
            )
        return folder
    if path in MADE:
        return made_base(str(path))
    folder = Path(path)
    if not folder.is_dir():
        if is_hub_name(path):
            return snapshot(str(path))
        raise UserError(
            f"{folder}: there is no such folder; give the name of a shipped base ({' or '.join(SHIPPED)}), a local "
            "folder, or the name of a downloaded checkpoint of the Hub (owner/name, or owner/name@revision)"
        )
    return folder


def family_of(path: str | Path) -> type[Family]:
    """The family of a checkpoint, without loading it.

    Raises:
        UserError: there is no such checkpoint, or it is of another architecture.
    """
    folder = resolve(path)
    return _family(folder, read_json(folder / "config.json"))


def inspect(path: str | Path) -> tuple[Task, int]:
    """The task and the vocabulary's size of a checkpoint, without loading it; refuses what `read_folder` would."""
    folder = resolve(path)
    raw = read_json(folder / "config.json")
    family = _family(folder, raw)
    _check_language_model(folder, raw)
    check_weights(folder, family.architecture.__name__)
    config = read_config(folder)
    return family.task, int(config.get_text_config(decoder=True).vocab_size)


def read_folder(
    path: str | Path, dtype: torch.dtype, float32: Sequence[str] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Preprocessing]:
    """Model in `dtype` on the CPU, tokenizer and preprocessing of a checkpoint; see `from_pretrained`.

    Parameters whose names have one of `float32` in them are read in that precision.
    """
    folder = resolve(path)
    config = read_json(folder / "config.json")
    family = _family(folder, config)
    _check_language_model(folder, config)
    check_weights(folder, family.architecture.__name__)
    read_config(folder)
    tokenizer = read_tokenizer(folder)
    model = _model(folder, family, dtype, float32)
    _settle_special_tokens(folder, model, tokenizer)
    _check_places(folder, model)
    side = family.image_side(model.config, processor_settings(folder)[1])
    return model, tokenizer, Preprocessing.read(folder, side)


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint, none of whose code is run.

    Raises:
        UserError: it makes no sense, or its model needs code that does not come with transformers.
    """
    _check_code(folder, read_json(folder / "config.json"))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNFIT as error:
        raise UserError(f"{folder / 'config.json'}: cannot be used ({error}); copy it again") from error


def _check_code(folder: Path, values: Any) -> None:
    """Refuses an implementation by its name on the Hub, which transformers would fetch and run."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(f"{folder / 'config.json'}: {key} is {value!r}, which is code from the Hub; remove the key")
        _check_code(folder, value)


def _family(folder: Path, config: Any) -> type[Family]:
    found = config.get("model_type") if isinstance(config, dict) else None
    supported = " or ".join(sorted(family.architecture.__name__ for family in FAMILIES.values()))
    if not isinstance(found, str) or found not in FAMILIES:
        raise UserError(f"{folder}: the model type is {found!r}; only {supported} can be used here")
    family = FAMILIES[found]
    named = config.get("architectures") or [family.architecture.__name__]
    if not isinstance(named, list) or family.architecture.__name__ not in named:
        raise UserError(f"{folder}: the architecture is {named!r}; only {supported} can be used here")
    return family


def _check_language_model(folder: Path, config: dict[str, Any]) -> None:
    """Refuses a BLIP-2 with an encoder-decoder inside, such as T5: its labels and logits are aligned otherwise."""
    text = config.get("text_config")
    found = text.get("model_type", "opt") if isinstance(text, dict) else "opt"
    if config["model_type"] == "blip-2" and found not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{folder}: its language model is {found!r}, which is no decoder-only one; take a BLIP-2 with OPT"
        )


def _check_places(folder: Path, model: PreTrainedModel) -> None:
    """Refuses a LLaVA whose prompt would have another number of places than its encoder gives patches."""
    config = model.config
    if config.model_type != "llava" or config.vision_config.model_type != "clip_vision_model":
        return
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    if config.image_seq_length != patches:
        raise UserError(
            f"{folder}: image_seq_length is {config.image_seq_length} in config.json, but the image encoder gives "
            f"{patches} patches; set it to {patches}"
        )


def check_weights(folder: Path, architecture: str) -> None:
    """Refuses pickled, missing and damaged weights; `architecture` is the class that reads them.

    Raises:
        UserError: the message names the file and the remedy.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: names no files of weights; download or copy the file again") from None
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        raise UserError(
            f"{folder}: the weights are pickled, and loading a pickle can run any code; convert them to safetensors, "
            f"reading tensors alone: {conversion(folder, architecture)}"
        )
    else:
        raise UserError(f"{folder}: no model.safetensors; complete the folder or give another one")
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                content.keys()
        except FileNotFoundError:
            raise UserError(f"{file}: a part of the weights is missing; download or copy the folder again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({error}); download or copy the file again") from None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint.

    Raises:
        UserError: there is none, it is damaged, or a slow one.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json); copy its files from the checkpoint it belongs to")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise UserError(f"{folder}: the tokenizer cannot be read ({error}); copy its files again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: only fast tokenizers can be used; convert it to a tokenizer.json")
    return tokenizer


def _model(folder: Path, family: type[Family], dtype: torch.dtype, float32: Sequence[str]) -> PreTrainedModel:
    architecture = family.architecture
    # The only way to read parts in a precision of their own, and so never to hold all of a large model in float32
    reader: Any = type(architecture.__name__, (architecture,), {"_keep_in_fp32_modules_strict": list(float32)})
    try:
        with no_progress_bars():
            model, report = (reader if float32 else architecture).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except _UNFIT as error:
        raise UserError(f"{folder}: weights and config.json do not fit together ({error}); copy both again") from error
    model.__class__ = architecture
    # A pooler takes no part in any family, and checkpoints differ in whether they keep it
    missing = sorted(name for name in report["missing_keys"] if ".pooler." not in name)
    if missing:
        raise UserError(
            f"{folder}: the weights lack {len(missing)} tensors that config.json asks for, {missing[0]} first; copy "
            "both again from the same checkpoint"
        )
    return model


def _settle_special_tokens(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fills in what older checkpoints leave open (padding), and refuses what cannot be guessed."""
    config = model.config
    text = config.get_text_config(decoder=True)
    spare = max(_SPARE_ROWS, _SPARE_SHARE * text.vocab_size)
    if not 0 <= text.vocab_size - len(tokenizer) <= spare:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {text.vocab_size}; copy both from the "
            "same checkpoint"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # as GPT-2 does; labels are masked by length and never by this id
    field = getattr(FAMILIES[config.model_type], "image_token", None)
    if field is not None:
        image = getattr(config, field)
        if image is None or not 0 <= image < text.vocab_size:
            raise UserError(
                f"{folder}: {field} is {image} in config.json; set it to the id of the tokenizer's image token"
            )
        return
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(text, "decoder_start_token_id", None) if start is None else start
    start = tokenizer.bos_token_id if start is None else start
    if start is None:
        raise UserError(f"{folder}: decoder_start_token_id is not set in config.json; set it to the decoder's first id")
    config.decoder_start_token_id = start
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
