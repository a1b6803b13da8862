"""Published sets as they are found: unpacked elsewhere, in parts, changed after a look, and made to do harm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from published_folders import coco, edit, jpeg, natural_images, own_cache, truncate, visual_genome, write
from typer.testing import CliRunner

from prsl_kernels.experiments import cli
from prsl_kernels.experiments.config import DataConfig, load_recipe
from prsl_kernels.experiments.data import SPLITS, Dataset, load_dataset, load_pixels
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.pipeline import run_experiment


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRSL_CACHE", str(own_cache(tmp_path)))


def load(name: str, root: Path, split: str = "test", **config: Any) -> Dataset:
    return load_dataset(DataConfig(name, path=str(root), **config), split)  # type: ignore[arg-type]


def said(*arguments: Path | str) -> tuple[int, str]:
    """Exit status and output of `prsl data check`."""
    result = CliRunner().invoke(cli.app, ["data", "check", *map(str, arguments)])
    return result.exit_code, result.output


def saved(root: Path, name: str, numbers: range, split: str) -> None:
    """A Parquet file of pictures, each with a caption."""
    datasets = pytest.importorskip("datasets")
    files = [jpeg(root.parent / "pictures" / f"{n}.jpg", n) for n in numbers]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    made = datasets.Dataset.from_dict({"image": images, "caption": [file.name for file in files]}, features=features)
    root.mkdir(exist_ok=True)
    made.to_parquet(str(root / f"{split}-{name}.parquet"))


def test_archives_that_were_unpacked_into_folders_of_their_names(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    (root / "annotations_trainval2017").mkdir()
    (root / "annotations").rename(root / "annotations_trainval2017" / "annotations")
    assert len(load("coco", root).examples) == 12
    assert "layout coco" in said(root)[1]
    root = visual_genome(tmp_path / "vg")
    for archive, half in (("images", "VG_100K"), ("images2", "VG_100K_2")):
        (root / archive).mkdir()
        (root / half).rename(root / archive / half)
    assert sum(len(load("visual-genome", root, split).examples) for split in SPLITS) == 180


@pytest.mark.parametrize(
    ("make", "gone", "message"),
    [
        (coco, "annotations", "captions_train2017.json is missing"),
        (visual_genome, "question_answers.json", "question_answers.json is missing"),
        (visual_genome, "VG_100K_2", "missing: the image folder VG_100K_2; it is in images2.zip"),
        (natural_images, "dog", "missing: the folder dog"),
        (natural_images, "cat/cat_0001.jpg", "23 of the 6,899 images that were published"),
    ],
)
def test_check_names_the_part_that_is_missing(
    tmp_path: Path, make: Callable[[Path], Path], gone: str, message: str
) -> None:
    root = make(tmp_path / "set")
    if (root / gone).is_dir():
        shutil.rmtree(root / gone)
    else:
        (root / gone).unlink()
    assert message in said(root)[1]


def test_check_says_what_to_do_with_archives(tmp_path: Path) -> None:
    for name in ("train2017.zip", "annotations_trainval2017.zip"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"PK")
    status, text = said(tmp_path / "set")
    assert (status, "unpack the archives that are in it (annotations_trainval2017.zip, train2017.zip)" in text) == (
        1,
        True,
    )
    status, text = said(tmp_path / "set" / "train2017.zip")
    assert (status, "is a file and no folder; unpack it" in text) == (1, True)
    with pytest.raises(UserError, match="path '~nobody-of-this-name': no folder can be at this path"):
        load("coco", Path("~nobody-of-this-name"))


def test_an_image_that_is_damaged_after_a_check_is_found_by_the_next(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    assert "unreadable" not in said(root)[1]
    truncate(root / "val2017" / "000000001005.jpg")  # in place: the folder's time does not change
    assert "000000001005.jpg: truncated" in said(root)[1]
    with pytest.raises(UserError, match=r"000000001005\.jpg: truncated"):
        load("coco", root)


def test_what_others_wrote_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "set")
    (root / "cat" / "a\n  test: 9 images\x1b[2J.jpg").write_bytes(b"")
    text = said(root)[1]
    assert "\x1b" not in text
    assert "a\\n  test: 9 images\\x1b[2J.jpg: not an image" in text
    root = coco(tmp_path / "coco")
    file = root / "annotations" / "captions_val2017.json"
    content = edit(file)
    content["images"][0]["file_name"] = "../\x1b[31m.jpg"
    write(file, content)
    status, text = said(root)
    assert (status, "\x1b" in text) == (0, False)
    content["images"][0]["file_name"] = "000000001001.jpg"
    for row in content["annotations"]:
        row["caption"] = "a \x1b[31mred\x00\x9b bus"
    write(file, content)
    assert load("coco", root).examples[0].references[0] == "a [31mred bus"


def test_the_line_for_the_recipe_is_yaml(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "mine, of: 2017 #1")
    line = next(line for line in said(root)[1].splitlines() if line.startswith("In a recipe: "))
    assert yaml.safe_load(line.removeprefix("In a recipe: ")) == {"data": {"name": "natural-images", "path": str(root)}}


@pytest.mark.parametrize("place", ["cat", "cat/of"])
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, place: str) -> None:
    root = natural_images(tmp_path / "set")
    jpeg(root / place / "x.jpg").rename(root / place / os.fsdecode(b"\xff.jpg"))
    for name in ("natural-images", "imagefolder"):
        with pytest.raises(UserError, match=r"udcff\.jpg': the name is not UTF-8; rename"):
            load(name, root)
    moved = root.rename(tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(UserError, match="the name is not UTF-8"):
        load("natural-images", moved)


def test_folders_deeper_than_python_recurses(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "set")
    deep = root / "dog"
    for _ in range(1200):
        deep /= "d"
        deep.mkdir()
    jpeg(deep / "x.jpg")
    assert len(load("natural-images", root).examples) == 25
    assert len(load("imagefolder", root).examples) == 25
    (deep / "x.jpg").unlink()
    while deep != root / "dog":  # as pytest's own removal recurses
        deep.rmdir()
        deep = deep.parent


def test_a_class_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    root = natural_images(tmp_path / "set")
    (root / "dog").rename(tmp_path / "dogs")
    (root / "dog").symlink_to(tmp_path / "dogs")
    with pytest.raises(UserError, match="dog: leads out of the folder"):
        load("natural-images", root)


def test_an_image_under_two_ids_is_in_one_split(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    file = root / "annotations" / "captions_train2017.json"
    content = edit(file)
    content["images"] += [image | {"id": 5000 + image["id"]} for image in content["images"]]
    content["annotations"] += [{"image_id": 5000 + n, "id": n, "caption": "the same"} for n in range(1, 61)]
    write(file, content)
    train, select = ({example.image for example in load("coco", root, split).examples} for split in ("train", "select"))
    assert (len(train), len(select), train & select) == (57, 3, set())
    assert "left out: 60 images listed twice" in said(root)[1]


def test_json_with_a_mark_of_its_byte_order(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    file = root / "annotations" / "captions_val2017.json"
    content = file.read_text()
    file.write_text(content, encoding="utf-8-sig")
    assert len(load("coco", root).examples) == 12
    file.write_text(content, encoding="utf-16")
    with pytest.raises(
        UserError, match=r"not JSON in UTF-8, or cut off \(lexical error: invalid char in json text\.\)"
    ):
        load("coco", root)


def test_json_that_is_nested_too_deeply_is_refused_and_brackets_in_texts_are_not(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    file = root / "annotations" / "captions_val2017.json"
    content = edit(file)
    content["annotations"][0]["caption"] = "[" * 70_000 + '\\"{' * 50_000 + "\\"
    write(file, content)
    assert len(load("coco", root).examples) == 12
    file.write_text(file.read_text().replace('"year": 2017', f'"year": {"[" * 300}{"]" * 300}'))
    with pytest.raises(UserError, match="more than 200 brackets within each other"):
        load("coco", root)


def test_version_1_0_of_visual_genome_names_the_ids_otherwise(tmp_path: Path) -> None:
    root, other = visual_genome(tmp_path / "vg"), coco(tmp_path / "coco")
    published = {split: list(load("visual-genome", root, split, exclude_coco=str(other)).examples) for split in SPLITS}
    entries, facts = edit(root / "question_answers.json"), edit(root / "image_data.json")
    for entry in entries:
        entry["image_id"] = entry.pop("id")
        for row in entry["qas"]:
            row["id"] = row.pop("qa_id")
            del row["image_id"]
    write(root / "question_answers.json", entries)
    write(root / "image_data.json", [{("id" if k == "image_id" else k): v for k, v in e.items()} for e in facts])
    for split in SPLITS:
        assert list(load("visual-genome", root, split, exclude_coco=str(other)).examples) == published[split]


def test_images_that_may_be_cocos_are_excluded(tmp_path: Path) -> None:
    root, other = visual_genome(tmp_path / "vg"), coco(tmp_path / "coco")
    write(root / "image_data.json", edit(root / "image_data.json")[:40])
    kept = {e.image for s in SPLITS for e in load("visual-genome", root, s, exclude_coco=str(other)).examples}
    assert {int(image.stem) for image in kept} == set(range(1, 41)) - set(range(2, 26, 2))
    assert "20 images excluded, as image_data.json says nothing of them" in said(root, "--exclude-coco", other)[1]


def test_flat_questions_with_lists_of_answers_and_without_ids(tmp_path: Path) -> None:
    root = visual_genome(tmp_path / "vg")
    rows = [
        {"image": f"{entry['id']}.jpg", "question": qa["question"], "answer": [qa["answer"], "It.", qa["answer"]]}
        for entry in edit(root / "question_answers.json")
        for qa in entry["qas"]
    ]
    (root / "question_answers.json").unlink()
    write(root / "vg_qa.json", rows)
    found = {e.id: e for split in SPLITS for e in load("visual-genome", root, split).examples}
    assert len(found) == 180
    assert found["vg-2"].references == ("Thing 1", "It")


def test_captions_with_commas_need_quotes(tmp_path: Path) -> None:
    jpeg(tmp_path / "set" / "1.jpg")
    for content, message in (
        ("file_name,text\n1.jpg,a red bus, and a dog\n", r"metadata\.csv, line 2: more cells than columns"),
        ("file_name;text\n1.jpg;a bus\n", "no column file_name"),
        ("", "no column file_name"),
    ):
        (tmp_path / "set" / "metadata.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            load("imagefolder", tmp_path / "set")


def test_metadata_without_texts_and_of_both_kinds(tmp_path: Path) -> None:
    root = tmp_path / "set"
    lines: list[dict[str, Any]] = [{"file_name": jpeg(root / f"{n}.jpg", n).name, "label": "\ud800"} for n in range(9)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [example.group for example in load("imagefolder", root).examples] == [""] * 9
    lines[0]["text"], lines[1] = "a bus", lines[1] | {"question": "What?", "answer": "It"}
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(UserError, match="1 of 2 rows have a question and the others none"):
        load("imagefolder", root)


def test_a_parquet_file_of_several_that_is_not_there(tmp_path: Path) -> None:
    root = tmp_path / "set"
    saved(root, "00001-of-00002", range(10), "train")
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet is missing, of 2 files"):
        load("datasets", root)


def test_a_picture_in_two_splits_of_a_data_set_is_left_in_the_last(tmp_path: Path) -> None:
    root = tmp_path / "set"
    saved(root, "0", range(10), "train")
    saved(root, "0", range(8, 12), "validation")
    saved(root, "0", range(11, 14), "test")
    names = {split: [e.references[0] for e in load("datasets", root, split).examples] for split in SPLITS}
    assert names == {
        split: [f"{n}.jpg" for n in numbers]
        for split, numbers in (("train", range(8)), ("select", range(8, 11)), ("test", range(11, 14)))
    }
    assert "left out: 3 rows whose picture is in a later split as well" in said(root)[1]


@pytest.mark.parametrize("content", ["[]", "null", '{"features":' + "[" * 100_000, '{"_data_files": 3}'])
def test_descriptions_of_saved_data_sets_that_describe_nothing(tmp_path: Path, content: str) -> None:
    datasets = pytest.importorskip("datasets")
    saved(tmp_path / "parquet", "0", range(3), "train")
    datasets.Dataset.from_parquet(str(tmp_path / "parquet" / "train-0.parquet")).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / ("state.json" if "_data_files" in content else "dataset_info.json")).write_text(content)
    with pytest.raises(UserError, match="save"):
        load("datasets", tmp_path / "set")


def test_whatever_a_decoder_raises_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged AVIF is a RuntimeError of Pillow, damaged EXIF a struct.error."""
    path = jpeg(tmp_path / "x.jpg")
    for error in (RuntimeError("no planes"), KeyError(7)):
        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageOps.exif_transpose", lambda image, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(UserError, match=r"x\.jpg: truncated or damaged image"):
                load_pixels([path], 8)


