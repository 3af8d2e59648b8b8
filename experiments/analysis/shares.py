"""Intervals inside what is possible, of shares and of other outcomes whose range is known; and
intervals of shares where no unit differs within its group.

Shapes: U units that take part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison, Estimate

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

AGREE = 1e-9
FEWEST_CLUSTERS = 16
"""A smaller group tells too little of its own spread to leave the interval to the inverted test
alone: docs/decisions.md says what was measured."""


@dataclass(frozen=True)
class BlockShares:
    """Treated (score 1) and control (score 0) units by block, of blocks that hold both.

    weights: n1 n0 / (n1 + n0), adding up to 1: those of a regression with block fixed effects.
    part: share of treated units. treated, control: mean outcome. n_treated, n_control: clusters.
    All float64 [blocks].
    """

    weights: F64
    part: F64
    treated: F64
    control: F64
    n_treated: F64
    n_control: F64

    @classmethod
    def of(cls, values_U: F64, comparison: Comparison) -> BlockShares | None:
        score, y = comparison.score[comparison.arms], values_U[comparison.units]
        kept = np.isfinite(y)
        rows = []
        for block in np.unique(comparison.blocks[kept]):
            groups = [kept & (comparison.blocks == block) & (score == value) for value in (1, 0)]
            if all(group.any() for group in groups):
                n1, n0 = (int(group.sum()) for group in groups)
                means = [float(y[group].mean()) for group in groups]
                clusters = [len(np.unique(comparison.clusters[group])) for group in groups]
                rows.append((n1 * n0 / (n1 + n0), n1 / (n1 + n0), *means, *clusters))
        if not rows:
            return None
        columns = np.array(rows, dtype=np.float64).T
        columns[0] /= columns[0].sum()
        return cls(*columns)

    def difference(self) -> float:
        return float(self.weights @ (self.treated - self.control))

    def smaller_group(self) -> int:
        """Clusters in the smaller of the two groups."""
        return int(min(self.n_treated.sum(), self.n_control.sum()))

    def fewest(self) -> float:
        """The rarer answer's clusters, in the group that has fewest of it."""
        groups = ((self.treated, self.n_treated), (self.control, self.n_control))
        return float(min(min(n @ share, n @ (1 - share)) for share, n in groups))

    def possible(self) -> tuple[float, float]:
        """The smallest and the largest mean effect that the outcomes seen allow.

        Half of the potential outcomes are seen; each of the others is a share between 0 and 1
        (Manski, "Nonparametric Bounds on Treatment Effects", American Economic Review 1990).
        """
        part, t, c = self.part, self.treated, self.control
        low = part * (t - 1) - (1 - part) * c
        high = part * t + (1 - part) * (1 - c)
        return float(self.weights @ low), float(self.weights @ high)

    def newcombe(self, alpha: float) -> tuple[float, float]:
        """Newcombe's interval with shares weighted over blocks.

        Wilson's interval of each group's weighted share, at the number of clusters that has the
        same variance, and the two combined (Yan and Su, "Stratified Wilson and Newcombe Confidence
        Intervals for Multiple Binomial Proportions", Statistics in Biopharmaceutical Research,
        2010). It always holds the weighted difference.
        """
        from statsmodels.stats.proportion import proportion_confint

        ends = []
        for share, n in ((self.treated, self.n_treated), (self.control, self.n_control)):
            mean = float(self.weights @ share)
            size = 1.0 / float(np.sum(self.weights**2 / n))
            low, high = proportion_confint(mean * size, size, alpha, method="wilson")
            ends.append((mean, float(low), float(high)))
        (t, t_low, t_high), (c, c_low, c_high) = ends
        return (
            t - c - math.hypot(t - t_low, c_high - c),
            t - c + math.hypot(t_high - t, c - c_low),
        )


