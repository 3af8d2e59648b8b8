"""How small an effect a run like this one would have found, from what was measured.

Where `power` has to assume, this simulates with the measured share of the control group, or with
the measured residuals and their correlation within clusters. That these are estimates themselves is
simulated too: a share is drawn from its Jeffreys posterior (Brown, Cai and DasGupta, "Interval
Estimation for a Binomial Proportion", Statistical Science 2001), a variance from its own; else 80 %
would be less on average over runs.

An average over shares that are far apart is no property of this run, though: the share is one of
them. So power is simulated again at quantiles of the control group's share (or mean, where the
range has an end), and where it differs much, what is said is its range.

Shapes: U units of the experiment, N those of the comparison with a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.arm_studies import ArmStudies
from motet.experiments.analysis.estimates import POWER, Comparison, Estimate
from motet.experiments.analysis.marginals import Marginal, latent_correlation
from motet.experiments.analysis.power import possible_range
from motet.experiments.analysis.simulation import Studies, count_of, enough
from motet.experiments.analysis.sums import TOLERANCE
from motet.experiments.stream.random import name_key
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
MOST_CORRELATION = 0.95
LIKELY = (0.1, 0.3, 0.5, 0.7, 0.9)
PLAUSIBLE = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Quantiles of what the control group's share or mean may be: where power must be about 80 % for
that to be said, and what else counts for its range otherwise. Power is least somewhere between, for
shares: near 1 the treated units are all alike."""
ABOUT = 0.08
RANGE_STUDIES = 600
"""Power at a quantile needs fewer studies than an effect that is solved for."""


@dataclass(frozen=True)
class Detectable:
    """The smallest effect that such runs find with 80 % power, in the outcome's unit.

    size: None where no possible effect would be found so often, or nothing could be estimated.
    power: (least, most) share of such runs that find it, over what the control group's share or
    mean may be; None where that is about 80 % anyway. Without a size it is that of the largest
    possible effect, where the most is 80 % or more.
    """

    size: float | None
    power: tuple[float, float] | None = None


def detectable(
    outcome: OutcomeSpec,
    values: F64,
    covariate: F64 | None,
    comparison: Comparison,
    found: Estimate,
    alpha: float,
    key: int,
    simulations: int | None = None,
    alone: F64 | None = None,
    draws: int | None = None,
) -> Detectable:
    """The smallest effect that 4 of 5 runs like this one would have found.

    Args:
        outcome: its possible range, and whether it is a share.
        values, covariate: float64 [U]; the covariate counts where `found` is adjusted for it.
        comparison: who is compared.
        found: the estimate.
        alpha: level of the test.
        key: of the simulation.
        simulations: how many studies; None = enough of them.
        alone: of a test of all arms at once, 1 for the arm that has the effect, float64 [arms].
        draws: how many repeated assignments the analysis makes; None = all of the comparison's.
    """
    if not found.answered:
        return Detectable(None)
    comparison = _with_values(comparison, values)
    wanted = enough(outcome.binary) if simulations is None else simulations
    count = count_of(wanted, len(comparison.units))
    x = covariate if found.adjusted else None
    rng = np.random.Generator(np.random.Philox(key=name_key(key, "measured")))
    y, control = values[comparison.units], comparison.score[comparison.arms] == 0
    plain = _within(y - _fitted(found, comparison), comparison.blocks)
    if not outcome.binary and float(np.abs(plain).max()) <= TOLERANCE * max(_scale(y), 1e-300):
        return Detectable(None)  # all units alike: how much units vary is not known from these
    correlation: float | None = None
    if x is not None:
        correlation = _correlation(plain, _within(_filled(x[comparison.units]), comparison.blocks))
    icc = intra_cluster(plain, comparison.clusters)
    known = _Known.of(y[control], comparison.clusters[control])
    if outcome.binary:
        shares = known.shares(rng, count)
        marginal, middle = Marginal(share=shares), float(shares.mean())
        icc = latent_correlation(icc, middle)
        if correlation is not None:
            correlation /= _biserial(middle)
        at: Callable[[float], Marginal] | None = known.marginal_at
    else:
        marginal = _spread(plain, known.mean, comparison, outcome, rng, count)
        at = _shifted(marginal, known)
    if correlation is not None:
        correlation = max(-MOST_CORRELATION, min(MOST_CORRELATION, correlation))

    def studies(count: int) -> Studies:
        how = (alpha, icc, correlation, name_key(key, "detectable"), x, count)
        if alone is None:
            return Studies(comparison, *how, draws=draws)
        return ArmStudies(comparison, alone, *how, draws=draws)

    many = studies(count)
    shift, _ = many.smallest_shift(marginal)
    size = None if shift is None else marginal.effect_of(shift)
    if at is None:
        return Detectable(size)
    few = studies(RANGE_STUDIES) if count > RANGE_STUDIES else many
    return Detectable(size, _range(few, shift, at))


def _scale(values: F64) -> float:
    return float(np.abs(values).max())


