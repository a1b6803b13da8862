"""The losses that PRSL is compared with: against loops over the definitions, in real models, and trained."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_finetune import CE, CONFIG, bases, cross_entropy_on, drawings, record, rows, runs, weights
from torch import Tensor

from prsl_kernels import apply_prsl, prsl_cross_entropy
from prsl_kernels.experiments.config import ArmConfig
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.models import VisionLanguageModel
from prsl_kernels.experiments.training.baselines import ArmLoss, drsl_deviation, released_penalty
from prsl_kernels.experiments.training.batches import BatchMaker, draw_order
from prsl_kernels.experiments.training.measure import Batch, Measure
from prsl_kernels.experiments.training.trainer import ArmTrainer

pytestmark = pytest.mark.usefixtures("_single_thread")

V, K = 11, 3
ROUNDING = 1e-5  # of the difference of two losses of about 8 in float32; those of random weights hardly differ
SMOOTHING = ArmConfig(name="smoothing", b=0.0, label_smoothing=0.2)
TEMPERATURE = ArmConfig(name="temperature", b=0.0, temperature=2.5)
BOTH = ArmConfig(name="both", b=0.0, label_smoothing=0.1, temperature=0.5)
DRSL = ArmConfig(name="drsl", loss="drsl", b=0.3, k=10**6)  # its k says nothing, and is not looked at
RELEASED = ArmConfig(name="released", loss="released", b=0.3, k=K)
ARMS = [SMOOTHING, TEMPERATURE, BOTH, DRSL, RELEASED]
SPLITTABLE = ARMS[:-1]


def named(arms: list[ArmConfig]) -> Any:
    return pytest.mark.parametrize("arm", arms, ids=[arm.name for arm in arms])


def weight_of(arm: ArmConfig) -> float:
    assert arm.b is not None
    return arm.b if arm.b else 1.0


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def oracle(arm: ArmConfig, logits: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Loss, cross entropy and penalty, in loops over tokens and classes."""
    kept = [(z, y) for z, y in zip(logits.double().tolist(), target.tolist(), strict=True) if y != -100]
    count = len(kept)
    cross_entropy = sum(log_sum_exp(z) - z[y] for z, y in kept) / count
    others = [[value for j, value in enumerate(z) if j != y] for z, y in kept]
    if arm.loss == "drsl":
        penalty = 0.0
        for row in others:
            mean = sum(row) / len(row)
            penalty += sum((value - mean) ** 2 for value in row) / count
    elif arm.loss == "released":
        m = [sum(sorted(row, reverse=True)[: arm.k]) / arm.k for row in others]
        penalty = sum(log_sum_exp(m) - value for value in m)
    else:
        loss, s = 0.0, arm.label_smoothing
        for z, y in kept:
            scaled = [value / arm.temperature for value in z]
            normaliser = log_sum_exp(scaled)
            shares = [s / len(z) + (1 - s) * (j == y) for j in range(len(z))]
            loss += sum(share * (normaliser - x) for share, x in zip(shares, scaled, strict=True)) / count
        return loss, cross_entropy, loss - cross_entropy
    return cross_entropy + weight_of(arm) * penalty, cross_entropy, penalty


