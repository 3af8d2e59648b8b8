"""The plan: what never moves, what never overlaps, and that damage is found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.placement import CompiledPlan, Request, compile_plan
from tests.experiments.plans import request

LENGTH = 64


def positions(plan: CompiledPlan, experiment: str) -> dict[int, tuple[int, int]]:
    """Exposure id -> (slot, offset)."""
    rows = plan.rows
    mine = np.flatnonzero(rows.experiment == plan.experiments.index(experiment))
    return {int(rows.id[row]): (int(rows.slot[row]), int(rows.offset[row])) for row in mine}


def claimed(plan: CompiledPlan) -> list[tuple[int, int]]:
    lengths = np.diff(plan.texts.offsets)[plan.rows.text]
    start = plan.rows.slot * LENGTH + plan.rows.offset
    return sorted(zip(start.tolist(), (start + lengths).tolist(), strict=True))


def claims_of(plan: CompiledPlan, experiment: str) -> Claims:
    mine = plan.rows.experiment == plan.experiments.index(experiment)
    start = (plan.rows.slot * LENGTH + plan.rows.offset)[mine]
    return Claims(start, start + np.diff(plan.texts.offsets)[plan.rows.text][mine])


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Two to four experiments, dense enough that they collide."""
    names = draw(st.permutations(["a", "b", "c", "d"]))[: draw(st.integers(2, 4))]
    return [
        request(
            name,
            n_units=draw(st.integers(1, 12)),
            repetitions=draw(st.integers(1, 4)),
            window=(draw(st.integers(0, 5)), draw(st.integers(40, 80))),
            length=draw(st.integers(3, 10)),
        )
        for name in names
    ]


@settings(max_examples=80, deadline=None)
@given(asked=requests(), seed=st.integers(0, 1000))
def test_no_token_is_claimed_twice_and_nothing_leaves_its_window(
    asked: list[Request], seed: int
) -> None:
    plan = compile_plan(asked, seed, LENGTH)
    ranges = claimed(plan)
    assert all(one[1] <= two[0] for one, two in pairwise(ranges))
    assert len(plan.rows) == sum(len(part) for part in asked)
    for start, stop in ranges:
        assert start // LENGTH == (stop - 1) // LENGTH
    for number, part in enumerate(asked):
        slots = plan.rows.slot[plan.rows.experiment == number]
        assert slots.min() >= part.first_slot.min()
        assert slots.max() < part.last_slot.max()


@settings(max_examples=60, deadline=None)
@given(asked=requests(), seed=st.integers(0, 1000))
def test_adding_an_experiment_moves_no_exposure_of_the_others(
    asked: list[Request], seed: int
) -> None:
    before = compile_plan(asked[:-1], seed, LENGTH)
    after = compile_plan(asked, seed, LENGTH)
    for part in asked[:-1]:
        assert positions(before, part.experiment) == positions(after, part.experiment)


@settings(max_examples=60, deadline=None)
@given(asked=requests(), seed=st.integers(0, 1000), which=st.integers(0, 3))
def test_removing_an_experiment_leaves_a_tombstone_and_moves_nothing(
    asked: list[Request], seed: int, which: int
) -> None:
    before = compile_plan(asked, seed, LENGTH)
    which %= len(asked)
    gone = asked[which]
    rest = asked[:which] + asked[which + 1 :]
    tombstone = (which, claims_of(before, gone.experiment))
    after = compile_plan(rest, seed, LENGTH, tombstones=[tombstone])
    for part in rest:
        assert positions(before, part.experiment) == positions(after, part.experiment)


@settings(max_examples=40, deadline=None)
@given(asked=requests(), seed=st.integers(0, 1000))
def test_the_order_of_units_inside_an_experiment_moves_nothing(
    asked: list[Request], seed: int
) -> None:
    first = asked[0]
    order = np.random.default_rng(seed).permutation(len(first))
    shuffled = Request(
        first.experiment,
        first.unit_keys,
        first.unit[order],
        first.repetition[order],
        first.text[order],
        first.first_slot[order],
        first.last_slot[order],
        first.texts,
    )
    assert positions(compile_plan([first], seed, LENGTH), first.experiment) == positions(
        compile_plan([shuffled], seed, LENGTH), first.experiment
    )


def test_a_collision_is_settled_for_the_older_experiment() -> None:
    crowd = request("old", n_units=100, repetitions=1, window=(0, 20), length=6)
    young = request("young", n_units=60, repetitions=1, window=(0, 20), length=6)
    alone = positions(compile_plan([young], 1, LENGTH), "young")
    together = positions(compile_plan([crowd, young], 1, LENGTH), "young")
    moved = sum(alone[key] != together[key] for key in alone)
    assert 0 < moved < len(alone)


