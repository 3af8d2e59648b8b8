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

All sums are over clusters, whose units share an arm: a draw costs a few passes over clusters.

Shapes: U units, C clusters, B blocks, D draws, K arms with a dose, L = K + 1 groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import (
    FEWEST_SPARE_CLUSTERS,
    POWER,
    TOLERANCE,
    ArmEffect,
    Comparison,
    Estimate,
)

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

CHUNK_CELLS = 1 << 19
ROUNDING = 1e-12


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
    kept = np.isfinite(outcome_U[comparison.units])
    order = np.flatnonzero(kept)
    order = order[np.argsort(comparison.clusters[order], kind="stable")]
    clusters = comparison.clusters[order]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    facts = (len(order), len(starts), int((~kept).sum()))
    group = comparison.score.astype(np.int64)
    actual = group[comparison.arms[order[starts]]]
    n_arms = int(group.max())
    absent = sorted(set(range(n_arms + 1)) - set(actual.tolist()))
    if absent:
        return _nothing(facts, "an arm has no unit with a value")
    _, block = np.unique(comparison.blocks[order], return_inverse=True)
    covariate = None if covariate_U is None else covariate_U[comparison.units][order]
    spare = len(starts) - int(block.max()) - 2 - n_arms
    direction = _direction(covariate, block) if spare >= FEWEST_SPARE_CLUSTERS else None
    y = outcome_U[comparison.units][order]
    residual = _within(_within(y, block), block)
    if direction is not None:
        residual = residual - direction * (direction @ residual)
    if float(np.abs(residual).max()) <= TOLERANCE * max(float(np.abs(y).max()), 1e-300):
        alike = tuple(ArmEffect(k + 1, 0.0, None, None, 1.0) for k in range(n_arms))
        why = "the outcome does not vary between units within a block"
        return replace(_nothing(facts, why), arms=alike)
    sums = _Sums.of(residual, direction, block, starts)
    groups_DC = group[comparison.draws[:, order[starts]]]
    return _infer(sums, actual, groups_DC, n_arms, facts, alpha, detect_alpha or alpha)


def _nothing(facts: tuple[int, int, int], why: str) -> Estimate:
    return Estimate(None, None, None, 1.0, *facts, None, None, False, why)


def _within(values_U: F64, block_U: I64) -> F64:
    """Values less the mean of their block."""
    return values_U - (np.bincount(block_U, weights=values_U) / np.bincount(block_U))[block_U]


def _direction(covariate: F64 | None, block_U: I64) -> F64 | None:
    """The covariate less its block's mean, of length 1; None where that leaves nothing."""
    if covariate is None or not np.isfinite(covariate).any():
        return None
    finite = np.isfinite(covariate)
    filled = np.where(finite, covariate, covariate[finite].mean())
    rest = _within(filled, block_U)
    length = float(np.linalg.norm(rest))
    if length <= 1e-8 * max(float(np.linalg.norm(filled)), 1e-300):
        return None
    return np.asarray(rest / length)


@dataclass(frozen=True)
class _Sums:
    """Sums over each cluster's units, float64 [C]: of ones, of the residual r, and with the
    covariate's direction q of q, q r and q^2 (0 without a covariate). block: int64 [C].
    """

    n: F64
    r: F64
    q: F64
    qr: F64
    qq: F64
    block: I64
    adjusted: bool

    @classmethod
    def of(cls, residual: F64, direction: F64 | None, block: I64, starts: I64) -> _Sums:
        q = np.zeros_like(residual) if direction is None else direction
        columns = (np.ones_like(residual), residual, q, q * residual, q * q)
        n, r, q, qr, qq = (np.add.reduceat(column, starts) for column in columns)
        return cls(n, r, q, qr, qq, block[starts], direction is not None)

    def without(self, fit: _Fit) -> _Sums:
        """The same sums of what is left of the residual when a fit (of one draw) is taken away."""
        return _Sums(self.n, fit.u[0], self.q, fit.t[0], self.qq, self.block, self.adjusted)


