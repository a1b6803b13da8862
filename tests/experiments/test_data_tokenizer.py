"""The shared vocabulary: its size, that it is the same everywhere, and that no text is lost in it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prsl_kernels.experiments.data import SPLITS, fetch_packages, load_dataset
from prsl_kernels.experiments.data.tokenizer import MAXIMUM_LENGTH, SPECIAL_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    fetch_packages(download=True)
    return build_tokenizer()


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 2048
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(tokenizer.image_token) == 3
    assert tokenizer.model_max_length == MAXIMUM_LENGTH
    assert tokenizer.unk_token is None
    assert sorted(tokenizer.get_vocab().values()) == list(range(2048))


def test_texts_of_both_tasks_are_short_and_use_much_of_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [e for name in ("openmoji", "easy-vqa") for split in SPLITS for e in load_dataset(name, split).examples]
    texts = sorted({text for e in examples for text in (*e.references, *([e.question] if e.question else []))})
    rows = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(rows) == texts
    assert max(map(len, rows)) <= 24
    used = {token for row in rows for token in row}
    assert len(used) > 1400


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("woman's hat", "  Ünïcødé\n\u2028 漢字 🧑‍🌾 ,.", "what color is the circle?<image>"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.model_max_length == MAXIMUM_LENGTH
    assert loaded.convert_tokens_to_ids(loaded.image_token) == 3


def test_another_process_builds_the_same_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    program = (
        "import hashlib\nfrom prsl_kernels.experiments.data.tokenizer import build_tokenizer\n"
        "print(hashlib.sha256(build_tokenizer().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert output.strip() == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE"


def test_more_tokens_than_the_texts_give_are_refused() -> None:
    with pytest.raises(ValueError, match="set vocab_size to at most"):
        build_tokenizer(10**6)
