"""Fine-tuning of tiny models with random weights on drawn images: both families, every promise of `finetune`."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_finetune import (
    CE,
    CONFIG,
    PRSL,
    bases,
    cross_entropy_on,
    drawings,
    interrupt_step,
    record,
    rows,
    runs,
    weights,
)

from prsl_kernels import prsl_cross_entropy
from prsl_kernels.experiments.config import ArmConfig
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.training import batches as batches_module
from prsl_kernels.experiments.training import finetune as finetune_module
from prsl_kernels.experiments.training.batches import BatchMaker, draw_order
from prsl_kernels.experiments.training.finetune import finetune
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.trainer import ArmTrainer

pytestmark = pytest.mark.usefixtures("_single_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    return drawings(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(base: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return runs(base, data, tmp_path_factory.mktemp("run"))


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["captions", "vqa"])
@pytest.mark.parametrize("arm", [CE, PRSL], ids=["ce", "prsl"])
def test_outputs(task: str, arm: ArmConfig, run: Any, base: Any, data: Any, capsys: Any, tmp_path: Path) -> None:
    out = run(task, arm, out=tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {path.name for path in base(task).iterdir()} | {
        "arm.json",
        "train.jsonl",
    }
    found = record(out)
    expected = {"arm": arm.name, "k": arm.k, "space": "prob", "distance": "l2", "seed": 3, "steps": 4}
    assert found.items() >= expected.items()
    assert found["loss"] == ("ce" if arm is CE else "prsl")
    assert found["gradient_ratio_target"] == arm.gradient_ratio
    assert found["vocab_size"] == VisionLanguageModel.from_pretrained(out).vocab_size
    select = data(task, "select", 7)
    assert found["base_eval_cross_entropy"] == pytest.approx(cross_entropy_on(base(task), select), rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(cross_entropy_on(out, select), rel=1e-5)
    assert found["eval_cross_entropy"] < found["base_eval_cross_entropy"]
    log = rows(out)
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    assert {tuple(row) for row in log} == {tuple(log[0])}
    assert {"step", "loss", "cross_entropy", "penalty", "gradient_ratio", "learning_rate", "eval_cross_entropy"} <= set(
        log[0]
    )
    for row in log:
        assert (row["eval_cross_entropy"] is not None) == (row["gradient_ratio"] is not None) == (row["step"] % 2 == 0)
        if row["step"]:
            penalty = 0.0 if arm is CE else found["b"] * row["penalty"]
            assert row["loss"] == pytest.approx(row["cross_entropy"] + penalty, rel=1e-6)
    captured = capsys.readouterr()
    assert captured.out == ""  # results only, and there are none to print
    assert f"{arm.name}: b = " in captured.err


def test_every_arm_starts_alike_and_the_penalty_acts(run: Any, base: Any, data: Any) -> None:
    """Same first batch and same weights: the first row's CE agrees; afterwards the paths part."""
    plain, penalised = rows(run("captions", CE)), rows(run("captions", PRSL))
    assert plain[1]["cross_entropy"] == pytest.approx(penalised[1]["cross_entropy"], rel=1e-6)
    assert plain[4]["cross_entropy"] != penalised[4]["cross_entropy"]
    first = list(draw_order(data("captions", "train", 12).examples, 4, 3))
    vlm = VisionLanguageModel.from_pretrained(base("captions"))
    assert vlm.model.config.decoder.resid_pdrop > 0  # dropout is on in training: the same draw in both
    make = BatchMaker(vlm)
    batch = Batch(make.pixels([example for example, _ in first]), make.text(first))
    assert plain[1]["cross_entropy"] == pytest.approx(Measure(vlm, CE, bf16=False).terms([batch])[0], rel=0.05)


