"""Arms with windows of their own, and the correlation with the order of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.order import correlation
from motet.experiments.design.frozen import spec_of
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import Library
from tests.experiments.design.desk import Desk
from tests.experiments.library.test_library import experiment
from tests.experiments.simulated import simulated

PARTS = [[0.0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]


def arms(parts: list[list[float]]) -> list[dict[str, Any]]:
    shown = [{"name": f"part-{n}", "dose": 2, "window": part} for n, part in enumerate(parts)]
    return [{"name": "out", "dose": 0, "weight": 4}, *shown]


def documents(count: int) -> list[dict[str, str]]:
    return [
        {"id": f"d{n}", "text": f"codes and dates of fact {n} about {n * 7}"} for n in range(count)
    ]


def test_exposures_and_placebos_lie_in_the_window_of_their_arm(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "arms": arms(PARTS),
        "cluster_by": "none",
        "schedule": {"kind": "uniform", "window": [10, 50]},
    }
    study = Desk(tmp_path).study(
        Desk(tmp_path).entry("when", "replacement", documents(32), **settings)
    )
    question, request = study.questions[0], study.requests[0]
    rows = study.plan.rows
    step = rows.slot // 16
    number = {arm.name: index for index, arm in enumerate(question.spec.arms)}
    of_unit = question.arms[rows.unit]
    for index in range(4):
        shown = step[of_unit == number[f"part-{index}"]]
        assert len(shown) == 8
        assert shown.min() >= 10 + 10 * index
        assert shown.max() < 20 + 10 * index
    placebos = step[of_unit == number["out"]]
    quarter = (placebos - 10) // 10
    assert np.bincount(quarter, minlength=4).tolist() == [8, 8, 8, 8], "as the treated ones lie"
    assert request.placebo.sum() == 32


def test_an_arms_window_is_frozen_and_an_arm_without_one_reads_as_before() -> None:
    entries = [
        {"name": "a", "use": "palimpsest"},
        {"name": "b", "use": "membership"},
    ]
    specs, problems = parse_experiments(entries, Path(), Library(Path()))
    assert problems == []
    kept = [json.loads(json.dumps(spec.to_json())) for spec in specs]
    assert kept[0]["arms"][1]["window"] == [0.0, 0.125]
    assert all("window" not in arm for arm in (kept[0]["arms"][0], *kept[1]["arms"]))
    assert [spec_of(fields).arms for fields in kept] == [spec.arms for spec in specs]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"arms": arms([[0.5, 0.25]])}, "two shares of the schedule's window"),
        ({"arms": arms([[0.0, 2]])}, "two shares of the schedule's window"),
        ({"schedule": {"kind": "early"}}, "go with schedule.kind uniform, not early"),
        (
            {"arms": [{"name": "o", "dose": 0, "window": [0, 1]}, *arms(PARTS)[1:]]},
            "whose dose is 0",
        ),
        ({"arms": arms(PARTS[:1])}, "two or more with a window"),
    ],
)
def test_windows_that_mean_nothing_are_refused(change: dict[str, Any], needle: str) -> None:
    entry = {"name": "x", "use": "replacement", **change}
    _, problems = parse_experiments([entry], Path(), Library(Path()))
    assert any(needle in str(problem) for problem in problems), problems


def test_late_is_compared_with_early() -> None:
    one = experiment({"name": "x", "use": "palimpsest"})
    primary = one.outcomes[0]
    assert primary.primary
    assert primary.contrast == (
        tuple(f"window-{n}" for n in (4, 5, 6, 7)),
        tuple(f"window-{n}" for n in (0, 1, 2, 3)),
    )


def test_the_correlation_is_spearmans_and_its_p_is_uniform_without_an_order() -> None:
    rng = np.random.default_rng(0)
    value, step = rng.normal(size=40), rng.integers(0, 30, 40).astype(float)
    no_blocks = np.zeros(40, dtype=np.int64)
    found = correlation(value + 0.1 * step, step, no_blocks, 1, 1999)
    assert found["correlation"] == pytest.approx(spearmanr(value + 0.1 * step, step)[0])
    assert found["low"] < found["correlation"] < found["high"]
    assert found["p"] < 0.01
    blocks = np.repeat([0, 1], 20)
    p = [
        correlation(rng.normal(size=40) + 3 * blocks, step, blocks, key, 199)["p"]
        for key in range(200)
    ]
    assert 0.02 <= np.mean(np.array(p) <= 0.1) <= 0.18
    assert correlation(np.ones(9), np.arange(9.0), np.zeros(9, np.int64), 0, 9)["p"] is None


def test_the_report_says_the_correlation() -> None:
    found = simulated({"name": "x", "use": "replacement"}, lambda n: 0.5 * n)
    rng = np.random.default_rng(0)
    found.exposure_steps = [
        np.sort(rng.integers(0, 2000, len(when))) for when in found.exposure_steps
    ]
    entry = analyze([found], 0, 199, simulations=0)["experiments"][0]
    assert entry["order"]["n"] == 200
    assert any("Order of training" in note for note in entry["notes"])
    assert entry["secondary"][0]["contrast"].startswith("recency-5, ")


def test_documents_as_long_as_a_sequence_are_the_whole_batch_of_one_step(tmp_path: Path) -> None:
    def text(number: int) -> str:  # some 230 tokens
        return (f"{number:03d} facts and dates of codes " * 60)[:600]

    rows = [{"id": f"d{n}", "text": text(n), "prompt": text(n)[:40].rstrip()} for n in range(32)]
    settings = {"placement": "start", "placebo": "none", "cluster_by": "none"}
    entry = Desk(tmp_path).entry("batch", "forgetting", rows, **settings)
    study = Desk(tmp_path).study(entry)
    assert study.plan.rows.slot.tolist() == [*range(480, 496)]
    assert (study.plan.texts.lengths()[study.plan.rows.text] > 128).all(), "two do not fit"
