"""Where 95 % intervals are known to hold the true effect less often than they say.

Measured by `python bench/interval_coverage.py --setting SETTING` (controls, treated, clusters);
docs/decisions.md says what else was tried. Designs that are not listed are not all measured.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from motet.core.format import percent
from motet.experiments.analysis.estimates import Comparison, Estimate
from motet.experiments.analysis.shares import FEWEST_CLUSTERS, BlockShares

F64 = npt.NDArray[np.float64]

UNEQUAL = 2
CLUSTERED_SHARES = ((24, 2, 0.79), (32, 2, 0.84))
EVEN_CLUSTERED_SHARES = (
    (7, 0, 0.95),
    (14, 2, 0.92),
    (18, 2, 0.89),
    (22, 2, 0.81),
    (36, 2, 0.77),
)
SHARES_NEAR_AN_END = ((24, 3, 0.86), (32, 3, 0.92), (40, 3, 0.94))
FEW_TREATED = ((6, math.inf, 0.91), (12, math.inf, 0.93))
"""(smaller group below, rarer answer below, share of intervals that hold the effect), in clusters;
the first row of the group's size counts. The share is that of the worst kind of outcome tried."""


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
    uneven, clustered = larger >= UNEQUAL * smaller, found.n > found.n_clusters
    rarer = groups.fewest()
    if binary and clustered:
        table = CLUSTERED_SHARES if uneven else EVEN_CLUSTERED_SHARES
        return _first_below(table, smaller, rarer)
    if not uneven:
        return None
    if not binary:
        return _first_below(FEW_TREATED, smaller, 0.0) if treated < control else None
    return _first_below(SHARES_NEAR_AN_END, smaller, rarer) if smaller >= FEWEST_CLUSTERS else None


def _first_below(
    table: tuple[tuple[int, float, float], ...], smaller: int, rarer: float
) -> float | None:
    fits = next(((fewest, share) for size, fewest, share in table if smaller < size), None)
    return fits[1] if fits is not None and rarer < fits[0] else None


def coverage_note(share: float) -> str:
    """The figure in words."""
    return (
        f"in simulated designs of this size as few as {percent(share)} of such intervals hold the "
        "true effect"
    )
