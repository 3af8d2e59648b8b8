"""Keyed randomness: published vectors, permutations, and independence of neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from motet.experiments.stream.random import (
    key_after,
    key_state,
    name_key,
    permute,
    philox,
    philox_grid,
    text_keys,
    uniform_int,
)

# Known-answer vectors of Random123 (kat_vectors, philox4x32 10): counter words, key words, output
# words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def join(low: int, high: int) -> int:
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_vectors(counter: tuple, key: tuple, output: tuple) -> None:
    c0 = np.array([join(*counter[:2])], dtype=np.uint64)
    c1 = np.array([join(*counter[2:])], dtype=np.uint64)
    first, second = philox(join(*key), c0, c1)
    assert (int(first[0]), int(second[0])) == (join(*output[:2]), join(*output[2:]))


def test_philox_does_not_depend_on_how_many_counters_are_asked_for() -> None:
    counters = np.arange(100_000, dtype=np.uint64)
    whole = philox(7, counters, counters)[0]
    assert np.array_equal(
        whole[70_000:70_010], philox(7, counters[70_000:70_010], counters[70_000:70_010])[0]
    )


def test_a_grid_of_counters_has_the_words_of_its_pairs() -> None:
    rng = np.random.default_rng(0)
    for n, d in ((0, 3), (1, 1), (7, 5), (40_000, 3), (3, 40_000)):
        names = rng.integers(0, 2**64, size=n, dtype=np.uint64)
        draws = rng.integers(0, 2**32, size=d, dtype=np.uint64)
        pairs = philox(2**63 + 5, np.tile(names, d), np.repeat(draws, n))[0].reshape(d, n)
        assert np.array_equal(philox_grid(2**63 + 5, names, draws), pairs)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_a_huge_domain_stays_inside_and_is_injective() -> None:
    n = 102_539_062_501
    index = np.linspace(0, n - 1, 20_000).astype(np.int64)
    image = permute(index, n, 3)
    assert image.min() >= 0
    assert image.max() < n
    assert len(np.unique(image)) == len(np.unique(index))


def test_permute_moves_neighbours_apart_like_chance() -> None:
    n = 50_000
    image = permute(np.arange(n), n, 11)
    assert abs(stats.spearmanr(np.arange(n), image).statistic) < 0.02
    assert np.mean(np.abs(np.diff(image)) < n / 100) == pytest.approx(0.02, abs=0.005)


def test_permute_refuses_an_index_outside() -> None:
    with pytest.raises(ValueError, match="in \\[0, 5\\)"):
        permute(np.array([5]), 5, 0)


def test_a_text_key_depends_on_its_own_text_only() -> None:
    alone = text_keys(["abc"])
    assert text_keys(["a-much-longer-id", "abc"])[1] == alone[0]
    assert len(np.unique(text_keys(["", "a", "aa", "b", "ab", "ba", "a b", "ä"]))) == 8


def test_a_name_key_separates_its_parts_and_types() -> None:
    assert name_key("a", "bc") != name_key("ab", "c")
    assert name_key("1") != name_key(1)
    assert name_key(1, "assign", "canaries") == name_key(1, "assign", "canaries")


def test_uniform_draws_are_uniform() -> None:
    counters = np.arange(20_000, dtype=np.uint64)
    first, second = philox(5, counters, np.zeros_like(counters))
    assert stats.kstest(first * 2.0**-64, "uniform").pvalue > 1e-4
    counts = np.bincount(uniform_int(second, 3, 13), minlength=13)
    assert counts[:3].sum() == 0
    assert stats.chisquare(counts[3:]).pvalue > 1e-4


def test_uniform_int_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match="low < high"):
        uniform_int(np.zeros(1, dtype=np.uint64), 4, 4)


@given(st.lists(st.one_of(st.text(), st.integers()), max_size=4), st.integers(0, 10**18 - 1))
def test_a_key_goes_on_from_the_state_of_its_path(path: list[str | int], number: int) -> None:
    assert key_after(key_state(*path), number) == name_key(*path, number)
