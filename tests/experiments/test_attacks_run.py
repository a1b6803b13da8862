"""The attack stage: rows, images, references, and what a kill leaves behind, on a stand-in for the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prsl_kernels.experiments.attacks import run
from prsl_kernels.experiments.attacks.store import SCHEMA
from prsl_kernels.experiments.config import AttackConfig
from prsl_kernels.experiments.data import Dataset, Example, load_pixels
from prsl_kernels.experiments.errors import UserError

WORDS = ["red", "blue", "cat", "dog", "sun", "tree", "a", "the"]
SIZE = 8
CONFIG = AttackConfig(eps=8, step=2, rounds=(1, 2, 4), batch_size=4, keep_images=3)


class StandIn:
    """Says three words of an image, each from logits that are smooth in the pixels; the real model's interface."""

    def __init__(self, seed: int = 0, task: str = "captions") -> None:
        self.task = task
        self.image_size = SIZE
        self.image_mean, self.image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.25)
        self.device = torch.device("cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 36, 3 * len(WORDS))
            )
        self.model[4].weight.data *= 3
        self.model.config = self.model.generation_config = SimpleNamespace(to_dict=dict)
        self.tokenizer = SimpleNamespace(get_vocab=lambda: {word: index for index, word in enumerate(WORDS)})
        self.calls: list[int] = []
        self.interrupt_at: int | None = None
        self.mute = False

    def eval(self) -> StandIn:
        self.model.eval()
        return self

    def load_pixels(self, paths: Sequence[Path]) -> Tensor:
        return load_pixels(paths, SIZE)

    def encode(self, references: Sequence[str], questions: Sequence[str] | None = None) -> dict[str, Tensor]:
        assert (questions is None) == (self.task == "captions")
        labels = torch.full((len(references), 3), -100)
        for row, reference in enumerate(references):
            for place, word in enumerate(reference.split()):
                labels[row, place] = WORDS.index(word)
        shift = torch.tensor([[len(question)] for question in questions]) if questions else torch.zeros(1, 1)
        return {"labels": labels, "shift": shift}

    def logits(self, pixels: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        logits = self.model((pixels - mean) / std).view(-1, 3, len(WORDS))
        return logits + text["shift"][..., None].sin(), text["labels"]

    def generate(self, pixels: Tensor, questions: Sequence[str] | None = None) -> list[str]:
        self.calls.append(len(pixels))
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        if self.mute:
            return [""] * len(pixels)
        words = self.logits(pixels, self.encode([""] * len(pixels), questions))[0].argmax(-1)
        return [" ".join(WORDS[word] for word in row) for row in words]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    """What paths lead to, in place of checkpoints on disk."""
    known = {"arm": StandIn(0), "base": StandIn(1), "other": StandIn(2)}
    loader = SimpleNamespace(from_pretrained=lambda path, *, device, dtype: known[path])
    monkeypatch.setattr(run, "VisionLanguageModel", loader)
    return known


def make_dataset(folder: Path, count: int = 10, *, references: bool = True, task: str = "captions") -> Dataset:
    generator = torch.Generator().manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for index in range(count):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator).to(torch.uint8)
        path = folder / f"{index}.png"
        Image.fromarray(pixels.numpy()).save(path)
        texts = (f"{WORDS[index % 8]} {WORDS[index % 3]}", "the tree") if references else ()
        question = f"what is {index}?" if task == "vqa" else None
        examples.append(
            Example(id=f"e-{index}", image=path, references=texts, question=question, group=f"g{index % 2}")
        )
    return Dataset("made-up", task, "test", tuple(examples), "CC0", "nobody", f"print-{count}")  # type: ignore[arg-type]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data")


