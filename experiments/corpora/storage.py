"""The files of a corpus: its manifest, their sizes and digests, and how they are mapped and
written.

`corpus.py` says what the folder holds; this module is what its reader, its writer and the indexer
of foreign token files (`indexed.py`) have in common.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.cache import cache_file, recall, remember
from motet.core.errors import Problem, UserError
from motet.core.files import SEAL, fsync_folder, remove_leftovers, seal_of, write_json
from motet.core.hashing import canonical_json, sha256_file, sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.corpora.eod_marks import END
from motet.experiments.corpora.eos import TOKENIZER_FILES

MANIFEST = "corpus.json"
FORMAT = "motet-corpus"
VERSION = 1
BESIDE = "beside"
"""Key under which the manifest lists files of the folder of which the tokens need none; manifests
of before it was kept have no hash of their own either."""
READ_WITH = (*TOKENIZER_FILES, "chat_template.jinja")
"""What is read beside a tokenizer, where it is there."""
HASH_BLOCK_BYTES = 1 << 22
HASH_THREADS = 8
SETTLED_S = 5.0
"""A file is taken as known when it had not been written for so long when it was hashed."""

Tokens = npt.NDArray[Any]  # uint16 or uint32
ByteProgress = Callable[[int, int], None]  # (bytes done, bytes in all)


class CorpusFile(NamedTuple):
    """A file that the manifest vouches for."""

    path: Path
    n_bytes: int
    sha256: str


class HashedFile:
    """A file being appended to, which knows its size and SHA-256 and can be continued after a
    kill.
    """

    def __init__(self, path: Path, n_bytes: int = 0):
        """Start the file anew, or continue after its first `n_bytes`; what follows is cut off.

        Raises `UserError` if the file is shorter than that.
        """
        self.path = path
        self.n_bytes = n_bytes
        self._digest = hashlib.sha256()
        if n_bytes and (not path.exists() or path.stat().st_size < n_bytes):
            raise UserError(f"{path} lost data (it had {n_bytes} bytes); delete {path.parent}")
        self._file = path.open("r+b" if n_bytes else "wb")
        left = n_bytes
        while left:
            block = self._file.read(min(left, HASH_BLOCK_BYTES))
            self._digest.update(block)
            left -= len(block)
        self._file.seek(n_bytes)
        self._file.truncate()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> dict[str, Any]:
        """Sync, close, and return the file's manifest entry."""
        self.sync()
        self._file.close()
        return {"path": self.path.name, "n_bytes": self.n_bytes, "sha256": self._digest.hexdigest()}