def test_a_window_that_is_too_full_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match=r"experiments\.x: .* found no free place.*Widen"):
        compile_plan([request("x", 40, 1, (0, 2), length=20)], 0, LENGTH)


def test_sixty_per_cent_of_a_window_can_be_filled() -> None:
    plan = compile_plan([request("x", 1536, 1, (0, 200), length=5)], 0, LENGTH)
    assert len(plan.rows) == 1536


def test_a_text_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not fit in data\.sequence_length=64"):
        compile_plan([request("x", 2, 1, (0, 9), length=65)], 0, LENGTH)


def test_placement_start_begins_at_offset_zero_and_boundary_at_a_document() -> None:
    start = compile_plan([request("x", 9, 1, (0, 90), placement="start")], 0, LENGTH)
    assert set(start.rows.offset.tolist()) == {0}
    offsets = {
        slot: np.array([7, 40, 62]) if slot % 2 else np.array([], dtype=np.int64)
        for slot in range(90)
    }
    boundary = compile_plan(
        [request("x", 9, 1, (0, 90), placement="boundary")],
        0,
        LENGTH,
        boundaries=lambda slot: offsets[slot],
    )
    assert set(boundary.rows.offset.tolist()) <= {7, 40}
    assert set((boundary.rows.slot % 2).tolist()) == {1}
    assert len(np.unique(boundary.rows.slot)) == 9


def plan_file(folder: Path) -> tuple[Path, str]:
    path = folder / "exposures.plan"
    plan = compile_plan([request("x", 30, 3, (0, 500)), request("y", 4, 2, (100, 200))], 5, LENGTH)
    return path, write_plan(plan, path)


def test_a_written_plan_reads_back_as_it_was(tmp_path: Path) -> None:
    path, sha256 = plan_file(tmp_path)
    plan = ExposurePlan(path)
    plan.verify(sha256)
    compiled = compile_plan(
        [request("x", 30, 3, (0, 500)), request("y", 4, 2, (100, 200))], 5, LENGTH
    )
    rows = plan.exposures()
    assert np.array_equal(rows.slot, compiled.rows.slot)
    assert np.array_equal(rows.id, compiled.rows.id)
    assert plan.experiments == ("x", "y")
    base = np.full((600, LENGTH), 7, dtype=np.int32)
    ids = plan.overlay(0, base)
    assert len(ids) == len(plan) == 98
    for row in range(98):
        at = int(rows.offset[row])
        found = dict(plan.lookup(int(rows.slot[row])))
        tokens = found[at]
        assert np.array_equal(base[int(rows.slot[row]), at : at + len(tokens)], tokens)
    assert (base == 7).sum() == base.size - int(plan.row_lengths().sum())


def test_lookup_and_overlay_agree(tmp_path: Path) -> None:
    plan = ExposurePlan(plan_file(tmp_path)[0])
    for slot in range(0, 500, 7):
        base = np.full((1, LENGTH), 7, dtype=np.int32)
        plan.overlay(slot, base)
        mine = np.full(LENGTH, 7, dtype=np.int32)
        for offset, tokens in plan.lookup(slot):
            mine[offset : offset + len(tokens)] = tokens
        assert np.array_equal(base[0], mine)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95, 0.999])
def test_one_altered_bit_anywhere_is_found(tmp_path: Path, where: float) -> None:
    path, sha256 = plan_file(tmp_path)
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    while content[place : place + 1] == b"\0" and place < len(content) - 1 and where < 0.99:
        place += 1  # padding between columns is not part of the plan
    content[place] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises((UserError, ValueError)):
        ExposurePlan(path).verify(sha256)


def test_a_missing_a_truncated_and_a_foreign_plan_are_refused(tmp_path: Path) -> None:
    path, sha256 = plan_file(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        ExposurePlan(tmp_path / "none.plan")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        ExposurePlan(path).verify(sha256)
    path.write_bytes(b"something else entirely")
    with pytest.raises(UserError, match="not a plan file"):
        ExposurePlan(path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="frozen with"):
        ExposurePlan(path).verify("0" * 64)


def test_row_ranges_equal_a_plain_search_across_index_blocks(tmp_path: Path) -> None:
    compiled = compile_plan([request("x", 800, 3, (0, 700))], 5, LENGTH)
    write_plan(compiled, tmp_path / "p.plan")
    plan = ExposurePlan(tmp_path / "p.plan")
    slots = compiled.rows.slot
    for first in range(0, 720, 3):
        for count in (0, 1, 2, 150, 400, 800):
            expected = np.searchsorted(slots, [first, first + count]).tolist()
            assert list(plan.rows_between(first, first + count)) == expected
    empty = compile_plan([], 5, LENGTH)
    write_plan(empty, tmp_path / "e.plan")
    assert ExposurePlan(tmp_path / "e.plan").rows_between(0, 99) == (0, 0)
    ExposurePlan(tmp_path / "e.plan").verify()