@pytest.fixture
def attack(models: dict[str, StandIn], dataset: Dataset, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the stage and returns its rows."""

    def call(
        path: str = "arm", test: Dataset = dataset, config: AttackConfig = CONFIG, **changes: Any
    ) -> list[dict[str, Any]]:
        arguments: dict[str, Any] = {
            "out": tmp_path / "out",
            "task": test.task,
            "arm": "ce",
            "seed": 7,
            "base_path": "base",
        }
        table = pq.read_table(run.attack(path, test, config, **(arguments | changes)))
        assert table.schema.remove_metadata() == SCHEMA
        return table.to_pylist()

    return call


def pick(rows: list[dict[str, Any]], attack: str, round_index: int) -> list[dict[str, Any]]:
    return sorted(
        (row for row in rows if (row["attack"], row["round"]) == (attack, round_index)), key=lambda row: row["id"]
    )


def without_noise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_image_attack_and_declared_round_has_its_row(attack: Callable[..., Any], dataset: Dataset) -> None:
    rows = attack()
    ids = sorted(example.id for example in dataset.examples)
    expected = [("bim", 0), ("bim", 1), ("bim", 2), ("bim", 4), ("random-sign", 4), ("zero-step", 2), ("blank", 0)]
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


def test_batches_do_not_matter(attack: Callable[..., Any], tmp_path: Path) -> None:
    def rows(size: int) -> list[dict[str, Any]]:
        config = AttackConfig(eps=8, step=2, rounds=(1, 4), batch_size=size, keep_images=10)
        return attack(config=config, out=tmp_path / f"by-{size}")

    small, large = rows(3), rows(64)
    for name, index in (("bim", 0), ("bim", 4), ("random-sign", 4), ("blank", 0)):
        assert without_noise(pick(small, name, index)) == without_noise(pick(large, name, index))
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
    assert len(rows) == 3 * 7  # the declared sample, at all recorded rounds
    assert len({row["id"] for row in rows}) == 3
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert files == {row["image"] for row in rows}
    clean = {example.id: load_pixels([example.image], SIZE) for example in dataset.examples}
    for row in rows:
        assert row["image"] == f"images/{row['attack']}/round-{row['round']:02d}/{row['id']}.png"
        pixels = load_pixels([tmp_path / "out" / row["image"]], SIZE)
        assert models["arm"].generate(pixels) == [row["text"]]
        text = models["arm"].encode([row["references"][0]])
        value = run.text_objective(models["arm"], text)(pixels)  # type: ignore[arg-type]
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
    assert models["arm"].calls == [4] * 7 + [2] * 7  # the first batch was not done again


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


# ---- interruption ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", [1, 7, 8, 21])
def test_an_interrupted_stage_goes_on_and_ends_the_same(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path, call: int
) -> None:
    whole = attack(out=tmp_path / "whole")
    models["arm"].calls.clear()
    models["arm"].interrupt_at = call
    with pytest.raises(KeyboardInterrupt):
        attack()
    assert not (tmp_path / "out" / "outputs.parquet").exists()
    models["arm"].interrupt_at = None
    models["arm"].calls.clear()
    assert attack() == whole
    assert len(models["arm"].calls) == 21 - (call - 1) // 7 * 7
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_stage_is_not_done_again_unless_damaged(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path
) -> None:
    rows = attack()
    before = contents(tmp_path / "out")
    models["arm"].calls.clear()
    attack()
    assert models["arm"].calls == []
    image = next(row["image"] for row in rows if row["image"])
    for damage in (lambda: (tmp_path / "out" / image).unlink(),
                   lambda: (tmp_path / "out" / "outputs.parquet").write_bytes(b"PAR1 but no more")):  # fmt: skip
        damage()
        assert attack() == rows
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["truncated", "other key", "other examples", "image gone"])
def test_damaged_or_stale_parts_are_made_again(
    attack: Callable[..., Any], models: dict[str, StandIn], tmp_path: Path, damage: str
) -> None:
    whole = attack(out=tmp_path / "whole")
    models["arm"].calls.clear()
    models["arm"].interrupt_at = 15  # two of three batches are finished
    with pytest.raises(KeyboardInterrupt):
        attack()
    first, second = sorted((tmp_path / "out" / "parts").glob("*.parquet"))
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-20])
    elif damage == "other key":
        table = pq.read_table(first)
        pq.write_table(table.replace_schema_metadata({"prsl_kernels.key": "0" * 64}), first)
    elif damage == "other examples":
        first.write_bytes(second.read_bytes())
    else:
        kept = [row["image"] for row in pq.read_table(first).to_pylist() if row["image"]]
        (tmp_path / "out" / kept[0]).unlink()
    models["arm"].interrupt_at = None
    models["arm"].calls.clear()
    assert attack() == whole
    assert models["arm"].calls == [4] * 7 + [2] * 7
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_work_of_other_settings_is_never_mixed_in(
    attack: Callable[..., Any], models: dict[str, StandIn], dataset: Dataset, tmp_path: Path
) -> None:
    def interrupted() -> None:
        models["arm"].calls.clear()
        models["arm"].interrupt_at = 15
        with pytest.raises(KeyboardInterrupt):
            attack()
        models["arm"].interrupt_at = None

    changes: list[dict[str, Any]] = [
        {"config": AttackConfig(eps=8, step=1, rounds=(1, 2, 4), batch_size=4, keep_images=3)},
        {"path": "other"},
        {"seed": 8},
        {"arm": "prsl"},
        {"test": make_dataset(tmp_path / "nine", count=9)},
    ]
    for number, change in enumerate(changes):
        interrupted()
        rows = attack(**change)
        expected = attack(**change, out=tmp_path / f"fresh-{number}")
        assert rows == expected
        assert contents(tmp_path / "out") == contents(tmp_path / f"fresh-{number}")
        with pytest.raises(UserError, match="result of another attack; delete it"):
            attack()
        assert contents(tmp_path / "out") == contents(tmp_path / f"fresh-{number}")
        (tmp_path / "out" / "outputs.parquet").unlink()
        (tmp_path / "out" / "images").rename(tmp_path / f"old-{number}")


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
    assert seen["count"] == seen["total"] == 3 * (5 + 5 + 3 + 1)


def test_killed_without_warning(attack: Callable[..., Any], tmp_path: Path) -> None:
    """SIGKILL in the middle of a batch, in a process of its own."""
    whole = attack(out=tmp_path / "whole")
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_attacks_run as t
from types import SimpleNamespace
class Killed(t.StandIn):
    def generate(self, pixels, questions=None):
        if len(self.calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(pixels, questions)
arms = {{"arm": Killed(0), "base": t.StandIn(1)}}
t.run.VisionLanguageModel = SimpleNamespace(from_pretrained=lambda path, device, dtype: arms[path])
data = t.make_dataset(t.Path({str(tmp_path / "data")!r}))
out = t.Path({str(tmp_path / "out")!r})
t.run.attack("arm", data, t.CONFIG, out, task="captions", arm="ce", seed=7, base_path="base")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list((tmp_path / "out" / "parts").glob("part-*.parquet"))) == 1
    assert attack() == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert isinstance(pq.read_table(tmp_path / "out" / "outputs.parquet"), pa.Table)
