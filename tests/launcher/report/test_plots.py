"""Figures of the report: escaped, repeatable, themable, and honest about what is missing."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.experiments.analysis.answers import CONFIDENCE
from motet.launcher.report import plots
from motet.launcher.report.forest import axis, forest
from tests.launcher import sample_report

HOSTILE = sample_report.HOSTILE
ARMS = {"control": 0.0, "dose 4": 4.0}


def panel(label: str = "exposure", arm: str = "dose 4") -> dict[str, object]:
    series = [
        {"arm": name, "steps": [0, 10, 20], "mean": [1.0, y, y], "low": [0.5, y - 1, y - 1],
         "high": [1.5, y + 1, y + 1]}
        for name, y in (("control", 2.0), (arm, 5.0))
    ]  # fmt: skip
    return {"outcome": "exposure", "label": label, "unit": "bits", "series": series}


def texts(svg: str) -> str:
    return " ".join(
        e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")
    )


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "$\\frac{1}{2", "a\x00\x1b[31m\nb", "<b>Ÿ王</b>", "]]>"]
)
def test_labels_and_arms_are_text_in_the_drawing(hostile: str) -> None:
    svg = plots.over_time(panel(hostile, arm=hostile), {hostile: 4.0, "control": 0.0}, "k")
    assert svg is not None
    ElementTree.fromstring(svg)  # well formed
    assert "<script" not in svg
    assert "<img" not in svg
    assert "<b>" not in svg


def test_text_stays_text_and_says_what_the_axes_are() -> None:
    svg = plots.over_time(panel(), ARMS, "k")
    assert svg is not None
    assert "training step" in texts(svg)
    assert "exposure (bits)" in texts(svg)
    assert "dose 4" in texts(svg)


def test_equal_numbers_give_equal_bytes() -> None:
    entry = sample_report.questions()[0]
    assert plots.dose_response(entry, "k") == plots.dose_response(entry, "k")
    assert plots.training(sample_report.training(), ["canaries"], "k") == plots.training(
        sample_report.training(), ["canaries"], "k"
    )


def test_two_figures_of_one_page_share_no_id() -> None:
    entry = sample_report.questions()[0]
    ids = [
        re.findall(r'\bid="([^"]+)"', plots.dose_response(entry, key) or "") for key in ("a", "b")
    ]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert len(ids[0]) == len(set(ids[0]))


def test_every_reference_inside_a_drawing_has_its_target() -> None:
    svg = plots.training(sample_report.training(), ["canaries", "one-glance"], "k") or ""
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert wanted <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_colours_are_variables_of_the_page_and_nothing_points_outside() -> None:
    svg = plots.training(sample_report.training(), ["canaries"], "k") or ""
    assert "var(--ordered-4)" in svg
    assert not re.search(r"#0[1-6]0\d0\d", svg)
    assert "http" not in svg
    assert "xmlns" not in svg


@pytest.mark.parametrize("missing", [None, float("nan"), "x"])
def test_missing_points_leave_gaps_not_errors(missing: object) -> None:
    series = [
        {"arm": "a", "steps": [0, 1, 2], "mean": [1.0, missing, 2.0], "low": None, "high": []}
    ]
    svg = plots.over_time({"label": "y", "unit": "", "series": series}, {}, "k")
    assert svg is not None
    entry = {
        "curves": {"dose_response": {"x": [0, 2], "mean": [1.0, missing], "low": [], "high": []}}
    }
    assert plots.dose_response(entry, "k") is not None


def test_without_data_there_is_no_drawing() -> None:
    assert plots.dose_response({"curves": {"dose_response": None}}, "k") is None
    assert plots.over_time({"series": []}, {}, "k") is None
    assert plots.since_exposure({}, "k") is None
    assert plots.training({"steps": []}, [], "k") is None
    assert forest({"effect": None}, "invalid") == ""


def test_the_alternative_text_tells_the_numbers() -> None:
    svg = plots.dose_response(sample_report.questions()[1], "k") or ""
    label = re.search(r'aria-label="([^"]+)"', svg)
    assert label
    assert "dose 36: 61" in label[1]


def test_shares_are_drawn_in_percent() -> None:
    svg = plots.dose_response(sample_report.questions()[1], "k") or ""
    assert "accuracy (%)" in texts(svg)


def test_arms_that_share_a_dose_stand_side_by_side() -> None:
    arms = ["control", "once", "duplicate", "paraphrase"]
    names, places = plots.dose_ticks(arms, [0.0, 1.0, 10.0, 10.0])
    assert len(set(places)) == 4
    assert names[3].startswith("paraphrase")


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=8, unique=True))
def test_dose_places_grow_with_the_dose_and_zero_is_left_of_all(doses: list[float]) -> None:
    ranked = [0.0, *sorted(doses)]
    places = plots.dose_positions(ranked)
    assert places == sorted(places)
    assert places[0] == 0.0
    assert min(places[1:]) >= 1.0


@given(st.lists(st.floats(0.1, 100.0), min_size=0, max_size=8))
def test_colours_are_as_many_as_arms_and_grey_is_for_dose_0_only(doses: list[float]) -> None:
    found = plots.colours([("c", 0.0), *(("a", d) for d in doses)])
    assert len(found) == len(doses) + 1
    assert found.count(plots.CONTROL) == 1


@given(
    st.floats(-1e6, 1e6), st.floats(0, 1e6), st.one_of(st.none(), st.floats(0, 1e9)),
    st.sampled_from(["found", "not_found", "negligible", "invalid"]),
)  # fmt: skip
def test_the_interval_graphic_is_well_formed_for_any_numbers(
    effect: float, half: float, band: float | None, kind: str
) -> None:
    outcome = {
        "effect": effect, "low": effect - half, "high": effect + half, "smallest_detectable": band,
    }  # fmt: skip
    svg = forest(outcome, kind)
    ElementTree.fromstring(svg)
    assert "nan" not in svg


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_zero_and_every_value_lie_on_the_axis(values: list[float]) -> None:
    scale = axis(values)
    assert scale.low <= min(0.0, *values)
    assert scale.high >= max(0.0, *values)
    assert scale.x(scale.low) < scale.x(scale.high)


def test_smoothing_keeps_a_constant_and_ignores_gaps() -> None:
    ys = [2.0] * 400
    ys[7] = math.nan
    assert plots.smooth(ys) == [2.0] * 400


def test_a_dose_response_says_what_its_marks_are_and_where_chance_lies() -> None:
    entry = sample_report.questions()[1]
    without = plots.dose_response(entry, "k") or ""
    for words in ("mean", "95 % interval", "dose 0"):
        assert words in texts(without)
    assert "chance" not in without
    entry["curves"]["dose_response"]["chance"] = 0.25
    told = plots.dose_response(entry, "k", "tokens in all") or ""
    assert "chance" in texts(told)
    assert "chance: 25" in told
    assert "dose: tokens in all (0 = never shown)" in texts(told)


def test_intervals_of_curves_are_said_to_be_what_the_analysis_makes_them() -> None:
    assert plots.OUTCOME_CONFIDENCE == CONFIDENCE
