"""The benchmark program, at sizes that say nothing about speed."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are not installed

from benchmarks import axes, contenders, linear, loss, machine, race, report, step
from benchmarks.report import STANDARD, BenchmarkError, Configuration
from prsl_kernels import prsl_cross_entropy
from prsl_kernels.experiments.errors import UserError

TINY = ["--tokens", "4", "--vocab", "60", "--k", "3", "--threads", "1", "--rounds", "3", "--no-plot"]
FAST = ["--contenders", "cross-entropy", "naive", "clone", "copy", "eager"]
COMMON = dict.fromkeys(report.COMMON, "x") | {"date": "2026-01-01T00:00:00+00:00", "huge_pages": "off", "waited": 0.0}


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full collections take a tenth of a second each, which times need and tests do not."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)


def run(csv: Path, *arguments: str) -> int:
    return loss.main(["--csv", str(csv), *TINY, *arguments])


def test_a_race_is_appended_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "new" / "loss.csv"
    assert run(csv, *FAST) == 0
    assert run(csv, *FAST, "--dtype", "bfloat16", "--rows", "two-values", "--no-memory") == 0
    table = report.read(csv, report.COLUMNS)
    assert tuple(table.columns) == report.COLUMNS
    assert list(table["contender"]) == 3 * FAST[1:]  # two dtypes by default
    assert list(table["dtype"]) == 5 * ["float32"] + 10 * ["bfloat16"]
    assert (table["rounds"] == 3).all()
    assert (table["median_ms"] >= table["p25_ms"]).all()
    assert (table.loc[table["contender"] == "cross-entropy", "ratio_to_cross_entropy"] == 1).all()
    assert table.loc[10:, "peak_extra_mib"].isna().all()
    assert "quartiles" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "\n\n", ",".join(report.COLUMNS) + "\n2026,cut"])
def test_another_programs_csv_is_left_alone(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "loss.csv"
    csv.write_text(text)
    assert run(csv, *FAST) == 1
    assert csv.read_text() == text
    assert "--csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k", "0"], ["--k", "at least 1", "'0'"]),
        (["--vocab", "many"], ["--vocab", "'many'"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--contenders", "liger"], ["--contenders", "liger", "cross-entropy"]),
        (["--k", "3", "60"], ["--k 60", "--vocab 60", "smaller k"]),
        (["--axes", "--grid"], ["--axes", "--grid", "not allowed"]),
        (["--axes"], ["--k 100", "--vocab 60", "smaller k"]),
        (["--axes", "--contenders", "naive-compiled"], ["--axes", "naive-compiled", "compiled"]),
    ],
)
def test_errors_name_the_argument_and_the_remedy(
    tmp_path: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "loss.csv", *arguments)
    except SystemExit as exit:
        status = exit.code
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_the_naive_loss_is_the_loss(tmp_path: Path) -> None:
    configuration = Configuration("float32", 16, 300, 20, 1, "random")
    logits, target = race.make_logits(configuration, seed=0)
    for b in (0.0, 10.0):  # at 1e-4 the penalty would be lost in the cross entropy
        naive = contenders.naive_prsl(logits, target, 20, b)
        eager = prsl_cross_entropy(logits, target, k=20, b=b, backend="eager")
        torch.testing.assert_close(naive, eager, rtol=1e-5, atol=1e-5)


def test_every_contender_trains_on_the_logits_it_is_given() -> None:
    configuration = Configuration("bfloat16", 4, 60, 3, 1, "random")
    logits, target = race.make_logits(configuration, seed=0)
    logits.requires_grad_()
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    for name in ("naive", "eager", "cross-entropy"):
        contenders.CONTENDERS[name].prepare(logits, target, 3)()
        assert logits.grad is None
    full = prsl_cross_entropy(logits, target, k=3, backend="eager")
    (expected,) = torch.autograd.grad(full, logits)
    for gradient in seen[:2]:
        torch.testing.assert_close(gradient, contenders.UPSTREAM * expected, rtol=0.02, atol=1e-4)
    assert len(seen) == 4


@pytest.mark.parametrize("rows", race.ROWS)
def test_rows_are_what_they_are_called(rows: str) -> None:
    logits, target = race.make_logits(Configuration("float32", 3, 200, 3, 1, rows), seed=0)
    assert logits.shape == (3, 200)
    assert logits.is_contiguous()
    assert ((target >= 0) & (target < 200)).all()
    assert bool((logits.diff() > 0).all()) == (rows == "ascending")
    assert {"equal": 1, "two-values": 2}.get(rows, len(logits.unique())) == len(logits.unique())
    of_the_largest = logits.topk(30).indices % 64
    assert bool((of_the_largest < 10).all()) == (rows == "period-64")


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down tenfold in the middle round; the ratio does not notice.
    rounds = [{"prsl": 1.0, "clone": 2.0}, {"prsl": 10.0, "clone": 20.0}, {"prsl": 3.0, "clone": 4.0}]
    assert report.paired_ratio(rounds, "prsl", "clone") == (0.5, 0.5, 0.625)
    assert report.paired_ratio(rounds, "prsl", "naive") is None
    assert report.paired_ratio([], "prsl", "clone") is None
    (row, _) = report.summarize(COMMON, STANDARD, rounds, {"prsl": 7.0}, ["prsl", "clone", "naive"])
    assert (row["p25_ms"], row["median_ms"], row["p75_ms"]) == (2.0, 3.0, 6.5)
    assert (row["N"], row["V"], row["peak_extra_mib"], row["ratio_to_cross_entropy"]) == (512, 50_257, 7.0, None)


def test_targets_are_judged_at_the_standard_configuration_alone() -> None:
    rounds = [{"prsl": 30.0, "prsl-inplace": 16.0, "cross-entropy": 100.0, "clone": 31.0}]
    lines = report.target_table(STANDARD, "off", rounds, 0.01).splitlines()
    assert [line.split()[-1] for line in lines if "reached" in line] == ["reached", "reached", "reached"]
    assert [line.split()[0] for line in lines if "not reached" in line] == ["prsl-inplace"]
    lines = report.target_table(STANDARD, "off", rounds, 0.5).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == 3 * ["disturbed"]
    assert "<= 0.50" in report.target_table(STANDARD, "on", rounds, None)
    assert report.target_table(replace(STANDARD, dtype="bfloat16"), "on", rounds, None) == ""
    for other in ({"k": 6}, {"threads": 1}, {"rows": "equal"}, {"tokens": 4}):
        assert report.target_table(replace(STANDARD, **other), "off", rounds, None) == ""


PAIRS = (
    axes.Pair("vocab", 120, 20, 1.4),
    axes.Pair("k", 9, 2, 1.2),
    axes.Pair("threads", 2, 1, 0.6),
    axes.Pair("rows", "period-64", "random", 2.0),
)


def test_the_ends_of_an_axis_have_equally_many_logits() -> None:
    for pair in axes.PAIRS:
        here, there = pair.ends(STANDARD)
        assert (getattr(here, pair.axis), getattr(there, pair.axis)) == (pair.value, pair.against)
        assert here.tokens * here.vocab == there.tokens * there.vocab
        assert here.tokens * here.vocab == pytest.approx(STANDARD.tokens * STANDARD.vocab, rel=0.01)
        other = {pair.axis: 0, "tokens": 0}
        assert replace(here, **other) == replace(there, **other) == replace(STANDARD, **other)


def test_both_ends_of_an_axis_are_raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []

    def spying(logits: Tensor, target: Tensor, k: int) -> Callable[[], Tensor]:
        def step() -> Tensor:
            seen.append((*logits.shape, k, torch.get_num_threads(), logits.data_ptr()))
            logits.detach().zero_()  # as if in place: whoever comes next has to find fresh logits
            return torch.tensor(1.0)

        return step

    monkeypatch.setitem(contenders.CONTENDERS, "copy", replace(contenders.CONTENDERS["copy"], prepare=spying))
    monkeypatch.setattr(axes, "PAIRS", PAIRS)
    monkeypatch.setattr(machine, "CORES", 2)
    csv = tmp_path / "axes.csv"
    threads = torch.get_num_threads()
    assert run(csv, "--axes", "--contenders", "naive", "copy", "--dtype", "bfloat16") == 0
    assert torch.get_num_threads() == threads
    table = report.read(csv, axes.COLUMNS)
    assert list(table["contender"]) == ["naive", "copy"] * len(PAIRS)
    assert list(table["axis"]) == ["vocab"] * 2 + ["k"] * 2 + ["threads"] * 2 + ["rows"] * 2
    assert (table["dtype"] == "bfloat16").all()
    assert list(zip(table["N"][::2], table["V"][::2], strict=True))[:2] == [(2, 120), (4, 60)]
    assert (table["ratio_p25"] <= table["ratio"]).all()
    steps = race.WARM_UP + 3
    vocabulary, ks, numbers = seen[: 2 * steps], seen[2 * steps : 4 * steps], seen[4 * steps : 6 * steps]
    assert sorted({shape[:2] for shape in vocabulary}) == [(2, 120), (12, 20)]
    assert {shape[2] for shape in ks} == {9, 2}
    assert {shape[3] for shape in numbers} == {1, 2}
    for pair in (vocabulary, ks, numbers):
        assert len({shape[-1] for shape in pair}) == 1  # the same memory
    output = capsys.readouterr().out
    assert "period-64 / random" in output
    assert "<=" not in output  # the targets are the kernel's
    monkeypatch.setattr(machine, "CORES", 1)
    assert run(csv, "--axes", "--contenders", "copy", "--dtype", "float32") == 0
    assert "left out: threads 2 / 1" in capsys.readouterr().out


def test_axes_are_compared_by_the_time_per_element() -> None:
    # The machine slows down tenfold in the second round; one end has three rows of five for two rows of seven.
    rounds = [{("prsl", "here"): 3.0 * slow, ("prsl", "there"): 2.0 * slow} for slow in (1, 10, 1)]
    base, pair = Configuration("float32", 2, 7, 3, 1, "random"), axes.Pair("vocab", 5, 7, 1.4)
    (row,) = axes.summarize(COMMON, base, pair, ["prsl"], rounds)
    assert (row["N"], row["V"], row["against"], row["median_ms"], row["against_median_ms"]) == (3, 5, 7, 3.0, 2.0)
    assert row["ratio_p25"] == row["ratio"] == row["ratio_p75"] == pytest.approx(1.5 * 14 / 15)
    (line,) = axes.axes_table(base, [row]).splitlines()[2:]
    assert line.split()[:4] == ["vocab", "5", "/", "7"]
    assert line.split()[-4:] == ["<=", "1.40", "reached", "0%"]
    assert "not reached" in axes.axes_table(base, [row | {"ratio": 1.401}])


def test_the_grid_varies_one_axis_at_a_time() -> None:
    base = {"dtype": ["float32"], "tokens": [512], "vocab": [50_257], "k": [20, 6], "threads": [1], "rows": ["random"]}
    assert len(loss.configurations(base, False, ())) == 2
    points = loss.configurations(base, True, {"dtype", "k", "threads"})
    assert len(points) == len(set(points)) == 2 * (1 + 2 + 3 + 4)
    for point in points:
        changed = [axis for axis in ("tokens", "vocab", "rows") if getattr(point, axis) != base[axis][0]]
        assert len(changed) <= 1
    with pytest.raises(BenchmarkError, match=r"--k 20 .* --vocab 20"):
        loss.configurations(base | {"vocab": [20]}, False, ())


def test_who_cannot_run_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(logits: Tensor, target: Tensor, k: int) -> Callable[[], None]:
        raise RuntimeError("no C++ compiler\nand more")

    broken = replace(contenders.CONTENDERS["naive-compiled"], prepare=no_compiler)
    monkeypatch.setitem(contenders.CONTENDERS, "naive-compiled", broken)
    monkeypatch.setattr(race, "native_unavailable", lambda: "not built")
    monkeypatch.setattr(machine, "available_memory", lambda: 4500)
    csv = tmp_path / "loss.csv"
    some = ["prsl", "prsl-inplace", "naive-compiled", "naive", "copy"]
    assert run(csv, "--dtype", "float32", "--contenders", *some) == 0
    output = capsys.readouterr().out
    assert "left out: prsl, prsl-inplace (not built)" in output
    assert "left out: naive-compiled, naive (needs about 0.0 GiB, but 0.0 GiB are available; use a small" in output
    assert list(report.read(csv, report.COLUMNS)["contender"]) == ["copy"]
    assert run(csv, "--contenders", "prsl") == 1
    assert "none of the contenders" in capsys.readouterr().err
    monkeypatch.setattr(machine, "available_memory", lambda: None)  # where the system does not say
    assert run(csv, "--dtype", "float32", "--contenders", "naive-compiled", "copy") == 0
    assert "left out: naive-compiled (RuntimeError: no C++ compiler)" in capsys.readouterr().out


def test_contenders_that_compute_another_loss_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(contenders.CONTENDERS["naive"], prepare=lambda logits, target, k: lambda: torch.tensor(1.5))
    monkeypatch.setitem(contenders.CONTENDERS, "naive", wrong)
    assert run(tmp_path / "loss.csv", *FAST) == 1
    assert "'naive': 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("axes_alone", [False, True])
def test_an_interrupt_keeps_complete_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], axes_alone: bool
) -> None:
    steps = itertools.count()
    last = (1 + axes_alone) * (race.WARM_UP + 2)  # in the third round; there are two ends of an axis

    def interrupted(logits: Tensor, target: Tensor, k: int) -> Callable[[], None]:
        def step() -> None:
            if next(steps) == last:
                raise KeyboardInterrupt

        return step

    copy = replace(contenders.CONTENDERS["copy"], prepare=interrupted)
    monkeypatch.setitem(contenders.CONTENDERS, "copy", copy)
    monkeypatch.setattr(axes, "PAIRS", PAIRS)
    threads = torch.get_num_threads()
    csv = tmp_path / "loss.csv"
    assert run(csv, "--contenders", "clone", "copy", "--rounds", "5", *["--axes"] * axes_alone) == 130
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "copy" in captured.out
    table = report.read(csv, axes.COLUMNS if axes_alone else report.COLUMNS)
    assert list(table["contender"]) == ["clone", "copy"]
    assert (table["rounds"] == 2).all()


def test_a_disturbed_race_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = machine.waited()
    assert before is None or 0 <= before <= (machine.waited() or 0)
    clock = itertools.count()
    csv = tmp_path / "loss.csv"
    for waited, note in ((lambda: 1000.0 * next(clock), True), (lambda: 7.0, False), (lambda: None, False)):
        monkeypatch.setattr(machine, "waited", waited)
        assert run(csv, "--contenders", "copy", "--dtype", "float32", "--no-memory") == 0
        assert ("threads waited for a core" in capsys.readouterr().out) == note
    disturbed, quiet, unknown = report.read(csv, report.COLUMNS)["waited"]
    assert disturbed > 1
    assert quiet == 0
    assert unknown != unknown


def test_both_settings_of_huge_pages_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(machine.HUGE_PAGES, "0")
    csv = Path("loss.csv")
    assert run(csv, "--contenders", "clone", "--dtype", "float32", "--huge-pages", "both") == 0
    assert list(report.read(csv, report.COLUMNS)["huge_pages"]) == ["off", "on"]


def test_the_plot_shows_the_newest_race_of_the_standard_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "loss.csv"
    assert loss.main(["--csv", str(csv), "--plot-only"]) == 1
    times = {"prsl": 20.0, "cross-entropy": 100.0, "clone": 30.0}
    for day, factor in ((1, 1.0), (3, 2.0), (2, 3.0)):
        for dtype in ("float32", "bfloat16"):
            rounds = [{name: ms * factor for name, ms in times.items()}]
            common = COMMON | {"date": f"2026-01-0{day}T00:00:00+00:00"}
            rows = report.summarize(common, replace(STANDARD, dtype=dtype), rounds, {}, list(times))
            report.append(csv, rows, report.COLUMNS)
    other = report.summarize(COMMON, replace(STANDARD, k=6), [times], {}, list(times))
    report.append(csv, other, report.COLUMNS)
    panels = report.newest(report.read(csv, report.COLUMNS))
    assert [set(panel["dtype"]) for panel in panels] == [{"float32"}, {"bfloat16"}]
    assert [list(panel["median_ms"]) for panel in panels] == 2 * [[40.0, 200.0, 60.0]]
    capsys.readouterr()
    assert loss.main(["--csv", str(csv), "--plot-only"]) == 0
    png, svg = (Path(line) for line in capsys.readouterr().out.split())
    assert png.read_bytes().startswith(b"\x89PNG")
    for text in ("F.cross_entropy", "float32", "bfloat16", "2026-01-03", ">200<"):
        assert text in svg.read_text()


@pytest.mark.skipif(contenders.native_unavailable() is not None, reason="the compiled extension cannot run here")
def test_the_kernel_is_raced(tmp_path: Path) -> None:
    csv = tmp_path / "loss.csv"
    names = ["prsl", "prsl-inplace", "prsl-forward", "naive"]
    assert run(csv, "--contenders", *names, "--rows", *race.ROWS, "--no-memory") == 0
    table = report.read(csv, report.COLUMNS)
    assert set(table["contender"]) == set(names)
    assert len(table) == 2 * 4 * len(race.ROWS)


TINY_STEP = ["--rounds", "2", "--batch", "2", "--threads", "1"]
TINY_MODEL = ["--width", "64", "--layers", "1", "--image-size", "32", "--vocab", "97", "--tokens", "5"]


def fine_tune(csv: Path, *arguments: str) -> int:
    return step.main(["--csv", str(csv), *TINY_STEP, *TINY_MODEL, *arguments])


@pytest.fixture
def _any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiled extension cannot run, another backend does for everything but the times."""
    monkeypatch.setattr(step, "native_unavailable", lambda: None)


