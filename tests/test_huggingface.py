"""`apply_prsl` on the real classes of transformers, tiny and with random weights."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import (
    BART,
    FAMILIES,
    GPT2,
    MODELS,
    NO_DROPOUT,
    SHIFTED,
    SMALL,
    SPECIAL,
    VIT,
    VOCAB,
    Rows,
    aligned_logits,
    batch,
    blip2,
    causal,
    first_step,
    gradients,
    vision_encoder_decoder,
)
from torch import nn

from prsl_kernels import prsl_cross_entropy
from prsl_kernels.huggingface import PRSLHandle, apply_prsl


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads in step over a model this small wait for each other most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_b_zero_is_the_stock_model(name: str) -> None:
    model = MODELS[name]().train()
    inputs = batch(model)
    expected = model(**inputs)
    expected_gradients = gradients(model, expected.loss)
    with apply_prsl(model, b=0.0):
        actual = model(**inputs)
        actual_gradients = gradients(model, actual.loss)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)
    assert list(actual.keys()) == list(expected.keys())
    assert torch.equal(actual.logits, expected.logits)
    assert actual_gradients.keys() == expected_gradients.keys() != set()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[parameter], gradient, rtol=1e-4, atol=1e-7, msg=parameter)


@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("loss", [{"space": "prob", "distance": "l2"}, {"space": "log_prob", "distance": "l1"}])
@pytest.mark.parametrize("name", [*FAMILIES, "BartForCausalLM", "LlamaForCausalLM"])
def test_loss_is_prsl_of_the_logits(name: str, loss: dict[str, str], num_items: Any) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    with apply_prsl(model, k=5, b=0.7, **loss) as handle:
        assert handle.last_terms is None
        output = model(**inputs, num_items_in_batch=num_items)
    logits, target = aligned_logits(model, output, inputs["labels"])
    options: dict[str, Any] = {"k": 5, "b": 0.7, **loss, "reduction": "mean" if num_items is None else "sum"}
    expected, cross_entropy, penalty = prsl_cross_entropy(logits, target, return_terms=True, **options)
    divisor = 1 if num_items is None else 31
    torch.testing.assert_close(output.loss, expected / divisor)
    assert handle.last_terms is not None
    torch.testing.assert_close(handle.last_terms.cross_entropy, cross_entropy / divisor)
    torch.testing.assert_close(handle.last_terms.penalty, penalty / divisor)
    assert not any(term.requires_grad for term in handle.last_terms)
    assert handle.last_terms.penalty > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_tuple_output_positions_and_evaluation_mode(name: str) -> None:
    model = MODELS[name]().eval()
    inputs = batch(model)
    stock = model(**inputs, return_dict=False)
    with apply_prsl(model, k=5, b=0.5):
        expected = model(**inputs)
        actual = model(**inputs, return_dict=False)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        positional = [inputs.get(n) for n in names[: names.index("labels") + 1]]
        assert torch.equal(model(*positional).loss, expected.loss)
    assert isinstance(actual, tuple)
    assert len(actual) == len(stock)
    assert torch.equal(actual[0], expected.loss)
    assert torch.equal(actual[1], stock[1])
    assert expected.to_tuple()[0] is expected.loss
    assert actual[0] != stock[0]


def test_shift_labels_and_ignore_index_as_in_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = SHIFTED["LlamaForCausalLM"]()
    logits = torch.randn(2, 5, VOCAB)
    labels = torch.tensor([[4, 7, 7, 9, 1], [7, 7, 5, 6, 7]])
    with apply_prsl(model, b=0.0):
        for options in ({"shift_labels": labels}, {"ignore_index": 7}, {"num_items_in_batch": 3, "unknown": None}, {}):
            expected = ForCausalLMLoss(logits, labels, VOCAB, **options)
            torch.testing.assert_close(model.loss_function(logits, labels, VOCAB, **options), expected)


def test_half_precision_loss_is_float32_and_gradient_half() -> None:
    model = SHIFTED["LlamaForCausalLM"]().to(torch.bfloat16)
    with apply_prsl(model, b=0.5):
        output = model(**batch(model))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in gradients(model, output.loss).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name: str) -> None:
    model = MODELS[name]().train()
    inputs = batch(model)
    with apply_prsl(model, b=0.5):
        expected = gradients(model, model(**inputs).loss)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        actual = gradients(model, model(**inputs).loss)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-7)


# ---- under the Trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 0.5])
@pytest.mark.parametrize("name", [*FAMILIES, "BartForCausalLM"])
def test_first_step_is_the_same_however_the_batch_is_cut(name: str, b: float, tmp_path: Path) -> None:
    weights, loss, norm = first_step(name, tmp_path, 8, 1, b)
    initial = MODELS[name]().state_dict()
    assert any(not torch.equal(weights[key], initial[key]) for key in weights)
    for size, accumulation in ((4, 2), (2, 4)):
        cut, cut_loss, cut_norm = first_step(name, tmp_path, size, accumulation, b)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert cut_norm == pytest.approx(norm, rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_stock_encoder_decoder_has_the_bug_that_is_repaired(tmp_path: Path) -> None:
    """The reason for patching the forward; the day this fails, transformers has mended it."""
    name = "VisionEncoderDecoder-GPT2"
    _, whole, _ = first_step(name, tmp_path, 8, 1, None)
    _, cut, _ = first_step(name, tmp_path, 2, 4, None)
    assert cut > 3.5 * whole
    weights, loss, _ = first_step(name, tmp_path, 8, 1, None)
    repaired, repaired_loss, _ = first_step(name, tmp_path, 2, 4, 0.0)
    assert repaired_loss == pytest.approx(loss, rel=1e-5)  # the loss of the undivided batch
    for key, value in weights.items():
        torch.testing.assert_close(repaired[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_in_bf16_and_its_evaluation(name: str, tmp_path: Path) -> None:
    """accelerate wraps `forward` on the instance in mixed precision: the loss must stay in, and come out again."""
    model = MODELS[name]()
    inputs = batch(model)
    inputs["labels"][:, 0] = -100  # which the Trainer counts as a token of GPT2LMHeadModel, though nothing predicts it
    stock = model.eval()(**inputs).loss
    handle = apply_prsl(model, k=5, b=3.0)
    arguments = tf.TrainingArguments(
        str(tmp_path), bf16=True, max_steps=1, learning_rate=1e-9, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = tf.Trainer(model, arguments, train_dataset=Rows(inputs), eval_dataset=Rows(inputs))
    trainer.train()
    metrics = trainer.evaluate()
    expected = model.eval()(**inputs).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-2)
    assert handle.last_terms is not None
    assert handle.last_terms.cross_entropy.item() == pytest.approx(stock.item(), rel=1e-2)
    handle.remove()
    assert model(**inputs).loss.item() == pytest.approx(stock.item(), rel=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_sees_the_same_model(name: str, tmp_path: Path) -> None:
    def view(model: Any) -> tuple[Any, ...]:
        trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
        trainer._set_signature_columns_if_needed()
        columns = sorted(trainer._signature_columns)
        return columns, trainer.model_accepts_loss_kwargs, trainer.label_names, trainer._loss_shifts_labels

    model = MODELS[name]()
    signature, expected = inspect.signature(model.forward), view(model)
    with apply_prsl(model):
        assert inspect.signature(model.forward) == signature
        assert view(model) == expected
    assert expected[1] is True


# ---- the model stays a model -----------------------------------------------------------------------------------------


def generated(model: Any) -> torch.Tensor:
    inputs = batch(model.eval(), 3)
    del inputs["labels"]
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", [*FAMILIES, "LlamaForCausalLM", "BartForCausalLM"])
def test_generate_save_and_reload(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    stock, said = model(**inputs).loss, generated(model)
    model.save_pretrained(tmp_path / "stock")
    handle = apply_prsl(model, b=0.5)
    patched = model(**inputs).loss
    assert torch.equal(generated(model), said)
    assert model(**{n: v for n, v in inputs.items() if n != "labels"}, **start_tokens(model, inputs)).loss is None
    model.save_pretrained(tmp_path / "patched")
    assert {f.name: f.read_bytes() for f in (tmp_path / "patched").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "stock").iterdir()
    }
    again = type(model).from_pretrained(tmp_path / "patched")  # the patched class loads ordinary models, too
    handle.remove()
    reloaded = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(generated(reloaded), said)
    torch.testing.assert_close(reloaded(**inputs).loss, stock)
    with apply_prsl(reloaded, b=0.5):
        torch.testing.assert_close(reloaded(**inputs).loss, patched)
    assert torch.equal(generated(again), said)


def start_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an encoder-decoder needs in place of the labels."""
    if isinstance(model, tf.VisionEncoderDecoderModel):
        return {"decoder_input_ids": torch.ones_like(inputs["labels"])}
    return {}


