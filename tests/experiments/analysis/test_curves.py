"""Curves of the report stay inside the possible range of what they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.curves import mean_interval, since_exposure


@pytest.mark.parametrize("ends", [(0.0, 4.0), (None, 4.0), (None, None)])
def test_the_interval_of_a_mean_stops_where_the_outcome_must_stop(ends: Any) -> None:
    values = np.array([4.0, 4.0, 4.0, 3.0, 0.0, 4.0])
    free = mean_interval(values, np.arange(6), 0.05)
    mean, low, high, n = mean_interval(values, np.arange(6), 0.05, ends=ends)
    assert free[2] is not None
    assert free[2] > 4.0
    assert (mean, low, n) == (free[0], free[1], free[3])
    assert high == (free[2] if ends[1] is None else 4.0)
    wrong = mean_interval(values, np.arange(6), 0.05, ends=(0.0, 1.0))
    assert wrong[2] == mean, "a class that is wrong about its range hides no mean"


def test_a_gain_stops_where_the_groups_would_be_a_whole_range_apart() -> None:
    steps, when = np.array([0, 4, 8], dtype=np.int64), [np.array([1], dtype=np.int64)] * 8
    treated = np.arange(8) < 4
    start = np.where(treated, 0.25, 0.0)
    late = np.where(treated, np.array([1.0, 1, 1, 0] * 2), 0.0)
    values = np.stack([start, late, late])
    curve, _ = since_exposure(
        values, steps, treated, ~treated, np.arange(8), when, 0.05, 1, (0.0, 1.0)
    )
    assert curve is not None
    assert curve["mean"] == pytest.approx([0.5, 0.5])
    assert curve["range"] == pytest.approx([-1.25, 0.75])
    assert curve["high"] == pytest.approx([0.75, 0.75])
