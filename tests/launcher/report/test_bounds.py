"""Drawings show nothing that cannot be: no share above 100 %, no tick beyond the possible range."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.launcher.report import by_member, plots
from motet.launcher.report.bounds import possible, possible_effect
from motet.launcher.report.forest import MARGIN, WIDTH, forest

SHARES = st.integers(0, 400).map(lambda n: n / 400)
DOSES = [0.0, 1.0, 4.0]
TICK = re.compile(r"−?[\d.]+")


def ticks(svg: str | None) -> list[float]:
    """The numbers along the vertical axis."""
    assert svg is not None
    axis = next(
        e for e in ElementTree.fromstring(svg).iter() if "matplotlib.axis_2" in e.get("id", "")
    )
    texts = [e.text or "" for e in axis.iter() if e.tag.endswith("text")]
    return [float(t.replace("−", "-")) for t in texts if TICK.fullmatch(t)]


def dose_curve(mean: list[float], half: float, unit: str, ends: Any = None) -> dict[str, Any]:
    curve = {
        "x": DOSES, "mean": mean, "low": [m - half for m in mean], "high": [m + half for m in mean],
        "label": "y", "unit": unit,
    }  # fmt: skip
    return {"curves": {"dose_response": curve | ({} if ends is None else {"range": ends})}}


def series(mean: list[float], half: float, unit: str, ends: Any = None) -> dict[str, Any]:
    one = {
        "arm": "shown", "steps": [0, 10, 20], "mean": mean, "low": [m - half for m in mean],
        "high": [m + half for m in mean],
    }  # fmt: skip
    return {"label": "y", "unit": unit, "series": [one], "range": ends}


@pytest.mark.parametrize("mean", [[0.97, 0.99, 1.0], [0.0, 0.01, 0.02], [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("ends", [None, [0.0, 1.0]])
def test_no_tick_of_a_share_is_below_0_or_above_100_percent(mean: list[float], ends: Any) -> None:
    drawn = [
        plots.dose_response(dose_curve(mean, 0.2, "accuracy", ends), "k"),
        plots.over_time(series(mean, 0.2, "accuracy", ends), {"shown": 1.0}, "k"),
    ]
    for svg in drawn:
        found = ticks(svg)
        assert len(found) >= 2
        assert min(found) >= 0
        assert max(found) <= 100


def test_no_tick_of_an_exposure_is_beyond_the_most_bits_that_there_are() -> None:
    most = math.log2(8)
    mean = [2.8, 2.9, most]
    for half in (0.02, 1.5):
        free = ticks(plots.dose_response(dose_curve(mean, half, "bits"), "k"))
        held = ticks(plots.dose_response(dose_curve(mean, half, "bits", [0.0, most]), "k"))
        assert max(held) <= most
        assert max(free) > most or half < 1, "without a range the axis goes on"
        assert len(held) >= 2


def test_a_gain_of_shares_has_no_tick_beyond_one_hundred_points() -> None:
    curve = {"x": [1, 4, 16], "mean": [0.98, 0.9, 0.8], "low": [0.7] * 3, "high": [1.3] * 3,
             "unit": "accuracy", "label": "gain"}  # fmt: skip
    for ends in (None, [-1.0, 1.0]):
        drawn = plots.since_exposure({"curves": {"since_exposure": curve | {"range": ends}}}, "k")
        assert max(ticks(drawn)) <= 100


def test_the_effect_by_member_has_no_tick_beyond_one_hundred_points() -> None:
    rows = [
        {"label": name, "parameters": size, "judged": size > 1e6,
         "outcome": {"effect": 0.95, "low": 0.6, "high": 1.3, "unit": "accuracy", "label": "y"}}
        for name, size in (("small", 1e6), ("whole", 4e6))
    ]  # fmt: skip
    assert max(ticks(by_member.picture(rows, "k"))) <= 100


def test_a_mean_is_drawn_where_it_was_measured_whatever_its_class_said() -> None:
    assert possible({"range": [0.0, 1.0]}, "points", [1.5, -2.0, math.nan]) == (-2.0, 1.5)
    entry = dose_curve([1.0, 5.0, 9.0], 0.5, "points", [0.0, 2.0])
    assert max(ticks(plots.dose_response(entry, "k"))) >= 8


@given(
    st.lists(SHARES, min_size=3, max_size=3), SHARES,
    st.sampled_from([None, [0.0, 1.0]]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_ticks_of_any_shares_are_possible(mean: list[float], half: float, ends: Any) -> None:
    found = ticks(plots.dose_response(dose_curve(mean, half, "accuracy", ends), "k"))
    assert all(-1e-6 <= tick <= 100 + 1e-6 for tick in found)


def test_the_interval_graphic_ends_where_an_effect_must_end() -> None:
    share = {"effect": 0.9, "low": 0.5, "high": 1.4, "smallest_detectable": 7.0, "unit": "accuracy"}
    cut = forest(share | {"high": 1.0, "smallest_detectable": 1.0}, "found")
    assert forest(share, "found") == cut
    bits = {"effect": 2.0, "low": -1.0, "high": 9.0, "unit": "bits"}
    assert forest(bits, "found", [0.0, 3.0]) == forest(bits | {"high": 3.0}, "found")
    assert possible_effect(bits) == (-math.inf, math.inf)
    left, right = (float(x) for x in re.findall(r"M([\d.]+) [\d.]+v8", cut))
    assert MARGIN <= left < right <= WIDTH - MARGIN
