"""The budget of probes: what is left out, what never is, and that a decision holds after a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.experiments.design.assignment import ask
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.launcher.rank.loop import thin
from motet.launcher.rank.probe_budget import THINNED, ProbeBudget
from motet.launcher.rank.probing import ProbeSet
from motet.launcher.report.training import thinned_probes
from motet.launcher.study.probe_price import needed_steps

NEEDED = {"cheap": {0, 90, 100}, "dear": {0, 100}}
WORK = {"cheap": 100, "dear": 900}


def budget(**given: float) -> ProbeBudget:
    return ProbeBudget(0.05, NEEDED, WORK, **given)  # type: ignore[arg-type]


def test_what_has_no_room_is_left_out_and_the_cheap_ones_stay() -> None:
    due = ["cheap", "dear"]
    early = budget(train_s=10.0, probe_s=1.0, worked=1000)
    assert early.left_out(50, due) == due
    assert budget(train_s=100.0, probe_s=4.8, worked=4800).left_out(50, due) == ["dear"]
    assert budget(train_s=100.0, probe_s=4.0, worked=4000).left_out(50, due) == []
    assert early.left_out(0, due) == early.left_out(100, due) == []
    assert early.left_out(90, due) == ["dear"], "only what needs this step is measured"


@given(
    seconds=st.lists(st.tuples(st.floats(0.01, 2), st.floats(0.5, 1.5)), min_size=5, max_size=60)
)
def test_the_share_is_kept_but_for_what_is_needed(seconds: list[tuple[float, float]]) -> None:
    """Costs of a probe differ from what is foreseen by half at most, and so does the overspending."""
    one = budget()
    must = 0.0
    last = len(seconds)
    for step, (train, noise) in enumerate(seconds):
        one.train_s += train
        due = ["cheap", "dear"]
        left = one.left_out(step, due)
        done = [name for name in due if name not in left]
        cost = sum(WORK[name] for name in done) * 1e-3 * noise
        one.spent(cost, done)
        must += sum(WORK[name] for name in done if step in NEEDED[name]) * 1e-3 * noise
    free = one.probe_s - must
    assert free <= max(0.05 * one.train_s, 0) * 3 + 1e-9
    assert last >= 5


def test_a_decision_of_before_holds_whatever_the_clock_says_now() -> None:
    rows = [
        {"kind": "probe", "step": 0, "seconds": 2.0, "experiments": {"cheap": {}, "dear": {}}},
        *(
            {"kind": "step", "step": n, "seconds": {"train": 1.0, "data": 0.5}}
            for n in range(1, 51)
        ),
        {"kind": "event", "step": 50, "event": THINNED, "experiments": ["dear"]},
        {"kind": "probe", "step": 50, "seconds": 0.2, "experiments": {"cheap": {}}},
        {"kind": "probe", "step": 60, "seconds": 2.0, "experiments": {"cheap": {}, "dear": {}}},
    ]
    one = budget()
    one.recall(rows)
    assert (one.train_s, one.probe_s, one.worked) == (75.0, pytest.approx(4.2), 2100)
    one.probe_s = 0.0
    assert one.left_out(50, ["cheap", "dear"]) == ["dear"]
    one.probe_s = 1e9
    assert one.left_out(60, ["cheap", "dear"]) == []
    assert one.left_out(70, ["cheap", "dear"]) == ["cheap", "dear"]
    assert thinned_probes(rows) == {"dear": [50]}


INVENTED = [use for use, kind in LIBRARY.items() if "generate" in kind.defaults]


@pytest.mark.parametrize("use", sorted(INVENTED))
def test_what_a_class_asks_for_itself_is_never_left_out(use: str) -> None:
    entry = {"name": "x", "use": use, "probe_at": {"every": 0.05}, "judge_at": 0.77}
    library = Library(Path())
    (spec,), problems = parse_experiments([entry], Path(), library)
    assert not problems
    question = ask(spec, 0, library)
    everything = question.experiment.probe_steps(2000)
    needed = needed_steps(question, 1540, (2000,), also=(13,))
    first = spec.schedule.first_step(2000)
    assert {0, 13, first, 1540, 2000} <= needed
    curve = set(range(0, 2001, 100)) - needed
    assert curve, "points of curves may be left out"
    assert everything - curve <= needed


def test_the_loop_asks_once_writes_it_down_and_measures_the_rest() -> None:
    due = {"cheap": {50, 60}, "dear": {50, 60}}
    probes = ProbeSet.none()
    probes.due = due
    written: list[dict[str, Any]] = []
    job = SimpleNamespace(
        budget=budget(train_s=100.0, probe_s=4.8, worked=4800),
        probes=probes,
        world=SimpleNamespace(size=1, control=None),
        metrics=SimpleNamespace(
            log=lambda kind, step, **more: written.append({"step": step, **more})
        ),
    )
    with patch("motet.launcher.rank.loop.tell_all", lambda value, world: value):
        thin(job, 50)  # type: ignore[arg-type]
        assert probes.names(50) == ["cheap"]
        assert [(row["step"], row["experiments"]) for row in written] == [(50, ["dear"])]
        job.budget.decided = {60: ["cheap"]}
        thin(job, 60)  # type: ignore[arg-type]
    assert probes.names(60) == ["dear"]
    assert len(written) == 1, "what was decided before is not written again"
