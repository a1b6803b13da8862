"""Models that chat, against transformers' own processors, which take the same images and make the same tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prsl_kernels import apply_prsl, prsl_cross_entropy
from prsl_kernels.experiments.attacks.bim import BIM
from prsl_kernels.experiments.attacks.budget import Budget
from prsl_kernels.experiments.attacks.objectives import TextObjective
from prsl_kernels.experiments.config import DecodingConfig
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_llava, tiny_qwen2_vl

pytestmark = pytest.mark.usefixtures("_single_thread")

QUESTIONS = ["what color?", "is there not a red shape in the image?"]
ANSWERS = ["red", "yes it is"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(600)


@pytest.fixture(scope="module")
def folders(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    for name, builder in (("llava", tiny_llava), ("qwen2_vl", tiny_qwen2_vl)):
        torch.manual_seed(0)
        own = copy.deepcopy(tokenizer)
        vlm = VisionLanguageModel(builder(own), own, Preprocessing(64, MEAN, STD))
        vlm.save_pretrained(root / name, dtype=torch.float32)
    return {"llava": root / "llava", "qwen2_vl": root / "qwen2_vl"}


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def vlm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(folders[request.param])


def pixels(count: int = 2) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    return levels.float() / 255


def pictures(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def test_llava_agrees_with_its_processor(folders: dict[str, Path]) -> None:
    vlm = VisionLanguageModel.from_pretrained(folders["llava"])
    vlm.tokenizer.padding_side = "left"
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folders["llava"]),
        vlm.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    expected = processor(images=pictures(pixels()), text=texts, padding=True, return_tensors="pt")
    torch.testing.assert_close(vlm.normalize(pixels()), expected["pixel_values"], rtol=1e-5, atol=1e-5)
    longest = vlm.family.model.generate(**expected, max_new_tokens=8, do_sample=False, pad_token_id=0)
    says = [
        text.strip()
        for text in vlm.tokenizer.batch_decode(longest[:, expected["input_ids"].shape[1] :], skip_special_tokens=True)
    ]
    assert vlm.generate(pixels(), QUESTIONS) == says
    text = vlm.encode(ANSWERS, QUESTIONS)
    for row, mask, labels, ids, kept in zip(
        text["input_ids"], text["attention_mask"], text["labels"], expected["input_ids"], expected["attention_mask"],
        strict=True,
    ):  # fmt: skip
        prompt = row[mask.bool() & (labels == -100)]
        assert prompt.tolist() == ids[kept.bool()].tolist()


def test_qwen_makes_the_patches_of_its_image_processor(folders: dict[str, Path]) -> None:
    vlm = VisionLanguageModel.from_pretrained(folders["qwen2_vl"])
    processor = Qwen2VLImageProcessorPil.from_pretrained(folders["qwen2_vl"])
    expected = processor(images=pictures(pixels()), return_tensors="pt")
    torch.testing.assert_close(vlm.normalize(pixels()), expected["pixel_values"], rtol=1e-5, atol=1e-5)
    text = vlm.encode(ANSWERS, QUESTIONS)
    assert text["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    places = text["input_ids"] == vlm.model.config.image_token_id
    assert places.sum(1).tolist() == [16, 16]
    assert (text["mm_token_type_ids"].bool() == places).all()


def test_qwen_2_5_is_asked_in_the_same_way(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = copy.deepcopy(tokenizer)
    older = tiny_qwen2_vl(own).config
    tokens = {name: getattr(older, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    text = {name: value for name, value in older.text_config.to_dict().items() if name != "model_type"}
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
              "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    model.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=own.eos_token_id)
    VisionLanguageModel(model, own, Preprocessing(64, MEAN, STD)).save_pretrained(tmp_path / "model")
    vlm = VisionLanguageModel.from_pretrained(tmp_path / "model")
    text = vlm.encode(ANSWERS, QUESTIONS)
    images = pixels().requires_grad_()
    logits, targets = vlm.logits(images, text)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(vlm.model(pixel_values=vlm.normalize(pixels()), **text).loss, loss)
    loss.backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert len(vlm.generate(pixels(), QUESTIONS)) == 2


def test_an_image_size_that_is_not_fixed_becomes_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the Hub has it: bounds on the area, within which a processor takes an image as it comes."""
    file = folders["qwen2_vl"] / "preprocessor_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}))
        vlm = VisionLanguageModel.from_pretrained(folders["qwen2_vl"])
    finally:
        file.write_text(before)
    assert vlm.image_size == 448
    vlm.save_pretrained(tmp_path / "saved")
    assert VisionLanguageModel.from_pretrained(tmp_path / "saved").image_size == 448


