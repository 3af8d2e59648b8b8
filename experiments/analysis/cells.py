"""Clusters by block and value of the treatment, and what they add to sums over all clusters.

Sums of a power of the draw's residualized treatment times a weight, for many draws at once, by
sparse matrix products. Shapes: U units (those with a value), C clusters, D draws, B blocks, X
columns of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

ROUNDING = 1e-12


@dataclass(frozen=True)
class Projection:
    """Takes blocks' means, and one covariate, out of a variable.

    block: int64 [U], 0 to B - 1. covariate: float64 [U] with mean 0 in every block and length 1, or
    None.
    """

    block: I64
    covariate: F64 | None

    @property
    def columns(self) -> int:
        """How many numbers are fitted: one per block, and one for the covariate."""
        return int(self.block.max()) + 1 + (self.covariate is not None)

    def residual(self, rows: F64) -> F64:
        """What is left of every row, float64 [..., U]."""
        counts = np.bincount(self.block)
        if len(counts) == 1:
            left = rows - rows.mean(axis=-1, keepdims=True)
        elif rows.ndim == 1:
            left = rows - (np.bincount(self.block, weights=rows) / counts)[self.block]
        else:
            left = rows - ((self._members() @ rows.T).T / counts)[:, self.block]
        if self.covariate is not None:
            left = left - np.multiply.outer(left @ self.covariate, self.covariate)
        return left

    def _members(self) -> Any:
        from scipy.sparse import csr_array

        places = np.arange(len(self.block))
        return csr_array((np.ones(len(places)), (self.block, places)))


@dataclass(frozen=True)
class Residuals:
    """One outcome of one comparison, ready for the sums.

    Units are ordered by cluster. residual, treatment: float64 [U], outcome and actual treatment
    without blocks and covariate. cluster: int64 [U], 0 to C - 1, ascending. column: int64 [U], the
    unit's column in draws. score: float64 [arms], the treatment's value in each arm.
    """

    residual: F64
    treatment: F64
    projection: Projection
    cluster: I64
    column: I64
    score: F64

    def starts(self) -> I64:
        """First unit of every cluster, int64 [C]."""
        return np.flatnonzero(np.diff(self.cluster, prepend=-1))


class Cells:
    """Clusters by block and treatment value.

    Args:
        study: the outcome and comparison.
        draw: int8 [columns of draws], one draw: which values and means are usual.
        needed: (power of z, column) of the sums that are wanted.
        columns: float64 [X, C]. count: the column that counts a cluster's units.
    """

    def __init__(
        self,
        study: Residuals,
        draw: I8,
        needed: Sequence[tuple[int, int]],
        columns: F64,
        count: int,
    ) -> None:
        first = study.starts()
        self.study, self.needed, self.columns, self.count = study, needed, columns, count
        self.block, self.places = study.projection.block[first], study.column[first]
        self.width = len(draw)
        each = [(float(v), np.flatnonzero(study.score == v)) for v in np.unique(study.score)]
        # The sums of the value that most units have follow from the others'.
        self.values = sorted(each, key=lambda pair: -int(np.isin(draw, pair[1]).sum()))
        self.sizes = np.bincount(self.block, weights=columns[count])
        scores = columns[count] * study.score[draw[self.places]]
        self.usual = (np.bincount(self.block, weights=scores) / self.sizes)[:, None]
        self.counting = self._adding(columns[count : count + 1])
        self.adding = self._adding(columns)
        self.totals = np.asarray(self.adding.sum(axis=1)).reshape(len(columns), -1, 1)
        self.last_blocks: tuple[bytes, Any] = (b"", None)
        self.usual_sums = [self._usual_sums(value) for value, _ in self.values]

    def _adding(self, columns: F64, by_block: bool = True) -> Any:
        """The matrix that adds up columns over the units of every block, or over all."""
        from scipy.sparse import csr_array

        blocks = self.block if by_block else np.zeros_like(self.block)
        n_blocks = int(blocks.max()) + 1
        rows = np.arange(len(columns))[:, None] * n_blocks + blocks
        places = np.broadcast_to(self.places, rows.shape)
        shape = (len(columns) * n_blocks, self.width)
        return csr_array((columns.ravel(), (rows.ravel(), places.ravel())), shape=shape)

    def _usual_sums(self, value: float) -> F64:
        """What each cluster adds to the sums with this value at usual means, [needed, C]."""
        z_C = (value - self.usual[:, 0])[self.block]
        return np.array([z_C**power * self.columns[column] for power, column in self.needed])

    @cached_property
    def changing(self) -> list[Any]:
        """For every value but the first, the matrix of how the sums change from the first value."""
        base, *others = self.usual_sums
        return [self._adding(other - base, by_block=False) for other in others]

    def share(self, arms: I8) -> bool:
        """Whether the units of each cluster share their arm in all draws, int8 [columns, D]."""
        study = self.study
        if len(self.places) == len(study.column):
            return True
        return bool(np.array_equal(arms[study.column], arms[self.places][study.cluster]))

    def add(self, arms: I8, out: F64) -> None:
        """Write the sums of some draws to out, float64 [needed, D]."""
        inside = [self._inside(arms, members) for _, members in self.values[1:]]
        out[:] = self.usual_sums[0].sum(axis=1)[:, None]
        for matrix, chosen in zip(self.changing, inside, strict=True):
            out += matrix @ chosen
        others = [self.counting @ chosen for chosen in inside]
        counts = [self.sizes[:, None] - sum(others, np.zeros((len(self.sizes), 1))), *others]
        mean = sum((v * n for (v, _), n in zip(self.values, counts, strict=True)), 0.0)
        mean = mean / self.sizes[:, None]
        # Arms divide evenly into most blocks: these have the same mean in every draw.
        apart = np.abs(mean - self.usual).max(axis=1)
        changed = np.flatnonzero(apart > ROUNDING * np.abs(self.study.score).max())
        if len(changed):
            self._correct(changed, mean[changed], inside, out)

    def _correct(self, blocks: I64, mean: F64, inside: list[F64], out: F64) -> None:
        """Put right what the sums of some blocks add, whose means in these draws are other ones."""
        name = blocks.tobytes()
        if self.last_blocks[0] != name:
            rows = np.arange(len(self.columns))[:, None] * len(self.sizes) + blocks
            self.last_blocks = (name, self.adding[rows.ravel()])
        matrix = self.last_blocks[1]
        sums = [(matrix @ chosen).reshape(len(self.columns), len(blocks), -1) for chosen in inside]
        first = self.totals[:, blocks] - sum(sums, np.zeros((1, 1, out.shape[1])))
        for (value, _), group in zip(self.values, [first, *sums], strict=True):
            z_BD, usual = value - mean, value - self.usual[blocks]
            now, then = np.ones_like(z_BD), np.ones_like(usual)
            for power in range(1 + max(power for power, _ in self.needed)):
                change = now - then
                for row, (wanted, column) in zip(out, self.needed, strict=True):
                    if wanted == power:
                        row += np.einsum("bd,bd->d", change, group[column])
                now, then = now * z_BD, then * usual

    @staticmethod
    def _inside(arms: I8, members: I64) -> F64:
        chosen = np.isin(arms, members) if len(members) > 1 else arms == members[0]
        return chosen.astype(np.float64)
