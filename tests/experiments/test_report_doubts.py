"""What a sceptic doubts: attacks that go on gaining, masking that shows in part, controls, small samples, splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from report_pages import SCORES, Page, change
from synthetic_run import EPS, make_run

from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.report import build_report
from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.claims import arm_verdicts, convergence_told
from prsl_kernels.experiments.report.evidence import Flag, flags, write_evidence
from prsl_kernels.experiments.report.sections import sections
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import evidence, headline_lines, limits, missing_evidence, verdict

ARMS = ("ce", "prsl-k20", "prsl-k6")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A robust arm and one without any effect, under three seeds."""
    run = tmp_path_factory.mktemp("doubts")
    make_run(run, images=32, seeds=(0, 1, 2), arms=ARMS, tasks=("captions",), keep=0, pixels=8, full=True)
    return run


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def half_masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("half")
    plant = {"prsl-k6": "half-masked", "prsl-k20": "robust"}
    make_run(run, images=32, seeds=(0, 1, 2), arms=ARMS, tasks=("captions",), keep=0, pixels=8, full=True, plant=plant)
    return run


def look(run: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> Findings:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    if edit is not None:
        edit(recipe)
    return analyse(load_run(run, recipe).tasks[0])


def rescore(run: Path, attack: str, arms: tuple[str, ...], how: Callable[[pd.Series], Any], number: int = -1) -> None:
    """Changes the primary scores of some arms under an attack, at one round or at all."""

    def edit(rows: pd.DataFrame) -> pd.DataFrame:
        which = (rows["attack"] == attack) & rows["arm"].isin(arms) & (rows["reference"] == "primary")
        which &= rows["metric"] == "bertscore_f1"
        which &= rows["round"].eq(number) if number >= 0 else rows["round"] >= 0
        rows.loc[which, "value"] = how(rows.loc[which, "value"])
        return rows

    change(run / SCORES, edit)


def reattack(run: Path, arms: tuple[str, ...], edit: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    for arm in arms:
        for path in run.glob(f"captions/attack/{arm}/*/outputs.parquet"):
            change(path, edit)


def flag(found: Findings, name: str) -> Flag:
    return next(each for each in flags(found) if each.name == name)


def last_lines(found: Findings) -> list[str]:
    return headline_lines(type("Run", (), {"tasks": (found.tables,)})(), [found])  # type: ignore[arg-type]


# ---- convergence of all attacks --------------------------------------------------------------------------------------


def test_nothing_stands_against_the_robust_arm(run: Path) -> None:
    found = look(run)
    assert arm_verdicts(found)["prsl-k20"].reasons == ()
    assert convergence_told(found) == "BIM and the restarts of PGD had converged"
    assert flag(found, "convergence").state == "ok"
    assert "; BIM and the restarts of PGD had converged." in last_lines(found)[3]
    assert missing_evidence([found]) == ""


@pytest.mark.parametrize("arm", ["prsl-k20", "ce"])
def test_restarts_that_still_gain_take_the_claim_away(run: Path, arm: str) -> None:
    rescore(run, "pgd", (arm,), lambda values: values + 0.2, 20)
    found = look(run)
    claim = arm_verdicts(found)["prsl-k20"]
    assert claim.word == "higher"
    (reason,) = claim.reasons
    assert reason.startswith("the restarts of PGD have not been shown to have converged on ")
    assert (flag(found, "convergence").state, flag(found, "convergence").arms) == ("warn", (arm,))
    assert "BIM had converged; the restarts of PGD were not shown to have." in last_lines(found)[3]
    answer = next(item for item in evidence(found) if "converged" in item.question)
    assert answer.state == "part"
    assert "the restarts of PGD were not shown to have" in answer.answer
    assert "a converged attack" in missing_evidence([found])


def test_an_attack_of_the_ensemble_that_still_gains_takes_the_claim_away(run: Path) -> None:
    reattack(run, ARMS, lambda rows: rows.assign(restarts=rows["restarts"].where(rows["attack"] != "pgd", 1)))
    rescore(run, "pgd", ("prsl-k20",), lambda values: values + 0.2, 20)
    found = look(run)
    assert arm_verdicts(found)["prsl-k20"].reasons == (
        "PGD has not been shown to have converged on PRSL, k\u00a0=\u00a020",
    )
    assert convergence_told(found) == "BIM had converged; PGD was not shown to have"
    assert "not been shown to have converged" not in " ".join(arm_verdicts(found)["prsl-k6"].reasons)


def test_an_attack_that_did_nothing_has_not_converged(run: Path) -> None:
    for number in (1, 2, 5, 10, 20, 40):
        rescore(run, "bim", ARMS, lambda values: values * 0 + 0.9, number)
    rescore(run, "bim", ARMS, lambda values: values * 0 + 0.9, 0)
    found = look(run)
    assert set(found.scepticism.convergence.states.values()) == {"absent"}
    assert (flag(found, "convergence").state, flag(found, "convergence").reason) == ("absent", "the attack did nothing")
    assert any("BIM did nothing to " in reason for reason in arm_verdicts(found)["prsl-k20"].reasons)
    assert next(item for item in evidence(found) if "converged" in item.question).state == "absent"
    assert "BIM did nothing" in last_lines(found)[3]
    rows = sections(found)["convergence"].tables[0].rows
    assert {row[-1] for row in rows if row[0] == "bim"} == {"absent: the attack did nothing"}


# ---- masking that shows in part --------------------------------------------------------------------------------------


def test_half_seen_masking_is_told_in_one_breath_with_the_gain(half_masked: Path) -> None:
    found = look(half_masked)
    assert not any(found.scepticism.masking.suspected.values()), "no image from elsewhere does more"
    effect = next(effect for effect in found.effects if effect.arm == "prsl-k6")
    assert effect.detected
    assert effect.attacked.estimate > 0
    claim = arm_verdicts(found)["prsl-k6"]
    assert claim.word == "masking not excluded"
    assert "Masked gradients cannot be excluded: up to 6" in claim.sentence
    sentence = verdict(found).headline.split(". No change")[0].split(". More robust")[0]
    assert "(k\u00a0=\u00a06: up to 6" in sentence
    assert "of the entries of its input gradients are exactly zero" in sentence
    assert "; not confirmed by square)" in sentence
    assert "Masked gradients cannot be excluded: PRSL, k\u00a0=\u00a06." in verdict(found).headline
    assert "Masking suspected" not in verdict(found).headline, "that is said where a test accuses"
    assert "Masked gradients cannot be excluded: PRSL, k\u00a0=\u00a06 (Captions)." in last_lines(found)[-1]
    assert write_evidence(found)["trusted"] == {"prsl-k20": True, "prsl-k6": False}


def test_a_gain_that_images_from_elsewhere_do_not_confirm_says_so(run: Path) -> None:
    rescore(run, "square", ("ce",), lambda values: values + 0.25)
    headline = verdict(look(run)).headline
    assert "(k\u00a0=\u00a020: not confirmed by square)" in headline
    assert "transferred images" not in headline
    assert "gradients" not in headline


def test_gradients_that_vanish_without_a_gain_accuse_nobody(run: Path) -> None:
    reattack(run, ("prsl-k6",), lambda rows: rows.assign(zero_gradient_share=rows["zero_gradient_share"] * 100))
    claim = arm_verdicts(look(run))["prsl-k6"]
    assert claim.word == "no change detected"
    assert "excluded: up to" not in claim.sentence


def test_gradients_that_vanish_in_cross_entropy_too_are_no_ground_against_one_arm(run: Path) -> None:
    reattack(run, ARMS, lambda rows: rows.assign(zero_gradient_share=rows["zero_gradient_share"] * 100))
    found = look(run)
    assert arm_verdicts(found)["prsl-k20"].word == "higher"
    assert "exactly zero" in verdict(found).headline.split(". No change")[0]


def test_the_norm_says_of_how_many_images_it_is(half_masked: Path) -> None:
    found = look(half_masked)
    health = next(row for row in found.scepticism.masking.gradients if row.arm == "prsl-k6")
    assert (health.norm_images, health.norm_of) == (36, 96)
    assert health.norm_over_baseline is not None
    assert health.norm_over_baseline.low > 100, "what does not vanish is large"
    norms = flag(found, "gradient norms")
    assert (norms.state, norms.arms) == ("warn", ("prsl-k6",)), "and a large norm acquits nobody"
    assert "36 of 96" in norms.reason
    table = sections(found)["gradients"].tables[0]
    place = {name: column for column, name in enumerate(table.columns)}
    assert [row[place["With a norm"]] for row in table.rows] == [96, 96, 36]


def test_an_arm_whose_gradients_are_all_zero_has_no_norm_and_is_warned_of(run: Path) -> None:
    reattack(run, ("prsl-k6",), lambda rows: rows.assign(gradient_norm=rows["gradient_norm"] * 0))
    found = look(run)
    assert next(row for row in found.scepticism.masking.gradients if row.arm == "prsl-k6").norm is None
    assert (flag(found, "gradient norms").state, flag(found, "gradient norms").arms) == ("warn", ("prsl-k6",))
    assert "PRSL, k\u00a0=\u00a06 has no norm" in sections(found)["gradients"].answer


# ---- controls count against those who fail them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("A step of 0 changes nothing", lambda rows: rows.assign(
            text=rows["text"].where(rows["attack"] != "zero-step", "something else"))),
        ("A step of 0 changes nothing", lambda rows: rows.assign(
            linf=rows["linf"].where(rows["attack"] != "zero-step", 1 / 255))),
        ("No image leaves the budget", lambda rows: rows.assign(
            linf=rows["linf"].where((rows["attack"] != "bim") | (rows["round"] != 20), 9 / 255))),
        ("Input gradients are healthy", lambda rows: rows.assign(
            nonfinite_gradient_share=rows["nonfinite_gradient_share"] + 0.01)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("arm", ["prsl-k6", "ce"])
def test_a_failed_control_counts_against_its_own_arms(
    run: Path, name: str, damage: Callable[[pd.DataFrame], pd.DataFrame], arm: str
) -> None:
    reattack(run, (arm,), damage)
    found = look(run)
    (check,) = [check for check in found.checks if check.passed is False]
    assert (check.name, check.failing) == (name, (arm,))
    assert flag(found, f"control: {name}").arms == (arm,)
    concerned = {"prsl-k20", "prsl-k6"} if arm == "ce" else {"prsl-k6"}
    trusted = write_evidence(found)["trusted"]
    for other, claim in arm_verdicts(found).items():
        assert any(f"“{name}” failed" in reason for reason in claim.reasons) == (other in concerned)
        assert trusted[other] == (other not in concerned)


def test_noise_that_beats_the_attack_on_one_arm_is_no_matter_to_another(run: Path) -> None:
    rescore(run, "jpeg", ("prsl-k6",), lambda values: values * 0 + 0.5)
    found = look(run)
    assert [check.failing for check in found.checks if check.passed is False] == [("prsl-k6",)]
    assert arm_verdicts(found)["prsl-k20"].word == "more robust"
    assert write_evidence(found)["trusted"] == {"prsl-k20": True, "prsl-k6": False}


# ---- what is counted as the paper's effect ---------------------------------------------------------------------------


def papers(found: Findings) -> str:
    return next(note for note in verdict(found).notes if note.startswith("The paper reports"))


def relabel(run: Path, arm: str, **fields: Any) -> None:
    for path in run.glob(f"captions/finetune/{arm}/*/arm.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_masked_arm_does_not_show_the_papers_effect(half_masked: Path, tmp_path: Path) -> None:
    shutil.copytree(half_masked, tmp_path / "run")
    relabel(tmp_path / "run", "prsl-k20", loss="drsl")
    told = papers(look(tmp_path / "run"))
    assert "this run does not show the paper's effect" in told
    assert "not counted, since gradients may be masked: PRSL, k\u00a0=\u00a06" in told
    assert told.endswith("Other losses: DRSL (more robust).")
    assert "Of one arm of PRSL, none is higher" in told


def test_a_robust_arm_of_prsl_shows_it(run: Path) -> None:
    assert "does not" not in papers(look(run))
    assert "Of 2 arms of PRSL, 1 is higher" in papers(look(run))


def test_an_effect_of_these_seeds_alone_does_not_show_it(run: Path) -> None:
    def edit(rows: pd.DataFrame) -> pd.DataFrame:
        lucky = (rows["arm"] == "prsl-k20") & (rows["seed"] > 0) & (rows["attack"] != "none")
        keys = ["seed", "attack", "round", "id", "reference", "metric"]
        base = rows[rows["arm"] == "ce"].set_index(keys)["value"]
        same = base.reindex(pd.MultiIndex.from_frame(rows.loc[lucky, keys])).to_numpy()
        rows.loc[lucky, "value"] = pd.Series(same, index=rows.index[lucky]).fillna(rows.loc[lucky, "value"]) + 0.02
        return rows

    change(run / SCORES, edit)
    found = look(run)
    effect = next(effect for effect in found.effects if effect.arm == "prsl-k20")
    assert effect.detected
    assert effect.holds_across_seeds is False
    assert "not shown beyond these seeds: PRSL, k\u00a0=\u00a020: this run does not show" in papers(found)


def test_one_seed_does_not_yet_show_it(run: Path) -> None:
    found = look(run, lambda recipe: recipe.update(seeds=[0]))
    assert "fewer than 3 training seeds that does not yet show the paper's effect" in papers(found)


# ---- sentences that must be true -------------------------------------------------------------------------------------


def test_an_identical_copy_is_told_by_the_rule_of_three(run: Path) -> None:
    def edit(rows: pd.DataFrame) -> pd.DataFrame:
        copies = rows[rows["arm"] == "ce"].assign(arm="prsl-k6")
        return pd.concat([rows[rows["arm"] != "prsl-k6"], copies])

    change(run / SCORES, edit)
    sentence = arm_verdicts(look(run))["prsl-k6"].sentence
    assert "no image was scored differently, and with 32 images a change on 9.4\u2009% of all images is" in sentence
    assert "0.000 would go unseen" not in sentence


def set_objective(run: Path, attack: str, objective: str) -> None:
    reattack(
        run, ARMS, lambda rows: rows.assign(objective=rows["objective"].where(rows["attack"] != attack, objective))
    )


def threat(run: Path) -> str:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    text = " ".join(Page(build_report(run, recipe=recipe).read_text(encoding="utf-8")).text.split())
    return text[text.index("Threat model Images") : text.index("Arms treated alike All arms")]


def test_the_threat_model_tells_the_attacks_apart(run: Path) -> None:
    relabel(run, "prsl-k6", loss="drsl")
    set_objective(run, "fgsm", "target")
    set_objective(run, "pgd", "ce+bd")
    told = threat(run)
    assert "the main attack is untargeted: make the model say anything but the reference" in told
    assert "of the ensemble, fgsm is targeted" in told
    assert "main attack: cross entropy of the reference" in told
    assert "minus the cross entropy of another image's text (fgsm)" in told
    assert "cross entropy plus the arm's own weighted penalty (pgd)" in told
    assert (
        "but pgd of the ensemble does; on Cross entropy and DRSL, whose loss is not PRSL, that is cross entropy" in told
    )
    assert "of the test split" in told


def test_only_the_test_split_is_held_out(run: Path) -> None:
    question = "Were the arms treated alike?"
    told = next(item for item in evidence(look(run)) if item.question == question)
    assert "The test split was attacked, and none of this has seen it" in told.answer
    found = look(run, lambda recipe: recipe["tasks"]["captions"]["data"].update(attacked="select"))
    told = next(item for item in evidence(found) if item.question == question)
    assert told.state == "part"
    assert "The select split was attacked" in told.answer
    assert "none of this has seen" not in told.answer
    assert flag(found, "images that nothing was chosen on").state == "warn"


def test_a_probe_that_beats_the_ensemble_is_told(run: Path) -> None:
    def within(rows: pd.DataFrame) -> pd.DataFrame:
        probe = rows["attack"] == "pgd-l2"
        return rows.assign(norm=rows["norm"].where(~probe, "linf"), eps=rows["eps"].where(~probe, EPS),
                           linf=rows["linf"].where(~probe, EPS))  # fmt: skip

    assert flag(look(run), "probes within the budget").state == "absent", "an L2 budget is another"
    reattack(run, ARMS, within)
    assert flag(look(run), "probes within the budget").state == "ok"
    rescore(run, "pgd-l2", ("prsl-k20",), lambda values: values * 0 + 0.46)
    found = look(run)
    (probe,) = found.scepticism.probes
    tables = found.tables
    values, ids = tables.aligned([("pgd-l2", 20, None), ("worst", 40, None)])
    assert probe.images == len(ids) == 16
    for column, arm in enumerate(tables.arms):
        wanted = (values[0] - values[1])[:, :, column].mean()
        assert probe.differences[arm].estimate == pytest.approx(wanted)
    assert probe.lower == ("prsl-k20",)
    assert (flag(found, "probes within the budget").state, flag(found, "probes within the budget").arms) == (
        "warn", ("prsl-k20",)
    )  # fmt: skip
    assert "Beside the ensemble, pgd-l2, within the same budget, goes below its worst case" in (
        sections(found)["ensemble"].answer
    )
    assert any("pgd-l2, which is not of the ensemble" in reason for reason in arm_verdicts(found)["prsl-k20"].reasons)


@pytest.mark.parametrize(("images", "state"), [(8, "absent"), (10, "ok")])
def test_too_few_images_exclude_no_masking(tmp_path: Path, images: int, state: str) -> None:
    """Half of the images are transferred: of four signs no p below 0.05 can come, of five 0.03."""
    make_run(tmp_path, images=images, arms=("ce", "prsl-k20"), tasks=("captions",), keep=0, pixels=8, full=True)
    found = look(tmp_path)
    for name in ("transfer against the white box", "query against the white box"):
        assert flag(found, name).state == state
    answer = next(item for item in evidence(found) if "masked" in item.question)
    few = "too few images (4; p < 0.05 takes 5 or more)"
    assert (few in answer.answer) == (state == "absent")
    assert (few in sections(found)["transfer"].answer) == (state == "absent")
    assert (f"{few} to exclude masked gradients" in arm_verdicts(found)["prsl-k20"].reasons) == (state == "absent")


def test_too_few_images_for_any_effect_are_a_limit(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, images=5, arms=("ce", "prsl-k20"), tasks=("captions",), keep=0, pixels=8)
    loaded = load_run(tmp_path, recipe)
    assert any("5 images are too few for any change to be detected" in limit
               for limit in limits(loaded, [analyse(loaded.tasks[0])]))  # fmt: skip


def test_links_lead_to_the_evidence_itself(run: Path) -> None:
    anchors = {item.question: item.anchor for item in evidence(look(run))}
    assert anchors["Had the attack converged?"] == "convergence"
    assert anchors["Could masked gradients pass for an effect?"] == "transfer"


# ---- the grid --------------------------------------------------------------------------------------------------------

GRID = {"space": ["prob", "log_prob"], "k": [6, 20], "b": [0.1, 1.0], "arms": [], "rounds": [20], "seed": 0,
        "clean_tolerance": 0.02}  # fmt: skip


def plant_grid(run: Path) -> dict[str, Any]:
    """A grid of eight arms, of which the run's prsl-k20 stands for the one that was taken in the space "prob"."""
    arms = {"ce": {"family": "other losses", "clean": 0.96, "attacked": 0.55}}
    for space, short in (("prob", "prob"), ("log_prob", "logprob")):
        for k in (6, 20):
            for b in (0.1, 1.0):
                arms[f"prsl-{short}-k{k}-b{b:g}"] = {"family": f"PRSL, {space}", "clean": 0.95, "attacked": 0.5 + b / 9}
    arms["prsl-k20"] = {"family": "PRSL, prob", "clean": 0.955, "attacked": 0.7}
    choice = {"score": "bertscore_f1", "clean_tolerance": 0.02, "arms": arms,
              "chosen": {"PRSL, prob": "prsl-k20", "PRSL, log_prob": None}}  # fmt: skip
    (run / "captions/choice.json").write_text(json.dumps(choice))
    recipe: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    return {**recipe, "grid": GRID}


def test_the_grid_is_shown_with_every_arm(run: Path) -> None:
    recipe = plant_grid(run)
    source = build_report(run, recipe=recipe).read_text(encoding="utf-8")
    assert 'id="captions-grid"' in source
    text = " ".join(Page(source).text.split())
    assert "10 arms were looked at on the selection split; taken: prsl-k20" in text
    assert "were named by the grid on the selection split" in text
    table = pd.read_csv(run / "tables/captions-grid.csv").set_index("Arm")
    assert len(table) == 10
    row = table.loc["prsl-logprob-k6-b0.1"]
    assert [row["k"], row["b"], row["Space"], row["Taken"]] == [6, 0.1, "log_prob", "no"]
    assert row["Attacked"] == pytest.approx(0.5 + 0.1 / 9)
    assert table.loc["prsl-k20", "Taken"] == "yes"
    assert (run / "tables/captions-grid.tex").is_file()
    assert {path.suffix for path in run.glob("figures/captions-grid.*")} == {".png", ".svg"}
    drawn = (run / "figures/captions-grid.svg").read_text(encoding="utf-8")
    assert "k = 20" in drawn
    assert "mathdefault" not in drawn
    assert "Cross entropy" not in drawn, "its lines are not of the run's arms, so neither is its legend"


def test_a_run_without_a_grid_does_not_speak_of_one(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    source = build_report(run, recipe=recipe).read_text(encoding="utf-8")
    assert "captions-grid" not in source
    assert "by the grid" not in source


@pytest.mark.parametrize("content", ['{"chosen": 3}', '{"score": "s", "clean_tolerance": 0, "chosen": {}, "arms": {}}'])
def test_a_damaged_record_of_the_grid_is_named(run: Path, content: str) -> None:
    recipe = plant_grid(run)
    (run / "captions/choice.json").write_text(content)
    with pytest.raises(UserError, match=r"choice\.json"):
        build_report(run, recipe=recipe)
