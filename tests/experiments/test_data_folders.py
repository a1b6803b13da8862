"""Natural Images, imagefolder and datasets' directories, and what `prsl data check` says of all layouts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_folders import coco, jpeg, litter, natural_images, own_cache, truncate, visual_genome
from typer.testing import CliRunner

from prsl_kernels.experiments import cli
from prsl_kernels.experiments.config import DataConfig
from prsl_kernels.experiments.data import SPLITS, Dataset, load_dataset, load_pixels
from prsl_kernels.experiments.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRSL_CACHE", str(own_cache(tmp_path)))


def load(name: str, root: Path, split: str = "test", limit: int | None = None, **config: Any) -> Dataset:
    return load_dataset(DataConfig(name, path=str(root), **config), split, limit=limit)  # type: ignore[arg-type]


def metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_natural_images_are_test_images_without_references(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "natural_images")
    litter(root)
    jpeg(root / "person" / "PERSON_0009.JPG", 250)
    data = load("natural-images", root)
    assert (data.task, len(data.examples)) == ("captions", 25)
    assert {example.references for example in data.examples} == {()}
    assert data.examples[0].group == "airplane"
    assert len({example.id.casefold() for example in data.examples}) == 25
    asked = load("natural-images", root, question="What is it?")
    assert (asked.task, asked.examples[3].question) == ("vqa", "What is it?")
    with pytest.raises(UserError, match=r"train: there is no example\. Natural Images.*All of it is test"):
        load("natural-images", root, "train")


def test_natural_images_as_kaggle_packs_them_twice(tmp_path: Path) -> None:
    root = tmp_path / "archive"
    natural_images(root / "natural_images")
    natural_images(root / "data" / "natural_images")
    first = load("natural-images", root)
    assert len(first.examples) == 24
    shutil.rmtree(root / "natural_images")
    assert [e.id for e in load("natural-images", root).examples] == [e.id for e in first.examples]
    shutil.move(root / "data" / "natural_images", tmp_path / "inner")
    (tmp_path / "inner" / "dog").rename(tmp_path / "inner" / "x")
    (tmp_path / "inner" / "dog").mkdir()
    (tmp_path / "inner" / "x").rename(tmp_path / "inner" / "dog" / "dog")
    assert len(load("natural-images", tmp_path / "inner").examples) == 24
    with pytest.raises(UserError, match="none of the folders airplane, car"):
        load("natural-images", root)


def test_links_out_of_a_folder_of_classes_are_refused(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "set")
    outside = jpeg(tmp_path / "outside.jpg")
    (root / "cat" / "inside.jpg").symlink_to(root / "cat" / "cat_0000.jpg")
    assert len(load("natural-images", root).examples) == 25
    (root / "cat" / "out.jpg").symlink_to(outside)
    with pytest.raises(UserError, match=r"out\.jpg: leads out of the folder"):
        load("natural-images", root)


def test_imagefolder_with_metadata_in_each_split(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, count in (("train", 20), ("validation", 3), ("test", 4)):
        names = [jpeg(root / split / f"{n}.png", n).name for n in range(count)]
        metadata(root / split, [{"file_name": name, "text": f"{split} {name}\n"} for name in names])
    jpeg(root / "test" / "unnamed.png")
    (root / "test" / "metadata.jsonl").open("a").write('{"file_name": "0.png", "text": " "}\n\n')
    litter(root)
    sizes = {split: len(load("imagefolder", root, split).examples) for split in SPLITS}
    assert sizes == {"train": 20, "select": 3, "test": 4}
    assert load("imagefolder", root, "select").examples[0].references == ("validation 0.png",)


def test_imagefolder_takes_the_splits_that_are_not_there_from_train(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for n in range(40):
        jpeg(root / "pictures" / f"{n}.JPG", n)
    lines = ["file_name,question,answer"]
    lines += [f'pictures/{n}.JPG,"Is it {turn}, or not?",yes.' for n in range(40) for turn in range(2)]
    (root / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    sets = {split: load("imagefolder", root, split) for split in SPLITS}
    assert [(data.task, len(data.examples)) for data in sets.values()] == [("vqa", 72), ("vqa", 4), ("vqa", 4)]
    images = [{example.image for example in data.examples} for data in sets.values()]
    assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
    assert len({example.id for data in sets.values() for example in data.examples}) == 80
    assert sets["test"].examples[0].question == "Is it 0, or not?"


def test_lines_of_one_image_are_one_example(tmp_path: Path) -> None:
    for name in ("a b.jpg", "a-b.jpg"):
        jpeg(tmp_path / "set" / "test" / name)
    rows = [{"file_name": name, "text": f"{name} {turn}"} for turn in "xy" for name in ("a b.jpg", "a-b.jpg")]
    metadata(tmp_path / "set" / "test", rows)
    examples = load("imagefolder", tmp_path / "set").examples
    assert [example.references for example in examples] == [("a b.jpg x", "a b.jpg y"), ("a-b.jpg x", "a-b.jpg y")]
    assert len({example.id for example in examples}) == 2


def test_imagefolder_of_classes_has_no_captions(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            jpeg(root / split / name / "1.jpg")
    data = load("imagefolder", root)
    assert [(e.group, e.references) for e in data.examples] == [("cat", ()), ("dog", ())]
    with pytest.raises(UserError, match="there are no captions to train on"):
        load("imagefolder", root, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../secret.jpg", "text": "a"}', "is no path inside"),
        ('{"file_name": "gone.jpg", "text": "a"}', "there is no such image"),
        ('{"file_name": 3, "text": "a"}', "no file name"),
        ('{"text": "a"}', "no file name"),
        ("[1]", "a list instead of a JSON object"),
        ('{"file_name": ', "is not JSON in UTF-8"),
        ("[" * 100_000, "is not JSON in UTF-8"),
    ],
)
def test_hostile_metadata_is_refused(tmp_path: Path, line: str, message: str) -> None:
    jpeg(tmp_path / "secret.jpg")
    jpeg(tmp_path / "set" / "test" / "1.jpg")
    (tmp_path / "set" / "test" / "metadata.jsonl").write_text(f'{{"file_name": "1.jpg", "text": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        load("imagefolder", tmp_path / "set")


def hub(root: Path, rows: int = 30, broken: Sequence[int] = ()) -> Any:
    """A data set of the library, of which every picture is in two rows, with bytes in its image column."""
    datasets = pytest.importorskip("datasets")
    files = [jpeg(root / "pictures" / f"{n // 2}.jpg", n // 2) for n in range(rows)]
    for n in broken:
        truncate(files[n])
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    captions = [f"picture {n // 2}, as {n % 2} sees it" for n in range(rows)]
    made = datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)
    return made.cast_column("image", datasets.Image())


def test_saved_data_sets_and_parquet_folders_give_the_same(tmp_path: Path) -> None:
    made = hub(tmp_path)
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    (tmp_path / "hub" / "script.py").write_text("raise SystemExit('a loading script was run')")
    found = {}
    for name in ("saved", "hub"):
        sets = {split: load("datasets", tmp_path / name, split) for split in SPLITS}
        assert [len(data.examples) for data in sets.values()] == [26, 2, 2]
        found[name] = [(e.id, e.references) for data in sets.values() for e in data.examples]
        pixels = load_pixels([example.image for example in sets["test"].examples], 8)
        assert bool((pixels[0] == pixels[1]).all()), "two rows of one picture are in one split"
    assert found["saved"] == found["hub"]


def test_pictures_of_a_data_set_become_files_only_when_they_are_chosen(tmp_path: Path) -> None:
    hub(tmp_path, broken=range(30)[8::2]).save_to_disk(str(tmp_path / "saved"))
    few = load("datasets", tmp_path / "saved", "train", limit=2, skip_unreadable=True)
    images = next(parent for parent in few.examples[0].image.parents if parent.name.startswith("images-"))
    assert 1 <= len(list(images.rglob("*.img"))) < 15
    few.examples[0].image.unlink()
    assert load("datasets", tmp_path / "saved", "train", limit=2, skip_unreadable=True).examples[0].image.is_file()
    with pytest.raises(UserError, match="truncated or damaged"):
        load("datasets", tmp_path / "saved", "train")


def structs(folder: Path, images: Sequence[dict[str, Any] | None], name: str = "train-0.parquet", **more: Any) -> Path:
    """Parquet whose image column is a plain struct of bytes and path, without what the library notes beside it."""
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {"image": image, "caption": [f"picture {n}" for n in range(len(images))], **more}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder


def test_a_struct_of_bytes_and_path_is_an_image(tmp_path: Path) -> None:
    """As Parquet has it that was written by other tools than the library."""
    pytest.importorskip("datasets")
    files = [jpeg(tmp_path / "pictures" / f"{n}.jpg", n) for n in range(6)]
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    data = load("datasets", structs(tmp_path / "set", images, "test-0.parquet"))
    assert [example.references for example in data.examples] == [(f"picture {n}",) for n in range(6)]
    assert [example.image.read_bytes() for example in data.examples] == [file.read_bytes() for file in files]
    asked = {"question": ["what?"] * 6, "answer": ["it"] * 6}
    data = load("datasets", structs(tmp_path / "asked", images, "test-0.parquet", **asked))
    assert (data.task, data.examples[0].question, data.examples[0].references) == ("vqa", "what?", ("it",))


@pytest.mark.parametrize("lead", ["../secret.jpg", "{root}/secret.jpg", "file://{root}/secret.jpg", "secret.jpg", None])
def test_a_path_in_a_struct_is_never_followed(lead: str | None, tmp_path: Path) -> None:
    """Nothing but bytes counts: a set from elsewhere must not choose files of this machine."""
    pytest.importorskip("datasets")
    secret = jpeg(tmp_path / "secret.jpg", 77)
    jpeg(tmp_path / "set" / "secret.jpg", 78)
    shown = jpeg(tmp_path / "shown.jpg", 5)
    path = None if lead is None else lead.format(root=tmp_path)
    images = [{"bytes": shown.read_bytes(), "path": path}, {"bytes": None, "path": path}, None]
    root = structs(tmp_path / "set", images, "test-0.parquet")
    with pytest.raises(UserError, match="there is no such image"):
        load("datasets", root)
    data = load("datasets", root, skip_unreadable=True)
    assert [example.image.read_bytes() for example in data.examples] == [shown.read_bytes()]
    copies = [file for file in (tmp_path / "cache" / "layouts").rglob("*") if file.is_file()]
    assert not any(secret.read_bytes() in file.read_bytes() for file in copies)
    assert all(file.resolve().is_relative_to(tmp_path / "cache") for file in copies)


def test_parquet_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    shown = jpeg(tmp_path / "shown.jpg", 5)
    structs(tmp_path / "elsewhere", [{"bytes": shown.read_bytes(), "path": "shown.jpg"}])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-0.parquet").symlink_to(tmp_path / "elsewhere" / "train-0.parquet")
    with pytest.raises(UserError, match="leads out of the folder"):
        load("datasets", tmp_path / "set")


def test_hostile_saved_data_sets_are_refused(tmp_path: Path) -> None:
    hub(tmp_path).save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text())
    for name in ("../outside.arrow", "/etc/passwd", "gone.arrow", 3, None):
        state.write_text(json.dumps(content | {"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match="is not in the folder"):
            load("datasets", tmp_path / "saved")
    state.unlink()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../../x"]}')
    with pytest.raises(UserError, match="no list of splits"):
        load("datasets", tmp_path / "saved")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "train-0.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(UserError, match="cannot read it"):
        load("datasets", tmp_path / "junk")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-0.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'prsl_kernels\[datasets\]'"):
        load("datasets", tmp_path / "set")


def said(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["data", "check", *arguments])
    return result.exit_code, result.output


def test_check_says_what_is_there_and_what_it_is_for(tmp_path: Path) -> None:
    status, text = said(str(coco(tmp_path / "coco")))
    assert status == 0
    assert "COCO 2017 captions (layout coco)" in text
    assert "train: 57 images, 285 captions" in text
    assert "select: 3 images, 15 captions" in text
    assert "test: 12 images, 60 captions" in text
    assert "It can be used for captions: train (fine-tuning), select (choosing" in text
    assert f"data: {{name: coco, path: {tmp_path / 'coco'}}}" in text
    root = visual_genome(tmp_path / "vg")
    status, text = said(str(root))
    assert (status, "name COCO's folder with --exclude-coco" in text) == (0, True)
    status, text = said(str(root), "--exclude-coco", str(tmp_path / "coco"))
    assert (status, "left out: 12 images excluded, as they are test images of COCO" in text) == (0, True)
    status, text = said(str(natural_images(tmp_path / "natural")))
    assert (status, "test: 24 images, 0 captions" in text) == (0, True)
    assert "train: nothing" in text
    jpeg(tmp_path / "plain" / "cat" / "1.jpg")
    assert "layout imagefolder" in said(str(tmp_path / "plain"))[1]


def test_check_says_what_is_missing_and_unreadable(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    shutil.rmtree(root / "train2017")
    (root / "val2017" / "000000001003.jpg").unlink()
    truncate(root / "val2017" / "000000001004.jpg")
    status, text = said(str(root))
    assert status == 0
    assert "train and select: cannot be used" in text
    assert "unpack train2017.zip" in text
    assert "missing: " in text
    assert "000000001003.jpg" in text
    assert "unreadable: " in text
    assert "000000001004.jpg: truncated or damaged image" in text
    assert "skip_unreadable: true" in text
    assert "It can be used for captions: test (the attack)" in text
    shutil.rmtree(root / "val2017")
    status, text = said(str(root))
    assert (status, "It cannot be used." in text) == (1, True)


def test_check_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path / "nothing")], "there is no such folder"),
        ([str(tmp_path / "empty")], "no layout is recognised"),
        ([str(tmp_path / "empty"), "--layout", "coco"], "captions_train2017.json is missing"),
        ([str(tmp_path / "empty"), "--layout", "cocoa"], "'cocoa' does not exist"),
        (["embedded"], "needs --layout"),
    ):
        status, text = said(*arguments)
        assert (status, words in text) == (1, True), text
    assert said("embedded", "--layout", "natural-images")[0] == 0
