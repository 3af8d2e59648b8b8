"""Two experiments that share units on purpose: what one does where the other was done too.

Units fall into four cells, (shown by the first or held out) x (shown by the second or held out).
The interaction is the difference of differences, the least-squares coefficient of the product of
the two treatments beside both of them and the blocks of both experiments, divided by its
cluster-robust standard error (HC0).

Its hypothesis, that the two effects add up, leaves the two effects unknown. So they are estimated
and removed, and both assignments are repeated, each by its own design, apart from each other
(a residual randomization test: Freedman and Lane, "A Nonstochastic Interpretation of Reported
Significance Levels", 1983; Ding, Feller and Miratrix, "Randomization Inference for Treatment Effect
Variation", JRSS B 2016, section 3, for the nuisance effects). The statistic does not depend on the
two effects that are removed, only on how well they are known, so p-values are nearly exact and not
exactly so; tests/experiments/analysis/test_two_by_two.py holds their rate of error. The interval
inverts the same test for constant interactions.

Shapes: U units that both experiments have, C clusters, D draws, K columns of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.answers import CONFIDENCE, Answer
from motet.experiments.analysis.cells import ROUNDING
from motet.experiments.analysis.measured import ByOther, Measured, held_out_units
from motet.experiments.analysis.power import primary_of
from motet.experiments.analysis.shares import cut
from motet.experiments.analysis.sums import TOLERANCE, farthest, share_as_extreme
from motet.experiments.design.assignment import assign_many
from motet.experiments.stream.random import name_key

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
CHUNK_CELLS = 1 << 18
MOST_BLOCK_CELLS = 4_000_000
FEWEST_OF_CELL = 2
CONTRAST = "effect where both were shown, less the effects of either alone"


@dataclass(frozen=True)
class Crossed:
    """Units that two experiments have in common.

    one, other: int64 [U], their number in each. Treatments, float64 [U] and [D, U], are 1 where a
    unit's own experiment showed it.
    """

    one: I64
    other: I64
    treated: tuple[F64, F64]
    draws: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
    blocks: tuple[I64, I64]
    clusters: I64

    @property
    def cell(self) -> I64:
        """0 neither, 1 the first only, 2 the second only, 3 both, int64 [U]."""
        return (self.treated[0] + 2 * self.treated[1]).astype(np.int64)


@dataclass(frozen=True)
class Interaction:
    """The estimate; None where the data cannot give the number (`note` says why)."""

    effect: float | None
    low: float | None
    high: float | None
    p: float
    n: int
    note: str = ""


def add_interactions(studies: Sequence[Answer], entries: Sequence[dict[str, Any]]) -> None:
    """Add to each entry, as a secondary outcome, how its effect depends on every experiment that
    it shares units with on purpose; and the means and counts of the four cells.
    """
    number = {study.spec.name: place for place, study in enumerate(studies)}
    for study, entry in zip(studies, entries, strict=True):
        for other in study.m.by_others:
            if other.declared and other.name in number:
                outcome = interaction_outcome(study, studies[number[other.name]], other)
                if outcome is not None:
                    entry["secondary"].append(outcome)


def interaction_outcome(study: Answer, other: Answer, told: ByOther) -> dict[str, Any] | None:
    """One OUTCOME of the report with its `cells`; None where few units are the same in both."""
    crossed = cross(study.m, other.m, told, study.seed, study.repeater.draws)
    if crossed is None:
        return None
    primary = primary_of(study.m.experiment)
    values = study.values(primary)[crossed.one]
    found = interaction(values, crossed, 1 - CONFIDENCE)
    assumption = (
        f"both assignments repeated {study.repeater.draws:,} times, with the two effects estimated "
        "and removed: nearly exact when each effect is the same for all units, or with many units"
    )
    return {
        "name": f"interaction_{told.name}",
        "label": f"{primary.label}, interaction with {told.name}",
        "unit": primary.unit,
        "contrast": CONTRAST,
        "effect": found.effect,
        "low": cut(found.low, found.effect, 2 * primary.reach),
        "high": cut(found.high, found.effect, 2 * primary.reach),
        "confidence": CONFIDENCE,
        "p": found.p if found.effect is not None else None,
        "p_corrected": found.p if found.effect is not None else None,
        "control_mean": None,
        "treated_mean": None,
        "n": found.n,
        "smallest_detectable": None,
        "assumption": f"{assumption}; {found.note}" if found.note else assumption,
        "trend": None,
        "per_arm": [],
        "cells": {"with": told.name, "rows": cell_rows(values, crossed)},
    }


def cell_rows(values: F64, crossed: Crossed) -> list[dict[str, Any]]:
    """Mean and count of each cell, of units with a value."""
    rows = []
    for cell in range(4):
        own = values[(crossed.cell == cell) & np.isfinite(values)]
        mean = float(own.mean()) if len(own) else None
        shown = {"shown": bool(cell & 1), "shown_by_other": bool(cell & 2)}
        rows.append({**shown, "mean": mean, "n": len(own)})
    return rows


def cross(m: Measured, other: Measured, told: ByOther, key: int, draws: int) -> Crossed | None:
    """Return the units that are one and the same in both, with both assignments repeated."""
    twins = np.unique(told.twin[told.twin >= 0], return_counts=True)
    single = twins[0][twins[1] == 1]
    one = np.flatnonzero(np.isin(told.twin, single))
    if len(one) < 4 * FEWEST_OF_CELL:
        return None
    theirs = told.twin[one]
    sides = []
    for side, units, name in ((m, one, "one"), (other, theirs, "other")):
        repeated = assign_many(side.design, name_key(key, "two by two", told.name, name), draws)
        shown = np.array([not arm.is_control for arm in side.experiment.spec.arms])
        blocks = side.design.block_of_cluster[side.design.cluster_of_unit]
        treated = (~held_out_units(side))[units].astype(np.float64)
        sides.append((treated, shown[repeated[:, units]], blocks[units]))
    clusters = joined(m.design.cluster_of_unit[one], other.design.cluster_of_unit[theirs])
    (treated_a, draws_a, blocks_a), (treated_b, draws_b, blocks_b) = sides
    return Crossed(
        one, theirs, (treated_a, treated_b), (draws_a, draws_b), (blocks_a, blocks_b), clusters
    )


def joined(one: I64, other: I64) -> I64:
    """Clusters of units that either of two clusterings puts together, int64 [U]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = np.unique(one, return_inverse=True)[1]
    second = np.unique(other, return_inverse=True)[1] + first.max(initial=0) + 1
    size = int(second.max(initial=0)) + 1
    graph = coo_array((np.ones(len(first)), (first, second)), (size, size))
    return connected_components(graph, directed=False)[1][first].astype(np.int64)


