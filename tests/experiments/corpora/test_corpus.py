"""The corpus: what is written is read back, and damage is found and named."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus, CorpusWriter
from motet.experiments.corpora.inspection import load_tokenizer
from motet.experiments.corpora.tokenizer import train_bpe

TOKENIZER = train_bpe(["some text"], 257)
documents_strategy = st.lists(
    st.tuples(st.lists(st.integers(1, 256), max_size=12), st.text(max_size=6)),
    min_size=1,
    max_size=12,
)


def write(path: Path, documents: Sequence[tuple[list[int], str]], shard_tokens: int = 7) -> Corpus:
    with CorpusWriter(path, TOKENIZER, shard_tokens) as writer:
        for tokens, document_id in documents:
            writer.append(tokens, document_id)
    return Corpus.open(path)


def small(path: Path) -> Corpus:
    return write(path, [([i + 1] * (i % 5), f"doc-{i}") for i in range(20)])


@given(documents_strategy, st.integers(1, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_every_token_and_document_is_read_back_across_shard_borders(
    documents: list[tuple[list[int], str]], shard_tokens: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder) / "c", documents, shard_tokens)
        flat = [token for tokens, _ in documents for token in [*tokens, TOKENIZER.eod]]
        assert corpus.n_tokens == len(flat)
        assert corpus.read(0, len(flat)).tolist() == flat
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        assert corpus.read(start, stop - start).tolist() == flat[start:stop]
        length = data.draw(st.integers(0, len(flat)))
        starts = np.arange(len(flat) - length + 1)
        out = np.full((len(starts), length), -1, np.int32)
        corpus.read_many(starts, length, out)
        assert out.tolist() == [flat[s : s + length] for s in starts]


@given(documents_strategy, st.data())
@settings(max_examples=25, deadline=None)
def test_documents_are_found_by_ordinal_by_position_and_by_range(
    documents: list[tuple[list[int], str]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder) / "c", documents)
        assert corpus.n_documents == len(documents)
        begins, position = [], 0
        for ordinal, (tokens, document_id) in enumerate(documents):
            span = (position, position + len(tokens) + 1)
            assert corpus.document_span(ordinal) == span
            assert corpus.document_id(ordinal) == document_id
            assert {corpus.document_at(p) for p in range(*span)} == {ordinal}
            assert corpus.read(position, len(tokens)).tolist() == tokens
            begins.append(position)
            position = span[1]
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, position)] * 2)))
        found = corpus.document_starts(start, stop)
        assert found.dtype == np.int64
        assert found.tolist() == [begin for begin in begins if start <= begin < stop]


def test_reading_inside_a_shard_copies_nothing(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", [([5] * 50, "a")], shard_tokens=100)
    assert not corpus.read(3, 20).flags.owndata
    assert not corpus.read(3, 20).flags.writeable


def test_positions_and_documents_outside_the_corpus_are_refused(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    out = np.empty((1, 4), np.int32)
    for bad in (
        lambda: corpus.read(corpus.n_tokens - 1, 2),
        lambda: corpus.read(-1, 1),
        lambda: corpus.read_many(np.array([corpus.n_tokens - 3]), 4, out),
        lambda: corpus.document_at(corpus.n_tokens),
        lambda: corpus.document_id(20),
        lambda: corpus.document_span(-1),
    ):
        with pytest.raises(IndexError):
            bad()


def test_the_fingerprint_depends_on_the_tokens_and_not_on_the_place(tmp_path: Path) -> None:
    first = small(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(first.path, tmp_path / "elsewhere" / "b")
    assert Corpus.open(tmp_path / "elsewhere" / "b").fingerprint == first.fingerprint
    renamed = write(tmp_path / "d", [([i + 1] * (i % 5), "other id") for i in range(20)])
    assert renamed.fingerprint == first.fingerprint
    changed = write(tmp_path / "c", [([i + 2] * (i % 5), f"doc-{i}") for i in range(20)])
    assert changed.fingerprint != first.fingerprint
    resplit = write(tmp_path / "e", [([1, 2], "x"), ([3], "y")])
    other = write(tmp_path / "f", [([1, 2, 0, 3], "x")])
    assert resplit.read(0, 5).tolist() == other.read(0, 5).tolist()
    assert resplit.fingerprint != other.fingerprint, "document borders are part of it"


def test_a_sound_corpus_verifies_and_reports_progress(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    seen: list[tuple[int, int]] = []
    assert corpus.verify(lambda done, total: seen.append((done, total))) == []
    total = sum(file.n_bytes for file in corpus.files())
    assert max(seen) == (total, total)


def test_every_altered_truncated_and_missing_file_is_named_by_verify(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    altered, truncated, missing = (corpus.path / f"tokens-0000{i}.bin" for i in range(3))
    content = bytearray(altered.read_bytes())
    content[3] ^= 1
    altered.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    missing.unlink()
    problems = {problem.setting: problem.message for problem in corpus.verify()}
    assert problems.keys() == {str(altered), str(truncated), str(missing)}
    assert problems[str(altered)].startswith("altered")
    assert problems[str(truncated)].startswith("truncated: 13 bytes")
    assert problems[str(missing)].startswith("missing")


@pytest.mark.parametrize(
    "name", ["tokens-00001.bin", "documents.starts", "documents.ids", "tokenizer.json"]
)
def test_opening_names_a_truncated_or_missing_file_without_hashing(
    tmp_path: Path, name: str
) -> None:
    file = small(tmp_path / "c").path / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{name}: truncated"):
        Corpus.open(tmp_path / "c")
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        Corpus.open(tmp_path / "c")


def test_a_manifest_that_is_missing_damaged_or_edited_is_refused(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    manifest = corpus.path / "corpus.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "eod": 3}))
    with pytest.raises(UserError, match=r"corpus.json was altered"):
        Corpus.open(corpus.path)
    manifest.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Corpus.open(corpus.path)
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(UserError, match=r"corpus.json is damaged"):
        Corpus.open(corpus.path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"is not a corpus: it has no corpus.json"):
        Corpus.open(corpus.path)


def test_every_value_of_a_manifest_is_vouched_for(tmp_path: Path) -> None:
    """The fingerprint covers what defines the tokens; the manifest's own hash all else."""
    manifest = small(tmp_path / "c").path / "corpus.json"
    content = json.loads(manifest.read_text())
    assert {"vocabulary_size", "n_documents", "tokenizer", "beside"} < set(content)
    for key in content.keys() - {"format", "version"}:
        manifest.write_text(json.dumps({**content, key: None}))
        with pytest.raises(UserError, match=r"corpus.json was altered"):
            Corpus.open(tmp_path / "c")
        manifest.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(UserError, match=r"corpus.json was altered"):
            Corpus.open(tmp_path / "c")