@pytest.mark.parametrize("name", [*FAMILIES, "BartForCausalLM"])
def test_remove_restores_everything(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    stock, cls = model(**inputs).loss, type(model)

    def state() -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(model).items()}

    before = state()
    handle = apply_prsl(model, b=0.5)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert "active" in repr(handle)
    assert model(**inputs).loss != stock
    handle.remove()
    handle.remove()
    assert "removed" in repr(handle)
    assert type(model) is cls
    assert state().keys() == before.keys()
    assert all(value is before[key] or value == before[key] for key, value in state().items())
    assert torch.equal(model(**inputs).loss, stock)
    with pytest.raises(RuntimeError, match="inside"), apply_prsl(model):  # an exception removes it, too
        raise RuntimeError("inside")
    assert torch.equal(model(**inputs).loss, stock)
    assert apply_prsl(model).k == 20


def test_two_models_of_a_class_do_not_meet() -> None:
    from transformers.loss.loss_utils import LOSS_MAPPING

    mapping = dict(LOSS_MAPPING)
    for name in FAMILIES:
        first, second = MODELS[name](), MODELS[name]()
        inputs = batch(first)
        stock = second(**inputs).loss
        with apply_prsl(first, b=0.5):
            assert torch.equal(second(**inputs).loss, stock)
            assert first(**inputs).loss != stock
            with apply_prsl(second, b=0.25, k=3) as other:
                assert other.last_terms is None
                assert second(**inputs).loss != first(**inputs).loss
    assert mapping == LOSS_MAPPING


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_replicas_and_pickle(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    stock = model(**inputs).loss
    handle = apply_prsl(model, b=0.5)
    patched = model(**inputs).loss
    clone = copy.deepcopy(model)
    replica = model._replicate_for_data_parallel()  # what nn.DataParallel makes of it on each GPU
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(**inputs).loss, patched)  # the copy's weights, not the original's
    assert replica.forward.__self__ is replica
    assert model(**inputs).loss != patched
    with pytest.raises((pickle.PicklingError, AttributeError)):
        torch.save(model, io.BytesIO())
    with pytest.raises(ValueError, match="PRSL already"):
        apply_prsl(clone)
    handle.remove()
    torch.testing.assert_close(clone(**inputs).loss, stock)
    with apply_prsl(clone, b=0.5):
        torch.testing.assert_close(clone(**inputs).loss, patched)
    torch.testing.assert_close(clone(**inputs).loss, stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_handle_does_not_keep_the_model_alive(name: str) -> None:
    model = MODELS[name]()
    handle = apply_prsl(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_compile(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    stock = model(**inputs).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).loss, stock)
    handle = apply_prsl(model, b=0.5)
    expected, terms = model(**inputs).loss, handle.last_terms
    handle.last_terms = None
    torch.testing.assert_close(compiled(**inputs).loss, expected)  # patched after compiling: compiled anew
    assert terms is not None
    torch.testing.assert_close(handle.last_terms, terms)
    handle.remove()
    torch.testing.assert_close(compiled(**inputs).loss, stock)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Stands for DistributedDataParallel, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Adapter(nn.Module):
    """Stands for peft.PeftModel: not a PreTrainedModel, and calls `forward` of the model it wraps directly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = model

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, **inputs: Any) -> Any:
        return self.base.forward(**inputs)


class HandsOn(tf.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def with_own_loss() -> Any:
    model = SHIFTED["GPT2LMHeadModel"]()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    return model


def with_own_forward() -> Any:
    model = vision_encoder_decoder()
    model.forward = functools.partial(model.forward)
    return model


T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BERT = {**SMALL, "intermediate_size": 32}
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "module": (lambda: nn.Linear(2, 2), TypeError, "expected a transformers.PreTrainedModel, got torch.nn"),
    "compiled": (lambda: torch.compile(SHIFTED["GPT2LMHeadModel"]()), TypeError, r"model\._orig_mod"),
    "parallel": (lambda: nn.DataParallel(SHIFTED["GPT2LMHeadModel"]()), TypeError, r"DataParallel .*model\.module"),
    "adapter": (lambda: Adapter(SHIFTED["GPT2LMHeadModel"]()), TypeError, r"model\.get_base_model\(\)"),
    "encoder": (causal("BertModel", **BERT), TypeError, "BertModel does not use"),
    "vision encoder": (causal("ViTModel", **VIT), TypeError, "ViTModel does not use"),
    "masked": (causal("BertForMaskedLM", **BERT), TypeError, "BertForMaskedLM does not use"),
    "masked, replaceable": (
        causal("ModernBertForMaskedLM", **BERT, **SPECIAL, cls_token_id=1, sep_token_id=2),
        TypeError,
        "ModernBertForMaskedLM trains with the loss 'ForMaskedLM'",
    ),
    "classifier": (causal("GPT2ForSequenceClassification", **GPT2), TypeError, "GPT2ForSequenceClassification"),
    "bidirectional": (causal("BertLMHeadModel", **BERT), ValueError, "is_decoder=True"),
    "seq2seq": (causal("T5ForConditionalGeneration", **T5), TypeError, "T5ForConditionalGeneration is an encoder-dec"),
    "bart": (causal("BartForConditionalGeneration", **BART), TypeError, "BartForConditionalGeneration is an encoder-d"),
    "blip2-t5": (lambda: blip2(tf.T5Config(**T5)), ValueError, "Blip2ForConditionalGeneration has an encoder-decoder"),
    "permutation": (
        causal("XLNetLMHeadModel", vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=32),
        TypeError,
        "XLNetLMHeadModel does not use `self.loss_function`",
    ),
    "own loss": (with_own_loss, ValueError, "loss function of its own"),
    "own forward": (with_own_forward, ValueError, "replaced on the instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    make, error, message = REFUSED[case]
    model = make()
    before = dict(vars(model))
    with pytest.raises(error, match=message):
        apply_prsl(model)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": VOCAB}, rf"k.*{VOCAB}"),
        ({"k": 0}, "k"),
        ({"b": float("nan")}, "b"),
        ({"space": "logits"}, "logits"),
        ({"distance": "l3"}, "l3"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_checked_at_once(name: str, options: dict[str, Any], message: str) -> None:
    model = MODELS[name]()
    cls, before = type(model), dict(vars(model))
    with pytest.raises(ValueError, match=message):
        apply_prsl(model, **options)
    assert type(model) is cls
    assert vars(model) == before
    apply_prsl(model, k=VOCAB - 1)


def test_b_zero_has_no_upper_bound_on_k() -> None:
    model = SHIFTED["GPT2LMHeadModel"]().eval()
    ids = torch.arange(6).unsqueeze(0)
    stock = model(input_ids=ids, labels=ids).loss
    with apply_prsl(model, k=10 * VOCAB, b=0.0):
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, stock)


def test_twice_is_refused() -> None:
    for name in FAMILIES:
        model = MODELS[name]()
        handle = apply_prsl(model, k=7)
        with pytest.raises(ValueError, match=r"PRSL already \(PRSLHandle\(k=7"):
            apply_prsl(model)
        handle.remove()
        assert isinstance(apply_prsl(model), PRSLHandle)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrappers_around_a_patched_model(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model)
    apply_prsl(model, b=0.5)
    expected = model(**inputs).loss
    for wrapped in (Adapter(model), nn.DataParallel(model)):
        assert torch.equal(wrapped(**inputs).loss, expected)


def test_subclass_that_hands_on_is_served() -> None:
    model = HandsOn(tf.GPT2Config(**GPT2, **NO_DROPOUT))
    inputs = batch(model)
    stock = model(**inputs).loss
    with apply_prsl(model, b=0.5):
        assert model(**inputs).loss != stock


def test_needs_torch_alone() -> None:
    code = (
        "import sys; import prsl_kernels, prsl_kernels.huggingface as h; assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: h.apply_prsl(object())\n"
        "except ImportError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
