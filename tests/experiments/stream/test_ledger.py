"""The ledger and its audit: every way in which a run can depart from its plan is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.stream.audit import audit_lines, check_ledger, per_unit
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.ledger import (
    LedgerWriter,
    Record,
    lineage,
    open_segment,
    read_records,
)
from motet.experiments.stream.placement import compile_plan
from motet.experiments.stream.stream import Stream
from motet.experiments.stream.who_trained import MembersTrained, doses
from tests.experiments.plans import corpus, request

LENGTH, BATCH, TOTAL = 40, 6, 20
STEPS = Steps.of(BATCH)


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    compiled = compile_plan([request("x", 15, 3, (0, BATCH * TOTAL), length=6)], 1, LENGTH)
    write_plan(compiled, tmp_path / "p.plan")
    return Stream([corpus()], [1.0], LENGTH, 3, ExposurePlan(tmp_path / "p.plan"))


def record(stream: Stream, step: int, rank: int, world: int) -> Record:
    before = STEPS.slots_before(step)
    first = before + BATCH * rank // world
    count = before + BATCH * (rank + 1) // world - first
    batch = stream.batch(first, count)
    return Record(step, first, count, batch.digest(), True, batch.exposure_ids)


def train(folder: Path, stream: Stream, parent: int, start: int, stop: int, world: int) -> int:
    """Pretend to train steps [start, stop); return the segment's number."""
    assert stream.plan is not None
    segment = open_segment(folder, parent, 1, start, world, (stream.plan.sha256, "d"))
    for rank in range(world):
        writer = LedgerWriter(folder, segment.segment, rank)
        for step in range(start, stop):
            writer.append(record(stream, step, rank, world))
        writer.close()
    return segment.segment


def audit(folder: Path, stream: Stream, segment: int, step: int, replay: bool = True):
    assert stream.plan is not None
    digest = (lambda first, count: stream.batch(first, count).digest()) if replay else None
    return check_ledger(folder, stream.plan, STEPS, segment, step, digest)


def test_an_uninterrupted_run_passes(tmp_path: Path, stream: Stream) -> None:
    found = audit(tmp_path, stream, train(tmp_path, stream, 0, 0, TOTAL, 2), TOTAL)
    assert found.ok
    assert (found.planned, found.consumed_once, found.replayed) == (45, 45, 2 * TOTAL)
    assert audit_lines(found)[-1] == "audit passed"


@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 2, 6)])
def test_kills_resumes_and_other_world_sizes_pass(
    tmp_path: Path, stream: Stream, worlds: tuple
) -> None:
    first = train(
        tmp_path, stream, 0, 0, 9, worlds[0]
    )  # killed after step 9; its checkpoint is at 6
    second = train(tmp_path, stream, first, 6, 14, worlds[1])
    train(tmp_path, stream, first, 6, 8, 1)  # another branch that came to nothing
    last = train(tmp_path, stream, second, 12, TOTAL, worlds[2])
    found = audit(tmp_path, stream, last, TOTAL)
    assert found.ok
    assert found.consumed_once == 45
    assert found.worlds == list(worlds)


def test_a_run_that_stopped_early_owes_only_what_was_due(tmp_path: Path, stream: Stream) -> None:
    found = audit(tmp_path, stream, train(tmp_path, stream, 0, 0, 7, 2), 7)
    assert found.ok
    assert 0 < found.planned < 45


def test_a_repeated_exposure_is_found(tmp_path: Path, stream: Stream) -> None:
    segment = train(tmp_path, stream, 0, 0, TOTAL, 1)
    assert stream.plan is not None
    twice = stream.plan.exposures().id[:1]
    writer = LedgerWriter(tmp_path, segment, 1)
    writer.append(Record(3, 0, 0, 0, True, twice))
    writer.close()
    found = audit(tmp_path, stream, segment, TOTAL, replay=False)
    assert found.duplicated == 1
    assert not found.ok


def test_a_missing_step_an_unplanned_exposure_and_changed_tokens_are_found(
    tmp_path: Path, stream: Stream
) -> None:
    assert stream.plan is not None
    segment = open_segment(tmp_path, 0, 1, 0, 1, (stream.plan.sha256, "d"))
    writer = LedgerWriter(tmp_path, segment.segment, 0)
    for step in range(TOTAL):
        made = record(stream, step, 0, 1)
        if step == 5:
            made = replace(made, digest=made.digest ^ 1)
        if step == 6:
            made = replace(made, exposure_ids=np.append(made.exposure_ids, np.uint64(12345)))
        if step != 7:
            writer.append(made)
    writer.close()
    found = audit(tmp_path, stream, segment.segment, TOTAL)
    text = "\n".join(audit_lines(found))
    assert "records of 1 steps do not cover their slots" in text
    assert "1 exposures were consumed that the plan does not hold" in text
    assert "do not match the tokens of the corpora and the plan (first at step 5)" in text
    assert "AUDIT FAILED" in text


