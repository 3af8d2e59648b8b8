"""Do the arms differ at all? Every arm with a dose against dose 0 in one test, then arm by arm.

A comparison of any dose with none is blind to effects that change sign with the dose. Here each arm
has its own coefficient, in the regression that `estimates` describes (block fixed effects, one
covariate, cluster-robust HC0 covariance), and the statistic is their Wald form

    W = b' V^-1 b,

whose null distribution comes from repeating the assignment. Under the sharp null (no unit's outcome
depends on its arm) p is exact in any sample size; because W is studentized, its limit does not
depend on how much the arms' variances differ, so in large samples it also keeps its level when only
the averages of the arms are equal (Chung and Romano, "Multivariate and multiple permutation tests",
Journal of Econometrics 2016; Wu and Ding, JASA 2021, section 4: X^2).

Effects per arm have simultaneous intervals, b +- c s, where c is the quantile of the largest
studentized coefficient over arms when the assignment is repeated and the estimated effects are
taken away (max-t; Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2.3). The
p-value of an arm is that of the same maximum without any effect.

Shapes: U units, C clusters, B blocks, D draws, K arms with a dose, L = K + 1 groups.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import (
    POWER,
    ArmEffect,
    Comparison,
    Estimate,
    projection_of,
)
from motet.experiments.analysis.sums import share_as_extreme
from motet.experiments.analysis.wald import (
    TOLERANCE,
    ClusterSums,
    DrawnGroups,
    WaldFit,
    fit_by_cluster,
    statistics,
)

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]


def omnibus(
    outcome_U: F64,
    covariate_U: F64 | None,
    comparison: Comparison,
    alpha: float = 0.05,
    detect_alpha: float | None = None,
) -> Estimate:
    """Test all arms against the control at once.

    Args:
        outcome_U: float64, values of all units; units whose outcome is not finite are dropped.
        covariate_U: float64, or None.
        comparison: its `score` numbers the groups: 0 is the control, 1 ... K are the arms.
        alpha: 1 - simultaneous confidence of the intervals per arm.
        detect_alpha: level of the test whose smallest detectable effect is wanted.

    Returns:
        An estimate without an effect of its own, with `arms`. Its smallest detectable effect is
        that of any single arm, the others having none: the arm where it is hardest to find counts.
    """
    order = comparison.measured(outcome_U)
    clusters = comparison.clusters[order]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    facts = (len(order), len(starts), len(comparison.units) - len(order))
    group = comparison.score.astype(np.int8)
    actual = group[comparison.arms[order[starts]]]
    n_arms = int(group.max())
    absent = sorted(set(range(n_arms + 1)) - set(actual.tolist()))
    if absent:
        return _nothing(facts, "an arm has no unit with a value")
    _, block = np.unique(comparison.blocks[order], return_inverse=True)
    covariate = None if covariate_U is None else covariate_U[comparison.units][order]
    projection = projection_of(block, covariate, len(starts), n_arms)
    y = outcome_U[comparison.units][order]
    residual = projection.residual(projection.residual(y))  # twice, as in `estimate`
    if float(np.abs(residual).max()) <= TOLERANCE * max(float(np.abs(y).max()), 1e-300):
        alike = tuple(ArmEffect(k + 1, 0.0, None, None, 1.0) for k in range(n_arms))
        why = "the outcome does not vary between units within a block"
        return replace(_nothing(facts, why), arms=alike)
    sums = ClusterSums.of(residual, projection.covariate, block, starts)
    draws = DrawnGroups(comparison.draws, order[starts], group, n_arms)
    return _infer(sums, actual, draws, facts, alpha, detect_alpha or alpha)


def _nothing(facts: tuple[int, int, int], why: str) -> Estimate:
    return Estimate(None, None, None, 1.0, *facts, None, None, False, why)


def _infer(
    sums: ClusterSums,
    actual: I8,
    draws: DrawnGroups,
    facts: tuple[int, int, int],
    alpha: float,
    detect_alpha: float,
) -> Estimate:
    fit, residual = fit_by_cluster(sums, actual[None], draws.n_arms)
    observed, squared = float(fit.wald()[0]), fit.squared_t()[0]
    wald, largest = statistics(sums, draws)
    p, least = (
        share_as_extreme(wald, observed),
        share_as_extreme(wald, max(float(wald.max()), observed)),
    )
    errors = np.sqrt(np.where(np.isfinite(squared), fit.variance()[0], 0.0))
    reach, detectable, note = math.inf, None, ""
    if np.all(errors > 0):
        wald_left, largest_left = statistics(sums.without(residual), draws)
        reach = math.sqrt(float(np.quantile(largest_left, 1 - alpha, method="higher")))
        critical = float(np.quantile(wald_left, 1 - detect_alpha, method="higher"))
        detectable = _detectable(fit, critical)
        if not math.isfinite(reach):
            note = "the design is too small for intervals"
    else:
        note = "an arm has one value only: there is no spread to make intervals from"
    arms = []
    for k in range(draws.n_arms):
        effect, half = float(fit.b[0, k]), reach * float(errors[k])
        low, high = (effect - half, effect + half) if math.isfinite(half) else (None, None)
        arms.append(
            ArmEffect(k + 1, effect, low, high, share_as_extreme(largest, float(squared[k])))
        )
    return Estimate(
        None, None, None, p, *facts, None, detectable, sums.adjusted, note, least, tuple(arms)
    )


def _detectable(fit: WaldFit, critical: float) -> float | None:
    """The effect of one arm alone that W exceeds `critical` for in 80 % of runs, for the arm where
    that is largest.

    W is then noncentral chi-squared with d^2 (V^-1)_kk. The variance is taken to be the same in
    all arms here, as the largest of several uncertain figures would be too large on average.
    """
    if not math.isfinite(critical):
        return None
    from scipy.optimize import brentq
    from scipy.stats import ncx2

    n_arms = fit.b.shape[1]

    def lacking(noncentrality: float) -> float:
        return float(ncx2.sf(critical, n_arms, noncentrality)) - POWER

    top = 4 * (critical + 10)
    noncentrality = brentq(lacking, 1e-9, top) if lacking(1e-9) < 0 else 0.0
    variance = float(np.trace(fit.inverse[0] @ fit.meat[0])) / n_arms
    precision = np.diag(np.linalg.pinv(fit.inverse[0], hermitian=True)) / variance
    least = float(precision.min())
    return math.sqrt(noncentrality / least) if least > 0 else None
