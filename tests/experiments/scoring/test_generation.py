"""Probes that write: the same text in any batch, company and world, and no more passes than said."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.scoring import generation
from motet.experiments.scoring.generation import (
    Likeliest,
    Prompts,
    batches_of,
    generate,
    guess,
    most_tokens,
)
from motet.experiments.scoring.probes import encode_items, score_items
from motet.experiments.scoring.store import read_probe, write_probe
from motet.experiments.types import I64, Generated, ItemScores, ProbeItem, generated_texts
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize

EOD = 0


class Numbers:
    """A tokenizer whose words are numbers."""

    eod = EOD

    def decode(self, ids: I64) -> str:
        return " ".join(map(str, ids))


def prompts_of(lengths: list[int], most: list[int], vocabulary: int = 64) -> Prompts:
    draw = np.random.default_rng(len(lengths))
    tokens = tuple(draw.integers(1, vocabulary, length).astype(np.int64) for length in lengths)
    return Prompts(np.arange(len(lengths)) * 2, tokens, np.array(most), 2 * len(lengths))


def countdown(tokens_BT: I64, at_BK: I64) -> I64:
    """A model that counts down from the last token to the end of document."""
    return np.take_along_axis(tokens_BT, at_BK, axis=1) - 1


def by_hand(ids: I64, most: int) -> tuple[list[int], bool]:
    last = int(ids[-1])
    written = list(range(last - 1, EOD, -1))[:most]
    return written, last - 1 < most


jobs = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(asked=jobs, batch_tokens=st.integers(1, 4000), world=st.integers(1, 4))
def test_every_rank_makes_the_same_passes_and_all_prompts_are_written_after(
    asked: list[tuple[int, int]], batch_tokens: int, world: int
) -> None:
    prompts = prompts_of([length for length, _ in asked], [most for _, most in asked])
    passes, found, seen = [0] * world, [None] * world, [0] * world
    barrier = threading.Barrier(world)
    flags, totals = [False] * world, [np.zeros(0)] * world

    def together(rank: int) -> None:
        def any_rank(mine: bool) -> bool:
            flags[rank] = mine
            barrier.wait(20)
            answer = any(flags)
            barrier.wait(20)
            return answer

        def total(values):
            totals[rank] = values
            barrier.wait(20)
            return np.sum(totals, axis=0)

        def counted(tokens_BT: I64, at_B: I64) -> I64:
            passes[rank] += 1
            seen[rank] += tokens_BT.size
            return countdown(tokens_BT, at_B)

        found[rank] = generate(
            prompts, counted, Numbers(), batch_tokens, rank, world, total, any_rank
        )  # type: ignore[arg-type,call-overload]

    ranks = [threading.Thread(target=together, args=(rank,)) for rank in range(world)]
    [rank.start() for rank in ranks]
    [rank.join() for rank in ranks]
    assert len(set(passes)) == 1, "another number of passes would leave a collective waiting"
    for generated in found:
        assert isinstance(generated, Generated)
        for number, (ids, most) in enumerate(zip(prompts.tokens, prompts.max_tokens, strict=True)):
            expected, ended = by_hand(ids, int(most))
            assert generated.tokens[2 * number].tolist() == expected
            assert generated.texts[2 * number] == " ".join(map(str, expected))
            assert generated.ended[2 * number] == ended
            assert generated.texts[2 * number + 1] == ""
    if world == 1:
        assert seen[0] <= most_tokens(prompts, batch_tokens)


def test_passes_end_with_the_last_row_that_writes() -> None:
    prompts = Prompts(np.arange(2), (np.array([5]), np.array([9])), np.array([200, 200]), 2)
    passes = []
    generate(prompts, lambda *x: (passes.append(1), countdown(*x))[1], Numbers(), 10**6)  # type: ignore[arg-type]
    assert len(passes) == 9, "nine tokens, the last of them the end, and not two hundred"


def test_an_item_has_its_shape_whoever_is_beside_it() -> None:
    mine = np.arange(1, 41)
    others = prompts_of([3, 90, *[38] * 30], [40] * 32)
    shapes = []
    for tokens in ((mine,), (*others.tokens, mine)):
        count = len(tokens)
        prompts = Prompts(np.arange(count), tokens, np.full(count, 40), count)
        found: list[tuple[int, ...]] = []

        def look(tokens_BT: I64, at_BK: I64, found: list[tuple[int, ...]] = found) -> I64:
            if any(np.array_equal(row[:40], mine) for row in tokens_BT):
                found.append(tokens_BT.shape)
            return at_BK * at_BK  # nothing repeats, so that nothing is guessed

        generate(prompts, look, Numbers(), 4096)  # type: ignore[arg-type]
        shapes.append(found)
    assert shapes[0] == shapes[1] == [(16, 128)] * 40


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ModelConfig(
        vocabulary_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64
    )
    made = Decoder(config)
    initialize(made, 0)
    with torch.no_grad():
        assert made.head is not None
        made.head.weight.mul_(40.0)  # far apart, but for the twins
        made.head.weight[32:] = made.head.weight[:32]
    return made


def likeliest_of(decoder: Decoder) -> Likeliest:
    def likeliest(tokens_BT: I64, at_BK: I64) -> I64:
        labels, at = torch.full(tokens_BT.shape, -100), torch.from_numpy(at_BK)
        labels.scatter_(1, at, 0)
        found = decoder(torch.from_numpy(tokens_BT), labels, mode="score")
        return found.likeliest.gather(1, at).numpy()

    return likeliest


def test_guesses_change_no_text_and_spare_passes(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    likeliest, passes = likeliest_of(decoder), []

    def counted(tokens_BT: I64, at_BK: I64) -> I64:
        passes.append(1)
        return likeliest(tokens_BT, at_BK)

    prompts = prompts_of([*range(3, 30, 2), 40, 61, 70], [60] * 17)
    quick = generate(prompts, counted, Numbers(), 10**6)  # type: ignore[arg-type]
    with_guesses = len(passes)
    monkeypatch.setattr(generation, "guess", lambda text, count: [])
    slow = generate(prompts, counted, Numbers(), 10**6)  # type: ignore[arg-type]
    assert [ids.tolist() for ids in quick.tokens] == [ids.tolist() for ids in slow.tokens]
    assert quick.ended.tolist() == slow.ended.tolist()
    assert with_guesses < (len(passes) - with_guesses) / 2


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=30), count=st.integers(1, 12))
def test_a_guess_goes_on_as_the_text_did_before(text: list[int], count: int) -> None:
    found = guess(text, count)
    assert len(found) in (0, count)
    before = [tuple(text[at : at + 2]) for at in range(len(text) - 2)]
    if tuple(text[-2:]) in before:
        at = max(n for n, pair in enumerate(before) if pair == tuple(text[-2:]))
        assert found[0] == text[at + 2]
    elif not found:
        assert text[-1] not in text[:-1]
    assert guess([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_text_is_the_same_at_batches_of_1_3_and_16_and_twins_are_told_apart_by_number(
    decoder: Decoder,
) -> None:
    likeliest = likeliest_of(decoder)

    prompts = prompts_of([*range(3, 30, 2), 40, 61, 70], [24] * 17)
    rows = {1: 1, 3: 3 * (32 + 32), 16: 10**6}
    found = {}
    for count, batch_tokens in rows.items():
        assert max(len(shape.members) for shape in batches_of(prompts, batch_tokens)) <= count
        found[count] = generate(prompts, likeliest, Numbers(), batch_tokens).texts  # type: ignore[arg-type]
    assert found[1] == found[3] == found[16]
    alone = Prompts(np.array([0]), prompts.tokens[9:10], np.array([24]), 1)
    assert generate(alone, likeliest, Numbers(), 10**6).texts[0] == found[16][18]  # type: ignore[arg-type]
    written = {int(token) for text in found[16] for token in text.split()}
    assert len(written) > 3, "a model that writes one token alone would show nothing"
    assert max(written) < 32, "of two equal logits the smaller number is chosen"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the cat sat again"] * 30, 300)


def test_what_was_written_is_read_back_and_files_without_it_are_read_as_before(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    items = [
        ProbeItem("a", "k", "the cat", " sat"),
        ProbeItem("b", "k", "the mat", "", 5),
        ProbeItem("c", "k", "the", " é", 3),
    ]
    encoded = encode_items(items, tokenizer, 64, "x")

    def score(tokens_BT, labels_BT):
        return -np.ones(labels_BT.shape), labels_BT >= 0

    scores = score_items(encoded, score, 1000)
    assert scores.n_tokens[1] == 0
    words = tokenizer.encode(" é cat")
    generated = generate(
        encoded.prompts, lambda t, at: np.full(at.shape, words[0]), tokenizer, 1000
    )
    assert generated.tokens[1].tolist() == [words[0]] * 5
    assert generated.tokens[0].size == 0
    assert not generated.ended.any()
    with_text = ItemScores(
        scores.logprob, scores.n_tokens, scores.n_bytes, scores.greedy, generated
    )
    write_probe(tmp_path, 3, 0, "ab", {"x": with_text, "y": scores}, {"small": {"x": with_text}})
    for member in (None, "small"):
        _, found = read_probe(tmp_path / "step-00000003.npz", member)
        back = found["x"].generated
        assert back is not None
        assert back.texts == generated.texts
        assert [ids.tolist() for ids in back.tokens] == [ids.tolist() for ids in generated.tokens]
        assert back.ended.tolist() == generated.ended.tolist()
    _, found = read_probe(tmp_path / "step-00000003.npz")
    assert found["y"].generated is None
    assert generated_texts(found["y"]) == ("", "", "")


def test_a_probe_that_asks_for_more_than_a_sequence_holds_is_named(tokenizer: Tokenizer) -> None:
    item = ProbeItem("wordy", "k", "the cat", " sat", 63)
    with pytest.raises(UserError, match=r"'wordy' has \d+ tokens and asks for 63 more"):
        encode_items([item], tokenizer, 64, "experiments.x")
