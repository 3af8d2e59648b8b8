"""Wald statistics of all arms at once, for many repeated assignments.

Each arm with a dose has its own coefficient in a regression on what is left of the outcome when
block means and one covariate are taken out; the covariance is cluster-robust (HC0). Clusters share
their units' arm, so all sums are over clusters. Sums over the clusters of a block and arm, of a few
columns that no draw changes, are one matrix product for many draws; the rest is arithmetic per
block and arm. Where that subtracts nearly equal numbers, and where a block and arm holds hardly
more than a cluster, a draw is done cluster by cluster.

Shapes: C clusters, B blocks, D draws, K arms with a dose, L = K + 1 groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

CHUNK_CELLS = 1 << 19
TOLERANCE = 1e-9
ROUNDING = 1e-12
CANCELLED = 1e-3
CLUSTERS_PER_CELL = 2
"""With fewer on average in a block and arm, sums over these save nothing."""


@dataclass(frozen=True)
class DrawnGroups:
    """Groups of the clusters in repeated assignments, from arms of units, int8 [D, all units]."""

    arms: I8
    columns: I64
    group: I8
    n_arms: int

    def __len__(self) -> int:
        return len(self.arms)

    def groups(self, rows: slice | I64) -> I8:
        """Groups in some draws, int8 [D, C]."""
        return self.group[self.arms[rows][:, self.columns]]


@dataclass(frozen=True)
class ClusterSums:
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
    def of(cls, residual: F64, direction: F64 | None, block: I64, starts: I64) -> ClusterSums:
        q = np.zeros_like(residual) if direction is None else direction
        columns = (np.ones_like(residual), residual, q, q * residual, q * q)
        n, r, q, qr, qq = (np.add.reduceat(column, starts) for column in columns)
        return cls(n, r, q, qr, qq, block[starts], direction is not None)

    def without(self, residual: _Residual) -> ClusterSums:
        """The same sums of what is left of the residual when a fit (of one draw) is taken away."""
        u, t = residual.u[0], residual.t[0]
        return ClusterSums(self.n, u, self.q, t, self.qq, self.block, self.adjusted)

    def columns(self) -> list[F64]:
        """Those that a cluster's residual is made of."""
        return self.every() if self.adjusted else self.every()[:2]

    def every(self) -> list[F64]:
        return [self.n, self.r, self.q, self.qr, self.qq]


@dataclass(frozen=True)
class WaldFit:
    """Least squares for some draws.

    b: float64 [D, K], effects. meat: float64 [D, K, K], covariance of the scores s = X' r, float64
    [D, K]. inverse: float64 [D, K, K], of X' X. square: float64 [D], sum over clusters of the
    squared sum of their residuals. scale: bounds the rounding of s^2.
    """

    b: F64
    s: F64
    meat: F64
    inverse: F64
    square: F64
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
        size = np.einsum("dkj,djk->dk", self.inverse, self.inverse)
        return _ratio(self.b**2, self.variance(), self.scale * size)

    def variance(self) -> F64:
        """Squared standard error of every arm's effect, float64 [D, K]; 0 where it is nothing but
        the rounding of sums, which differs between processors.
        """
        variance = np.einsum("dkj,djl,dlk->dk", self.inverse, self.meat, self.inverse)
        trace = np.einsum("dkj,dj,djk->dk", self.inverse, self._size(), self.inverse)
        return np.where(variance <= ROUNDING * trace, 0.0, variance)

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


