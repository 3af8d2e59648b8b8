"""A corpus: tokenized documents in memory-mapped shards, and the index of where each begins.

A corpus is a folder with a manifest, `corpus.json`, that lists

- token shards: raw little-endian uint16 or uint32, in the folder or elsewhere (foreign token
  files with a header are read where they lie, from `offset_bytes`);
- `documents.starts`: uint64, the position in tokens at which each document begins;
- `documents.ids`: one JSON string a line, with `documents.id_offsets` (uint64 byte offsets, one
  more than documents); without them a document is called `NAME:ordinal`;
- `tokenizer.json`, if known;
- the size in bytes and the SHA-256 of all of these, and of what else lay in the folder when it was
  made (`beside`: `prepare.json`, `tokenizer_config.json`);
- its own SHA-256.

Positions count tokens from the beginning of the first shard. Every document's tokens are followed
by the end-of-document token `eod`, which belongs to the document, when `eod_terminated`;
`eod_marks` says where it stands ("end", "start", "both"; see `eod_marks.py`). `cautions` is what
seemed odd when the corpus was made.
"""

from __future__ import annotations

import json
import mmap
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.parsing import parse_json
from motet.experiments.corpora.eod_marks import END
from motet.experiments.corpora.storage import (
    BESIDE,
    READ_WITH,
    ByteProgress,
    CorpusFile,
    HashedFile,
    Tokens,
    altered,
    check_output,
    entries_of,
    finish_manifest,
    map_array,
    map_bytes,
    partial_folder,
    publish,
    read_manifest,
    size_problem,
)
from motet.experiments.corpora.tokenizer import Tokenizer, token_dtype

SHARD_TOKENS = 1 << 26


