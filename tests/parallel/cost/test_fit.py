from __future__ import annotations

from dataclasses import replace

import pytest

from motet.models.config import preset
from motet.parallel.cluster.constants import BOUNDS, DEFAULTS, Constants
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cluster.devices import DEVICES
from motet.parallel.cost.fit import fit, fit_memory
from motet.parallel.cost.stages import Predictor, Training
from motet.parallel.layout.layout import Layout

MODEL = preset("7b", 32_000)
CLUSTER = homogeneous("a100-80", 2)
START = Constants(matmul=0.78)
LAYOUTS = [
    Layout(dp_shard=16 // (tp * pp), tp=tp, pp=pp, micro_sequences=micro, recompute="full")
    for tp in (1, 2, 4, 8)
    for pp in (1, 2)
    for micro in (1, 2, 4)
]


def time_s(layout: Layout, constants: Constants) -> float:
    training = Training(128, 2048)
    return (
        Predictor(MODEL, CLUSTER, training, constants={"a100-80": constants})
        .predict(layout)
        .step_time_s
    )


def test_a_fit_finds_the_constants_that_made_the_runs_although_some_runs_are_odd() -> None:
    true = replace(START, matmul=0.6, bandwidth=0.5, intra=0.4)
    measured = [time_s(layout, true) for layout in LAYOUTS]
    measured[3] *= 1.6
    measured[11] *= 1.4
    found = fit(
        ("matmul", "bandwidth", "intra"),
        START,
        [lambda c, one=one: time_s(one, c) for one in LAYOUTS],
        measured,
    )
    assert found.constants.matmul == pytest.approx(0.6, rel=0.08)
    assert found.constants.intra == pytest.approx(0.4, rel=0.15)
    assert found.median_error < 0.02
    assert found.at_bounds == ()


def test_a_constant_that_ends_at_a_bound_is_named() -> None:
    measured = [time_s(layout, START) / 10 for layout in LAYOUTS[:6]]
    found = fit(
        ("matmul",), START, [lambda c, one=one: time_s(one, c) for one in LAYOUTS[:6]], measured
    )
    assert found.at_bounds == ("matmul",)
    assert found.constants.matmul == pytest.approx(BOUNDS["matmul"][1], rel=1e-3)


def test_fewer_runs_than_constants_are_refused() -> None:
    with pytest.raises(ValueError, match="1 runs cannot fit 2 constants"):
        fit(("matmul", "intra"), START, [lambda c: 1.0], [1.0])


def test_memory_constants_are_found_from_what_fitted_and_what_did_not() -> None:
    loads = [(10.0 + i, 30.0) for i in range(40)]

    def fill(activations: float, rest: float, constants: Constants) -> float:
        used = constants.activation * activations + rest + constants.reserved_gib
        return used / 79.1

    true = Constants(activation=1.2, reserved_gib=4.0)
    failed = [fill(*load, true) > 1 for load in loads]
    assert any(failed)
    assert not all(failed)
    found = fit_memory(Constants(), [lambda c, x=x: fill(*x, c) for x in loads], failed)
    said = [fill(*load, found) > 1 for load in loads]
    assert sum(a != b for a, b in zip(said, failed, strict=True)) <= 2
    assert all(a or not b for a, b in zip(said, failed, strict=True))  # no run falsely fits


def test_what_ships_is_within_its_bounds_and_known_to_the_catalogue() -> None:
    for kind, constants in DEFAULTS.items():
        assert kind in DEVICES
        for name, (low, high) in BOUNDS.items():
            value = getattr(constants, name)
            assert value is None or low <= value <= high, (kind, name)
