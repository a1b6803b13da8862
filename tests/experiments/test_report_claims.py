"""What is claimed of arms whose truth is planted, and what each piece of evidence takes away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from evidence_rows import SCORE
from report_pages import ARMS, analyse_saved, findings_of
from synthetic_run import make_run

from prsl_kernels.experiments.report.analysis import Findings, analyse
from prsl_kernels.experiments.report.claims import ArmVerdict, arm_verdicts
from prsl_kernels.experiments.report.evidence import write_evidence
from prsl_kernels.experiments.report.tables import load_run
from prsl_kernels.experiments.report.verdict import evidence, headline_lines, missing_evidence, verdict


@pytest.fixture(scope="module")
def findings(full_run: Path) -> Findings:
    return analyse_saved(full_run)


@pytest.fixture(scope="module")
def told(findings: Findings) -> dict[str, Any]:
    text = json.dumps(write_evidence(findings), allow_nan=False)
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@pytest.fixture(scope="module")
def claims(findings: Findings) -> dict[str, ArmVerdict]:
    return arm_verdicts(findings)


# ---- what may be claimed ---------------------------------------------------------------------------------------------


def test_a_truly_robust_arm_is_called_so(findings: Findings, claims: dict[str, ArmVerdict]) -> None:
    assert claims["prsl-k20"].word == "more robust"
    assert claims["prsl-k20"].reasons == ()
    assert not findings.scepticism.masking.suspected["prsl-k20"]
    assert "More robust than cross entropy by all the evidence asked for: PRSL, k\u00a0=\u00a020." in (
        verdict(findings).headline
    )


def test_a_masked_arm_is_caught(findings: Findings, claims: dict[str, ArmVerdict]) -> None:
    assert claims["prsl-k6"].word == "masking suspected"
    suspected = findings.scepticism.masking.suspected["prsl-k6"]
    assert {(test.kind, test.source) for test in suspected} == {
        ("query", "square"), *(("transfer", arm) for arm in ARMS if arm != "prsl-k6")
    }  # fmt: skip
    assert next(effect for effect in findings.effects if effect.arm == "prsl-k6").detected, "its white box was deceived"
    assert any("masking suspected in prsl-k6" in warning for warning in verdict(findings).warnings)


def test_the_others_are_not_accused(findings: Findings, claims: dict[str, ArmVerdict]) -> None:
    accused = {arm for arm, tests in findings.scepticism.masking.suspected.items() if tests}
    assert accused == {"prsl-k6"}
    assert claims["prsl-k100"].word == "no change detected"
    assert claims["prsl-logprob-k20"].word == "lower"


def test_masking_in_cross_entropy_taints_every_arm(tmp_path: Path) -> None:
    found = findings_of(tmp_path, images=32, seeds=(0, 1, 2), arms=("ce", "prsl-k20"), plant={"ce": "masked"})
    assert found.scepticism.masking.suspected["ce"]
    data = write_evidence(found)
    assert data["trusted"] == {"prsl-k20": False}
    assert arm_verdicts(found)["prsl-k20"].word != "more robust"


def test_trust_follows_from_the_flags(told: dict[str, Any]) -> None:
    assert told["trusted"] == {"prsl-k20": True, "prsl-k6": False, "prsl-k100": True, "prsl-logprob-k20": True}
    states = {flag["name"]: flag["state"] for flag in told["flags"]}
    assert {name for name, state in states.items() if state == "fail"} == {
        "transfer against the white box", "query against the white box"
    }  # fmt: skip
    assert {name for name, state in states.items() if state == "absent"} == {"probes within the budget"}
    assert states["gradient norms"] == states["loss surface"] == "warn", "the masked arm has neither"
    assert next(flag for flag in told["flags"] if flag["name"] == "loss surface")["arms"] == ["prsl-k6"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_fewer_than_three_seeds_never_make_it_more_robust(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    found = findings_of(tmp_path, images=32, seeds=seeds, arms=("ce", "prsl-k20"))
    claim = arm_verdicts(found)["prsl-k20"]
    assert claim.word == "higher"
    assert claim.reasons == ("fewer than 3 training seeds",)
    assert "ore robust than cross entropy" not in verdict(found).headline + "".join(headline_lines_of(found))


def headline_lines_of(found: Findings) -> list[str]:
    run = type("Run", (), {"tasks": (found.tables,)})()
    return headline_lines(run, [found])


def without(attack: str) -> Callable[[Path], None]:
    """Takes the rows of an attack (by the beginning of its name) out of a run."""

    def remove(folder: Path) -> None:
        for path in folder.rglob("*.parquet"):
            rows = pd.read_parquet(path)
            if "attack" in rows:
                rows[~rows["attack"].astype(str).str.startswith(attack)].to_parquet(path)
        for path in folder.rglob("transfer/*/*/outputs.parquet") if attack == "transfer" else ():
            path.unlink()

    return remove


def set_low(attack: str, arm: str = "prsl-k20") -> Callable[[Path], None]:
    """Sets the arm's scores under an attack to about those of unrelated texts."""

    def edit(folder: Path) -> None:
        path = folder / "captions/evaluate/scores.parquet"
        rows = pd.read_parquet(path)
        under = rows["attack"].str.startswith(attack) & (rows["metric"] == SCORE) & (rows["reference"] == "primary")
        rows.loc[under & (rows["arm"] == arm), "value"] = 0.5
        rows.to_parquet(path)

    return edit


