"""The embedded data sets: what the splits hold out, and that nothing leaks between them."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image

from prsl_kernels.experiments.data import (
    SPLITS,
    Dataset,
    Example,
    fetch_packages,
    load_dataset,
    load_pixels,
    openmoji,
)
from prsl_kernels.experiments.data.base import subset
from prsl_kernels.experiments.data.openmoji import figure, tones
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import cache_root, sha256

NAMES = ("openmoji", "easy-vqa")


@pytest.fixture(scope="module")
def sets() -> dict[str, dict[str, Dataset]]:
    fetch_packages(download=True)
    return {name: {split: load_dataset(name, split) for split in SPLITS} for name in NAMES}


@pytest.fixture(scope="module")
def drawings(sets: dict[str, dict[str, Dataset]]) -> dict[str, dict[str, Example]]:
    return {split: {example.id: example for example in data.examples} for split, data in sets["openmoji"].items()}


def test_sizes_and_groups(sets: dict[str, dict[str, Dataset]]) -> None:
    counts = {
        (name, split): dict(Counter(example.group for example in data.examples))
        for name in NAMES
        for split, data in sets[name].items()
    }
    assert counts == {
        ("openmoji", "train"): {"plain": 1888, "person-role": 617, "single": 248, "pair": 225},
        ("openmoji", "select"): {"person-role": 205, "single": 81, "pair": 75},
        ("openmoji", "test"): {"person-role": 205, "single": 81, "pair": 75},
        ("easy-vqa", "train"): {"yes/no": 25642, "color": 4658, "shape": 4488},
        ("easy-vqa", "select"): {"yes/no": 2765, "shape": 514, "color": 508},
        ("easy-vqa", "test"): {"yes/no": 7136, "color": 1280, "shape": 1257},
    }


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_well_formed_and_images_are_in_one_split(sets: dict[str, dict[str, Dataset]], name: str) -> None:
    images: dict[str, set[str]] = {}
    ids: set[str] = set()
    for split, data in sets[name].items():
        assert (data.name, data.split, data.task) == (name, split, "vqa" if name == "easy-vqa" else "captions")
        assert data.license
        assert data.attribution
        assert data.description
        for example in data.examples:
            assert re.fullmatch(r"[A-Za-z0-9_-]+", example.id)
            assert example.id not in ids
            ids.add(example.id)
            assert example.references
            assert all(text and text == " ".join(text.split()).lower() for text in example.references)
            assert (example.question is not None) == (name == "easy-vqa")
        images[split] = {_pixel_hash(path) for path in {example.image for example in data.examples}}
    for first, second in combinations(SPLITS, 2):
        assert not images[first] & images[second]


def _pixel_hash(path: Path) -> str:
    with Image.open(path) as image:
        assert image.size == (64, 64)
        return image.convert("RGB").tobytes().hex()


def test_each_drawing_is_one_example_and_each_caption_belongs_to_one(
    drawings: dict[str, dict[str, Example]],
) -> None:
    examples = [example for split in drawings.values() for example in split.values()]
    captions = [caption for example in examples for caption in example.references]
    assert len(captions) == len(set(captions))
    assert len({_pixel_hash(example.image) for example in examples}) == len(examples) == 3700
    for example in examples:
        assert len({tones(caption) for caption in example.references}) == 1
        assert len(example.references[0]) == min(map(len, example.references))
    names = {example.id: example.references for example in examples}
    assert names["1F9D1-1F3FB-200D-1F33E"] == ("farmer light skin tone", "man farmer light skin tone")
    assert names["1F1EB-1F1F7"] == ("flag france", "flag st. martin", "flag clipperton island")
    assert names["1F452"] == ("woman's hat",)


def test_held_out_combinations_have_their_parts_in_train(drawings: dict[str, dict[str, Example]]) -> None:
    trained: dict[str, set[tuple[str, ...]]] = {}
    tones_trained: Counter[tuple[int, str]] = Counter()
    for example in drawings["train"].values():
        for caption in example.references:
            trained.setdefault(figure(caption), set()).add(tones(caption))
            tones_trained.update(enumerate(tones(caption)))
    held_out: dict[str, set[tuple[str, tuple[str, ...]]]] = {"select": set(), "test": set()}
    for split, held in held_out.items():
        for example in drawings[split].values():
            for caption in example.references:
                combination = (figure(caption), tones(caption))
                held.add(combination)
                assert combination[1]
                assert combination[1] not in trained[combination[0]]
                others = {seen for seen in trained[combination[0]] if len(seen) == len(combination[1])}
                assert len(others) >= (2 if len(combination[1]) == 1 else 10)
                for part in enumerate(combination[1]):  # each tone, at its place in a pair, with other figures
                    assert tones_trained[part] >= 30
        assert {tone for _, held_tones in held for tone in held_tones} == set(openmoji.TONES)
    assert not held_out["select"] & held_out["test"]


def test_no_held_out_drawing_has_a_double_of_another_name_elsewhere(sets: dict[str, dict[str, Dataset]]) -> None:
    """Identical pictures are joined; the nearest pair across splits differs by what one sees: a tone or an outline."""
    pixels = {
        split: load_pixels([example.image for example in data.examples], 64) * 255
        for split, data in sets["openmoji"].items()
    }
    # means over blocks differ by no more than the pixels do: what is far apart here is far apart in full
    coarse = {split: torch.nn.functional.avg_pool2d(batch, 8).flatten(1) for split, batch in pixels.items()}
    compared = 0
    for held, other in (("select", "train"), ("test", "train"), ("test", "select")):
        distance = torch.cdist(coarse[held], coarse[other], p=1) / coarse[held].shape[1]
        for first, second in (distance < 0.25).nonzero().tolist():
            compared += 1
            assert float((pixels[held][first] - pixels[other][second]).abs().mean()) > 0.25
    assert compared > 0


def test_question_types() -> None:
    from prsl_kernels.experiments.data.easy_vqa import question_type

    assert question_type("what is the color of the circle?") == "color"
    assert question_type("what color is the shape?") == "color"
    assert question_type("what is the blue shape?") == "shape"
    assert question_type("does the image not contain a red shape?") == "yes/no"


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_nested_seeded_and_part_of_the_fingerprint(name: str) -> None:
    small, large = (load_dataset(name, "test", limit=limit).examples for limit in (64, 128))
    assert len(small) == 64
    assert large[:64] == small
    again = load_dataset(name, "test", limit=64)
    assert again.examples == small
    other = load_dataset(name, "test", limit=64, seed=1)
    assert set(other.examples) != set(small)
    assert len({again.fingerprint, other.fingerprint, load_dataset(name, "test", limit=128).fingerprint}) == 3
    assert len(load_dataset("openmoji", "test", limit=10**6).examples) == 361


def test_limited_questions_have_equal_shares_and_images_of_their_own() -> None:
    examples = load_dataset("easy-vqa", "test", limit=300).examples
    assert Counter(example.group for example in examples) == {"color": 100, "shape": 100, "yes/no": 100}
    assert len({example.image for example in examples}) == 300
    assert len(load_dataset("easy-vqa", "test", limit=10**6).examples) == 9673


def test_fingerprint_sees_texts_and_images_but_not_the_place_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_dataset("openmoji", "test", limit=8)
    (tmp_path / "openmoji-17.0.0-64px").symlink_to(cache_root() / "openmoji-17.0.0-64px")
    monkeypatch.setenv("PRSL_CACHE", str(tmp_path))
    there = load_dataset("openmoji", "test", limit=8)
    assert there.examples[0].image != here.examples[0].image
    assert there.fingerprint == here.fingerprint


def test_a_damaged_rendering_is_noticed_and_made_again_to_the_bit(
    sets: dict[str, dict[str, Dataset]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = cache_root() / "openmoji-17.0.0-64px"
    (tmp_path / "packages").symlink_to(cache_root() / "packages")
    copy = tmp_path / rendered.name
    shutil.copytree(rendered, copy)
    monkeypatch.setenv("PRSL_CACHE", str(tmp_path))
    victim = sets["openmoji"]["test"].examples[5].image.name
    (copy / victim).write_bytes((copy / victim).read_bytes()[:-20])
    assert load_dataset("openmoji", "test").fingerprint == sets["openmoji"]["test"].fingerprint
    assert {p.name: sha256(p) for p in copy.iterdir()} == {p.name: sha256(p) for p in rendered.iterdir()}


def test_subset_without_groups_is_a_prefix_of_one_order() -> None:
    examples = [Example(f"{index}", Path(f"{index}.png"), ("a",)) for index in range(100)]
    order = subset(examples, 100, 3, stratify=False)
    assert set(order) == set(examples)
    assert all(subset(examples, limit, 3, stratify=False) == order[:limit] for limit in (1, 17, 99))
    assert subset(examples, None, 3, stratify=True) == tuple(examples)


def test_wrong_split_and_limit_are_refused() -> None:
    with pytest.raises(UserError, match="'valid' does not exist; choose one of train, select, test"):
        load_dataset("openmoji", "valid")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="limit is 0"):
        load_dataset("openmoji", "test", limit=0)
