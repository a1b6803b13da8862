"""`prsl plan`: what it counts is what the stages do, and what it says of them is true without anything on disk."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from stand_in import (  # noqa: F401
    StandIn,
    attack_fixture,
    dataset_fixture,
    make_dataset,
    models_fixture,
)
from torch import Tensor
from typer.testing import CliRunner

from prsl_kernels.experiments import cli, study
from prsl_kernels.experiments.attacks.plans import plans
from prsl_kernels.experiments.config import (
    ArmConfig,
    AttackConfig,
    DataConfig,
    ExtraAttack,
    FinetuneConfig,
    Recipe,
    SurfaceConfig,
    TransferConfig,
    load_recipe,
)
from prsl_kernels.experiments.data import load_dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.pipeline import Experiment, execute
from prsl_kernels.experiments.planning import make_plan, plan, render, sizes
from prsl_kernels.experiments.planning.data import EMBEDDED, size_of
from prsl_kernels.experiments.planning.gpus import CHIPS, Modelled, find_chip
from prsl_kernels.experiments.planning.model import PUBLISHED, find_shape, shape_of
from prsl_kernels.experiments.planning.work import attack_work, evaluate_work, finetune_work, transfer_work

pytestmark = pytest.mark.usefixtures("_single_thread")

_ATTACKS = (
    ExtraAttack("fgsm", method="fgsm"),
    ExtraAttack("mi-fgsm", method="mi-fgsm", rounds=(3,)),
    ExtraAttack("pgd", method="pgd", rounds=(2, 4), restarts=2),
    ExtraAttack("apgd-dlr", method="apgd", objective="dlr", rounds=(3,)),
    ExtraAttack("square", method="square", role="query", rounds=(2, 6), images=6),
    ExtraAttack("eps-2", role="eps", eps=2, rounds=(2,), images=3),
    ExtraAttack("own-words", role="probe", reference="secondary", rounds=(2,), images=5),
)
_CONFIG = AttackConfig(
    eps=8,
    step=2,
    rounds=(1, 2, 4),
    batch_size=4,
    keep_images=3,
    extra=_ATTACKS,
    transfer=TransferConfig("pgd", images=6),
    surface=SurfaceConfig(images=5, points=3),
)


class _Counting(StandIn):
    """Counts images by what they go through."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.counts: Counter[tuple[str, int]] = Counter()
        self._generating = False

    def logits(self, pixels: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if not self._generating:
            self.counts["gradient" if torch.is_grad_enabled() else "forward", len(pixels)] += 1
        return super().logits(pixels, text)

    def generate(self, pixels: Tensor, questions: Sequence[str] | None = None) -> list[str]:
        self.counts["generate", len(pixels)] += 1
        self._generating = True
        try:
            return super().generate(pixels, questions)
        finally:
            self._generating = False


@pytest.mark.parametrize("references", [True, False])
def test_attacks_call_the_model_as_often_as_planned(
    references: bool, models: dict[str, StandIn], attack: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    arm, base = _Counting(0), _Counting(1)
    models.update(arm=arm, base=base)
    test = make_dataset(tmp_path / "counted", 10, references=references)
    rows = attack(test=test, config=_CONFIG)
    work = attack_work(plans(_CONFIG, arm.image_std), _CONFIG, 10, referenced=references)
    own = {key: times for key, times in work.calls.items() if key[0] != "base"}
    assert dict(arm.counts) == own
    asked = {("generate", size): times for (name, size), times in work.calls.items() if name == "base"}
    assert dict(base.counts) == asked
    assert work.rows == len(rows)
    kept = len(list((tmp_path / "out" / "images").rglob("*.png")))
    in_table = sum(row["png"] is not None for row in rows)
    assert in_table == 6
    # Which of the sample an attack on fewer images meets is left to chance
    assert work.pngs == pytest.approx(kept + in_table, abs=6)


def test_a_transfer_calls_the_model_as_often_as_planned(
    models: dict[str, StandIn], attack: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    from prsl_kernels.experiments.attacks.transfer import transfer

    test = make_dataset(tmp_path / "counted", 10)
    for source in ("arm", "base"):
        attack(path=source, test=test, config=_CONFIG, out=tmp_path / source)
    models["other"] = other = _Counting(2)
    sources = {source: tmp_path / source / "outputs.parquet" for source in ("arm", "base")}
    table = transfer("other", sources, test, _CONFIG, tmp_path / "to", task="captions", arm="other", seed=0)
    work = transfer_work(_CONFIG, 10, arms=3)
    assert dict(other.counts) == dict(work.calls)
    assert pq.read_table(table).num_rows == work.rows


def test_fine_tuning_is_counted_as_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prsl_kernels.experiments.training import finetune as module
    from prsl_kernels.experiments.training.measure import Batch, Measure
    from prsl_kernels.experiments.training.trainer import ArmTrainer

    counts: Counter[tuple[str, int]] = Counter()
    terms, ratio, step = Measure.terms, Measure.unit_ratio, ArmTrainer.training_step

    def count_terms(self: Measure, batches: Sequence[Batch]) -> tuple[float, float]:
        counts.update(("forward", len(batch.pixels)) for batch in batches)
        return terms(self, batches)

    def count_ratio(self: Measure, batch: Batch) -> float:
        counts["ratio", len(batch.pixels)] += 1
        return ratio(self, batch)

    def count_step(self: ArmTrainer, model: Any, inputs: dict[str, Any], number: Any = None) -> Tensor:
        counts["train", len(inputs["labels"])] += 1
        return step(self, model, inputs, number)

    monkeypatch.setattr(Measure, "terms", count_terms)
    monkeypatch.setattr(Measure, "unit_ratio", count_ratio)
    monkeypatch.setattr(ArmTrainer, "training_step", count_step)
    config = FinetuneConfig(
        steps=3, learning_rate=1e-4, batch_size=4, gradient_accumulation=2, evaluate_every=2, calibration_batches=2
    )
    train, select = load_dataset("easy-vqa", "train", limit=16), load_dataset("easy-vqa", "select", limit=7)
    arms = [
        ArmConfig("ce", b=0),
        ArmConfig("prsl", b=1e-4),
        ArmConfig("ratio", gradient_ratio=0.1),
        ArmConfig("smooth", b=0, label_smoothing=0.1),
    ]
    for arm in arms:
        counts.clear()
        module.finetune("vqa", train, select, arm, config, tmp_path / arm.name, seed=0, device="cpu")
        work = finetune_work(arm, config, 7)
        assert dict(counts) == {key: times for key, times in work.calls.items() if key[0] != "update"}, arm.name
        assert work.calls["update", 1] == 3


def test_scored_texts_are_those_of_the_evaluation() -> None:
    # Arms x seeds = 4, 10 images: the outputs twice, the worst cases twice, one random pair for each image
    attacks = plans(_CONFIG, (0.5, 0.5, 0.5))
    recorded = {"bim": 4, "fgsm": 1, "mi-fgsm": 1, "pgd": 2, "apgd-dlr": 1}
    outputs = 10 * sum(recorded.values()) + 2 * 6 + 3 + 5 + 5 * 10  # fewer images; five controls
    transferred = 1 * 6
    work = evaluate_work(attacks, _CONFIG, 10, models=4, arms=2)
    assert work.rows == 4 * (outputs + transferred)
    assert work.scored == 4 * 2 * (outputs + transferred + 10) + 10


@pytest.mark.parametrize("base", ["captions", "vqa", "tiny-llava", "tiny-qwen2-vl"])
def test_parameters_are_counted_from_the_configuration(base: str) -> None:
    shape, folder = find_shape(base, "vqa")
    assert folder is not None
    with safe_open(folder / "model.safetensors", "pt") as weights:
        there = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert shape.parameters == pytest.approx(there, rel=0.02)


@pytest.mark.parametrize(
    ("base", "parameters"),
    [
        ("nlpconnect/vit-gpt2-image-captioning", 239e6),
        ("Salesforce/blip2-opt-2.7b", 3.74e9),
        ("Salesforce/blip2-opt-6.7b", 7.75e9),
        ("llava-hf/llava-1.5-7b-hf", 7.06e9),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29e9),
    ],
)
def test_published_models_have_their_published_size(base: str, parameters: float) -> None:
    shape = shape_of(PUBLISHED[base])
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    if shape.qformer is not None:  # 188 M parameters in the Q-Former, its words included, which answering does not use
        assert shape.trained("qformer") == pytest.approx(107e6, rel=0.02)


def test_a_qwen_is_shown_images_of_its_own_size() -> None:
    shape, folder = find_shape("tiny-qwen2-vl", "vqa")
    assert folder is not None
    assert (shape.image_size, shape.image_tokens, shape.queries) == (64, 64, 16)
    assert shape_of(PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"]).queries == 256


def test_a_configuration_that_describes_no_model_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    tmp_path.joinpath("preprocessor_config.json").write_text("{}")
    for text in (
        '{"model_type": "vision-encoder-decoder", "encoder": 3, "decoder": {}}',
        '{"model_type": "qwen2_vl", "vision_config": {"patch_size": 0}}',
        '{"model_type": "blip-2", "vision_config": {"patch_size": 0}}',
        '{"model_type": ["llava"]}',
        "[]",
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            find_shape(str(tmp_path), "vqa")


def test_a_fine_tuned_model_is_as_large_as_what_is_written() -> None:
    shape = shape_of(PUBLISHED["Salesforce/blip2-opt-2.7b"])
    finetune = FinetuneConfig(steps=1, learning_rate=1e-4, bf16=True)
    qformer, lora = replace(finetune, trainable="qformer"), replace(finetune, trainable="lora")
    assert sizes.written(shape, finetune) == 4 * shape.parameters
    assert sizes.written(shape, qformer) == pytest.approx(2 * 3.745e9 + 2 * 107e6, rel=0.01)
    # 32 layers with four matrices of 2560 x 2560 each, in float32 after merging
    assert sizes.written(shape, lora) == pytest.approx(2 * 3.745e9 + 2 * 32 * 4 * 2560**2, rel=0.01)
    # Two matrices of rank 16 beside each, with two moments
    assert sizes.checkpointed(shape, lora) == 12 * 32 * 4 * 2 * 16 * 2560


def test_flops_are_two_for_each_parameter_and_token() -> None:
    shape = shape_of(PUBLISHED["Salesforce/blip2-opt-2.7b"])
    encoder, _, decoder = shape.forward(12, logits=0)
    # 985 M parameters on 257 tokens; the products of the attention are a few per cent more
    assert encoder == pytest.approx(2 * 985e6 * 257, rel=0.06)
    assert decoder == pytest.approx(2 * 2.52e9 * 44, rel=0.02)


def test_modelled_seconds_follow_from_the_peak() -> None:
    shape = shape_of(PUBLISHED["nlpconnect/vit-gpt2-image-captioning"])
    finetune = FinetuneConfig(steps=1, learning_rate=1e-4)
    slow = Modelled(shape, CHIPS["A100"], finetune, "float32", 20)
    quick = Modelled(shape, CHIPS["H100"], finetune, "float32", 20)
    assert slow.seconds("gradient", 8) / quick.seconds("gradient", 8) == pytest.approx(67 / 19.5)
    assert slow.seconds("gradient", 8) == pytest.approx(2 * slow.seconds("forward", 8))
    bf16 = Modelled(shape, CHIPS["A100"], finetune, "bfloat16", 20)
    assert slow.seconds("gradient", 8) / bf16.seconds("gradient", 8) == pytest.approx(312 / 19.5)
    frozen = Modelled(shape, CHIPS["A100"], replace(finetune, trainable="lora"), "float32", 20)
    assert frozen.seconds("train", 8) < slow.seconds("train", 8)
    assert find_chip("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    with pytest.raises(UserError, match="choose one of A100, H100"):
        find_chip("Voodoo 2")


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_sizes_are_those_of_the_loaders(name: str) -> None:
    task = "captions" if name == "openmoji" else "vqa"
    for split in ("train", "select", "test"):
        there = len(load_dataset(name, split).examples)  # type: ignore[arg-type]
        assert size_of(DataConfig(name=name), split, task)[0] == there
    assert size_of(DataConfig(name=name, test_limit=5), "test", task)[0] == 5


def test_published_sizes_stand_in_for_data_that_is_not_here() -> None:
    assert size_of(DataConfig(name="coco", path="/nowhere"), "train", "captions")[0] == 118_287
    assert size_of(DataConfig(name="coco", path="/nowhere"), "test", "captions")[0] == 5_000
    assert size_of(DataConfig(name="natural-images", path="/nowhere"), "test", "captions")[0] == 6_899


@pytest.fixture(name="paper")
def paper_fixture() -> Recipe:
    """Models and data that are not here."""
    task = "tasks.captions."
    return load_recipe(
        "demo",
        (
            f"{task}base=nlpconnect/vit-gpt2-image-captioning",
            f"{task}data={{name: coco, path: /nowhere, select_limit: 500}}",
            f"{task}tests={{natural: {{name: natural-images, path: /nowhere}}}}",
            f"{task}attack.transfer={{attack: bim}}",
            "tasks.vqa.base=Salesforce/blip2-opt-2.7b",
            "tasks.vqa.data={name: visual-genome, path: /nowhere, select_limit: 500, test_limit: 1000}",
            "tasks.vqa.finetune.trainable=qformer",
            "tasks.vqa.finetune.bf16=true",
            "seeds=[0, 1]",
        ),
    )


def test_a_cluster_is_planned_for_on_a_laptop(paper: Recipe, tmp_path: Path) -> None:
    found = make_plan(paper, tmp_path / "run", device="cpu", gpu="H100")
    rows = {(row.part, row.task, row.kind): row for row in found.rows}
    assert {key: (row.number, row.cached) for key, row in rows.items()} == {
        ("", "captions", "finetune"): (12, 0),
        ("", "captions", "attack"): (12, 0),
        ("", "captions", "transfer"): (12, 0),
        ("", "captions", "evaluate"): (1, 0),
        ("", "vqa", "finetune"): (12, 0),
        ("", "vqa", "attack"): (12, 0),
        ("", "vqa", "evaluate"): (1, 0),
        ("", "", "report"): (1, 0),
        ("tests/natural", "captions", "attack"): (12, 0),
        ("tests/natural", "captions", "transfer"): (12, 0),
        ("tests/natural", "captions", "evaluate"): (1, 0),
        ("tests/natural", "", "report"): (1, 0),
    }
    assert rows["", "captions", "attack"].basis == "modelled"
    # 3.7 G parameters: 7.3 GB in bfloat16, and 107 M that train in float32 with their states
    assert 9e9 < rows["", "vqa", "finetune"].memory < 60e9
    assert rows["", "captions", "finetune"].disk == pytest.approx(4 * 239e6, rel=0.02)
    # Twice the images of COCO's, a third more of Natural Images', and their references from the base
    ratio = rows["tests/natural", "captions", "attack"].seconds / rows["", "captions", "attack"].seconds
    assert 6899 / 5000 < ratio < 1.6
    assert not tmp_path.joinpath("run").exists()
    text = render(found)
    assert "tests/natural/captions/attack" in text
    assert "GPU hours:" in text
    assert "40% of the peak of H100" in text


@pytest.mark.parametrize("name", ["paper-vitgpt2", "paper-blip2opt", "modern"])
def test_the_shipped_recipes_are_planned_where_nothing_was_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    found = make_plan(recipe, tmp_path / "run", device="cpu", gpu="H100")
    [(task, config)] = recipe.tasks.items()
    absent = "\n".join(found.missing)
    assert f"tasks.{task}.base: {config.base}" in absent
    assert f"tasks.{task}.data.path: {config.data.path} is not there" in absent
    for other in config.tests:
        assert f"tasks.{task}.tests.{other}.path: " in absent
    for key in ("encoder", "encoders.deberta-xlarge") if config.evaluate.encoder else ():
        assert f"tasks.{task}.evaluate.{key}: " in absent
    assert "Not on this machine" in render(found)
    assert found.as_json()["missing"] == found.missing
    # BERTScore's encoders run where the models do, and a GPU is held for them
    assert all(row.on_gpu == (row.kind != "report") for row in found.rows)
    assert 20 < found.total(gpu=True) < 500
    assert all(row.seconds < 24 * 3600 for row in found.rows)
    memory = {row.memory: row.kind for row in found.rows}
    totals = found.as_json()["totals"]
    assert memory[totals["gpu_memory"]] == "attack"
    assert memory[totals["memory"]] == "report"  # of the machine's: the whole table of scores
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_into_the_gpu_is_said(tmp_path: Path) -> None:
    recipe = load_recipe("modern")
    notes = "\n".join(make_plan(recipe, tmp_path, device="cpu", gpu="RTX 4090").notes)
    assert "vqa/attack: needs about" in notes
    assert "this GPU has 24.0 GB; lower tasks.vqa.attack.batch_size" in notes
    assert "needs about" not in "\n".join(make_plan(recipe, tmp_path, device="cpu", gpu="H200").notes)


@pytest.mark.parametrize("name", ["paper-vitgpt2-smoke", "paper-blip2opt-smoke", "modern-smoke"])
def test_the_twins_are_measured(name: str, tmp_path: Path) -> None:
    if name == "modern-smoke":
        pytest.importorskip("peft", reason="PEFT is not installed (the extra [lora])")
    found = make_plan(load_recipe(name), tmp_path / "run", device="cpu")
    bases = {row.kind: row.basis for row in found.rows}
    assert (bases["finetune"], bases["attack"], bases["transfer"]) == ("measured here",) * 3
    assert not found.missing
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_is_modelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = make_plan(load_recipe("modern-smoke"), tmp_path, device="cpu")
    assert {row.kind: row.basis for row in found.rows}["finetune"] == "modelled"
    assert "nothing could be measured: trainable: lora needs PEFT" in "\n".join(found.notes)


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ("tasks.vqa.base=somebody/some-model",))
    with pytest.raises(UserError, match=r"tasks\.vqa\.base: .*a plan knows the sizes of nlpconnect"):
        make_plan(recipe, tmp_path, device="cpu", gpu="A100")


def test_a_grid_is_planned_before_its_arms_are_known(tmp_path: Path) -> None:
    recipe = load_recipe("study")
    rows = {(row.part, row.task, row.kind): row for row in make_plan(recipe, tmp_path, device="cpu", gpu="L40S").rows}
    assert rows["grid", "vqa", "finetune"].number == 43  # 2 of its own, 2 x 3 x 5 of PRSL, 11 others
    assert rows["", "vqa", "finetune"].number == 5 * 3
    assert ("grid", "vqa", "transfer") not in rows
    choice = tmp_path / "vqa" / "choice.json"
    choice.parent.mkdir()
    choice.write_text(json.dumps({"chosen": {"PRSL, prob": "prsl-prob-k6-b1", "PRSL, log_prob": None}}))
    rows = {(row.part, row.task, row.kind): row for row in make_plan(recipe, tmp_path, device="cpu", gpu="L40S").rows}
    assert rows["", "vqa", "finetune"].number == 3 * 3
    assert rows["", "captions", "finetune"].number == 5 * 3


def test_after_the_grid_the_plan_is_of_the_recipe_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("study")
    chosen = {"PRSL, prob": "prsl-prob-k6-b1", "PRSL, log_prob": None}
    monkeypatch.setattr(study, "choose", lambda *_: {"chosen": chosen})
    monkeypatch.setattr("pandas.read_parquet", lambda _: None)
    for task in recipe.tasks:
        scores = tmp_path / study.GRID / task / "evaluate" / "scores.parquet"
        scores.parent.mkdir(parents=True)
        scores.touch()
    confirmed = study.confirmed_recipe(recipe, tmp_path)
    _, part, *_ = plan._Planner(recipe, tmp_path, "cpu", None)._parts()
    assert part.recipe == confirmed  # or finished stages are not known as such


def test_what_is_finished_is_known_by_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo", ("tasks.vqa.data.test_limit=8",))
    stages = Experiment(recipe, tmp_path, "cpu").stages
    for stage in stages:
        if stage.kind == "attack" and stage.task == "vqa" and stage.arm in ("ce", "prsl-k6"):
            execute(tmp_path, replace(stage, build=lambda out: out.joinpath("outputs.parquet").write_text("rows")))
            marker = tmp_path / "stages" / f"{stage.name.replace('/', '--')}.json"
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"seconds": 1800.0}))
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setattr(plan._Planner, "_costs", lambda self, task: _Free())
    found = make_plan(recipe, tmp_path, device="cpu")
    rows = {(row.task, row.kind): row for row in found.rows}
    attack = rows["vqa", "attack"]
    assert (attack.number, attack.cached, attack.seconds, attack.basis) == (6, 2, 1800.0, "2 finished here")
    assert attack.left == 4 * 1800.0
    assert (rows["vqa", "finetune"].cached, rows["captions", "attack"].cached) == (0, 0)
    assert rows["captions", "attack"].basis == "measured here"
    assert sorted(path for path in tmp_path.rglob("*")) == before
    # Other settings: the same marker, but not of this stage
    changed = make_plan(replace(recipe, tasks=_with_rounds(recipe)), tmp_path, device="cpu")
    assert {row.kind: row.cached for row in changed.rows if row.task == "vqa"}["attack"] == 0


class _Free:
    """Calls that cost nothing."""

    basis = "measured here"

    def seconds(self, operation: str, images: int) -> float:
        return 0.0

    def load(self) -> float:
        return 0.0


def _with_rounds(recipe: Recipe) -> dict[Any, Any]:
    vqa = recipe.tasks["vqa"]
    return {**recipe.tasks, "vqa": replace(vqa, attack=replace(vqa.attack, rounds=(1, 2)))}


def test_the_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "demo", "--device", "cpu", "--gpu", "a100"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "captions/finetune" in result.stdout
    values = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert values["totals"]["gpu_hours"] == pytest.approx(
        sum(row["seconds"] * row["number"] for row in values["stages"] if row["on_gpu"]) / 3600
    )
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(cli.app, ["plan", "demo", "--gpu", "abacus"])
    assert (result.exit_code, "--gpu 'abacus'" in result.stderr) == (1, True)


def test_the_number_of_stages_is_that_of_the_pipeline(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ("seeds=[0, 1]", "tasks.vqa.attack.transfer={attack: bim}"))
    there = Counter((stage.task or "", stage.kind) for stage in Experiment(recipe, tmp_path, "cpu").stages)
    found = make_plan(recipe, tmp_path, device="cpu", gpu="H200")
    assert {(row.task, row.kind): row.number for row in found.rows} == there