def problem(tokens: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(tokens, V, generator=generator, dtype=torch.float64) + 5
    target = torch.randint(V, (tokens,), generator=generator)
    target[::3] = -100
    return logits.to(dtype).requires_grad_(), target


def terms(arm: ArmConfig, logits: Tensor, target: Tensor, **options: Any) -> Any:
    return ArmLoss(arm, V).terms(logits, target, b=weight_of(arm), **options)


# ---- values and gradients --------------------------------------------------------------------------------------------


@named(ARMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_values(arm: ArmConfig, dtype: torch.dtype, tolerance: float) -> None:
    """Half precision is computed in float32: as exact as that, given its logits."""
    logits, target = problem(dtype=dtype)
    found = terms(arm, logits, target)
    assert {term.dtype for term in found} == {torch.promote_types(dtype, torch.float32)}
    assert [term.requires_grad for term in found] == [True, False, False]
    assert [term.item() for term in found] == pytest.approx(oracle(arm, logits, target), rel=tolerance)
    count = int((target != -100).sum())
    for total, mean in zip(terms(arm, logits, target, reduction="sum"), found, strict=True):
        assert total.item() == pytest.approx(count * mean.item(), rel=1e-6)


def test_values_of_torch() -> None:
    logits, target = problem()
    expected = F.cross_entropy(logits / 0.5, target, label_smoothing=0.1)
    torch.testing.assert_close(terms(BOTH, logits, target).loss, expected)


@named(ARMS)
def test_gradients(arm: ArmConfig) -> None:
    logits, target = problem()
    assert torch.autograd.gradcheck(lambda z: terms(arm, z, target).loss, logits)
    rough = logits.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(terms(arm, logits, target).loss, logits)
    (found,) = torch.autograd.grad(terms(arm, rough, target).loss, rough)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)


@named(ARMS)
def test_ignored_tokens_count_for_nothing(arm: ArmConfig) -> None:
    logits, target = problem()
    expected = terms(arm, logits[target != -100], target[target != -100])
    poisoned = logits.detach().clone()
    poisoned[::3] = torch.tensor([torch.nan, torch.inf, -torch.inf] + [0.0] * (V - 3))
    poisoned.requires_grad_()
    found = terms(arm, poisoned, target)
    assert [term.item() for term in found] == [term.item() for term in expected]
    found.loss.backward()
    assert poisoned.grad is not None
    assert not poisoned.grad[::3].any()
    assert poisoned.grad.isfinite().all()
    other = target.masked_fill(target == -100, 4)
    other[target == 4] = 5
    found = ArmLoss(arm, V).terms(logits, other, b=weight_of(arm), ignore_index=4)
    expected = terms(arm, logits, other.masked_fill(other == 4, -100))
    assert found.loss == expected.loss


@named(ARMS)
def test_nothing_to_learn(arm: ArmConfig) -> None:
    """As torch's cross entropy without a token: a mean of NaN, a sum of 0, and no gradient."""
    logits, target = problem()
    nothing = torch.full_like(target, -100)
    stock = F.cross_entropy(logits, nothing)
    (stock_gradient,) = torch.autograd.grad(stock, logits)
    found = terms(arm, logits, nothing)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert stock.isnan()
    assert all(term.isnan() for term in found)
    torch.testing.assert_close(gradient, stock_gradient, equal_nan=True)
    found = terms(arm, logits, nothing, reduction="sum")
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert all(term == 0 for term in found)
    assert not gradient.any()


@named([TEMPERATURE, RELEASED])
@pytest.mark.parametrize("extreme", [-torch.inf, 60000.0], ids=["excluded", "peaked"])
def test_extreme_logits(arm: ArmConfig, extreme: float) -> None:
    """An excluded class, or one far ahead, in float32: finite where the definition is."""
    logits, target = problem(dtype=torch.float32)
    row = int((target != -100).nonzero()[0])
    column = (int(target[row]) + 1) % V
    logits = logits.detach().clone()
    logits[row, column] = extreme
    logits.requires_grad_()
    found = terms(arm, logits, target)
    finite = logits.detach().clamp(min=-1e4)  # exp(-1e4) is 0 in float64, and no mean of the largest has it
    assert [term.item() for term in found] == pytest.approx(oracle(arm, finite, target), rel=1e-5)
    found.loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_logits_without_a_finite_penalty() -> None:
    """Infinite, as the definitions are, and never NaN; the target's own logit is no part of either penalty."""
    z = torch.tensor([[1.0, 2.0, -torch.inf, 0.0], [0.0, 1.0, 2.0, 4.0]], requires_grad=True)
    deviation = drsl_deviation(z, torch.tensor([0, 1]))
    assert deviation[0] == torch.inf
    assert deviation[1].item() == pytest.approx(8.0)
    deviation[1].backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0, 0, 0, 0], [-4, 0, 0, 4]]
    assert drsl_deviation(z, torch.tensor([2, 1]))[0].item() == pytest.approx(2.0)
    assert released_penalty(z, torch.tensor([0, 1]), 3) == torch.inf
    assert released_penalty(z, torch.tensor([2, 1]), 3).isfinite()
    with pytest.raises(ValueError, match="k=4 and V=4"):
        released_penalty(z, torch.tensor([0, 1]), 4)