def finish_manifest(content: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest made of `content`: with its format, version and fingerprint."""
    manifest = {"format": FORMAT, "version": VERSION, **content}
    return {**manifest, "fingerprint": fingerprint(manifest)}


def publish(partial: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the folder `partial` and rename that to `path`, durably; the
    manifest vouches for itself and for what else lies in the folder.
    """
    remove_leftovers(partial)
    known = {name for entry in entries_of(manifest) if (name := entry["path"])}
    others = [file for file in sorted(partial.iterdir()) if file.is_file()]
    beside = [
        {"path": file.name, "n_bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in others
        if file.name not in known
    ]
    write_json(partial / MANIFEST, {**manifest, BESIDE: beside})
    os.rename(partial, path)
    fsync_folder(path.parent)


def entries_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the manifest says of each file that the corpus needs, shards first."""
    documents = manifest["documents"]
    entries = [*manifest["shards"], documents["starts"], documents["ids"]]
    entries += [documents["id_offsets"], manifest["tokenizer"]]
    return [entry for entry in entries if entry]


def check_output(path: Path) -> None:
    """Raise `UserError` if a corpus cannot be published at `path` because something is there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output {path} exists and is not empty; name another, or delete it")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the `corpus.json` of a folder; raises `UserError` naming what is wrong."""
    file = path / MANIFEST
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        partial = partial_folder(path)
        hint = f"; {partial} is unfinished, prepare it again" if partial.exists() else ""
        raise UserError(f"{path} is not a corpus: it has no {MANIFEST}{hint}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; prepare the corpus again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a corpus (format {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{file} has version {manifest.get('version')}; this Motet reads version {VERSION}"
        )
    seal = manifest.pop(SEAL, None)
    if (seal is not None or BESIDE in manifest) and seal != seal_of(manifest):
        raise UserError(f"{file} was altered since it was written; prepare the corpus again")
    if manifest.get("fingerprint") != fingerprint(manifest):
        raise UserError(
            f"{file} was altered: its fingerprint does not fit its content; prepare it again"
        )
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what defines the tokens and documents; no path or name is part of
    it.
    """
    defining = {
        "version": manifest["version"],
        "dtype": manifest["dtype"],
        "eod": manifest["eod"],
        "eod_terminated": manifest["eod_terminated"],
        "shards": [
            [shard["sha256"], shard["offset_bytes"], shard["n_tokens"]]
            for shard in manifest["shards"]
        ],
        "document_starts": manifest["documents"]["starts"]["sha256"],
    }
    if manifest.get("eod_marks", END) != END:
        defining["eod_marks"] = manifest["eod_marks"]
    return sha256_hex(canonical_json(defining))


def partial_folder(path: Path) -> Path:
    """Return where the corpus `path` is written before it is published by a rename."""
    return path.with_name(path.name + ".partial")


def hash_files(
    paths: Sequence[Path], progress: ByteProgress | None = None, known: bool = False
) -> list[str]:
    """Return the SHA-256 of each file, hashing several at once (hashlib releases the lock).

    Args:
        known: one that was hashed before and not written since is taken as it was then.
    """
    total_bytes = sum(path.stat().st_size for path in paths)
    done_bytes = [0] * len(paths)

    def hash_one(index: int) -> str:
        def more(n_bytes: int) -> None:
            done_bytes[index] += n_bytes
            if progress is not None:
                progress(sum(done_bytes), total_bytes)

        return (known and recalled_hash(paths[index])) or _remembered(paths[index], more)

    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_one, range(len(paths))))


def recalled_hash(path: Path) -> str | None:
    """Return the SHA-256 that a file had when it was hashed last, None when it may be another
    file now.
    """
    found = recall(cache_file("hashes", _identity_of(path)))
    return found if isinstance(found, str) else None


def _remembered(path: Path, more: Callable[[int], None]) -> str:
    """Hash a file and remember it, unless it may have been written in the meantime."""
    before = _identity_of(path)
    digest = sha256_file(path, more)
    written = max(path.stat().st_mtime, path.stat().st_ctime)
    # Two writes within one tick of a file system's clock look alike: what is new is hashed again.
    if _identity_of(path) == before and time.time() - written > SETTLED_S:
        remember(cache_file("hashes", before), digest)
    return digest


def _identity_of(path: Path) -> str:
    """Return the hash of what changes when a file is written or replaced. `ctime` cannot be set
    back by `touch` or `cp -p`.
    """
    now = path.stat()
    place = [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    return sha256_hex(canonical_json([str(path.absolute()), *place]))


def map_array(path: Path, dtype: np.dtype[Any], count: int, offset_bytes: int = 0) -> Tokens:
    """Map `count` items of a file read-only, as a plain array (slices of `np.memmap` are
    slower).
    """
    if count == 0:
        return np.empty(0, dtype)
    return np.frombuffer(map_bytes(path), dtype, count=count, offset=offset_bytes)


def map_bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def size_problem(file: CorpusFile) -> Problem | None:
    """Return what is wrong with a file's presence and size, or None."""
    try:
        n_bytes = file.path.stat().st_size
    except FileNotFoundError:
        return Problem(str(file.path), "missing; the corpus needs it")
    if n_bytes == file.n_bytes:
        return None
    kind = "truncated" if n_bytes < file.n_bytes else "altered"
    return Problem(str(file.path), f"{kind}: {n_bytes} bytes, the manifest says {file.n_bytes}")


def altered(
    files: Sequence[CorpusFile], progress: ByteProgress | None = None, known: bool = False
) -> list[Problem]:
    """Hash files, several at once; return a problem for each missing, truncated or altered one.

    Args:
        known: see `hash_files`.
    """
    problems = [size_problem(file) for file in files]
    sound = [file for file, problem in zip(files, problems, strict=True) if problem is None]
    digests = hash_files([file.path for file in sound], progress, known)
    for file, digest in zip(sound, digests, strict=True):
        if digest != file.sha256:
            message = f"altered: its SHA-256 is {digest}, the manifest says {file.sha256}"
            problems.append(Problem(str(file.path), message))
    return [problem for problem in problems if problem is not None]