@pytest.mark.usefixtures("_any_backend")
def test_whole_steps_are_raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_fetched(*arguments: Any, **keywords: Any) -> None:
        raise UserError("not in the cache")

    monkeypatch.setattr(step, "load_dataset", not_fetched)
    csv = tmp_path / "step.csv"
    threads = torch.get_num_threads()
    assert fine_tune(csv, "--models", "captions", "vqa", "vit-gpt2") == 0
    assert torch.get_num_threads() == threads
    table = report.read(csv, step.COLUMNS)
    assert list(table["model"]) == 3 * ["vit-gpt2"] + 3 * ["captions"] + 3 * ["vqa"]
    assert list(table["contender"]) == 3 * ["cross-entropy", "prsl-b0", "prsl"]
    assert list(table["V"][::3]) == [97, 2048, 2048]
    assert list(table["data"][::3]) == ["random", "synthetic", "synthetic"]
    assert list(table["b"][:3].fillna(-1)) == [-1, 0.0, 0.01]
    assert (table["batch"] == 2).all()
    assert (table["loss_ms"] > 0).all()
    assert (table["loss_ms"] + table["optimizer_ms"] < table["p75_ms"]).all()
    assert (table.loc[table["contender"] == "cross-entropy", ["ratio", "loss_ratio"]] == 1).all(axis=None)
    output = capsys.readouterr().out
    assert output.count("step: prsl / cross-entropy") == 3
    assert output.count("<= 1.00") == 3


