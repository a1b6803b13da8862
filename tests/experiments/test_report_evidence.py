"""Every number of the evidence against plain loops over the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_rows import SCORE, Checker, Rows, pairs
from report_pages import ARMS, analyse_saved
from scipy import stats

from prsl_kernels.experiments.report.analysis import Findings
from prsl_kernels.experiments.report.evidence import write_evidence


@pytest.fixture(scope="module")
def findings(full_run: Path) -> Findings:
    return analyse_saved(full_run)


@pytest.fixture(scope="module")
def told(findings: Findings) -> dict[str, Any]:
    text = json.dumps(write_evidence(findings), allow_nan=False)
    loaded: dict[str, Any] = json.loads(text)
    return loaded


# ---- every number, from the rows -------------------------------------------------------------------------------------


def test_every_interval_follows_from_the_rows(full_run: Path, told: dict[str, Any]) -> None:
    rows, check = Rows(full_run, ARMS), Checker()
    compare_endpoint(rows, check, told)
    compare_attacks(rows, check, told)
    compare_convergence(rows, check, told)
    compare_masking(rows, check, told["masking"])
    compare_surfaces(rows, check, told["masking"]["surfaces"])
    compare_language(rows, check, told)
    left = [path for path in check.left(told) if not path.startswith(("/curves/", "/shares/", "/flags/"))]
    assert left == [], "curves' bands are checked below, shares are Wilson's, flags repeat what is above"


def compare_endpoint(rows: Rows, check: Checker, told: dict[str, Any]) -> None:
    assert told["endpoint"]["attack"] == "worst"
    ids = rows.names(("bim", 0), ("worst", 40))
    assert told["images"] == len(ids) == 48
    ce_clean, ce = rows.of("bim", 0, "ce", ids), rows.of("worst", 40, "ce", ids)
    for arm in ARMS:
        clean, attacked = rows.of("bim", 0, arm, ids), rows.of("worst", 40, arm, ids)
        lowest = np.minimum.reduce([rows.of("bim", 40, arm, ids), rows.of("fgsm", 1, arm, ids),
                                    rows.of("pgd", 40, arm, ids)])  # fmt: skip
        assert np.array_equal(attacked, lowest), "the worst case is the lowest of the candidates"
        check.same(told["levels"][arm]["clean"], clean)
        check.same(told["levels"][arm]["attacked"], attacked)
        check.same(told["attack_effects"][arm], attacked - clean)
        check.same(told["last_change"][arm], rows.of("bim", 40, arm, ids) - rows.of("bim", 20, arm, ids))
        for place, seed in enumerate((0, 1, 2)):
            row = next(row for row in told["by_seed"] if (row["arm"], row["seed"]) == (arm, seed))
            assert (row["clean"], row["attacked"]) == pytest.approx((clean[place].mean(), attacked[place].mean()))
            assert row["effect"] is None if arm == "ce" else row["effect"] == pytest.approx(
                float(np.mean(attacked[place] - ce[place]))
            )  # fmt: skip
        if arm == "ce":
            continue
        effect = told["effects"][arm]
        check.same(effect["attacked"], attacked - ce)
        check.same(effect["clean"], clean - ce_clean)
        check.same(effect["drop"], (attacked - ce) - (clean - ce_clean))
        means = [float(np.mean(row)) for row in attacked - ce]
        assert effect["by_seed"] == pytest.approx(means)
        between = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
        found = effect["across_seeds"]
        assert (found["low"], found["high"]) == pytest.approx(between)
        check.seen.add(id(found))
        by_image = (attacked - ce).mean(axis=0)
        flips = np.random.default_rng(99).choice([-1.0, 1.0], (20_000, len(ids)))
        assert effect["p"] == pytest.approx(np.mean(abs(flips @ by_image) >= abs(by_image.sum()) - 1e-9), abs=0.02)
        assert effect["differing"] == sum(any(column) for column in (attacked - ce != 0).T)
        for metric, by_arm in told["exploratory"].items():
            check.same(by_arm[arm], rows.of("worst", 40, arm, ids, metric=metric) - rows.of(
                "worst", 40, "ce", ids, metric=metric))  # fmt: skip
        check.same(told["secondary"][arm], rows.of("worst", 40, arm, ids, "secondary") - rows.of(
            "worst", 40, "ce", ids, "secondary"))  # fmt: skip
    p_t = [stats.ttest_1samp(told["effects"][arm]["by_seed"], 0).pvalue for arm in ARMS[1:]]
    for rank, place in enumerate(np.argsort(p_t)):
        largest = max(p_t[other] * (4 - step) for step, other in enumerate(np.argsort(p_t)[: rank + 1]))
        assert told["effects"][ARMS[1 + place]]["p_seeds"] == pytest.approx(min(1.0, largest))


def compare_attacks(rows: Rows, check: Checker, told: dict[str, Any]) -> None:
    assert told["ensemble"] == ["bim", "fgsm", "pgd"]
    names = {row["attack"] for row in told["attacks"]}
    assert names == {"worst", "bim", "fgsm", "pgd", "square", "eps-1", "eps-4", "eps-32", "unbounded", "pgd-l2",
                     "blank", "gaussian", "jpeg", "random-sign", "zero-step"}  # fmt: skip
    for row in told["attacks"]:
        cell = (row["attack"], row["round"])
        ids = rows.names(cell)
        assert row["images"] == len(ids)

        def level(arm: str, cell: tuple[str, int] = cell, ids: list[str] = ids) -> np.ndarray:
            return rows.of(*cell, arm, ids)

        pairs(rows, check, row, level)
        if row["chosen"] is not None:
            picked = rows.worst[rows.worst["attack"] == row["attack"]]["arm"].tolist()
            assert row["chosen"] == {arm: picked.count(arm) for arm in ARMS}
    assert sum(sum(row["chosen"].values()) for row in told["attacks"] if row["chosen"]) == 48 * 3 * len(ARMS)
    beaten = {"The attack beats random signs of the same size": ("random-sign", 20),
              "The attack beats Gaussian noise": ("gaussian", 0), "The attack beats JPEG": ("jpeg", 0),
              "Many rounds beat one": ("fgsm", 1)}  # fmt: skip
    for row in told["checks"]:
        assert row["passed"] is True
        assert bool(row["intervals"]) == (row["name"] in beaten)
        for arm, node in row["intervals"].items():
            ids = rows.names(beaten[row["name"]])
            check.same(node, rows.of("bim", 40, arm, ids) - rows.of(*beaten[row["name"]], arm, ids))
    sweep = told["sweep"]
    cells = [(point["attack"], point["round"]) for point in sweep["points"]]
    assert cells == [("bim", 0), ("eps-1", 20), ("eps-4", 20), ("bim", 40), ("eps-32", 20)]
    assert [point["eps"] * 255 for point in sweep["points"]] == pytest.approx([0, 1, 4, 8, 32])
    ids = rows.names(*cells)
    assert sweep["images"] == len(ids) == 24
    for arm in ARMS:
        for place, cell in enumerate(cells):
            check.same(sweep["levels"][arm][place], rows.of(*cell, arm, ids))
            if arm != "ce":
                check.same(sweep["effects"][arm][place], rows.of(*cell, arm, ids) - rows.of(*cell, "ce", ids))
            if place:
                before = rows.of(*cells[place - 1], arm, ids)
                check.same(sweep["steps"][arm][place - 1], rows.of(*cell, arm, ids) - before)
    (floor,) = told["floors"]
    ids = rows.names(("unbounded", 20))
    unrelated = np.array([rows.values["none", 0, "primary", SCORE, "random-pair", 0, name] for name in ids])
    assert floor["unrelated"] == pytest.approx(unrelated.mean())
    for arm in ARMS:
        check.same(floor["levels"][arm], rows.of("unbounded", 20, arm, ids))
        check.same(floor["above"][arm], rows.of("unbounded", 20, arm, ids) - unrelated)
        assert floor["reached"][arm] is True


def compare_convergence(rows: Rows, check: Checker, told: dict[str, Any]) -> None:
    convergence = told["convergence"]
    ids = rows.names(("bim", 0), ("bim", 40))
    assert convergence["curve"]["rounds"] == [0, 1, 2, 5, 10, 20, 40]
    for place, number in enumerate(convergence["curve"]["rounds"]):
        for arm in ARMS:
            check.same(convergence["curve"]["levels"][arm][place], rows.of("bim", number, arm, ids))
            if arm != "ce":
                check.same(
                    convergence["curve"]["effects"][arm][place],
                    rows.of("bim", number, arm, ids) - rows.of("bim", number, "ce", ids),
                )
    for row in [convergence["doubling"], *convergence["others"], *convergence["restarts"]]:
        ids = rows.names((row["attack"], row["before"]), (row["attack"], row["after"]))

        def change(arm: str, row: dict[str, Any] = row, ids: list[str] = ids) -> np.ndarray:
            return rows.of(row["attack"], row["after"], arm, ids) - rows.of(row["attack"], row["before"], arm, ids)

        pairs(rows, check, row, change, "changes")
    assert [(row["attack"], row["before"], row["after"]) for row in convergence["restarts"]] == [("pgd", 20, 40)]
    assert (convergence["doubling"]["before"], convergence["doubling"]["after"]) == (20, 40)
    assert convergence["others"] == []
    for arm in ARMS:
        whole = (
            rows.of("bim", 40, arm, rows.names(("bim", 0))) - rows.of("bim", 0, arm, rows.names(("bim", 0)))
        ).mean()
        assert convergence["tolerance"][arm] == pytest.approx(0.1 * abs(whole))


def compare_masking(rows: Rows, check: Checker, masking: dict[str, Any]) -> None:
    ids = rows.names(("square", 100))
    white_box = {
        arm: np.minimum.reduce([rows.of(*cell, arm, ids) for cell in (("bim", 40), ("fgsm", 1), ("pgd", 40))])
        for arm in ARMS
    }
    differences = {}
    transfer = masking["transfer"]
    assert masking["white_box"] == ["bim", "fgsm", "pgd"]
    assert transfer["attack"] == "bim"
    pool = {arm: rows.of("bim", 40, arm, ids) for arm in ARMS}
    accused = {arm: list(tests) for arm, tests in masking["suspected"].items()}
    for arm in ARMS:
        check.same(transfer["matrix"][arm][arm], rows.of("bim", 40, arm, ids))
        for source in ARMS:
            if source == arm:
                continue
            asked = rows.of(f"transfer-from-{source}", 40, arm, ids)
            pool[arm] = np.minimum(pool[arm], asked)
            test = transfer["tests"][source][arm]
            check.same(transfer["matrix"][source][arm], asked)
            compare_test(check, test, asked, white_box[arm])
            check.same(test["same_attack"], asked - rows.of("bim", 40, arm, ids))
            differences[source, arm] = (test, (asked - white_box[arm]).mean(axis=0))
    (query,) = masking["queries"]
    assert (query["attack"], query["images"]) == ("square", len(ids))
    pairs(rows, check, query, lambda arm: rows.of("square", 100, arm, ids))
    for arm in ARMS:
        test = query["tests"][arm]
        compare_test(check, test, rows.of("square", 100, arm, ids), white_box[arm])
        assert test["same_attack"] is None
        differences["square", arm] = (test, (rows.of("square", 100, arm, ids) - white_box[arm]).mean(axis=0))
    for arm in ARMS[1:]:
        check.same(transfer["effects"][arm], pool[arm] - pool["ce"])
    assert masking["comparisons"] == len(differences) == 25
    scaled = np.stack([value / np.sqrt((value**2).sum()) for _, value in differences.values()], axis=1)
    flips = np.random.default_rng(99).choice([-1.0, 1.0], (10_000, len(ids)))
    lowest = (flips @ scaled).min(axis=1)
    for place, ((source, arm), (test, _)) in enumerate(differences.items()):
        expected = np.mean(lowest <= scaled[:, place].sum())
        assert test["p"] == pytest.approx(expected, abs=0.02)
        suspicious = test["difference"]["high"] < 0 and test["p"] < 0.05
        assert test["suspicious"] == suspicious == any(row["source"] == source for row in accused[arm])
    for tests in accused.values():
        for row in tests:
            original = (transfer["tests"][row["source"]] if row["kind"] == "transfer" else query["tests"])[row["arm"]]
            assert row == original
            check.seen |= {id(row[name]) for name in ("level", "white_box", "difference", "same_attack")}
    compare_gradients(rows, check, masking["gradients"])


def compare_test(check: Checker, test: dict[str, Any], asked: np.ndarray, white_box: np.ndarray) -> None:
    check.same(test["level"], asked)
    check.same(test["white_box"], white_box)
    check.same(test["difference"], asked - white_box)


def compare_gradients(rows: Rows, check: Checker, nodes: list[dict[str, Any]]) -> None:
    last = rows.outputs[(rows.outputs["attack"] == "bim") & (rows.outputs["round"] == 40)]
    found = {(row.arm, row.seed, row.id): np.log(row.gradient_norm) for row in last.itertuples(index=False)}
    ids = sorted({name for _, _, name in found})
    logs = {arm: np.array([[found[arm, seed, name] for name in ids] for seed in (0, 1, 2)]) for arm in ARMS}
    for node in nodes:
        arm = node["arm"]
        assert node["norm"] == pytest.approx(float(np.exp(logs[arm].mean())))
        assert (node["zero_share"], node["nonfinite_share"]) == pytest.approx((0.004, 0.0))
        if arm == "ce":
            assert node["norm_over_baseline"] is None
        else:
            check.same(node["norm_over_baseline"], logs[arm] - logs["ce"], lambda value: float(np.exp(value)))


def compare_surfaces(rows: Rows, check: Checker, nodes: list[dict[str, Any]]) -> None:
    assert [node["arm"] for node in nodes] == list(ARMS)
    for node in nodes:
        found = {
            (row.seed, row.id, row.a, row.b): row.value
            for row in rows.surface[rows.surface["arm"] == node["arm"]].itertuples(index=False)
        }
        ids = sorted({key[1] for key in found})
        assert node["images"] == 3 * len(ids)

        def at(a: float, b: float, found: dict[Any, float] = found, ids: list[str] = ids) -> np.ndarray:
            return np.array([[found[seed, name, a, b] for name in ids] for seed in (0, 1, 2)])

        check.same(node["along_gradient"], at(1, 0) - at(0, 0))
        check.same(node["along_random"], at(0, 1) - at(0, 0))
        check.same(node["difference"], at(1, 0) - at(0, 1))
        means = [[at(a, b).mean() for a in node["a"]] for b in node["b"]]
        assert np.array(node["values"]) == pytest.approx(np.array(means))
        rough = []
        for seed in (0, 1, 2):
            for name in ids:
                profile = np.array([found[seed, name, a, 0.0] for a in node["a"]])
                residual = profile - np.polyval(np.polyfit(node["a"], profile, 2), node["a"])
                rough.append(np.sqrt(np.mean(residual**2)) / (profile.max() - profile.min()))
        assert node["roughness"] == pytest.approx(np.mean(rough), abs=1e-9)
        assert (node["arm"] == "prsl-k6") == (node["difference"]["low"] <= 0)


def compare_language(rows: Rows, check: Checker, told: dict[str, Any]) -> None:
    cells = {"clean": ("bim", 0), "attacked": ("worst", 40)}
    for node in told["language"]:
        arm, cell = node["arm"], cells[node["setting"]]
        ids = rows.names(cell)
        for name, reference, metric in (("words", "primary", "length"), ("blank", "blank", SCORE)):
            mine, base = (rows.of(*cell, each, ids, reference, metric) for each in (arm, "ce"))
            check.same(node[name], mine)
            if arm == "ce":
                assert node[f"{name}_effect"] is None
            else:
                check.same(node[f"{name}_effect"], mine - base)
        for metric in ("distinct", "distinct_1", "distinct_2", "empty"):
            found = rows.corpus[
                (rows.corpus["arm"] == arm) & (rows.corpus["attack"] == cell[0]) & (rows.corpus["round"] == cell[1])
                & (rows.corpus["metric"] == metric)
            ]["value"]  # fmt: skip
            assert len(found) == 3
            assert node[metric] == pytest.approx(sum(found) / 3)


def test_curves_and_shares_follow_from_the_rows(full_run: Path, told: dict[str, Any]) -> None:
    rows, check = Rows(full_run, ARMS), Checker()
    curve = next(curve for curve in told["curves"] if curve["metric"] == SCORE)
    ids = rows.names(("bim", 0))
    for place, number in enumerate(curve["rounds"]):
        check.same(curve["band"][place], rows.of("bim", number, "ce", ids))
        for arm in ARMS:
            assert curve["values"][arm][place] == pytest.approx(rows.of("bim", number, arm, ids).mean())
    assert [(share["attack"], share["round"]) for share in told["shares"]] == [("bim", 2), ("worst", 40)]
    for share in told["shares"]:
        for arm in ARMS:
            values = rows.of(share["attack"], share["round"], arm, ids)
            for bound, node in zip(share["thresholds"], share["below"][arm], strict=True):
                part = float(np.mean(values < bound))
                assert node["estimate"] == pytest.approx(part)
                z, n = stats.norm.ppf(0.975), len(ids)
                ends = [  # Wilson's ends solve (x - part)**2 = z**2 x (1 - x) / n
                    root.real for root in np.roots([1 + z * z / n, -2 * part - z * z / n, part * part])
                ]  # fmt: skip
                assert (node["low"], node["high"]) == pytest.approx((min(ends), max(ends)), abs=1e-7)
