"""Simulated studies of the test of all arms at once: how often an effect of one arm is found.

The arm is the one with the fewest units, where an effect is hardest to find; the others have none.

Shapes: N units that take part, C their clusters, D repeated assignments (the first is the actual
one), S simulated outcomes, K arms with a dose.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison
from motet.experiments.analysis.simulation import Studies, repetitions
from motet.experiments.analysis.wald import TOLERANCE, WaldFit

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

SIMULATIONS = 400


class ArmStudies(Studies):
    """Studies in which one arm alone has an effect, and every arm is tested at once.

    Args:
        comparison: its score numbers the groups, as for `omnibus`.
        alone: float64 [arms], 1 for the arm with the effect.
        alpha, icc, correlation, key, simulations: as for `Studies`.
    """

    def __init__(
        self,
        comparison: Comparison,
        alone: F64,
        alpha: float,
        icc: float = 1.0,
        correlation: float | None = None,
        key: int = 0,
        simulations: int | None = None,
    ) -> None:
        n_arms = int(comparison.score.max())
        one = replace(comparison, score=alone)
        count = simulations or SIMULATIONS
        super().__init__(one, alpha, icc, correlation, key, None, count, n_arms)
        ordered = self.comparison
        draws = ordered.draws[: repetitions(alpha)][:, self.starts]
        arms_DC = np.concatenate([ordered.arms[self.starts][None], draws])
        self.group_DC = comparison.score.astype(np.int8)[arms_DC]
        self.n_arms = n_arms
        _, self.block_C = np.unique(ordered.blocks[self.starts], return_inverse=True)

    def _statistics(self, outcomes_SN: F64, rows: slice = slice(None)) -> F64:
        """W of some rows of assignments, float64 [D, S]."""
        residual_SN = self._less_block_means(outcomes_SN)
        groups = self.group_DC[rows]
        found = np.empty((len(groups), len(outcomes_SN)))
        for part, direction in self.groups:
            sums = _OutcomeSums(residual_SN[part], direction, self.starts, self.sizes_C)
            for row, group_C in enumerate(groups):
                found[row, part] = sums.wald(group_C, self.block_C, self.n_arms)
        return found


class _OutcomeSums:
    """Sums over each cluster's units of many outcomes' residuals, as in `wald`."""

    def __init__(self, residual_SN: F64, direction: F64 | None, starts: I64, sizes_C: F64) -> None:
        self.n = sizes_C[:, None]
        q = np.zeros(residual_SN.shape[1]) if direction is None else direction
        residual_SN = residual_SN - np.outer(residual_SN @ q, q)
        self.q, self.qq = (np.add.reduceat(x, starts)[:, None] for x in (q, q * q))
        self.r = np.add.reduceat(residual_SN, starts, axis=1).T.copy()
        self.qr = np.add.reduceat(residual_SN * q, starts, axis=1).T.copy()
        self.scale = float(np.abs(self.r).sum(axis=0).max(initial=0.0)) ** 2

    def wald(self, group_C: npt.NDArray[np.int8], block_C: I64, n_arms: int) -> F64:
        """W of every outcome for one assignment, float64 [S]."""
        z = (group_C[:, None] == np.arange(1, n_arms + 1)).astype(np.float64)
        size = np.bincount(block_C, weights=self.n[:, 0])
        mean = np.stack([np.bincount(block_C, weights=x) for x in (z * self.n).T], axis=1)
        w = z - (mean / size[:, None])[block_C]
        g = (self.q * z).sum(axis=0)
        xx = w.T @ (self.n * w) - np.outer(g, g)
        inverse = np.linalg.pinv(xx, rcond=TOLERANCE, hermitian=True)
        s = self.r.T @ z
        b = s @ inverse
        v, h = w @ b.T, b @ g
        u = self.r - self.n * v + self.q * h
        t = self.qr - self.q * v + self.qq * h
        one, other = np.triu_indices(n_arms)
        found = (w[:, one] * w[:, other]).T @ (u * u)
        found -= (g[one] * w[:, other] + g[other] * w[:, one]).T @ (u * t)
        found += np.outer(g[one] * g[other], (t * t).sum(axis=0))
        meat = np.empty((len(s), n_arms, n_arms))
        meat[:, one, other] = meat[:, other, one] = found.T
        every = np.broadcast_to(inverse, meat.shape)
        return WaldFit(b, s, meat, every, (u * u).sum(axis=0), self.scale).wald()