def test_a_segment_under_another_plan_is_found(tmp_path: Path, stream: Stream) -> None:
    segment = open_segment(tmp_path, 0, 1, 0, 1, ("other", "d"))
    writer = LedgerWriter(tmp_path, segment.segment, 0)
    for step in range(TOTAL):
        writer.append(record(stream, step, 0, 1))
    writer.close()
    assert "under another plan" in audit(tmp_path, stream, 1, TOTAL).problems[0]


def test_skipped_updates_are_consumed_but_not_applied(tmp_path: Path, stream: Stream) -> None:
    assert stream.plan is not None
    segment = open_segment(tmp_path, 0, 1, 0, 1, (stream.plan.sha256, "d"))
    writer = LedgerWriter(tmp_path, segment.segment, 0)
    lost = 0
    for step in range(TOTAL):
        made = record(stream, step, 0, 1)
        if step == 4:
            made, lost = replace(made, applied=False), len(made.exposure_ids)
        writer.append(made)
    writer.close()
    found = audit(tmp_path, stream, segment.segment, TOTAL)
    assert found.ok
    assert found.skipped_steps == [4]
    assert found.not_applied == lost
    counts = per_unit(stream.plan, 0, 15, found.applied, placebos=False)
    assert counts.sum() == 45 - lost


def test_a_torn_tail_ends_a_file_and_an_altered_record_is_an_error(
    tmp_path: Path, stream: Stream
) -> None:
    segment = train(tmp_path, stream, 0, 0, 5, 1)
    path = tmp_path / f"segment-{segment:05d}" / "rank-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert [made.step for made in read_records(path)] == [0, 1, 2, 3]
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    with pytest.raises(UserError, match="was altered"):
        list(read_records(path))


