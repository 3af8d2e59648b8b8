"""Randomization inference for one comparison: effect, p-value, interval, detectable size.

The statistic is the least-squares coefficient of the treatment in a regression with block fixed
effects and, if given, one covariate measured before treatment, divided by its cluster-robust
standard error (HC0). Its null distribution comes from repeating the assignment, not from a formula:

* the p-value is exact under the sharp null (no unit's outcome depends on its arm), in any sample
  size, because blocks and covariate are removed without looking at the treatment;
* the interval inverts the same test under a constant additive effect; because the statistic is
  studentized it also covers the *average* effect in large samples when effects differ between
  units (Wu and Ding, "Randomization Tests for Weak Null Hypotheses in
  Randomized Experiments", JASA 2021) - an unstudentized
  difference of means does not when arms have unequal sizes.

This is `scipy.stats.monte_carlo_test` with the assignment as the sampler of the null, written with
matrix products over draws (a test compares the two): p = (r + 1) / (n + 1), two-sided.

Shapes: U units, C clusters, D draws, K columns of blocks and covariate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.cells import Projection, Residuals
from motet.experiments.analysis.sums import TOLERANCE, DrawTerms, farthest, terms_of

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

POWER = 0.8
FEWEST_SPARE_CLUSTERS = 4


@dataclass(frozen=True)
class ArmEffect:
    """One arm of a test of all arms at once, against dose 0.

    group: its number from 1, in the order of the arms with a dose. low, high: of a simultaneous
    interval. p: corrected over the arms.
    """

    group: int
    effect: float
    low: float | None
    high: float | None
    p: float


@dataclass(frozen=True)
class Estimate:
    """One answer. None where the data cannot give the number (`note` says why)."""

    effect: float | None
    low: float | None
    high: float | None
    p: float
    n: int
    n_clusters: int
    n_dropped: int
    standard_error: float | None
    smallest_detectable: float | None
    adjusted: bool
    note: str = ""
    smallest_p: float = 1.0
    """The p-value if the actual assignment were the one that parts these values most."""
    arms: tuple[ArmEffect, ...] = ()
    """Of a test of all arms at once, which has no single effect."""
    coverage: float | None = None
    """How many of such intervals hold the true effect, where that is known to be too few."""

    @property
    def answered(self) -> bool:
        """Whether there was anything to test."""
        return self.effect is not None or bool(self.arms)


@dataclass(frozen=True)
class Comparison:
    """Who is compared and how the assignment is repeated.

    units: int64 [n], the units that take part. score: float64 [arms], the treatment's value in each
    arm (0/1, or log2(1 + dose)). arms: int64 [n], actual arm. draws: int8 [D, n], arms in repeated
    assignments. blocks, clusters: int64 [n].
    """

    units: I64
    score: F64
    arms: I64
    draws: I8
    blocks: I64
    clusters: I64

    def measured(self, outcome_U: F64) -> I64:
        """Places, among those that take part, of units with a value, in the order of clusters."""
        places = np.flatnonzero(np.isfinite(outcome_U[self.units]))
        return places[np.argsort(self.clusters[places], kind="stable")]


def estimate(
    outcome_U: F64,
    covariate_U: F64 | None,
    comparison: Comparison,
    alpha: float = 0.05,
    detect_alpha: float | None = None,
) -> Estimate:
    """Estimate one comparison on one outcome.

    outcome_U, covariate_U: float64, values of all units (indexed by `comparison.units`); units
    whose outcome is not finite are dropped and counted. alpha: 1 - confidence. detect_alpha: level
    of the test whose smallest detectable effect is wanted, `alpha` unless multiplicity asks for
    less.
    """
    order = comparison.measured(outcome_U)
    y = outcome_U[comparison.units][order]
    clusters = comparison.clusters[order]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    observed = comparison.score[comparison.arms[order]]
    facts = (len(order), len(starts), len(comparison.units) - len(order))
    if len(order) < 2 or np.ptp(observed) == 0:
        return _nothing(None, *facts, "one of the groups has no unit with a value")
    _, block = np.unique(comparison.blocks[order], return_inverse=True)
    covariate = None if covariate_U is None else covariate_U[comparison.units][order]
    projection = projection_of(block, covariate, len(starts))
    # Twice: the first means are rounded at the outcome's size, the second at its spread's.
    residual = projection.residual(projection.residual(y))
    treatment = projection.residual(observed)
    if float(treatment @ treatment) < TOLERANCE * float(observed @ observed):
        return _nothing(None, *facts, "no block holds units of both groups")
    scale = float(np.abs(y).max())
    if float(np.abs(residual).max()) <= TOLERANCE * max(scale, 1e-300):
        return _nothing(0.0, *facts, "the outcome does not vary between units within a block")
    cluster = np.cumsum(np.diff(clusters, prepend=clusters[0]) != 0)
    study = Residuals(residual, treatment, projection, cluster, order, comparison.score)
    terms = terms_of(study, comparison.draws)
    return _infer(terms, facts, projection.covariate is not None, alpha, detect_alpha or alpha)


def _nothing(effect: float | None, n: int, n_clusters: int, dropped: int, why: str) -> Estimate:
    return Estimate(effect, None, None, 1.0, n, n_clusters, dropped, None, None, False, why)


def spares_a_covariate(n_clusters: int, n_blocks: int, n_effects: int = 1) -> bool:
    """Whether a covariate beside blocks and effects leaves clusters enough to judge by."""
    return n_clusters - n_blocks - 1 - n_effects >= FEWEST_SPARE_CLUSTERS


def projection_of(
    block: I64, covariate: F64 | None, n_clusters: int, n_effects: int = 1
) -> Projection:
    """What is taken out of outcome and treatment: block means and, where it helps, the covariate.

    A covariate that is constant within blocks, or that leaves fewer than four clusters to spare, is
    not used; a missing value of it is replaced by the mean.
    """
    plain = Projection(block, None)
    if covariate is None or not spares_a_covariate(n_clusters, plain.columns, n_effects):
        return plain
    finite = np.isfinite(covariate)
    if not finite.any():
        return plain
    filled = np.where(finite, covariate, covariate[finite].mean())
    rest = plain.residual(filled)
    length = float(np.linalg.norm(rest))
    if length <= 1e-8 * max(float(np.linalg.norm(filled)), 1e-300):
        return plain
    return Projection(block, rest / length)


def _infer(
    terms: DrawTerms, facts: tuple[int, int, int], adjusted: bool, alpha: float, detect_alpha: float
) -> Estimate:
    effect, m, pp = terms.observed
    if terms.observed_squared_t(0.0) == 0:
        effect = 0.0
    error = math.sqrt(pp) / m
    if error == 0:
        note = "every group has one value only: there is no spread to make an interval from"
        p, least = terms.p(0.0), terms.smallest_p()
        return Estimate(effect, None, None, p, *facts, 0.0, None, adjusted, note, least)
    low, high = interval(terms, alpha)
    note = ""
    if low is None or high is None:
        smallest = 1.0 / (1 + len(terms.a)) + float(np.mean(terms.ss == 0))
        note = (
            "the design is too small for an interval: "
            f"no p-value below about {smallest:.2g} is possible"
        )
    detectable = None
    critical = float(
        np.quantile(np.sqrt(terms.squared_t(effect)), 1 - detect_alpha, method="higher")
    )
    if math.isfinite(critical):
        from scipy.stats import norm

        detectable = (critical + float(norm.ppf(POWER))) * error
    p, least = terms.p(0.0), terms.smallest_p()
    return Estimate(effect, low, high, p, *facts, error, detectable, adjusted, note, least)


def interval(terms: DrawTerms, alpha: float) -> tuple[float | None, float | None]:
    """The effects that the test does not reject at alpha; None for an end that is not bounded."""
    effect, m, pp = terms.observed
    error = math.sqrt(pp) / m
    assert error > 0
    low, high = (farthest(terms.p, effect, side, alpha, error) for side in (-1.0, 1.0))
    return low, high
