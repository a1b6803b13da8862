"""What is trained and what is not, in which precision, through a checkpoint, and into a plain model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_finetune
import torch
from safetensors import safe_open
from torch import nn

from prsl_kernels import apply_prsl
from prsl_kernels.experiments.config import DecodingConfig, FinetuneConfig
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_llava
from prsl_kernels.experiments.training import finetune as finetune_module
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.trainable import (
    load_trainable,
    load_weights,
    merge,
    recomputes_activations,
    save_weights,
)

pytestmark = pytest.mark.usefixtures("_single_thread")

CONFIG = tiny_finetune.CONFIG
QFORMER = ("qformer.", "query_tokens", "language_projection.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    make = tiny_finetune.bases(folder)

    def of(kind: str) -> Path:
        if kind != "llava":
            return make(kind)
        if not (folder / kind).exists():
            torch.manual_seed(0)
            tokenizer = build_tokenizer(600)
            vlm = VisionLanguageModel(tiny_llava(tokenizer), tokenizer, Preprocessing(64, (0.5,) * 3, (0.5,) * 3))
            vlm.save_pretrained(folder / kind, dtype=torch.float32)
        return folder / kind

    return of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    return tiny_finetune.drawings(tmp_path_factory.mktemp("drawings"))


def config_of(trainable: str, **changes: Any) -> FinetuneConfig:
    return dataclasses.replace(CONFIG, trainable=trainable, **changes)  # type: ignore[arg-type]


def train(base: Path, data: Callable[..., Dataset], config: FinetuneConfig, out: Path) -> dict[str, torch.Tensor]:
    """The state of the model that a fine-tuning writes, in the precision of each weight on disk."""
    sets = data("vqa", "train", 12), data("vqa", "select", 7)
    finetune_module.finetune(base, *sets, tiny_finetune.PRSL, config, out, seed=3, device="cpu")
    return stored(out)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def batch_of(vlm: VisionLanguageModel) -> Batch:
    text = vlm.encode(["red", "large black"], ["what color is it?"] * 2)
    return Batch(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), text)


def test_only_the_qformer_is_trained(base: Callable[[str], Path], data: Callable[..., Dataset], tmp_path: Path) -> None:
    before, after = stored(base("vqa")), train(base("vqa"), data, config_of("qformer"), tmp_path / "out")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith(QFORMER) for name in changed)
    assert {"query_tokens", "language_projection.weight"} <= changed
    assert any(name.startswith("qformer.encoder") for name in changed)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_frozen_weights_are_held_and_stored_in_half_precision(
    base: Callable[[str], Path], data: Callable[..., Dataset], tmp_path: Path
) -> None:
    vlm = load_trainable(base("vqa"), config_of("qformer", bf16=True), device="cpu", seed=0)
    for name, parameter in vlm.model.named_parameters():
        trained = name.startswith(QFORMER)
        assert (parameter.dtype, parameter.requires_grad) == (torch.float32 if trained else torch.bfloat16, trained)
    # Read in full precision, and not by way of bfloat16
    before = stored(base("vqa"))
    torch.testing.assert_close(vlm.model.query_tokens.detach(), before["query_tokens"], rtol=0, atol=0)
    after = train(base("vqa"), data, config_of("qformer", bf16=True), tmp_path / "out")
    for name, value in after.items():
        assert value.dtype == (torch.float32 if name.startswith(QFORMER) else torch.bfloat16), name
        if not name.startswith(QFORMER):
            assert torch.equal(value, before[name].bfloat16())
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(QFORMER))
    assert VisionLanguageModel.from_pretrained(tmp_path / "out").model.dtype == torch.float32


@pytest.mark.parametrize("trainable", ["full", "qformer", "lora"])
@pytest.mark.parametrize("kind", ["captions", "vqa", "llava"])
def test_whatever_is_trained_gets_a_gradient(kind: str, trainable: str, base: Callable[[str], Path]) -> None:
    if trainable == "qformer" and kind != "vqa":
        pytest.skip("it has no Q-Former")
    vlm = load_trainable(base(kind), config_of(trainable), device="cpu", seed=0)
    questions = None if kind == "captions" else ["what color is it?"] * 2
    text = vlm.encode(["red", "large black"], questions)
    logits, targets = vlm.logits(torch.rand(2, 3, 64, 64), text)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    reached = {name for name, value in vlm.model.named_parameters() if value.grad is not None}
    assert reached == {name for name, value in vlm.model.named_parameters() if value.requires_grad}


def test_checkpoints_hold_what_is_trained_alone(base: Callable[[str], Path], tmp_path: Path) -> None:
    config = config_of("qformer")
    vlm = load_trainable(base("vqa"), config, device="cpu", seed=0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(1)
    save_weights(vlm.model, tmp_path)
    assert all(name.startswith(QFORMER) for name in stored(tmp_path))
    other = load_trainable(base("vqa"), config, device="cpu", seed=0)
    load_weights(other.model, tmp_path)
    states = vlm.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(value, states[1][name]) == name.startswith(QFORMER) for name, value in states[0].items())
    with pytest.raises(UserError, match="training of other weights"):
        load_weights(load_trainable(base("vqa"), config_of("full"), device="cpu", seed=0).model, tmp_path)


@pytest.mark.parametrize("kind", ["captions", "vqa", "llava"])
def test_adapters_stand_at_the_attention_of_language_model_and_qformer(
    kind: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    vlm = load_trainable(base(kind), config_of("lora", lora_rank=2), device="cpu", seed=0)
    adapted = {name for name, module in vlm.model.named_modules() if hasattr(module, "lora_A")}
    layers = {
        "captions": {
            f"decoder.transformer.h.0.{place}"
            for place in ("attn.c_attn", "attn.c_proj", "crossattention.c_attn", "crossattention.q_attn",
                          "crossattention.c_proj")
        },
        "vqa": {f"language_model.model.decoder.layers.0.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
        | {
            f"qformer.encoder.layer.{layer}.{place}"
            for layer in range(2)
            for attention in ("attention", "crossattention")
            for place in (*(f"{attention}.attention.{n}" for n in ("query", "key", "value")),
                          f"{attention}.output.dense")
        },
        "llava": {
            f"model.language_model.layers.{layer}.self_attn.{n}_proj"
            for layer in range(2)
            for n in ("q", "k", "v", "o")
        },
    }  # fmt: skip
    assert adapted == layers[kind]
    trained = {name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    again = load_trainable(base(kind), config_of("lora", lora_rank=2), device="cpu", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(vlm.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "bf16"), [("vqa", False), ("vqa", True), ("llava", True), ("captions", False)])
def test_merged_adapters_compute_what_was_trained(
    kind: str, bf16: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """In float32: what an adapter adds is far below the precision of the bfloat16 weights beside it."""
    pytest.importorskip("peft")
    vlm = load_trainable(base(kind), config_of("lora", bf16=bf16), device="cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    batch = batch_of(vlm) if kind != "captions" else Batch(torch.rand(2, 3, 64, 64), vlm.encode(["red", "a b"]))
    vlm.model.float()  # the function of these weights, without the rounding of a forward in half precision
    expected = vlm.logits(batch.pixels, batch.text)[0]
    plain = VisionLanguageModel.from_pretrained(base(kind)).logits(batch.pixels, batch.text)[0]
    save_weights(vlm.model, tmp_path / "checkpoint")
    again = load_trainable(base(kind), config_of("lora", bf16=bf16), device="cpu", seed=5)
    load_weights(again.model, tmp_path / "checkpoint")
    merge(again.model)
    again.save_pretrained(tmp_path / "merged", dtype=None)
    assert not any("lora" in name or "base_layer" in name for name in stored(tmp_path / "merged"))
    found = VisionLanguageModel.from_pretrained(tmp_path / "merged").logits(batch.pixels, batch.text)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("trainable", ["qformer", "lora"])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    trainable: str, base: Callable[[str], Path], data: Callable[..., Dataset], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if trainable == "lora":
        pytest.importorskip("peft")
    config = config_of(trainable, bf16=True, lora_rank=2)
    whole = train(base("vqa"), data, config, tmp_path / "whole")
    original = finetune_module.ArmTrainer.training_step
    calls = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(finetune_module.ArmTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(base("vqa"), data, config, tmp_path / "resumed")
    assert (tmp_path / "resumed" / "training" / "checkpoint-2" / "model.safetensors").is_file()
    resumed = train(base("vqa"), data, config, tmp_path / "resumed")
    assert calls == [0, 1, 2, 3, 2, 3]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    log = [(tmp_path / name / "train.jsonl").read_text() for name in ("whole", "resumed")]
    assert log[0] == log[1]


def test_gradient_checkpointing_changes_no_gradient(base: Callable[[str], Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = config_of("qformer", gradient_checkpointing=checkpointing)
        vlm = load_trainable(base("vqa"), config, device="cpu", seed=0)
        assert recomputes_activations(vlm.model) == checkpointing
        vlm.train()
        batch = batch_of(vlm)
        with apply_prsl(vlm.model, k=6, b=0.1):
            vlm.model(pixel_values=vlm.normalize(batch.pixels), **batch.text).loss.backward()
        gradients.append({name: p.grad for name, p in vlm.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("kind", ["captions", "vqa", "llava"])
def test_compiled_parts_leave_loss_and_names_alone(
    kind: str, base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the backend that stops before machine code: what Dynamo and AOTAutograd make of it is what could break."""
    compiled: list[nn.Module] = []
    original = nn.Module.compile

    def compile_(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(self)
        original(self, *args, backend="aot_eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for asked in (False, True):
        vlm = load_trainable(base(kind), config_of("full", compile=asked), device="cpu", seed=0)
        batch = batch_of(vlm) if kind != "captions" else Batch(pixels, vlm.encode(["red", "a b"]))
        measure = Measure(vlm, tiny_finetune.PRSL, bf16=False)
        ratio = measure.unit_ratio(batch)
        with measure.loss.apply(vlm.model, 0.1) as handle:
            loss = vlm.model(pixel_values=vlm.normalize(batch.pixels), **batch.text).loss
            loss.backward()
            assert handle.last_terms is not None
            terms = [term.item() for term in handle.last_terms]
        outcomes.append((ratio, terms, {name: parameter.grad for name, parameter in vlm.model.named_parameters()}))
    assert len(compiled) >= 2
    (ratio, terms, gradients), (found_ratio, found_terms, found) = outcomes
    torch.testing.assert_close(found_ratio, ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(found_terms, terms, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None:  # what takes no part has a gradient of zero in a compiled graph
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_what_a_model_does_not_have_is_refused(base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="VisionEncoderDecoderModel has no Q-Former; choose full or lora"):
        load_trainable(base("captions"), config_of("qformer"), device="cpu", seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'prsl_kernels\[lora\]'"):
        load_trainable(base("vqa"), config_of("lora"), device="cpu", seed=0)


def test_peft_is_imported_only_when_asked_for(base: Callable[[str], Path]) -> None:
    code = (
        "import sys\n"
        "from prsl_kernels.experiments.config import FinetuneConfig\n"
        "from prsl_kernels.experiments.training.trainable import load_trainable\n"
        f"load_trainable({str(base('vqa'))!r}, FinetuneConfig(steps=1, learning_rate=1.0), device='cpu', seed=0)\n"
        "assert 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_prompt_is_trained_with(base: Callable[[str], Path]) -> None:
    decoding = DecodingConfig(prompt="{question}! Say")
    vlm = load_trainable(base("vqa"), config_of("full"), device="cpu", seed=0, decoding=decoding)
    text = vlm.encode(["red"], ["what color"])
    seen = vlm.tokenizer.decode(text["input_ids"][0], skip_special_tokens=True)
    assert seen == "what color! Say red"
