"""`prsl score`: hostile JSON, and the shape of the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.metrics import ALL, load_captions_json, score_files


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("candidates", '{"a": "x", "a": "y"}', "id 'a' occurs more than once"),
        ("references", '{"a": ["x"], "b": {"c": 1, "c": 2}}', "id 'c' occurs more than once"),
        ("candidates", '{"a": NaN}', "NaN is not valid JSON"),
        ("candidates", '{"a": -Infinity}', "-Infinity is not valid JSON"),
        ("candidates", '{"a": 1}', "id 'a': a number where a caption was expected"),
        ("candidates", '{"a": null}', "id 'a': null where"),
        ("candidates", '{"a": true}', "id 'a': a boolean"),
        ("candidates", '{"a": ["x"]}', "id 'a': a list where one caption was expected"),
        ("candidates", '{"a": {}}', "id 'a': an object"),
        ("candidates", "[]", "a list where an object was expected"),
        ("candidates", '"x"', "a string where an object was expected"),
        ("candidates", "{}", "holds no captions"),
        ("candidates", "", "not JSON"),
        ("candidates", '{"a": "x"', "not JSON"),
        ("candidates", '{"a": "x\n"}', "not JSON"),
        ("candidates", '{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("candidates", "[" * 200_000, "nested too deeply"),
        ("candidates", '{"a":' * 200_000, "nested too deeply"),
        ("candidates", b'{"a": "\xff"}', "not UTF-8"),
        ("candidates", '{"a": "x"}'.encode("utf-16"), "not UTF-8"),
        ("references", '{"a": "x"}', "id 'a': a string where a list of captions was expected"),
        ("references", '{"a": 3}', "id 'a': a number where a list"),
        ("references", '{"a": []}', "id 'a': no reference that is not empty"),
        ("references", '{"a": ["", " \\u2028"]}', "id 'a': no reference that is not empty"),
        ("references", '{"a": ["x", 5]}', "id 'a': reference 2 is a number"),
    ],
)
def test_hostile_json(kind: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "file.json", content)
    with pytest.raises(UserError) as caught:
        load_captions_json(path, kind)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_captions_json(tmp_path / "none.json", "candidates")
    with pytest.raises(UserError, match="directory"):
        load_captions_json(tmp_path, "candidates")


def test_ids_stay_strings_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.json", b'\xef\xbb\xbf{"007": "a", "7": "", "": "\\ud83d\\udc36"}')
    assert load_captions_json(path, "candidates") == {"007": "a", "7": "", "": "🐶"}


def test_score_files_is_finite_json_by_id(tmp_path: Path) -> None:
    candidates = _write(tmp_path / "c.json", json.dumps({"2": "two cats", "1": "", "01": "a dog\u2028runs"}))
    references = _write(tmp_path / "r.json", json.dumps({"01": ["a dog runs"], "1": ["x"], "2": ["a cat", "two cats"]}))
    metrics = [metric for metric in ALL if metric != "meteor"]
    result = score_files(candidates, references, metrics=metrics)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result) == ["corpus", "items", "versions"]
    assert list(result["items"]) == ["2", "1", "01"]
    assert list(result["corpus"]) == metrics
    assert all(list(row) == metrics for row in result["items"].values())
    assert set(result["items"]["1"].values()) == {0.0}
    assert result["items"]["01"]["bleu_3"] == pytest.approx(1, abs=1e-8)
    assert result["items"]["01"]["bertscore_f1"] == pytest.approx(1, abs=1e-6)
    assert set(result["versions"]) == {"tokenizer", "java", "bleu", "rouge_l", "cider", "bertscore_f1"}


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """The whole of `prsl score`, in a locale whose numbers have commas and whose encoding is not UTF-8."""
    candidates = _write(tmp_path / "c.json", json.dumps({"1": "Ein Übel 🐶", "2": "a dog"}))
    references = _write(tmp_path / "r.json", json.dumps({"1": ["ein übel"], "2": ["a dog", "the dog"]}))
    command = [sys.executable, "-m", "prsl_kernels.experiments.cli", "score", str(candidates)]
    environment = {**os.environ, "LC_ALL": "de_DE.ISO-8859-1", "JAVA_TOOL_OPTIONS": "-Duser.language=de"}
    done = subprocess.run([*command, str(references)], env=environment, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    assert set(result["corpus"]) == set(ALL)
    assert result["items"]["1"]["bleu_2"] == pytest.approx(1, abs=1e-8)
    assert result["items"]["2"]["meteor"] == 1.0
    done = subprocess.run([*command, str(tmp_path / "none.json")], capture_output=True, check=False, timeout=300)
    assert done.returncode != 0
    assert b"none.json" in done.stderr
    assert b"Traceback" not in done.stderr
