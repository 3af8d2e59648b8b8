"""A failure of several ranks tells of each of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton

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


def a_lock_is_held(world: Any, lock: str) -> None:
    if world.rank == 1:
        FileBaton(lock).try_acquire()
    time.sleep(60)


def test_ranks_that_say_nothing_are_ended_with_where_they_stood_and_their_locks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_S", 20)
    monkeypatch.setattr(ranks, "LAST_WORDS_S", 1)
    lock = tmp_path / "torch_extensions" / "lock"
    lock.parent.mkdir()
    with pytest.raises(AssertionError, match=r"(?s)no rank said anything for 20 s.*a_lock_is_held"):
        ranks.run_ranks(2, a_lock_is_held, str(lock))
    assert not lock.exists()