def test_zeros_that_a_dead_machine_left_are_a_torn_tail_and_nothing_else_is(
    tmp_path: Path,
) -> None:
    """A disk that turned read-only left a file of its length with zeros after what was synced."""
    ids = np.arange(1, 40, dtype=np.uint64) << np.uint64(40)
    made = [Record(step, 8 * step, 8, 2**63 + step, True, ids) for step in range(40)]
    size = len(made[0].encode())
    whole, path = b"".join(record.encode() for record in made), tmp_path / "rank-00000.bin"

    def steps(data: bytes) -> list[int]:
        path.write_bytes(data)
        return [record.step for record in read_records(path)]

    for lost in (1, 2, 25):  # from the end of a record on
        kept = len(whole) - lost * size
        assert steps(whole[:kept] + bytes(lost * size)) == list(range(40 - lost))
    for page in (4096, 8192):  # from the border of a page on, within a record
        assert page % size
        assert steps(whole[:page] + bytes(len(whole) - page)) == list(range(page // size))
    damaged = [
        whole[: 5 * size] + bytes(size) + whole[6 * size :],  # a hole
        whole[:-size] + bytes([whole[-size] ^ 1]) + whole[1 - size :],  # a bit of the last record
        whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        whole[:5000] + bytes(len(whole) - 5000),  # zeros from within a page, and within a record
    ]
    for data in damaged:
        with pytest.raises(UserError, match="was altered"):
            steps(data)


@settings(max_examples=50, deadline=None)
@given(
    step=st.integers(0, 2**40),
    count=st.integers(0, 2**20),
    digest=st.integers(0, 2**64 - 1),
    applied=st.booleans(),
    ids=st.lists(st.integers(0, 2**64 - 1), max_size=5),
)
def test_records_read_back_as_written(
    tmp_path_factory: pytest.TempPathFactory,
    step: int,
    count: int,
    digest: int,
    applied: bool,
    ids: list[int],
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "rank-00000.bin"
    made = Record(step, step * 3, count, digest, applied, np.array(ids, dtype=np.uint64))
    path.write_bytes(made.encode() * 2)
    for found in read_records(path):
        assert (found.step, found.first_slot, found.count) == (step, step * 3, count)
        assert (found.digest, found.applied) == (digest, applied)
        assert found.exposure_ids.tolist() == ids


def test_a_lineage_with_a_missing_segment_cannot_be_proved(tmp_path: Path, stream: Stream) -> None:
    last = train(tmp_path, stream, 7, 3, 5, 1)
    with pytest.raises(UserError, match="segment 7 is missing"):
        lineage(tmp_path, last, 5)


def test_a_record_with_members_is_read_back_and_one_without_has_the_bytes_of_before(
    tmp_path: Path, stream: Stream
) -> None:
    plain = record(stream, 3, 0, 1)
    turns = ((None,), ("half", None), ("half",))
    mixed = replace(plain, members=turns)
    assert mixed.encode()[4:8] != plain.encode()[4:8]  # its checksum covers the members
    assert len(mixed.encode()) > len(plain.encode())
    data = plain.encode() + mixed.encode() + plain.encode()
    (tmp_path / "r.bin").write_bytes(data)
    found = list(read_records(tmp_path / "r.bin"))
    assert [entry.members for entry in found] == [(), turns, ()]
    assert [mixed.members_at(plain.first_slot + i) for i in range(BATCH)] == [
        turns[i * 3 // BATCH] for i in range(BATCH)
    ]
    for cut in range(len(plain.encode()), len(data) - 1):
        (tmp_path / "r.bin").write_bytes(data[:cut])
        assert len(list(read_records(tmp_path / "r.bin"))) in (1, 2), "a torn tail ends it"


MEMBERS = (None, "half")


def drawn(step: int, draws: int | None) -> list[tuple[str | None, ...]]:
    """Who trains on each of so many shares of a step: one of two, or both."""
    number = draws or 1
    found = []
    for share in range(number):
        kind = (step * 7 + share * 5) % 3
        found.append(MEMBERS if kind == 2 else (MEMBERS[kind],))
    return found


def with_members(made: Record, draws: int = 3) -> Record:
    """A record of one rank with the members that were drawn for each of its slots."""
    before = STEPS.slots_before(made.step)
    names = tuple(
        drawn(made.step, draws)[(slot - before) * draws // BATCH]
        for slot in range(made.first_slot, made.first_slot + made.count)
    )
    return replace(made, members=names)


def train_family(folder: Path, stream: Stream, world: int, alter=lambda made: made) -> int:
    assert stream.plan is not None
    segment = open_segment(folder, 0, 1, 0, world, (stream.plan.sha256, "d"), draws=3)
    for rank in range(world):
        writer = LedgerWriter(folder, segment.segment, rank)
        for step in range(TOTAL):
            writer.append(alter(with_members(record(stream, step, rank, world))))
        writer.close()
    return segment.segment


@pytest.mark.parametrize("world", [1, 2, 6])
def test_the_audit_draws_again_who_trained_on_each_exposure(
    tmp_path: Path, stream: Stream, world: int
) -> None:
    assert stream.plan is not None
    segment = train_family(tmp_path, stream, world)
    found = check_ledger(tmp_path, stream.plan, STEPS, segment, TOTAL, drawn=drawn)
    assert found.ok, found.problems
    assert found.trained.compared == world * TOTAL
    assert any("drew again who trained" in line for line in audit_lines(found))
    rows = stream.plan.exposures()
    for slot, choice in zip(rows.slot.tolist(), found.choice.tolist(), strict=True):
        step = slot // BATCH
        expected = drawn(step, 3)[(slot - step * BATCH) * 3 // BATCH]
        assert found.trained.choices[choice] == expected
    slots = [names for step in range(TOTAL) for names in drawn(step, 3) for _ in range(BATCH // 3)]
    for name in MEMBERS:
        assert found.trained.sequences[name] == sum(name in names for names in slots)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda made: replace(made, members=(("half",), *made.members[1:])),
        lambda made: replace(made, members=(*made.members[:-1], ("other",))),
        lambda made: replace(made, members=made.members[:1]),
        lambda made: replace(made, members=()),
        lambda made: replace(made, members=made.members[:4]),
        lambda made: replace(made, members=made.members[1:] + made.members[:1]),
    ],
)
def test_a_record_that_names_others_than_were_drawn_fails_the_audit(
    tmp_path: Path, stream: Stream, wrong
) -> None:
    assert stream.plan is not None
    segment = train_family(
        tmp_path, stream, 1, lambda made: wrong(made) if made.step == 5 else made
    )
    found = check_ledger(tmp_path, stream.plan, STEPS, segment, TOTAL, drawn=drawn)
    (problem,) = found.problems
    assert "1 records name other members than the family draws (first at step 5, slot" in problem
    assert check_ledger(tmp_path, stream.plan, STEPS, segment, TOTAL).ok, "nothing else is wrong"


def test_a_run_of_one_model_whose_ledger_names_a_member_fails_the_audit(
    tmp_path: Path, stream: Stream
) -> None:
    assert stream.plan is not None
    segment = train_family(tmp_path, stream, 1)
    found = check_ledger(
        tmp_path, stream.plan, STEPS, segment, TOTAL, drawn=lambda step, draws: [(None,)]
    )
    assert found.trained.wrong_records > 0
    assert not found.ok


def test_every_consumed_exposure_counts_once_for_each_member_by_who_trained_on_it() -> None:
    trained = MembersTrained([(None,), ("small",), ("large",), ("small", "large"), ("unlisted",)])
    inside = {("large", "small"), (None, "small"), (None, "large")}
    rows = doses(
        np.array([0, 0, 0, 0, 1, 1]),
        np.array([0, 1, 2, 3, 4, 1]),
        [2, 1],
        ["shown", "held_out"],
        trained,
        [None, "large", "small"],
        lambda large, small: (large, small) in inside,
    )
    assert [(row["arm"], row["units"], row["consumed"]) for row in rows] == [
        ("shown", 2, 4),
        ("held_out", 1, 2),
    ]
    counted = [[(one["own"], one["within"], one["part"]) for one in row["members"]] for row in rows]
    assert counted[0] == [(1, 0, 3), (2, 1, 1), (2, 2, 0)]
    assert counted[1] == [(0, 0, 2), (0, 0, 2), (1, 0, 1)]
