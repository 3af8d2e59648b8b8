"""The calibration finds a sound test sound, an unsound one not, and effects where they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motet.experiments.types import OutcomeSpec
from tests.experiments.simulated import simulated

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "once", "use": "forgetting", "generate": {"count": 40, "seed": 0}},
        {"name": "members", "use": "membership", "generate": {"count": 60, "seed": 0}},
        {"name": "quiz", "use": "contamination", "generate": {"count": 80, "seed": 0}},
    ],
    ids=lambda entry: entry["name"],
)
def test_invented_scores_are_calibrated(entry: dict[str, Any]) -> None:
    from calibration import calibrate

    row = calibrate(simulated(entry, lambda n: 0.4 * n), nulls=80, draws=199)
    assert row["sound"], row
    assert row["rate"] <= 0.15
    if row["power"] is not None:
        assert row["power"] >= 0.6, "80 % give or take the error of 80 studies"


def test_too_many_false_alarms_are_unsound_and_too_few_are_coarse() -> None:
    from calibration import enough, null_row

    uniform = (np.arange(500) + 0.5) / 500
    assert null_row(uniform)["sound"]
    assert null_row(uniform)["rate"] == 0.05
    assert not null_row(uniform**2)["sound"], "22 % of these are below .05"
    assert enough([True] * 370 + [False] * 130), "74 % of 500 is 75 % give or take 2"
    assert not enough([True] * 340 + [False] * 160), "68 % is not"
    few = null_row(np.full(500, 0.3))
    assert few["coarse"]
    assert few["sound"]


def test_what_is_planted_has_its_size_and_stays_in_the_range() -> None:
    from calibration import raised

    rng = np.random.default_rng(0)
    share = OutcomeSpec("a", "a", "share", "more", binary=True)
    bits = OutcomeSpec("b", "b", "bits", "more", low=0.0, high=6.0)
    free = OutcomeSpec("c", "c", "nats", "more")
    zeros_and_ones = (rng.random(100_000) < 0.3).astype(float)
    assert raised(zeros_and_ones, 0.2, share, rng).mean() == pytest.approx(0.5, abs=0.01)
    ranks = rng.uniform(0, 6, 1000)
    moved = raised(ranks, 1.0, bits, rng)
    assert moved.mean() - ranks.mean() == pytest.approx(1.0, abs=1e-6)
    assert moved.max() <= 6.0
    assert raised(ranks, 1.0, free, rng).tolist() == (ranks + 1).tolist()


def test_a_calibration_that_was_stopped_goes_on_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import calibration

    entry = {"name": "once", "use": "forgetting", "generate": {"count": 12, "seed": 0}}
    one = simulated(entry, lambda n: 0.4 * n)
    monkeypatch.setattr(calibration, "load_measured", lambda _: SimpleNamespace(measured=[one]))
    monkeypatch.setattr(calibration, "calibrate", lambda m, *_: {"experiment": m.name})
    kept = tmp_path / "rows.jsonl"
    first = list(calibration.rows_of([Path("runs/a")], 20, 19, kept))

    def twice(*_: Any) -> None:
        raise AssertionError("computed twice")

    monkeypatch.setattr(calibration, "calibrate", twice)
    assert list(calibration.rows_of([Path("runs/a")], 20, 19, kept)) == first
    with pytest.raises(AssertionError, match="twice"):
        list(calibration.rows_of([Path("runs/a")], 21, 19, kept))


def test_a_strong_effect_of_the_training_is_not_in_what_is_planted() -> None:
    from calibration import calibrate

    entry = {"name": "members", "use": "membership", "generate": {"count": 40, "seed": 0}}
    row = calibrate(simulated(entry, lambda n: 50.0 * n), nulls=60, draws=199)
    assert row["power"] >= 0.6, "values of treated units would hide it"