@dataclass(frozen=True)
class _Effects:
    """Effects of every draw before their covariance is known.

    With Z the indicators of a cluster's arm, z their mean in its block (float64 [D, B, K]) and
    g = sum(q Z) (float64 [D, K]), a unit's treatment is x = Z - z - q g. level: float64 [D, B, L],
    what the fit gives a unit of a block and group, less its part along the covariate.
    """

    z: F64
    g: F64
    s: F64
    b: F64
    inverse: F64
    level: F64

    @classmethod
    def of(cls, count: F64, r: F64, q: F64) -> _Effects:
        """From sums of n, r and q per block and group, float64 [D, B, L] each."""
        block_size = count.sum(axis=2, keepdims=True)
        z = (count / block_size)[..., 1:]
        s, g = r.sum(axis=1)[:, 1:], q.sum(axis=1)[:, 1:]
        xx = _diagonal(count) - z.transpose(0, 2, 1) @ (z * block_size)
        xx -= g[:, :, None] * g[:, None, :]
        inverse = np.linalg.pinv(xx, rcond=TOLERANCE, hermitian=True)
        b = np.einsum("dkj,dj->dk", inverse, s)
        own = np.concatenate([np.zeros((len(b), 1)), b], axis=1)
        return cls(z, g, s, b, inverse, own[:, None, :] - z @ b[:, :, None])

    @property
    def along(self) -> F64:
        """h = g b, float64 [D]."""
        return np.einsum("dk,dk->d", self.g, self.b)

    def fit(self, uu: F64, ut: F64 | None, tt: F64, scale: float) -> WaldFit:
        """With sums per block and group of u^2 and u t, float64 [D, B, L], and of t^2, float64 [D].

        u is the sum of a cluster's residuals e, and t that of q e. A cluster's score is
        sum(x e) = (Z - z) u - g t, so products of scores add up to these sums.
        """
        z, g = self.z, self.g
        z_T = z.transpose(0, 2, 1)
        across = uu[..., 1:].transpose(0, 2, 1) @ z
        meat = _diagonal(uu) - across - across.transpose(0, 2, 1)
        meat += z_T @ (z * uu.sum(axis=2, keepdims=True))
        if ut is not None:
            mixed = ut[..., 1:].sum(axis=1) - np.einsum("dbk,db->dk", z, ut.sum(axis=2))
            cross = mixed[:, :, None] * g[:, None, :]
            meat -= cross + cross.transpose(0, 2, 1)
            meat += tt[:, None, None] * g[:, :, None] * g[:, None, :]
        return WaldFit(self.b, self.s, meat, self.inverse, uu.sum(axis=(1, 2)), scale)


def _diagonal(cells: F64) -> F64:
    """Diagonal matrices of the arms' totals over blocks, float64 [D, K, K]."""
    total = cells[..., 1:].sum(axis=1)
    return np.asarray(total[:, :, None] * np.eye(total.shape[1]))


@dataclass(frozen=True)
class _Residual:
    """Sums over each cluster's units of the residual e, and of q e, float64 [D, C]."""

    u: F64
    t: F64


def fit_by_cluster(sums: ClusterSums, groups_DC: I8, n_arms: int) -> tuple[WaldFit, _Residual]:
    """Effects and their covariance for every row of groups (0 ... K), cluster by cluster."""
    from scipy.sparse import csr_array

    places = (sums.block, np.arange(len(sums.n)))
    adding = csr_array((sums.n, places))
    size = np.bincount(sums.block, sums.n)[:, None]
    groups_CD = np.ascontiguousarray(groups_DC.T)
    # The treatment of every arm, and what of it the block's mean leaves, float64 [K, C, D].
    x = (groups_CD == np.arange(1, n_arms + 1)[:, None, None]).astype(np.float64)
    z = np.array([adding @ inside / size for inside in x])
    total, s, g = (
        np.array([column @ inside for inside in x]) for column in (sums.n, sums.r, sums.q)
    )
    xx = total.T[:, :, None] * np.eye(n_arms) - _products(z, size * z) - _outer(g)
    inverse = np.asarray(np.linalg.pinv(xx, rcond=TOLERANCE, hermitian=True), np.float64)
    b = np.einsum("dkj,jd->kd", inverse, s)
    for inside, mean in zip(x, z, strict=True):
        inside -= mean[sums.block]
    v, h = np.einsum("kcd,kd->cd", x, b), (g * b).sum(axis=0)
    n, r, q, qr, qq = (column[:, None] for column in sums.every())
    residual = _Residual((r - n * v + q * h).T, (qr - q * v + qq * h).T)
    u, t = residual.u.T, residual.t.T
    x *= u
    if sums.adjusted:
        for score, along in zip(x, g, strict=True):
            score -= along * t
    square = np.einsum("cd,cd->d", u, u)
    return WaldFit(b.T, s.T, _products(x, x), inverse, square, _scale(sums)), residual


def _products(one: F64, other: F64) -> F64:
    """Sums over the middle axis of the products of every two rows, [K, C, D] to [D, K, K]."""
    found = np.empty((one.shape[2], len(one), len(one)))
    for k, left in enumerate(one):
        for j, right in enumerate(other[: k + 1]):
            found[:, k, j] = found[:, j, k] = np.einsum("cd,cd->d", left, right)
    return found


def _outer(g: F64) -> F64:
    """Products of every two rows, [K, D] to [D, K, K]."""
    return np.einsum("kd,jd->dkj", g, g)


def _scale(sums: ClusterSums) -> float:
    return float(np.abs(sums.r).sum()) ** 2


