"""What of a model is trained, in which precision it is held, and how that much of it goes to disk and back.

    full      all weights
    qformer   the Q-Former of a BLIP-2, its query tokens, and its projection into the language model
    lora      matrices A (r, in) and B (out, r) beside every projection W (out, in) of the attention in the language
              model and in a Q-Former, which then computes W x + alpha / r * B A x (Hu et al. 2021, arXiv:2106.09685)

What is trained is float32. With `bf16` the rest is held in bfloat16, but for a Q-Former, which stays in float32.
A checkpoint of the training holds what is trained, and nothing else.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prsl_kernels.experiments.config import DecodingConfig, FinetuneConfig
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.models.families import Family
from prsl_kernels.experiments.models.loading import family_of, read_folder

WEIGHTS = "model.safetensors"
# The attention's projections in OPT, and in Llama, Mistral and Qwen2; in GPT-2, whose query, key and value are one
# matrix, and its cross attention.
_ATTENTION = r"self_attn\.(q|k|v|o|out)_proj|(attn|crossattention)\.(c_attn|q_attn|c_proj)"
_QFORMER_ATTENTION = r"qformer\..*attention\.(attention\.(query|key|value)|output\.dense)"
# Parts that wrappers for many processes put into parameters' names
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def load_trainable(
    path: str | Path, config: FinetuneConfig, *, device: str, seed: int, decoding: DecodingConfig | None = None
) -> VisionLanguageModel:
    """A checkpoint, ready to be trained as `config` says, in evaluation mode; adapters are drawn from `seed`.

    Of `decoding`, the prompt is what it is trained with.

    Raises:
        UserError: as `VisionLanguageModel.from_pretrained`; a model without a Q-Former or without a known attention
            where that is to be trained; PEFT is not installed.
    """
    held = torch.bfloat16 if config.bf16 and config.trainable != "full" else torch.float32
    float32 = family_of(path).qformer if held is torch.bfloat16 else ()
    model, tokenizer, preprocessing = read_folder(path, held, float32)
    vlm = VisionLanguageModel(model.to(device).eval(), tokenizer, preprocessing, decoding)
    prepare(vlm, config, seed=seed)
    return vlm


def prepare(vlm: VisionLanguageModel, config: FinetuneConfig, *, seed: int) -> None:
    """Freezes, adds adapters, and turns on what `config` asks for; dtypes of what is frozen stay as they are.

    Raises:
        UserError: see `load_trainable`.
    """
    model, family = vlm.model, vlm.family
    if config.trainable == "qformer":
        if not family.qformer:
            raise UserError(f"trainable: a {type(model).__name__} has no Q-Former; choose full or lora")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(family.qformer))
    elif config.trainable == "lora":
        _add_adapters(model, family, config, seed)
    unused = family.unused()
    for name, parameter in model.named_parameters() if unused else ():
        if name.startswith(unused):
            # An optimizer that is spread over processes goes on from its checkpoint only where all weights have a state
            parameter.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        # Older releases of transformers know its older name alone
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.compile:
        # In place, so that names and classes stay; part by part, so that the loss and its hook are outside
        for part in family.compilable():
            part.compile()


def assemble(path: str | Path, config: FinetuneConfig, checkpoint: Path, *, seed: int) -> VisionLanguageModel:
    """The model of a training's checkpoint, on the CPU: the base, what was trained, and adapters merged into it.

    It is made from files alone, whatever became of the model in training (it may be spread over processes).
    """
    plain = dataclasses.replace(config, gradient_checkpointing=False, compile=False)
    vlm = load_trainable(path, plain, device="cpu", seed=seed)
    load_weights(vlm.model, checkpoint)
    merge(vlm.model)
    return vlm


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether a model in training computes activations anew in its backward, to hold fewer."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def merge(model: PreTrainedModel) -> None:
    """Merges adapters into the weights beside them, which become float32, and leaves a model without any."""
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            base.float()  # or bfloat16 would swallow what the adapter adds
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, base)
    vars(model).pop("peft_config", None)


def save_weights(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes what is trained of a model to `model.safetensors` in `folder`.

    `state` has the tensors where those of the model are not whole, as when they are spread over processes.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = _WRAPPERS.sub("", name)
            tensors[name] = (parameter if state is None else state[name]).detach().to("cpu").contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads what `save_weights` wrote into a model that is prepared in the same way.

    Raises:
        UserError: the checkpoint is of another model, or of other trained weights.
    """
    trained = {_WRAPPERS.sub("", name): value for name, value in model.named_parameters() if value.requires_grad}
    with safe_open(folder / WEIGHTS, framework="pt") as content, torch.no_grad():
        differing = sorted(set(content.keys()) ^ set(trained))
        if differing:
            raise UserError(
                f"{folder / WEIGHTS}: belongs to a training of other weights ({differing[0]} and "
                f"{len(differing) - 1} more differ); delete the folder {folder.parent} to begin anew"
            )
        for name, parameter in trained.items():
            parameter.copy_(content.get_tensor(name))


def _add_adapters(model: PreTrainedModel, family: Family, config: FinetuneConfig, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "trainable: lora needs PEFT, which is not installed; run `pip install 'prsl_kernels[lora]'`"
        ) from None
    pattern = rf"{re.escape(family.language_model)}\.(.*\.)?({_ATTENTION})"
    if family.qformer:
        pattern = rf"{pattern}|{_QFORMER_ATTENTION}"
    targets = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    if not targets:
        text = model.config.get_text_config(decoder=True).model_type
        raise UserError(
            f"trainable: lora does not know the attention of the language model {text!r}; choose full, or a model with "
            "OPT, GPT-2, Llama, Mistral or Qwen2"
        )
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=pattern,
        fan_in_fan_out=isinstance(targets[0], Conv1D),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
