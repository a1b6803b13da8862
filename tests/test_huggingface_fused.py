"""`apply_prsl(..., fused_linear=True)`: the same training without logits."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tiny_models import (
    FAMILIES,
    GPT2,
    LLAMA,
    MODELS,
    NO_DROPOUT,
    SMALL,
    VOCAB,
    Rows,
    batch,
    causal,
    first_step,
    gradients,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prsl_kernels import LossTerms, apply_prsl, linear, prsl_cross_entropy
from prsl_kernels.deferred import DeferredLogits, LogitsNotComputedError


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Sizes(TorchDispatchMode):
    """Records the sizes, as far as they have memory, of everything that operators return with a class dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCAB,):
                self.sizes.add(min(x.numel(), x.untyped_storage().nbytes() // x.itemsize))
        return result


@pytest.mark.parametrize("num_items", [None, torch.tensor(31)], ids=["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_and_gradients_as_from_the_logits(name: str, num_items: Any) -> None:
    model = MODELS[name]().train()
    inputs = batch(model)
    if num_items is not None:
        inputs["num_items_in_batch"] = num_items
    with apply_prsl(model, k=5, b=3.0) as handle:
        expected = model(**inputs)
        expected_gradients, expected_terms = gradients(model, expected.loss), handle.last_terms
    with apply_prsl(model, k=5, b=3.0, fused_linear=True) as handle:
        actual = model(**inputs)
        assert isinstance(actual.logits, DeferredLogits)
        assert list(actual.keys()) == list(expected.keys())
        actual_gradients, terms = gradients(model, actual.loss), handle.last_terms
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(tuple(terms), tuple(expected_terms))
    assert actual_gradients.keys() == expected_gradients.keys() != set()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_operator_returns_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "linear_terms", linear.linear_terms._init_fn)  # to see into the operator
    monkeypatch.setattr(linear, "SMALLEST_BUDGET", 1)  # these models are below it
    model = MODELS[name]().train()
    inputs = batch(model)
    with apply_prsl(model, k=5, b=3.0), Sizes() as whole:
        model(**inputs).loss.backward()
    most = inputs["labels"].numel() * VOCAB
    assert most in whole.sizes
    with apply_prsl(model, k=5, b=3.0, fused_linear=True), Sizes() as fused:
        model(**inputs).loss.backward()
    assert 0 < max(fused.sizes) < most / 2


@pytest.mark.parametrize("frozen", ["body", "head"])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_and_tied_parameters(tied: bool, frozen: str) -> None:
    model = causal("GPT2LMHeadModel", **GPT2, **NO_DROPOUT, tie_word_embeddings=tied)().train()
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied
    for parameter in model.parameters():
        parameter.requires_grad_((parameter is head) == (frozen == "body"))
    inputs = batch(model)
    with apply_prsl(model, k=5, b=3.0):
        expected = gradients(model, model(**inputs).loss)
    with apply_prsl(model, k=5, b=3.0, fused_linear=True):
        actual = gradients(model, model(**inputs).loss)
    assert actual.keys() == expected.keys() != set()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_outside_of_training(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    stock = model.eval()(**inputs).logits
    with apply_prsl(model, k=5, b=3.0) as handle:
        loss = model(**inputs).loss
    with apply_prsl(model, k=5, b=3.0, fused_linear=True) as handle:
        output = model.eval()(**inputs)  # with gradients, as attacks on the image need it
        assert torch.equal(output.logits, stock)
        assert torch.equal(output.loss, loss)
        with torch.no_grad():
            assert torch.equal(model.train()(**inputs).logits, stock)
        prompt = {key: value for key, value in inputs.items() if key in ("pixel_values", "input_ids", "attention_mask")}
        model.generate(**prompt, max_new_tokens=2, do_sample=False)  # in training mode
    assert handle.last_terms is not None
    assert torch.equal(model.train()(**inputs).logits, stock)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits.argmax(-1),
        lambda logits: logits.shape,
        lambda logits: logits.float(),
        lambda logits: logits[:, -1, :],
        lambda logits: logits[..., :5],
        lambda logits: logits[:, :, :5],
        lambda logits: logits / 2,
        lambda logits: 2 * logits,
        lambda logits: logits > 0,
        lambda logits: logits == 0,
        lambda logits: logits // 2,
        lambda logits: bool(logits),
        lambda logits: logits[..., None],
        lambda logits: logits[:, :, :, :],
        lambda logits: logits[torch.zeros(1, dtype=torch.bool)],
        lambda logits: len(logits),
        lambda logits: list(logits),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: F.cross_entropy(logits, torch.zeros(1, dtype=torch.long)),
        lambda logits: torch.zeros(3) + logits,
        lambda logits: logits.to(torch.float64),
    ],
)
def test_who_asks_for_the_logits_in_training_is_told(use: Any) -> None:
    model = MODELS["GPT2LMHeadModel"]().train()
    with apply_prsl(model, fused_linear=True):
        logits = model(**batch(model)).logits
        with pytest.raises(LogitsNotComputedError, match=r"needs the logits.*model\.eval\(\).*fused_linear=False"):
            use(logits)
        assert not hasattr(logits, "dtype")
        assert "DeferredLogits" in repr(logits)


def test_slices_are_those_of_the_hidden_states() -> None:
    model = MODELS["GPT2LMHeadModel"]()
    inputs = batch(model)
    labels = inputs["labels"].clamp(min=0)
    options: dict[str, Any] = {"k": 5, "b": 3.0}
    logits = model.eval()(input_ids=inputs["input_ids"]).logits
    with apply_prsl(model, fused_linear=True):
        deferred = model.train()(input_ids=inputs["input_ids"]).logits
        everything = slice(None)
        for index, tokens in (
            (slice(1, 3), slice(1, 3)),
            ((everything, slice(-4, None)), (everything, slice(-4, None))),
            ((Ellipsis, slice(1, None, 2), everything), (everything, slice(1, None, 2))),
            (Ellipsis, everything),
        ):
            target = labels[tokens].flatten()
            expected = prsl_cross_entropy(logits[index].flatten(0, 1), target, **options)
            moved = deferred[index].contiguous().to("cpu", non_blocking=True)
            torch.testing.assert_close(moved.loss(target, options).loss, expected)


def test_the_layer_computes_the_loss_in_a_call_of_its_own() -> None:
    """Whoever gathers its parameters around a call, as FSDP does, has to see it; who changes its input is told."""
    model = MODELS["GPT2LMHeadModel"]().train()
    seen: list[type] = []
    hook = model.lm_head.register_forward_hook(lambda layer, args, output: seen.append(type(output)))
    with apply_prsl(model, fused_linear=True):
        model(**batch(model))
        assert seen == [DeferredLogits, LossTerms]
        hook.remove()
        model.lm_head.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
        with pytest.raises(TypeError, match="no forward pre-hook may change its input; use fused_linear=False"):
            model(**batch(model))


def test_logits_that_are_computed_after_all_are_noticed() -> None:
    model = MODELS["GPT2LMHeadModel"]().train()
    with apply_prsl(model, fused_linear=True):
        model.set_output_embeddings(nn.Linear(16, VOCAB, bias=False))
        with pytest.warns(UserWarning, match=r"has computed its logits in training.*apply again"):
            assert model(**batch(model)).logits.shape[-1] == VOCAB
    with apply_prsl(model, fused_linear=True):
        assert isinstance(model(**batch(model)).logits, DeferredLogits)


def test_a_model_that_changes_its_logits_is_told_at_its_first_step() -> None:
    model = causal("GraniteForCausalLM", **LLAMA, logits_scaling=2.0)().train()
    inputs = batch(model)
    with (
        apply_prsl(model, fused_linear=True),
        pytest.raises(LogitsNotComputedError, match=r"truediv.*fused_linear=False, also where the model itself"),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", [*FAMILIES, "LlamaForCausalLM"])
def test_the_trainer_makes_the_same_step(name: str, tmp_path: Path) -> None:
    weights, loss, norm = first_step(name, tmp_path, 8, 1, 0.5)
    for size, accumulation in ((8, 1), (2, 4)):
        fused, fused_loss, fused_norm = first_step(name, tmp_path, size, accumulation, 0.5, fused=True)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert fused_norm == pytest.approx(norm, rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(fused[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_in_bf16_and_its_evaluation(name: str, tmp_path: Path) -> None:
    def train(fused: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
        model = MODELS[name]()
        inputs = batch(model)
        handle = apply_prsl(model, k=5, b=3.0, fused_linear=fused)
        arguments = tf.TrainingArguments(
            str(tmp_path), bf16=True, max_steps=1, learning_rate=1e-9, report_to=[], use_cpu=True, disable_tqdm=True
        )
        predictions: list[Any] = []
        trainer = tf.Trainer(
            model,
            arguments,
            train_dataset=Rows(inputs),
            eval_dataset=Rows(inputs),
            compute_metrics=lambda prediction: predictions.append(prediction.predictions) or {},
        )
        trainer.train()
        assert handle.last_terms is not None
        loss = handle.last_terms.loss
        # What BLIP-2 returns besides is nothing that the Trainer can gather.
        rest = ["past_key_values", "vision_outputs", "qformer_outputs", "language_model_outputs"]
        trainer.evaluate(ignore_keys=[*rest, "encoder_last_hidden_state"])
        logits = predictions[0][0] if isinstance(predictions[0], tuple) else predictions[0]
        return loss, logits.shape

    loss, shape = train(fused=True)
    expected_loss, expected_shape = train(fused=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
    assert shape == expected_shape
    assert shape[-1] == VOCAB


def test_gradient_checkpointing() -> None:
    model = MODELS["GPT2LMHeadModel"]().train()
    inputs = batch(model)
    with apply_prsl(model, k=5, b=3.0, fused_linear=True):
        expected = gradients(model, model(**inputs).loss)
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            actual = gradients(model, model(**inputs).loss)
            for parameter, gradient in expected.items():
                torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_removal_copies_and_life(name: str) -> None:
    model = MODELS[name]().train()
    head = model.get_output_embeddings()
    inputs = batch(model)
    stock = model(**inputs).loss
    handle = apply_prsl(model, k=5, b=3.0, fused_linear=True)
    assert type(head) is not nn.Linear
    assert isinstance(head, nn.Linear)
    copied = copy.deepcopy(model)
    assert isinstance(copied(**inputs).logits, DeferredLogits)
    handle.remove()
    assert type(head) is nn.Linear
    for restored in (model, copied):
        output = restored(**inputs)
        assert torch.equal(output.loss, stock)
        assert output.logits.shape[-1] == VOCAB
    with apply_prsl(copied, k=5, b=3.0, fused_linear=True):
        assert copied(**inputs).loss != stock
    assert type(copied.get_output_embeddings()) is nn.Linear

    apply_prsl(model, fused_linear=True)
    reference = weakref.ref(model)
    del model, restored
    assert reference() is None or gc.collect() >= 0
    gc.collect()
    assert reference() is None


def test_output_layers_that_are_not_served() -> None:
    model = MODELS["GPT2LMHeadModel"]()

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    model.lm_head = Scaled(16, VOCAB, bias=False)
    with pytest.raises(TypeError, match=r"needs an output layer.*Scaled; use fused_linear=False"):
        apply_prsl(model, fused_linear=True)
    assert "_loss_function" not in vars(model)
    model.lm_head = nn.Linear(16, VOCAB, bias=False)
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="was replaced on the instance"):
        apply_prsl(model, fused_linear=True)


def test_fused_linear_is_part_of_the_handle() -> None:
    model = causal("LlamaForCausalLM", **{**LLAMA, **SMALL})()
    with apply_prsl(model, fused_linear=True) as handle:
        assert handle.fused_linear
        assert "fused_linear=True" in repr(handle)
