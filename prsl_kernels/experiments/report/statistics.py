"""Intervals and tests that the report rests on: pure functions of arrays, no input or output.

Everything is about *paired* differences: both arms answered for the same image, so what is resampled is the
difference, and what the image itself contributes drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
ALPHA = 0.05
RESAMPLES = 10_000


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a true minus included; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not text.strip("+-0.") else text.replace("-", "\u2212")


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its interval, in the unit of the data."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the closed interval."""
        return self.low > 0 or self.high < 0

    @property
    def value(self) -> str:
        """ "+0.031": signed, with as many decimals as the interval's width calls for."""
        return signed(self.estimate, self._digits)

    @property
    def range(self) -> str:
        """ "[+0.012, +0.049]"."""
        return f"[{signed(self.low, self._digits)},\u00a0{signed(self.high, self._digits)}]"

    @property
    def text(self) -> str:
        """ "+0.031 [+0.012, +0.049]"."""
        return f"{self.value} {self.range}"

    @property
    def _digits(self) -> int:
        width = self.high - self.low
        digits = min(6, max(3, math.ceil(-math.log10(width)) + 1)) if width > 0 else 3
        while digits < 6 and any(end and not round(end, digits) for end in (self.low, self.high)):
            digits += 1  # an end that is not zero must not look like it
        return digits


@lru_cache(maxsize=8)
def _resampled_weights(size: int, resamples: int, seed: int) -> Floats:
    """How often each of `size` things is drawn, as a share, in each resample: (resamples, size), rows sum to 1."""
    if size == 1:
        return np.ones((resamples, 1))
    generator = np.random.default_rng(seed)
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples) / size


def paired_bootstrap(
    differences: Floats, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> list[Interval]:
    """Percentile bootstrap of mean paired differences over training seeds and images, several columns at once.

    A resample draws seeds with replacement and images with replacement; an image that is drawn brings its
    differences under every drawn seed. The same images were attacked under every seed, so the two are crossed, and
    a resample must take both along: drawing images afresh within each seed would treat one image under S seeds as S
    independent images, and the interval would lose most of the variance between images as S grows. With one seed
    this is the plain bootstrap over images.

    Source: percentile interval, Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13;
    crossed factors, Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007. SciPy's `bootstrap`
    resamples one factor only and one statistic at a time; with one seed the tests hold this function to it.

    Args:
        differences: (S, n, C) finite numbers: seeds, images, columns (arms, scores, rounds), columns independent of
            each other but resampled alike.
        resamples: number of bootstrap resamples.
        level: confidence level, in (0, 1).
        seed: of the resampling; the same seed gives the same intervals.

    Returns:
        C intervals of the mean.

    Raises:
        ValueError: wrong number of dimensions, no seed or image, or a number that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 3 or 0 in values.shape[:2]:
        raise ValueError(f"differences must be (seeds, images, columns) and not empty; got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite numbers")
    seeds, images, _ = values.shape
    by_image = np.einsum("bn,snc->bsc", _resampled_weights(images, resamples, seed), values, optimize=True)
    means = np.einsum("bs,bsc->bc", _resampled_weights(seeds, resamples, seed + 1), by_image, optimize=True)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    estimates = values.mean(axis=(0, 1))
    return [Interval(*map(float, column)) for column in zip(estimates, low, high, strict=True)]


def sign_flip_test(differences: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of "the paired differences are symmetric about zero", by flipping signs at random.

    Exact by enumeration where 2**n is at most `resamples`; otherwise Monte Carlo, with the observed arrangement
    counted in, so that p is never 0.

    Source: Fisher, "The Design of Experiments" (1935), section 21; the count of one, Phipson and Smyth, "Permutation
    p-values should never be zero", 2010. Computed by `scipy.stats.permutation_test`.

    Args:
        differences: (n,) finite numbers, one an image (its mean over seeds where there are several). Zeros have no
            sign to flip and are left out: they change neither side of the comparison.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"differences must be finite and of one dimension; got shape {values.shape}")
    values = values[values != 0]
    if len(values) < 2:
        return 1.0  # one difference is as likely positive as negative, and none is no evidence
    result = stats.permutation_test(
        (values,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples - 1,
        rng=np.random.default_rng(seed),
    )
    return float(min(1.0, result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: family-wise error control under any dependence. Same order as given.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6,
    1979. (SciPy has only the false-discovery-rate adjustments.)
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in adjusted]


def max_statistic_test(differences: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """One-sided p-values of "no column's mean lies below zero", adjusted over all columns at once.

    Each row's sign is flipped as one, in all columns, so that the columns keep their dependence; the statistic of a
    column is its sum over the root of its sum of squares (which flips leave alone), and each column is compared with
    the *lowest* statistic among all columns. The chance of any p below alpha, where every column is symmetric about
    zero or lies above, is at most alpha, and unlike with Holm's or Bonferroni's adjustment the smallest p that can be
    had does not grow with the number of columns.

    Source: Westfall and Young, "Resampling-Based Multiple Testing" (1993), single-step maxT; p with the count of one
    as in `sign_flip_test`. SciPy has no test over several columns.

    Args:
        differences: (n, C) numbers, a row per image; NaN where a comparison does not have that image.

    Returns:
        C p-values, in (0, 1].
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError(f"differences must be (images, columns) without infinities; got shape {values.shape}")
    values = np.nan_to_num(values)  # no contribution to the sum, under any sign
    length = np.sqrt((values**2).sum(axis=0))
    scaled = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    if not scaled.size:
        return [1.0] * values.shape[1]
    observed = scaled.sum(axis=0)
    generator = np.random.default_rng(seed)
    lowest = np.concatenate(
        [
            ((generator.integers(0, 2, (len(part), len(scaled))) * 2.0 - 1.0) @ scaled).min(axis=1)
            for part in np.array_split(np.arange(resamples - 1), 10)
        ]
    )
    reached = (lowest[:, None] <= observed[None, :] + 1e-12).sum(axis=0)
    return [float(value) for value in (1 + reached) / resamples]


def seeds_interval(means: Floats, *, level: float = LEVEL) -> Interval | None:
    """Student's t interval of the mean over training seeds, from one mean a seed; None for fewer than two.

    The second opinion on `paired_bootstrap`, which with few seeds is too narrow for what seeds contribute: resampling
    S seeds gives a variance (S - 1)/S of the right one, and normal instead of t tails. Of 3 seeds the bootstrap's
    95 % interval covers about 75 % where seeds are all that varies (the tests measure it); this one covers 95 % if
    the seeds' means are normal, and is wide because 3 seeds tell little.
    """
    values = np.asarray(means, dtype=np.float64)
    if len(values) < 2:
        return None
    middle = float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(middle, middle - half, middle + half)


def seeds_test(means: Floats) -> float:
    """Two-sided p of Student's t test that the mean over training seeds is zero; 1 for fewer than two seeds."""
    values = np.asarray(means, dtype=np.float64)
    if len(values) < 2:
        return 1.0
    error = float(stats.sem(values))
    if error == 0:
        return 1.0 if values[0] == 0 else 0.0
    return float(2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1))


def wilson(share: Floats, count: int, *, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Wilson's score interval of shares out of `count` trials: (low, high), shaped as `share`.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927. Written
    out because the share of several seeds' mean is not a whole number of successes, which
    `scipy.stats.binomtest(...).proportion_ci("wilson")` asks for; the tests hold it to that for whole numbers.
    """
    share = np.asarray(share, dtype=np.float64)
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    z = float(stats.norm.ppf((1 + level) / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return np.clip(middle - half, 0.0, 1.0), np.clip(middle + half, 0.0, 1.0)
