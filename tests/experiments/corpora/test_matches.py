"""Where texts lie in a corpus: every long enough run, and what is nearly a text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.experiments.corpora import matches as searching
from motet.experiments.corpora.matches import (
    EXACT,
    NEAR,
    SHINGLE,
    Match,
    Sought,
    TokenArray,
    matches,
)

Ints = npt.NDArray[np.int64]


def sought(tokens: Ints, least: int, similar: float | None = None) -> Sought:
    return Sought(tokens, least, np.ones(len(tokens) - SHINGLE + 1, dtype=bool), similar)


def found(corpus: Ints, texts: list[Sought]) -> list[Match]:
    return [one for part in matches(TokenArray(corpus), texts) for one in part]


def longest_runs(corpus: Ints, text: Ints, least: int) -> set[tuple[int, int, int]]:
    """(start, stop, first) by trying everything."""
    runs = set()
    for at in range(len(corpus)):
        for first in range(len(text)):
            if at and first and corpus[at - 1] == text[first - 1]:
                continue
            length = 0
            while (
                at + length < len(corpus)
                and first + length < len(text)
                and corpus[at + length] == text[first + length]
            ):
                length += 1
            if length >= least:
                runs.add((at, at + length, first))
    return runs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(8, 12))
def test_every_long_enough_run_is_found_whole_and_once(seed: int, words: int, least: int) -> None:
    draw = np.random.default_rng(seed)
    corpus = draw.integers(0, words, 150)
    text = draw.integers(0, words, 20)
    corpus[30:45] = text[3:18]
    asked = [sought(draw.integers(0, words, 9), 9), sought(text, least)]
    mine = [one for one in found(corpus, asked) if one.text == 1]
    assert all(one.how == EXACT for one in mine)
    places = [(one.start, one.stop, one.first) for one in mine]
    assert len(places) == len(set(places))
    assert set(places) == longest_runs(corpus, text, least)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 0.9), st.integers(0, 8))
def test_a_stretch_is_near_exactly_where_it_holds_enough_of_the_shingles(
    seed: int, similar: float, changes: int
) -> None:
    draw = np.random.default_rng(seed)
    corpus = draw.integers(100, 10_000, 400)
    text = np.arange(40)
    copy = text.copy()
    copy[draw.choice(40, changes, replace=False)] = 50
    corpus[200:240] = copy
    kept = {tuple(copy[i : i + SHINGLE]) for i in range(36)} & {
        tuple(text[i : i + SHINGLE]) for i in range(36)
    }
    near = [one for one in found(corpus, [sought(text, 40, similar)]) if one.how == NEAR]
    assert bool(near) == (len(kept) >= similar * 36)
    for one in near:
        assert 200 <= one.start < one.stop <= 240
        assert one.share == pytest.approx(len(kept) / 36)


@pytest.mark.parametrize("at", [0, 990, 1000, 1001, 1990, 2480])
def test_what_lies_across_the_border_of_two_chunks_is_found(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "CHUNK", 1000)
    corpus = np.arange(100, 2600)
    text = np.arange(20)
    corpus[at : at + 20] = text
    told: list[int] = []
    parts = matches(TokenArray(corpus), [sought(text, 13, 0.5)], told.append)
    ways = {(one.how, one.start, one.stop) for part in parts for one in part}
    assert ways == {(EXACT, at, at + 20), (NEAR, at, at + 20)}
    assert sum(told) == 2500


def test_a_template_alone_is_no_match_and_a_short_text_is_refused() -> None:
    text = np.arange(30)
    own = np.zeros(26, dtype=bool)
    own[20:] = True  # the first 20 tokens are the template's
    corpus = np.concatenate([text[:22], np.arange(900, 960)])
    assert found(corpus, [Sought(text, 13, own, 0.5)]) == []
    assert found(text, [Sought(text, 13, own, 0.5)])[0][1:] == (EXACT, 0, 30, 1.0, 0)
    with pytest.raises(ValueError, match="fewer than 8"):
        found(corpus, [sought(text[:7], 7)])