@dataclass(frozen=True)
class _Fit:
    """Least squares for some draws.

    b: float64 [D, K], effects. meat: float64 [D, K, K], covariance of the scores s = X' r, float64
    [D, K]. inverse: float64 [D, K, K], of X' X. u, t: float64 [D, C], sums over clusters of the
    residual, and of the residual times the covariate's direction.
    """

    b: F64
    s: F64
    meat: F64
    inverse: F64
    u: F64
    t: F64
    scale: float

    def wald(self) -> F64:
        """W of every draw, float64 [D]; infinite where an effect has no spread to be compared to.

        W = s' meat^-1 s, which is b' V^-1 b because V = inverse meat inverse and b = inverse s.
        """
        values, vectors = np.linalg.eigh(self.meat)
        along = np.einsum("dkj,dk->dj", vectors, self.s) ** 2
        return np.asarray(_ratio(along, self._kept(values), self.scale).sum(axis=1))

    def squared_t(self) -> F64:
        """Squared studentized effect of every arm, float64 [D, K]."""
        variance = np.einsum("dkj,djl,dlk->dk", self.inverse, self.meat, self.inverse)
        trace = np.einsum("dkj,dj,djk->dk", self.inverse, self._size(), self.inverse)
        variance = np.where(variance <= ROUNDING * trace, 0.0, variance)
        size = np.einsum("dkj,djk->dk", self.inverse, self.inverse)
        return _ratio(self.b**2, variance, self.scale * size)

    def _size(self) -> F64:
        return np.einsum("dkk->dk", self.meat) + ROUNDING * self.scale

    def _kept(self, values: F64) -> F64:
        least = ROUNDING * self._size().sum(axis=1, keepdims=True)
        return np.where(values <= least, 0.0, values)


def _ratio(top: F64, bottom: F64, scale: F64 | float) -> F64:
    """top / bottom, with 0 / 0 = 0 and x / 0 = infinity; what is below the rounding of sums of this
    scale is 0.
    """
    top = np.where(top <= ROUNDING**2 * np.asarray(scale), 0.0, top)
    zero = bottom <= 0
    return np.where(zero, np.where(top > 0, np.inf, 0.0), top / np.where(zero, 1.0, bottom))


def _fit(sums: _Sums, groups_DC: I64, n_arms: int) -> _Fit:
    """Effects and their covariance for every row of groups (0 ... K).

    With Z the indicators of a cluster's arm, z their mean in its block and g = sum(q Z), a unit's
    treatment is x = Z - z - q g. So a cluster's score is
    sum(x e) = (Z - z) u - g t, where u = sum(e) = r - n v + q h, t = sum(q e) = qr - q v + qq h,
    v = (Z - z) b and h = g b; and sums of products of scores follow from sums of u^2 and u t per
    block and arm.
    """
    n_draws, n_groups = len(groups_DC), n_arms + 1
    n_blocks = int(sums.block.max()) + 1
    row = np.arange(n_draws)[:, None]
    by_group = (row * n_groups + groups_DC).ravel()
    by_cell = ((row * n_blocks + sums.block) * n_groups + groups_DC).ravel()

    def over(places: I64, values: F64, *shape: int) -> F64:
        weights = np.broadcast_to(values, groups_DC.shape).ravel()
        size = math.prod(shape)
        return np.asarray(np.bincount(places, weights, size), np.float64).reshape(shape)

    count = over(by_cell, sums.n, n_draws, n_blocks, n_groups)
    block_size = np.bincount(sums.block, weights=sums.n)
    z = (count / block_size[None, :, None])[..., 1:]
    s = over(by_group, sums.r, n_draws, n_groups)[:, 1:]
    g = over(by_group, sums.q, n_draws, n_groups)[:, 1:]
    z_T = z.transpose(0, 2, 1)
    eye = np.eye(n_arms)
    xx = count[..., 1:].sum(axis=1)[:, :, None] * eye - z_T @ (z * block_size[None, :, None])
    xx -= g[:, :, None] * g[:, None, :]
    inverse = np.linalg.pinv(xx, rcond=TOLERANCE, hermitian=True)
    b = np.einsum("dkj,dj->dk", inverse, s)
    level = np.concatenate([np.zeros((n_draws, 1)), b], axis=1)
    v = np.take_along_axis(level, groups_DC, axis=1) - (z @ b[:, :, None])[:, sums.block, 0]
    h = np.einsum("dk,dk->d", g, b)[:, None]
    u = sums.r - sums.n * v + sums.q * h
    t = sums.qr - sums.q * v + sums.qq * h
    square = over(by_cell, u * u, n_draws, n_blocks, n_groups)
    per_block = square.sum(axis=2)
    across = square[..., 1:].transpose(0, 2, 1) @ z
    meat = square[..., 1:].sum(axis=1)[:, :, None] * eye - across - across.transpose(0, 2, 1)
    meat += z_T @ (z * per_block[:, :, None])
    if sums.adjusted:
        product = over(by_cell, u * t, n_draws, n_blocks, n_groups)
        mixed = product[..., 1:].sum(axis=1) - np.einsum("dbk,db->dk", z, product.sum(axis=2))
        cross = mixed[:, :, None] * g[:, None, :]
        meat -= cross + cross.transpose(0, 2, 1)
        meat += (t * t).sum(axis=1)[:, None, None] * g[:, :, None] * g[:, None, :]
    return _Fit(b, s, meat, inverse, u, t, float(np.abs(sums.r).sum()) ** 2)


