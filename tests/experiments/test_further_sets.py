"""Further test sets: the arms of a run on other data, in `<run>/tests/<name>`, without another fine-tuning."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from stand_in import StandIn, make_dataset
from typer.testing import CliRunner

from prsl_kernels.experiments import cli, data
from prsl_kernels.experiments.attacks import record
from prsl_kernels.experiments.config import (
    ArmConfig,
    AttackConfig,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    GridConfig,
    PrimaryConfig,
    Recipe,
    Task,
    TaskConfig,
    TransferConfig,
    load_recipe,
    save_recipe,
)
from prsl_kernels.experiments.data import Dataset
from prsl_kernels.experiments.files import sha256, write_json
from prsl_kernels.experiments.pipeline import Experiment, run_experiment
from prsl_kernels.experiments.planning import make_plan
from prsl_kernels.experiments.sweep import Job, run_stage, sweep
from prsl_kernels.experiments.training import finetune as finetune_module

pytestmark = pytest.mark.usefixtures("_single_thread")

SIZES = {"home": 6, "abroad": 5, "far": 4}
ARMS = {"ce": 0, "prsl-prob-k2-b1": 1}  # and the seed of the stand-in that takes the place of its model


@dataclass
class Seen:
    """What the stages were made of."""

    tuned: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


def task_config(task: Task, *others: str) -> TaskConfig:
    return TaskConfig(
        data=DataConfig("home"),
        base=task,
        finetune=FinetuneConfig(steps=1, learning_rate=1e-3),
        attack=AttackConfig(
            eps=8,
            step=4,
            rounds=(1, 2),
            batch_size=4,
            keep_images=1,
            controls=("blank",),
            transfer=TransferConfig("bim"),
        ),
        primary=PrimaryConfig("rouge_l"),
        evaluate=EvaluateConfig(metrics=("rouge_l",)),
        tests={name: DataConfig(name) for name in others},
    )


RECIPE = Recipe(
    name="small",
    tasks={"captions": task_config("captions", "abroad", "far"), "vqa": task_config("vqa", "abroad")},
    arms=(ArmConfig("ce", b=0.0),),
    grid=GridConfig(space=("prob",), k=(2,), b=(1.0,), rounds=(1,), clean_tolerance=1.0),
)


def stand_in(path: Path) -> StandIn:
    """In place of the fine-tuned model in `<run>/<task>/finetune/<arm>/seed-0`."""
    task, _, arm, _ = path.parts[-4:]
    return StandIn(ARMS[arm], task)


@pytest.fixture(scope="module", name="seen")
def seen_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Stand-ins for data, fine-tuning and models; all else is what it is."""
    seen = Seen()
    folder = tmp_path_factory.mktemp("images")

    def load_dataset(config: DataConfig, split: str, *, limit: int | None = None, task: str = "captions") -> Dataset:
        count = SIZES[config.name] if limit is None else limit
        found = make_dataset(folder / config.name / split, count, task=task)
        return replace(found, name=config.name, split=split, fingerprint=f"{config.name}-{split}-{count}-{task}")  # type: ignore[arg-type]

    def finetune(base: str, train: Dataset, select: Dataset, arm: ArmConfig, *others: Any, **settings: Any) -> None:
        out: Path = others[1]
        seen.tuned.append(f"{train.task} {arm.name} on {train.name}")
        (out / "model.safetensors").write_bytes(b"weights")
        (out / "train.jsonl").write_text("")
        write_json(out / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0.25]})
        settings = {"arm": arm.name, "loss": "prsl" if arm.b else "ce", "k": arm.k, "b": arm.b, "space": arm.space}
        measured = {"gradient_ratio_target": None, "gradient_ratio_measured": 0.0, "selected_step": 1}
        entropies = {"eval_cross_entropy": 1.0, "base_eval_cross_entropy": 2.0}
        write_json(
            out / "arm.json",
            settings | measured | entropies | {"distance": "l2", "vocab_size": 8, "seed": 0, "steps": 1},
        )

    def from_pretrained(path: Path, **settings: Any) -> StandIn:
        seen.loaded.append(str(path))
        return stand_in(path)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(data, "load_dataset", load_dataset)
        monkeypatch.setattr(finetune_module, "finetune", finetune)
        monkeypatch.setattr(record, "VisionLanguageModel", SimpleNamespace(from_pretrained=from_pretrained))
        yield seen


@pytest.fixture(scope="module", name="run")
def run_fixture(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    run = tmp_path_factory.mktemp("further") / "run"
    run_experiment(RECIPE, run, device="cpu")
    return run


def stages_of(run: Path) -> set[str]:
    return {file.stem.replace("--", "/") for file in (run / "stages").glob("*.json")}


def expected(tasks: Sequence[str], *kinds: str) -> set[str]:
    models = {f"{task}/{kind}/{arm}/seed-0" for task in tasks for kind in kinds for arm in ARMS}
    return models | {f"{task}/evaluate" for task in tasks} | {"report"}


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run / stage / "outputs.parquet").to_pylist()
    return rows


