"""Foreign token files, written here by hand from the formats' descriptions, read in place."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.indexed import index_tokens
from motet.experiments.corpora.inspection import inspect_corpus, load_tokenizer
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
    with pytest.raises(UserError, match=r"eod=300 is no token of .*hf/tokenizer\.json"):
        index_tokens([file], "dolma", folder, 300, tmp_path / "d")
    with pytest.raises(UserError, match="vocabulary_size=100 is smaller than the tokenizer's 259"):
        index_tokens([file], "dolma", folder, 2, tmp_path / "d", vocabulary_size=100)


# Six documents; the end of document is 0.
TOY = [[5, 6, 7, 0], [8, 9, 0], [10, 11, 12, 13, 0], [14, 0], [15, 16, 0], [17, 18, 19, 0]]
BARE = [document[:-1] for document in TOY]


def raw_file(path: Path, ids: Sequence[int], kind: str = "<u2") -> Path:
    path.write_bytes(np.array(ids, kind).tobytes())
    return path


@pytest.mark.parametrize("format", ["dolma", "nanogpt", "megatron"])
@pytest.mark.parametrize("marks", ["end", "start", "both"])
def test_a_mark_belongs_to_its_text_wherever_it_stands(
    tmp_path: Path, marks: str, format: str
) -> None:
    documents = [[0] * (marks != "end") + text + [0] * (marks != "start") for text in BARE]
    flat = [token for document in documents for token in document]
    if format == "megatron":
        file = write_megatron(tmp_path / "x", documents, list(range(7)), 8)
    else:
        file = raw_file(tmp_path / "x.npy", flat)
    corpus = index_tokens([file], format, None, 0, tmp_path / "c", dtype="uint16")
    assert (corpus.eod_marks, corpus.n_documents, corpus.cautions) == (marks, 6, ())
    spans = [corpus.document_span(number) for number in range(6)]
    assert [corpus.read(a, b - a).tolist() for a, b in spans] == documents
    told = {"end": "every document ends with it", "start": "at the start", "both": "at both ends"}
    assert told[marks] in str(inspect_corpus(corpus))
    again = index_tokens([file], format, None, 0, tmp_path / "d", dtype="uint16", eod_marks="end")
    assert again.eod_marks == "end"
    assert (again.fingerprint == corpus.fingerprint) == (marks == "end")


def test_files_that_are_cut_anywhere_show_where_the_marks_stand(tmp_path: Path) -> None:
    both = [0 if token < 0 else token for text in BARE for token in (-1, *text, -1)]
    files = [raw_file(tmp_path / "0.bin", both[:9]), raw_file(tmp_path / "1.bin", both[9:])]
    corpus = index_tokens(files, "nanogpt", None, 0, tmp_path / "c", dtype="uint16")
    assert (corpus.eod_marks, corpus.n_documents) == ("both", 6)
    middle = raw_file(tmp_path / "middle.bin", both[2:-2])
    corpus = index_tokens([middle], "nanogpt", None, 0, tmp_path / "d", dtype="uint16")
    assert (corpus.eod_marks, corpus.n_documents) == ("both", 6)
    ends = [token for document in TOY for token in document]
    unclear = raw_file(tmp_path / "unclear.bin", ends[:-1])
    corpus = index_tokens([unclear], "nanogpt", None, 0, tmp_path / "e", dtype="uint16")
    assert (corpus.eod_marks, corpus.n_documents) == ("end", 6)
    assert "the last token is not the end-of-document id 0" in corpus.cautions[0]
    with pytest.raises(UserError, match=r"eod_marks='both', but .* at token 6 has no partner"):
        index_tokens(
            [unclear], "nanogpt", None, 0, tmp_path / "f", dtype="uint16", eod_marks="both"
        )
    with pytest.raises(UserError, match=r"eod_marks='ends' is unknown \(did you mean 'end'\?\)"):
        index_tokens([unclear], "nanogpt", None, 0, tmp_path / "f", eod_marks="ends")


def test_an_end_of_document_that_cannot_be_or_never_occurs_is_refused_or_told(
    tmp_path: Path,
) -> None:
    file = raw_file(tmp_path / "x.npy", [5, 1, 6, 7, 1])

    def refuses(eod: int, message: str, **more: Any) -> None:
        with pytest.raises(UserError, match=message):
            index_tokens([file], "dolma", more.pop("tokenizer", None), eod, tmp_path / "c", **more)

    refuses(-1, "eod=-1 is outside the vocabulary")
    refuses(9, "eod=9 is outside the vocabulary of 8", vocabulary_size=8)
    refuses(70_000, "eod=70000 is more than 65535, the largest id that uint16", dtype="uint16")
    refuses(70_000, r"cannot hold eod=70000; not uint32, as x.npy has 10 bytes")
    tokenizer = train_bpe(["text"], 258, reserved_tokens=["</s>"])
    refuses(2, r"eod=2 occurs nowhere .*1 \(</s>\).* 2 times; give eod=1", tokenizer=tokenizer)
    corpus = index_tokens([file], "dolma", None, 3, tmp_path / "c")
    assert corpus.n_documents == 1
    assert "id 3 occurs nowhere in the files: each file is one document" in corpus.cautions[0]
    assert corpus.cautions[0] in str(inspect_corpus(corpus))


WIDE = [70000, 70001, 100257, 70002, 100257]
LONG = [*list(range(2000, 2100)), 0]


@pytest.mark.parametrize(
    ("ids", "kind", "eod", "vocabulary_size", "dtype"),
    [
        (WIDE, "<u4", 100257, None, "uint32"),  # the id needs it
        (WIDE, "<u4", 70000, 100300, "uint32"),  # the vocabulary needs it
        ([5, 6, 0, 7, 8, 0], "<u4", 0, None, "uint32"),  # every second word is 0
        ([5, 6, 0, 7, 8, 0], "<u4", 0, 300, "uint32"),
        ([5, 6, 9, 7, 8, 9], "<u4", 9, None, "uint32"),
        ([5, 6, 0, 7, 8, 0], "<u2", 0, None, "uint16"),
        ([5, 6, 9, 7, 8, 9], "<u2", 9, 300, "uint16"),
        ([5, 6, 0], "<u2", 0, None, "uint16"),  # six bytes
        ([60000, 60001, 50256, 60002], "<u2", 50256, None, "uint16"),
        ([60000, 60001, 50256, 60002], "<u4", 50256, None, "uint32"),
        (LONG * 2, "<u2", 0, None, "uint16"),
        (LONG * 2, "<u4", 0, None, "uint32"),
        ([70000, *LONG * 2], "<u4", 0, None, "uint32"),
        ([70000, *LONG * 2], "<u4", 999, None, "uint32"),  # never occurs
        # 0 at every second place: documents of one token, or four-byte ids without their end
        ([5, 0, 6, 0], "<u2", 0, None, None),
        ([5, 6, 7, 8], "<u4", 0, None, None),
        ([5, 6, 0, 7], "<u8", 0, None, None),
        ([1, 2, 3, 4], "<u2", 9, None, None),
        (WIDE, "<u4", 0, 300, None),  # another tokenizer's
    ],
)
def test_the_type_of_a_file_without_header_is_found_or_asked_for(
    tmp_path: Path, ids: list[int], kind: str, eod: int, vocabulary_size: int | None, dtype: str
) -> None:
    file = raw_file(tmp_path / "x.npy", ids, kind)
    arguments = ([file], "dolma", None, eod, tmp_path / "c")
    if dtype is None:
        with pytest.raises(UserError, match="has no header, and its"):
            index_tokens(*arguments, vocabulary_size=vocabulary_size)
        return
    corpus = index_tokens(*arguments, vocabulary_size=vocabulary_size)
    assert corpus.dtype == np.dtype(dtype)
    assert corpus.read(0, corpus.n_tokens).tolist() == ids


def test_a_file_beside_one_without_header_tells_its_type(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "part.npy", [5, 0, 6, 0])  # could be either
    rows = b"0,2,a,s,1\n2,4,b,s,2\n"
    (tmp_path / "part.csv.gz").write_bytes(gzip.compress(rows))
    assert index_tokens([file], "dolma", None, 0, tmp_path / "c").n_tokens == 4
    (tmp_path / "part.csv.gz").write_bytes(gzip.compress(rows[:10]))
    assert index_tokens([file], "dolma", None, 6, tmp_path / "d").n_tokens == 2
    (tmp_path / "part.csv.gz").write_bytes(gzip.compress(rows.replace(b"2,4", b"2,5")))
    with pytest.raises(UserError, match=r"part.csv.gz counts 5 tokens, but .*part.npy has 8 bytes"):
        index_tokens([file], "dolma", None, 0, tmp_path / "e")
    (tmp_path / "part.csv.gz").unlink()
    (tmp_path / "part.json").write_text('{"dtype": "uint32"}')
    assert index_tokens([file], "dolma", None, 6, tmp_path / "f").n_tokens == 2
    said = index_tokens([file], "dolma", None, 0, tmp_path / "g", dtype="uint16")
    assert "every second id is 0" in said.cautions[0]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([0, 1, 2, 3], "ends at sequence 3, not at the 6 that there are"),
        ([0, 1, 2, 3, 4, 5, 7], "ends at sequence 7, not at the 6"),
        ([0, 2, 1, 3, 4, 5, 6], "falls from 2 to 1 at entry 2"),
        ([1, 2, 3, 4, 5, 6], "begins at sequence 1, not 0"),
        ([6, 5, 0], "begins at sequence 6"),
        ([], "has 0 entries"),
        ([0], "has 1 entries"),
    ],
)
def test_a_document_list_that_loses_or_joins_documents_is_refused(
    tmp_path: Path, documents: list[int], message: str
) -> None:
    base = write_megatron(tmp_path / "m", TOY, documents, 8)
    with pytest.raises(UserError, match=f"m.idx is damaged: its document list {message}"):
        index_tokens([base], "megatron", None, 0, tmp_path / "c")


def test_bin_and_idx_of_unlike_length_are_refused_and_empty_documents_told(tmp_path: Path) -> None:
    base = write_megatron(tmp_path / "m", TOY, [0, 1, 1, 2, 3, 4, 5, 6], 8)
    corpus = index_tokens([base], "megatron", None, 0, tmp_path / "c")
    assert corpus.n_documents == 6
    assert corpus.cautions == ("1 documents of the list hold no token and are left out",)
    tokens, idx = base.with_suffix(".bin"), base.with_suffix(".idx")
    whole = tokens.read_bytes(), idx.read_bytes()
    tokens.write_bytes(whole[0] + b"12")
    with pytest.raises(UserError, match=r"m.bin is longer .*: 44 bytes, m.idx promises 42"):
        index_tokens([base], "megatron", None, 0, tmp_path / "d")
    tokens.write_bytes(whole[0])
    idx.write_bytes(whole[1] + bytes(6))
    with pytest.raises(UserError, match=r"m.idx is longer than it says"):
        index_tokens([base], "megatron", None, 0, tmp_path / "d")
    np.save(tmp_path / "x.npy", np.array([5, 0], np.uint16))
    with (tmp_path / "x.npy").open("ab") as file:
        file.write(b"12")
    with pytest.raises(UserError, match=r"x.npy is longer"):
        index_tokens([tmp_path / "x.npy"], "dolma", None, 0, tmp_path / "d")


def test_malformed_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    def refuses(file: Path, format: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            index_tokens([file], format, None, EOD, tmp_path / "c")

    base = write_megatron(tmp_path / "m", DOCUMENTS, [0, 1, 2, 3], 8)
    idx, tokens = base.with_suffix(".idx"), base.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    refuses(base, "megatron", r"m.bin is truncated: 20 bytes, m.idx promises 22")
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


@pytest.mark.parametrize("format", ["dolma", "megatron"])
def test_an_id_below_zero_is_no_token(tmp_path: Path, format: str) -> None:
    """Files of signed ids have the bits of unsigned ones, and -100 marks what has no loss."""
    path = tmp_path / "a.npy"
    np.save(path, np.array([5, -100, EOD], np.int32))
    if format == "megatron":
        path = write_megatron(tmp_path / "m", [[5, -100, EOD]], [0, 1], 4)
    with pytest.raises(UserError, match=r"holds id 4294967196 at token 1, which is -100 where"):
        index_tokens([path], format, None, EOD, tmp_path / "c")


def test_a_file_that_is_given_twice_is_told(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.npy", FLAT)
    corpus = index_tokens([path, path], "dolma", None, EOD, tmp_path / "c", dtype="uint16")
    assert list(corpus.cautions) == [f"{path} is read 2 times"]
