from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import pipelining

from motet.parallel.cost.timeline import bubble, most_held, orders, timeline
from motet.parallel.layout.layout import SCHEDULES, Layout
from motet.parallel.layout.rules import schedule_takes

SINGLE = ("gpipe", "1f1b")
TORCH_NAMES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv_zero_bubble": "ScheduleZBVZeroBubble",
}


def virtual_stages_of(schedule: str) -> tuple[int, ...]:
    return (1,) if schedule in SINGLE else (2,) if schedule == "zbv_zero_bubble" else (2, 3)


CASES = [
    (schedule, pp, virtual, micro_batches)
    for schedule in SCHEDULES
    for virtual in virtual_stages_of(schedule)
    for pp in (2, 3, 4, 6)
    for micro_batches in (1, 2, 3, 4, 5, 8, 9, 12, 13)
    if schedule_takes(Layout(pp=pp, virtual_stages=virtual, schedule=schedule), micro_batches)
]


class RecordingStage:
    """What torch's schedules ask of a stage; it computes nothing and writes down what it was told
    to do.
    """

    is_last = False
    has_backward = True
    submod = None

    def __init__(self, stage: int, stages: int, pp: int) -> None:
        self.stage_index, self.num_stages, self.group_size = stage, stages, pp
        self.group_rank = stage % pp
        self.done: list[tuple[int, int, str]] = []

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.done.append((self.stage_index, micro_batch, "F"))

    def backward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.done.append((self.stage_index, micro_batch, "B"))

    def no_messages(self, *_: Any) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages
    perform_reduce_grad = no_messages


def torch_orders(
    schedule: str, pp: int, virtual: int, micro_batches: int
) -> list[list[tuple[int, int, str]]]:
    """What torch's own schedule does.

    Private parts are read, as nothing public tells the order: with one stage per rank by running
    the schedule (the order that torch 2.13 prints for 1F1B numbers the last stage's micro-batches
    from 1), otherwise from the table that it runs.
    """
    kind: Any = getattr(pipelining, TORCH_NAMES[schedule])
    if schedule in SINGLE:
        stages = [RecordingStage(rank, pp, pp) for rank in range(pp)]
        for stage in stages:
            made = kind(stage, micro_batches)
            made._initialize_stage = stage.no_messages
            made._step_microbatches()
        return [stage.done for stage in stages]
    layout = Layout(pp=pp, virtual_stages=virtual, schedule=schedule)
    made = kind([RecordingStage(s, pp * virtual, pp) for s in layout.stages_of(0)], micro_batches)
    return [
        [(a.stage_index, a.microbatch_index, a.computation_type.value) for a in rank if a]
        for _, rank in sorted(made.pipeline_order.items())
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_does_what_torchs_schedule_makes_it_do_in_that_order(schedule: str) -> None:
    cases = [case for case in CASES if case[0] == schedule]
    assert len(cases) > 20
    for case in cases:
        assert [[tuple(a) for a in rank] for rank in orders(*case)] == torch_orders(*case), case


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_starts_before_what_it_needs_and_nothing_is_left_out(schedule: str) -> None:
    for case in CASES:
        if case[0] == schedule:
            check_order(*case)


def check_order(schedule: str, pp: int, virtual: int, micro_batches: int) -> None:
    stages = pp * virtual
    send_s = [0.25] * (stages - 1)
    works = timeline(
        schedule,
        pp,
        virtual,
        micro_batches,
        [1.0 + 0.1 * s for s in range(stages)],
        [2.0] * stages,
        send_s=send_s,
    )
    layout = Layout(pp=pp, virtual_stages=virtual, schedule=schedule)
    rank_of = {s: rank for rank in range(pp) for s in layout.stages_of(rank)}
    ends = {(("I" if w.kind == "B" else w.kind), w.stage, w.micro_batch): w.end_s for w in works}
    passes = Counter(("I" if w.kind == "B" else w.kind) for w in works)
    assert passes["F"] == passes["I"] == stages * micro_batches
    assert sum(w.kind in "BW" for w in works) == stages * micro_batches
    for w in works:
        assert w.rank == rank_of[w.stage]
        if w.kind == "W":
            assert w.start_s >= ends["I", w.stage, w.micro_batch]
            continue
        if w.kind != "F":
            assert w.start_s >= ends["F", w.stage, w.micro_batch]
        before = w.stage - 1 if w.kind == "F" else w.stage + 1
        if 0 <= before < stages:
            gap = 0.25 if rank_of[before] != w.rank else 0.0
            assert w.start_s >= ends["F" if w.kind == "F" else "I", before, w.micro_batch] + gap
    for rank in range(pp):
        mine = [w for w in works if w.rank == rank]
        assert all(a.end_s <= b.start_s for a, b in pairwise(mine))


@settings(max_examples=60, deadline=None)
@given(
    pp=st.integers(2, 8),
    rounds=st.integers(1, 6),
    virtual=st.integers(2, 4),
    forward_s=st.floats(0.1, 3),
    backward_s=st.floats(0.1, 6),
)
def test_equal_stages_have_the_bubble_of_the_closed_forms(
    pp: int, rounds: int, virtual: int, forward_s: float, backward_s: float
) -> None:
    """GPipe and 1F1B: (p - 1) / (m + p - 1); interleaved: (p - 1) / (v m + p - 1)
    (arXiv:2104.04473, section 2.2).
    """
    m = rounds * pp
    for schedule, v in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", virtual)):
        works = timeline(schedule, pp, v, m, [forward_s] * pp * v, [backward_s] * pp * v)
        assert bubble(works) == pytest.approx((pp - 1) / (v * m + pp - 1), abs=1e-9)


@pytest.mark.parametrize("pp", [2, 4, 6])
def test_zero_bubble_schedules_wait_less_than_interleaved_ones(pp: int) -> None:
    """Where F, I and W take as long as each other ZB-V waits (p - 1) of 6 m + p - 1 thirds
    (arXiv:2401.10241, table 2).
    """
    m, times = 3 * pp, ([1.0] * pp * 2, [2.0] * pp * 2)
    waits = {s: bubble(timeline(s, pp, 2, m, *times)) for s in SCHEDULES if s not in SINGLE}
    assert waits["zbv_zero_bubble"] == pytest.approx((pp - 1) / (6 * m + pp - 1))
    assert waits["interleaved_zero_bubble"] < waits["interleaved_1f1b"]


def test_1f1b_holds_as_many_micro_batches_as_there_are_stages_ahead_and_gpipe_all() -> None:
    assert [most_held(actions) for actions in orders("1f1b", 4, 1, 12)] == [4, 3, 2, 1]
    assert [most_held(actions) for actions in orders("gpipe", 4, 1, 12)] == [12] * 4
    assert [most_held(actions) for actions in orders("zbv_zero_bubble", 4, 2, 12)] == [8] * 4


def test_a_slow_link_delays_the_stages_behind_it() -> None:
    slow = timeline("1f1b", 2, 1, 2, [1.0, 1.0], [2.0, 2.0], send_s=[5.0])
    second = [w for w in slow if w.rank == 1]
    assert second[0].start_s == 6.0
    # F0, its way, F0 B0 F1 B1 on the other rank, the way back, B1.
    assert max(w.end_s for w in slow) == 1 + 5 + (1 + 2 + 1 + 2) + 5 + 2
    assert max(w.end_s for w in slow if w.rank == 0) == max(w.end_s for w in slow)


def test_a_schedule_that_cannot_end_is_told() -> None:
    with pytest.raises(ValueError, match="is no schedule"):
        orders("2f2b", 2, 1, 2)
