"""The attack stage: rows, images and references, on a stand-in for the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from stand_in import (  # noqa: F401
    CONFIG,
    SIZE,
    WORDS,
    StandIn,
    attack_fixture,
    dataset_fixture,
    make_dataset,
    models_fixture,
    pick,
    without_noise,
)

from prsl_kernels.experiments.attacks import BIM, Budget, run
from prsl_kernels.experiments.config import ArmConfig, AttackConfig, ExtraAttack, SurfaceConfig
from prsl_kernels.experiments.data import Dataset, load_pixels
from prsl_kernels.experiments.errors import UserError

pytestmark = pytest.mark.usefixtures("_single_thread")

# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_image_attack_and_declared_round_has_its_row(attack: Callable[..., Any], dataset: Dataset) -> None:
    rows = attack()
    ids = sorted(example.id for example in dataset.examples)
    bim = [("bim", index) for index in (0, 1, 2, 4)]
    expected = [*bim, ("random-sign", 4), ("zero-step", 2), ("gaussian", 0), ("jpeg", 0), ("blank", 0)]
    assert len(rows) == len(expected) * len(ids)
    for name, index in expected:
        assert [row["id"] for row in pick(rows, name, index)] == ids
    row = pick(rows, "bim", 4)[0]
    assert {key: row[key] for key in ("task", "arm", "seed", "objective", "reference", "group", "question")} == {
        "task": "captions", "arm": "ce", "seed": 7, "objective": "ce", "reference": "primary", "group": "g0",
        "question": None,
    }  # fmt: skip
    assert row["references"] == ["red red", "the tree"]
    assert row["eps"] == 8 / 255
    assert row["step"] == 2 / 255


def test_the_attack_works_and_its_controls_do_not(attack: Callable[..., Any]) -> None:
    rows = attack()
    clean, last = pick(rows, "bim", 0), pick(rows, "bim", 4)
    for before, after in zip(clean, last, strict=True):
        assert after["objective_value"] > before["objective_value"]
        assert before["linf"] == before["l2"] == 0
        assert after["linf"] == 8 / 255
        assert before["zero_gradient_share"] is before["nonfinite_gradient_share"] is None
        assert after["zero_gradient_share"] < 0.05
        assert after["nonfinite_gradient_share"] == 0
    assert [row["linf"] for row in pick(rows, "bim", 2)] == [4 / 255] * len(clean)
    gain = [sum(row["objective_value"] for row in pick(rows, name, 4)) for name in ("bim", "random-sign")]
    start = sum(row["objective_value"] for row in clean)
    assert gain[0] - start > 5 * abs(gain[1] - start)
    for row in pick(rows, "random-sign", 4):
        assert 0 < row["linf"] <= 8 / 255
        assert row["zero_gradient_share"] is None
        assert row["step"] == 2 / 255
    for row, same in zip(pick(rows, "zero-step", 2), clean, strict=True):
        assert (row["text"], row["objective_value"], row["linf"], row["l2"]) == (
            same["text"],
            same["objective_value"],
            0,
            0,
        )
        assert row["step"] == 0
        assert row["eps"] == 8 / 255
    blank = pick(rows, "blank", 0)
    assert len({row["text"] for row in blank}) == 1
    assert blank[0]["eps"] is blank[0]["step"] is None


def test_only_the_controls_asked_for_are_run(attack: Callable[..., Any]) -> None:
    rows = attack(config=AttackConfig(eps=8, step=2, rounds=(0, 3), controls=(), batch_size=64, keep_images=0))
    assert {(row["attack"], row["round"]) for row in rows} == {("bim", 0), ("bim", 3)}
    assert all(row["image"] is None for row in rows)


def test_the_budget_is_converted_by_the_models_own_normaliser(attack: Callable[..., Any]) -> None:
    rows = attack(config=AttackConfig(eps=0.1, step=0.1, units="normalized", rounds=(1,), controls=()))
    row = pick(rows, "bim", 1)[0]
    assert row["eps"] == 0.05
    assert row["linf"] == 12 / 255  # 12.75 levels, the last of them whole


EXTRA = (
    ExtraAttack("fgsm", "fgsm"),
    ExtraAttack("pgd", "pgd", restarts=2, rounds=(1, 4)),
    ExtraAttack("mi", "mi-fgsm"),
    ExtraAttack("apgd", "apgd", objective="dlr", rounds=(6,)),
    ExtraAttack("stops", objective="margin-max", stop_above=0.0),
    ExtraAttack("margin", objective="margin"),
    ExtraAttack("plus", objective="ce+bd"),
    ExtraAttack("minus", objective="ce-bd"),
    ExtraAttack("targeted", objective="target", role="probe"),
    ExtraAttack("own", reference="secondary"),
    ExtraAttack("square", "square", role="query", rounds=(3, 8), images=5),
    ExtraAttack("eps2.5", role="eps", eps=2.5, images=4),
    ExtraAttack("all", role="unbounded", eps=255),
    ExtraAttack("l2", "pgd", role="probe", norm="l2", eps=30.5, step=10),
)
DEFENCE = (ArmConfig("prsl", k=3, b=0.5), 0.5)


def test_every_attack_has_its_own_rows(attack: Callable[..., Any]) -> None:
    rows = attack(config=replace(CONFIG, extra=EXTRA), defence=DEFENCE)
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["attack"], {}).setdefault(row["round"], []).append(row)
    rounds = {"fgsm": [1], "pgd": [1, 4], "apgd": [6], "square": [3, 8]}
    count = {"square": 5, "eps2.5": 4}
    clean = {row["id"]: row for row in found["bim"][0]}
    for extra in EXTRA:
        assert sorted(found[extra.name]) == rounds.get(extra.name, [4])
        for held in found[extra.name].values():
            assert [row["id"] for row in held] == [f"e-{index}" for index in range(count.get(extra.name, 10))]
            for row in held:
                assert (row["role"], row["method"], row["objective"]) == (extra.role, extra.method, extra.objective)
                assert (row["norm"], row["restarts"]) == (extra.norm, extra.restarts)
                assert row["reference"] == extra.reference
                assert row["eps"] == (8 if extra.eps is None else extra.eps) / 255
                assert row["source"] is None
                assert row["png"] is None
                assert (row["target"] is None) == (extra.name != "targeted")
                assert (row["gradient_norm"] is None) == (extra.name == "square")
                if extra.norm == "l2":
                    assert round((row["l2"] * 255) ** 2) <= 30.5**2
                else:
                    assert row["linf"] <= {"eps2.5": 2, "all": 255}.get(extra.name, 8) / 255
    for row in found["targeted"][4]:
        assert row["target"] not in row["references"]
        assert row["target"] in {other["references"][0] for other in clean.values() if other["group"] == row["group"]}
    steps = {"fgsm": 8, "eps2.5": 2.5 / 4, "all": 255 / 4, "l2": 10}
    assert {name: found[name][rounds.get(name, [4])[0]][0]["step"] * 255 for name in steps} == pytest.approx(steps)
    ended = {name: sum(row["objective_value"] for row in held[max(held)]) for name, held in found.items()}
    assert ended["plus"] != ended["minus"]
    assert ended["fgsm"] < ended["bim"] < ended["all"]
    for row in found["bim"][4]:
        assert row["gradient_norm"] > 0
        assert (row["role"], row["method"]) == ("primary", "bim")
    for name in ("zero-step", "random-sign", "gaussian", "jpeg", "blank"):
        (held,) = found[name].values()
        assert {(row["role"], row["method"]) for row in held} == {("control", name)}
        assert {row["norm"] for row in held} == {None if name in ("jpeg", "blank") else "linf"}
    assert all(row["linf"] <= 8 / 255 for row in found["gaussian"][0])
    # An image that stops early has no more moves, and one whose own words are attacked is attacked for these.
    stopped = [row for row in found["stops"][4] if row["linf"] < 8 / 255]
    assert stopped
    assert all(row["objective_value"] > -0.2 for row in stopped)  # beyond 0 before it was rounded to 8 bits


def test_own_words_are_what_the_model_says_of_the_clean_image(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset
) -> None:
    config = replace(CONFIG, extra=(ExtraAttack("own", reference="secondary"),), controls=(), batch_size=3)
    rows = attack(config=config)
    pixels = load_pixels([example.image for example in dataset.examples], SIZE)
    own = models["arm"].generate(pixels)
    assert [row["text"] for row in rows if (row["attack"], row["round"]) == ("bim", 0)] == own
    bim = BIM(Budget.from_config(8, 2, "pixels255", std=models["arm"].image_std), 4)
    for row, said, image in zip([row for row in rows if row["attack"] == "own"], own, pixels, strict=True):
        objective = run.TextObjective(models["arm"], models["arm"].encode([said]))  # type: ignore[arg-type]
        moved = (bim(objective, image[None]) * 255).round() / 255
        assert row["objective_value"] == pytest.approx(objective(moved).item(), rel=1e-4)
    assert rows[0]["references"] == list(dataset.examples[0].references)  # scores stay against the primary ones


def test_a_model_that_says_nothing_is_attacked_for_the_primary_reference(
    attack: Callable[..., Any], models: dict[str, StandIn]
) -> None:
    models["arm"].mute = True
    rows = attack(config=replace(CONFIG, extra=(ExtraAttack("own", reference="secondary"),), controls=()))
    own, bim = pick(rows, "own", 4), pick(rows, "bim", 4)
    assert {row["reference"] for row in own} == {"primary"}
    assert [row["objective_value"] for row in own] == [row["objective_value"] for row in bim]


def test_targets_are_other_texts_of_the_group_and_the_same_for_all(dataset: Dataset) -> None:
    examples = list(dataset.examples)
    wanted = run.wanted_texts(examples)
    assert wanted == run.wanted_texts(examples[::-1])
    for example in examples:
        assert wanted[example.id] in {e.references[0] for e in examples if e.group == example.group}
        assert wanted[example.id] not in example.references
    alone = [replace(examples[0], group="alone"), *examples[1:3]]
    assert run.wanted_texts(alone)["e-0"] in {e.references[0] for e in examples[1:3]}
    assert run.wanted_texts(examples[:1]) == {}


def test_a_target_that_does_not_exist_is_refused_before_anything_is_asked(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    config = replace(CONFIG, extra=(ExtraAttack("targeted", objective="target", role="probe"),))
    with pytest.raises(UserError, match=r"'targeted', example 'e-0': there is no other text than 'red red'"):
        attack(config=config, test=make_dataset(tmp_path / "one", count=1))
    assert models["arm"].calls == []
    with pytest.raises(UserError, match="no other text than what the base says"):
        attack(config=config, test=make_dataset(tmp_path / "bare", references=False))


@pytest.mark.parametrize("images", [1, 4, 5, 10, 64])
def test_attacks_on_the_first_images_alone(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path, images: int
) -> None:
    few, whole = ExtraAttack("few", "pgd", role="probe", images=images), ExtraAttack("few", "pgd", role="probe")
    config = replace(CONFIG, controls=(), keep_images=0)
    rows = attack(config=replace(config, extra=(few,)))
    assert [row["id"] for row in pick(rows, "few", 4)] == [f"e-{index}" for index in range(min(images, 10))]
    sizes = [4, 4, 2]
    expected: list[int] = []
    for start, size in zip((0, 4, 8), sizes, strict=True):
        expected += [size] * 4 + [min(size, images - start)] * (images > start)
    assert models["arm"].calls == expected
    every = attack(config=replace(config, extra=(whole,)), out=tmp_path / "every")
    assert without_noise(pick(rows, "few", 4)) == without_noise(pick(every, "few", 4))[: min(images, 10)]


def test_batches_do_not_matter(attack: Callable[..., Any], tmp_path: Path) -> None:
    def rows(size: int) -> list[dict[str, Any]]:
        surface = SurfaceConfig(images=7, points=3)
        config = replace(CONFIG, rounds=(1, 4), batch_size=size, keep_images=10, extra=EXTRA, surface=surface)
        return attack(config=config, out=tmp_path / f"by-{size}", defence=DEFENCE)

    small, large = rows(3), rows(64)
    for name, index in (("bim", 0), ("bim", 4), ("random-sign", 4), ("blank", 0)):
        assert without_noise(pick(small, name, index)) == without_noise(pick(large, name, index))
    for extra in EXTRA:
        last = max(row["round"] for row in large if row["attack"] == extra.name)
        for one, other in zip(pick(small, extra.name, last), pick(large, extra.name, last), strict=True):
            numbers = [key for key, value in one.items() if isinstance(value, float)]
            assert [one[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-3, abs=1e-4)
            assert one | dict.fromkeys(numbers) == other | dict.fromkeys(numbers)
    slices = [pq.read_table(tmp_path / folder / "surface.parquet").to_pandas() for folder in ("by-3", "by-64")]
    assert slices[0].drop(columns="value").equals(slices[1].drop(columns="value"))
    assert slices[0]["value"].to_numpy() == pytest.approx(slices[1]["value"].to_numpy(), abs=1e-5)
    for row in pick(small, "random-sign", 4):
        assert (tmp_path / "by-3" / row["image"]).read_bytes() == (tmp_path / "by-64" / row["image"]).read_bytes()


def test_questions_reach_the_model(attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path) -> None:
    models["arm"].task = "vqa"
    rows = attack(test=make_dataset(tmp_path / "vqa", task="vqa"))
    assert pick(rows, "bim", 0)[3]["question"] == "what is 3?"
    assert len({round(row["objective_value"], 6) for row in pick(rows, "blank", 0)}) > 1


# ---- images ----------------------------------------------------------------------------------------------------------


def test_saved_images_read_back_give_the_recorded_text_and_value(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset, tmp_path: Path
) -> None:
    rows = [row for row in attack() if row["image"] is not None]
    assert len(rows) == 3 * 9  # the declared sample, at all recorded rounds
    assert len({row["id"] for row in rows}) == 3
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert files == {row["image"] for row in rows}
    clean = {example.id: load_pixels([example.image], SIZE) for example in dataset.examples}
    for row in rows:
        assert row["image"] == f"images/{row['attack']}/round-{row['round']:02d}/{row['id']}.png"
        pixels = load_pixels([tmp_path / "out" / row["image"]], SIZE)
        assert models["arm"].generate(pixels) == [row["text"]]
        text = models["arm"].encode([row["references"][0]])
        value = run.TextObjective(models["arm"], text)(pixels)  # type: ignore[arg-type]
        assert value.item() == pytest.approx(row["objective_value"], rel=1e-4)
        moved = ((pixels - clean[row["id"]]).double() * 255).round()
        assert moved.abs().max() / 255 == row["linf"]
        assert moved.norm().item() / 255 == pytest.approx(row["l2"], rel=1e-12)
    assert torch.equal(
        load_pixels([tmp_path / "out" / pick(rows, "zero-step", 2)[0]["image"]], SIZE), clean[rows[0]["id"]]
    )


def test_a_larger_sample_keeps_the_smaller_one(dataset: Dataset) -> None:
    samples = [run.kept_ids(dataset, count, 7) for count in range(12)]
    assert [len(sample) for sample in samples] == [*range(11), 10]
    assert all(small <= large for small, large in pairwise(samples))
    assert run.kept_ids(dataset, 3, 8) != samples[3]


def test_images_that_do_not_read_back_stop_the_stage(
    attack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run.save_png
    monkeypatch.setattr(run, "save_png", lambda pixels, path: save((pixels * 254 / 255), path))
    with pytest.raises(RuntimeError, match="not those that were written"):
        attack()


# ---- references ------------------------------------------------------------------------------------------------------


def test_without_ground_truth_the_bases_clean_words_are_the_reference_of_every_arm(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    test = make_dataset(tmp_path / "bare", references=False)
    said = models["base"].eval().generate(load_pixels([example.image for example in test.examples], SIZE))
    for path in ("arm", "other"):
        rows = attack(path, test, out=tmp_path / path, arm=path)
        for index in (0, 4):
            assert [row["references"] for row in pick(rows, "bim", index)] == [[text] for text in said]
        assert [row["text"] for row in pick(rows, "bim", 0)] != said


def test_an_example_without_any_reference_is_named(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    models["base"].mute = True
    with pytest.raises(UserError, match=r"'e-0' has no reference.*give it a reference"):
        attack(test=make_dataset(tmp_path / "bare", references=False))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_task_and_empty_data_are_refused(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="model arm is for captions, the attack for vqa"):
        attack(task="vqa")
    with pytest.raises(UserError, match="data set 'made-up' is for vqa"):
        attack(test=make_dataset(tmp_path / "vqa", task="vqa"), task="captions")
    with pytest.raises(UserError, match="no examples"):
        attack(test=make_dataset(tmp_path / "none", count=0))
    silent = make_dataset(tmp_path / "vqa", task="vqa")
    silent = replace(silent, examples=(*silent.examples[:3], replace(silent.examples[3], question=" ")))
    models["arm"].task = "vqa"
    with pytest.raises(UserError, match="'e-3' of data set 'made-up' has no question"):
        attack(test=silent)
    models["arm"].task = "captions"
    with pytest.raises(UserError, match="longer than the ball"):
        attack(config=AttackConfig(eps=1, step=4, rounds=(1,)))


def test_a_missing_image_is_named_and_finished_batches_stay(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset
) -> None:
    image = dataset.examples[6].image
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(UserError, match=str(image)):
        attack()
    image.write_bytes(content)
    models["arm"].calls.clear()
    attack()
    assert models["arm"].calls == [4] * 9 + [2] * 9  # the first batch was not done again


def test_foreign_files_are_left_alone(attack: Callable[..., Any], tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "images" / "holiday.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    with pytest.raises(UserError, match="not from an attack"):
        attack(out=tmp_path / "photos")
    assert photo.read_bytes() == b"mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        attack(out=tmp_path / "file")


def test_fingerprint_sees_weights_settings_and_vocabulary() -> None:
    prints = [run.fingerprint(StandIn(0)), run.fingerprint(StandIn(0)), run.fingerprint(StandIn(1))]  # type: ignore[arg-type]
    assert prints[0] == prints[1] != prints[2]
    for change in (
        lambda vlm: setattr(vlm, "image_std", (0.5, 0.5, 0.5)),
        lambda vlm: setattr(vlm.tokenizer, "get_vocab", lambda: {"red": 0}),
        lambda vlm: setattr(vlm.model, "generation_config", SimpleNamespace(to_dict=lambda: {"max_new_tokens": 3})),
        lambda vlm: vlm.model[4].bias.data[0].add_(1e-3),
    ):
        vlm = StandIn(0)
        change(vlm)
        assert run.fingerprint(vlm) != prints[0]  # type: ignore[arg-type]


def test_table_says_what_it_was_made_from(attack: Callable[..., Any], tmp_path: Path) -> None:
    attack()
    metadata = pq.read_schema(tmp_path / "out" / "outputs.parquet").metadata
    made_from = json.loads(metadata[b"prsl_kernels.attack"])
    assert made_from["attack"]["eps"] == 8
    assert "eps 8/255" in made_from["budget"]
    assert "(0.062745, 0.062745, 0.12549) normalised" in made_from["budget"]
    assert made_from["dataset"] == "print-10"


def test_progress_counts_every_round_of_every_batch(
    attack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def track(items: Iterator[None], description: str, total: int) -> Iterator[None]:
        seen["total"], seen["count"] = total, 0
        for item in items:
            seen["count"] += 1
            yield item

    monkeypatch.setattr(run, "track", track)
    attack()
    assert seen["count"] == seen["total"] == 3 * (5 + 5 + 3 + 1 + 1 + 1)
