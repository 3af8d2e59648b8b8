"""Three answers computed again from raw scores, by a dozen lines of numpy that know nothing of the
library: outcome, assignment, regression, p-value and interval.

The assignment is repeated with other random numbers, so p and the ends of intervals agree within
Monte Carlo error; effects and standard errors agree to the last printed digit and beyond.

Shapes: U units, C clusters, D repetitions, K columns of blocks and covariate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.answers import Answer
from motet.experiments.analysis.measured import Measured
from motet.experiments.types import Unit
from tests.experiments.simulated import simulated

Array = npt.NDArray[Any]
DRAWS = 9999


def deal(rng: np.random.Generator, block_C: Array, arms_of_round: Array) -> Array:
    """One assignment, int [C], as docs/statistics.md tells it."""
    arm_C, left_over = np.empty(len(block_C), dtype=int), []
    for block in np.unique(block_C):
        members = rng.permutation(np.flatnonzero(block_C == block))
        rounds = len(members) // len(arms_of_round)
        dealt = rounds * len(arms_of_round)
        arm_C[members[:dealt]] = np.tile(arms_of_round, rounds)
        left_over += members[dealt:].tolist()
    more = [rng.permutation(arms_of_round) for _ in range(len(left_over) // len(arms_of_round) + 1)]
    arm_C[left_over] = np.concatenate(more)[: len(left_over)]
    return arm_C


def fit(y_U: Array, treated_DU: Array, others_UK: Array, member_UC: Array) -> tuple[Array, Array]:
    """(coefficient, cluster-robust standard error) of each row of treatments, [D]."""
    basis_UK = np.linalg.qr(others_UK)[0]
    left_U = y_U - basis_UK @ (basis_UK.T @ y_U)
    left_DU = treated_DU - (treated_DU @ basis_UK) @ basis_UK.T
    size_D = (left_DU**2).sum(axis=1)
    slope_D = left_DU @ left_U / size_D
    score_DC = (left_DU * (left_U - slope_D[:, None] * left_DU)) @ member_UC
    return slope_D, np.sqrt((score_DC**2).sum(axis=1)) / size_D


def p_value(shift: float, y_U: Array, treated_U: Array, repeated_DU: Array, *fixed: Array) -> float:
    """Of the hypothesis that treatment adds `shift` to every unit."""
    slopes, errors = fit(y_U - shift * treated_U, np.vstack([treated_U, repeated_DU]), *fixed)
    t = np.abs(slopes) / errors
    return float(np.mean(t >= t[0] * (1 - 1e-9)))


def agree(
    found: dict[str, Any],
    error: float | None,
    y_U: Array,
    x_U: Array,
    m: Measured,
    dose_score: Array,
    arms_of_round: Array,
) -> None:
    """Compare effect, standard error (None is not known), p and both ends of the interval."""
    labels = np.array([unit.cluster or unit.id for unit in m.units])
    names, first, cluster_U = np.unique(labels, return_index=True, return_inverse=True)
    blocks = np.unique([unit.block for unit in m.units], return_inverse=True)[1]
    rng = np.random.default_rng(7)
    repeated_DC = np.array([deal(rng, blocks[first], arms_of_round) for _ in range(DRAWS)])
    repeated_DU, treated_U = dose_score[repeated_DC][:, cluster_U], dose_score[m.arms]
    others_UK = np.column_stack([np.eye(blocks.max() + 1)[blocks], x_U])
    data = (y_U, treated_U, repeated_DU, others_UK, np.eye(len(names))[cluster_U])
    slope, own_error = fit(y_U, treated_U[None, :], *data[3:])
    assert found["effect"] == pytest.approx(slope[0], rel=1e-9)
    assert error is None or error == pytest.approx(own_error[0], rel=1e-9)
    p = p_value(0.0, *data)
    assert found["p"] == pytest.approx(p, abs=monte_carlo(p))
    for end in (found["low"], found["high"]):
        assert p_value(end, *data) == pytest.approx(0.05, abs=monte_carlo(0.05))


def monte_carlo(p: float) -> float:
    """Four standard deviations of the difference of two p-values of so many repetitions."""
    return 4 * math.sqrt(2 * p * (1 - p) / DRAWS) + 1 / DRAWS


def items_of(m: Measured, step: int, kind: str) -> Iterator[tuple[Array, Array]]:
    """Per unit, (log-probability, tokens) of its items of one kind at the probe of a step."""
    scores, start = m.scores[m.steps.tolist().index(step)], 0
    for unit in m.units:
        chosen = [start + i for i, item in enumerate(unit.items) if item.kind == kind]
        yield scores.logprob[chosen], scores.n_tokens[chosen]
        start += len(unit.items)


def against(m: Measured, step: int, own: str, others: str) -> Iterator[tuple[Array, Array]]:
    """Per unit, log-probabilities of its own item and of those that it is ranked among."""
    pairs = zip(items_of(m, step, own), items_of(m, step, others), strict=True)
    return ((mine, theirs) for (mine, _), (theirs, _) in pairs)


def error_of(m: Measured, seed: int) -> float | None:
    """The library's standard error of the primary outcome, which the report does not hold."""
    answer = Answer(m, seed, 99, 1)
    outcome = next(outcome for outcome in m.experiment.outcomes if outcome.primary)
    whole = answer.repeater.whole(np.array([float(a.dose > 0) for a in answer.spec.arms]))
    covariate = answer.baseline(outcome)
    return answer.estimated(outcome, answer.final[outcome.name], covariate, whole).standard_error