def interaction(values: F64, crossed: Crossed, alpha: float) -> Interaction:
    """Estimate the interaction on one outcome, float64 [U], NaN where a unit has none."""
    kept = np.flatnonzero(np.isfinite(values))
    counts = np.bincount(crossed.cell[kept], minlength=4)
    if counts.min() < FEWEST_OF_CELL:
        note = f"a cell has fewer than {FEWEST_OF_CELL} units with a value"
        return Interaction(None, None, None, 1.0, len(kept), note)
    order = kept[np.argsort(crossed.clusters[kept], kind="stable")]
    starts = np.flatnonzero(np.diff(crossed.clusters[order], prepend=-1))
    basis, note = _blocks(tuple(blocks[order] for blocks in crossed.blocks))
    actual = _Regressed(basis, *(each[None, order] for each in crossed.treated))
    # Twice: the first means are rounded at the outcome's size, the second at its spread's.
    rest = values[order] - basis @ (basis.T @ values[order])
    y = actual.without(rest - basis @ (basis.T @ rest))[0]
    product = actual.product[0]
    if float(np.abs(y).max()) <= TOLERANCE * max(float(np.abs(values[order]).max()), 1e-300):
        return Interaction(0.0, None, None, 1.0, len(kept), "nothing is left but the two effects")
    if float(product @ product) <= TOLERANCE:
        return Interaction(None, None, None, 1.0, len(kept), "no block holds all four cells")
    effect = float(product @ y) / float(product @ product)
    rows = [_sums(actual, y, product, starts)]
    step = max(1, CHUNK_CELLS // len(order))
    for start in range(0, len(crossed.draws[0]), step):
        parts = [each[start : start + step][:, order].astype(float) for each in crossed.draws]
        rows.append(_sums(_Regressed(basis, *parts), y, product, starts))
    lengths = (float(np.linalg.norm(y)), float(np.linalg.norm(product)))
    squared = _Squared(np.concatenate(rows, axis=1), lengths)
    if squared.at(0.0)[0] == 0:
        effect = 0.0
    low, high = (squared.end(effect, side, alpha) for side in (-1.0, 1.0))
    if low is None or high is None:
        note = f"{note}; " if note else ""
        note += "cells are too small, or hold too few different values, for a bounded interval"
    return Interaction(effect, low, high, squared.p(0.0), len(kept), note)


def _blocks(blocks: Sequence[I64]) -> tuple[F64, str]:
    """Orthonormal columns, float64 [U, K], that hold the constant and the blocks of both."""
    n = len(blocks[0])
    numbers = [np.unique(each, return_inverse=True)[1] for each in blocks]
    width = sum(int(each.max()) + 1 for each in numbers)
    if n * width > MOST_BLOCK_CELLS:
        return np.full((n, 1), 1 / math.sqrt(n)), "blocks are too many to be adjusted for"
    columns = [np.eye(int(each.max()) + 1)[each] for each in numbers]
    left, size, _ = np.linalg.svd(np.column_stack(columns), full_matrices=False)
    return left[:, size > TOLERANCE * size[0]], ""


class _Regressed:
    """Some draws of both treatments, and what of their product neither of them nor blocks explain.

    Args:
        basis: float64 [U, K], orthonormal.
        a, b: float64 [D, U].
    """

    def __init__(self, basis: F64, a: F64, b: F64) -> None:
        rest = [each - (each @ basis) @ basis.T for each in (a, b, a * b)]
        # Gram-Schmidt, row by row: a treatment that blocks explain leaves nothing and is zero.
        self.first = _unit_rows(rest[0])
        self.second = _unit_rows(rest[1] - _along(rest[1], self.first))
        self.product = self.without(rest[2])

    def without(self, values: F64) -> F64:
        """Values, [U] or [D, U] and free of blocks, less what the treatments explain, [D, U]."""
        rest = values - _along(values, self.first)
        return rest - _along(rest, self.second)


def _along(values: F64, rows: F64) -> F64:
    """The part of values along each row of unit length, [D, U]."""
    return (values * rows).sum(axis=1, keepdims=True) * rows


def _unit_rows(rows: F64) -> F64:
    """Rows of length 1; one that is as good as zero becomes zero."""
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return np.where(length > 1e-6, rows / np.maximum(length, 1e-6), 0.0)


def _sums(draws: _Regressed, y: F64, product: F64, starts: I64) -> F64:
    """Per draw what the statistic needs at any interaction tau, float64 [7, D].

    The coefficient is (p - tau q) / s. Sums over clusters of their squares and products follow.
    """
    weight = draws.product
    parts = [weight * draws.without(y), weight * draws.without(product), weight * weight]
    along, across, square = (np.add.reduceat(part, starts, axis=1) for part in parts)
    s = square.sum(axis=1)
    safe = np.where(s > TOLERANCE, s, 1.0)
    a, b = along.sum(axis=1) / safe, across.sum(axis=1) / safe
    along -= a[:, None] * square
    across -= b[:, None] * square
    products = [(x * z).sum(axis=1) for x, z in ((along, along), (along, across), (across, across))]
    return np.stack([a, b, safe, *products, (s > TOLERANCE).astype(float)])


class _Squared:
    """The squared studentized statistic of the actual assignment (column 0) and of every draw.

    lengths: Euclidean lengths of the outcome and of the actual product, which bound rounding.
    """

    def __init__(self, sums: F64, lengths: tuple[float, float]) -> None:
        self.a, self.b, self.s, self.pp, self.pq, self.qq, self.defined = sums
        self.lengths = lengths

    def at(self, tau: float) -> F64:
        """When an interaction of tau is removed; a draw without a cell counts as extreme."""
        top = ((self.a - tau * self.b) * self.s) ** 2
        # As in `sums`: what is smaller than the rounding of a product of two lengths is 0.
        most = self.lengths[0] + abs(tau) * self.lengths[1]
        top = np.where(top <= ROUNDING**2 * self.s * most**2, 0.0, top)
        bottom = self.pp - 2 * tau * self.pq + tau**2 * self.qq
        bottom = np.where(bottom > 1e-12 * (self.pp + tau**2 * self.qq), bottom, 0.0)
        value = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.inf)
        return np.where(self.defined > 0, np.where(top > 0, value, 0.0), np.inf)

    def p(self, tau: float) -> float:
        """Two-sided p-value of the hypothesis that the interaction is tau."""
        squared = self.at(tau)
        return share_as_extreme(squared[1:], float(squared[0]))

    def end(self, effect: float, side: float, alpha: float) -> float | None:
        """The farthest interaction on one side that the test does not reject."""
        error = math.sqrt(float(self.pp[0])) / float(self.s[0])
        return farthest(self.p, effect, side, alpha, error) if error > 0 else None
