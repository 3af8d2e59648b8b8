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

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

CHUNK_CELLS = 1 << 16
TOLERANCE = 1e-9
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
    values = outcome_U[comparison.units]
    kept = np.isfinite(values)
    dropped = int((~kept).sum())
    order = np.flatnonzero(kept)
    order = order[np.argsort(comparison.clusters[order], kind="stable")]
    y = values[order]
    clusters = comparison.clusters[order]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    observed = comparison.score[comparison.arms[order]]
    facts = (len(order), len(starts), dropped)
    if len(order) < 2 or np.ptp(observed) == 0:
        return _nothing(None, *facts, "one of the groups has no unit with a value")
    basis, adjusted = _basis(
        comparison.blocks[order],
        None if covariate_U is None else covariate_U[comparison.units][order],
        len(starts),
    )
    residual = y - basis @ (basis.T @ y)
    treatment = observed - basis @ (basis.T @ observed)
    if float(treatment @ treatment) < TOLERANCE * float(observed @ observed):
        return _nothing(None, *facts, "no block holds units of both groups")
    scale = float(np.abs(y).max())
    if float(np.abs(residual).max()) <= TOLERANCE * max(scale, 1e-300):
        return _nothing(0.0, *facts, "the outcome does not vary between units within a block")
    terms = _terms(residual, treatment, basis, starts, comparison, order)
    return _infer(terms, facts, adjusted, alpha, detect_alpha or alpha)


def _nothing(effect: float | None, n: int, n_clusters: int, dropped: int, why: str) -> Estimate:
    return Estimate(effect, None, None, 1.0, n, n_clusters, dropped, None, None, False, why)


def _basis(blocks: I64, covariate: F64 | None, n_clusters: int) -> tuple[F64, bool]:
    """Orthonormal columns, float64 [n, K], of block indicators and the covariate.

    A covariate that is constant within blocks, or that leaves fewer than four clusters to spare, is
    not used; a missing value of it is replaced by the mean.
    """
    _, number = np.unique(blocks, return_inverse=True)
    indicators = np.zeros((len(blocks), int(number.max()) + 1))
    indicators[np.arange(len(blocks)), number] = 1.0
    basis = indicators / np.sqrt(indicators.sum(axis=0))
    if covariate is None or n_clusters - basis.shape[1] - 2 < FEWEST_SPARE_CLUSTERS:
        return basis, False
    finite = np.isfinite(covariate)
    if not finite.any():
        return basis, False
    filled = np.where(finite, covariate, covariate[finite].mean())
    rest = filled - basis @ (basis.T @ filled)
    length = float(np.linalg.norm(rest))
    if length <= 1e-8 * max(float(np.linalg.norm(filled)), 1e-300):
        return basis, False
    return np.column_stack([basis, rest / length]), True


@dataclass(frozen=True)
class _Terms:
    """Everything the test at any hypothetical effect tau needs, per draw, float64 [D].

    Coefficient of a draw at tau: a - tau b. Its squared standard error times m squared:
    pp - 2 tau ps + tau^2 ss. `observed` holds (a, m, pp) of the actual assignment, whose b is 1.
    """

    a: F64
    b: F64
    m: F64
    pp: F64
    ps: F64
    ss: F64
    observed: tuple[float, float, float]

    def squared_t(self, tau: float) -> F64:
        """Squared studentized statistic of every draw when tau is removed, float64 [D]."""
        top = (self.a - tau * self.b) ** 2 * self.m**2
        bottom = self.pp - 2 * tau * self.ps + tau**2 * self.ss
        size = self.pp + tau**2 * self.ss
        return _ratio(top, np.where(bottom <= 1e-12 * size, 0.0, bottom))

    def observed_squared_t(self, tau: float) -> float:
        a, m, pp = self.observed
        return float(_ratio(np.array([(a - tau) ** 2 * m**2]), np.array([pp]))[0])

    def p(self, tau: float) -> float:
        """Two-sided p-value of the hypothesis that the effect is tau."""
        reference = self.observed_squared_t(tau)
        as_extreme = self.squared_t(tau) >= reference * (1 - TOLERANCE)
        return float((1 + as_extreme.sum()) / (1 + len(self.a)))

    def smallest_p(self) -> float:
        """The p-value of no effect if the actual assignment were the most extreme one."""
        found = self.squared_t(0.0)
        most = max(float(found.max()), self.observed_squared_t(0.0))
        return float((1 + (found >= most * (1 - TOLERANCE)).sum()) / (1 + len(found)))


