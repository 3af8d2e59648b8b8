"""`bench/interval_coverage.py`: that it measures what reports print, and what it compares with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from motet.experiments.analysis.estimates import Comparison, Estimate
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Design, assign

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def compare(sizes: list[int], draws: int) -> Comparison:
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    keys = np.arange(len(sizes)).astype(np.uint64)
    design = Design(cluster, np.zeros(len(sizes), np.int64), keys, (1, 2))
    return Repeater(design, assign(design, 1), 5, draws).whole(np.array([0.0, 1.0]))


def test_tried_errors_are_those_of_statsmodels() -> None:
    import statsmodels.api as sm
    from interval_ways import terms_by

    comparison = compare([1] * 12, 9)
    y = np.random.default_rng(0).normal(size=12)
    fit = sm.OLS(y, sm.add_constant(comparison.arms.astype(float)))
    for way in ("HC2", "HC3"):
        _, m, pp = terms_by(way, y, comparison).observed
        assert pp**0.5 / m == pytest.approx(fit.fit(cov_type=way).bse[1])


def test_errors_of_clusters_take_the_blocks_of_the_hat_matrix_out() -> None:
    from interval_ways import terms_by

    comparison = compare([1, 2, 5, 3, 4, 2], 9)
    y = np.random.default_rng(0).normal(size=17)
    x = np.column_stack([np.ones(17), comparison.arms])
    bread = np.linalg.inv(x.T @ x)
    hat, left = x @ bread @ x.T, y - x @ bread @ x.T @ y
    for way, power in (("HC2", -0.5), ("HC3", -1.0)):
        meat = np.zeros((2, 2))
        for cluster in range(6):
            rows = comparison.clusters == cluster
            values, vectors = np.linalg.eigh(np.eye(rows.sum()) - hat[np.ix_(rows, rows)])
            score = x[rows].T @ (vectors * values**power) @ vectors.T @ left[rows]
            meat += np.outer(score, score)
        _, m, pp = terms_by(way, y, comparison).observed
        assert pp**0.5 / m == pytest.approx(float((bread @ meat @ bread)[1, 1]) ** 0.5)


@pytest.mark.parametrize(("low", "held"), [(-0.5, True), (0.5, False)])
def test_the_printed_ends_decide_what_is_held(
    monkeypatch: pytest.MonkeyPatch, low: float, held: bool
) -> None:
    """Not the test of the true effect: an end that would pass 0 stays where the test puts it."""
    import interval_coverage

    def printed(found: Estimate, *_: object) -> Estimate:
        return replace(found, low=low, high=1.0)

    monkeypatch.setattr(interval_coverage, "share_interval", printed)
    row = interval_coverage.one("share .92 to .99", 8, 1, 0, 99, "controls", [])
    assert row["shipped"] == (held, 1.0 - low)


def test_one_effect_for_all_is_held_by_every_way_that_inverts() -> None:
    from interval_coverage import one
    from interval_ways import TRIED

    rows = [one("one effect", 6, 1, seed, 199, "controls", list(TRIED)) for seed in range(60)]
    for way in ("shipped", *TRIED):
        held = [row[way][0] for row in rows if way in row]
        assert np.mean(held) > 0.87, way
