"""Intervals and tests of the report, held to SciPy, to enumeration, and to what they promise: coverage and size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from prsl_kernels.experiments.report.statistics import Interval, holm, paired_bootstrap, sign_flip_test, signed, wilson


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


def test_numbers_for_people() -> None:
    assert signed(-0.0312) == "−0.031"
    assert signed(-0.0001) == "0.000"
    assert Interval(0.0312, 0.0119, 0.0493).text == "+0.031 [+0.012,\u00a0+0.049]"
    assert Interval(0.008, 0.0002, 0.016).range == "[+0.0002,\u00a0+0.0160]", "an end above 0 must not read as 0"
    assert not Interval(0.1, 0.0, 0.2).excludes_zero
