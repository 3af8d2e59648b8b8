"""Simulated studies: how often the run's own test finds an effect of a given size.

The actual assignment, its blocks and clusters, and its repetitions are the real ones; only outcomes
are drawn. The test is that of `estimates` for many outcomes at once: when the treatment is the same
for all units of a cluster, each sum over clusters that a studentized statistic needs is a matrix
product over (draws, clusters) x (clusters, outcomes).

Shapes: N units that take part, C their clusters, D repeated assignments (the first row of a matrix
of treatments is the actual one), S simulated outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import POWER, Comparison, spares_a_covariate
from motet.experiments.analysis.marginals import Marginal
from motet.experiments.analysis.sums import TOLERANCE, least_as_extreme

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

SIMULATIONS = 600
OF_SHARES = 2.5
"""Outcomes of 0 or 1 get so many times as many studies: the effect is solved for among few values,
so that chance moves it further."""
MOST_CELLS = 4_000_000
"""Simulated values that are kept at once; a larger design is simulated less often."""
FEWEST_SIMULATIONS = 400
REPETITIONS_AT_ALPHA = 10
"""Repeated assignments are so many that this number of them lies at or beyond alpha: with fewer the
test itself would lose power (Davidson and MacKinnon, Econometric Reviews 19, 2000)."""
FEWEST_PARTS, MOST_PARTS = 10, 50
"""Studies fall into so many parts, each with repeated assignments of its own (and a covariate): one
set for all moves what must be exceeded in all studies alike, and power by up to 4 points. Small
designs, in which single assignments and covariates count most, have most parts."""
FEWEST_OF_PART = 12
MOST_DRAWN = 12_000_000
"""Arms of units in all repeated assignments together; larger designs have fewer sets."""
CHUNK_CELLS = 1 << 16
CLOSE, NEAR = 0.006, 0.02
MOST_ROUNDS = 5


def repetitions(alpha: float) -> int:
    """How often the assignment is repeated to judge one simulated outcome."""
    return math.ceil(REPETITIONS_AT_ALPHA / alpha)


def parts_of(simulations: int, n_clusters: int) -> int:
    """How many parts studies fall into."""
    wanted = max(FEWEST_PARTS, simulations // max(1, n_clusters))
    return max(1, min(MOST_PARTS, wanted, simulations // FEWEST_OF_PART))


def repetitions_in_all(
    alpha: float, draws: int, n_units: int, n_clusters: int, simulations: int
) -> int:
    """How many repeated assignments all parts need, where the analysis makes so many draws."""
    each = min(draws, repetitions(alpha))
    parts = parts_of(count_of(simulations, n_units), n_clusters)
    return each * max(1, min(parts, MOST_DRAWN // max(1, each * n_units)))


def enough(binary: bool) -> int:
    """How many studies are simulated unless somebody asks for another number."""
    return round(SIMULATIONS * (OF_SHARES if binary else 1.0))


def count_of(simulations: int, n_units: int) -> int:
    """How many studies there is room for."""
    return min(simulations, max(FEWEST_SIMULATIONS, MOST_CELLS // max(1, n_units)))


@dataclass(frozen=True)
class StudyPart:
    """Studies that share their repeated assignments and their covariate.

    rows: which studies. draws: the number of the set of assignments. direction: of the covariate,
    less block means and of length 1, float64 [N], or None.
    """

    rows: slice
    draws: int
    direction: F64 | None = None


class Studies:
    """Simulated outcomes of one comparison, and the test on all of them.

    Args:
        comparison: who is compared, and how the assignment is repeated.
        alpha: level of the test.
        icc: correlation of the latent outcomes of two units of a cluster.
        correlation: of latent outcome and covariate; None = no covariate is adjusted for.
        key: of the simulation; equal keys give equal outcomes, whatever the effect.
        covariate: float64 [N], the measured one; None = it is simulated too.
        simulations: how many outcomes.
        n_effects: that the test estimates beside the covariate.
        draws: how many repeated assignments the analysis makes; None = all of the comparison's.
    """

    def __init__(
        self,
        comparison: Comparison,
        alpha: float,
        icc: float = 1.0,
        correlation: float | None = None,
        key: int = 0,
        covariate: F64 | None = None,
        simulations: int = SIMULATIONS,
        n_effects: int = 1,
        draws: int | None = None,
    ) -> None:
        self.comparison = comparison = _by_cluster(comparison)
        self.alpha = alpha
        self.treatment_N = comparison.score[comparison.arms]
        self.starts = np.flatnonzero(np.diff(comparison.clusters, prepend=-1))
        self.sizes_C = np.diff(np.append(self.starts, len(comparison.units))).astype(np.float64)
        _, self.block_C = np.unique(comparison.blocks[self.starts], return_inverse=True)
        rng = np.random.Generator(np.random.Philox(key=key))
        self.count = count_of(simulations, len(comparison.units))
        self.arms_DC = self._sets_of_arms(len(comparison.draws) if draws is None else draws)
        self.within_DC = [self._treatments(arms) for arms in self.arms_DC]
        self.latent_SN = self._latent(rng, icc, self.count)
        edges = (
            np.linspace(0, self.count, parts_of(self.count, len(self.starts)) + 1)
            .astype(int)
            .tolist()
        )
        self.parts = [
            StudyPart(slice(start, stop), number % len(self.arms_DC))
            for number, (start, stop) in enumerate(pairwise(edges))
            if stop > start
        ]
        blocks = len(np.unique(comparison.blocks))
        spared = spares_a_covariate(len(self.starts), blocks, n_effects)
        if correlation is not None and spared:
            self.parts = self._adjusted(rng, icc, correlation, covariate)

    def _sets_of_arms(self, draws: int) -> list[I8]:
        """Arms of the clusters, int8 [D, C], the actual ones first, for every set of draws."""
        comparison, starts = self.comparison, self.starts
        each = min(draws, len(comparison.draws), repetitions(self.alpha))
        most = parts_of(self.count, len(starts))
        sets = max(1, min(most, len(comparison.draws) // max(1, each)))
        actual = comparison.arms[starts].astype(np.int8)[None]
        rows = [comparison.draws[n * each : (n + 1) * each] for n in range(sets)]
        return [np.concatenate([actual, drawn[:, starts]]) for drawn in rows]

    def _treatments(self, arms_DC: I8) -> F64:
        """Treatment of every cluster less its block's mean, float64 [D, C].

        A draw whose treatment does not vary within blocks can only raise p, as in `estimates`.
        """
        scores, block = self.comparison.score[arms_DC], self.block_C
        order = np.argsort(block, kind="stable")
        first = np.flatnonzero(np.diff(block[order], prepend=-1))
        total = np.add.reduceat((scores * self.sizes_C)[:, order], first, axis=1)
        mean = total / np.add.reduceat(self.sizes_C[order], first)
        return np.asarray(scores - mean[:, block], dtype=np.float64)

    def _latent(self, rng: np.random.Generator, icc: float, rows: int) -> F64:
        """Standard normal values, float64 [rows, N], alike within clusters."""
        shared = rng.normal(size=(rows, len(self.starts)))
        shared = np.repeat(shared, self.sizes_C.astype(np.int64), axis=1)
        own = rng.normal(size=(rows, len(self.comparison.units)))
        return np.asarray(math.sqrt(icc) * shared + math.sqrt(1 - icc) * own)

    def _adjusted(
        self, rng: np.random.Generator, icc: float, correlation: float, covariate: F64 | None
    ) -> list[StudyPart]:
        """Mix covariates into the latent values, one for each part unless one was measured."""
        columns = self._latent(rng, icc, len(self.parts))
        if covariate is not None:
            columns[:] = _standard(covariate[self.comparison.units])
        parts = []
        for part, column in zip(self.parts, columns, strict=True):
            own = math.sqrt(1 - correlation**2) * self.latent_SN[part.rows]
            self.latent_SN[part.rows] = correlation * column + own
            rest = self._less_block_means(column[None])[0]
            length = float(np.linalg.norm(rest))
            parts.append(replace(part, direction=rest / length if length > 0 else None))
        return parts

    def _less_block_means(self, values_SN: F64) -> F64:
        _, block = np.unique(self.comparison.blocks, return_inverse=True)
        order = np.argsort(block, kind="stable")
        first = np.flatnonzero(np.diff(block[order], prepend=-1))
        total = np.add.reduceat(values_SN[:, order], first, axis=1)
        return np.asarray(values_SN - (total / np.bincount(block))[:, block])

    def p(self, marginal: Marginal, shift: float) -> F64:
        """p-value of every simulated study, float64 [S]."""
        squared_DS = self._statistics(self.outcomes(marginal, shift))
        extreme = (squared_DS[1:] >= least_as_extreme(squared_DS[0])).sum(axis=0)
        return np.asarray((1 + extreme) / len(squared_DS), dtype=np.float64)

    def outcomes(self, marginal: Marginal, shift: float) -> F64:
        """Simulated outcomes, float64 [S, N], units in the order of `comparison`."""
        return marginal.outcomes(self.latent_SN, shift * self.treatment_N)

    def _critical(self, marginal: Marginal, shift: float) -> tuple[F64, F64]:
        """(actual squared statistic, the one above which it would be found), float64 [S] each."""
        squared_DS = self._statistics(self.outcomes(marginal, shift))
        rank = math.floor(self.alpha * len(squared_DS) + 1e-9)
        if rank < 1:
            return squared_DS[0], np.full(self.count, np.inf)
        place = len(squared_DS) - 1 - rank
        return squared_DS[0], np.partition(squared_DS[1:], place, axis=0)[place]

    def _statistics(self, outcomes_SN: F64, rows: slice = slice(None)) -> F64:
        """Squared studentized statistics of some rows of assignments, float64 [D, S]."""
        residual_SN = self._less_block_means(outcomes_SN)
        found = [self._of_part(residual_SN[part.rows], part, rows) for part in self.parts]
        return np.concatenate(found, axis=1)

    def _of_part(self, residual_SN: F64, part: StudyPart, rows: slice) -> F64:
        within_DC = self.within_DC[part.draws][rows]
        found = np.empty((len(within_DC), len(residual_SN)))
        step = max(1, CHUNK_CELLS // max(len(self.starts), len(residual_SN)))
        sums = _Sums(residual_SN, part.direction, self.starts, self.sizes_C)
        for start in range(0, len(within_DC), step):
            chunk = slice(start, start + step)
            found[chunk] = sums.squared_t(within_DC[chunk])
        return found

    def actual(self, marginal: Marginal, shift: float) -> float:
        """The least squared statistic of the studies, under the assignment that was made."""
        return float(self._statistics(self.outcomes(marginal, shift), slice(0, 1)).min())

    def power(self, marginal: Marginal, shift: float) -> float:
        """Share of simulated studies that find an effect (p <= alpha)."""
        return float((self.p(marginal, shift) <= self.alpha).mean())

    def smallest(self, marginal: Marginal) -> tuple[float | None, float]:
        """(smallest effect on the mean that is found with 80 % power, the highest power seen).

        None where no possible effect is found so often.
        """
        shift, power = self.smallest_shift(marginal)
        return None if shift is None else marginal.effect_of(shift), power

    def largest_shift(self, marginal: Marginal) -> float:
        """The shift, per unit of treatment, that makes the largest effect."""
        return marginal.largest_shift() / float(self.treatment_N.max())

    def smallest_shift(self, marginal: Marginal) -> tuple[float | None, float]:
        """The same as the shift, per unit of treatment, that makes this effect.

        What must be exceeded to be found hardly changes with the effect: it is computed at a guess,
        the effect is solved for, and both are repeated until the power there is 80 %.
        """
        top = self.largest_shift(marginal)
        shift, tried = min(self._first_guess(marginal), 0.9 * top), {}
        for _ in range(MOST_ROUNDS):
            actual, critical = self._critical(marginal, shift)
            tried[shift] = float((least_as_extreme(actual) > critical).mean())
            if abs(tried[shift] - POWER) <= CLOSE:
                break
            shift = self._solved(marginal, critical, top)
            if shift in tried:
                break
        shift = min(tried, key=lambda size: abs(tried[size] - POWER))
        if abs(tried[shift] - POWER) > NEAR:
            # A jump (few assignments, ties, the end of the range): look for it one half at a time.
            if (at_top := self.power(marginal, top)) < POWER:
                return None, at_top
            shift = halved(lambda size: self.power(marginal, size) - POWER, top, 0.02)
        return shift, max(tried.values())

    def _solved(self, marginal: Marginal, critical: F64, top: float) -> float:
        """The shift at which 80 % of the actual statistics exceed these, `top` if none does."""

        def lacking(shift: float) -> float:
            actual = self._statistics(self.outcomes(marginal, shift), slice(0, 1))[0]
            return float((least_as_extreme(actual) > critical).mean()) - POWER

        return top if lacking(top) < 0 else halved(lacking, top, 0.002)

    def _first_guess(self, marginal: Marginal) -> float:
        spread = float(marginal.outcomes(self.latent_SN, np.zeros(1)).std()) or 1.0
        total = float((self.sizes_C * self.within_DC[0][0] ** 2).sum())
        return 3.0 * spread / math.sqrt(max(total, 1e-12))


def halved(rising: Callable[[float], float], top: float, tolerance: float) -> float:
    """The smallest size up to `top` at which a rising function is not below 0, as it is there."""
    low, high = top / 4096, top
    while low > 1e-12 * top and rising(low) >= 0:
        low, high = low / 64, low
    while high - low > tolerance * high:
        middle = math.sqrt(low * high) if high > 2 * low else (low + high) / 2
        low, high = (low, middle) if rising(middle) >= 0 else (middle, high)
    return high


class _Sums:
    """Sums over the units of every cluster, of outcomes adjusted for one covariate or none.

    With t = w - g x (w the treatment less its block's mean, x the covariate's direction), a cluster
    adds sum(t r) = w R - g X to the numerator and Q = n w^2 - 2 g w x1 + g^2 x2 to the denominator
    of the coefficient a, and (w R - g X - a Q)^2 to its squared error.

    Args:
        residual_SN: outcomes less their block's mean.
        direction: the covariate less its block's mean, of length 1, float64 [N].
        starts, sizes_C: the clusters.
    """

    def __init__(self, residual_SN: F64, direction: F64 | None, starts: I64, sizes_C: F64) -> None:
        self.sizes_C = sizes_C
        self.x1_C = self.x2_C = np.zeros(len(starts))
        self.across_CS = None
        if direction is not None:
            residual_SN = residual_SN - np.outer(residual_SN @ direction, direction)
            self.x1_C, self.x2_C = (np.add.reduceat(x, starts) for x in (direction, direction**2))
            self.across_CS = np.add.reduceat(residual_SN * direction, starts, axis=1).T.copy()
        self.sums_CS = np.add.reduceat(residual_SN, starts, axis=1).T.copy()
        self.squares_CS = self.sums_CS**2
        self.largest_S = np.abs(residual_SN).max(axis=1, initial=0.0)

    def squared_t(self, w: F64) -> F64:
        """Squared studentized statistics, float64 [D, S], of treatments w, float64 [D, C].

        A treatment that does not vary within blocks gets infinity, which can only raise p; equal
        outcomes get 0.
        """
        g = (w @ self.x1_C)[:, None]
        q = self.sizes_C * w**2 - 2 * g * w * self.x1_C + g**2 * self.x2_C
        m = q.sum(axis=1)[:, None]
        empty = m[:, 0] <= TOLERANCE
        m = np.where(m <= TOLERANCE, 1.0, m)
        a = (w / m) @ self.sums_CS
        along = (q * w) @ self.sums_CS
        variance = (w**2) @ self.squares_CS
        if self.across_CS is not None:
            a -= (g / m) * self.across_CS.sum(axis=0)
            along -= g * (q @ self.across_CS)
            variance += g**2 * (self.across_CS**2).sum(axis=0)
            variance -= 2 * g * (w @ (self.sums_CS * self.across_CS))
        squared = a * a
        # (variance - 2 a along + a^2 q2): the squared error, times m^2.
        along *= -2 * a
        along += squared * (q**2).sum(axis=1)[:, None]
        along += variance
        squared *= m**2
        nothing = along <= 2e-12 * variance
        if nothing.any():
            along[nothing] = 1.0
            # Nothing remains: the treatment explains all, or there was nothing to explain.
            explained = (
                np.abs(a[nothing]) > 1e-12 * np.broadcast_to(self.largest_S, a.shape)[nothing]
            )
            squared[nothing] = np.where(explained, np.inf, 0.0)
        squared /= along
        squared[empty] = np.inf
        return np.asarray(squared)


def _by_cluster(comparison: Comparison) -> Comparison:
    """The same comparison with the units of a cluster side by side, clusters numbered from 0."""
    order = np.argsort(comparison.clusters, kind="stable")
    _, number = np.unique(comparison.clusters[order], return_inverse=True)
    return replace(
        comparison,
        units=comparison.units[order],
        arms=comparison.arms[order],
        draws=comparison.draws[:, order],
        blocks=comparison.blocks[order],
        clusters=number,
    )


def _standard(values: F64) -> F64:
    """Values as normal scores would be: missing ones are the mean; mean 0, standard deviation 1."""
    finite = np.isfinite(values)
    filled = np.where(finite, values, values[finite].mean() if finite.any() else 0.0)
    spread = float(filled.std())
    return np.asarray((filled - filled.mean()) / spread if spread > 0 else filled * 0.0)
