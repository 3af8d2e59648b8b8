"""Corpora over token files that other programs wrote, read where they lie.

`index_tokens` writes a corpus folder that holds only a manifest and the document index. The formats
are those of `token_files.py`. Documents of `megatron` are those of its index; those of `dolma` are
marked by `eod` and end with their file; those of `nanogpt` are marked by `eod` and may go on in the
next file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError, suggest
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.eod_marks import (
    END,
    MarkedTokens,
    check_marks,
    marks_of,
    marks_of_documents,
)
from motet.experiments.corpora.raw_dtype import raw_dtype
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
from motet.experiments.corpora.token_files import FORMATS, TokenFile
from motet.experiments.corpora.tokenizer import COMMON_EOD_TOKENS, Tokenizer

I64 = npt.NDArray[np.int64]
SCAN_TOKENS = 1 << 24


def index_tokens(
    files: Sequence[str | Path],
    format: str,
    tokenizer: Tokenizer | str | Path | None,
    eod: int | None,
    out: str | Path,
    *,
    dtype: str | None = None,
    vocabulary_size: int | None = None,
    eod_marks: str | None = None,
    progress: ByteProgress | None = None,
) -> Corpus:
    """Make the corpus folder `out` over token files, in the given order, without copying them.

    `format` is a key of `FORMATS`. `eod` defaults to the tokenizer's; one of the two must be
    given. `dtype` ("uint16", "uint32") of files without a header is found as `raw_dtype.py` says.
    `eod_marks` says where `eod` stands in each document: "end", "start" or "both"; None looks.
    Every file is read once, to hash it and to find documents. Files in the same parent folder as
    `out`, or below, are referred to by relative path. What seems odd is in the corpus's `cautions`.
    Raises `UserError` naming the file that is malformed or holds ids outside the vocabulary.
    """
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"format={format!r} is unknown{suggest(format, FORMATS)}; one of: {known}")
    check_marks(eod_marks, [])
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    if eod is None:
        if tokenizer is None:
            raise UserError(
                "the end-of-document id is unknown: give it as eod=ID, or give a tokenizer"
            )
        eod = tokenizer.eod
    usual = _usual_ends(tokenizer)
    if tokenizer is not None:
        tokenizer = tokenizer.ending_with(eod)
        vocabulary_size = _at_least(tokenizer, vocabulary_size)
    if eod < 0 or (vocabulary_size is not None and eod >= vocabulary_size):
        raise UserError(
            f"eod={eod} is outside the vocabulary of {vocabulary_size or 'any tokenizer'}"
        )
    out = Path(out).resolve()
    check_output(out)
    parts = [FORMATS[format](Path(file).resolve()) for file in files]
    headless = [part.path for part in parts if not part.dtype]
    cautions: list[str] = []
    if headless:
        raw, cautions = raw_dtype(headless, eod, vocabulary_size, dtype)
        parts = [part.of_dtype(raw) for part in parts]
    _check_parts(parts, eod)
    ends, largest = _scan_files(parts, eod, vocabulary_size)
    scan = _documents(parts, ends, eod, eod_marks, joined=format == "nanogpt")
    cautions += _cautions(parts, scan, eod, usual, format)
    found = _Found(scan, vocabulary_size or max(largest, eod) + 1, cautions)
    return _write(parts, found, tokenizer, eod, out, progress)


def _at_least(tokenizer: Tokenizer, vocabulary_size: int | None) -> int:
    """Return the size of the vocabulary: the tokenizer's, or the larger one that is given."""
    if vocabulary_size is not None and vocabulary_size < tokenizer.vocabulary_size:
        raise UserError(
            f"vocabulary_size={vocabulary_size:,} is smaller than the tokenizer's "
            f"{tokenizer.vocabulary_size:,}; leave it out, or raise it"
        )
    return vocabulary_size or tokenizer.vocabulary_size


def _usual_ends(tokenizer: Tokenizer | None) -> dict[int, str]:
    """Return the tokens that usually end documents, by id, the tokenizer's own first."""
    if tokenizer is None:
        return {}
    usual = {tokenizer.eod: tokenizer.eod_token}
    for token in COMMON_EOD_TOKENS:
        number = tokenizer.id_of(token)
        if number is not None:
            usual[number] = token
    return usual


class Scan(NamedTuple):
    """The documents of a corpus."""

    starts: I64
    eod_terminated: bool  # every one ends with eod
    eod_marks: str
    n_ends: int  # times that eod occurs
    last_ends: bool  # whether it is the last token
    guessed: bool  # whether eod_marks is what is usual, for want of a sign


class _Found(NamedTuple):
    """What one pass over the tokens found."""

    scan: Scan
    vocabulary_size: int
    cautions: list[str]


def _documents(
    parts: Sequence[TokenFile], ends: Sequence[I64], eod: int, eod_marks: str | None, joined: bool
) -> Scan:
    """Find where documents begin, and where their marks stand.

    The last document of a corpus may lack its eod: it is still separated from the others.

    Args:
        parts: the files.
        ends: positions of `eod` in each.
        eod: the end-of-document token.
        eod_marks: where it stands; None looks.
        joined: whether documents go on in the next file.
    """
    sizes = [part.n_tokens for part in parts]
    firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    placed = np.concatenate([own + first for own, first in zip(ends, firsts, strict=False)])
    if parts[0].document_starts is not None:
        own = [part.document_starts for part in parts if part.document_starts is not None]
        starts = np.concatenate([a + b for a, b in zip(own, firsts, strict=False)])
        found = _marks_at(starts, placed, int(firsts[-1]))
    else:
        segments = [MarkedTokens(0, int(firsts[-1]), placed)]
        if not joined:
            segments = [
                MarkedTokens(int(first), size, own)
                for first, size, own in zip(firsts, sizes, ends, strict=False)
            ]
        check_marks(eod_marks, segments)
        found = eod_marks or marks_of(segments)
        starts = np.concatenate([segment.starts(found) for segment in segments])
    last = np.append(starts[1:], firsts[-1]) - 1
    marked = np.isin(last, placed)
    terminated = bool(marked[:-1].all()) and (len(starts) > 1 or bool(marked[-1]))
    guessed = eod_marks is None and found == END and parts[0].document_starts is None
    return Scan(starts, terminated, eod_marks or found, len(placed), bool(marked[-1]), guessed)