def test_the_loss_of_transformers_is_that_of_the_aligned_logits(vlm: VisionLanguageModel) -> None:
    text = vlm.encode(ANSWERS, QUESTIONS)
    inputs = {"pixel_values": vlm.normalize(pixels()), **text}
    logits, targets = vlm.logits(pixels(), text)
    rows, target = logits.flatten(0, 1), targets.flatten()
    torch.testing.assert_close(vlm.model(**inputs).loss, F.cross_entropy(rows, target))
    with apply_prsl(vlm.model, k=6, b=0.5) as handle:
        loss = vlm.model(**inputs).loss
        torch.testing.assert_close(loss, prsl_cross_entropy(rows, target, k=6, b=0.5))
        assert handle.last_terms is not None
        torch.testing.assert_close(vlm.logits(pixels(), text)[0], logits)


def test_an_attack_moves_the_objective(vlm: VisionLanguageModel) -> None:
    objective = TextObjective(vlm, vlm.encode(ANSWERS, QUESTIONS))
    budget = Budget.from_config(8, 4, "pixels255", std=vlm.image_std)
    clean = pixels()
    moved = BIM(budget, 2)(objective, clean)
    with torch.no_grad():
        assert (objective(moved) > objective(clean)).all()
        alone = objective.select(torch.tensor([1]))(clean[1:])
        torch.testing.assert_close(alone, objective(clean)[1:], rtol=1e-4, atol=1e-5)


def test_decoding_is_what_was_asked_for(folders: dict[str, Path]) -> None:
    decoding = DecodingConfig(prompt="<image>{question}?", max_new_tokens=3, num_beams=2)
    vlm = VisionLanguageModel.from_pretrained(folders["llava"], decoding=decoding)
    text = vlm.encode(["red"], ["what {is} it"])
    prompt = text["input_ids"][text["labels"] == -100]
    assert vlm.tokenizer.decode(prompt, skip_special_tokens=True) == "what {is} it?"
    ids = vlm.family.generate(vlm.normalize(pixels(1)), ["what {is} it"])
    assert ids.shape[1] <= 3
    stock = vlm.model.generate(
        pixel_values=vlm.normalize(pixels(1)),
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        num_beams=2,
        do_sample=False,
        max_new_tokens=3,
    )
    assert vlm.tokenizer.batch_decode(ids, skip_special_tokens=True) == vlm.tokenizer.batch_decode(
        stock[:, len(prompt) :], skip_special_tokens=True
    )


def test_a_prompt_without_the_image_and_a_question_with_it_are_refused(folders: dict[str, Path]) -> None:
    blind = VisionLanguageModel.from_pretrained(folders["llava"], decoding=DecodingConfig(prompt="say {question}"))
    with pytest.raises(UserError, match=r"<image> 0 times; set decoding\.prompt"):
        blind.encode(["red"], ["what?"])
    vlm = VisionLanguageModel.from_pretrained(folders["llava"])
    with pytest.raises(UserError, match=r"<image> 2 times.*take it out of questions"):
        vlm.generate(pixels(1), ["what is <image>?"])
    blip = VisionLanguageModel.from_pretrained("vqa")
    with pytest.raises(UserError, match="take it out"):
        blip.encode(["red"], ["what is <image>?"])
    with pytest.raises(UserError, match=r"decoding\.prompt .* takes no prompt"):
        VisionLanguageModel.from_pretrained("captions", decoding=DecodingConfig(prompt="{question}"))


def test_the_shipped_bases_obey_decoding() -> None:
    for name in ("captions", "vqa"):
        questions = ["what color?"] if name == "vqa" else None
        short = VisionLanguageModel.from_pretrained(name, decoding=DecodingConfig(max_new_tokens=1, num_beams=3))
        ids = short.family.generate(short.normalize(pixels(1)), questions)
        assert ids.shape == (1, 1)


def test_a_wrong_number_of_places_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    vlm = VisionLanguageModel.from_pretrained(folders["llava"])
    vlm.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"image_seq_length": 576}))
    with pytest.raises(UserError, match=r"image_seq_length is 576 .* set it to 16"):
        VisionLanguageModel.from_pretrained(tmp_path / "model")
