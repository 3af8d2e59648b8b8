"""Noise on embeddings is a function of names: the same in any batch, and in the ledger's digest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.noise import noise
from motet.experiments.stream.placement import NOISE_FLAG, PLACEBO_FLAG, compile_plan
from motet.experiments.stream.stream import Batch, Stream
from tests.experiments.plans import corpus, request

LENGTH = 40


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    unit=st.integers(0, 2**31 - 1),
    length=st.integers(1, 40),
    width=st.integers(1, 33),
)
def test_a_token_has_its_noise_whatever_is_asked_for_around_it(
    seed: int, unit: int, length: int, width: int
) -> None:
    whole = noise(seed, "mark", unit, 40, 33, 0.075)
    part = noise(seed, "mark", unit, length, width, 0.075)
    assert part.dtype == np.float32
    assert np.array_equal(part, whole[:length, :width])
    for other in (
        noise(seed + 1, "mark", unit, 40, 33, 0.075),
        noise(seed, "m", unit, 40, 33, 1.0),
    ):
        assert not np.isclose(other, whole).any(axis=1).all()
    assert not np.array_equal(noise(seed, "mark", unit + 1, 40, 33, 0.075), whole)


def test_it_is_normal_and_keys_are_independent() -> None:
    from scipy.stats import kstest

    made = np.stack([noise(1, "mark", unit, 64, 64, 0.075) for unit in range(40)]).reshape(40, -1)
    assert kstest(made.ravel() / 0.075, "norm").pvalue > 0.01
    correlation = np.corrcoef(made)[np.triu_indices(40, 1)]
    assert abs(correlation).max() < 5 / 64  # 780 pairs, each with a deviation of 1/64
    assert abs(correlation).mean() == pytest.approx(0.8 / 64, rel=0.15)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    asked = request("mark", 12, 3, (0, 60), length=9)
    held_out = replace(asked, noise_deviation=0.5, placebo=asked.unit % 2 == 0)
    plan = compile_plan([request("other", 9, 1, (0, 60)), held_out], 7, LENGTH)
    path = tmp_path_factory.mktemp("plan") / "p.plan"
    write_plan(plan, path)
    return Stream([corpus()], [1.0], LENGTH, 3, ExposurePlan(path))


def places(batch: Batch) -> list[tuple[int, int, int]]:
    """(slot, offset, unit) of all noise."""
    return [(batch.first_slot + one.row, one.offset, one.unit) for one in batch.noise]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=2, max_size=8))
def test_any_way_of_cutting_slots_into_batches_adds_the_same_noise(
    stream: Stream, cuts: list[int]
) -> None:
    whole, parts, at = stream.batch(0, sum(cuts)), [], 0
    for count in cuts:
        parts.append(stream.batch(at, count))
        at += count
    assert [place for part in parts for place in places(part)] == places(whole)
    assert sum(part.digest() for part in parts) % 2**64 == whole.digest()


def test_only_treated_texts_carry_noise_and_the_digest_says_which(stream: Stream) -> None:
    batch = stream.batch(0, 60)
    plan = stream.plan
    assert plan is not None
    rows = plan.exposures()
    treated = (rows.experiment == 1) & (rows.unit % 2 == 1)
    assert (((rows.flags & NOISE_FLAG) > 0) == treated).all()
    assert not ((rows.flags & NOISE_FLAG) & ((rows.flags & PLACEBO_FLAG) << 2)).any()
    expected = zip(rows.slot[treated], rows.offset[treated] + 1, rows.unit[treated], strict=True)
    assert places(batch) == [tuple(map(int, row)) for row in expected]
    assert {one.length for one in batch.noise} == {7}
    first = batch.noise[0]
    again = [one for one in batch.noise if one.unit == first.unit]
    assert len(again) == 3
    assert all(np.array_equal(one.values(8), first.values(8)) for one in again)
    assert replace(batch, noise=()).digest() != batch.digest()
    moved = (replace(first, unit=first.unit + 2), *batch.noise[1:])
    assert replace(batch, noise=moved).digest() != batch.digest()