@pytest.mark.usefixtures("_any_backend")
def test_steps_differ_in_the_loss_alone() -> None:
    options = step.make_parser().parse_args(TINY_STEP + TINY_MODEL)
    torch.manual_seed(0)
    subject = step.vit_gpt2(options)
    before = [parameter.clone() for parameter in subject.model.parameters()]
    trainee = step.Trainee(subject, seed=0)
    gradients = {}
    for name in ("prsl", "cross-entropy", "prsl-b0"):
        turn = trainee.turn(name)
        turn.prepare(1)
        turn.step()
        gradients[name] = subject.model.decoder.lm_head.weight.grad.clone()
    torch.testing.assert_close(gradients["prsl-b0"], gradients["cross-entropy"], rtol=1e-4, atol=1e-7)
    assert not torch.equal(gradients["prsl"], gradients["prsl-b0"])
    assert trainee.parts.keys() == {(name, part) for name in gradients for part in ("loss", "optimizer")}
    for parameter, value in zip(subject.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)  # there is no learning: every round does the same work


@pytest.mark.usefixtures("_any_backend")
def test_a_model_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    csv = tmp_path / "step.csv"
    for arguments, reason in (([], "needs about 4."), (["--vocab", "20"], "--vocab 20 is too small")):
        assert step.main(["--csv", str(csv), "--models", "vit-gpt2", *arguments]) == 1
        captured = capsys.readouterr()
        assert f"left out: vit-gpt2 ({reason}" in captured.out
        assert "none of the models" in captured.err
        assert not csv.exists()


