"""COCO and Visual Genome in the folders that people have: whole, damaged, littered and hostile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from published_folders import coco, edit, jpeg, litter, own_cache, truncate, visual_genome, write

from prsl_kernels.experiments.config import DataConfig
from prsl_kernels.experiments.data import SPLITS, Dataset, fetch_packages, load_dataset, load_pixels
from prsl_kernels.experiments.data.base import subset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import cache_root


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRSL_CACHE", str(own_cache(tmp_path)))


def load(name: str, root: Path, split: str = "test", limit: int | None = None, **config: Any) -> Dataset:
    return load_dataset(DataConfig(name, path=str(root), **config), split, limit=limit)  # type: ignore[arg-type]


def splits(name: str, root: Path, **config: Any) -> dict[str, Dataset]:
    return {split: load(name, root, split, **config) for split in SPLITS}


def test_coco_has_all_captions_of_an_image_in_one_example_and_no_image_in_two_splits(tmp_path: Path) -> None:
    sets = splits("coco", coco(tmp_path / "coco"))
    assert [data.task for data in sets.values()] == ["captions"] * 3
    assert [example.id for example in sets["test"].examples] == [f"coco-{n:012d}" for n in range(1001, 1013)]
    assert sets["test"].examples[2].references == tuple(f"caption {turn} of image 1003." for turn in range(5))
    assert sets["test"].examples[2].image == (tmp_path / "coco/val2017/000000001003.jpg").resolve()
    names = [{example.id for example in sets[split].examples} for split in ("train", "select")]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    assert len(names[1]) == 3
    assert load_pixels([example.image for example in sets["train"].examples[:3]], 16).shape == (3, 3, 16, 16)


def test_a_tiny_set_has_a_selection_split_too_whatever_the_order_of_its_images(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", train=4)
    sets = splits("coco", root)
    assert [len(sets[split].examples) for split in ("train", "select")] == [3, 1]
    file = root / "annotations/captions_train2017.json"
    content = edit(file)
    write(file, {key: value[::-1] if isinstance(value, list) else value for key, value in content.items()})
    assert [tuple(data.examples) for data in splits("coco", root).values()] == [
        tuple(data.examples) for data in sets.values()
    ]


@pytest.mark.parametrize("place", ["beside", "nested", "nested-parts", "images"])
def test_coco_in_the_folders_that_people_have(tmp_path: Path, place: str) -> None:
    root = coco(tmp_path / "coco")
    if place == "beside":
        for file in (root / "annotations").iterdir():
            file.rename(root / file.name)
    elif place == "nested":
        root.rename(tmp_path / "inner")
        root.mkdir()
        (tmp_path / "inner").rename(root / "coco")
    elif place == "nested-parts":
        for name in ("annotations", "val2017", "train2017"):
            (root / name).rename(root / "inner")
            (root / name).mkdir()
            (root / "inner").rename(root / name / name)
    else:
        (root / "images").mkdir()
        for name in ("val2017", "train2017"):
            (root / name).rename(root / "images" / name)
    litter(root)
    assert [len(data.examples) for data in splits("coco", root).values()][2] == 12


def test_known_defects_of_the_captions(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", captions=2)
    file = root / "annotations" / "captions_val2017.json"
    content = edit(file)
    first = next(row for row in content["annotations"] if row["id"] == 1001)
    first["caption"] = " A bus\nstops  \n"
    next(row for row in content["annotations"] if row["id"] == 11001)["caption"] = " \n"
    content["annotations"] += [first, {"image_id": 7, "id": 5, "caption": "of no image"}]
    content["annotations"] += [{"image_id": 1002, "id": 99, "caption": None}]
    content["images"] += [content["images"][0], {"id": 4000, "file_name": "000000004000.jpg"}]
    write(file, content)
    examples = load("coco", root).examples
    assert len(examples) == 12
    assert examples[0].references == ("A bus stops",)
    assert examples[1].references == ("caption 0 of image 1002.", "caption 1 of image 1002.")


def test_images_of_any_mode_and_spelling(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    folder = root / "val2017"
    for number, mode in enumerate(("L", "CMYK", "RGB"), start=1001):
        jpeg(folder / f"{number:012d}.jpg", number, mode)
    for number, mode in enumerate(("P", "LA", "RGBA", "1", "L"), start=1004):
        jpeg(folder / "x.png", number, mode).rename(folder / f"{number:012d}.jpg")
    (folder / "000000001009.jpg").rename(folder / "000000001009.JPG")
    (folder / "000000001010.jpg").rename(folder / "000000001010.jpeg")
    examples = load("coco", root).examples
    assert examples[8].image.name == "000000001009.JPG"
    assert load_pixels([example.image for example in examples], 8).shape == (12, 3, 8, 8)


def test_faulty_images_are_an_error_that_names_them_or_are_listed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = coco(tmp_path / "coco")
    folder = root / "val2017"
    (folder / "000000001002.jpg").unlink()
    with pytest.raises(UserError, match=r"000000001002\.jpg: there is no such image.*skip_unreadable: true"):
        load("coco", root)
    truncate(folder / "000000001005.jpg")
    (folder / "000000001006.jpg").write_bytes(b"")
    (folder / "000000001007.jpg").write_bytes(b"<html>not found</html>")
    capsys.readouterr()
    left = load("coco", root, skip_unreadable=True)
    assert [int(e.id[-2:]) for e in left.examples] == [1, 3, 4, 8, 9, 10, 11, 12]
    assert "4 unreadable or missing images" in left.description
    told = capsys.readouterr().err
    for number in (1002, 1005, 1006, 1007):
        assert f"{number:012d}.jpg" in told
    jpeg(folder / "000000001002.jpg")
    with pytest.raises(UserError, match=r"000000001005\.jpg: truncated.*2 more images.*skip_unreadable: true"):
        load("coco", root)
    for number in (1005, 1006, 1007):
        jpeg(folder / f"{number:012d}.jpg", number)  # written in place: the folder's time does not change
    assert len(load("coco", root).examples) == 12


def test_a_limited_set_without_its_faulty_images_is_the_limited_set_of_the_others(tmp_path: Path) -> None:
    """Only what is chosen is decoded, and yet the choice is that of a set without the damaged images."""
    for name, make in (("coco", coco), ("visual-genome", visual_genome)):
        root = make(tmp_path / name)
        good = list(load(name, root, "train").examples)
        broken = {example.image for example in subset(good, 9, 0, stratify=name != "coco")[::3]}
        for image in broken:
            truncate(image)
        expected = subset([e for e in good if e.image not in broken], 9, 0, stratify=name != "coco")
        shutil.rmtree(cache_root() / "layouts")
        found = load(name, root, "train", limit=9, skip_unreadable=True)
        assert tuple(found.examples) == expected


@pytest.mark.parametrize("name", ["coco", "visual-genome"])
def test_limits_are_those_of_the_examples_themselves(tmp_path: Path, name: str) -> None:
    root = coco(tmp_path / name) if name == "coco" else visual_genome(tmp_path / name)
    whole = load(name, root, "train")
    for limit in (1, 7, 30, 10**6):
        found = load_dataset(DataConfig(name, path=str(root)), "train", limit=limit, seed=3)
        assert tuple(found.examples) == subset(list(whole.examples), limit, 3, stratify=name != "coco")
    assert len({load(name, root, "train", limit=limit).fingerprint for limit in (6, 7, None)}) == 3
    assert load(name, root, "train", limit=6).fingerprint == load(name, root, "train", limit=6).fingerprint


def test_the_fingerprint_sees_texts_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    first = load("coco", root).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert load("coco", tmp_path / "copy").fingerprint == first
    file = tmp_path / "copy/annotations/captions_val2017.json"
    file.write_text(file.read_text().replace("caption 3 of image 1004.", "another"))
    assert load("coco", tmp_path / "copy").fingerprint != first
    truncated = root / "val2017/000000001001.jpg"
    truncated.unlink()
    jpeg(truncated.with_suffix(".png")).rename(truncated)
    assert load("coco", root).fingerprint != first


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("../../secret.jpg", "is no path inside"),
        ("/etc/passwd", "is no path inside|there is no such image"),
        ("a\\..\\b.jpg", "is no path inside"),
        ("x" * 5000, "cannot be used"),
        ("", "no file name"),
        (None, "no file name"),
        (["a"], "no file name"),
        ("link.jpg", "leads out of the folder"),
        ("inner/x.jpg", "leads out of the folder"),
        ("loop.jpg", "loop|cannot be"),
        ("subfolder", "there is no such image"),
    ],
)
def test_hostile_file_names_are_refused(tmp_path: Path, file_name: Any, message: str) -> None:
    root = coco(tmp_path / "coco")
    jpeg(tmp_path / "secret.jpg")
    jpeg(tmp_path / "outside" / "x.jpg")
    (root / "val2017/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "val2017/inner").symlink_to(tmp_path / "outside")
    (root / "val2017/loop.jpg").symlink_to(root / "val2017/loop.jpg")
    (root / "val2017/subfolder").mkdir()
    file = root / "annotations/captions_val2017.json"
    content = edit(file)
    content["images"][0]["file_name"] = file_name
    write(file, content)
    with pytest.raises(UserError, match=message):
        load("coco", root)


def test_an_image_folder_that_is_a_link_out_of_the_data_is_refused(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    (root / "val2017").rename(tmp_path / "elsewhere")
    (root / "val2017").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"val2017: leads out of the folder.*elsewhere.*move or mount"):
        load("coco", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [{"id": 1, "file_name": "a.jpg"}, {"id"', "not JSON in UTF-8, or cut off"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"images": [1]}', "is a int and no object"),
        (b'{"images": [{"id": "x", "file_name": "a.jpg"}]}', "an image's id is 'x' and no whole number"),
        (b'{"images": [{"id": 99999999999999999999, "file_name": "a.jpg"}]}', "no whole number|not JSON"),
        (b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "caption": "a"}]}', "image_id"),
        (b"{}", "there is no example"),
        (b"", "not JSON in UTF-8, or cut off"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    root = coco(tmp_path / "coco")
    (root / "annotations/captions_val2017.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load("coco", root)
    assert not list((cache_root() / "layouts").glob(".coco-val2017-*/rows.arrow"))


def test_missing_parts_are_named_and_the_others_can_be_used(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    shutil.rmtree(root / "train2017")
    with pytest.raises(UserError, match=r"the image folder train2017 is missing; unpack train2017\.zip"):
        load("coco", root, "train")
    (root / "annotations/captions_train2017.json").unlink()
    with pytest.raises(UserError, match=r"captions_train2017\.json is missing; it is in annotations_trainval2017\.zip"):
        load("coco", root, "select")
    assert len(load("coco", root).examples) == 12


def test_visual_genome_keeps_images_in_one_split_and_takes_full_stops_off(tmp_path: Path) -> None:
    root = visual_genome(tmp_path / "vg")
    content = edit(root / "question_answers.json")
    content[0]["qas"] = [
        {"qa_id": 1, "image_id": 1, "question": "When?  ", "answer": "At 3 p.m."},
        {"qa_id": 2, "image_id": 1, "question": "", "answer": "Nothing."},
        {"qa_id": 3, "image_id": 1, "question": "Who?", "answer": " . "},
        {"qa_id": 4, "image_id": 1, "question": "How many?", "answer": "Two .."},
        {"qa_id": 4, "image_id": 1, "question": "How many?", "answer": "Two .."},
    ]
    write(root / "question_answers.json", content)
    litter(root)
    sets = splits("visual-genome", root)
    assert {data.task for data in sets.values()} == {"vqa"}
    home: dict[Path, set[str]] = {}
    texts = {}
    for split, data in sets.items():
        assert len(data.examples)
        for example in data.examples:
            home.setdefault(example.image, set()).add(split)
            texts[example.id] = (example.question, example.references, example.group)
    assert len(home) == 60
    assert all(len(found) == 1 for found in home.values())
    assert texts["vg-1"] == ("When?", ("At 3 p.m.",), "when")
    assert texts["vg-4"] == ("How many?", ("Two",), "how")
    assert texts["vg-20"] == ("What is it?", ("Thing 2",), "what")
    assert texts["vg-22"] == ("Is it red?", ("Yes",), "other")
    assert "vg-2" not in texts
    assert "vg-3" not in texts


def test_test_images_of_coco_are_in_no_split(tmp_path: Path) -> None:
    """Of the 60 images every second is COCO's, as 1001 to 1030; the folder of COCO has 1001 to 1012 in val2017."""
    root, other = visual_genome(tmp_path / "vg"), coco(tmp_path / "coco")
    kept = {e.image.stem for data in splits("visual-genome", root, exclude_coco=str(other)).values()
            for e in data.examples}  # fmt: skip
    assert {str(n) for n in range(1, 61)} - kept == {str(n) for n in range(2, 26, 2)}
    everything = {e.image.stem for data in splits("visual-genome", root).values() for e in data.examples}
    assert len(everything) == 60
    with pytest.raises(UserError, match=r"exclude_coco.*lists the test images"):
        load("visual-genome", root, exclude_coco=str(root))
    (root / "image_data.json").unlink()
    with pytest.raises(UserError, match=r"image_data\.json is missing"):
        load("visual-genome", root, exclude_coco=str(other))
    with pytest.raises(UserError, match="belongs to visual-genome, not to coco"):
        load("coco", other, exclude_coco=str(other))