def test_each_set_has_attacks_scores_and_a_report_and_tasks_without_it_drop_out(run: Path) -> None:
    assert stages_of(run) == expected(["captions", "vqa"], "finetune", "attack", "transfer")
    assert stages_of(run / "tests" / "abroad") == expected(["captions", "vqa"], "attack", "transfer")
    assert stages_of(run / "tests" / "far") == expected(["captions"], "attack", "transfer")
    assert not (run / "tests" / "far" / "vqa").exists()
    for name in ("abroad", "far"):
        part = run / "tests" / name
        assert name in (part / "report.html").read_text(encoding="utf-8")
        info = json.loads((part / "run.json").read_text())
        assert info["datasets"]["captions"]["name"] == name
        # Trained on the run's own data, attacked on this
        assert info["datasets"]["captions"]["sizes"] == {"train": 6, "select": 6, "test": SIZES[name]}
        scores = pq.read_table(part / "captions" / "evaluate" / "scores.parquet").to_pylist()
        clean = [row for row in scores if (row["arm"], row["attack"], row["round"]) == ("ce", "bim", 0)]
        assert len({row["id"] for row in clean}) == SIZES[name]


def test_the_models_of_the_run_are_attacked_and_none_is_trained_for_a_set(
    run: Path, seen: Seen, tmp_path: Path
) -> None:
    for arm, seed in ARMS.items():
        rows = rows_of(run / "tests" / "far", f"captions/attack/{arm}/seed-0")
        clean = sorted((row["id"], row["text"]) for row in rows if (row["attack"], row["round"]) == ("bim", 0))
        images = make_dataset(tmp_path, SIZES["far"]).examples
        model = StandIn(seed).eval()
        said = model.generate(model.load_pixels([example.image for example in images]))
        assert clean == sorted(zip((example.id for example in images), said, strict=True))
    trained = [f"{task} {arm} on home" for task in ("captions", "vqa") for arm in ARMS]
    assert sorted(seen.tuned) == sorted(trained * 2)  # once in the grid, once in earnest
    assert not any(Path(path).is_relative_to(run / "tests") for path in seen.loaded)
    assert not list((run / "tests").rglob("*.safetensors"))
    for part in (run / "tests" / "abroad", run / "tests" / "far"):
        for name in ("arm.json", "train.jsonl", "preprocessor_config.json"):
            place = Path("captions") / "finetune" / "prsl-prob-k2-b1" / "seed-0" / name
            assert (part / place).read_bytes() == (run / place).read_bytes()


def test_the_grid_runs_once_and_not_for_the_sets(run: Path) -> None:
    assert (run / "grid" / "recipe.yaml").is_file()
    assert not (run / "grid" / "tests").exists()
    for part in (run / "tests" / "abroad", run / "tests" / "far"):
        assert not (part / "grid").exists()
        recipe = load_recipe(str(part / "recipe.yaml"))
        assert (recipe.grid, recipe.sweep) == (None, None)
        assert [arm.name for arm in recipe.arms] == list(ARMS)
        assert all(not config.tests for config in recipe.tasks.values())


