"""Foreign token files, written here by hand from the formats' descriptions, read in place."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.indexed import index_tokens
from motet.experiments.corpora.inspection import load_tokenizer
from motet.experiments.corpora.tokenizer import train_bpe

EOD = 0
DOCUMENTS = [[5, 6, 7, EOD], [8, EOD], [9, 10, 11, 12, EOD]]
FLAT = [token for document in DOCUMENTS for token in document]
STARTS = [0, 4, 6]


def write_megatron(base: Path, sequences: list[list[int]], documents: list[int], code: int) -> Path:
    """`documents` lists the first sequence of each document, and the number of sequences."""
    kind, size = {8: ("H", 2), 4: ("i", 4), 5: ("q", 8)}[code]
    flat = [token for sequence in sequences for token in sequence]
    base.with_suffix(".bin").write_bytes(struct.pack(f"<{len(flat)}{kind}", *flat))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents))
    at = 0
    pointers = b""
    for sequence in sequences:
        index += struct.pack("<i", len(sequence))
        pointers += struct.pack("<q", at)
        at += len(sequence) * size
    index += pointers + struct.pack(f"<{len(documents)}q", *documents)
    base.with_suffix(".idx").write_bytes(index)
    return base


def check(corpus: Corpus) -> None:
    assert corpus.read(0, corpus.n_tokens).tolist() == FLAT
    assert corpus.document_starts(0, corpus.n_tokens).tolist() == STARTS
    assert corpus.n_documents == len(DOCUMENTS)
    assert corpus.eod_terminated
    assert corpus.verify() == []


@pytest.mark.parametrize(("code", "dtype"), [(8, "uint16"), (4, "uint32")])
def test_megatron_files_are_read_with_their_documents(
    tmp_path: Path, code: int, dtype: str
) -> None:
    sequences = [DOCUMENTS[0][:2], DOCUMENTS[0][2:], DOCUMENTS[1], [], DOCUMENTS[2]]
    base = write_megatron(tmp_path / "text_document", sequences, [0, 2, 3, 4, 5], code)
    corpus = index_tokens([base], "megatron", None, EOD, tmp_path / "c")
    check(corpus)
    assert corpus.dtype == np.dtype(dtype)
    assert corpus.document_id(1) == "text_document:1"
    assert corpus.vocabulary_size == 13


def test_megatron_documents_without_eod_are_known_but_not_terminated(tmp_path: Path) -> None:
    base = write_megatron(tmp_path / "data", [[5, 6], [7, 8, 9]], [0, 1, 2], 8)
    corpus = index_tokens([base], "megatron", None, EOD, tmp_path / "c")
    assert not corpus.eod_terminated
    assert corpus.document_span(1) == (2, 5)


def test_the_bin_and_the_idx_name_the_same_megatron_data(tmp_path: Path) -> None:
    base = write_megatron(tmp_path / "data.v1_doc", DOCUMENTS, [0, 1, 2, 3], 8)
    for suffix in (".bin", ".idx"):
        file = base.with_suffix(suffix)
        check(index_tokens([file], "megatron", None, EOD, tmp_path / f"c{suffix}"))


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i4"])
@pytest.mark.parametrize("header", [True, False])
def test_dolma_files_are_read_raw_and_as_true_numpy_files(
    tmp_path: Path, kind: str, header: bool
) -> None:
    file = tmp_path / "part-0.npy"
    tokens = np.array(FLAT, kind)
    if header:
        np.save(file, tokens)
    else:
        file.write_bytes(tokens.tobytes())
    dtype = "uint16" if kind == "<u2" else "uint32"
    corpus = index_tokens([file], "dolma", None, EOD, tmp_path / "c", dtype=dtype)
    check(corpus)
    assert corpus.dtype == np.dtype(dtype)


def test_dolma_documents_end_with_their_file(tmp_path: Path) -> None:
    files = []
    for name, tokens in (("a", [5, EOD, 6, 7]), ("b", [8, EOD])):
        files.append(tmp_path / f"{name}.npy")
        files[-1].write_bytes(np.array(tokens, "<u2").tobytes())
    corpus = index_tokens(files, "dolma", None, EOD, tmp_path / "c")
    assert corpus.document_starts(0, 6).tolist() == [0, 2, 4]
    assert not corpus.eod_terminated


def test_nanogpt_files_are_read_raw_and_with_header(tmp_path: Path) -> None:
    raw, headed = tmp_path / "raw.bin", tmp_path / "headed.bin"
    raw.write_bytes(struct.pack(f"<{len(FLAT)}H", *FLAT))
    header = struct.pack("<3i", 20240520, 1, len(FLAT)) + bytes(253 * 4)
    headed.write_bytes(header + raw.read_bytes())
    for file in (raw, headed):
        check(index_tokens([file], "nanogpt", None, EOD, tmp_path / f"c-{file.stem}"))
    wide = tmp_path / "wide.bin"
    header = struct.pack("<3i", 20240801, 7, len(FLAT)) + bytes(253 * 4)
    wide.write_bytes(header + struct.pack(f"<{len(FLAT)}I", *FLAT))
    check(index_tokens([wide], "nanogpt", None, EOD, tmp_path / "c-wide"))


def test_a_nanogpt_document_goes_on_in_the_next_file(tmp_path: Path) -> None:
    files = [tmp_path / "0.bin", tmp_path / "1.bin"]
    for file, part in zip(files, (FLAT[:8], FLAT[8:]), strict=True):
        file.write_bytes(np.array(part, "<u2").tobytes())
    check(index_tokens(files, "nanogpt", None, EOD, tmp_path / "c"))


def test_nothing_is_copied_and_neighbours_are_referred_to_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "big.npy"
    tokens = np.full(1_000_000, 7, "<u2")
    tokens[::1000] = EOD
    file.write_bytes(tokens.tobytes())
    corpus = index_tokens([file], "dolma", None, EOD, tmp_path / "here" / "c")
    assert sum(path.stat().st_size for path in corpus.path.iterdir()) < 20_000
    assert not corpus.read(500, 2048).flags.owndata
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Corpus.open(tmp_path / "there" / "c")
    assert moved.verify() == []
    assert moved.fingerprint == corpus.fingerprint
    (tmp_path / "there" / "big.npy").write_bytes(tokens.tobytes()[:-2])
    with pytest.raises(UserError, match=r"big.npy: truncated"):
        Corpus.open(tmp_path / "there" / "c")


def test_the_tokenizer_goes_along_and_bounds_the_ids(tmp_path: Path) -> None:
    tokenizer = train_bpe(["text"], 257)
    file = tmp_path / "part.npy"
    file.write_bytes(np.array(FLAT, "<u2").tobytes())
    corpus = index_tokens([file], "dolma", tokenizer, None, tmp_path / "c")
    check(corpus)
    assert corpus.vocabulary_size == 257
    assert corpus.tokenizer_path is not None
    assert corpus.tokenizer_path.read_bytes() == tokenizer.json_bytes
    file.write_bytes(np.array([5, EOD, 300], "<u2").tobytes())
    with pytest.raises(UserError, match=r"part.npy holds id 300 at token 2, outside .* of 257"):
        index_tokens([file], "dolma", tokenizer, None, tmp_path / "d")


def test_the_corpus_says_which_token_ends_documents_whatever_the_tokenizer_says(
    tmp_path: Path,
) -> None:
    tokenizer = train_bpe(["text"], 259, reserved_tokens=["</s>", "<|doc_end|>"])
    folder = tmp_path / "hf"
    tokenizer.ending_with(1).save(folder)
    file = tmp_path / "part.npy"
    file.write_bytes(np.array([5, 6, 2, 7, 2], "<u2").tobytes())
    corpus = index_tokens([file], "dolma", folder, 2, tmp_path / "c")
    assert (corpus.eod, corpus.eod_token, corpus.n_documents) == (2, "<|doc_end|>", 2)
    ours = load_tokenizer(corpus)
    assert ours is not None
    assert (ours.eod, 2 in ours.encode("a<|doc_end|>")) == (2, False)
    named = json.loads((corpus.path / "tokenizer_config.json").read_text())
    assert named["eos_token"] == "<|doc_end|>"  # what an export reads
    with pytest.raises(UserError, match="eod=300 is no token of .*hf/tokenizer.json"):
        index_tokens([file], "dolma", folder, 300, tmp_path / "d")
    with pytest.raises(UserError, match="vocabulary_size=100 is smaller than the tokenizer's 259"):
        index_tokens([file], "dolma", folder, 2, tmp_path / "d", vocabulary_size=100)


def test_malformed_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    def refuses(file: Path, format: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            index_tokens([file], format, None, EOD, tmp_path / "c")

    base = write_megatron(tmp_path / "m", DOCUMENTS, [0, 1, 2, 3], 8)
    idx, tokens = base.with_suffix(".idx"), base.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    refuses(base, "megatron", r"m.bin is truncated: 20 bytes, its header promises 22")
    tokens.unlink()
    refuses(base, "megatron", r"m.bin does not exist")
    idx.write_bytes(idx.read_bytes()[:-8])
    refuses(base, "megatron", r"m.idx is truncated")
    idx.write_bytes(b"something else")
    refuses(base, "megatron", r"m.idx is not a Megatron index")
    refuses(write_megatron(tmp_path / "q", DOCUMENTS, [0, 3], 5), "megatron", "dtype int64")
    odd = tmp_path / "odd.npy"
    odd.write_bytes(b"123")
    refuses(odd, "dolma", r"odd.npy has 3 bytes, not a multiple of 2")
    np.save(odd, np.zeros((2, 2), np.uint16))
    refuses(odd, "dolma", r"odd.npy holds uint16 of shape \(2, 2\)")
    short = tmp_path / "short.bin"
    short.write_bytes(struct.pack("<3i", 20240520, 1, 9) + bytes(253 * 4 + 4))
    refuses(short, "nanogpt", r"short.bin is truncated")
    short.write_bytes(struct.pack("<3i", 20240520, 2, 9) + bytes(253 * 4 + 18))
    refuses(short, "nanogpt", "header version 2")
    short.write_bytes(b"")
    refuses(short, "nanogpt", r"short.bin holds no tokens")
    refuses(short, "nanogtp", r"did you mean 'nanogpt'")


def test_files_of_two_token_sizes_do_not_make_one_corpus(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(FLAT, np.uint16))
    np.save(tmp_path / "b.npy", np.array(FLAT, np.uint32))
    with pytest.raises(UserError, match=r"b.npy holds uint32, .*a.npy uint16"):
        index_tokens([tmp_path / "a.npy", tmp_path / "b.npy"], "dolma", None, EOD, tmp_path / "c")