@pytest.mark.usefixtures("_any_backend")
def test_models_that_compute_another_loss_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step.Trainee, "step", lambda trainee: float(trainee._name == "prsl"))
    assert fine_tune(tmp_path / "step.csv", "--models", "vit-gpt2") == 1
    assert "the contenders do not compute the same loss" in capsys.readouterr().err


def test_without_the_extension_no_step_is_raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "native_unavailable", lambda: "not built: no compiler")
    assert fine_tune(tmp_path / "step.csv") == 1
    assert "not built: no compiler" in capsys.readouterr().err


# ---- from hidden states ----------------------------------------------------------------------------------------------

LINEAR = ["--tokens", "40", "--width", "8", "--vocab", "2000", "--k", "3", "--threads", "1", "--rounds", "3"]


def test_the_loss_from_hidden_states_is_raced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "linear.csv"
    assert linear.main([*LINEAR, "--csv", str(csv)]) == 0
    table = report.read(csv, linear.COLUMNS)
    assert list(table["contender"]) == 2 * list(linear.LOSSES)
    assert (table.loc[table["contender"] == linear.REFERENCE, "ratio_to_cross_entropy"] == 1).all()
    assert (table["peak_extra_mib"] >= 0).all()
    assert "beyond gradients / logits" in capsys.readouterr().out
    assert linear.main([*LINEAR, "--csv", str(csv), "--k", "2000"]) == 1
    assert "--k 2000 does not go with --vocab 2000" in capsys.readouterr().err


def test_losses_from_hidden_states_that_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss_of = linear.LOSSES["linear-prsl"]
    monkeypatch.setitem(linear.LOSSES, "linear-prsl", lambda x, matrix, target, k: loss_of(2 * x, matrix, target, k))
    assert linear.main([*LINEAR, "--csv", str(tmp_path / "linear.csv")]) == 1
    assert "do not compute the same loss" in capsys.readouterr().err
