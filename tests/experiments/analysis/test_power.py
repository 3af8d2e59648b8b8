"""Smallest detectable effects before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motet.experiments.analysis.power import (
    power,
    share_difference,
    simulated_power,
    smallest_standardized,
)
from motet.experiments.design.assignment import make_design
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library


def power_of(entry: dict[str, Any], alpha: float = 0.05) -> dict[str, Any]:
    specs, problems = parse_experiments([entry], Path(), Library(Path()))
    assert not problems, problems
    experiment = LIBRARY[specs[0].use](specs[0])
    units = experiment.units()
    return power(experiment, units, make_design(units, specs[0].arms), alpha)


@pytest.mark.parametrize(("per_arm", "points"), [(200, 13.9), (1000, 6.2), (10_000, 2.0)])
def test_detectable_accuracy_agrees_with_the_published_figures(per_arm: int, points: float) -> None:
    h = smallest_standardized(per_arm, per_arm, 0.05, binary=True)
    assert h is not None
    difference = share_difference(0.5, h)
    assert difference is not None
    assert 100 * difference == pytest.approx(points, abs=0.11)


@pytest.mark.parametrize(("per_arm", "d"), [(100, 0.40), (1000, 0.125)])
def test_detectable_log_loss_agrees_with_the_published_figures(per_arm: int, d: float) -> None:
    assert smallest_standardized(per_arm, per_arm, 0.05) == pytest.approx(d, abs=0.005)


def test_groups_too_small_for_any_effect_give_none() -> None:
    assert smallest_standardized(1, 1, 0.05) is None
    assert smallest_standardized(0.4, 20, 0.05) is None
    assert smallest_standardized(2, 2, 0.05) > 3  # type: ignore[operator]
    assert share_difference(0.95, 1.0) is None


def test_power_speaks_the_unit_of_the_outcome_where_it_is_known() -> None:
    two = {
        "name": "x",
        "use": "contamination",
        "doses": [0, 4],
        "generate": {"count": 400, "seed": 0},
    }
    answer = power_of(two)
    assert answer["unit"] == "accuracy"
    assert 0.12 < answer["smallest_detectable"] < 0.14
    assert power_of(two, 0.01)["smallest_detectable"] > answer["smallest_detectable"]
    bits = power_of({"name": "x", "use": "memorization"})
    assert bits["smallest_detectable"] == pytest.approx(bits["standardized"] * 1.295, abs=0.01)
    assert power_of({"name": "x", "use": "knowledge"})["smallest_detectable"] is None


def test_clusters_count_and_not_units() -> None:
    from dataclasses import replace

    specs, _ = parse_experiments([{"name": "x", "use": "placebo"}], Path(), Library(Path()))
    experiment = LIBRARY["placebo"](specs[0])
    units = [replace(u, cluster=f"c{i // 4}") for i, u in enumerate(experiment.units())]
    answer = power(experiment, units, make_design(units, specs[0].arms))
    assert answer["standardized"] == pytest.approx(smallest_standardized(8, 8, 0.05))


def test_simulating_the_real_assignment_and_test_confirms_the_formula() -> None:
    entry = {"name": "x", "use": "placebo", "generate": {"count": 60, "seed": 0}}
    specs, _ = parse_experiments([entry], Path(), Library(Path()))
    experiment = LIBRARY["placebo"](specs[0])
    design = make_design(experiment.units(), specs[0].arms)
    size = smallest_standardized(30, 30, 0.05)
    assert size is not None
    assert 0.72 < simulated_power(experiment, design, size, simulations=300, draws=399) < 0.87
    assert simulated_power(experiment, design, 0.0, simulations=300, draws=399) < 0.09


@pytest.mark.parametrize("groups", [(1.5, 1.5), (1, 2), (2, 2), (3, 1)])
def test_a_handful_of_units_has_a_smallest_effect_too(groups: tuple[float, float]) -> None:
    size = smallest_standardized(*groups, alpha=0.05)
    assert size is not None
    assert 5 < size < 25
