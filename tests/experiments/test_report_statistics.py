"""Intervals and tests of the report, held to SciPy, to enumeration, and to what they promise: coverage and size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from prsl_kernels.experiments.report.analysis import effects
from prsl_kernels.experiments.report.masking import Comparison, masking_tests
from prsl_kernels.experiments.report.statistics import (
    Interval,
    holm,
    max_statistic_test,
    paired_bootstrap,
    seeds_interval,
    seeds_test,
    sign_flip_test,
    signed,
    wilson,
)


def test_one_seed_is_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=60) - 0.7
    found = paired_bootstrap(values[None, :, None], resamples=20_000)[0]
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.estimate == pytest.approx(values.mean(), abs=1e-12)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)


def test_columns_are_independent_of_each_other() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20, 4))
    together = paired_bootstrap(values)
    for column in range(4):
        alone = paired_bootstrap(values[:, :, column : column + 1])[0]
        assert (alone.low, alone.high) == pytest.approx((together[column].low, together[column].high), abs=1e-12)


def test_equal_arms_have_an_interval_of_zero_width() -> None:
    assert paired_bootstrap(np.zeros((1, 30, 1)))[0] == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [np.zeros((3, 4)), np.zeros((1, 0, 2)), np.full((1, 3, 1), np.nan)])
def test_bootstrap_refuses_what_it_cannot_average(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="differences must be"):
        paired_bootstrap(bad)


def test_coverage_with_one_seed() -> None:
    """600 samples of 50 skewed differences with mean 0: 95 % intervals cover it in about 95 % of them."""
    generator = np.random.default_rng(11)
    samples = generator.exponential(size=(1, 50, 600)) - 1
    found = paired_bootstrap(samples, resamples=2000)
    assert 0.91 < np.mean([not interval.excludes_zero for interval in found]) < 0.97


def test_coverage_where_all_seeds_share_the_images() -> None:
    """An image contributes alike under all seeds; an interval that takes seeds x images as independent loses that."""
    generator = np.random.default_rng(12)
    runs, seeds, images = 600, 6, 40
    samples = (
        generator.normal(size=(1, images, runs))
        + 0.05 * generator.normal(size=(seeds, 1, runs))
        + 0.3 * generator.normal(size=(seeds, images, runs))
    )
    found = paired_bootstrap(samples, resamples=2000)
    assert 0.91 < np.mean([not interval.excludes_zero for interval in found]) < 0.98


def test_sign_flips_are_enumerated_where_they_are_few() -> None:
    values = np.array([0.3, -0.1, 0.4, 0.25, -0.05, 0.6, 0.2])
    means = [abs(np.mean(values * flips)) for flips in itertools.product([1, -1], repeat=len(values))]
    exact = np.mean(np.array(means) >= abs(values.mean()) - 1e-12)
    assert sign_flip_test(values) == pytest.approx(exact, abs=1e-12)
    assert sign_flip_test(np.concatenate([values, np.zeros(40)])) == pytest.approx(exact, abs=1e-12)


def test_sign_flip_p_is_uniform_without_an_effect() -> None:
    generator = np.random.default_rng(5)
    p = [sign_flip_test(generator.normal(size=25), resamples=500, seed=i) for i in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) < 0.09


def test_sign_flip_finds_an_effect_and_is_never_zero() -> None:
    values = np.random.default_rng(6).normal(1.0, 0.5, size=100)
    assert 0 < sign_flip_test(values) <= 2e-4
    assert sign_flip_test(values) == sign_flip_test(-values)
    assert sign_flip_test(np.zeros(10)) == 1.0
    assert sign_flip_test(np.array([0.7])) == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize("count", [1, 7, 128])
def test_wilson_is_that_of_scipy(count: int) -> None:
    successes = sorted({0, 1, count // 2, count})
    low, high = wilson(np.array(successes) / count, count)
    for place, number in enumerate(successes):
        expected = stats.binomtest(number, count).proportion_ci(method="wilson")
        assert (low[place], high[place]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_max_statistic_of_one_column_is_the_one_sided_sign_flip_test() -> None:
    values = np.array([0.3, -0.1, 0.4, 0.25, -0.05, 0.6, 0.2, -0.3, 0.1, 0.2])
    sums = [np.sum(values * flips) for flips in itertools.product([1, -1], repeat=len(values))]
    for sign in (1, -1):
        exact = np.mean(np.array(sums) <= sign * values.sum() + 1e-12)
        assert max_statistic_test(sign * values[:, None], resamples=50_000)[0] == pytest.approx(exact, abs=0.01)


def test_max_statistic_counts_every_column_and_leaves_gaps_out() -> None:
    values = np.random.default_rng(1).normal(size=(40, 30))
    values[:, 4] -= 1.0
    alone = max_statistic_test(values[:, 4:5])[0]
    together = max_statistic_test(values)
    assert alone <= together[4] < 0.01, "thirty columns cost something, and what is there is still found"
    assert together[4] == min(together)
    assert max_statistic_test(-values)[4] > 0.9, "one-sided: a score above the white box's accuses nobody"
    padded = np.concatenate([values[:, 4:5], np.full((25, 1), np.nan)])
    assert max_statistic_test(padded)[0] == pytest.approx(alone, abs=0.005)
    assert max_statistic_test(np.zeros((5, 2))) == [1.0, 1.0]


def test_seeds_interval_and_test_are_those_of_scipy() -> None:
    means = np.array([0.11, 0.14, 0.08, 0.12])
    found = seeds_interval(means)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, means.mean(), stats.sem(means)))
    assert seeds_test(means) == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert seeds_interval(means[:1]) is None
    assert (seeds_test(means[:1]), seeds_test(np.zeros(3)), seeds_test(np.full(3, 0.5))) == (1.0, 1.0, 0.0)


def test_what_three_seeds_can_and_cannot_tell() -> None:
    """Where training luck is all that varies, three seeds' bootstrap covers far less than it says; t does not."""
    samples = np.random.default_rng(13).normal(size=(3, 1, 600)) + np.zeros((3, 20, 600))
    bootstrap = np.mean([not interval.excludes_zero for interval in paired_bootstrap(samples, resamples=2000)])
    student = np.mean([
        interval is not None and not interval.excludes_zero
        for interval in (seeds_interval(samples[:, 0, column]) for column in range(600))
    ])  # fmt: skip
    assert 0.65 < bootstrap < 0.82
    assert 0.93 < student < 0.97


