"""The stream: one order for every layout, every token once an epoch, masks after the overlay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.held_out import HeldOutSequences
from motet.experiments.stream.placement import compile_plan
from motet.experiments.stream.stream import IGNORED_LABEL, MIXTURE_BLOCK, Stream, mixture_counts
from tests.experiments.plans import EOD, ArrayCorpus, corpus, request

LENGTH = 40


def overlaid(folder: Path, source: ArrayCorpus, placement: str, masks: bool = True) -> Stream:
    clean = Stream([source], [1.0], LENGTH, seed=3, document_masks=masks)
    plan = compile_plan(
        [request("x", 20, 2, (0, 90), length=9, placement=placement)],
        1,
        LENGTH,
        boundaries=clean.boundaries,
    )
    write_plan(plan, folder / "p.plan")
    return Stream([source], [1.0], LENGTH, 3, ExposurePlan(folder / "p.plan"), masks)


def test_an_epoch_holds_every_sequence_once_and_the_next_another_order() -> None:
    stream = Stream([corpus()], [1.0], LENGTH, seed=1)
    _, epoch, sequence = stream.locate(np.arange(300))
    assert np.array_equal(np.sort(sequence[:100]), np.arange(100))
    assert np.array_equal(np.sort(sequence[100:200]), np.arange(100))
    assert not np.array_equal(sequence[:100], sequence[100:200])
    assert epoch.tolist() == [0] * 100 + [1] * 100 + [2] * 100


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 250), cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_any_way_of_cutting_slots_into_batches_gives_the_same_tokens(
    first: int, cuts: list[int]
) -> None:
    stream = Stream([corpus(), corpus(seed=1)], [2.0, 1.0], LENGTH, seed=1)
    whole = stream.batch(first, sum(cuts))
    parts, at, digest = [], first, 0
    for count in cuts:
        batch = stream.batch(at, count)
        parts.append(batch.tokens_BT)
        digest += batch.digest()
        at += count
    assert np.array_equal(np.concatenate(parts), whole.tokens_BT)
    assert digest % 2**64 == whole.digest()


def test_the_digest_sees_one_token_one_label_and_the_slot() -> None:
    stream = Stream([corpus()], [1.0], LENGTH, seed=1)
    batch = stream.batch(5, 2)
    plain = batch.digest()
    batch.tokens_BT[1, 7] += 1
    changed = batch.digest()
    batch.tokens_BT[1, 7] -= 1
    batch.labels_BT[0, 3] = IGNORED_LABEL
    assert len({plain, changed, batch.digest(), stream.batch(6, 2).digest()}) == 4


def test_the_order_depends_on_seed_corpus_and_length_only() -> None:
    slots = np.arange(100)
    one = Stream([corpus()], [1.0], LENGTH, seed=1).locate(slots)[2]
    assert np.array_equal(one, Stream([corpus()], [5.0], LENGTH, seed=1).locate(slots)[2])
    assert not np.array_equal(one, Stream([corpus()], [1.0], LENGTH, seed=2).locate(slots)[2])
    other = corpus(fingerprint="other")
    assert not np.array_equal(one, Stream([other], [1.0], LENGTH, seed=1).locate(slots)[2])


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.1, 100), min_size=1, max_size=6))
def test_mixture_counts_add_up_and_are_within_one_of_the_share(weights: list[float]) -> None:
    counts = mixture_counts(weights)
    exact = np.array(weights) / sum(weights) * MIXTURE_BLOCK
    assert counts.sum() == MIXTURE_BLOCK
    assert np.all(np.abs(counts - exact) < 1)


def test_a_mixture_gives_each_corpus_its_share_and_every_sequence_in_turn() -> None:
    stream = Stream([corpus(), corpus(seed=1, fingerprint="b")], [3.0, 1.0], LENGTH, seed=1)
    which, epoch, sequence = stream.locate(np.arange(2 * MIXTURE_BLOCK))
    assert np.bincount(which).tolist() == [15_000, 5_000]
    assert np.bincount(which[:400])[1] == pytest.approx(100, abs=40)
    mine = which == 1
    ordinal = epoch[mine] * 100 + sequence[mine]
    assert len(np.unique(ordinal)) == 5_000
    assert ordinal.max() == 4_999


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [1.0, 1e-9]])
def test_an_unusable_weight_is_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        mixture_counts(weights)


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.corpora\[0\]: 30 tokens are fewer"):
        Stream([corpus(30)], [1.0], LENGTH, seed=1)


def test_overwriting_exposures_change_their_own_tokens_only(tmp_path: Path) -> None:
    source = corpus()
    clean, full = (
        Stream([source], [1.0], LENGTH, 3),
        overlaid(tmp_path, source, "anywhere", masks=False),
    )
    before, after = clean.batch(0, 90), full.batch(0, 90)
    covered = np.zeros(before.tokens_BT.shape, dtype=bool)
    assert full.plan is not None
    for span in full.plan.spans(0, 90):
        covered[span.row, span.offset : span.offset + span.length] = True
    assert covered.sum() == 40 * 9
    assert np.array_equal(before.tokens_BT[~covered], after.tokens_BT[~covered])
    assert len(after.exposure_ids) == 40
    assert np.array_equal(after.labels_BT[:, :-1], after.tokens_BT[:, 1:])


def test_boundary_exposures_move_base_tokens_right_and_lose_only_the_end(tmp_path: Path) -> None:
    source = corpus()
    clean, full = Stream([source], [1.0], LENGTH, 3), overlaid(tmp_path, source, "boundary")
    before, after = clean.batch(0, 90).tokens_BT, full.batch(0, 90).tokens_BT
    assert full.plan is not None
    spans = full.plan.spans(0, 90)
    assert len(spans) == 40
    for span in spans:
        assert before[span.row, span.offset - 1] == EOD
        kept = np.delete(after[span.row], np.arange(span.offset, span.offset + span.length))
        assert np.array_equal(kept, before[span.row][: LENGTH - span.length])


def reference_documents(tokens: np.ndarray, index_starts: set[int], spans: list) -> np.ndarray:
    """Document numbers of one sequence, by walking it token by token."""
    numbers, number = [], 0
    inside = {}
    for span in spans:
        inside.update({span.offset + place: span for place in range(span.length)})
    for place, token in enumerate(tokens):
        if place and (tokens[place - 1] == EOD or (place in index_starts and place not in inside)):
            number += 1
        numbers.append(number)
        del token
    return np.array(numbers)


@pytest.mark.parametrize("placement", ["anywhere", "boundary", "start"])
@pytest.mark.parametrize("terminated", [True, False])
def test_document_ids_and_labels_follow_the_overlay(
    tmp_path: Path, placement: str, terminated: bool
) -> None:
    source = corpus(eod_terminated=terminated)
    stream = overlaid(tmp_path, source, placement)
    batch = stream.batch(0, 90)
    assert stream.plan is not None
    assert batch.document_ids_BT is not None
    spans = stream.plan.spans(0, 90)
    _, _, sequence = stream.locate(np.arange(90))
    for row in range(90):
        mine = [span for span in spans if span.row == row]
        starts = set()
        if not terminated:
            first = int(sequence[row]) * LENGTH
            starts = {int(at) - first for at in source.document_starts(first, first + LENGTH)}
            for span in mine:
                if span.shift:
                    starts = {at if at < span.offset else at + span.length for at in starts}
        expected = reference_documents(batch.tokens_BT[row], starts, mine)
        found = batch.document_ids_BT[row]
        assert np.array_equal(found - found[0], expected - expected[0]), (row, mine)
        crossing = np.diff(expected) > 0
        assert np.all(batch.labels_BT[row, :-1][crossing] == IGNORED_LABEL)
        assert np.array_equal(
            batch.labels_BT[row, :-1][~crossing], batch.tokens_BT[row, 1:][~crossing]
        )
        assert batch.labels_BT[row, -1] == IGNORED_LABEL


@pytest.mark.parametrize("placement", ["anywhere", "boundary"])
@pytest.mark.parametrize("marks", ["start", "both"])
def test_a_mark_stays_with_its_text_where_it_begins_documents(
    tmp_path: Path, marks: str, placement: str
) -> None:
    source = corpus(eod_terminated=False, eod_marks=marks)
    source.tokens[source.starts] = EOD
    if marks == "both":
        source.tokens[source.starts[1:] - 1] = EOD
    starts = set(source.starts.tolist())
    clean = Stream([source, corpus(seed=1)], [1.0, 1.0], LENGTH, seed=3, document_masks=True)
    numbers, _, sequence = clean.locate(np.arange(90))
    found = clean.batch(0, 90).document_ids_BT
    assert found is not None
    for row in np.flatnonzero(numbers == 0):
        first = int(sequence[row]) * LENGTH
        expected = [place for place in range(1, LENGTH) if first + place in starts]
        assert (np.flatnonzero(np.diff(found[row])) + 1).tolist() == expected
        assert clean.boundaries(int(row)).tolist() == expected
    stream = overlaid(tmp_path, source, placement)
    batch, plan = stream.batch(0, 90), stream.plan
    assert plan is not None
    assert batch.document_ids_BT is not None
    for span in plan.spans(0, 90):
        tokens, ids = batch.tokens_BT[span.row], batch.document_ids_BT[span.row]
        begins = np.flatnonzero(np.diff(ids)) + 1
        stop = span.offset + span.length
        if marks == "both":  # the exposure is a document, and so is what follows it
            assert {span.offset, stop} <= {0, LENGTH, *begins.tolist()}
        else:
            assert (tokens[begins[begins > stop]] == EOD).all()


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0]])
def test_held_out_sequences_are_those_that_a_short_run_never_reads(weights: list[float]) -> None:
    # A mixture reads a block of 10,000 slots in an order of its own.
    corpora = [
        corpus(n_tokens=4000 * 100 ** (len(weights) - 1), seed=n) for n in range(len(weights))
    ]
    stream = Stream(corpora, weights, 40, 3)
    short = HeldOutSequences(stream, 8, 50)
    assert short.unseen
    for slots in (95, 100, 300, 20_000)[2 * len(weights) - 2 :]:
        held_out = HeldOutSequences(stream, 8, slots)
        read = {row.tobytes() for row in stream.base_tokens(np.arange(slots))}
        again = {row.astype(np.int32).tobytes() for row in held_out.tokens_BT} & read
        assert held_out.unseen == (not again)
    assert not held_out.unseen
    read = {row.tobytes() for row in stream.base_tokens(np.arange(50))}
    assert not read & {row.astype(np.int32).tobytes() for row in short.tokens_BT}
    np.testing.assert_array_equal(short.labels_BT[:, :-1], short.tokens_BT[:, 1:])
    assert (short.labels_BT[:, -1] == IGNORED_LABEL).all()
    assert len(short.tokens_BT) == 8