def _statistics(sums: _Sums, groups_DC: I64, n_arms: int) -> tuple[F64, F64]:
    """(W, largest squared studentized effect over arms) of every draw, float64 [D]."""
    cells = len(sums.n) + (int(sums.block.max()) + 1) * (n_arms + 1)
    step = max(1, CHUNK_CELLS // cells)
    wald, largest = [], []
    for start in range(0, len(groups_DC), step):
        fit = _fit(sums, groups_DC[start : start + step], n_arms)
        wald.append(fit.wald())
        largest.append(fit.squared_t().max(axis=1))
    return np.concatenate(wald), np.concatenate(largest)


def _p(drawn: F64, reference: float) -> float:
    return float((1 + (drawn >= reference * (1 - TOLERANCE)).sum()) / (1 + len(drawn)))


def _infer(
    sums: _Sums,
    actual: I64,
    groups_DC: I64,
    n_arms: int,
    facts: tuple[int, int, int],
    alpha: float,
    detect_alpha: float,
) -> Estimate:
    fit = _fit(sums, actual[None], n_arms)
    observed, squared = float(fit.wald()[0]), fit.squared_t()[0]
    wald, largest = _statistics(sums, groups_DC, n_arms)
    p, least = _p(wald, observed), _p(wald, max(float(wald.max()), observed))
    variance = np.einsum("kj,jl,lk->k", fit.inverse[0], fit.meat[0], fit.inverse[0])
    errors = np.sqrt(np.where(np.isfinite(squared) & (variance > 0), variance, 0.0))
    reach, detectable, note = math.inf, None, ""
    if np.all(errors > 0):
        wald_left, largest_left = _statistics(sums.without(fit), groups_DC, n_arms)
        reach = math.sqrt(float(np.quantile(largest_left, 1 - alpha, method="higher")))
        critical = float(np.quantile(wald_left, 1 - detect_alpha, method="higher"))
        detectable = _detectable(fit, critical)
        if not math.isfinite(reach):
            note = "the design is too small for intervals"
    else:
        note = "an arm has one value only: there is no spread to make intervals from"
    arms = []
    for k in range(n_arms):
        effect, half = float(fit.b[0, k]), reach * float(errors[k])
        low, high = (effect - half, effect + half) if math.isfinite(half) else (None, None)
        arms.append(ArmEffect(k + 1, effect, low, high, _p(largest, float(squared[k]))))
    return Estimate(
        None, None, None, p, *facts, None, detectable, sums.adjusted, note, least, tuple(arms)
    )


def _detectable(fit: _Fit, critical: float) -> float | None:
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