def _range(
    studies: Studies, shift: float | None, at: Callable[[float], Marginal]
) -> tuple[float, float] | None:
    """The power at a shift over what the control group's share or mean may be, as `Detectable` has
    it; without a shift that of the largest effect.
    """

    def power(quantile: float) -> float:
        there = at(quantile)
        return studies.power(there, studies.largest_shift(there) if shift is None else shift)

    likely = [power(quantile) for quantile in LIKELY]
    if shift is not None and all(abs(share - POWER) <= ABOUT for share in likely):
        return None
    every = likely + [power(quantile) for quantile in PLAUSIBLE]
    if shift is None and max(every) < POWER:
        return None
    return min(every), max(every)


@dataclass(frozen=True)
class _Known:
    """What the control group tells of its own mean: a cluster counts as one unit.

    mean: of its units. clusters: how many. error: of the mean, from the means of clusters.
    """

    mean: float
    clusters: int
    error: float

    @classmethod
    def of(cls, control: F64, clusters: I64) -> _Known:
        _, number, size = np.unique(clusters, return_inverse=True, return_counts=True)
        means = np.bincount(number, weights=control) / size
        k = len(size)
        error = float(means.std(ddof=1)) / math.sqrt(k) if k > 1 else 0.0
        return cls(float(control.mean()), k, error)

    def _ones(self) -> tuple[float, float]:
        return self.mean * self.clusters + 0.5, (1 - self.mean) * self.clusters + 0.5

    def shares(self, rng: np.random.Generator, count: int) -> F64:
        """Shares that the group may have."""
        return rng.beta(*self._ones(), count)

    def marginal_at(self, quantile: float) -> Marginal:
        """Outcomes of 0 or 1 at a quantile of its share."""
        from scipy.special import betaincinv

        return Marginal(share=float(betaincinv(*self._ones(), quantile)))

    def mean_at(self, quantile: float) -> float:
        """A quantile of its mean, by Student's distribution."""
        from scipy.special import stdtrit

        return self.mean + self.error * float(stdtrit(max(1, self.clusters - 1), quantile))


def _shifted(marginal: Marginal, known: _Known) -> Callable[[float], Marginal] | None:
    """The same values around a quantile of the mean; None where the range has no end, and power
    does not depend on the mean.
    """
    if marginal.values is None or not (math.isfinite(marginal.low) or math.isfinite(marginal.high)):
        return None
    values = marginal.values
    return lambda quantile: replace(marginal, values=values + known.mean_at(quantile) - known.mean)


def _fitted(found: Estimate, comparison: Comparison) -> F64:
    """What the estimate says that treatment added to every unit, float64 [N]."""
    score = comparison.score[comparison.arms]
    if found.effect is not None:
        return found.effect * score
    effects = np.zeros(int(comparison.score.max()) + 1)
    for arm in found.arms:
        effects[arm.group] = arm.effect
    return effects[score.astype(np.int64)]


def _with_values(comparison: Comparison, values: F64) -> Comparison:
    """The comparison of those units that have a value."""
    kept = np.isfinite(values[comparison.units])
    if kept.all():
        return comparison
    return replace(
        comparison,
        units=comparison.units[kept],
        arms=comparison.arms[kept],
        draws=comparison.draws[:, kept],
        blocks=comparison.blocks[kept],
        clusters=comparison.clusters[kept],
    )


def _spread(
    residual: F64,
    middle: float,
    comparison: Comparison,
    outcome: OutcomeSpec,
    rng: np.random.Generator,
    count: int,
) -> Marginal:
    """Values around the control group's mean that vary as the residuals do."""
    clusters = len(np.unique(comparison.clusters))
    spare = max(1.0, clusters - len(np.unique(comparison.blocks)) - 1.0)
    deviations = np.sort(residual - residual.mean()) * math.sqrt(clusters / spare)
    low, high = possible_range(outcome)
    scale = np.sqrt(spare / rng.chisquare(spare, count))
    return Marginal(values=middle + deviations, low=low, high=high, scale=scale)


def intra_cluster(residual_N: F64, clusters_N: I64) -> float:
    """Correlation within clusters by analysis of variance, from 0 to 1; 0 if all are single.

    Source: Donner and Koval, "The Estimation of Intraclass Correlation in the Analysis of Family
    Data", Biometrics 1980.
    """
    _, number, size = np.unique(clusters_N, return_inverse=True, return_counts=True)
    n, k = len(residual_N), len(size)
    if n == k or k < 2:
        return 0.0
    mean = np.bincount(number, weights=residual_N) / size
    between = float((size * (mean - residual_N.mean()) ** 2).sum()) / (k - 1)
    within = float(((residual_N - mean[number]) ** 2).sum()) / (n - k)
    typical = (n - float((size**2).sum()) / n) / (k - 1)
    total = between + (typical - 1) * within
    return min(1.0, max(0.0, (between - within) / total)) if total > 0 else 0.0


def _within(values_N: F64, blocks_N: I64) -> F64:
    """Values less the mean of their block."""
    _, number, size = np.unique(blocks_N, return_inverse=True, return_counts=True)
    return np.asarray(values_N - (np.bincount(number, weights=values_N) / size)[number])


def _filled(values: F64) -> F64:
    finite = np.isfinite(values)
    return np.where(finite, values, values[finite].mean() if finite.any() else 0.0)


def _correlation(one: F64, other: F64) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 else 0.0


def _biserial(share: float) -> float:
    """How a normal value correlates with whether it exceeds the limit that this share does."""
    from scipy.stats import norm

    return float(norm.pdf(norm.ppf(share))) / math.sqrt(share * (1 - share))
