"""The user's own data: a manifest is hostile input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from prsl_kernels.experiments import cli
from prsl_kernels.experiments.data import load_dataset, load_pixels
from prsl_kernels.experiments.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    (root / "photos").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (8, 6), (index * 80, 10, 20)).save(root / "photos" / f"{index}.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "photos" / "0.png")
    return root


def _write(folder: Path, *rows: dict[str, Any] | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def _row(**changes: Any) -> dict[str, Any]:
    return {"image": "photos/0.png", "split": "test", "references": ["a  red\u2028bus "], **changes}


def test_captions_from_a_folder_and_from_the_file_are_the_same(folder: Path) -> None:
    _write(
        folder,
        b"\xef\xbb\xbf" + json.dumps(_row(group="bus")).encode(),
        b"  ",
        _row(image="inner.png", id="Ab-1_z", references=["漢字 🧑‍🌾", "two"]),
        _row(image="photos/1.png", split="train"),
        {"image": "photos/2.png", "split": "test"},
    )
    dataset = load_dataset(str(folder), "test")
    assert dataset.task == "captions"
    assert [example.id for example in dataset.examples] == ["line-000001", "Ab-1_z", "line-000005"]
    assert [example.references for example in dataset.examples] == [("a red bus",), ("漢字 🧑‍🌾", "two"), ()]
    assert dataset.examples[0].group == "bus"
    assert load_pixels([example.image for example in dataset.examples], 4).shape == (3, 3, 4, 4)
    assert load_dataset(str(folder / "manifest.jsonl"), "test").fingerprint == dataset.fingerprint
    assert len(load_dataset(str(folder), "train").examples) == 1


def test_questions(folder: Path) -> None:
    rows = [_row(question=f"how many {index}?", references=[str(index)], id=f"q{index}") for index in range(9)]
    dataset = load_dataset(str(_write(folder, *rows)), "test")
    assert dataset.task == "vqa"
    assert dataset.examples[3].question == "how many 3?"
    assert len(load_dataset(str(folder), "test", limit=4).examples) == 4


def test_the_fingerprint_sees_texts_and_the_content_of_images(folder: Path) -> None:
    seen = {load_dataset(str(_write(folder, _row())), "test").fingerprint}
    seen.add(load_dataset(str(_write(folder, _row(references=["another"]))), "test").fingerprint)
    Image.new("RGB", (8, 6), (1, 1, 1)).save(folder / "photos" / "0.png")
    seen.add(load_dataset(str(folder), "test").fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_row(image="../secret.png"), "outside of the manifest's folder"),
        (_row(image="photos/../../secret.png"), "outside of the manifest's folder"),
        (_row(image="/etc/passwd"), "outside of the manifest's folder"),
        (_row(image="link.png"), "outside of the manifest's folder"),
        (_row(image="loop.png"), "loop.png"),
        (_row(image="photos/9.png"), "does not exist"),
        (_row(image="photos"), "does not exist"),
        (_row(image="x" * 5000), "cannot be used"),
        (_row(image="a\0b.png"), '"image" is'),
        (_row(image="\ud800.png"), "cannot be used"),
        (_row(image=""), '"image" is'),
        (_row(image=None), '"image" is None'),
        (_row(image=7), '"image" is 7'),
        (_row(references=[""]), "empty text"),
        (_row(references=["\u2028 \t"]), "empty text"),
        (_row(references=["fine", 3]), "holds 3, a int"),
        (_row(references="a bus"), "give a list of texts"),
        (_row(references=""), "give a list of texts"),
        (_row(references=[None]), "holds None"),
        (_row(references=["\ud83d"]), "half a surrogate pair"),
        (_row(references=[], split="train"), "no caption"),
        (_row(question="what?", references=[]), "a question without an answer"),
        (_row(question="  "), "empty text"),
        (_row(question=["what?"]), "a list"),
        (_row(split="validation"), "give one of train, select, test"),
        (_row(split=["test"]), "give one of train, select, test"),
        ({"image": "photos/0.png", "references": ["a"]}, '"split" is None'),
        (_row(id="../x"), '"id" is'),
        (_row(id=""), '"id" is'),
        (_row(id=3), '"id" is 3'),
        (_row(id="x" * 101), '"id" is'),
        (_row(id="x\n"), '"id" is'),
        (_row(group=1), '"group" holds 1'),
        (_row(caption="a bus"), "the key 'caption' is unknown"),
        (b"[1, 2]", "a list instead of a JSON object"),
        (b"{'image': 1}", "not JSON"),
        (b'{"image": "a.png"', "not JSON"),
        (b'{"image": "photos/0.png", "split": "test", "split": "train"}', "a key occurs twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"image": "\xff\xfe"}', "not UTF-8"),
        (_row(id="FIRST"), "is that of line 1 as well"),
        (_row(question="what?", references=["x"], image="photos/1.png"), "no question, but line 2 has one"),
        (_row(split="train"), "is in the split 'train' here and in 'test' in line 1"),
        (_row(split="train", image="inner.png"), "is in the split 'train' here and in 'test' in line 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_name_the_file_the_line_and_the_remedy(folder: Path, row: dict[str, Any] | bytes, message: str) -> None:
    _write(folder, _row(id="first"), row)
    with pytest.raises(UserError) as caught:
        load_dataset(str(folder), "test")
    assert message in str(caught.value)
    line = 1 if "no question" in message else 2
    assert str(caught.value).startswith(f"{folder / 'manifest.jsonl'}, line {line}: ")
    assert len(str(caught.value)) < 6000


def test_missing_and_empty_manifests(folder: Path) -> None:
    with pytest.raises(UserError, match=r"give openmoji, easy-vqa, or the path"):
        load_dataset("opnmoji", "test")
    with pytest.raises(UserError, match=r"manifest\.jsonl: there is no such file"):
        load_dataset(str(folder / "photos"), "test")
    with pytest.raises(UserError, match='no row has "split": "select"'):
        load_dataset(str(_write(folder, _row())), "select")
    with pytest.raises(UserError, match='no row has "split": "test"'):
        load_dataset(str(_write(folder, b"")), "test")


def test_the_check_reads_a_manifest_and_its_images(folder: Path) -> None:
    """Its folder holds pictures as well, which are no imagefolder for that."""
    _write(folder, _row(), _row(image="photos/1.png", split="train"), _row(image="photos/2.png", split="train"))
    for path in (folder, folder / "manifest.jsonl"):
        result = CliRunner().invoke(cli.app, ["data", "check", str(path)])
        assert (result.exit_code, "train (fine-tuning): 2 images, 2 rows for captions" in result.output) == (0, True)
        assert "select: cannot be used" in result.output
        assert f"In a recipe: data: {{name: {path}}}" in result.output
    (folder / "photos" / "0.png").write_bytes(b"")
    (folder / "photos" / "1.png").write_bytes(b"GIF89a")
    result = CliRunner().invoke(cli.app, ["data", "check", str(folder)])
    assert (result.exit_code, result.output.count("unreadable: ")) == (1, 2)
    with pytest.raises(UserError, match="there is no such file"):
        load_dataset("~nobody-of-this-name/x", "test")