@pytest.mark.parametrize("place", ["image/{}.jpg", "{}.jpg", "VG_100K/{}.jpg", "/export/vg/image/{}.jpg"])
def test_the_flat_file_of_lavis(tmp_path: Path, place: str) -> None:
    root = visual_genome(tmp_path / "vg")
    published = splits("visual-genome", root)
    rows = [
        {"image": place.format(entry["id"]), "question": qa["question"], "answer": qa["answer"],
         "question_id": qa["qa_id"], "dataset": "vg"}
        for entry in edit(root / "question_answers.json") for qa in entry["qas"]
    ]  # fmt: skip
    (root / "question_answers.json").unlink()
    write(root / "vg_qa.json", [*rows, rows[0] | {"dataset": "vqa", "question_id": 7}])
    if place.startswith("/"):
        with pytest.raises(UserError, match="is no path inside"):
            load("visual-genome", root)
        return
    flat = splits("visual-genome", root)
    for split in SPLITS:
        assert list(flat[split].examples) == list(published[split].examples)


def test_a_constant_question_makes_a_test_set_without_references(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    config = DataConfig("coco", path=str(root), question="What is in the picture?")
    data = load_dataset(config, "test", task="vqa", limit=5)
    assert (data.task, len(data.examples)) == ("vqa", 5)
    assert {(e.question, e.references) for e in data.examples} == {("What is in the picture?", ())}
    assert data.fingerprint != load("coco", root, limit=5).fingerprint
    with pytest.raises(UserError, match="no answers to train on"):
        load_dataset(config, "train", task="vqa")
    with pytest.raises(UserError, match="there are no questions; give the one"):
        load_dataset(DataConfig("coco", path=str(root)), "test", task="vqa")
    with pytest.raises(UserError, match="captions are wanted"):
        load_dataset(config, "test", task="captions")
    vg = visual_genome(tmp_path / "vg")
    with pytest.raises(UserError, match="has questions of its own"):
        load("visual-genome", vg, question="What?")
    with pytest.raises(UserError, match="captions are wanted"):
        load_dataset(DataConfig("visual-genome", path=str(vg)), "test", task="captions")


def test_settings_that_do_not_belong_to_a_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="path is missing, which coco needs"):
        load_dataset("coco", "test")
    with pytest.raises(UserError, match="there is no such folder"):
        load("coco", tmp_path / "nothing")
    with pytest.raises(UserError, match="path 'x' belongs to the published layouts"):
        load_dataset(DataConfig("openmoji", path="x"), "test")
    with pytest.raises(UserError, match="skip_unreadable True belongs to the published layouts"):
        load_dataset(DataConfig("easy-vqa", skip_unreadable=True), "test")


def test_the_embedded_drawings_in_the_published_layouts_go_through_the_same_loaders() -> None:
    fetch_packages(download=True)
    sets = {split: load("coco", Path("embedded"), split) for split in SPLITS}
    assert [len(data.examples) for data in sets.values()] == [228, 12, 96]
    assert "OpenMoji" in sets["test"].attribution
    assert sets["test"].name == "coco (embedded drawings)"
    assert sets["train"].examples[0].image.parent.name == "train2017"
    own, excluded = (
        {e.image for split in SPLITS for e in load("visual-genome", Path("embedded"), split, **config).examples}
        for config in ({}, {"exclude_coco": "embedded"})
    )
    assert (len(own), len(own) - len(excluded)) == (300, 12)
    asked = load_dataset(DataConfig("openmoji", question="What is it?"), "test", limit=3, task="vqa")
    assert {(e.question, e.references) for e in asked.examples} == {("What is it?", ())}
    with pytest.raises(UserError, match="'openmoji' is a data set for captions, not for vqa"):
        load_dataset("openmoji", "test", task="vqa")