# ---- rates of false alarms over whole runs: each simulated run is judged by the rules of the report ------------------

_RUNS = 200


def _scores(generator: np.random.Generator, seeds: int, arms: int, luck: float) -> np.ndarray:
    """(S, n, 1 + arms) scores without any effect: hard images, noise, and the luck of each fine-tuning."""
    images = 50
    return (
        generator.normal(0, 0.2, (1, images, 1))
        + generator.normal(0, 0.1, (seeds, images, 1 + arms))
        + luck * generator.normal(size=(seeds, 1, 1 + arms))
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_run_without_an_effect_rarely_detects_one(seeds: int) -> None:
    """At most 5 % of runs with four arms may detect a change in any; 200 runs at 5 % give 10, and 18 with p < 0.01."""
    generator = np.random.default_rng(20 + seeds)
    alarms = 0
    for _ in range(_RUNS):
        clean, attacked = (_scores(generator, seeds, 4, 0.0) for _ in range(2))
        found = effects(("a", "b", "c", "d"), clean, attacked, resamples=1000)
        alarms += any(effect.detected for effect in found)
    assert alarms <= 18


def test_the_luck_of_training_rarely_passes_for_the_loss() -> None:
    """Three seeds whose fine-tunings differ by luck alone: what differs between checkpoints does not hold beyond."""
    generator = np.random.default_rng(30)
    detected = beyond = 0
    for _ in range(_RUNS):
        clean, attacked = (_scores(generator, 3, 4, 0.1) for _ in range(2))
        found = effects(("a", "b", "c", "d"), clean, attacked, resamples=1000)
        detected += any(effect.detected for effect in found)
        beyond += any(effect.detected and effect.holds_across_seeds for effect in found)
    assert detected > _RUNS / 4, "checkpoints do differ, and images show it: that is why the seeds are asked"
    assert beyond <= 18


def _comparisons(generator: np.random.Generator, seeds: int, shift: float) -> list[Comparison]:
    """Four arms, asked about each other's images and by a query attack; arm 0 scores `shift` below its white box."""
    images, found = 40, []
    ids = tuple(map(str, range(images)))
    for arm in range(4):
        white_box = generator.normal(0.5, 0.2, (1, images)) + generator.normal(0, 0.05, (seeds, images))
        for source in range(5):
            if source != arm:
                asked = white_box + generator.normal(0, 0.1, (seeds, images)) + (shift if arm == 0 else 0.0)
                kind = "query" if source == 4 else "transfer"
                found.append(Comparison(kind, str(arm), str(source), ids, asked, white_box, None))
    return found


@pytest.mark.parametrize("seeds", [1, 3])
def test_masking_is_rarely_suspected_where_there_is_none(seeds: int) -> None:
    """Sixteen comparisons a run, all exactly at the white box: at most 5 % of runs may accuse anyone."""
    generator = np.random.default_rng(40 + seeds)
    accused = [
        any(test.suspicious for test in masking_tests(_comparisons(generator, seeds, 0.0), resamples=1000))
        for _ in range(_RUNS)
    ]
    assert sum(accused) <= 18


def test_masking_is_nearly_always_suspected_where_it_is() -> None:
    generator = np.random.default_rng(50)
    for _ in range(50):
        tests = masking_tests(_comparisons(generator, 3, -0.1), resamples=1000)
        accused = {test.arm for test in tests if test.suspicious}
        assert "0" in accused
        assert len([test for test in tests if test.suspicious and test.arm == "0"]) >= 3


def test_numbers_for_people() -> None:
    assert signed(-0.0312) == "−0.031"
    assert signed(-0.0001) == "0.000"
    assert Interval(0.0312, 0.0119, 0.0493).text == "+0.031 [+0.012,\u00a0+0.049]"
    assert Interval(0.008, 0.0002, 0.016).range == "[+0.0002,\u00a0+0.0160]", "an end above 0 must not read as 0"
    assert not Interval(0.1, 0.0, 0.2).excludes_zero
