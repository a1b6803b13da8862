"""BERTScore: equal to bert-score, on any local encoder, never from the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bert_score
import pytest
from tiny_encoders import tiny_encoder

from prsl_kernels.experiments.data.packages import encoder_directory
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import bertscore
from prsl_kernels.experiments.metrics.bertscore import PACKAGED_LAYERS, BertScore
from prsl_kernels.experiments.metrics.scorer import Scorer

CANDIDATES = [
    "a dog runs",
    "woman with red hair",
    "A MAN, riding a wave!",
    "🐶",
    "日本 の 旗",
    "the the the",
    "x " * 600,
]
REFERENCES = [
    ["the dog is running", "a dog"], ["woman: red hair"], ["a surfer", "man on a wave", "beach"], ["dog face"],
    ["flag: Japan"], ["the"], ["y", "x x x"],
]  # fmt: skip


@pytest.fixture(scope="module")
def scorer() -> BertScore:
    return BertScore()


def test_equals_bert_score(scorer: BertScore) -> None:
    upstream = bert_score.score(
        CANDIDATES, REFERENCES, model_type=str(encoder_directory()), num_layers=PACKAGED_LAYERS, device="cpu"
    )
    ours = [scorer.score(candidate, group) for candidate, group in zip(CANDIDATES, REFERENCES, strict=True)]
    assert ours == pytest.approx(upstream[2].tolist(), abs=1e-5)


def test_does_not_depend_on_the_batch(scorer: BertScore, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(zip(CANDIDATES, REFERENCES, strict=True))[:-1]
    alone = [scorer.score(candidate, group) for candidate, group in cases]
    monkeypatch.setattr(bertscore, "_BLOCK", 2)
    monkeypatch.setattr(scorer, "_scores", {})
    scorer.add([(candidate, text) for candidate, group in cases for text in group])
    together = [scorer.score(candidate, group) for candidate, group in cases]
    assert together == pytest.approx(alone, abs=1e-5)


def test_every_process_computes_the_same_bits() -> None:
    program = """
from prsl_kernels.experiments.metrics.bertscore import BertScore
pairs = [(f"{'a ' * (i % 7)}dog {i}", f"the {'big ' * (i % 5)}dog {i % 13}") for i in range(150)]
scorer = BertScore()
scorer.add(pairs)
print([scorer.score(one, [other]).hex() for one, other in pairs])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_empty_texts_and_line_breaks(scorer: BertScore) -> None:
    for blank in ("", " ", "\n", "\u2028\t", "\u200b", "\x00"):
        assert scorer.score(blank, ["a dog"]) == 0
    assert scorer.score("a dog", ["", " "]) == 0
    assert scorer.score("a\u2028dog", ["a dog"]) == pytest.approx(1, abs=1e-6)
    assert scorer.score("a dog", ["", "a dog"]) == pytest.approx(1, abs=1e-6)
    assert 0 <= scorer.score("\ud800", ["a dog"]) < 1


def test_each_pair_is_computed_once(scorer: BertScore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    compute = scorer._compute
    monkeypatch.setattr(scorer, "_compute", lambda pairs: (seen.extend(pairs), compute(pairs))[1])
    scorer.score("one of a kind", ["another"])
    scorer.add([("one of a kind", "another")] * 3 + [("one more", "another")])
    assert seen == [("one of a kind", "another"), ("one more", "another")]


def test_version_names_what_scores_depend_on(scorer: BertScore) -> None:
    for part in ("bert-score 0.3", "all-MiniLM-L6-v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895", "layer 5"):
        assert part in scorer.version


@pytest.mark.parametrize("family", ["t5", "deberta", "bart"])
def test_any_encoder_family_equals_bert_score(family: str, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / family, family)
    candidates, references = ["a dog runs", "the cat"], ["the dog is running", "a cat"]
    ours = BertScore(folder, num_layers=2)
    upstream = bert_score.BERTScorer(model_type=str(folder), num_layers=2, device="cpu")
    upstream._tokenizer.model_max_length = 64  # it overflows otherwise
    expected = upstream.score(candidates, references)[2].tolist()
    assert [ours.score(c, [r]) for c, r in zip(candidates, references, strict=True)] == pytest.approx(
        expected, abs=1e-5
    )
    assert ours.score("a dog " * 400, ["a cat " * 400]) > 0  # longer than the encoder's positions


def test_layer_by_name(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "models--microsoft--deberta-v3-small" / "snapshots" / "abc", "deberta")
    assert BertScore(folder).num_layers == 4
    hub_name = tmp_path / "t5-small"
    shutil.copytree(folder, hub_name)
    with pytest.raises(UserError, match="layers 1 to 4, so num_layers cannot be 6"):
        BertScore(hub_name)
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    with pytest.raises(UserError, match="num_layers"):
        BertScore(mine)
    assert BertScore(mine, 1).num_layers == 1


def test_refuses_what_is_no_safetensorstiny_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        BertScore(tmp_path, 1)
    folder = tiny_encoder(tmp_path / "model", "deberta")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        BertScore(folder, 1)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        BertScore(folder, 1)
    weights.write_bytes(content)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        BertScore(folder, 1)


def test_further_encoders_give_scores_of_their_own(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "other", "deberta")
    with Scorer(metrics=("rouge_l", "bertscore_f1"), encoders={"other": (folder, 1)}) as scorer:
        pairs = dict(enumerate(CANDIDATES)), dict(enumerate(REFERENCES))
        candidates, references = ({f"id-{key}": value for key, value in texts.items()} for texts in pairs)
        found = scorer.score(candidates, references)
    assert set(found.corpus) == {"rouge_l", "bertscore_f1", "bertscore_f1_other"}
    alone = BertScore(folder, 1)
    for name, row in found.items.items():
        assert row["bertscore_f1_other"] == pytest.approx(alone.score(candidates[name], references[name]), abs=1e-6)
        assert row["bertscore_f1_other"] != row["bertscore_f1"]
    assert "layer 1" in found.versions["bertscore_f1_other"]