def test_two_arms_in_blocks_of_two_and_three() -> None:
    def blocks(units: list[Unit]) -> list[Unit]:
        return [replace(u, block=f"b{i * 2 // 5}") for i, u in enumerate(units[:35])]

    m = simulated({"name": "once", "use": "forgetting"}, lambda n: 0.6 * n, 1, blocks)
    before, after = (
        np.array([float(p[0] / n[0]) for p, n in items_of(m, step, "rest")])
        for step in (1000, 1001)
    )
    found = analyze([m], 5, DRAWS, simulations=0)["experiments"][0]["primary"]
    score, dealt = np.array([0.0, 1.0]), np.array([0, 1])
    agree(found, error_of(m, 5), after - before, before, m, score, dealt)


def test_clusters_of_one_to_twelve_questions_in_three_arms() -> None:
    def clusters(units: list[Unit]) -> list[Unit]:
        sizes = np.repeat(np.arange(30), np.arange(30) % 12 + 1)
        return [replace(u, cluster=f"c{sizes[i]}", block="") for i, u in enumerate(units)]

    entry: dict[str, Any] = {"name": "quiz", "use": "contamination", "doses": [0, 4, 36]}
    entry["generate"] = {"count": 150}
    m = simulated(entry, lambda n: 0.2 * math.log2(1 + n), 2, clusters)
    before, after = (
        np.array([float(own[0] > others.max()) for own, others in pairs])
        for pairs in (against(m, 0, "right", "wrong"), against(m, 2000, "right", "wrong"))
    )
    found = analyze([m], 6, DRAWS, simulations=0)["experiments"][0]["primary"]
    score, dealt = np.array([0.0, 1.0, 1.0]), np.arange(3)
    agree(found, error_of(m, 6), after, before, m, score, dealt)


def test_doses_of_unequal_weights_and_their_trend() -> None:
    arms = [{"name": f"d{d}", "dose": d, "weight": w} for d, w in ((0, 3), (1, 1), (4, 2), (16, 1))]
    entry: dict[str, Any] = {"name": "canaries", "use": "memorization", "arms": arms}
    entry |= {"options": {"n_references": 31}, "generate": {"count": 80}}
    m = simulated(entry, lambda n: 0.4 * math.log2(1 + n), 3)
    before, after = (
        np.array([5 - math.log2(1 + (others > own).sum()) for own, others in pairs])
        for pairs in (against(m, 0, "secret", "reference"), against(m, 2000, "secret", "reference"))
    )
    found = analyze([m], 7, DRAWS, simulations=0)["experiments"][0]["primary"]
    dealt = np.repeat(np.arange(4), [3, 1, 2, 1])
    agree(found, error_of(m, 7), after, before, m, np.array([0.0, 1, 1, 1]), dealt)
    trend = found["trend"] | {"effect": found["trend"]["slope_per_doubling"]}
    agree(trend, None, after, before, m, np.log2([1.0, 2.0, 5.0, 17.0]), dealt)
