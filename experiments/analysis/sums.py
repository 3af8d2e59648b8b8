"""Sums over clusters and blocks that the test needs of every repeated assignment.

Two ways to the same numbers:

* `direct`: residualize every draw's treatment and add up over clusters: about twenty passes over
  draws x units;
* `by_block`: treatment has few values, and clusters share their units' arm. So a draw is told by a
  few sums per block and value (of weights, of products of two weights), which one sparse matrix
  product gives for many draws; powers of the residualized treatment, one per block, value and
  draw, then turn them into the sums over clusters. The few draws where this subtracts nearly equal
  numbers are done directly.

Shapes: U units (those with a value), C clusters, D draws, B blocks, V values of the treatment,
F features of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.cells import ROUNDING, Cells, Residuals

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

CHUNK_CELLS = 1 << 16
BLOCK_CHUNK_CELLS = 1 << 19
FEWEST_CELLS_BY_BLOCK = 1 << 22
TOLERANCE = 1e-9
SLACK = 1e-10
CANCELLED = 1e-3
FARTHEST, NEAREST = 1e6, 1e-4
"""Of an end of an interval, in standard errors: how far it is looked for, and how exactly."""


@dataclass(frozen=True)
class DrawTerms:
    """Everything the test at any hypothetical effect tau needs, per draw, float64 [D].

    Coefficient of a draw at tau: a - tau b. Its squared standard error times m squared:
    pp - 2 tau ps + tau^2 ss. `observed` holds (a, m, pp) of the actual assignment, whose b is 1.
    lengths: Euclidean lengths of the residual and of the actual treatment, which bound rounding.
    """

    a: F64
    b: F64
    m: F64
    pp: F64
    ps: F64
    ss: F64
    observed: tuple[float, float, float]
    lengths: tuple[float, float]

    def squared_t(self, tau: float) -> F64:
        """Squared studentized statistic of every draw when tau is removed, float64 [D]."""
        bottom = self.pp - 2 * tau * self.ps + tau**2 * self.ss
        size = self.pp + tau**2 * self.ss
        return self._squared(
            tau, self.a - tau * self.b, self.m, np.where(bottom <= 1e-12 * size, 0.0, bottom)
        )

    def observed_squared_t(self, tau: float) -> float:
        """The same of the actual assignment."""
        a, m, pp = (np.array([x]) for x in self.observed)
        return float(self._squared(tau, a - tau, m, pp)[0])

    def _squared(self, tau: float, coefficient: F64, m: F64, bottom: F64) -> F64:
        """Squared coefficient over squared error, with 0 / 0 = 0 and x / 0 = infinity."""
        top = (coefficient * m) ** 2
        # |coefficient x m| is at most the product of two lengths: what is smaller than its rounding
        # error is 0.
        most = self.lengths[0] + abs(tau) * self.lengths[1]
        top = np.where(top <= ROUNDING**2 * m * most**2, 0.0, top)
        zero = bottom <= 0
        return np.where(zero, np.where(top > 0, np.inf, 0.0), top / np.where(zero, 1.0, bottom))

    def p(self, tau: float) -> float:
        """Two-sided p-value of the hypothesis that the effect is tau."""
        return share_as_extreme(self.squared_t(tau), self.observed_squared_t(tau))

    def smallest_p(self) -> float:
        """The p-value of no effect if the actual assignment were the most extreme one."""
        found = self.squared_t(0.0)
        return share_as_extreme(found, max(float(found.max()), self.observed_squared_t(0.0)))


def share_as_extreme(squared_D: F64, reference: float) -> float:
    """The p-value: share of squared statistics, the actual one among them, at least `reference`.

    What is as extreme but for rounding counts: rounding is relative in a large statistic, and
    absolute in a small one, which is a difference of numbers much larger than itself.
    """
    least = float(least_as_extreme(np.array(reference)))
    return float((1 + (squared_D >= least).sum()) / (1 + len(squared_D)))


def least_as_extreme(reference: F64) -> F64:
    """The squared statistics that are as extreme as these but for rounding, of any shape."""
    return np.maximum(0.0, np.sqrt(reference) * (1 - TOLERANCE / 2) - SLACK) ** 2


def farthest(
    p: Callable[[float], float], effect: float, side: float, alpha: float, error: float
) -> float | None:
    """The end of an interval: the farthest hypothesis on one side that a test does not reject.

    Args:
        p: the p-value of the hypothesis that the effect is as given.
        effect: the estimate, which the interval holds.
        side: -1 or 1.
        alpha: 1 - confidence.
        error: the standard error, above 0: the end is found to 1e-4 of it.

    Returns:
        None where no hypothesis within a million standard errors is rejected.
    """
    inside, outside = 0.0, 2 * error
    while p(effect + side * outside) > alpha:
        inside, outside = outside, 2 * outside
        if outside > FARTHEST * error:
            return None
    while outside - inside >= NEAREST * error:
        middle = (inside + outside) / 2
        if p(effect + side * middle) > alpha:
            inside = middle
        else:
            outside = middle
    return effect + side * outside


def terms_of(study: Residuals, draws: I8) -> DrawTerms:
    """Sums over units for the actual assignment and for every draw, int8 [D, all columns]."""
    actual = _direct_sums(study, study.treatment[None, :])
    if len(draws) * len(study.column) < FEWEST_CELLS_BY_BLOCK or not _nested(study):
        columns = None
    else:
        columns = by_block(study, draws)
    if columns is None:
        columns = direct(study, draws)
    lengths = (float(np.linalg.norm(study.residual)), float(np.linalg.norm(study.treatment)))
    observed = (float(actual[0][0]), float(actual[2][0]), float(actual[3][0]))
    a, b, m, pp, ps, ss = columns
    return DrawTerms(a, b, m, pp, ps, ss, observed, lengths)


def _nested(study: Residuals) -> bool:
    """Whether every cluster lies in one block."""
    return bool(
        np.array_equal(
            study.projection.block[study.starts()][study.cluster], study.projection.block
        )
    )


def direct(study: Residuals, draws: I8) -> F64:
    """(a, b, m, pp, ps, ss) of every draw, float64 [6, D], unit by unit."""
    out = np.empty((6, len(draws)))
    step = max(1, CHUNK_CELLS // len(study.column))
    for start in range(0, len(draws), step):
        scores = study.score[draws[start : start + step][:, study.column]]
        out[:, start : start + step] = _direct_sums(study, study.projection.residual(scores))
    return out


def _direct_sums(study: Residuals, treated_DU: F64) -> F64:
    """(a, b, m, pp, ps, ss) of some draws, whose treatments are already residualized, [6, D].

    A draw in which the treatment does not vary within blocks has m = 0; it is given an infinite
    statistic (pp = ps = ss = 0, a = m = 1), which can only make p larger.
    """
    residual, actual, starts = study.residual, study.treatment, study.starts()
    along = treated_DU * residual
    square = treated_DU * treated_DU
    across = treated_DU * actual
    if len(starts) < treated_DU.shape[1]:
        along, square, across = (
            np.add.reduceat(x, starts, axis=1) for x in (along, square, across)
        )
    m = square.sum(axis=1)
    empty = m <= TOLERANCE * float(actual @ actual)
    safe = np.where(empty, 1.0, m)
    a, b = along.sum(axis=1) / safe, across.sum(axis=1) / safe
    along -= a[:, None] * square
    across -= b[:, None] * square
    pp = np.einsum("dc,dc->d", along, along)
    ps = np.einsum("dc,dc->d", along, across)
    ss = np.einsum("dc,dc->d", across, across)
    noise = (ROUNDING * safe) ** 2
    pp = np.where(pp <= noise * float(np.max(residual**2)), 0.0, pp)
    ss = np.where(ss <= noise, 0.0, ss)
    if empty.any():
        a, b = np.where(empty, 1.0, a), np.where(empty, 0.0, b)
        pp, ps, ss = (np.where(empty, 0.0, x) for x in (pp, ps, ss))
    return np.array([a, b, safe, pp, ps, ss])


@dataclass(frozen=True)
class _Features:
    """What a cluster adds to the three sums, as polynomials in its residualized treatment.

    Without a covariate a cluster of n units whose residuals add up to R (of the outcome) and T (of
    the actual treatment) adds z R along the outcome, z T across to the actual treatment and z^2 n
    to the square, where z is the draw's treatment less its block's mean. A covariate q takes w q
    off every unit's z. With Q, QR, QT, QQ the sums of q, q x residual, q x treatment and q^2 over
    the cluster's units, it adds z R - w QR, z T - w QT and z^2 n - 2 z w Q + w^2 QQ.

    powers: of z in every feature, [F]. sums: float64 [F, C].
    """

    powers: tuple[int, ...]
    sums: F64

    @classmethod
    def of(cls, study: Residuals) -> _Features:
        def over_clusters(weights: F64) -> F64:
            return np.bincount(study.cluster, weights=weights).astype(np.float64)

        r, t, q = study.residual, study.treatment, study.projection.covariate
        plain = [over_clusters(r), over_clusters(t), over_clusters(np.ones_like(r))]
        if q is None:
            return cls((1, 1, 2), np.array(plain))
        more = [over_clusters(q), over_clusters(q * r), over_clusters(q * t), over_clusters(q * q)]
        return cls((1, 1, 2, 1, 0, 0, 0), np.array(plain + more))

    def weights(self, w_D: F64) -> F64:
        """Coefficients of the features in the sums along, across and square, [3, F, D]."""
        weights = np.zeros((3, len(self.powers), len(w_D)))
        weights[[0, 1, 2], [0, 1, 2]] = 1.0
        if len(self.powers) > 3:
            weights[2, 3], weights[0, 4], weights[1, 5], weights[2, 6] = (
                -2 * w_D,
                -w_D,
                -w_D,
                w_D**2,
            )
        return weights

    def products(self) -> tuple[list[tuple[int, int]], F64]:
        """(power of z and column) of every feature and then of every product of two, [F + F x F];
        the different columns, float64 [X, C]. Equal columns (clusters of one unit have many) are
        one.
        """
        columns: dict[bytes, int] = {}
        kept: list[F64] = []
        needed = []
        pairs = [(p + q, x * y) for p, x in self._each() for q, y in self._each()]
        for power, column in [*self._each(), *pairs]:
            name = column.tobytes()
            if name not in columns:
                columns[name] = len(kept)
                kept.append(column)
            needed.append((power, columns[name]))
        return needed, np.array(kept)

    def _each(self) -> list[tuple[int, F64]]:
        return list(zip(self.powers, self.sums, strict=True))


def by_block(study: Residuals, draws: I8) -> F64 | None:
    """(a, b, m, pp, ps, ss) of every draw, float64 [6, D], from sums per block and value.

    None when a draw gives units of one cluster different arms.
    """
    features = _Features.of(study)
    needed, columns = features.products()
    moments = _moments(study, draws, needed, columns)
    if moments is None:
        return None
    n_features = len(features.powers)
    linear, products = moments[:n_features], moments[n_features:]
    products = products.reshape(n_features, n_features, -1)
    w_D = linear[3] if n_features > 3 else np.zeros(len(draws))
    along, across, square = features.weights(w_D)
    m = np.einsum("fd,fd->d", square, linear)
    safe = np.where(m > 0, m, 1.0)
    a, b = (np.einsum("fd,fd->d", x, linear) / safe for x in (along, across))
    left, right = along - a * square, across - b * square
    pp, ps, ss = (
        np.einsum("fd,fgd,gd->d", x, products, y)
        for x, y in ((left, left), (left, right), (right, right))
    )
    out = np.array([a, b, m, pp, ps, ss])
    # Where a sum is much smaller than its parts, too few digits of it are left.
    lengths = np.sqrt(np.maximum(np.einsum("ffd->fd", products), 0.0))
    doubtful = m <= CANCELLED * np.maximum(linear[2], float(study.treatment @ study.treatment))
    for total, weights in ((pp, left), (ss, right)):
        doubtful |= total <= CANCELLED * np.einsum("fd,fd->d", np.abs(weights), lengths) ** 2
    if doubtful.any():
        out[:, doubtful] = direct(study, draws[doubtful])
    return out


def _moments(
    study: Residuals, draws: I8, needed: Sequence[tuple[int, int]], columns: F64
) -> F64 | None:
    """Sum over clusters of z^power x column for every (power, column), float64 [needed, D]."""
    which = {pair: row for row, pair in enumerate(dict.fromkeys(needed))}
    cells = Cells(study, draws[0], list(which), columns, needed[2][1])
    out = np.empty((len(which), len(draws)))
    step = max(16, BLOCK_CHUNK_CELLS // draws.shape[1])
    for start in range(0, len(draws), step):
        arms = np.ascontiguousarray(draws[start : start + step].T)
        if not cells.share(arms):
            return None
        cells.add(arms, out[:, start : start + step])
    return out[[which[pair] for pair in needed]]
