"""Parts of a corpus: what is held out is read by nobody else, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus, CorpusWriter
from motet.experiments.corpora.tokenizer import train_bpe
from motet.experiments.stream.part import CorpusPart, hold_out
from motet.experiments.stream.stream import Stream

TOKENIZER = train_bpe(["some text"], 257)


def corpus_of(folder: Path, lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different from document to document."""
    with CorpusWriter(folder, TOKENIZER, shard_tokens=37) as writer:
        for number, length in enumerate(lengths):
            writer.append([10 + number] * length, f"d{number}")
    return Corpus.open(folder)


def read(part: CorpusPart, start: int, length: int) -> list[int]:
    out = np.empty((1, length), dtype=np.int32)
    part.read_many(np.array([start]), length, out)
    return out[0].tolist()


@pytest.mark.parametrize("documents", [[0], [0, 1, 2], [1, 3, 4], [9], [0, 9], list(range(10))])
def test_a_part_is_its_documents_end_to_end(tmp_path: Path, documents: list[int]) -> None:
    corpus = corpus_of(tmp_path / "c", [3, 1, 7, 2, 5, 1, 1, 40, 2, 6])
    part = CorpusPart(corpus, np.array(documents), {})
    spans = [corpus.document_span(one) for one in documents]
    tokens = np.concatenate([corpus.read(start, stop - start) for start, stop in spans]).tolist()
    assert part.n_tokens == len(tokens)
    begins = np.cumsum([0] + [stop - start for start, stop in spans])[:-1].tolist()
    for start in range(len(tokens)):
        for stop in range(start + 1, len(tokens) + 1):
            assert read(part, start, stop - start) == tokens[start:stop]
            assert part.document_starts(start, stop).tolist() == [
                one for one in begins if start <= one < stop
            ]
    inside = part.documents_between(0, part.n_tokens)
    assert inside == documents
    with pytest.raises(IndexError):
        part.document_starts(0, part.n_tokens + 1)


def test_held_out_documents_and_the_rest_are_the_corpus(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [4] * 40)
    rest, held = hold_out(corpus, 7, 3, "validation.documents", "data.corpora[0]")
    kept, out = (part.documents_between(0, part.n_tokens) for part in (rest, held))
    assert len(out) == 7
    assert sorted(kept + out) == list(range(40))
    again = hold_out(corpus, 7, 3, "validation.documents", "data.corpora[0]")[1]
    assert again.documents_between(0, again.n_tokens) == out
    other = hold_out(corpus, 7, 4, "validation.documents", "data.corpora[0]")[1]
    assert other.documents_between(0, other.n_tokens) != out
    assert len({rest.fingerprint, held.fingerprint, other.fingerprint, corpus.fingerprint}) == 4


def test_no_epoch_reads_what_is_held_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [4] * 40)
    rest, held = hold_out(corpus, 7, 3, "validation.documents", "data.corpora[0]")
    stream = Stream([rest], [1.0], 8, seed=1)
    slots = np.arange(5 * stream.sequences_of(0))
    hidden = set(read(held, 0, held.n_tokens)) - {corpus.eod}
    assert len(hidden) == 7
    assert not hidden & set(stream.base_tokens(slots).ravel().tolist())


@pytest.mark.parametrize(("documents", "asked"), [(1, 1), (5, 3), (4, 100)])
def test_more_than_half_is_refused(tmp_path: Path, documents: int, asked: int) -> None:
    corpus = corpus_of(tmp_path / "c", [4] * documents)
    with pytest.raises(UserError, match=rf"validation.documents={asked}: data.corpora\[0\]"):
        hold_out(corpus, asked, 0, "validation.documents", "data.corpora[0]")
