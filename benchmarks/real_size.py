"""The paper's models at their real size, with random weights, through this project's own code on a CPU.

``python -m benchmarks.real_size vit-gpt2`` or ``blip2``: makes a checkpoint of the published architecture, fine-tunes
it for one step, attacks images for one round of BIM, and generates text. Each stage is a process of its own, so that
its peak of memory is its own. ``--scale tiny`` does the same with few and narrow layers, in seconds. See NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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

from prsl_kernels.experiments.attacks.bim import BIM
from prsl_kernels.experiments.attacks.budget import Budget
from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.attacks.record import load_model
from prsl_kernels.experiments.config import ArmConfig, DecodingConfig, FinetuneConfig
from prsl_kernels.experiments.data import Dataset, Example, save_png
from prsl_kernels.experiments.data.base import Task
from prsl_kernels.experiments.files import read_json, write_json
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel
from prsl_kernels.experiments.training.finetune import finetune
from prsl_kernels.experiments.training.trainer import ArmTrainer

from . import machine

IMAGES = 2
NEW_TOKENS = 4
TASKS: dict[str, Task] = {"vit-gpt2": "captions", "blip2": "vqa"}
ANSWERS = ("a red square", "two cats on a sofa")
QUESTIONS = ("what is this?", "what do you see in this image?")
ARM = ArmConfig("prsl", k=20, b=1e-4)
# What the paper's code trains: all of ViT-GPT2; of BLIP-2 the Q-Former, with the rest in half precision
SETTINGS: dict[str, dict[str, Any]] = {
    "vit-gpt2": {"batch_size": IMAGES},
    "blip2": {"batch_size": 1, "trainable": "qformer", "bf16": True},
}
DTYPES = {"vit-gpt2": torch.float32, "blip2": torch.bfloat16}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a vocabulary of `size`, of which texts use the bytes alone."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"unused{number}" for number in range(size - len(names))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def vit_gpt2(tiny: bool) -> tuple[VisionEncoderDecoderModel, PreTrainedTokenizerFast]:
    """google/vit-base-patch16-224-in21k with gpt2, whose configurations are transformers' defaults; float32."""
    tokenizer = tokenizer_of(600 if tiny else 50_257)
    ids = _ids(tokenizer)
    small_encoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    small_decoder = {"n_embd": 64, "n_layer": 2, "n_head": 2}
    encoder = ViTConfig(**(small_encoder if tiny else {}))
    decoder = GPT2Config(
        vocab_size=len(tokenizer), add_cross_attention=True, is_decoder=True, **ids, **(small_decoder if tiny else {})
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = ids["bos_token_id"]
    config.pad_token_id, config.eos_token_id = ids["pad_token_id"], ids["eos_token_id"]
    return VisionEncoderDecoderModel(config), tokenizer


def blip2(tiny: bool) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerFast]:
    """Salesforce/blip2-opt-2.7b: ViT-g/14, a Q-Former of 32 queries, OPT of 2.7 billion parameters; bfloat16."""
    tokenizer = tokenizer_of(600 if tiny else 50_272)
    ids = _ids(tokenizer)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    large_text = {
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 10_240,
    }
    # The default deviation of 1e-10 is made for loading weights
    vision = Blip2VisionConfig(initializer_range=0.02, **({**small, "intermediate_size": 128} if tiny else {}))
    qformer = Blip2QFormerConfig(
        encoder_hidden_size=vision.hidden_size, **({**small, "intermediate_size": 128} if tiny else {})
    )
    text = OPTConfig(
        vocab_size=len(tokenizer),
        **ids,
        **({**small, "word_embed_proj_dim": 64, "ffn_dim": 128} if tiny else large_text),
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.query_tokens.normal_(std=0.02)  # they start at zero, all alike
    return model, tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


# ---- stages ----------------------------------------------------------------------------------------------------------


def build(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Makes the checkpoint and the images."""
    torch.manual_seed(0)
    model, tokenizer = vit_gpt2(tiny) if name == "vit-gpt2" else blip2(tiny)
    # Noise says nothing, or stops at once: all tokens are asked for.
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, min_new_tokens=NEW_TOKENS, **_ids(tokenizer)
    )
    side = model.config.encoder.image_size if name == "vit-gpt2" else model.config.vision_config.image_size
    vlm = VisionLanguageModel(model, tokenizer, Preprocessing(side, (0.5,) * 3, (0.5,) * 3))
    vlm.save_pretrained(folder / "base", dtype=None)
    for number in range(IMAGES):
        save_png(torch.rand(3, side, side), folder / f"{number}.png")
    return {"parameters": sum(parameter.numel() for parameter in vlm.parameters())}


def train(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """`prsl finetune` of one step, with what belongs to it: measurements before and after, a checkpoint, the model."""
    seconds: list[float] = []
    trained: list[int] = []
    step = ArmTrainer.training_step

    def timed(trainer: ArmTrainer, model: Any, *inputs: Any, **options: Any) -> torch.Tensor:
        trained.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        begun = perf_counter()
        loss = step(trainer, model, *inputs, **options)
        seconds.append(perf_counter() - begun)
        return loss

    ArmTrainer.training_step = timed  # type: ignore[method-assign]
    task = TASKS[name]
    examples = tuple(
        Example(f"{number}", folder / f"{number}.png", (ANSWERS[number],), QUESTIONS[number] if task == "vqa" else None)
        for number in range(IMAGES)
    )
    data = Dataset("noise", task, "train", examples, "none", "none", "noise")
    config = FinetuneConfig(steps=1, learning_rate=1e-5, evaluate_every=1, calibration_batches=1, **SETTINGS[name])
    finetune(folder / "base", data, data, ARM, config, folder / "tuned", seed=0, device="cpu")
    record = read_json(folder / "tuned" / "arm.json")
    return {
        "trained_parameters": trained[0],
        "forward_and_backward_seconds": round(sum(seconds), 2),
        "cross_entropy": record["eval_cross_entropy"],
        "gradient_ratio": record["gradient_ratio_measured"],
    }


def attack(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """One round of BIM on one image."""
    vlm, pixels, loading = _attacked(name, folder, DecodingConfig())
    text = vlm.encode(ANSWERS[:1], QUESTIONS[:1] if vlm.task == "vqa" else None)
    budget = Budget.from_config(8, 2, "pixels255", std=vlm.image_std)
    begun = perf_counter()
    *_, last = BIM(budget, 1).iterate(TextObjective(vlm, text), pixels)
    assert last.health is not None
    return {
        "loading_seconds": loading,
        "round_seconds": round(perf_counter() - begun, 2),
        "gradient_norm": float(last.health.norm),
        "zero_gradient_share": float(last.health.zero),
        "moved": float((last.images - pixels).abs().amax()) * 255,
    }


def generate(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Text of a few tokens for one image."""
    vlm, pixels, loading = _attacked(name, folder, DecodingConfig(max_new_tokens=NEW_TOKENS))
    begun = perf_counter()
    texts = vlm.generate(pixels, QUESTIONS[:1] if vlm.task == "vqa" else None)
    return {"loading_seconds": loading, "generation_seconds": round(perf_counter() - begun, 2), "text": texts[0]}


def _attacked(name: str, folder: Path, decoding: DecodingConfig) -> tuple[VisionLanguageModel, torch.Tensor, float]:
    begun = perf_counter()
    tuned = folder / "tuned"
    # Where the machine could not train it, the rest is still worth knowing
    path = tuned if (tuned / "arm.json").is_file() else folder / "base"
    vlm = load_model(path, TASKS[name], "cpu", DTYPES[name], decoding)
    return vlm, vlm.load_pixels([folder / "0.png"]), round(perf_counter() - begun, 2)


STAGES: dict[str, Callable[[str, Path, bool], dict[str, Any]]] = {
    "build": build,
    "finetune": train,
    "attack": attack,
    "generate": generate,
}


# ---- the program -----------------------------------------------------------------------------------------------------


def run_stage(stage: str, name: str, folder: Path, tiny: bool) -> None:
    """Runs one stage in this process, and leaves what was measured in `folder`."""
    begun = perf_counter()
    found = STAGES[stage](name, folder, tiny)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, read files that are mapped included
    measured = {"seconds": round(perf_counter() - begun, 1), "peak_gib": round(peak / 2**20, 2), **found}
    write_json(folder / f"{stage}.json", measured)


def run(name: str, folder: Path, tiny: bool) -> dict[str, dict[str, Any]]:
    """All stages, each in a process of its own; what failed has its exit status in place of measurements."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.real_size", name, "--stage", stage, "--folder", str(folder)]
        status = subprocess.run(command + (["--scale", "tiny"] if tiny else []), cwd=machine.ROOT).returncode
        file = folder / f"{stage}.json"
        rows[stage] = {"failed_with_status": status} if status else read_json(file)
        print(f"{name} {stage}: {json.dumps(rows[stage])}", flush=True)
        if stage == "build" and status:
            break
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The program; 1 where a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=__doc__)
    parser.add_argument("model", choices=sorted(TASKS))
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, help="for the checkpoints, 17 GB for blip2; by default a temporary one")
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements")
    parser.add_argument("--stage", choices=sorted(STAGES), help="this stage alone, in this process")
    options = parser.parse_args(arguments)
    tiny = options.scale == "tiny"
    if options.stage is not None:
        run_stage(options.stage, options.model, options.folder, tiny)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(options.model, folder, tiny)
    if options.out is not None:
        settings = {"model": options.model, "scale": options.scale, "threads": torch.get_num_threads()}
        write_json(options.out, {**settings, **machine.describe_machine(), "stages": rows})
    return int(any("failed_with_status" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