class _ByCell:
    """The same from sums over clusters that no draw changes: of n, r, q, q r, q^2 and of products
    of two of them. Equal columns (clusters of one unit have many) are one.
    """

    def __init__(self, sums: ClusterSums) -> None:
        from scipy.sparse import csr_array

        self.sums = sums
        self.n_blocks = int(sums.block.max()) + 1
        columns = sums.columns()
        kept: dict[bytes, int] = {}
        unique: list[F64] = []

        def place(column: F64) -> int:
            name = column.tobytes()
            if name not in kept:
                kept[name] = len(unique)
                unique.append(column)
            return kept[name]

        self.linear = [place(column) for column in columns]
        self.products = [[place(one * other) for other in columns] for one in columns]
        self.n_columns = len(unique)
        rows = np.arange(self.n_columns)[:, None] * self.n_blocks + sums.block
        places = np.broadcast_to(np.arange(len(sums.n)), rows.shape)
        shape = (self.n_columns * self.n_blocks, len(sums.n))
        values = np.array(unique)
        adding = csr_array((values.ravel(), (rows.ravel(), places.ravel())), shape=shape)
        self.adding = values if self.n_blocks == 1 else adding
        self.total = np.asarray(adding.sum(axis=1)).reshape(self.n_columns, self.n_blocks)

    def cells(self, groups_DC: I8, n_arms: int) -> F64:
        """Sums of every column per block and group, float64 [columns, D, B, L]."""
        shape = (self.n_columns, self.n_blocks, len(groups_DC))
        groups_CD = np.ascontiguousarray(groups_DC.T)
        found = np.empty((*shape, n_arms + 1))
        for group in range(1, n_arms + 1):
            inside = (groups_CD == group).astype(np.float64)
            found[..., group] = np.asarray(self.adding @ inside).reshape(shape)
        found[..., 0] = self.total[:, :, None] - found[..., 1:].sum(axis=3)
        return found.transpose(0, 2, 1, 3)

    def fit(self, groups_DC: I8, n_arms: int) -> WaldFit:
        cells = self.cells(groups_DC, n_arms)
        n, r, *more = self.linear
        q = cells[more[0]] if more else np.zeros_like(cells[n])
        effects = _Effects.of(cells[n], cells[r], q)
        v, h = effects.level, effects.along[:, None, None]
        one = np.ones_like(h)
        u: dict[int, F64] = {0: -v, 1: one} | ({2: h} if more else {})
        uu = self._sum(cells, u, u)
        if not more:
            return effects.fit(uu, None, np.zeros(len(groups_DC)), _scale(self.sums))
        t = {2: -v, 3: one, 4: h}
        tt = self._sum(cells, t, t).sum(axis=(1, 2))
        return effects.fit(uu, self._sum(cells, u, t), tt, _scale(self.sums))

    def _sum(self, cells: F64, left: dict[int, F64], right: dict[int, F64]) -> F64:
        """Sum over clusters of the product of two linear forms in the columns."""
        found = np.zeros(cells.shape[1:])
        for i, x in left.items():
            for j, y in right.items():
                found += x * y * cells[self.products[i][j]]
        return found


def statistics(sums: ClusterSums, draws: DrawnGroups) -> tuple[F64, F64]:
    """(W, largest squared studentized effect over arms) of every draw, float64 [D]."""
    cells = (int(sums.block.max()) + 1) * (draws.n_arms + 1)
    by_cell = _ByCell(sums) if cells * CLUSTERS_PER_CELL <= len(sums.n) else None
    width = len(sums.n) * (1 + draws.n_arms)
    if by_cell is not None:
        width = len(sums.n) + by_cell.n_columns * cells
    step = max(16, CHUNK_CELLS // width)
    wald, largest = np.empty(len(draws)), np.empty(len(draws))

    def put(rows: slice | I64, fit: WaldFit) -> None:
        wald[rows], largest[rows] = fit.wald(), fit.squared_t().max(axis=1)

    least = CANCELLED * float(sums.r @ sums.r)
    for start in range(0, len(draws), step):
        rows = slice(start, start + step)
        if by_cell is None:
            put(rows, fit_by_cluster(sums, draws.groups(rows), draws.n_arms)[0])
            continue
        fit = by_cell.fit(draws.groups(rows), draws.n_arms)
        put(rows, fit)
        doubtful = start + np.flatnonzero(fit.square <= least)
        if len(doubtful):
            put(doubtful, fit_by_cluster(sums, draws.groups(doubtful), draws.n_arms)[0])
    return wald, largest
