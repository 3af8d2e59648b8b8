"""The sums of large designs are those of small ones, and what is 0 but for rounding counts as 0."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from motet.experiments.analysis import sums
from motet.experiments.analysis.cells import Projection, Residuals
from motet.experiments.analysis.estimates import estimate
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.sums import by_block, direct
from motet.experiments.design.assignment import Design, assign, assign_many

F64 = npt.NDArray[np.float64]


def random_design(rng: np.random.Generator, n_clusters: int, arms: int, larger: bool) -> Design:
    """Blocks of any size; clusters of one unit, or of one and more."""
    extra = rng.integers(0, n_clusters, size=n_clusters if larger else 0)
    cluster = rng.permutation(np.concatenate([np.arange(n_clusters), extra]))
    return Design(
        cluster,
        rng.integers(0, rng.integers(1, 9), size=n_clusters),
        np.sort(rng.integers(0, 2**64, size=n_clusters, dtype=np.uint64)),
        tuple(rng.integers(1, 4, size=arms).tolist()),
    )


def studies() -> Iterator[tuple[Residuals, npt.NDArray[np.int8]]]:
    rng = np.random.default_rng(0)
    for number in range(24):
        design = random_design(rng, 60, 2 + number % 3, larger=number % 2 == 1)
        score = np.log2(1 + np.arange(len(design.weights))) if number % 3 else np.r_[0.0, 1, 1, 1]
        draws = assign_many(design, number, 200)
        kept = np.flatnonzero(rng.random(draws.shape[1]) < (0.9 if number % 4 else 1.1))
        order = kept[np.argsort(design.cluster_of_unit[kept], kind="stable")]
        cluster = np.unique(design.cluster_of_unit[order], return_inverse=True)[1]
        blocks = design.block_of_cluster[design.cluster_of_unit[order]]
        projection = Projection(np.unique(blocks, return_inverse=True)[1], None)
        if number % 5 > 1:
            covariate = projection.residual(rng.normal(size=len(order)))
            projection = Projection(projection.block, covariate / np.linalg.norm(covariate))
        y = projection.residual(rng.normal(size=len(order)).round(number % 2))
        treatment = projection.residual(score[draws[0][order]])
        yield Residuals(y, treatment, projection, cluster, order, score), draws


def test_sums_by_block_are_those_of_single_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted arms, trends, left-over units, clusters, missing values, covariates."""
    done_directly = 0

    def counted(study: Residuals, draws: npt.NDArray[np.int8]) -> F64:
        nonlocal done_directly
        done_directly += len(draws)
        return direct(study, draws)

    monkeypatch.setattr(sums, "direct", counted)
    for study, draws in studies():
        expected = direct(study, draws)
        found = by_block(study, draws)
        assert found is not None
        scale = np.abs(expected).max(axis=1, keepdims=True)
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-11)
    assert done_directly < 0.1 * 24 * 200


def test_a_cluster_whose_units_have_different_arms_is_told_from_the_others() -> None:
    study, draws = next((s, d) for s, d in studies() if len(s.starts()) < len(s.column))
    first = study.starts()[np.flatnonzero(np.diff(study.starts()) > 1)[0]]
    spoiled = draws.copy()
    spoiled[150, study.column[first]] = 1 - spoiled[150, study.column[first]]
    assert by_block(study, draws) is not None
    assert by_block(study, spoiled) is None


@pytest.mark.parametrize("in_large", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1 / 3, -100.0])
def test_an_effect_of_zero_has_p_one(
    in_large: bool, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding leaves 1e-17 of an effect that is 0; half of all draws then seemed less extreme."""
    if in_large:
        monkeypatch.setattr(sums, "FEWEST_CELLS_BY_BLOCK", 0)
    rng = np.random.default_rng(1)
    for seed in range(20):
        design = random_design(rng, 36, 2, larger=False)
        cells = design.block_of_cluster[design.cluster_of_unit] * 2 + assign(design, seed)
        y = np.full(36, 0.4)
        for cell in np.unique(cells):
            members = np.flatnonzero(cells == cell)
            threes = members[: len(members) // 3 * 3]
            y[threes] = np.resize([0.1, 0.7, 0.4], len(threes))
        arms = cells % 2
        found = estimate(y + offset, None, Repeater(design, arms, 3, 999).whole(np.array([0.0, 1])))
        assert (found.effect, found.p) == (0.0, 1.0)


def test_an_effect_of_zero_without_any_spread_has_p_one() -> None:
    """0 / 0: units deviate only in a block that is treated as a whole."""
    design = Design(
        np.arange(12), np.repeat([0, 1], [4, 8]), np.arange(12).astype(np.uint64), (1, 1)
    )
    arms = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    y = np.r_[0.1, 0.3, 0.6, 0.7, np.full(8, 0.3)]
    found = estimate(y, None, Repeater(design, arms, 3, 999).whole(np.array([0.0, 1])))
    assert (found.effect, found.p) == (0.0, 1.0)