def share_interval(
    found: Estimate, values_U: F64, comparison: Comparison, alpha: float
) -> Estimate:
    """An estimate of a difference of shares with an interval that can be true.

    Args:
        found: the estimate, whose interval inverts the test and knows no bounds.
        values_U: the outcome of all units, each between 0 and 1.
        comparison: what was compared; other scores than 0 and 1 leave the estimate as it is.
        alpha: 1 - confidence.

    With fewer than 16 units in a group, none in clusters, it is the hull with Newcombe's interval
    over blocks: the inverted test knows a group's spread from these few only, and misses the true
    effect too often when they happen to agree. Where no unit differs within its group there is
    nothing to invert: Newcombe's interval then, unless it contradicts the test (it excludes 0 and
    the test does not reject, or the other way round).
    """
    if found.effect is None or not set(np.unique(comparison.score).tolist()) <= {0.0, 1.0}:
        return found
    strata = BlockShares.of(values_U, comparison)
    if strata is None:
        return found
    low, high, note = found.low, found.high, found.note
    alone = low is None and not found.standard_error and found.n_clusters > 1
    if alone and abs(strata.difference() - found.effect) <= AGREE:
        low, high = strata.newcombe(alpha)
        if (low <= 0 <= high) != (found.p > alpha):
            what = ("rejects", "hold") if found.p <= alpha else ("does not reject", "exclude")
            note = "no interval: no unit differs within its group, and with so few units the test "
            return replace(found, note=f"{note}{what[0]} 0, which an interval would {what[1]}")
        note = "interval by Newcombe's method over blocks, as no unit differs within its group"
    if low is None or high is None:
        return found
    single = found.n == found.n_clusters  # a cluster is more than one observation
    if not alone and single and strata.smaller_group() < FEWEST_CLUSTERS:
        low, high = _wider((low, high), strata.newcombe(alpha), found.p <= alpha)
    effect = min(max(found.effect, -1.0), 1.0)
    low, high = _held((low, high), effect, strata.possible())
    return replace(found, effect=effect, low=max(low, -1.0), high=min(high, 1.0), note=note)


def within_range(
    found: Estimate, values_U: F64, comparison: Comparison, ends: tuple[float | None, float | None]
) -> Estimate:
    """An estimate of a difference of means whose interval stays inside what the outcomes seen leave
    possible: each one that was not seen lies in the same range.

    Args:
        found: the estimate, whose interval inverts the test and knows no bounds.
        values_U: the outcome of all units.
        comparison: what was compared; other scores than 0 and 1 leave the estimate as it is.
        ends: of the range; None is no end, and leaves it too. So do values beyond an end: a class
            of the user's own may be wrong about its range.
    """
    if found.effect is None or found.low is None or found.high is None or None in ends:
        return found
    if not set(np.unique(comparison.score).tolist()) <= {0.0, 1.0}:
        return found
    bottom, top = (float(end) for end in ends if end is not None)
    places = (values_U - bottom) / (top - bottom)
    strata = BlockShares.of(places, comparison)
    if strata is None or np.any((places < -AGREE) | (places > 1 + AGREE)):
        return found
    least, most = ((top - bottom) * end for end in strata.possible())
    low, high = _held((found.low, found.high), found.effect, (least, most))
    return replace(found, low=low, high=high)


def _held(
    ends: tuple[float, float], effect: float, possible: tuple[float, float]
) -> tuple[float, float]:
    """An interval no further than what is possible, and never without its own effect."""
    return min(max(ends[0], possible[0]), effect), max(min(ends[1], possible[1]), effect)


def _wider(
    inverted: tuple[float, float], newcombe: tuple[float, float], rejected: bool
) -> tuple[float, float]:
    """The hull of both; where the test rejects 0, an end that would pass 0 stays where it is."""
    low, high = min(inverted[0], newcombe[0]), max(inverted[1], newcombe[1])
    if rejected and low <= 0 <= high:
        return (inverted[0], high) if inverted[0] > 0 else (low, inverted[1])
    return low, high


def within(found: Estimate, most: float) -> Estimate:
    """An estimate whose intervals, and those of its arms, hold no effect larger than `most`, in
    either direction, unless it was seen.
    """
    arms = tuple(
        replace(one, low=cut(one.low, one.effect, most), high=cut(one.high, one.effect, most))
        for one in found.arms
    )
    ends = (cut(found.low, found.effect, most), cut(found.high, found.effect, most))
    return replace(found, low=ends[0], high=ends[1], arms=arms)


def cut(end: float | None, effect: float | None, most: float) -> float | None:
    """An end of an interval no further from 0 than `most`, or than the effect itself."""
    if end is None or effect is None:
        return end
    furthest = max(most, abs(effect))
    return min(max(end, -furthest), furthest)
