"""How small an effect a run like this one would have found, from what was measured.

Where `power` has to assume, this simulates with the measured share of the control group, or with
the measured residuals and their correlation within clusters. That these are estimates themselves is
simulated too: a share is drawn from its Jeffreys posterior (Brown, Cai and DasGupta, "Interval
Estimation for a Binomial Proportion", Statistical Science 2001), a variance from its own; else 80 %
would be less on average over runs.

Shapes: U units of the experiment, N those of the comparison with a value.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison, Estimate
from motet.experiments.analysis.power import possible_range
from motet.experiments.analysis.simulation import (
    Marginal,
    Studies,
    count_of,
    latent_correlation,
)
from motet.experiments.stream.random import name_key
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
MOST_CORRELATION = 0.95


def detectable(
    outcome: OutcomeSpec,
    values: F64,
    covariate: F64 | None,
    comparison: Comparison,
    found: Estimate,
    alpha: float,
    key: int,
    simulations: int,
) -> float | None:
    """The smallest effect that 4 of 5 runs like this one would have found, in the outcome's unit.

    Args:
        outcome: its possible range, and whether it is a share.
        values, covariate: float64 [U]; the covariate counts where `found` is adjusted for it.
        comparison: who is compared.
        found: the estimate.
        alpha: level of the test.
        key: of the simulation.
        simulations: how many studies.

    Returns:
        None where no possible effect would be found so often, or nothing could be estimated.
    """
    if found.effect is None:
        return None
    comparison = _with_values(comparison, values)
    simulations = count_of(simulations, len(comparison.units))
    x = covariate if found.adjusted else None
    rng = np.random.Generator(np.random.Philox(key=name_key(key, "measured")))
    y, score = values[comparison.units], comparison.score[comparison.arms]
    plain = _within(y - found.effect * score, comparison.blocks)
    correlation: float | None = None
    if x is not None:
        correlation = _correlation(plain, _within(_filled(x[comparison.units]), comparison.blocks))
    if outcome.binary:
        marginal, middle = _share(y[score == 0], comparison.clusters[score == 0], rng, simulations)
        icc = latent_correlation(intra_cluster(plain, comparison.clusters), middle)
        if correlation is not None:
            correlation /= _biserial(middle)
    else:
        marginal = _spread(plain, y[score == 0], comparison, outcome, rng, simulations)
        icc = intra_cluster(plain, comparison.clusters)
    if correlation is not None:
        correlation = max(-MOST_CORRELATION, min(MOST_CORRELATION, correlation))
    studies = Studies(
        comparison, alpha, icc, correlation, name_key(key, "detectable"), x, simulations
    )
    return studies.smallest(marginal)[0]


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


def _share(
    control: F64, clusters: I64, rng: np.random.Generator, count: int
) -> tuple[Marginal, float]:
    """Shares that the control group may have, and their mean; a cluster counts as one unit."""
    n = len(np.unique(clusters))
    ones = float(control.mean()) * n
    share = rng.beta(ones + 0.5, n - ones + 0.5, count)
    return Marginal(share=share), float(share.mean())


def _spread(
    residual: F64,
    control: F64,
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
    return Marginal(values=float(control.mean()) + deviations, low=low, high=high, scale=scale)


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