class Corpus:
    """Random access to the tokens and documents of one corpus folder.

    Open it with `Corpus.open`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.n_tokens: int = manifest["n_tokens"]
        self.n_documents: int = manifest["n_documents"]
        self.eod: int = manifest["eod"]
        self.eod_token: str = manifest["eod_token"]
        self.eod_terminated: bool = manifest["eod_terminated"]
        self.eod_marks: str = manifest.get("eod_marks", END)
        self.cautions: tuple[str, ...] = tuple(manifest.get("cautions", ()))
        self.vocabulary_size: int = manifest["vocabulary_size"]
        self.dtype: np.dtype[Any] = np.dtype(manifest["dtype"]).newbyteorder("<")
        tokenizer = manifest["tokenizer"]
        self.tokenizer_path: Path | None = path / tokenizer["path"] if tokenizer else None
        lengths = [shard["n_tokens"] for shard in manifest["shards"]]
        self._borders: list[int] = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self._shards: list[Tokens | None] = [None] * len(lengths)

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a corpus folder: read its manifest and check the sizes of its files, nothing more.

        Raises `UserError` that names the folder or the missing or truncated file.
        """
        corpus = cls(Path(path), read_manifest(Path(path)))
        needed = corpus._files(entries_of(corpus.manifest))
        problems = [problem for file in needed if (problem := size_problem(file))]
        if problems:
            raise UserError("\n".join(str(problem) for problem in problems))
        return corpus

    def read(self, start: int, length: int) -> Tokens:
        """Return tokens [start, start + length), across shard borders.

        A read-only view of the mapped file inside one shard; a copy where it crosses a border.
        """
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {start + length}) of {self.n_tokens}")
        shard = min(bisect_right(self._borders, start), len(self._shards)) - 1
        if start + length <= self._borders[shard + 1]:
            first = start - self._borders[shard]
            return self._shard(shard)[first : first + length]
        pieces = []
        while length:
            piece = self._shard(shard)[start - self._borders[shard] :][:length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return np.concatenate(pieces)

    def read_many(
        self, starts: npt.NDArray[np.int64], length: int, out: npt.NDArray[np.int32]
    ) -> None:
        """Fill `out[i]` with tokens [starts[i], starts[i] + length); `out` is int32 [N, length].

        The only copy made of a token is the one into `out`.
        """
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self.read(start, length)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the positions in [start, stop) at which a document begins, ascending."""
        low, high = np.searchsorted(self._starts, np.array([start, stop], np.uint64))
        return self._starts[low:high].astype(np.int64)

    def document_at(self, position: int) -> int:
        """Return the ordinal of the document that holds the token at `position`."""
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"token {position} of {self.n_tokens}")
        return int(np.searchsorted(self._starts, np.uint64(position), side="right")) - 1

    def place_of(self, position: int) -> tuple[int, int]:
        """Return (ordinal of its document, token of the document) of a token."""
        document = self.document_at(position)
        return document, position - int(self._starts[document])

    def documents_between(self, start: int, stop: int) -> list[int]:
        """Return the ordinals of the documents that hold the tokens [start, stop)."""
        return list(range(self.document_at(start), self.document_at(stop - 1) + 1))

    def document_span(self, document: int) -> tuple[int, int]:
        """Return (start, stop) of a document in tokens; its end-of-document token is inside."""
        self._check_document(document)
        last = document + 1 == self.n_documents
        stop = self.n_tokens if last else int(self._starts[document + 1])
        return int(self._starts[document]), stop

    def document_id(self, document: int) -> str:
        """Return the id that the document had in its source, in O(1)."""
        self._check_document(document)
        if self._ids is None:
            return f"{self.manifest['name']}:{document}"
        text, offsets = self._ids
        return str(parse_json(text[int(offsets[document]) : int(offsets[document + 1])]))

    def files(self) -> list[CorpusFile]:
        """Return every file that the manifest has a hash of, shards first, with absolute paths. Of
        those of which no token needs any (`beside`), the ones that are there still, and those that
        are read with the tokenizer.
        """
        beside = self._files(self.manifest.get(BESIDE, []))
        left = [one for one in beside if one.path.exists() or one.path.name in READ_WITH]
        return [*self._files(entries_of(self.manifest)), *left]

    @property
    def vouched(self) -> bool:
        """Whether there is a hash of the manifest, and of what lies beside the tokens."""
        return BESIDE in self.manifest

    def _files(self, entries: Sequence[Mapping[str, Any]]) -> list[CorpusFile]:
        return [
            CorpusFile(self.path / one["path"], one["n_bytes"], one["sha256"]) for one in entries
        ]

    def verify(self, progress: ByteProgress | None = None, known: bool = False) -> list[Problem]:
        """Hash every file, several at once; return a problem for each missing, truncated or
        altered.

        Args:
            progress: called with (bytes hashed, bytes in all), from several threads.
            known: a file whose place, size and times are as when it was hashed last is not
                hashed again.
        """
        return [*altered(self.files(), progress, known), *self._strangers()]

    def check_tokenizer(self) -> None:
        """Compare the tokenizer, and what is read beside it, with their hashes.

        Raises:
            UserError: one of them is not what the corpus was made with.
        """
        with_it = (self.tokenizer_path, *(self.path / name for name in READ_WITH))
        mine = [file for file in self.files() if file.path in with_it]
        raise_problems([*altered(mine, known=True), *self._strangers()])

    def _strangers(self) -> list[Problem]:
        """Return a problem for each file that would be read with the tokenizer and was not there
        when the corpus was made.
        """
        known = {file.path for file in self.files()}
        there = [self.path / name for name in READ_WITH] if self.vouched else []
        return [
            Problem(str(path), "was not there when the corpus was made; take it away")
            for path in there
            if path.exists() and path not in known
        ]

    def _check_document(self, document: int) -> None:
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")

    def _shard(self, shard: int) -> Tokens:
        """Map a shard when it is first read."""
        mapped = self._shards[shard]
        if mapped is None:
            entry = self.manifest["shards"][shard]
            mapped = map_array(
                self.path / entry["path"], self.dtype, entry["n_tokens"], entry["offset_bytes"]
            )
            self._shards[shard] = mapped
        return mapped

    @cached_property
    def _starts(self) -> npt.NDArray[np.uint64]:
        entry = self.manifest["documents"]["starts"]
        return map_array(self.path / entry["path"], np.dtype("<u8"), self.n_documents)

    @cached_property
    def _ids(self) -> tuple[mmap.mmap, npt.NDArray[np.uint64]] | None:
        documents = self.manifest["documents"]
        if documents["ids"] is None:
            return None
        offsets_path = self.path / documents["id_offsets"]["path"]
        offsets = map_array(offsets_path, np.dtype("<u8"), self.n_documents + 1)
        return map_bytes(self.path / documents["ids"]["path"]), offsets


class CorpusWriter:
    """Writes a corpus folder, which appears under its name complete or not at all.

    Documents are appended to `PATH.partial`; `close` publishes that by one rename. A shard is cut
    after exactly `shard_tokens` tokens, wherever documents end, so the bytes depend on the
    documents and `shard_tokens` alone. `checkpoint` returns what `resume` needs to go on from
    there after a kill. Use as a context manager to close on success.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        shard_tokens: int = SHARD_TOKENS,
        resume: dict[str, Any] | None = None,
    ):
        """Begin a corpus at `path`, or continue from `resume`, a value that `checkpoint` returned.

        Raises `UserError` if something is at `path`, or the unfinished files lost data.
        """
        self.path = Path(path)
        check_output(self.path)
        self.partial = partial_folder(self.path)
        self.partial.mkdir(parents=True, exist_ok=True)
        self.shard_tokens = shard_tokens
        self.tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        state = resume or {"shards": [], "n_documents": 0, "n_bytes": {}}
        self._shards: list[dict[str, Any]] = list(state["shards"])
        self.n_documents: int = state["n_documents"]
        kept = {shard["path"] for shard in self._shards} | {self._shard_name()}
        for file in self.partial.glob("tokens-*.bin"):
            if file.name not in kept:
                file.unlink()
        self._n_bytes: dict[str, int] = state["n_bytes"]
        self._tokens = self._open_file(self._shard_name())
        self._starts = self._open_file("documents.starts")
        self._ids = self._open_file("documents.ids")
        self._id_offsets = self._open_file("documents.id_offsets")
        if not self._id_offsets.n_bytes:
            self._id_offsets.write(np.zeros(1, "<u8").tobytes())

    @property
    def n_tokens(self) -> int:
        """Tokens appended so far."""
        finished = sum(shard["n_tokens"] for shard in self._shards)
        return finished + self._tokens.n_bytes // self._dtype.itemsize

    def append(self, tokens: Sequence[int] | Tokens, document_id: str) -> None:
        """Append one document; the end-of-document token is added here."""
        ended = np.append(np.asarray(tokens, np.int64), self.tokenizer.eod)
        self.append_many(ended.astype(self._dtype), np.array([len(ended)]), [document_id])

    def append_many(
        self, tokens: Tokens, lengths: npt.NDArray[np.int64], document_ids: Sequence[str]
    ) -> None:
        """Append documents [N]: their tokens end to end, each with its end-of-document token.

        `lengths` [N] counts that token too.
        """
        starts = self.n_tokens + np.cumsum(lengths, dtype=np.int64) - lengths
        lines = [json.dumps(document_id).encode() + b"\n" for document_id in document_ids]
        offsets = self._ids.n_bytes + np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._starts.write(starts.astype("<u8").tobytes())
        self._ids.write(b"".join(lines))
        self._id_offsets.write(offsets.astype("<u8").tobytes())
        self.n_documents += len(lines)
        self._write_tokens(np.ascontiguousarray(tokens, self._dtype))

    def checkpoint(self) -> dict[str, Any]:
        """Put everything appended on the disk; return the state (JSON) to resume from."""
        files = (self._tokens, self._starts, self._ids, self._id_offsets)
        for file in files:
            file.sync()
        return {
            "shards": list(self._shards),
            "n_documents": self.n_documents,
            "n_bytes": {file.path.name: file.n_bytes for file in files},
        }

    def close(self) -> Corpus:
        """Publish the folder and open it. Raises `UserError` if it holds no document."""
        if not self.n_documents:
            raise UserError(f"no documents for {self.path}: the input is empty")
        n_tokens = self.n_tokens
        if self._tokens.n_bytes:
            self._close_shard()
        else:
            self._tokens.close()
            self._tokens.path.unlink()
        tokenizer_file = self.tokenizer.save(self.partial)
        content = {
            "dtype": self._dtype.name,
            "eod": self.tokenizer.eod,
            "eod_token": self.tokenizer.eod_token,
            "eod_terminated": True,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "n_tokens": n_tokens,
            "n_documents": self.n_documents,
            "shards": self._shards,
            "documents": {
                "starts": self._starts.close(),
                "ids": self._ids.close(),
                "id_offsets": self._id_offsets.close(),
            },
            "tokenizer": {
                "path": tokenizer_file.name,
                "n_bytes": len(self.tokenizer.json_bytes),
                "sha256": self.tokenizer.sha256,
            },
        }
        publish(self.partial, self.path, finish_manifest(content))
        return Corpus.open(self.path)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _open_file(self, name: str) -> HashedFile:
        return HashedFile(self.partial / name, self._n_bytes.get(name, 0))

    def _shard_name(self) -> str:
        return f"tokens-{len(self._shards):05d}.bin"

    def _write_tokens(self, tokens: Tokens) -> None:
        """Write tokens, closing each shard that they fill."""
        while len(tokens):
            room = self.shard_tokens - self._tokens.n_bytes // self._dtype.itemsize
            self._tokens.write(tokens[:room].data.cast("B"))
            if len(tokens) >= room:
                self._close_shard()
                self._tokens = HashedFile(self.partial / self._shard_name())
            tokens = tokens[room:]

    def _close_shard(self) -> None:
        n_tokens = self._tokens.n_bytes // self._dtype.itemsize
        self._shards.append({**self._tokens.close(), "offset_bytes": 0, "n_tokens": n_tokens})
