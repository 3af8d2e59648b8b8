"""Steps and slots under batch ramps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.stream.batch_sizes import Steps

ramps = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=4).map(
    lambda parts: [(0, 3), *sorted(dict(parts).items())]
)


@given(ramp=ramps)
def test_slots_add_up_step_by_step_and_invert(ramp: list[tuple[int, int]]) -> None:
    steps = Steps.of(1, ramp)
    total = 0
    for step in range(40):
        assert steps.slots_before(step) == total
        size = steps.sequences(step)
        assert steps.step_of(np.arange(total, total + size)).tolist() == [step] * size
        total += size


@given(ramp=ramps, slots=st.integers(0, 200))
def test_steps_for_is_the_fewest_that_reach_the_slots(
    ramp: list[tuple[int, int]], slots: int
) -> None:
    steps = Steps.of(1, ramp)
    found = steps.steps_for(slots)
    assert steps.slots_before(found) >= slots
    assert found == 0 or steps.slots_before(found - 1) < slots


def test_a_ramp_that_does_not_ascend_is_refused() -> None:
    with pytest.raises(UserError, match="must ascend from 0"):
        Steps.of(8, [(0, 4), (10, 8), (5, 2)])