@pytest.mark.parametrize(
    ("damage", "word", "reason"),
    [
        (without("transfer"), "higher", "no transferred images"),
        (without("square"), "higher", "no query attack"),
        (set_low("square"), "masking suspected", "not confirmed by square"),
        (set_low("transfer"), "masking suspected", "masked gradients are suspected"),
        (set_low("unbounded"), "higher", "an unbounded attack does not bring"),
        (set_low("jpeg"), "higher", "the control “The attack beats JPEG” failed"),
    ],
)
def test_each_piece_of_evidence_can_take_the_claim_away(
    tmp_path: Path, damage: Callable[[Path], None], word: str, reason: str
) -> None:
    recipe = make_run(tmp_path, images=32, seeds=(0, 1, 2), arms=("ce", "prsl-k20"), tasks=("captions",), keep=0,
                      pixels=8, full=True)  # fmt: skip
    damage(tmp_path)
    claim = arm_verdicts(analyse(load_run(tmp_path, recipe).tasks[0]))["prsl-k20"]
    assert claim.word == word
    assert any(reason in told for told in claim.reasons), claim.reasons


def test_an_attack_that_still_gains_takes_the_claim_away(tmp_path: Path) -> None:
    found = findings_of(tmp_path, images=32, seeds=(0, 1, 2), arms=("ce", "prsl-k20"), full=False)
    assert found.scepticism.convergence.states == {"ce": "moving", "prsl-k20": "moving"}
    reasons = arm_verdicts(found)["prsl-k20"].reasons
    assert any("not been shown to have converged" in reason for reason in reasons)
    assert any("no worst case over several attacks" in reason for reason in reasons)


def test_the_demos_rows_are_enough(tmp_path: Path) -> None:
    """Only the primary attack and controls: the worst case is that attack, and what is absent is said to be."""
    found = findings_of(tmp_path, images=16, arms=("ce", "prsl-k20"), full=False)
    asked = found.scepticism
    assert asked.ensemble == ("bim",)
    assert (asked.sweep, asked.floors, asked.masking.transfer, asked.masking.queries) == (None, (), None, ())
    worst, bim = (next(row for row in asked.attacks if row.attack == name) for name in ("worst", "bim"))
    assert worst.levels == bim.levels
    data = json.loads(json.dumps(write_evidence(found), allow_nan=False))
    absent = {flag["name"] for flag in data["flags"] if flag["state"] == "absent"}
    assert {"restarts", "loss surface", "score falls with the budget", "query against the white box"} <= absent
    assert "a query attack" in missing_evidence([found])
    assert [item.state for item in evidence(found)].count("absent") == 1


def test_nothing_is_missing_from_a_full_run(findings: Findings) -> None:
    assert missing_evidence([findings]) == ""
    assert all(item.state == "here" for item in evidence(findings))


def test_arms_of_a_task_are_no_gap_in_another(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, images=12, arms=("ce", "prsl-k20"), tasks=("captions",), keep=0, pixels=8)
    recipe["arms"].append({**recipe["arms"][1], "name": "prsl-elsewhere"})
    recipe["tasks"]["captions"]["arms"] = ["ce", "prsl-k20"]
    assert not load_run(tmp_path, recipe).tasks[0].gaps
    recipe["tasks"]["captions"]["arms"] = None
    assert any("prsl-elsewhere" in gap for gap in load_run(tmp_path, recipe).tasks[0].gaps)


def test_labels_differ_where_arms_differ(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, images=12, arms=ARMS, tasks=("captions",), keep=0, pixels=8)
    changes: dict[str, dict[str, Any]] = {
        "prsl-k6": {"k": 20, "b": 1.0},
        "prsl-k100": {"loss": "ce", "b": 0.0, "label_smoothing": 0.1},
        "prsl-logprob-k20": {"loss": "released", "space": "prob"},
    }
    for arm, fields in changes.items():
        path = tmp_path / f"captions/finetune/{arm}/seed-0/arm.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    tables = load_run(tmp_path, recipe).tasks[0]
    assert tables.baseline == "ce"
    assert {arm: tables.label(arm).replace("\u00a0", " ") for arm in tables.arms} == {
        "ce": "Cross entropy",
        "prsl-k20": "PRSL, k = 20, b = 0.58",
        "prsl-k6": "PRSL, k = 20, b = 1",
        "prsl-k100": "Label smoothing 0.1",
        "prsl-logprob-k20": "Released form, k = 20",
    }
    assert tables.runs["prsl-k100"][0].k_over_v == "–"
