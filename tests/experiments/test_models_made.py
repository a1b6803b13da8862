"""Bases that are made where they are asked for, "tiny-llava" and "tiny-qwen2-vl": the same ones everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import own_cache

from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.data.cache import MANIFEST
from prsl_kernels.experiments.digests import base_digest
from prsl_kernels.experiments.files import sha256
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.models.loading import family_of, inspect, resolve
from prsl_kernels.experiments.models.tiny_chat import MADE

pytestmark = pytest.mark.usefixtures("_single_thread")

NAMES = ("tiny-llava", "tiny-qwen2-vl")

# Another process, of another mood: threads, hashes and torch's generator are not those of this one.
_ELSEWHERE = """
import json, sys, torch
from prsl_kernels.experiments.digests import base_digest
torch.manual_seed(77)
print(json.dumps({name: base_digest(name) for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module", name="cache", autouse=True)
def cache_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = own_cache(tmp_path_factory.mktemp("made"))
        monkeypatch.setenv("PRSL_CACHE", str(folder))
        yield folder


def test_these_are_the_names() -> None:
    assert tuple(MADE) == NAMES


def test_whichever_process_makes_them_they_are_the_same(cache: Path, tmp_path: Path) -> None:
    generator = torch.get_rng_state()
    here = {name: base_digest(name) for name in NAMES}
    assert torch.equal(torch.get_rng_state(), generator), "the caller's random numbers are its own"
    other = own_cache(tmp_path)
    environment = {**os.environ, "PRSL_CACHE": str(other), "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"}
    result = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *NAMES], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == here
    assert here["tiny-llava"] != here["tiny-qwen2-vl"]
    for name in NAMES:
        mine, theirs = cache / "bases" / name, other / "bases" / name
        assert sorted(path.name for path in mine.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert all(sha256(path) == sha256(theirs / path.name) for path in mine.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_model_for_questions(name: str, cache: Path) -> None:
    folder = resolve(name)
    assert folder == cache / "bases" / name
    assert not list(folder.glob("*.bin"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    task, vocabulary = inspect(name)
    assert task == family_of(name).task == "vqa"
    vlm = VisionLanguageModel.from_pretrained(name)
    assert (vlm.task, vlm.vocab_size, vlm.image_size) == ("vqa", vocabulary, 64)
    assert vocabulary >= 2000
    examples = load_dataset("easy-vqa", "test", limit=3).examples
    pixels = vlm.load_pixels([example.image for example in examples])
    questions = [example.question or "" for example in examples]
    said = vlm.generate(pixels, questions)
    assert len(said) == 3
    assert vlm.generate(pixels, questions) == said
    logits, targets = vlm.logits(pixels.requires_grad_(), vlm.encode([e.references[0] for e in examples], questions))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax((1, 2, 3)) > 0).all(), "an attack needs a gradient on each image"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "made once"


def test_an_interrupted_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = own_cache(tmp_path)
    monkeypatch.setenv("PRSL_CACHE", str(cache))

    def interrupted(self: VisionLanguageModel, folder: Path, **settings: Any) -> None:
        write(self, folder, **settings)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    write = VisionLanguageModel.write_files
    with monkeypatch.context() as patched:
        patched.setattr(VisionLanguageModel, "write_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve("tiny-llava")
    assert not [path for path in (cache / "bases").iterdir() if path.is_dir()]
    assert inspect("tiny-llava")[0] == "vqa"
    # What a kill or a full disk cut short is made again
    weights = resolve("tiny-llava") / "model.safetensors"
    whole = sha256(weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert sha256(resolve("tiny-llava") / "model.safetensors") == whole
    (weights.parent / MANIFEST).unlink()
    assert sha256(resolve("tiny-llava") / "model.safetensors") == whole
