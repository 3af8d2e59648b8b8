"""Repeated data: the share, the set and the order are what was asked for, whoever asks for what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.repeat import BLOCK, DRAWN, MIXED, Repeat
from motet.experiments.stream.stream import Stream
from tests.experiments.plans import corpus

RAMP = Steps(((0, 4), (5, 10), (9, 32)))


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.02, 0.95),
    sequences=st.integers(1, 40),
    drawn=st.sampled_from(DRAWN),
    seed=st.integers(0, 2**32),
)
def test_every_batch_has_its_exact_share_of_the_set(
    share: float, sequences: int, drawn: str, seed: int
) -> None:
    repeat = Repeat(share, sequences, "batch", drawn, RAMP)
    for step in (0, 3, 4, 5, 8, 9, 30):
        slots = np.arange(RAMP.slots_before(step), RAMP.slots_before(step + 1))
        rows = int(np.floor(share * len(slots) + 0.5))
        assert repeat.of_set(slots, seed).sum() == rows
    slots = np.arange(RAMP.slots_before(40))
    ordinals = repeat.ordinals(slots, seed)
    fresh = ordinals[ordinals >= sequences]
    assert sorted(fresh) == list(range(sequences, sequences + len(fresh)))  # each once, none left
    assert repeat.times(len(slots)) == pytest.approx((ordinals < sequences).sum() / sequences)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.01, 0.9), sequences=st.integers(1, 500), seed=st.integers(0, 2**32))
def test_a_block_has_its_share_and_passes_read_the_whole_set(
    share: float, sequences: int, seed: int
) -> None:
    repeat = Repeat(share, sequences, "block", "passes", RAMP)
    ordinals = repeat.ordinals(np.arange(2 * BLOCK), seed)
    of_set = ordinals < sequences
    rows = int(np.floor(share * BLOCK + 0.5))
    assert of_set[:BLOCK].sum() == of_set[BLOCK:].sum() == rows
    often = np.bincount(ordinals[of_set], minlength=sequences)
    assert often.max() - often.min() <= 1
    fresh = ordinals[~of_set]
    assert sorted(fresh) == list(range(sequences, sequences + len(fresh)))


def test_draws_with_replacement_are_uneven_and_uniform() -> None:
    repeat = Repeat(0.5, 50, "batch", "replacement", Steps.of(20))
    ordinals = repeat.ordinals(np.arange(20_000), 3)
    often = np.bincount(ordinals[ordinals < 50], minlength=50)
    assert often.sum() == 10_000
    squares = float((((often - 200) ** 2) / 200).sum())
    assert 20 < squares < 100  # chi-square with 49 degrees of freedom


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    first=st.integers(0, 200),
    mixed=st.sampled_from(MIXED),
    drawn=st.sampled_from(DRAWN),
)
def test_any_way_of_cutting_slots_into_batches_gives_the_same_tokens(
    cuts: list[int], first: int, mixed: str, drawn: str
) -> None:
    repeat = Repeat(0.3, 7, mixed, drawn, RAMP)
    stream = Stream([corpus(), corpus(seed=1)], [2.0, 1.0], 40, seed=1, repeat=repeat)
    whole, parts, at = stream.batch(first, sum(cuts)), [], first
    for count in cuts:
        parts.append(stream.batch(at, count))
        at += count
    assert np.array_equal(np.concatenate([part.tokens_BT for part in parts]), whole.tokens_BT)
    assert sum(part.digest() for part in parts) % 2**64 == whole.digest()


def test_the_stream_reads_the_set_again_and_again_and_no_other_sequence_twice() -> None:
    repeat = Repeat(0.25, 3, "batch", "passes", Steps.of(8))
    stream = Stream([corpus(n_tokens=40_000)], [1.0], 40, seed=1, repeat=repeat)
    slots = np.arange(800)
    _, epoch, sequence = stream.locate(slots)
    often = np.bincount(sequence, minlength=1000)
    assert epoch.max() == 0
    assert sorted(often[often > 1]) == [66, 67, 67]  # 200 of 800 slots
    assert (often[often > 0] == 1).sum() == 600
    plain = Stream([corpus(n_tokens=40_000)], [1.0], 40, seed=1)
    assert set(sequence[repeat.of_set(slots, 1)]) == set(plain.locate(np.arange(3))[2])
