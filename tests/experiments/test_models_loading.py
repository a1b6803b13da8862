"""Folders that are not what they should be: each fault is named with its remedy; and folders as the Hub has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_blip2, tiny_vit_gpt2

TINY = {"width": 64, "vision_layers": 1, "text_layers": 1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(600)


@pytest.fixture(scope="module")
def saved(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    preprocessing = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for name, builder in (("captions", tiny_vit_gpt2), ("vqa", tiny_blip2)):
        VisionLanguageModel(builder(tokenizer, **TINY), tokenizer, preprocessing).save_pretrained(root / name)
    return {"captions": root / "captions", "vqa": root / "vqa"}


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file; None removes one."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for key, value in changes.items():
            values.pop(key, None)
            if value is not None:
                values[key] = value
        (folder / name).write_text(json.dumps(values))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["intermediate_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))


def of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))


def of_encoder(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["encoder"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def an_index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"encoder.x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def of_another_tokenizer(folder: Path) -> None:
    build_tokenizer(700).save_pretrained(folder)


def a_sequence_to_sequence_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {
        "model_type": "t5",
        "vocab_size": 600,
        "d_model": 64,
        "num_layers": 1,
        "d_kv": 8,
        "d_ff": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))


FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("captions", remove("config.json"), r"config\.json: there is no such file"),
    ("captions", edit("config.json", model_type="bert"), "model type is 'bert'.*VisionEncoderDecoderModel"),
    ("captions", edit("config.json", model_type=None), "model type is None"),
    ("vqa", edit("config.json", architectures=["Blip2ForImageTextRetrieval"]), "Blip2ForImageTextRetrieval"),
    ("captions", truncate("config.json"), r"config\.json: not a JSON file"),
    ("captions", remove("model.safetensors"), "no model.safetensors"),
    ("captions", truncate("model.safetensors"), r"model\.safetensors: truncated or damaged"),
    ("captions", pickled, "pickled.*convert"),
    ("captions", lost_shard, "00001-of-00002.*missing"),
    ("captions", of_another_size, "do not fit together"),
    ("captions", of_more_layers, "lack .* tensors"),
    ("captions", remove("tokenizer.json"), "no tokenizer"),
    ("captions", truncate("tokenizer.json"), "tokenizer cannot be read"),
    ("vqa", of_another_tokenizer, "tokenizer has 700 tokens and the model 600"),
    ("captions", remove("preprocessor_config.json"), "no preprocessor_config"),
    ("captions", edit("preprocessor_config.json", image_mean=[0.5]), "image_mean is .0.5."),
    ("captions", edit("preprocessor_config.json", image_std=[0.5, 0.0, 0.5]), "image_std .*positive"),
    ("vqa", edit("preprocessor_config.json", image_std=None), "image_std is None"),
    ("vqa", edit("config.json", image_token_index=None), "image_token_index is None"),
    ("vqa", edit("config.json", image_token_index=5000), "image_token_index is 5000"),
    ("vqa", edit("config.json", model_type=["blip-2"]), r"model type is \['blip-2'\]"),
    ("vqa", edit("config.json", architectures=[1]), r"architecture is \[1\]"),
    ("vqa", an_index_of_nothing, "names no files of weights"),
    ("captions", of_encoder(hidden_size="large"), r"config\.json: cannot be used .*hidden_size"),
    ("captions", of_encoder(patch_size=0), "do not fit together"),
    ("captions", of_encoder(model_type="another"), r"config\.json: cannot be used .*another"),
    # Transformers would fetch it from there and run it
    ("captions", edit("config.json", _attn_implementation="someone/kernels"), "code from the Hub"),
    ("captions", of_encoder(_attn_implementation="someone/kernels"), "code from the Hub"),
]


@pytest.mark.parametrize(("task", "break_it", "message"), FAULTS)
def test_each_fault_is_named(
    task: str, break_it: Callable[[Path], None], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved[task], folder)
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        VisionLanguageModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert ";" in str(caught.value) or "no such file" in str(caught.value) or "not a JSON" in str(caught.value)


def test_an_encoder_decoder_language_model_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["vqa"], tmp_path / "model")
    a_sequence_to_sequence_model(tmp_path / "model")
    with pytest.raises(UserError, match="decoder-only"):
        VisionLanguageModel.from_pretrained(tmp_path / "model")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="captions or vqa"):
        VisionLanguageModel.from_pretrained("caption")
    with pytest.raises(UserError, match="no such folder"):
        VisionLanguageModel.from_pretrained(tmp_path / "captions")


def test_code_of_a_checkpoint_is_never_run(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved["captions"], folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(folder)
    edit("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})(folder)
    VisionLanguageModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_as_nlpconnect_made_it(saved: dict[str, Path], tmp_path: Path) -> None:
    """No padding token, GPT-2's one special token for everything, an old image processor, a foreign length limit."""
    folder = tmp_path / "model"
    shutil.copytree(saved["captions"], folder)
    edit("tokenizer_config.json", pad_token=None, bos_token="</s>")(folder)
    edit("config.json", pad_token_id=None, bos_token_id=None)(folder)
    edit("preprocessor_config.json", image_processor_type=None, feature_extractor_type="ViTFeatureExtractor", size=64)(
        folder
    )
    edit("generation_config.json", max_new_tokens=None, max_length=9, num_beams=4)(folder)
    wrapper = VisionLanguageModel.from_pretrained(folder)
    text = wrapper.encode(["one", "a longer text"])
    assert [int((row != -100).sum()) for row in text["labels"]] == [
        len(wrapper.tokenizer(t)["input_ids"]) + 1 for t in ("one", "a longer text")
    ]
    pixels = torch.rand(2, 3, 64, 64)
    logits, targets = wrapper.logits(pixels, text)
    assert logits.shape[:2] == targets.shape
    assert wrapper.generate(pixels) == wrapper.generate(pixels)


def test_a_processor_config_serves_as_well(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved["vqa"], folder)
    inner = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner, "num_query_tokens": 8}))
    assert VisionLanguageModel.from_pretrained(folder).image_mean == (0.1, 0.2, 0.3)


def test_other_precisions(saved: dict[str, Path]) -> None:
    wrapper = VisionLanguageModel.from_pretrained(saved["vqa"], dtype=torch.bfloat16)
    assert wrapper.model.language_model.dtype == torch.bfloat16
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    logits, _ = wrapper.logits(pixels, wrapper.encode(["red"], ["what?"]))
    logits.float().logsumexp(-1).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0
