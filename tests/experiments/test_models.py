"""All families behind one interface: text in and out, alignment, gradients, batches, and the way to disk and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import (
    Preprocessing,
    VisionLanguageModel,
    tiny_blip2,
    tiny_llava,
    tiny_qwen2_vl,
    tiny_vit_gpt2,
)

pytestmark = pytest.mark.usefixtures("_single_thread")

ANSWERS = ["red", "woman cook medium-light skin tone", "two words"]
QUESTIONS = ["what color?", "is there not a red shape in the image?", "what is the color of the rectangle?"]
FAMILIES = ["captions", "vqa", "llava", "qwen2_vl"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(600)


def make(task: str, tokenizer: PreTrainedTokenizerFast) -> VisionLanguageModel:
    """A random model whose answers depend on the image: weights from a config alone say the same of all images."""
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    model: Any
    if task in ("captions", "vqa"):
        builder = tiny_vit_gpt2 if task == "captions" else tiny_blip2
        model = builder(tokenizer, width=64, vision_layers=2, text_layers=2)
    else:
        model = tiny_llava(tokenizer) if task == "llava" else tiny_qwen2_vl(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return VisionLanguageModel(model, tokenizer, Preprocessing(64, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def wrapper(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> VisionLanguageModel:
    return make(request.param, tokenizer)


def asked(wrapper: VisionLanguageModel) -> list[str] | None:
    return QUESTIONS if wrapper.task == "vqa" else None


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_only_the_reference_and_one_eos_are_supervised(wrapper: VisionLanguageModel) -> None:
    text = wrapper.encode(ANSWERS, asked(wrapper))
    eos, pad = wrapper.tokenizer.eos_token_id, wrapper.tokenizer.pad_token_id
    for row, answer in zip(text["labels"], ANSWERS, strict=True):
        supervised = row[row != -100]
        assert supervised[-1] == eos
        assert (supervised == eos).sum() == 1
        assert pad not in supervised
        assert wrapper.tokenizer.decode(supervised[:-1]).strip() == answer


def test_a_blip2_prompt_holds_the_image_places_and_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    wrapper = make("vqa", tokenizer)
    text = wrapper.encode(ANSWERS, QUESTIONS)
    config = wrapper.model.config
    places = text["input_ids"] == config.image_token_index
    assert places.sum(1).tolist() == [config.num_query_tokens] * 3
    assert (text["labels"][places] == -100).all()
    assert text["attention_mask"][:, -1].all(), "padding stands to the left"
    for ids, mask, question, answer in zip(text["input_ids"], text["attention_mask"], QUESTIONS, ANSWERS, strict=True):
        seen = wrapper.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        assert seen == f"Question: {question} Answer: {answer}"


def test_logits_are_aligned_with_their_targets(wrapper: VisionLanguageModel) -> None:
    text = wrapper.encode(ANSWERS, asked(wrapper))
    logits, targets = wrapper.logits(images(), text)
    assert logits.shape == (*targets.shape, wrapper.vocab_size)
    for row, answer in zip(targets, ANSWERS, strict=True):
        assert wrapper.tokenizer.decode(row[row != -100][:-1]).strip() == answer
    # The stock loss of transformers shifts as the family does
    stock = wrapper.model(pixel_values=wrapper.normalize(images()), **text).loss
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), stock)


def test_logits_do_not_depend_on_the_batch(wrapper: VisionLanguageModel) -> None:
    questions = asked(wrapper)
    logits, targets = wrapper.logits(images(), wrapper.encode(ANSWERS, questions))
    for index in range(3):
        one = slice(index, index + 1)
        alone, target = wrapper.logits(images()[one], wrapper.encode(ANSWERS[one], questions and questions[one]))
        torch.testing.assert_close(alone[target != -100], logits[index][targets[index] != -100], atol=2e-5, rtol=1e-4)


def test_generation_does_not_depend_on_the_batch_and_repeats_itself(wrapper: VisionLanguageModel) -> None:
    questions = asked(wrapper)
    together = wrapper.generate(images(), questions)
    assert together == wrapper.generate(images(), questions)
    alone = [wrapper.generate(images()[i : i + 1], questions and questions[i : i + 1])[0] for i in range(3)]
    assert together == alone
    assert all(text and text == text.strip() for text in together)
    assert not any("Question" in text for text in together), "only the new text is returned"


def test_generation_agrees_with_teacher_forcing(wrapper: VisionLanguageModel) -> None:
    """Greedy decoding and the argmax of `logits` meet the same positions, prompt and start token."""
    questions = asked(wrapper)
    ids = wrapper.family.generate(wrapper.normalize(images()), questions)
    eos = wrapper.tokenizer.eos_token_id
    for index, row in enumerate(ids):
        row = row[: int((row == eos).nonzero()[0])] if eos in row else row
        text = wrapper.encode(["red"], questions and questions[index : index + 1])
        # The generated ids themselves, since not every sequence of ids is what its text is encoded as
        labels = torch.cat([row, torch.tensor([eos])])[None]
        if wrapper.task == "vqa":
            prompt = text["input_ids"][:, : int((text["labels"] != -100).nonzero()[0, 1])]
            inputs = torch.cat([prompt, labels], 1)
            labels = torch.cat([torch.full_like(prompt, -100), labels], 1)
            text = {**text, "input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
            if "mm_token_type_ids" in text:
                text["mm_token_type_ids"] = (inputs == wrapper.model.config.image_token_id).int()
        else:
            text = {"labels": labels}
        logits, _ = wrapper.logits(images()[index : index + 1], text)
        assert logits[0].argmax(-1)[: len(row)].tolist() == row.tolist()


def test_training_mode_does_not_reach_generation(wrapper: VisionLanguageModel) -> None:
    expected = wrapper.generate(images(), asked(wrapper))
    wrapper.train()
    try:
        assert wrapper.generate(images(), asked(wrapper)) == expected
        assert wrapper.model.training
    finally:
        wrapper.eval()


def test_gradients_reach_the_pixels(wrapper: VisionLanguageModel) -> None:
    pixels = images().requires_grad_()
    logits, targets = wrapper.logits(pixels, wrapper.encode(ANSWERS, asked(wrapper)))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.abs().amax((1, 2, 3)) > 0).all()


def test_the_normaliser_is_inside(wrapper: VisionLanguageModel) -> None:
    pixels = images(1)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(wrapper.normalize(pixels), wrapper.family.arrange(expected))
    with pytest.raises(ValueError, match="shape"):
        wrapper.normalize(pixels[0])
    with pytest.raises(ValueError, match="uint8"):
        wrapper.normalize((pixels * 255).to(torch.uint8))


def test_the_way_to_disk_and_back(wrapper: VisionLanguageModel, tmp_path: Path) -> None:
    wrapper.save_pretrained(tmp_path / "exact", dtype=torch.float32)
    same = VisionLanguageModel.from_pretrained(tmp_path / "exact")
    assert same.task == wrapper.task
    assert same.preprocessing == wrapper.preprocessing
    text = wrapper.encode(ANSWERS, asked(wrapper))
    assert {k: v.tolist() for k, v in same.encode(ANSWERS, asked(wrapper)).items()} == {
        k: v.tolist() for k, v in text.items()
    }
    torch.testing.assert_close(same.logits(images(), text)[0], wrapper.logits(images(), text)[0], rtol=0, atol=0)
    assert same.generate(images(), asked(wrapper)) == wrapper.generate(images(), asked(wrapper))

    wrapper.save_pretrained(tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    tied = wrapper.model.config.model_type in ("vision-encoder-decoder", "blip-2")
    assert any("lm_head" in name for name in names) != tied, "the tied vocabulary matrix is stored once"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    half = VisionLanguageModel.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half.logits(images(), text)[0], wrapper.logits(images(), text)[0], rtol=0.05, atol=0.2)
    assert wrapper.model.dtype == torch.float32, "saving does not change the model in memory"


def test_saving_refuses_what_it_would_destroy(wrapper: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other files"):
        wrapper.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_weight_beyond_half_precision_is_not_saved_as_infinity(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    wrapper = make("captions", tokenizer)
    with torch.no_grad():
        next(iter(wrapper.parameters())).fill_(1e6)
    with pytest.raises(UserError, match="float32"):
        wrapper.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_encoded_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    captions, vqa = make("captions", tokenizer), make("vqa", tokenizer)
    with pytest.raises(UserError, match="empty reference"):
        captions.encode(["a", "  "])
    with pytest.raises(UserError, match="64"):
        captions.encode(["word " * 100])
    with pytest.raises(ValueError, match="questions"):
        captions.encode(["a"], ["what?"])
    with pytest.raises(ValueError, match="sequences"):
        captions.encode("a")
    with pytest.raises(ValueError, match="at least one"):
        captions.encode([])
    with pytest.raises(UserError, match="give one for each"):
        vqa.encode(["a"])
    with pytest.raises(UserError, match="empty question"):
        vqa.generate(images(1), [" "])
    with pytest.raises(ValueError, match="2 entries for 1"):
        vqa.encode(["a"], ["what?", "why?"])
    with pytest.raises(ValueError, match="3 images for 1 texts"):
        captions.logits(images(3), captions.encode(["a"]))
    assert captions.generate(images(0)) == []


@pytest.mark.parametrize("text", ["naïve café", "日本語", "a 👩🏽‍🚀 b", "it's, well: 3.5 !", "two  spaces"])
def test_any_text_survives_as_labels(wrapper: VisionLanguageModel, text: str) -> None:
    labels = wrapper.encode([text], ["what?"] if wrapper.task == "vqa" else None)["labels"][0]
    assert wrapper.tokenizer.decode(labels[labels != -100][:-1]).strip() == text


def test_a_fresh_blip2_can_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    """Vision weights of 1e-10 and equal queries, the defaults, would leave the image invisible for good."""
    torch.manual_seed(0)
    model = tiny_blip2(tokenizer, width=64, vision_layers=1, text_layers=1)
    assert float(model.query_tokens.detach().std(1).min()) > 0.001
    matrices = [p for name, p in model.vision_model.named_parameters() if p.ndim > 1 and "class" not in name]
    assert min(float(p.detach().std()) for p in matrices) > 0.005
