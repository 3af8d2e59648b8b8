"""What outcomes of units look like without an effect, as far as simulated studies need it.

Shapes: N units that take part, S simulated outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

LARGEST_SHIFT = 1000.0


@dataclass(frozen=True)
class Marginal:
    """What the outcome of a unit without treatment looks like, and where it can go.

    share: of ones, for an outcome that is 0 or 1; float64 [S] when it is uncertain. values: else
    equally likely values, ascending; None is the standard normal distribution. low, high: the
    possible range; an outcome that an effect would move out of it stops there. scale: float64 [S]
    or 1, factor on the distance of `values` from their mean.
    """

    share: float | F64 | None = None
    values: F64 | None = None
    low: float = -math.inf
    high: float = math.inf
    scale: float | F64 = 1.0

    @property
    def largest(self) -> float:
        """The largest effect that is possible, on the mean."""
        if self.share is not None:
            return 1.0 - float(np.mean(self.share))
        if math.isfinite(self.high) and self.values is not None:
            return self.high - float(self.values.mean())
        return LARGEST_SHIFT * self._spread()

    def _spread(self) -> float:
        return 1.0 if self.values is None else float(self.values.std()) or 1.0

    def outcomes(self, latent_SN: F64, shift_N: F64) -> F64:
        """Outcomes, float64 [S, N], of standard normal latent values after a shift.

        The shift of a share is an effect on the share; of other outcomes it comes before the stop
        at the end of the range (`effect_of` says what it does to the mean).
        """
        from scipy.special import ndtr, ndtri

        if self.share is not None:
            share = np.reshape(self.share, (-1, 1)) + shift_N
            return (latent_SN > -ndtri(np.clip(share, 0.0, 1.0))).astype(np.float64)
        if self.values is None:
            return latent_SN * np.reshape(self.scale, (-1, 1)) + shift_N
        count = len(self.values)
        place = np.minimum((ndtr(latent_SN) * count).astype(np.int64), count - 1)
        middle = self.values.mean()
        spread = (self.values - middle)[place] * np.reshape(self.scale, (-1, 1))
        return np.clip(middle + spread + shift_N, self.low, self.high)

    def effect_of(self, shift: float) -> float:
        """The effect on the mean that a shift makes."""
        if self.share is not None or self.values is None:
            return shift
        moved = np.clip(self.values + shift, self.low, self.high)
        return float(moved.mean() - self.values.mean())

    def largest_shift(self) -> float:
        """The shift that makes the largest effect."""
        if self.share is None and self.values is not None and math.isfinite(self.high):
            return self.high - float(self.values.min())
        return self.largest


def latent_correlation(observed: float, share: float) -> float:
    """The correlation of two normal values whose excesses of a threshold correlate as observed.

    share: how often each exceeds it. Two outcomes of 0 or 1 agree less than what lies behind them
    does; inverted on a grid of 33 correlations.
    """
    from scipy.special import ndtr, ndtri

    if observed <= 0 or observed >= 1 or not 0 < share < 1:
        return min(1.0, max(0.0, observed))
    grid = np.linspace(0, 1, 33)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    limit = float(ndtri(share))
    inner = (limit + np.sqrt(grid[:-1, None]) * nodes) / np.sqrt(1 - grid[:-1, None])
    both = np.append((ndtr(inner) ** 2) @ weights, share)
    seen = (both - share**2) / (share * (1 - share))
    return float(np.interp(observed, np.maximum.accumulate(seen), grid))
