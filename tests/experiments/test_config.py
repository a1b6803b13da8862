"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prsl_kernels.experiments.config import load_recipe, recipe_names, save_recipe
from prsl_kernels.experiments.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(save_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(saved)) == recipe


def test_the_demo_holds_the_arms_of_the_protocol() -> None:
    arms = {arm.name: arm for arm in load_recipe("demo").arms}
    assert arms["ce"].b == 0
    assert (arms["prsl-printed"].k, arms["prsl-printed"].b, arms["prsl-printed"].space) == (20, 1e-4, "prob")
    assert [(arm.k, arm.space, arm.gradient_ratio) for arm in arms.values() if arm.gradient_ratio] == [
        (6, "prob", 0.1),
        (20, "prob", 0.1),
        (100, "prob", 0.1),
        (20, "log_prob", 0.1),
    ]


def test_overrides_reach_nested_keys_and_arms_by_name() -> None:
    overrides = ("tasks.vqa.attack.eps=4", "arms.prsl-k6.k=7", "tasks.vqa.finetune.learning_rate=1e-5")
    recipe = load_recipe("demo", overrides)
    assert recipe.tasks["vqa"].attack.eps == 4
    assert recipe.tasks["vqa"].finetune.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert next(arm for arm in recipe.arms if arm.name == "prsl-k6").k == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tasks.vqa.attack.epz=4", ["tasks.vqa.attack.epz", "unknown key"]),
        ("tasks.vqa.attack.eps=-4", ["tasks.vqa.attack.eps", "-4"]),
        ("tasks.vqa.attack.eps=.inf", ["tasks.vqa.attack.eps", "finite"]),
        ("tasks.vqa.attack.rounds=[3,2]", ["tasks.vqa.attack", "ascend"]),
        ("tasks.vqa.attack.rounds=[0]", ["tasks.vqa.attack", "above 0"]),
        ("tasks.vqa.attack.units=inches", ["tasks.vqa.attack.units", "inches"]),
        ("tasks.vqa.finetune.steps=0", ["tasks.vqa.finetune.steps"]),
        ("tasks.vqa.finetune.steps=1.5", ["tasks.vqa.finetune.steps", "1.5"]),
        ("tasks.vqa.primary.round=3", ["tasks.vqa.primary.round", "worst case has no round"]),
        ("tasks.vqa.primary.attack=nosuch", ["primary.attack 'nosuch'", "worst, bim"]),
        ("tasks.vqa.primary={score: cider, attack: bim, round: 3}", ["primary.round 3", "[0, 1, 2"]),
        ("tasks.vqa.attack.extra=[{name: worst}]", ["tasks.vqa.attack.extra.0", "'worst' is reserved"]),
        ("tasks.vqa.attack.extra=[{name: none}]", ["'none' is reserved"]),
        ("tasks.vqa.attack.extra=[{name: jpeg}]", ["'jpeg' is reserved"]),
        ("tasks.vqa.attack.extra=[{name: transfer-from-ce}]", ["'transfer-from-ce' is reserved"]),
        ("tasks.vqa.attack.extra=[{name: bim}]", ["attack names must differ"]),
        ("tasks.vqa.attack.extra=[{name: a}, {name: a}]", ["attack names must differ"]),
        ("tasks.vqa.attack.extra=[{name: ../a}]", ["extra.0", "../a"]),
        ("tasks.vqa.attack.extra=[{name: a, eps: 4}]", ["'a'", "leave out eps, norm and images"]),
        ("tasks.vqa.attack.extra=[{name: a, norm: l2}]", ["'a'", "leave out eps, norm and images"]),
        ("tasks.vqa.attack.extra=[{name: a, images: 4}]", ["'a'", "or give it another role"]),
        ("tasks.vqa.attack.extra=[{name: a, restarts: 0}]", ["extra.0", "restarts"]),
        ("tasks.vqa.attack.extra=[{name: a, rounds: []}]", ["ascend"]),
        ("tasks.vqa.attack.extra=[{name: a, objective: loss}]", ["objective", "margin-max"]),
        ("tasks.vqa.attack.transfer={attack: nosuch}", ["transfer.attack 'nosuch'", "bim"]),
        ("tasks.vqa.attack.surface={points: 2}", ["surface", "points"]),
        ("tasks.vqa.attack.controls=[coin]", ["controls", "coin"]),
        ("tasks.vqa.primary.score=accuracy", ["tasks.vqa.primary.score", "vqa_accuracy"]),
        ("tasks.vqa.data=3", ["tasks.vqa.data"]),
        ("tasks.audio={}", ["audio", "captions"]),
        ("arms.ce.b=1", ["cross entropy", "b: 0"]),
        ("arms.ce.b=.nan", ["arms.0.b", "finite"]),
        ("arms.prsl-k6.b=1", ["prsl-k6", "exactly one of b and gradient_ratio"]),
        ("arms.prsl-k6.name=ce", ["must differ"]),
        ("arms.prsl-k6.k=0", ["arms.2.k"]),
        ("arms.nosuch.k=0", ["nosuch"]),
        ("name=../x", ["name", "../x"]),
        ("name=.hidden", ["name"]),
        ("seeds=[0,0]", ["seeds"]),
        ("seeds=[-1]", ["seeds"]),
        ("eps", ["KEY=VALUE"]),
        ("nosuch.key=1", ["nosuch"]),
        ("name=[", ["not valid YAML"]),
    ],
)
def test_bad_values_are_refused_with_their_place(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo", (override,))
    for word in words:
        assert word in str(error.value)


def test_the_endpoint_is_the_worst_case_or_a_recorded_round_of_an_attack() -> None:
    assert load_recipe("demo", ("tasks.vqa.primary={score: cider}",)).tasks["vqa"].primary.attack == "worst"
    extra = "tasks.vqa.attack.extra=[{name: a, rounds: [3, 7]}, {name: b, role: eps, eps: 4, images: 3}]"
    for attack, round_index in (("bim", 20), ("bim", None), ("a", 3), ("a", None)):
        chosen = f"{{score: cider, attack: {attack}, round: {'null' if round_index is None else round_index}}}"
        primary = load_recipe("demo", (extra, f"tasks.vqa.primary={chosen}")).tasks["vqa"].primary
        assert (primary.attack, primary.round) == (attack, round_index)
    with pytest.raises(UserError, match=r"primary.round 20 is not among the recorded rounds \[3, 7\]"):
        load_recipe("demo", (extra, "tasks.vqa.primary={score: cider, attack: a, round: 20}"))
    with pytest.raises(UserError, match=r"primary.attack 'b' must be one of role ensemble"):
        load_recipe("demo", (extra, "tasks.vqa.primary={score: cider, attack: b}"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "mapping at the top"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe", "not valid YAML"),
        (b"", "found NoneType"),
        (b"name: x\narms: []\ntasks: {}\n", "cross entropy"),
        (b"name: x\n", "required key is missing"),
        (b"!!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_hostile_files_are_refused(content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_recipe(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_missing_recipe_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo"):
        load_recipe(str(tmp_path / "nosuch.yaml"))
    with pytest.raises(UserError, match="neither a file"):
        load_recipe(str(tmp_path))


def test_saved_recipes_are_plain_yaml() -> None:
    assert yaml.safe_load(save_recipe(load_recipe("demo")))["name"] == "demo"