def test_an_image_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", format="EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile.load", lambda *_: pytest.fail("Ghostscript was asked for"))
    with pytest.raises(UserError, match=r"x\.jpg: not an image"):
        load_pixels([tmp_path / "x.jpg"], 8)


@pytest.mark.parametrize("grid", [True, False])
def test_all_data_is_read_before_the_first_stage(tmp_path: Path, grid: bool) -> None:
    """What only the last stages need is missed at once, and not after a week."""
    own, other, run = coco(tmp_path / "coco"), natural_images(tmp_path / "natural"), tmp_path / "run"
    given = ["seeds=[1]" if grid else "grid=null", f"tasks.captions.data.path={own}"]
    recipe = load_recipe("paper-vitgpt2-smoke", (*given, f"tasks.captions.tests.natural-images.path={other}"))
    truncate(other / "dog" / "dog_0001.jpg")
    with pytest.raises(UserError, match=r"tasks\.captions\.tests\.natural-images: .*dog_0001\.jpg: truncated"):
        run_experiment(recipe, run, device="cpu")
    jpeg(other / "dog" / "dog_0001.jpg")
    (own / "val2017" / "000000001003.jpg").unlink()
    with pytest.raises(UserError, match=r"000000001003\.jpg: there is no such image"):
        run_experiment(recipe, run, device="cpu")
    assert not list(run.rglob("*.safetensors"))