def test_what_is_read_with_the_tokenizer_is_vouched_for(tmp_path: Path) -> None:
    corpus = small(tmp_path / "c")
    assert corpus.vouched
    settings = corpus.path / "tokenizer_config.json"
    kept = settings.read_text()
    corpus.check_tokenizer()
    for text in (kept.replace("endofdoc", "endofall"), kept[:20], "[]"):
        settings.write_text(text)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            corpus.check_tokenizer()
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            load_tokenizer(corpus)
        assert "tokenizer_config.json" in str(corpus.verify())
    settings.unlink()
    assert "tokenizer_config.json: missing" in str(corpus.verify()[0])
    settings.write_text(kept)
    (corpus.path / "notes.txt").write_text("read by nobody")
    assert corpus.verify() == []
    (corpus.path / "special_tokens_map.json").write_text("{}")
    (problem,) = corpus.verify()
    assert "special_tokens_map.json: was not there when the corpus was made" in str(problem)
    with pytest.raises(UserError, match="special_tokens_map"):
        corpus.check_tokenizer()


def test_a_corpus_of_before_its_manifest_had_a_hash_is_read_and_not_vouched_for(
    tmp_path: Path,
) -> None:
    manifest = small(tmp_path / "c").path / "corpus.json"
    content = json.loads(manifest.read_text())
    old = {key: value for key, value in content.items() if key not in ("sha256", "beside")}
    manifest.write_text(json.dumps(old))
    corpus = Corpus.open(tmp_path / "c")
    assert not corpus.vouched
    corpus.check_tokenizer()
    assert corpus.verify() == []
    assert all(file.path.name != "tokenizer_config.json" for file in corpus.files())


def test_a_corpus_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "c", TOKENIZER) as writer:
        writer.append([1, 2], "a")
        raise RuntimeError
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match=r"c.partial is unfinished"):
        Corpus.open(tmp_path / "c")


def test_writing_resumed_from_a_checkpoint_drops_what_came_after_it(tmp_path: Path) -> None:
    documents = [([i + 1] * 5, f"doc-{i}") for i in range(9)]
    whole = write(tmp_path / "whole", documents)
    for kept in range(1, 9):
        path = tmp_path / f"resumed-{kept}"
        writer = CorpusWriter(path, TOKENIZER, 7)
        for tokens, document_id in documents[:kept]:
            writer.append(tokens, document_id)
        state = json.loads(json.dumps(writer.checkpoint()))
        writer.append([9] * 30, "lost")
        writer.checkpoint()
        writer = CorpusWriter(path, TOKENIZER, 7, resume=state)
        for tokens, document_id in documents[kept:]:
            writer.append(tokens, document_id)
        writer.close()
        assert contents(path) == contents(whole.path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writing_over_something_and_writing_nothing_are_refused(tmp_path: Path) -> None:
    small(tmp_path / "c")
    with pytest.raises(UserError, match="exists and is not empty"):
        CorpusWriter(tmp_path / "c", TOKENIZER)
    with pytest.raises(UserError, match="no documents"):
        CorpusWriter(tmp_path / "d", TOKENIZER).close()


def test_reading_many_is_far_faster_than_training_needs(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 257, 4_000_000)
    corpus = write(tmp_path / "c", [(tokens, "all")], shard_tokens=1_500_000)  # type: ignore[list-item]
    starts = np.random.default_rng(1).integers(0, corpus.n_tokens - 2048, 512)
    out = np.empty((512, 2048), np.int32)
    fastest_s = float("inf")
    for _ in range(10):
        started_s = time.perf_counter()
        corpus.read_many(starts, 2048, out)
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    assert out[7].tolist() == corpus.read(int(starts[7]), 2048).tolist()
    assert out.size / fastest_s > 20e6
