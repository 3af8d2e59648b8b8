"""Probes: what is scored, that batches cover every item once, and that ranks change nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.scoring.probes import (
    encode_items,
    lowest_mean,
    probe_batches,
    score_items,
    surely_fit,
)
from motet.experiments.stream.stream import IGNORED_LABEL
from motet.experiments.types import ProbeItem

VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the cat sat again"] * 30, VOCABULARY)


def bigram(
    tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A model whose log-probabilities are a fixed function of (token, label)."""
    logprob = -((tokens_BT * 31 + labels_BT * 17) % 101) / 10.0
    return logprob, (tokens_BT + labels_BT) % 2 == 0


def by_hand(tokenizer: Tokenizer, item: ProbeItem) -> tuple[float, int, bool]:
    ids = [tokenizer.eod, *tokenizer.encode(item.prompt + item.target)]
    ends = tokenizer.encode_with_ends([item.prompt + item.target])[0][1]
    wanted = [place + 1 for place, end in enumerate(ends) if end > len(item.prompt)]
    scored = [bigram(np.array([ids[at - 1]]), np.array([ids[at]])) for at in wanted]
    return sum(float(p[0]) for p, _ in scored), len(wanted), all(bool(g[0]) for _, g in scored)


words = st.sampled_from(["the", " cat", " sat", " on", " mat", ",", " xyz", "é", " 😀"])
items = st.lists(
    st.builds(
        lambda prompt, target: ProbeItem("i", "k", "".join(prompt), "".join(target)),
        st.lists(words, min_size=1, max_size=8),
        st.lists(words, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(asked=items, batch_tokens=st.integers(1, 200), world=st.integers(1, 4))
def test_scores_equal_a_walk_by_hand_for_any_batch_size_and_world(
    tokenizer: Tokenizer, asked: list[ProbeItem], batch_tokens: int, world: int
) -> None:
    encoded = encode_items(asked, tokenizer, 512, "x")
    parts, calls = [], []
    for rank in range(world):
        count = [0]

        def counted(tokens, labels, count=count):
            count[0] += 1
            return bigram(tokens, labels)

        raw: list[npt.NDArray[np.float64]] = []
        score_items(
            encoded, counted, batch_tokens, rank, world, lambda v, raw=raw: (raw.append(v), v)[1]
        )
        parts.append(raw[0])
        calls.append(count[0])
    assert len(set(calls)) == 1, "every rank must make the same number of forward passes"
    logprob, greedy, lowest = np.sum(parts, axis=0)
    for number, item in enumerate(asked):
        expected, n_tokens, is_greedy = by_hand(tokenizer, item)
        assert logprob[number] == pytest.approx(expected)
        assert encoded.n_tokens[number] == n_tokens
        assert (greedy[number] > 0.5) == is_greedy
        assert expected - 1e-9 <= lowest[number] <= logprob[number] / n_tokens + 1e-9
        assert encoded.n_bytes[number] == len(item.target.encode())


def test_the_lowest_are_a_fifth_of_the_tokens_and_at_least_one() -> None:
    assert lowest_mean(np.array([-1.0, -5.0, -2.0])) == -5.0
    assert lowest_mean(np.array([*range(-10, 0)], dtype=np.float64)) == -9.5
    assert lowest_mean(np.empty(0)) == 0.0


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60), most=st.integers(1, 2000))
def test_batches_hold_every_item_once_within_the_limit(lengths: list[int], most: int) -> None:
    batches = probe_batches(np.array(lengths), most)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        width = -(-max(lengths[item] for item in batch) // 8) * 8
        assert len(batch) == 1 or len(batch) * max(8, width) <= most


def test_a_token_that_straddles_the_border_belongs_to_the_target(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the cat")
    assert len(whole) < len("the cat")
    encoded = encode_items([ProbeItem("i", "k", "the c", "at")], tokenizer, 64, "x")
    start = int(encoded.target_start[0])
    assert tokenizer.decode(encoded.tokens[0][start:]).endswith("at")
    assert encoded.n_tokens[0] >= 1


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4), st.integers(8, 64))
def test_what_fits_by_its_bytes_fits_by_its_tokens(
    tokenizer: Tokenizer, texts: list[str], length: int
) -> None:
    items = [ProbeItem(f"i{n}", "k", f"the {text}", f" {text}") for n, text in enumerate(texts)]
    assert tokenizer.spells_bytes
    if surely_fit(items, tokenizer, length):
        encode_items(items, tokenizer, length, "x")


def test_a_probe_longer_than_a_sequence_is_named(tokenizer: Tokenizer) -> None:
    long = ProbeItem("the-long-one", "k", "the cat sat " * 20, "on")
    with pytest.raises(UserError, match=r"experiments\.x: the probe 'the-long-one' has"):
        encode_items([long], tokenizer, 16, "experiments.x")


def test_positions_without_a_label_count_for_nothing(tokenizer: Tokenizer) -> None:
    def loud(tokens, labels):
        return np.full(labels.shape, -1.0), labels != IGNORED_LABEL

    encoded = encode_items(
        [ProbeItem("a", "k", "the cat", " sat"), ProbeItem("b", "k", "a", " b")], tokenizer, 64, "x"
    )
    found = score_items(encoded, loud, 10_000)
    assert found.logprob.tolist() == (-encoded.n_tokens).tolist()
    assert found.greedy.all()
