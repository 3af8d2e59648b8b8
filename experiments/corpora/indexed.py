"""Corpora over token files that other programs wrote, read where they lie.

`index_tokens` writes a corpus folder that holds only a manifest and the document index. It reads

- `megatron`: Megatron-LM `NAME.bin` + `NAME.idx`. The index is magic `MMIDIDX\\0\\0`, u64 version
  1, u8 dtype code, u64 sequences, u64 entries of the document list; then i32 tokens per sequence,
  i64 byte offset per sequence, i64 document list (first sequence of each document, and the end).
  Source: megatron/core/datasets/indexed_dataset.py.
- `dolma`: Dolma/OLMo `.npy`, raw tokens without a header in spite of the name, or a true NumPy
  file (versions 1 to 3, one dimension). Documents end with `eod`. Source: the OLMo-core guide on
  data loading.
- `nanogpt`: `.bin` of raw tokens (nanoGPT), or with llm.c's header of 256 int32: magic 20240520,
  version 1 (uint16; modded-nanoGPT) or 20240801, version 7 (uint32), token count. Documents end
  with `eod`, and may go on in the next file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError, suggest
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.storage import (
    ByteProgress,
    HashedFile,
    check_output,
    finish_manifest,
    hash_files,
    map_array,
    partial_folder,
    publish,
)
from motet.experiments.corpora.tokenizer import Tokenizer, token_dtype

SCAN_TOKENS = 1 << 24
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# Ids are never negative, so a signed file has the same bits as an unsigned one.
READABLE_DTYPES = {"uint16": "uint16", "int16": "uint16", "uint32": "uint32", "int32": "uint32"}
LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}


class TokenFile(NamedTuple):
    """Where the tokens lie in one foreign file."""

    path: Path
    dtype: str  # uint16 or uint32
    offset_bytes: int
    n_tokens: int
    document_starts: npt.NDArray[np.int64] | None  # None: found by looking for eod


def index_tokens(
    files: Sequence[str | Path],
    format: str,
    tokenizer: Tokenizer | str | Path | None,
    eod: int | None,
    out: str | Path,
    *,
    dtype: str | None = None,
    vocabulary_size: int | None = None,
    progress: ByteProgress | None = None,
) -> Corpus:
    """Make the corpus folder `out` over token files, in the given order, without copying them.

    `format` is a key of `FORMATS`. `eod` defaults to the tokenizer's; one of the two must be
    given. `dtype` ("uint16", "uint32") of files without a header defaults to the smallest that
    holds the vocabulary. Every file is read once, to hash it and to find documents. Files in the
    same parent folder as `out`, or below, are referred to by relative path.
    Raises `UserError` naming the file that is malformed or holds ids outside the vocabulary.
    """
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"format={format!r} is unknown{suggest(format, FORMATS)}; one of: {known}")
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    if eod is None:
        if tokenizer is None:
            raise UserError("eod is unknown: give the end-of-document id, or a tokenizer")
        eod = tokenizer.eod
    if tokenizer is not None:
        tokenizer = tokenizer.ending_with(eod)
        vocabulary_size = _at_least(tokenizer, vocabulary_size)
    raw_dtype = dtype or token_dtype(vocabulary_size or 0).name
    if raw_dtype not in READABLE_DTYPES.values():
        raise UserError(f"dtype={raw_dtype!r} cannot be read; uint16 or uint32 can")
    out = Path(out).resolve()
    check_output(out)
    parts = [FORMATS[format](Path(file).resolve(), raw_dtype) for file in files]
    _check_parts(parts)
    scan = _scan(parts, eod, vocabulary_size, files_end_documents=format != "nanogpt")
    return _write(parts, scan, tokenizer, eod, out, progress)


def _at_least(tokenizer: Tokenizer, vocabulary_size: int | None) -> int:
    """Return the size of the vocabulary: the tokenizer's, or the larger one that is given."""
    if vocabulary_size is not None and vocabulary_size < tokenizer.vocabulary_size:
        raise UserError(
            f"vocabulary_size={vocabulary_size:,} is smaller than the tokenizer's "
            f"{tokenizer.vocabulary_size:,}; leave it out, or raise it"
        )
    return vocabulary_size or tokenizer.vocabulary_size