def _ratio(top: F64, bottom: F64) -> F64:
    """top / bottom, with 0 / 0 = 0 and x / 0 = infinity."""
    zero = bottom <= 0
    return np.where(zero, np.where(top > 0, np.inf, 0.0), top / np.where(zero, 1.0, bottom))


def _terms(
    residual: F64, treatment: F64, basis: F64, starts: I64, comparison: Comparison, order: I64
) -> _Terms:
    """Sums over units for the actual assignment and for every draw."""
    actual = _chunk_terms(treatment[None, :], residual, treatment, starts)
    draws = comparison.draws
    parts = []
    step = max(1, CHUNK_CELLS // len(order))
    whole = bool(np.array_equal(order, np.arange(draws.shape[1])))
    for start in range(0, len(draws), step):
        rows = draws[start : start + step]
        scores = comparison.score[rows if whole else rows[:, order]]
        scores -= (scores @ basis) @ basis.T
        parts.append(_chunk_terms(scores, residual, treatment, starts))
    a, b, m, pp, ps, ss = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Terms(
        a, b, m, pp, ps, ss, (float(actual[0][0]), float(actual[2][0]), float(actual[3][0]))
    )


def _chunk_terms(treated_DU: F64, residual: F64, actual: F64, starts: I64) -> tuple[F64, ...]:
    """(a, b, m, pp, ps, ss) of some draws, whose treatments are already residualized.

    A draw in which the treatment does not vary within blocks has m = 0; it is given an infinite
    statistic (pp = ps = ss = 0, a = m = 1), which can only make p larger.
    """
    along = treated_DU * residual
    square = treated_DU * treated_DU
    across = treated_DU * actual
    if len(starts) < treated_DU.shape[1]:
        along, square, across = (
            np.add.reduceat(x, starts, axis=1) for x in (along, square, across)
        )
    m = square.sum(axis=1)
    empty = m <= TOLERANCE * float(actual @ actual)
    safe = np.where(empty, 1.0, m)
    a, b = along.sum(axis=1) / safe, across.sum(axis=1) / safe
    along -= a[:, None] * square
    across -= b[:, None] * square
    pp = np.einsum("dc,dc->d", along, along)
    ps = np.einsum("dc,dc->d", along, across)
    ss = np.einsum("dc,dc->d", across, across)
    noise = (TOLERANCE * safe) ** 2 * 1e-6
    pp = np.where(pp <= noise * float(np.max(residual**2)), 0.0, pp)
    ss = np.where(ss <= noise, 0.0, ss)
    if empty.any():
        a, b = np.where(empty, 1.0, a), np.where(empty, 0.0, b)
        pp, ps, ss = (np.where(empty, 0.0, x) for x in (pp, ps, ss))
        m = safe
    return a, b, m, pp, ps, ss


def _infer(
    terms: _Terms, facts: tuple[int, int, int], adjusted: bool, alpha: float, detect_alpha: float
) -> Estimate:
    effect, m, pp = terms.observed
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


def interval(terms: _Terms, alpha: float) -> tuple[float | None, float | None]:
    """The effects that the test does not reject at alpha; None for an end that is not bounded."""
    effect, m, pp = terms.observed
    width = math.sqrt(pp) / m
    assert width > 0
    ends: list[float | None] = []
    for side in (-1.0, 1.0):
        inside, outside = 0.0, 2 * width
        while terms.p(effect + side * outside) > alpha:
            inside, outside = outside, 2 * outside
            if outside > 1e6 * width:
                break
        if outside > 1e6 * width:
            ends.append(None)
            continue
        for _ in range(40):
            middle = (inside + outside) / 2
            if terms.p(effect + side * middle) > alpha:
                inside = middle
            else:
                outside = middle
            if outside - inside < 1e-4 * width:
                break
        ends.append(effect + side * outside)
    return ends[0], ends[1]