def _marks_at(starts: I64, placed: I64, n_tokens: int) -> str:
    """Return where the marks at positions `placed` stand in documents that are known."""
    stops = np.append(starts[1:], n_tokens)
    long = stops - starts > 1
    return marks_of_documents(np.isin(starts[long], placed), np.isin(stops[long] - 1, placed))


def _cautions(
    parts: Sequence[TokenFile], scan: Scan, eod: int, usual: dict[int, str], format: str
) -> list[str]:
    """Return what seems odd; raise `UserError` where another id ends the documents."""
    told = []
    if not scan.n_ends:
        for number, token in usual.items():
            count = sum(_count(part, number) for part in parts)
            if number != eod and count:
                raise UserError(
                    f"eod={eod} occurs nowhere in the files, but {number} ({token}), which usually "
                    f"ends documents, does so {count:,} times; give eod={number}"
                )
        among = (
            "its documents are not marked"
            if format == "megatron"
            else ("each file is one document" if format == "dolma" else "all is one document")
        )
        told.append(f"the end-of-document id {eod} occurs nowhere in the files: {among}")
    elif scan.guessed and not scan.last_ends:
        told.append(
            f"the last token is not the end-of-document id {eod}, which is taken to stand at the "
            "end of each document; else say so with eod_marks"
        )
    empty = sum(part.n_empty for part in parts)
    if empty:
        told.append(f"{empty:,} documents of the list hold no token and are left out")
    names = [part.path.resolve() for part in parts]
    told += [f"{path} is read {count} times" for path, count in Counter(names).items() if count > 1]
    return told


def _count(part: TokenFile, token: int) -> int:
    """Return how often an id occurs in a file."""
    tokens = map_array(part.path, np.dtype(part.dtype), part.n_tokens, part.offset_bytes)
    pieces = range(0, len(tokens), SCAN_TOKENS)
    return sum(int((tokens[at : at + SCAN_TOKENS] == token).sum()) for at in pieces)


def _scan_files(
    parts: Sequence[TokenFile], eod: int, vocabulary_size: int | None
) -> tuple[list[I64], int]:
    """Return the positions of `eod` in each file and the largest id of all."""
    ends, largest = [], 0
    for part in parts:
        tokens = map_array(part.path, np.dtype(part.dtype), part.n_tokens, part.offset_bytes)
        found, part_largest = _scan_file(tokens, eod, part, vocabulary_size)
        ends.append(found)
        largest = max(largest, part_largest)
    return ends, largest


def _scan_file(
    tokens: npt.NDArray[Any], eod: int, part: TokenFile, vocabulary_size: int | None
) -> tuple[I64, int]:
    """Return the positions of `eod` and the largest id, reading in pieces."""
    ends, largest = [], 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        piece = tokens[start : start + SCAN_TOKENS]
        ends.append(np.flatnonzero(piece == eod) + start)
        largest = max(largest, int(piece.max()))
        if largest > np.iinfo(np.int32).max:
            position, signed = start + int(piece.argmax()), largest - (1 << 32)
            raise UserError(
                f"{part.path} holds id {largest} at token {position}, which is {signed} where ids "
                "are signed: padding or a mask and no token, or its type is another"
            )
        if vocabulary_size is not None and largest >= vocabulary_size:
            position = start + int(piece.argmax())
            raise UserError(
                f"{part.path} holds id {largest} at token {position}, outside the vocabulary of "
                f"{vocabulary_size}: another tokenizer, or dtype is not {part.dtype}"
            )
    return np.concatenate(ends), largest


def _write(
    parts: Sequence[TokenFile],
    found: _Found,
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
    scan = found.scan
    starts = HashedFile(partial / "documents.starts")
    starts.write(scan.starts.astype("<u8").tobytes())
    content: dict[str, Any] = {
        "name": parts[0].path.stem,
        "dtype": parts[0].dtype,
        "eod": eod,
        "eod_token": tokenizer.eod_token if tokenizer else "",
        "eod_terminated": scan.eod_terminated,
        "eod_marks": scan.eod_marks,
        "vocabulary_size": found.vocabulary_size,
        "cautions": found.cautions,
        "n_tokens": sum(part.n_tokens for part in parts),
        "n_documents": len(scan.starts),
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


def _check_parts(parts: Sequence[TokenFile], eod: int) -> None:
    """Raise `UserError` unless there are files, none is empty, all have one dtype, and it holds
    `eod`.
    """
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
    most = int(np.iinfo(parts[0].dtype).max)
    if eod > most:
        raise UserError(
            f"eod={eod} is more than {most}, the largest id that {parts[0].dtype} of "
            f"{parts[0].path} holds"
        )


def _reference(path: Path, out: Path) -> str:
    """Return how the manifest in `out` names a token file: relative if they are neighbours."""
    if path.is_relative_to(out.parent):
        return str(Path("..") / path.relative_to(out.parent))
    return str(path)