def read_megatron(path: Path, _: str) -> TokenFile:
    """Read `NAME.idx`, given that, `NAME.bin` or `NAME`."""
    base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    idx, tokens = Path(f"{base}.idx"), Path(f"{base}.bin")
    content = _existing(idx).read_bytes()
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON_MAGIC):
        raise UserError(f"{idx} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, n_sequences, n_entries = MEGATRON_HEADER.unpack_from(content)
    dtype = MEGATRON_DTYPES.get(code, f"code {code}")
    if version != 1 or dtype not in READABLE_DTYPES:
        raise UserError(f"{idx} has version {version}, dtype {dtype}; can read 1, uint16 or int32")
    itemsize = np.dtype(dtype).itemsize
    at = MEGATRON_HEADER.size
    if len(content) < at + 12 * n_sequences + 8 * n_entries:
        raise UserError(f"{idx} is truncated: {len(content)} bytes for {n_sequences} sequences")
    lengths = np.frombuffer(content, "<i4", n_sequences, at).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", n_sequences, at + 4 * n_sequences)
    documents = np.frombuffer(content, "<i8", n_entries, at + 12 * n_sequences)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    if (pointers != borders[:-1] * itemsize).any():
        raise UserError(f"{idx} leaves gaps between sequences; cannot read that without copying")
    if (documents < 0).any() or (documents > n_sequences).any():
        raise UserError(f"{idx} is damaged: its document list points outside its sequences")
    n_tokens = int(borders[-1])
    _check_size(tokens, n_tokens * itemsize)
    starts = np.unique([0, *borders[documents]])  # an empty document has no position
    return TokenFile(tokens, READABLE_DTYPES[dtype], 0, n_tokens, starts[starts < n_tokens])


def read_dolma(path: Path, raw_dtype: str) -> TokenFile:
    """Read a `.npy` that is a true NumPy file, or raw tokens of `raw_dtype`."""
    with _existing(path).open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return _raw_file(path, raw_dtype)
        file.seek(0)
        try:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if major > 1:
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{path} is a damaged NumPy file: {error}") from error
        offset_bytes = file.tell()
    if len(shape) != 1 or dtype.name not in READABLE_DTYPES or dtype.byteorder == ">":
        raise UserError(f"{path} holds {dtype} of shape {shape}; needs uint16 or uint32 [N]")
    _check_size(path, offset_bytes + shape[0] * dtype.itemsize)
    return TokenFile(path, READABLE_DTYPES[dtype.name], offset_bytes, int(shape[0]), None)


def read_nanogpt(path: Path, raw_dtype: str) -> TokenFile:
    """Read a `.bin` with llm.c's header, or raw tokens of `raw_dtype`."""
    with _existing(path).open("rb") as file:
        head = file.read(LLMC_HEADER_BYTES)
    if len(head) < LLMC_HEADER_BYTES:
        return _raw_file(path, raw_dtype)
    magic, version, n_tokens = struct.unpack_from("<3i", head)
    if magic not in {known for known, _ in LLMC_DTYPES}:
        return _raw_file(path, raw_dtype)
    if (magic, version) not in LLMC_DTYPES:
        raise UserError(f"{path} has header version {version}, which is unknown for {magic}")
    dtype = LLMC_DTYPES[magic, version]
    _check_size(path, LLMC_HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize)
    return TokenFile(path, dtype, LLMC_HEADER_BYTES, n_tokens, None)


FORMATS: dict[str, Callable[[Path, str], TokenFile]] = {
    "megatron": read_megatron,
    "dolma": read_dolma,
    "nanogpt": read_nanogpt,
}


class Scan(NamedTuple):
    """What one pass over the tokens found."""

    document_starts: npt.NDArray[np.int64]
    eod_terminated: bool
    vocabulary_size: int


def _scan(
    parts: Sequence[TokenFile], eod: int, vocabulary_size: int | None, files_end_documents: bool
) -> Scan:
    """Find documents, check ids against the vocabulary, see whether eod ends every document.

    The last document of a corpus may lack its eod: it is still separated from the others.
    """
    starts, ends, largest, first = [], [], 0, 0
    after_eod = True
    for part in parts:
        tokens = map_array(part.path, np.dtype(part.dtype), part.n_tokens, part.offset_bytes)
        found, part_largest = _scan_file(tokens, eod, part, vocabulary_size)
        largest = max(largest, part_largest)
        own = part.document_starts
        if own is None:
            begins = after_eod or files_end_documents
            own = np.concatenate([[0] if begins else [], found + 1]).astype(np.int64)
            own = own[own < part.n_tokens]
        starts.append(own + first)
        ends.append(found + first)
        first += part.n_tokens
        after_eod = bool(tokens[-1] == eod)
    document_starts = np.concatenate(starts)
    separated = bool(np.isin(document_starts[1:] - 1, np.concatenate(ends)).all())
    terminated = separated and (len(document_starts) > 1 or after_eod)
    return Scan(document_starts, terminated, vocabulary_size or max(largest, eod) + 1)


def _scan_file(
    tokens: npt.NDArray[Any], eod: int, part: TokenFile, vocabulary_size: int | None
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the positions of `eod` and the largest id, reading in pieces."""
    ends, largest = [], 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        piece = tokens[start : start + SCAN_TOKENS]
        ends.append(np.flatnonzero(piece == eod) + start)
        largest = max(largest, int(piece.max()))
        if vocabulary_size is not None and largest >= vocabulary_size:
            position = start + int(piece.argmax())
            raise UserError(
                f"{part.path} holds id {largest} at token {position}, outside the vocabulary of "
                f"{vocabulary_size}: another tokenizer, or dtype is not {part.dtype}"
            )
    return np.concatenate(ends), largest


def _write(
    parts: Sequence[TokenFile],
    scan: Scan,
    tokenizer: Tokenizer | None,
    eod: int,
    out: Path,
    progress: ByteProgress | None,
) -> Corpus:
    """Hash the files, write index and manifest, publish the folder."""
    digests = hash_files([part.path for part in parts], progress)
    partial = partial_folder(out)
    partial.mkdir(parents=True, exist_ok=True)
    if any(partial.glob("tokens-*")):
        raise UserError(f"{partial} holds an unfinished preparation; delete it or name another out")
    starts = HashedFile(partial / "documents.starts")
    starts.write(scan.document_starts.astype("<u8").tobytes())
    content: dict[str, Any] = {
        "name": parts[0].path.stem,
        "dtype": parts[0].dtype,
        "eod": eod,
        "eod_token": tokenizer.eod_token if tokenizer else "",
        "eod_terminated": scan.eod_terminated,
        "vocabulary_size": scan.vocabulary_size,
        "n_tokens": sum(part.n_tokens for part in parts),
        "n_documents": len(scan.document_starts),
        "shards": [_shard(part, sha, out) for part, sha in zip(parts, digests, strict=True)],
        "documents": {"starts": starts.close(), "ids": None, "id_offsets": None},
        "tokenizer": None,
    }
    if tokenizer:
        file = tokenizer.save(partial)
        n_bytes = len(tokenizer.json_bytes)
        content["tokenizer"] = {"path": file.name, "n_bytes": n_bytes, "sha256": tokenizer.sha256}
    publish(partial, out, finish_manifest(content))
    return Corpus.open(out)


def _shard(part: TokenFile, sha256: str, out: Path) -> dict[str, Any]:
    """Return what the manifest of `out` says of one file."""
    return {
        "path": _reference(part.path, out),
        "n_bytes": part.path.stat().st_size,
        "sha256": sha256,
        "offset_bytes": part.offset_bytes,
        "n_tokens": part.n_tokens,
    }


def _check_parts(parts: Sequence[TokenFile]) -> None:
    """Raise `UserError` unless there are files, none is empty and all have one dtype."""
    if not parts:
        raise UserError("no token files are given")
    for part in parts:
        if not part.n_tokens:
            raise UserError(f"{part.path} holds no tokens")
        if part.dtype != parts[0].dtype:
            raise UserError(
                f"{part.path} holds {part.dtype}, {parts[0].path} {parts[0].dtype}; "
                "make one corpus of each and mix them by weight"
            )


def _raw_file(path: Path, dtype: str) -> TokenFile:
    """Return a file that is nothing but tokens."""
    n_bytes, itemsize = path.stat().st_size, np.dtype(dtype).itemsize
    if n_bytes % itemsize:
        raise UserError(f"{path} has {n_bytes} bytes, not a multiple of {itemsize} ({dtype})")
    return TokenFile(path, dtype, 0, n_bytes // itemsize, None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path


def _check_size(path: Path, n_bytes: int) -> None:
    size = _existing(path).stat().st_size
    if size < n_bytes:
        raise UserError(f"{path} is truncated: {size} bytes, its header promises {n_bytes}")


def _reference(path: Path, out: Path) -> str:
    """Return how the manifest in `out` names a token file: relative if they are neighbours."""
    if path.is_relative_to(out.parent):
        return str(Path("..") / path.relative_to(out.parent))
    return str(path)
