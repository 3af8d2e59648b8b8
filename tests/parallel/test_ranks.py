"""A failure of several ranks tells of each of them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.parallel import ranks


def one_fails(world: Any) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 has had enough")
    wait_here()


def wait_here() -> None:
    time.sleep(60)


def test_the_report_of_a_failed_rank_says_where_the_others_stood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "LAST_WORDS_S", 1)
    with pytest.raises(AssertionError) as failure:
        ranks.run_ranks(2, one_fails)
    assert "ValueError: rank 1 has had enough" in str(failure.value)
    assert "rank 0 stood at:" in str(failure.value)
    assert "in wait_here" in str(failure.value)
