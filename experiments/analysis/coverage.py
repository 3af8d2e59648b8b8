"""Where 95 % intervals are known to hold the true effect less often than they say.

Measured by `python bench/interval_coverage.py --setting SETTING` (controls, treated, clusters);
docs/decisions.md says what else was tried. Designs that are not listed are not all measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison, Estimate
from motet.experiments.analysis.shares import FEWEST_CLUSTERS, BlockShares

F64 = npt.NDArray[np.float64]

UNEQUAL = 2
FEWEST_OF_AN_ANSWER = 5
CLUSTERED_SHARES = 0.77
SHARES_NEAR_AN_END = ((24, 0.85), (40, 0.92))
FEW_TREATED = ((8, 0.9), (16, 0.91))
"""(smaller group below, share of intervals that hold the effect), the first that fits counts."""


def known_coverage(
    found: Estimate, values_U: F64, comparison: Comparison, binary: bool
) -> float | None:
    """The share of such intervals that hold the true effect, where it is known to be short.

    Args:
        found: the estimate with its interval.
        values_U: the outcome of all units.
        comparison: of scores 0 and 1; nothing is known of others.
        binary: whether the outcome is a share.
    """
    if found.low is None or not set(np.unique(comparison.score).tolist()) <= {0.0, 1.0}:
        return None
    groups = BlockShares.of(values_U, comparison)
    if groups is None or not found.standard_error:
        return None
    treated, control = int(groups.n_treated.sum()), int(groups.n_control.sum())
    smaller, larger = min(treated, control), max(treated, control)
    if larger < UNEQUAL * smaller:
        return None
    if not binary:
        return _first_below(FEW_TREATED, smaller) if treated < control else None
    if groups.fewest() >= FEWEST_OF_AN_ANSWER:
        return None
    if found.n > found.n_clusters:
        return CLUSTERED_SHARES if smaller < FEWEST_CLUSTERS * UNEQUAL else None
    return _first_below(SHARES_NEAR_AN_END, smaller) if smaller >= FEWEST_CLUSTERS else None


def _first_below(table: tuple[tuple[int, float], ...], smaller: int) -> float | None:
    return next((share for size, share in table if smaller < size), None)


def coverage_note(share: float) -> str:
    """The figure in words."""
    return f"in simulated designs of this size {share:.0%} of such intervals hold the true effect"