def test_a_second_run_finds_all_of_it_up_to_date(run: Path, seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    results = [*run.rglob("*.parquet"), *run.rglob("report.html")]
    before = {path: path.stat().st_mtime_ns for path in results}
    done = len(seen.tuned), len(seen.loaded)
    run_experiment(RECIPE, run, device="cpu")
    lines = capsys.readouterr().err.splitlines()
    stages = [line for line in lines if line.startswith("[")]
    parts = (run, run / "grid", run / "tests" / "abroad", run / "tests" / "far")
    assert len(stages) == sum(len(stages_of(part)) for part in parts)
    assert all(line.endswith(": up to date") for line in stages)
    assert [line for line in lines if line.startswith("on ")] == ["on abroad:", "on far:"]
    assert (len(seen.tuned), len(seen.loaded)) == done
    assert {path: path.stat().st_mtime_ns for path in results} == before


def test_fine_tuning_alone_leaves_the_sets_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_experiment(RECIPE, run, device="cpu", until="finetune", task="vqa")
    assert not re.search("^on ", capsys.readouterr().err, re.M)


def test_a_set_is_made_again_where_its_data_or_its_models_change(seen: Seen, run: Path) -> None:
    whole = load_recipe(str(run / "recipe.yaml"))

    def keys(recipe: Recipe) -> dict[str, dict[str, str]]:
        main = Experiment(recipe, run, "cpu")
        parts = {"": main, **{part.run.name: part for part in main.further()}}
        return {name: {stage.name: stage.key for stage in part.stages} for name, part in parts.items()}

    before = keys(whole)

    def changed(recipe: Recipe) -> set[str]:
        after = keys(recipe)
        return {f"{part}:{name}" for part in before for name, key in before[part].items() if after[part][name] != key}

    def with_captions(**changes: Any) -> Recipe:
        return replace(whole, tasks={**whole.tasks, "captions": replace(whole.tasks["captions"], **changes)})

    captions = whole.tasks["captions"]
    fewer = changed(with_captions(tests={**captions.tests, "far": DataConfig("far", test_limit=2)}))
    assert fewer == {":report"} | {f"far:{name}" for name in before["far"]}
    longer = changed(with_captions(finetune=replace(captions.finetune, steps=2)))
    theirs = {f"{part}:{name}" for part in before for name in before[part] if name.startswith("captions/")}
    assert longer == theirs | {":report", "abroad:report", "far:report"}


def test_a_plan_counts_what_is_finished_of_the_sets(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rows = {(row.part, row.task, row.kind): row for row in make_plan(RECIPE, copy, device="cpu").rows}
    for part, tasks in (("tests/abroad", ("captions", "vqa")), ("tests/far", ("captions",))):
        kinds = {(task, kind, 2) for task in tasks for kind in ("attack", "transfer")}
        kinds |= {(task, "evaluate", 1) for task in tasks} | {("", "report", 1)}
        assert {(row.task, row.kind, row.number) for row in rows.values() if row.part == part} == kinds
    assert {key: (row.cached, row.left) for key, row in rows.items()} == {
        key: (row.number, 0) for key, row in rows.items()
    }
    (copy / "tests" / "far" / "stages" / "captions--attack--ce--seed-0.json").unlink()
    rows = {(row.part, row.task, row.kind): row for row in make_plan(RECIPE, copy, device="cpu").rows}
    assert (rows["tests/far", "captions", "attack"].cached, rows["tests/far", "captions", "attack"].number) == (1, 2)
    assert rows["tests/abroad", "captions", "attack"].cached == rows["", "captions", "attack"].cached == 2


class InThisProcess:
    """Workers of a sweep that are done at once, and what they did."""

    def __init__(self) -> None:
        self.done: list[tuple[Path, str]] = []
        self._through: list[tuple[str, str | None]] = []

    def check(self, jobs: Sequence[Job]) -> None:
        pass

    def room_for(self, job: Job) -> bool:
        return True

    def start(self, job: Job) -> None:
        run_stage(Path(job.run), job.name, key=job.key, device=job.device)
        self.done.append((Path(job.run), job.name))
        self._through.append((job.name, None))

    def ended(self) -> list[tuple[str, str | None]]:
        through, self._through = self._through, []
        return through

    def stop(self) -> None:
        pass


def test_a_sweep_makes_the_sets_from_the_same_models(run: Path, seen: Seen, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "tests")
    tuned = len(seen.tuned)
    workers = InThisProcess()
    sweep(RECIPE, copy, device="cpu", connect=lambda: workers)
    assert len(seen.tuned) == tuned
    for name in ("abroad", "far"):
        mine, theirs = copy / "tests" / name, run / "tests" / name
        assert {stage for folder, stage in workers.done if folder == mine} == stages_of(theirs)
        for stage in stages_of(theirs):
            if "/attack/" in stage or "/transfer/" in stage:
                assert rows_of(mine, stage) == rows_of(theirs, stage)
        assert (mine / "report.html").is_file()
    assert {folder.name for folder, _ in workers.done} == {"abroad", "far"}
    assert sweep(RECIPE, copy, device="cpu", connect=lambda: pytest.fail("there is nothing to do")) is None


def test_a_set_is_not_run_without_its_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = run / "tests" / "far"
    before = {path: sha256(path) for path in run.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["run", str(part)],
        ["run", str(part / "recipe.yaml"), "--out", str(part)],
        ["run", str(part / "recipe.yaml")],
        ["finetune", "demo", "--out", str(part)],
        ["sweep", str(part / "recipe.yaml"), "--out", str(part)],
        ["plan", str(part)],
    ):
        result = CliRunner().invoke(cli.app, arguments)
        assert (result.exit_code, f"{part}: belongs to the run {run}; give that one" in result.stderr) == (1, True)
    assert {path: sha256(path) for path in run.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir())


def test_other_folders_called_tests_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with a recipe and a folder of tests is no run."""
    raw = yaml.safe_load(save_recipe(load_recipe("demo")))
    for place in (tmp_path / "recipe.yaml", tmp_path / "tests" / "one" / "recipe.yaml"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(raw))
    asked: list[Path] = []
    monkeypatch.setattr(
        cli, "_experiment", lambda recipe, out, *others: asked.append(cli._recipe(recipe, out, None)[1])
    )
    result = CliRunner().invoke(cli.app, ["finetune", str(tmp_path / "tests" / "one" / "recipe.yaml")])
    assert (result.exit_code, asked) == (0, [Path("runs") / "demo"])
