"""What a sceptic asks of a comparison under attack, as findings: plain numbers, no words and no drawing.

Every score is the primary one against the primary reference. A mapping by arm has all arms, cross entropy first; one
of *effects* (arm minus cross entropy) has all but cross entropy. Intervals are 95 % and resample seeds and images, the
same for all arms. Where a run does not hold the rows, a field is None or empty: that is absence, not a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prsl_kernels.experiments.report.statistics import ALPHA, Interval

Levels = Mapping[str, Interval]
ZERO_SHARE = 0.10  # of exactly zero input gradients, above which an attack that follows them is not to be trusted


@dataclass(frozen=True)
class AttackScore:
    """What one attack (at its last recorded round) left of the score, on the images that it covers."""

    attack: str
    role: str  # "primary", "ensemble", "query", "eps", "unbounded", "probe", "control", or "worst" for the worst case
    method: str
    objective: str
    norm: str | None
    eps: float | None  # in [0, 1] pixels (of the L2 norm where `norm` is "l2"); None for controls without a budget
    round: int
    restarts: int | None
    images: int
    levels: Levels
    effects: Levels  # exploratory
    chosen: Mapping[str, int] | None  # arm -> images (times seeds) for which it was the worst; None if not a candidate


@dataclass(frozen=True)
class Doubling:
    """Change of the score between two recorded rounds of one attack: (at `after`) minus (at `before`)."""

    attack: str
    before: int
    after: int
    images: int
    changes: Levels
    effects: Levels  # change of the difference from cross entropy


@dataclass(frozen=True)
class RoundsCurve:
    """Score against rounds of one attack; `levels[arm]` is as long as `rounds`; round 0 is the clean image."""

    attack: str
    rounds: tuple[int, ...]
    images: int
    levels: Mapping[str, tuple[Interval, ...]]
    effects: Mapping[str, tuple[Interval, ...]]


@dataclass(frozen=True)
class Convergence:
    """Would more rounds, or more restarts, have found more?

    `states[arm]` is "converged" where the whole interval of the main attack's last doubling lies within
    `tolerance[arm]` of zero (a tenth of what the attack did to that arm's score in all); "moving" where the interval
    excludes zero and is not within; "unclear" where the run cannot tell; "absent" where fewer than two rounds exist, or
    where the attack did not measurably lower the arm's score (`idle`): standing still is then no sign of an end.

    The endpoint is the worst of several attacks, so the others are asked too: `rounds_open[arm]` names those of the
    worst case whose last doubling of rounds, `restarts_open[arm]` those of it and of the query attacks whose restarts,
    may have lowered the arm's score by more than the tolerance (the interval reaches below it).
    """

    curve: RoundsCurve
    doubling: Doubling | None  # of the main attack: from the round nearest to half of the last to the last
    others: tuple[Doubling, ...]  # the same for the other attacks with several rounds
    restarts: tuple[Doubling, ...]  # first restart against all of them, for attacks with restarts
    states: Mapping[str, str]
    tolerance: Mapping[str, float]
    idle: tuple[str, ...]
    rounds_open: Mapping[str, tuple[str, ...]]
    restarts_open: Mapping[str, tuple[str, ...]]
    unasked: tuple[str, ...]  # attacks of the worst case, longer than one round, that record too few rounds to be asked

    def settled(self, arm: str) -> bool:
        """Whether every attack that can be asked had converged on the arm."""
        return self.states[arm] == "converged" and not self.rounds_open[arm] and not self.restarts_open[arm]


@dataclass(frozen=True)
class EpsPoint:
    """One budget of the sweep. eps 0 is the clean image."""

    eps: float  # [0, 1] pixels
    attack: str
    round: int


@dataclass(frozen=True)
class EpsSweep:
    """Score against the budget, on the images that all budgets have. All mappings by point, in `points`' order."""

    images: int
    points: tuple[EpsPoint, ...]  # ascending in eps
    levels: Mapping[str, tuple[Interval, ...]]
    effects: Mapping[str, tuple[Interval, ...]]
    steps: Mapping[str, tuple[Interval, ...]]  # change from each point to the next; one shorter than `points`
    monotone: Mapping[str, bool]  # no larger budget measurably raises the score (Bonferroni over an arm's steps)


@dataclass(frozen=True)
class Floor:
    """Whether an attack without a bound brings the score down to that of unrelated texts."""

    attack: str
    eps: float | None
    round: int
    images: int
    unrelated: float  # score of references paired at random, on the same images where the run has it by image
    by_image: bool
    levels: Levels
    above: Levels  # attacked minus unrelated
    reached: Mapping[str, bool]  # the interval of `above` is not wholly above zero


@dataclass(frozen=True)
class MaskingTest:
    """One comparison with the white box for one arm: a score below the white box's is evidence of masked gradients.

    White box is, for each image, the lowest score over all gradient attacks within the primary budget. `p` is
    one-sided (lower than the white box), adjusted over all comparisons of the task by the maximum statistic.
    """

    kind: str  # "transfer" or "query"
    arm: str  # the model that is asked
    source: str  # the arm on which the images were made, or the query attack's name
    images: int
    level: Interval  # score under the transferred or the query attack
    white_box: Interval  # score under the white box, same images
    difference: Interval  # level minus white box; negative is evidence of masking
    same_attack: Interval | None  # transferred minus the very attack that was transferred, run on `arm`; None for query
    p: float
    suspicious: bool  # the interval lies below zero and p < 0.05

    @property
    def too_few(self) -> bool:
        """Whether p could not be below 0.05 whatever the scores: of n signs that are flipped, 2**-n is the least p."""
        return 0.5**self.images >= ALPHA


@dataclass(frozen=True)
class Transfer:
    """Images made on each arm, shown to every arm. Keys of `matrix` and `tests` are (source, target)."""

    attack: str  # that was transferred
    images: int
    matrix: Mapping[tuple[str, str], Interval]  # mean score; on the diagonal the white box of the same attack
    tests: Mapping[tuple[str, str], MaskingTest]  # off the diagonal
    effects: Levels  # arm minus cross entropy, each at the worst, image by image, of the images made on any arm


@dataclass(frozen=True)
class Query:
    """One attack without gradients."""

    attack: str
    rounds: int  # queries
    images: int
    levels: Levels
    tests: Mapping[str, MaskingTest]
    effects: Levels


@dataclass(frozen=True)
class GradientHealth:
    """Input gradients of the main attack for one arm.

    The norm is of the images whose gradient is not exactly zero or broken, since zero has no logarithm: with few such
    images it says little. A healthy norm acquits nobody, as gradients may be large and lead nowhere.
    """

    arm: str
    zero_share: float | None  # largest mean over a round's images of the share of exactly zero entries
    nonfinite_share: float | None
    norm: float | None  # L2 norm: mean over the rounds up to the last, geometric mean over images
    norm_over_baseline: Interval | None  # ratio (not difference) of geometric means, paired by image; None for baseline
    norm_images: int  # images (times seeds) that have a norm
    norm_of: int  # images (times seeds) that were asked; 0 where the run records no norms

    @property
    def vanishing(self) -> bool:
        return (self.zero_share or 0.0) > ZERO_SHARE

    @property
    def failing(self) -> bool:
        """Whether the arm fails the control on its input gradients."""
        return self.vanishing or (self.nonfinite_share or 0.0) > 0


@dataclass(frozen=True)
class Surface:
    """The objective in a square around the clean image, of one arm; rises are from the centre to the budget's edge."""

    arm: str
    images: int  # times seeds
    along_gradient: Interval  # rise along the sign of the gradient
    along_random: Interval  # rise along random signs
    difference: Interval  # the first minus the second
    # RMS deviation from a parabola along the gradient's sign, over the range: 0 is smooth. None under 5 points.
    roughness: float | None
    # Mean objective over images, for a picture: axis values ascending, `values[row of b][column of a]`.
    a: tuple[float, ...]
    b: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Masking:
    """All evidence on masked gradients; `suspected` only where a MaskingTest is suspicious."""

    white_box: tuple[str, ...]  # the gradient attacks within the primary budget that make up the white box
    transfer: Transfer | None
    queries: tuple[Query, ...]
    comparisons: int  # over which the p-values are adjusted
    gradients: tuple[GradientHealth, ...]
    surfaces: tuple[Surface, ...]  # empty where none was recorded
    suspected: Mapping[str, tuple[MaskingTest, ...]]  # arm -> what accuses it; empty for none

    @property
    def tests(self) -> tuple[MaskingTest, ...]:
        """All comparisons, those of transfer first."""
        transfers = () if self.transfer is None else tuple(self.transfer.tests.values())
        return (*transfers, *(test for query in self.queries for test in query.tests.values()))


@dataclass(frozen=True)
class Probe:
    """An attack within the primary budget and norm that is not of the ensemble, against the ensemble's worst case."""

    attack: str
    round: int
    images: int
    differences: Levels  # score under the probe minus that under the ensemble's worst case, on the same images
    lower: tuple[str, ...]  # arms on which it is measurably below (Bonferroni over probes and arms)


@dataclass(frozen=True)
class SeedRow:
    """One arm under one training seed: means over images of the primary score."""

    arm: str
    seed: int
    clean: float
    attacked: float
    effect: float | None  # attacked, minus cross entropy's under the same seed; None for cross entropy


@dataclass(frozen=True)
class Language:
    """How one arm speaks, at one setting: means over seeds; None where the evaluation did not record it."""

    arm: str
    setting: str  # "clean" or "attacked"
    words: Interval | None  # per output
    words_effect: Interval | None  # arm minus cross entropy
    distinct: float | None  # different outputs
    distinct_1: float | None  # share of different words
    distinct_2: float | None  # share of different pairs of words
    empty: float | None  # share of empty outputs
    blank_metric: str  # the score of the next two: the primary one, or "exact_match" where that is not scored so
    blank: Interval | None  # similarity to what the arm says of a blank image
    blank_effect: Interval | None


@dataclass(frozen=True)
class Scepticism:
    """Answers to the sceptic's questions for one task."""

    attacks: tuple[AttackScore, ...]  # the worst case first, then by role; the clean image is not among them
    ensemble: tuple[str, ...]  # the attacks over which the worst case is taken
    convergence: Convergence
    sweep: EpsSweep | None
    floors: tuple[Floor, ...]
    masking: Masking
    probes: tuple[Probe, ...]
    seeds: tuple[SeedRow, ...]
    language: tuple[Language, ...]
