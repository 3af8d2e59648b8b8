"""Settings of what is read again and again."""

from __future__ import annotations

import pytest

from motet.launcher.config.repeat import RepeatSettings, repeat_problems


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (RepeatSettings(sequences=5), "data.repeat.share: is 0, so nothing is repeated"),
        (RepeatSettings(0.1, 0), "10 would be read 100 times"),
        (RepeatSettings(0.1, 1001), "data.repeat.sequences: is 1,001, but 0.1 of the run's 10,000"),
        (RepeatSettings(0.05, 5, "batch"), "no whole row of a batch of 8 sequences"),
        (RepeatSettings(0.99, 5, "batch"), "or all of them"),
    ],
)
def test_a_set_that_cannot_be_read_as_asked_is_refused(asked: RepeatSettings, said: str) -> None:
    (problem,) = repeat_problems(asked, 10_000, [8, 16])
    assert said in str(problem)


def test_sets_that_can_be_are_not() -> None:
    for asked in (RepeatSettings(), RepeatSettings(0.1, 1000), RepeatSettings(0.25, 9, "batch")):
        assert repeat_problems(asked, 10_000, [8, 16]) == []
