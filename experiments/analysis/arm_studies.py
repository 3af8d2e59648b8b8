"""Simulated studies of the test of all arms at once: how often an effect of one arm is found.

The arm is the one with the fewest units, where an effect is hardest to find; the others have none.

The statistic is that of `wald`, W = s' M^-1 s with scores s and their covariance M, for all studies
and repeated assignments at once: M is reduced by elimination, one arm after the other, each step on
arrays over assignments and studies (a square root free Cholesky decomposition; Golub and Van Loan,
"Matrix Computations", section 4.1.2).

Shapes: N units that take part, C their clusters, D repeated assignments (the first is the actual
one), S simulated outcomes, K arms with a dose, B blocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison
from motet.experiments.analysis.simulation import SIMULATIONS, Studies, StudyPart
from motet.experiments.analysis.wald import ROUNDING, TOLERANCE

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

CHUNK_CELLS = 1 << 18


class ArmStudies(Studies):
    """Studies in which one arm alone has an effect, and every arm is tested at once.

    Args:
        comparison: its score numbers the groups, as for `omnibus`.
        alone: float64 [arms], 1 for the arm with the effect.
        alpha, icc, correlation, key, covariate, simulations, draws: as for `Studies`.
    """

    def __init__(
        self,
        comparison: Comparison,
        alone: F64,
        alpha: float,
        icc: float = 1.0,
        correlation: float | None = None,
        key: int = 0,
        covariate: F64 | None = None,
        simulations: int = SIMULATIONS,
        draws: int | None = None,
    ) -> None:
        self.n_arms = int(comparison.score.max())
        one = replace(comparison, score=alone)
        more = (covariate, simulations, self.n_arms, draws)
        super().__init__(one, alpha, icc, correlation, key, *more)
        group = comparison.score.astype(np.int8)
        self.group_DC = [group[arms] for arms in self.arms_DC]

    def _of_part(self, residual_SN: F64, part: StudyPart, rows: slice) -> F64:
        """W of some rows of assignments, float64 [D, S]."""
        group_DC = self.group_DC[part.draws][rows]
        sums = _OutcomeSums(residual_SN, part.direction, self.starts, self.sizes_C, self.block_C)
        found = np.empty((len(group_DC), len(residual_SN)))
        step = max(1, CHUNK_CELLS // max(1, len(self.starts) * len(residual_SN)))
        for start in range(0, len(group_DC), step):
            chunk = slice(start, start + step)
            found[chunk] = sums.wald(group_DC[chunk], self.n_arms)
        return found


class _OutcomeSums:
    """Sums over each cluster's units of many outcomes' residuals, as in `wald`."""

    def __init__(
        self, residual_SN: F64, direction: F64 | None, starts: I64, sizes_C: F64, block_C: I64
    ) -> None:
        self.n_C, self.block_C, self.adjusted = sizes_C, block_C, direction is not None
        q = np.zeros(residual_SN.shape[1]) if direction is None else direction
        if self.adjusted:
            residual_SN = residual_SN - np.outer(residual_SN @ q, q)
        self.q_C, self.qq_C = (np.add.reduceat(x, starts) for x in (q, q * q))
        self.r_CS = np.add.reduceat(residual_SN, starts, axis=1).T.copy()
        self.qr_CS = np.add.reduceat(residual_SN * q, starts, axis=1).T.copy()
        self.scale = float(np.abs(self.r_CS).sum(axis=0).max(initial=0.0)) ** 2
        blocks = (block_C[:, None] == np.arange(int(block_C.max()) + 1)).astype(np.float64)
        self.adding_CB = blocks * sizes_C[:, None]

    def wald(self, group_DC: I8, n_arms: int) -> F64:
        """W of every assignment and outcome, float64 [D, S]."""
        z_DKC = (group_DC[:, None] == np.arange(1, n_arms + 1)[:, None]).astype(np.float64)
        mean_DKB = (z_DKC @ self.adding_CB) / self.adding_CB.sum(axis=0)
        w_DKC = z_DKC - mean_DKB[..., self.block_C]
        g_DK = z_DKC @ self.q_C
        xx = (w_DKC * self.n_C) @ w_DKC.transpose(0, 2, 1) - g_DK[:, :, None] * g_DK[:, None]
        inverse = np.linalg.pinv(xx, rcond=TOLERANCE, hermitian=True)
        s_DKS = z_DKC @ self.r_CS
        b_DKS = inverse @ s_DKS
        u_DCS = w_DKC.transpose(0, 2, 1) @ b_DKS
        t_DCS = None
        if self.adjusted:
            h_DS = np.einsum("dk,dks->ds", g_DK, b_DKS)[:, None]
            t_DCS = self.qr_CS - self.q_C[:, None] * u_DCS + self.qq_C[:, None] * h_DS
            u_DCS = self.q_C[:, None] * h_DS - self.n_C[:, None] * u_DCS
        else:
            u_DCS *= -self.n_C[:, None]
        u_DCS += self.r_CS
        return _eliminated(self._meat(w_DKC, g_DK, u_DCS, t_DCS), s_DKS, self.scale)

    def _meat(self, w_DKC: F64, g_DK: F64, u_DCS: F64, t_DCS: F64 | None) -> F64:
        """Covariance of the scores, its lower half row by row, float64 [D, K (K + 1) / 2, S].

        A cluster's score of arm k is w_k u - g_k t.
        """
        one, other = np.tril_indices(w_DKC.shape[1])
        left, right = w_DKC[:, one], w_DKC[:, other]
        found = (left * right) @ (u_DCS * u_DCS)
        if t_DCS is not None:
            g_left, g_right = g_DK[:, one, None], g_DK[:, other, None]
            found -= (g_left * right + g_right * left) @ (u_DCS * t_DCS)
            found += g_left * g_right * (t_DCS * t_DCS).sum(axis=1)[:, None]
        return np.asarray(found)


def _eliminated(meat: F64, s_DKS: F64, scale: float) -> F64:
    """s' M^-1 s from the lower half of M, float64 [D, S]; infinite where an effect has no spread to
    be compared to, as `WaldFit.wald` has it.
    """
    n_arms = s_DKS.shape[1]
    rows = [[meat[:, k * (k + 1) // 2 + j] for j in range(k + 1)] for k in range(n_arms)]
    left = [s_DKS[:, k] for k in range(n_arms)]
    size = sum((rows[k][k] for k in range(n_arms)), np.zeros_like(left[0]))
    least = ROUNDING * (size + n_arms * ROUNDING * scale)
    found = np.zeros_like(left[0])
    for k in range(n_arms):
        pivot, top = rows[k][k], left[k] ** 2
        top = np.where(top <= ROUNDING**2 * scale, 0.0, top)
        zero = pivot <= least
        safe = np.where(zero, 1.0, pivot)
        found += np.where(zero, np.where(top > 0, np.inf, 0.0), top / safe)
        for j in range(k + 1, n_arms):
            factor = np.where(zero, 0.0, rows[j][k] / safe)
            left[j] = left[j] - factor * left[k]
            for i in range(k + 1, j + 1):
                rows[j][i] = rows[j][i] - factor * rows[i][k]
    return found
