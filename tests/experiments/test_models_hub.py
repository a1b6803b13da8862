"""Checkpoints by their names on the Hub, as they lie in its cache; and captioners made of two of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_cache import put
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

from prsl_kernels.experiments.cli import app
from prsl_kernels.experiments.data.tokenizer import build_tokenizer
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import write_json
from prsl_kernels.experiments.models import Preprocessing, VisionLanguageModel, tiny_vit_gpt2
from prsl_kernels.experiments.models.hub import snapshot
from prsl_kernels.experiments.models.loading import inspect, resolve

pytestmark = pytest.mark.usefixtures("_single_thread")

NAME = "someone/a-captioner"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(600)


@pytest.fixture(scope="module")
def saved(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_vit_gpt2(tokenizer, width=64, vision_layers=1, text_layers=1)
    VisionLanguageModel(model, tokenizer, Preprocessing(64, (0.5,) * 3, (0.5,) * 3)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_a_downloaded_checkpoint_is_found_by_name_and_revision(cache: Path, saved: Path) -> None:
    main, other = put(cache, saved, NAME), put(cache, saved, NAME, "refs/pr/3", "b" * 40)
    assert resolve(NAME) == main
    assert resolve(f"{NAME}@refs/pr/3") == other
    assert resolve(f"{NAME}@{'b' * 40}") == other
    assert inspect(NAME) == ("captions", 600)
    assert VisionLanguageModel.from_pretrained(NAME).task == "captions"


def test_a_local_folder_goes_before_the_hub(
    cache: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, saved, NAME)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / NAME)
    assert resolve(NAME) == Path(NAME)


def test_what_is_not_there_comes_with_the_command_that_gets_it(cache: Path) -> None:
    with pytest.raises(UserError, match=r"neither a local folder nor among the models downloaded") as caught:
        resolve("Salesforce/blip2-opt-2.7b@refs/pr/7")
    command = re.search(r"`(hf download [^`]*)`", str(caught.value))
    assert command is not None
    words = shlex.split(command[1])
    assert words[:5] == ["hf", "download", "Salesforce/blip2-opt-2.7b", "--revision", "refs/pr/7"]
    included = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    assert "*.safetensors" in included
    assert "*.json" in included
    assert not any("bin" in pattern or pattern == "*" for pattern in included)
    assert "'*.json'" in command[1], "a shell would put its own files in place of a bare pattern"


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_half_a_download_is_not_enough(cache: Path, saved: Path, lost: str) -> None:
    (put(cache, saved, NAME) / lost).unlink()
    with pytest.raises(UserError, match=r"not complete.*`hf download"):
        resolve(NAME)


def test_a_captioner_that_is_only_pickled_says_what_to_do(cache: Path) -> None:
    with pytest.raises(UserError, match=r"only pickled weights.*'\*\.bin' --local-dir FOLDER.*@refs/pr/NUMBER"):
        resolve("nlpconnect/vit-gpt2-image-captioning")
    with pytest.raises(UserError, match=r"only pickled weights.*import AutoModel as Model"):
        snapshot("microsoft/deberta-xlarge-mnli")
    with pytest.raises(UserError, match=r"--revision refs/pr/9 .*safetensors"):
        resolve("nlpconnect/vit-gpt2-image-captioning@refs/pr/9")


def test_the_command_that_converts_pickled_weights_works(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a model"
    shutil.copytree(saved, folder)
    expected = VisionLanguageModel.from_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled") as caught:
        VisionLanguageModel.from_pretrained(folder)
    words = shlex.split(str(caught.value).partition("tensors alone: ")[2])
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, "-c", words[2]], check=True, capture_output=True, timeout=300)
    found = VisionLanguageModel.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.model.state_dict().items())


@pytest.fixture
def halves(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, Path]:
    """An image encoder with its processor, and a GPT-2 with one special token for everything, as published."""
    torch.manual_seed(1)
    vit = ViTModel(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    )
    vit.save_pretrained(tmp_path / "vit")
    write_json(tmp_path / "vit" / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    eos = tokenizer.eos_token_id
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=600, n_positions=32, n_embd=64, n_layer=1, n_head=2, bos_token_id=eos, eos_token_id=eos)
    )
    gpt2.save_pretrained(tmp_path / "gpt2")
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="</s>", eos_token="</s>")
    own.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "vit", tmp_path / "gpt2"


def test_two_halves_make_a_captioner(halves: tuple[Path, Path], tmp_path: Path) -> None:
    def make(name: str, seed: int) -> VisionLanguageModel:
        arguments = ["model", "combine", str(halves[0]), str(halves[1]), str(tmp_path / name), "--seed", str(seed)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str((tmp_path / name).resolve())
        return VisionLanguageModel.from_pretrained(tmp_path / name)

    vlm, again, other = make("one", 5), make("two", 5), make("three", 6)
    states = [model.model.state_dict() for model in (vlm, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    differing = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert differing
    assert all("crossattention" in name for name in differing), "nothing else is new"
    kept = GPT2LMHeadModel.from_pretrained(halves[1]).state_dict()
    assert all(torch.equal(states[0][f"decoder.{name}"], value) for name, value in kept.items())
    eos = vlm.tokenizer.eos_token_id
    config = vlm.model.config
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (eos, eos, eos)
    assert vlm.tokenizer.pad_token_id == eos
    assert (vlm.image_size, vlm.image_std) == (32, (0.25, 0.25, 0.25))
    text = vlm.encode(["one", "a longer text"])
    assert ((text["labels"] == eos).sum(1) == 1).all(), "padding is not learnt"
    loss = vlm.model(pixel_values=vlm.normalize(torch.rand(2, 3, 32, 32)), **text).loss
    assert loss.isfinite()
    assert len(vlm.generate(torch.rand(1, 3, 32, 32))) == 1


def test_halves_that_do_not_fit_are_refused(
    halves: tuple[Path, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prsl_kernels.experiments.models.combine import combine

    vit, gpt2 = halves
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=600, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64)
    )
    opt.save_pretrained(tmp_path / "opt")
    for file in gpt2.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "opt" / file.name)
    with pytest.raises(UserError, match="cannot attend to an encoder"):
        combine(vit, tmp_path / "opt", tmp_path / "out")
    with pytest.raises(UserError, match=r"google/vit.*`hf download google/vit"):
        combine("google/vit-base-patch16-224-in21k", gpt2, tmp_path / "out")
    config = json.loads((gpt2 / "config.json").read_text())
    write_json(gpt2 / "config.json", config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    (gpt2 / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    # Asked at a terminal, transformers would run it where the answer is yes
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"cannot be (used|read)"):
        combine(vit, gpt2, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    write_json(gpt2 / "config.json", config)
    write_json(vit / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    shutil.copy(gpt2 / "own.py", vit / "own.py")
    with pytest.raises(UserError, match="cannot be used"):
        combine(vit, gpt2, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        combine(vit, gpt2, tmp_path / "out")
    assert not (tmp_path / "out").exists()