def test_released_sees_the_tokens_of_the_batch() -> None:
    """By hand: one token has no penalty, and N equal ones N log N, whatever their logits are."""
    z = torch.tensor([[3.0, 1.0, 2.0, -7.0]], dtype=torch.float64)
    assert released_penalty(z, torch.tensor([0]), 2).item() == 0
    assert released_penalty(z.expand(5, -1), torch.zeros(5, dtype=torch.long), 2).item() == pytest.approx(
        5 * math.log(5)
    )
    pair = torch.cat([z, z + 1])
    expected = 2 * math.log(1 + math.e) - 1
    assert released_penalty(pair, torch.tensor([0, 0]), 2).item() == pytest.approx(expected)


@named(SPLITTABLE)
def test_micro_batches_make_up_the_batch(arm: ArmConfig) -> None:
    logits, target = problem(9)
    whole = terms(arm, logits, target, reduction="sum")
    parts = [
        terms(arm, z, y, reduction="sum") for z, y in zip(logits.split([2, 4, 3]), target.split([2, 4, 3]), strict=True)
    ]
    for total, part in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(total, torch.stack(part).sum())


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    return drawings(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(base: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return runs(base, data, tmp_path_factory.mktemp("run"))


def loaded(base: Any, data: Any, task: str) -> tuple[VisionLanguageModel, Batch]:
    vlm = VisionLanguageModel.from_pretrained(base(task))
    vlm.eval()
    make = BatchMaker(vlm)
    examples = data(task, "select", 7).examples
    return vlm, Batch(make.pixels(examples), make.text([(example, 0) for example in examples]))


@pytest.mark.parametrize("task", ["captions", "vqa"])
@named(ARMS)
def test_forward_computes_the_arms_loss(task: str, arm: ArmConfig, base: Any, data: Any) -> None:
    """On the supervised tokens as `vlm.logits` aligns them, whether labels are shifted or not; `remove` undoes it."""
    vlm, batch = loaded(base, data, task)
    inputs = {"pixel_values": vlm.normalize(batch.pixels), **batch.text}
    stock = vlm.model(**inputs)
    with torch.no_grad():
        logits, target = vlm.logits(batch.pixels, batch.text)
    expected = oracle(arm, logits.flatten(0, 1), target.flatten())
    count = int((target != -100).sum())
    handle = ArmLoss(arm, vlm.vocab_size).apply(vlm.model, arm.b or 0.0)
    assert handle.b == weight_of(arm)
    output = vlm.model(**inputs)
    assert handle.last_terms is not None
    assert [term.item() for term in handle.last_terms] == pytest.approx(expected, rel=1e-4, abs=ROUNDING)
    assert output.loss.item() == handle.last_terms.loss.item()
    assert torch.equal(output.logits, stock.logits)
    copied = copy.deepcopy(vlm.model)(**inputs).loss
    assert copied.item() == output.loss.item()
    for items in (count, torch.tensor(count)):
        vlm.model.zero_grad()
        shared = vlm.model(**inputs, num_items_in_batch=items)
        assert shared.loss.item() == pytest.approx(expected[0], rel=1e-4)
        assert handle.last_terms.penalty.item() == pytest.approx(expected[2], rel=1e-4, abs=ROUNDING)
    handle.remove()
    assert vlm.model(**inputs).loss.item() == stock.loss.item()


def test_prsl_and_cross_entropy_stay_with_the_kernels(base: Any, data: Any) -> None:
    vlm, _ = loaded(base, data, "captions")
    for arm in (
        CE,
        ArmConfig(name="prsl", k=4, b=2.0, space="log_prob"),
        ArmConfig(name="unweighted", loss="drsl", b=0.0),
    ):
        with ArmLoss(arm, vlm.vocab_size).apply(vlm.model, arm.b or 0.0) as handle:
            assert handle._terms is prsl_cross_entropy
            assert (handle.b, handle.space) == (arm.b, arm.space)
    with apply_prsl(vlm.model) as handle:
        assert handle._terms is prsl_cross_entropy


def norm_of(model: Any, loss: Tensor) -> float:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("task", ["captions", "vqa"])
@named(ARMS)
def test_measure(task: str, arm: ArmConfig, base: Any, data: Any) -> None:
    """Terms and the ratio of gradients are those of the definition, and b reaches a ratio that is asked for."""
    vlm, batch = loaded(base, data, task)
    measure = Measure(vlm, arm, bf16=False)
    logits, target = vlm.logits(batch.pixels, batch.text)
    logits, target = logits.flatten(0, 1), target.flatten()
    expected = oracle(arm, logits, target)
    assert measure.terms([batch]) == pytest.approx(expected[1:], rel=1e-4, abs=ROUNDING)
    half = Batch(batch.pixels[:3], {name: value[:3] for name, value in batch.text.items()})
    counts = [int((part.text["labels"] != -100).sum()) for part in (batch, half)]
    parts = [measure.terms([part])[1] for part in (batch, half)]
    mean = sum(count * part for count, part in zip(counts, parts, strict=True)) / sum(counts)
    assert measure.terms([batch, half])[1] == pytest.approx(mean, rel=1e-5, abs=ROUNDING)

    plain = F.cross_entropy(logits, target)
    kept = target != -100
    z, y = logits[kept], target[kept]
    if arm is DRSL:
        rest = z[torch.arange(z.shape[1]) != y.unsqueeze(1)].view(len(z), -1)
        penalty = (rest.var(-1, correction=0) * rest.shape[1]).mean()
    elif arm is RELEASED:
        rest = z[torch.arange(z.shape[1]) != y.unsqueeze(1)].view(len(z), -1)
        m = rest.sort(-1, descending=True).values[:, :K].mean(-1)
        penalty = len(m) * m.logsumexp(0) - m.sum()
    else:
        penalty = F.cross_entropy(z / arm.temperature, y, label_smoothing=arm.label_smoothing) - plain
    ratio = norm_of(vlm.model, penalty) / norm_of(vlm.model, plain)
    b, ratios = measure.calibrate([batch, batch])
    assert b == arm.b
    assert ratios == pytest.approx([ratio] * 2, rel=1e-3)
    if arm.b:
        asked = dataclasses.replace(arm, b=None, gradient_ratio=0.2)
        b, _ = Measure(vlm, asked, bf16=False).calibrate([batch])
        assert b == pytest.approx(0.2 / ratio, rel=1e-3)


# ---- in training -----------------------------------------------------------------------------------------------------


CALIBRATED = [
    dataclasses.replace(arm, b=None, gradient_ratio=0.25) if arm.b else arm
    for arm in (SMOOTHING, TEMPERATURE, DRSL, RELEASED)
]


@pytest.mark.parametrize("task", ["captions", "vqa"])
@named(CALIBRATED)
def test_finetune(task: str, arm: ArmConfig, run: Any, base: Any, data: Any) -> None:
    out = run(task, arm)
    found, log = record(out), rows(out)
    calibrated = arm.gradient_ratio is not None
    assert found["loss"] == (arm.loss if calibrated else "ce")
    assert (found["label_smoothing"], found["temperature"]) == (arm.label_smoothing, arm.temperature)
    assert (found["b"] > 0) == calibrated
    assert found["k"] == arm.k
    assert len(found["calibration_ratios"]) == 2
    if calibrated:
        assert statistics.median(found["calibration_ratios"]) == pytest.approx(0.25)
    assert log[0]["gradient_ratio"] == pytest.approx(statistics.median(found["calibration_ratios"]))
    assert found["gradient_ratio_measured"] > 0
    select = data(task, "select", 7)
    assert found["base_eval_cross_entropy"] == pytest.approx(cross_entropy_on(base(task), select), rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(cross_entropy_on(out, select), rel=1e-5)
    assert found["eval_cross_entropy"] < found["base_eval_cross_entropy"]
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    weight = found["b"] if calibrated else 1.0
    for row in log[1:]:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + weight * row["penalty"], rel=1e-5)
    if task == "vqa":  # without dropout: the terms are those of the first batch, undivided
        vlm = VisionLanguageModel.from_pretrained(base(task))
        first, make = draw_order(data(task, "train", 12).examples, 4, 3), BatchMaker(vlm)
        batch = Batch(make.pixels([example for example, _ in first]), make.text(first))
        expected = Measure(vlm, arm, bf16=False).terms([batch])
        assert (log[1]["cross_entropy"], log[1]["penalty"]) == pytest.approx(expected, rel=1e-5, abs=ROUNDING)
    # The first batch is that of the plain arm, dropout included, and only the loss is another one.
    plain = rows(run(task, CE))
    assert log[1]["cross_entropy"] == pytest.approx(plain[1]["cross_entropy"], rel=1e-5)
    assert log[1]["loss"] != plain[1]["loss"]
    assert log[4]["cross_entropy"] != plain[4]["cross_entropy"]


@pytest.mark.parametrize("task", ["captions", "vqa"])
@named([SMOOTHING, TEMPERATURE, dataclasses.replace(DRSL, b=1e-3)])
def test_accumulation_changes_nothing(task: str, arm: ArmConfig, run: Any) -> None:
    whole = rows(run(task, arm, dataclasses.replace(CONFIG, batch_size=8, steps=2)))
    cut = rows(run(task, arm, dataclasses.replace(CONFIG, batch_size=2, gradient_accumulation=4, steps=2)))
    assert whole[1]["loss"] == pytest.approx(cut[1]["loss"], rel=1e-5 if task == "vqa" else 2e-2)  # captions: dropout
    if task == "vqa":
        for name in ("cross_entropy", "penalty"):
            assert whole[1][name] == pytest.approx(cut[1][name], rel=1e-5, abs=ROUNDING)


def test_released_is_not_accumulated(run: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, gradient_accumulation=2)
    with pytest.raises(UserError, match=r"arm 'released': gradient_accumulation is 2.* batch_size: 8"):
        run("vqa", RELEASED, config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert record(run("vqa", dataclasses.replace(RELEASED, b=0.0), config))["loss"] == "ce"


def test_bf16(run: Any, tmp_path: Path) -> None:
    for arm in CALIBRATED[2:]:
        rough = record(run("vqa", arm, dataclasses.replace(CONFIG, bf16=True), out=tmp_path / arm.name))
        exact = record(run("vqa", arm))
        assert rough["eval_cross_entropy"] == pytest.approx(exact["eval_cross_entropy"], rel=2e-2)
        assert rough["b"] == pytest.approx(exact["b"], rel=0.1)


@named(CALIBRATED)
def test_goes_on_after_an_interruption(arm: ArmConfig, run: Any, tmp_path: Path) -> None:
    undisturbed, out = run("captions", arm), tmp_path / "out"
    step = ArmTrainer.training_step
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:

        def interrupted(self: ArmTrainer, *args: Any, **kwargs: Any) -> Tensor:
            steps.append(self.state.global_step)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ArmTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("captions", arm, out=out)
        run("captions", arm, out=out)
    assert steps == [0, 1, 2, 3, 2, 3]
    assert record(out) == record(undisturbed)
    assert rows(out) == rows(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


def test_work_with_another_temperature_is_not_taken_up(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = ArmTrainer.training_step
    with pytest.MonkeyPatch.context() as monkeypatch:

        def interrupted(self: ArmTrainer, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ArmTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("vqa", dataclasses.replace(TEMPERATURE, temperature=3.0), out=out)
    found, expected = weights(run("vqa", TEMPERATURE, out=out)), weights(run("vqa", TEMPERATURE))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (dataclasses.replace(RELEASED, k=10**5), "arm 'released': k is 100000.* allows 1 to"),
        (dataclasses.replace(DRSL, b=1e38), "arm 'drsl': the training diverged.*learning_rate"),
    ],
)
def test_arms_that_cannot_be(arm: ArmConfig, message: str, run: Any) -> None:
    with pytest.raises(UserError, match=message):
        run("vqa", arm)
