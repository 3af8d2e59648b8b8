"""What goes wrong in published software of this kind, one test per defect.

The defects are those that were seen when such a tool was run, or read in its code. Where a test
elsewhere shows that Motet does not have one, `ELSEWHERE` names it, and a test here that it exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.placement import compile_plan
from motet.experiments.stream.stream import Stream
from tests.experiments.design.desk import Desk
from tests.experiments.plans import EOD, ArrayCorpus, request

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "an experiment that is added moves those after it": (
        "tests/experiments/design/test_study.py::test_adding_removing_and_reordering_experiments_move_nothing"
    ),
    "a longer run moves what came before": (
        "tests/experiments/design/test_study.py::test_extending_the_run_moves_nothing_under_the_lock"
    ),
    "a start that is steps times a constant batch": (
        "tests/launcher/config/test_settings.py::test_the_first_slot_of_a_step_is_the_sum_of_the_batches_before_it"
    ),
    "a token that two experiments write": (
        "tests/experiments/stream/test_exposure_plan.py::test_no_token_is_claimed_twice_and_nothing_leaves_its_window"
    ),
    "texts that are too long are left out with a warning": (
        "tests/experiments/stream/test_exposure_plan.py::test_a_text_longer_than_a_sequence_is_refused"
    ),
    "exposures without room are left out with a warning": (
        "tests/experiments/stream/test_exposure_plan.py::test_a_window_that_is_too_full_is_an_error_that_says_so"
    ),
    "document masks of before the insertion": (
        "tests/experiments/stream/test_stream.py::test_document_ids_and_labels_follow_the_overlay"
    ),
    "a rank that does not see the plan trains on clean data": (
        "tests/system/test_fail_closed.py::test_a_plan_that_is_wrong_on_one_rank_stops_all_with_the_reason"
    ),
    "a resumed run plans again, and retries begin at the start": (
        "tests/system/test_survival.py::test_after_kill_9_a_run_resumes_on_any_number_of_ranks"
    ),
    "nothing checks that another world reads the same": (
        "tests/experiments/stream/test_ledger.py::test_kills_resumes_and_other_world_sizes_pass"
    ),
    "a short branch squeezes the learning-rate schedule unsaid": (
        "tests/launcher/study/test_endpoint.py::test_a_setting_that_moves_the_weights_before_the_step_is_told"
    ),
    "scores depend on the batch": (
        "tests/experiments/scoring/test_generation.py::test_text_is_the_same_at_batches_of_1_3_and_16_and_twins_are_told_apart_by_number"
    ),
    "figures without intervals, held-out units or correction": (
        "tests/experiments/analysis/test_recomputed.py"
    ),
    "no scheduler, no requeue": (
        "tests/slurm/test_faults.py::test_time_limit_requeue_and_a_restart_of_the_controller_lose_no_step"
    ),
    "no removal by content": (
        "tests/experiments/design/test_removal.py::test_treated_passages_are_nowhere_in_any_epoch_and_held_out_ones_are_where_they_were"
    ),
    "no insertion at a document's border": (
        "tests/experiments/stream/test_stream.py::test_boundary_exposures_move_base_tokens_right_and_lose_only_the_end"
    ),
}


@pytest.mark.parametrize("defect", sorted(ELSEWHERE))
def test_the_test_that_shows_its_absence_exists(defect: str) -> None:
    file, _, name = ELSEWHERE[defect].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {name or 'test_'}" in text


def problems(entry: dict[str, Any]) -> str:
    return "\n".join(str(p) for p in parse_experiments([entry], Path(), Library(Path()))[1])


def test_an_experiment_whose_script_is_not_there_is_refused_and_never_skipped() -> None:
    told = problems({"name": "x", "use": "control_script.py:Dynamic"})
    assert "experiments.x.use" in told or "experiments[0].use" in told
    assert "control_script.py" in told


def test_a_setting_that_would_do_nothing_is_refused() -> None:
    told = problems({"name": "x", "use": "memorization", "gaussian": {"sd": 0.075}})
    assert "experiments.x.gaussian: is not a setting" in told
    assert "must be one of" in problems({"name": "x", "use": "gaussian-poisoning"})


def test_a_repetition_that_is_no_whole_number_is_refused_and_never_rounded() -> None:
    assert "doses in exposures are whole" in problems(
        {"name": "x", "use": "memorization", "doses": [0, 1.5]}
    )


def test_a_row_under_another_key_is_refused_with_the_keys_it_needs(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "no text here"}, {"id": "b", "text": "one two three four five"}]
    with pytest.raises(UserError, match="has no field 'text'"):
        Desk(tmp_path).questions(Desk(tmp_path).entry("x", "membership", rows))


def test_texts_of_unequal_length_can_have_a_dose_below_one_for_each() -> None:
    assert (
        problems({"name": "x", "use": "membership", "doses": [0, 30], "dose_in": "documents"}) == ""
    )


def test_ends_of_document_are_part_of_the_text_that_is_placed(tmp_path: Path) -> None:
    plan = compile_plan([request("a", 6, 3, (0, 40), length=9)], 1, 32)
    write_plan(plan, tmp_path / "p.plan")
    tokens = np.full((40, 32), 7, dtype=np.int32)
    ExposurePlan(tmp_path / "p.plan").overlay(0, tokens)
    changed = np.zeros_like(tokens, dtype=bool)
    for slot, offset, text in zip(plan.rows.slot, plan.rows.offset, plan.rows.text, strict=True):
        stop = offset + plan.texts.lengths()[text]
        assert tokens[slot, offset] == tokens[slot, stop - 1] == EOD
        assert (tokens[slot, offset + 1 : stop - 1] != 7).all()
        assert not changed[slot, offset:stop].any(), "no neighbour is overlapped"
        changed[slot, offset:stop] = True
    assert (tokens[~changed] == 7).all()


def test_a_later_epoch_repeats_no_exposure_and_has_those_that_were_planned_for_it(
    tmp_path: Path,
) -> None:
    corpus = ArrayCorpus(np.arange(1, 641, dtype=np.uint16), np.array([0]))
    plan = compile_plan([request("late", 4, 2, (30, 60))], 1, 32)
    write_plan(plan, tmp_path / "p.plan")
    stream = Stream([corpus], [1.0], 32, seed=0, plan=ExposurePlan(tmp_path / "p.plan"))
    clean = Stream([corpus], [1.0], 32, seed=0)
    assert stream.sequences_of(0) == 20, "slots 30 to 59 are in the second and third epoch"
    ids = stream.batch(0, 100).exposure_ids
    assert sorted(ids.tolist()) == sorted(plan.rows.id.tolist()), "each once, in 5 epochs"
    for first in (0, 20, 60, 80):
        assert np.array_equal(stream.batch(first, 10).tokens_BT, clean.batch(first, 10).tokens_BT)
    assert not np.array_equal(stream.batch(30, 30).tokens_BT, clean.batch(30, 30).tokens_BT)


def test_static_and_later_exposures_know_each_other() -> None:
    first, second = request("first", 20, 4, (0, 40)), request("second", 20, 4, (0, 40))
    plan = compile_plan([first, second], 1, 64)
    start = plan.rows.slot * 64 + plan.rows.offset
    stop = start + plan.texts.lengths()[plan.rows.text]
    order = np.argsort(start)
    assert (start[order][1:] >= stop[order][:-1]).all()


def test_the_step_of_a_slot_knows_of_batches_that_grow() -> None:
    steps = Steps(((0, 4), (10, 8)))
    assert steps.slots_before(12) == 10 * 4 + 2 * 8
    assert steps.step_of(np.array([39, 40, 55])).tolist() == [9, 10, 11]


def test_a_question_that_could_not_be_measured_is_missing_and_not_wrong() -> None:
    from tests.experiments.library.test_library import experiment, scores_of

    quiz = experiment({"name": "x", "use": "contamination", "generate": {"count": 6, "seed": 0}})
    values = quiz.measure(quiz.units(), scores_of(quiz.units(), lambda *_: float("nan")))
    assert np.isnan(values["accuracy"]).all()


OWN_UNITS = sorted(use for use, kind in LIBRARY.items() if not kind.needs_items)


@pytest.mark.parametrize("use", OWN_UNITS)
def test_every_built_in_question_has_one_primary_outcome_and_held_out_units(use: str) -> None:
    from tests.experiments.library.test_library import experiment

    one = experiment({"name": "x", "use": use})
    assert sum(outcome.primary for outcome in one.outcomes) == 1
    assert len({outcome.name for outcome in one.outcomes}) == len(one.outcomes)
    assert any(arm.is_control for arm in one.spec.arms)
