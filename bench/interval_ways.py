"""Other statistics to invert than the one that is used, for `bench/interval_coverage.py`.

Each differs in what the coefficient is divided by, in the actual assignment and in every repeated
one alike. One block, no covariate, clusters that share their arm.

Shapes: U units, C clusters, D draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from motet.experiments.analysis.estimates import Comparison, Estimate, interval
from motet.experiments.analysis.sums import DrawTerms

Array = np.ndarray

TRIED = ("HC2", "HC3", "under the hypothesis", "pooled t")


@dataclass(frozen=True)
class TriedTerms(DrawTerms):
    """Sums of a draw whose actual assignment's error may depend on the effect assumed.

    pp - 2 tau ps + tau^2 ss of the actual assignment: `actual`.
    """

    actual: tuple[float, float, float]

    def observed_squared_t(self, tau: float) -> float:
        a, m, _ = (np.array([x]) for x in self.observed)
        pp, ps, ss = self.actual
        bottom = np.array([pp - 2 * tau * ps + tau**2 * ss])
        return float(self._squared(tau, a - tau, m, bottom)[0])


def terms_by(way: str, y: Array, comparison: Comparison) -> TriedTerms:
    """The sums of one way's statistic. y: float64 [U], in the order of ascending clusters."""
    residual = y - y.mean()
    scores = comparison.score[np.vstack([comparison.arms, comparison.draws])]
    treated_DU = scores - scores.mean(axis=1, keepdims=True)
    actual = treated_DU[0]
    starts = np.flatnonzero(np.diff(comparison.clusters, prepend=-1))
    m = (treated_DU**2).sum(axis=1)
    a, b = treated_DU @ residual / m, treated_DU @ actual / m
    along, across, square = (
        np.add.reduceat(treated_DU * x, starts, axis=1) for x in (residual, actual, treated_DU)
    )
    if way != "under the hypothesis":
        along, across = along - a[:, None] * square, across - b[:, None] * square
    if way in ("HC2", "HC3"):
        # Units of a cluster share z: its block of the hat matrix is a constant, so that its power
        # is one factor for the cluster (Bell and McCaffrey, "Bias Reduction in Standard Errors for
        # Linear Regression with Multi-Stage Samples", Survey Methodology 2002).
        sizes = np.diff(np.append(starts, len(y)))
        free = 1 - sizes / len(y) - square / m[:, None]
        factor = np.maximum(free, 1e-9) ** (-0.5 if way == "HC2" else -1.0)
        along, across = along * factor, across * factor
    pp, ps, ss = (
        np.einsum("dc,dc->d", left, right)
        for left, right in ((along, along), (along, across), (across, across))
    )
    if way == "pooled t":
        left = residual - a[:, None] * treated_DU
        right = actual - b[:, None] * treated_DU
        pp, ps, ss = (
            m * np.einsum("du,du->d", x, z) / len(residual)
            for x, z in ((left, left), (left, right), (right, right))
        )
    lengths = (float(np.linalg.norm(residual)), float(np.linalg.norm(actual)))
    rest = [x[1:] for x in (a, b, m, pp, ps, ss)]
    first = (float(a[0]), float(m[0]), float(pp[0]))
    return TriedTerms(*rest, first, lengths, (float(pp[0]), float(ps[0]), float(ss[0])))


def estimate_by(way: str, y: Array, comparison: Comparison, alpha: float) -> Estimate:
    """Effect, interval and p when one of `TRIED` is inverted; one block, no value missing."""
    terms = terms_by(way, y, comparison)
    effect, m, pp = terms.observed
    n_clusters = len(np.unique(comparison.clusters))
    nothing = Estimate(effect, None, None, 1.0, len(y), n_clusters, 0, None, None, False)
    groups = [y[comparison.arms == arm] for arm in (0, 1)]
    if pp <= 0 or max(float(np.ptp(group)) for group in groups) == 0:
        return nothing if np.ptp(y) == 0 else replace(nothing, p=terms.p(0.0), standard_error=0.0)
    low, high = interval(terms, alpha)
    return replace(nothing, low=low, high=high, p=terms.p(0.0), standard_error=math.sqrt(pp) / m)