def test_checkpoint_is_selected_by_cross_entropy_alone(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The CE term on the selection split decides, and the weights are those of that step, not the last ones."""
    scripted = iter([9.0, 5.0, 3.0, 4.0, 6.0])
    states: list[dict[str, torch.Tensor]] = []

    def terms(self: Measure, batches: Any) -> tuple[float, float]:
        states.append({name: value.clone() for name, value in self._vlm.model.state_dict().items()})
        return next(scripted), 0.1

    monkeypatch.setattr(Measure, "terms", terms)
    out = run("vqa", PRSL, dataclasses.replace(CONFIG, steps=8, evaluate_every=2), out=tmp_path / "out")
    assert record(out)["selected_step"] == 4
    assert record(out)["eval_cross_entropy"] == 3.0
    assert record(out)["base_eval_cross_entropy"] == 9.0
    chosen = weights(out)
    assert all(torch.equal(value, chosen[name]) for name, value in states[2].items())
    assert any(not torch.equal(value, chosen[name]) for name, value in states[4].items())


def test_steps_that_no_interval_divides_end_in_an_evaluation(run: Any) -> None:
    out = run("vqa", CE, dataclasses.replace(CONFIG, steps=5, evaluate_every=4, log_every=3))
    assert [row["step"] for row in rows(out)] == [0, 3, 4, 5]
    assert [row["eval_cross_entropy"] is not None for row in rows(out)] == [True, False, True, True]


def test_bf16(run: Any) -> None:
    exact, rough = (
        run("vqa", PRSL),
        run("vqa", PRSL, dataclasses.replace(CONFIG, bf16=True), out=run("vqa").parent / "b"),
    )
    assert record(rough)["eval_cross_entropy"] == pytest.approx(record(exact)["eval_cross_entropy"], rel=2e-2)
    assert record(rough)["b"] == pytest.approx(record(exact)["b"], rel=0.1)
    assert all(value.dtype == torch.float32 for value in weights(rough).values() if value.is_floating_point())


@pytest.mark.parametrize("arm", [CE, ArmConfig(name="prsl", k=6, b=2.0)], ids=["ce", "prsl"])
def test_accumulation_changes_nothing(arm: ArmConfig, run: Any) -> None:
    whole = run("vqa", arm, dataclasses.replace(CONFIG, batch_size=8))
    cut = run("vqa", arm, dataclasses.replace(CONFIG, batch_size=2, gradient_accumulation=4))
    for one, other in zip(rows(whole)[1:], rows(cut)[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    assert rows(whole)[1]["loss"] == pytest.approx(rows(cut)[1]["loss"], rel=1e-5)


# ---- the weight of the penalty ---------------------------------------------------------------------------------------


def norm_of(model: Any, loss: torch.Tensor) -> float:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("task", ["captions", "vqa"])
@pytest.mark.parametrize(("space", "distance"), [("prob", "l2"), ("log_prob", "l1")])
def test_ratio_is_that_of_the_gradient_norms(task: str, space: Any, distance: Any, base: Any, data: Any) -> None:
    vlm = VisionLanguageModel.from_pretrained(base(task))
    arm = ArmConfig(name="x", k=6, gradient_ratio=0.1, space=space, distance=distance)
    make = BatchMaker(vlm)
    examples = data(task, "select", 7).examples
    batches = [
        Batch(make.pixels(chunk), make.text([(e, 0) for e in chunk]))
        for chunk in (examples[:3], examples[3:5], examples)
    ]
    measure = Measure(vlm, arm, bf16=False)
    vlm.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    b, ratios = measure.calibrate(batches)
    assert torch.equal(torch.get_rng_state(), state)  # the dropout of the training is the same in every arm
    assert vlm.model.training
    assert b == pytest.approx(0.1 / sorted(ratios)[1])
    vlm.eval()
    for batch, ratio in zip(batches, ratios, strict=True):
        logits, target = vlm.logits(batch.pixels, batch.text)
        logits, target = logits.flatten(0, 1), target.flatten()
        plain = prsl_cross_entropy(logits, target, b=0)
        penalty = prsl_cross_entropy(logits, target, k=6, b=1.0, space=space, distance=distance) - plain
        assert ratio == pytest.approx(norm_of(vlm.model, penalty) / norm_of(vlm.model, plain), rel=1e-3)


def test_b_reaches_the_ratio(run: Any) -> None:
    out = run("captions", PRSL)
    found = record(out)
    assert statistics.median(found["calibration_ratios"]) == pytest.approx(0.25)
    assert len(found["calibration_ratios"]) == 2  # seven examples make no third batch
    assert found["b"] > 0
    assert 0.02 < found["gradient_ratio_measured"] < 2.5  # training batches are others, and the weights move
    assert rows(out)[0]["gradient_ratio"] == pytest.approx(0.25)
    given = record(run("captions", ArmConfig(name="given", k=6, b=1e-4)))
    assert given["b"] == 1e-4
    assert given["gradient_ratio_target"] is None
    assert given["gradient_ratio_measured"] == pytest.approx(
        found["gradient_ratio_measured"] * 1e-4 / found["b"], rel=0.3
    )
    assert record(run("captions", CE))["gradient_ratio_measured"] == 0


# ---- order and images ------------------------------------------------------------------------------------------------


def test_draw_order(data: Any) -> None:
    examples = data("vqa", "train", 12).examples
    lazy = draw_order(examples, 30, 7)
    draws = list(lazy)
    assert len(lazy) == len(draws) == 30
    assert lazy[13] == draws[13]
    for turn, part in enumerate((draws[:12], draws[12:24])):
        assert sorted(e.id for e, _ in part) == sorted(e.id for e in examples)
        assert {number for _, number in part} == {turn}
    assert [e.id for e, _ in draws[:12]] != [e.id for e, _ in draws[12:24]]
    assert list(draw_order(examples, 12, 7)) == draws[:12]
    assert list(draw_order(examples, 12, 8)) != draws[:12]


def test_images_are_read_once_and_exactly(base: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VisionLanguageModel.from_pretrained(base("captions"))
    examples = data("captions", "train", 12).examples
    expected = vlm.load_pixels([e.image for e in examples])
    read: list[Path] = []
    load = vlm.load_pixels
    monkeypatch.setattr(vlm, "load_pixels", lambda paths: read.extend(paths) or load(paths))
    make = BatchMaker(vlm)
    for _ in range(2):
        assert torch.equal(make.pixels([*examples, examples[0]])[:-1], expected)
    assert len(read) == 12
    monkeypatch.setattr(batches_module, "CACHE_BYTES", 5 * 3 * 64 * 64)  # room for five
    make = BatchMaker(vlm)
    for _ in range(2):
        assert torch.equal(make.pixels(examples), expected)
    assert len(read) == 12 + 12 + 7


def test_references_take_turns(base: Any, data: Any) -> None:
    vlm = VisionLanguageModel.from_pretrained(base("captions"))
    example = data("captions", "train", 1).examples[0]
    make = BatchMaker(vlm)
    for turn, reference in enumerate([*example.references, example.references[0]]):
        assert torch.equal(make.text([(example, turn)])["labels"], vlm.encode([reference])["labels"])


# ---- interruption ----------------------------------------------------------------------------------------------------


def interrupt_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the checkpoint of step 4 is written: its folder is there, but not whole."""

    def interrupted(self: ArmTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            (Path(output_dir) / "trainer_state.json").write_text('{"best_glo')
            raise KeyboardInterrupt
        save(self, output_dir)

    save = ArmTrainer._save_rng_state
    monkeypatch.setattr(ArmTrainer, "_save_rng_state", interrupted)


def interrupt_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the training, while the model is written."""

    def interrupted(self: VisionLanguageModel, folder: Path, **kwargs: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionLanguageModel, "write_files", interrupted)


def interrupt_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the checkpoints' removal and the last file."""

    def interrupted(path: Path, value: Any) -> None:
        if path.name == "arm.json":
            raise KeyboardInterrupt
        write(path, value)

    write = finetune_module.write_json
    monkeypatch.setattr(finetune_module, "write_json", interrupted)


@pytest.mark.parametrize(
    ("patch", "resumed_at"),
    [
        pytest.param(interrupt_step(1), 0, id="before the first checkpoint"),
        pytest.param(interrupt_step(3), 2, id="between checkpoints"),
        pytest.param(interrupt_checkpoint, 2, id="in a checkpoint"),
        pytest.param(interrupt_writing, 4, id="writing the model"),
        pytest.param(interrupt_log, 0, id="before the last file"),
    ],
)
def test_goes_on_after_an_interruption(patch: Any, resumed_at: int, run: Any, tmp_path: Path) -> None:
    undisturbed = run("captions", PRSL)
    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run("captions", PRSL, out=out)
    assert not (out / "arm.json").exists()
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        step = ArmTrainer.training_step

        def counted(self: ArmTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            steps.append(self.state.global_step)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ArmTrainer, "training_step", counted)
        run("captions", PRSL, out=out)
    assert steps == list(range(resumed_at, 4))
    assert record(out) == record(undisturbed)
    assert rows(out) == rows(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    assert not (out / "training").exists()


def test_work_with_other_settings_is_not_taken_up(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_step(3)(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run("vqa", PRSL, out=out)
    found = weights(run("vqa", CE, out=out))
    assert all(torch.equal(value, found[name]) for name, value in weights(run("vqa", CE)).items())
    assert record(run("vqa", PRSL, out=out))["loss"] == "prsl"  # a finished folder is made again


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_not_touched(run: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(UserError, match="holds other files"):
        run("vqa", CE, out=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not delete"


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        (ArmConfig(name="wide", k=100_000, b=1.0), {}, "arm 'wide': k is 100000.* allows 1 to"),
        (ArmConfig(name="one", k=1, gradient_ratio=0.1), {}, "arm 'one': gradient_ratio 0.1 cannot be reached.*k of 2"),
        (ArmConfig(name="lost", b=0.0), {"learning_rate": 1e30}, "arm 'lost': the training diverged.*learning_rate"),
    ],
)
def test_arms_that_cannot_be(arm: ArmConfig, changes: dict[str, Any], message: str, run: Any) -> None:
    with pytest.raises(UserError, match=message):
        run("vqa", arm, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_device_that_is_not_there(device: str, run: Any) -> None:
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="device"):
            run("vqa", CE, device=device)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("captions", {"references": ()}, "example 'train-3': the text is missing or empty; give it a caption"),
        ("captions", {"references": ("fine", " ")}, "example 'train-3': the text is missing or empty"),
        ("vqa", {"references": ()}, "example 'train-3': the text is missing or empty; give it an answer"),
        ("vqa", {"question": None}, "example 'train-3': the question is missing"),
        ("vqa", {"image": Path("/nowhere/3.png")}, "/nowhere/3.png"),
    ],
)
def test_data_that_cannot_be_learnt(
    task: str, change: dict[str, Any], message: str, base: Any, data: Any, tmp_path: Path
) -> None:
    train = data(task, "train", 12)
    examples = list(train.examples)
    examples[3] = dataclasses.replace(examples[3], **change)
    train = dataclasses.replace(train, examples=tuple(examples))
    with pytest.raises(UserError, match=message):
        finetune(base(task), train, data(task, "select", 7), CE, CONFIG, tmp_path / "out", seed=0, device="cpu")


def test_no_examples(base: Any, data: Any, tmp_path: Path) -> None:
    empty = dataclasses.replace(data("vqa", "select", 7), examples=())
    with pytest.raises(UserError, match="drawn, split select: there are no examples"):
        finetune(base("vqa"), data("vqa", "train", 12), empty, CE, CONFIG, tmp_path / "out", seed=0, device="cpu")


CHILD = """
import json, sys
from pathlib import Path
import torch
from prsl_kernels.experiments.config import ArmConfig, FinetuneConfig
from prsl_kernels.experiments.data import Dataset, Example
from prsl_kernels.experiments.training.finetune import finetune

torch.set_num_threads(1)
job = json.loads(Path(sys.argv[1]).read_text())
splits = []
for split in job["splits"]:
    examples = tuple(
        Example(**{**e, "image": Path(e["image"]), "references": tuple(e["references"])}) for e in split["examples"]
    )
    splits.append(Dataset(**{**split, "examples": examples}))
arm, config = ArmConfig(**job["arm"]), FinetuneConfig(**job["config"])
finetune(job["base"], *splits, arm, config, Path(job["out"]), seed=3, device="cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_goes_on_after_a_kill(delay: float, run: Any, base: Any, data: Any, tmp_path: Path) -> None:
    """A process that is killed in earnest, at a moment that nothing arranges."""
    config = dataclasses.replace(CONFIG, steps=80)
    undisturbed, out = run("captions", PRSL, config), tmp_path / "out"
    splits = [dataclasses.asdict(data("captions", split, count)) for split, count in (("train", 12), ("select", 7))]
    parts = {"arm": PRSL, "config": config}
    job = {name: dataclasses.asdict(part) for name, part in parts.items()}
    job |= {"base": base("captions"), "splits": splits, "out": out}
    (tmp_path / "job.json").write_text(json.dumps(job, default=str))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "job.json")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list(out.glob("training/checkpoint-4/trainer_state.json")) and time.monotonic() < deadline:
            assert child.poll() is None, "the child ended before its second checkpoint"
            time.sleep(0.02)
        time.sleep(delay)
    finally:
        child.kill()
        child.wait()
    assert not (out / "arm.json").exists()
    run("captions", PRSL, config, out=out)
    assert record(out) == record(undisturbed)
    assert rows(out) == rows(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
