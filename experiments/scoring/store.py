"""Probe results on disk: one file per step, without pickles, whole or not there."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import DamagedFile
from motet.core.files import atomic_write
from motet.core.hashing import sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.types import Generated, ItemScores

SUPERSEDED = "superseded"
_BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, EOFError, RuntimeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, MemoryError),
)
"""What NumPy raises for an archive with damaged bytes (SyntaxError: those of a header)."""
_REMEDY = "restore it from a copy; without it nothing is known of this step"


def probe_path(probes: Path, step: int) -> Path:
    """Return the file of the probes at one step."""
    return probes / f"step-{step:08d}.npz"


def superseded_path(probes: Path, step: int, segment: int) -> Path:
    """Return where the probes of one step are kept that a later segment has taken again."""
    return probes / SUPERSEDED / f"step-{step:08d}.segment-{segment:05d}.npz"


def probe_files(probes: Path, step: int | None = None) -> list[Path]:
    """Return every file of probes, also of segments that later ones replaced; of one step, or of
    all in their order.
    """
    name = "step-*" if step is None else f"step-{step:08d}"
    found = [*probes.glob(f"{name}.npz"), *(probes / SUPERSEDED).glob(f"{name}.segment-*.npz")]
    return sorted(found, key=lambda path: path.name)


def keep_aside(probes: Path, step: int, segment: int) -> None:
    """Move the probes that an earlier segment took at a step out of the way: a run that is trained
    again from an earlier step must not erase what it was judged by. What cannot be read is moved
    as well, so that it is measured again.
    """
    path = probe_path(probes, step)
    if not path.exists():
        return
    try:
        earlier = int(read_facts(path)["segment"])
    except DamagedFile:
        set_aside(path)
        return
    if earlier != segment:
        aside = superseded_path(probes, step, earlier)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)


def set_aside(path: Path) -> None:
    """Keep a damaged probe file under a name that nobody reads."""
    aside = path.parent / SUPERSEDED / f"{path.stem}.damaged-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts of one probe file: step, segment and hash of the definition.

    Raises:
        DamagedFile: it cannot be read, or is that of another step.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _facts_of(path, arrays["facts"].tobytes())
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> DamagedFile:
    if isinstance(error, DamagedFile):
        return error
    told = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return DamagedFile(path, told, _REMEDY)


def _facts_of(path: Path, text: bytes) -> dict[str, Any]:
    """Return the facts that a probe file holds, once they fit its name."""
    facts = dict(parse_json(text))
    step, segment = int(facts["step"]), int(facts["segment"])
    if path.name not in (probe_path(path, step).name, superseded_path(path, step, segment).name):
        what = f"holds the probes of step {step:,} (segment {segment})"
        raise DamagedFile(path, what, "put each file back under its own name")
    return facts


def write_probe(
    probes: Path,
    step: int,
    segment: int,
    definition_sha256: str,
    scores: Mapping[str, ItemScores],
    members: Mapping[str, Mapping[str, ItemScores]] | None = None,
) -> str:
    """Write the scores of every experiment that was probed at a step; whole or not at all. What an
    earlier segment measured at that step is kept under `superseded/`.

    Returns:
        The SHA-256 of the file, for whoever vouches for it.

    Args:
        scores: the whole model's, by experiment.
        members: those of the other members of its family, by name.
    """
    arrays: dict[str, Any] = {}
    everything = dict(scores)
    for member, theirs in (members or {}).items():
        everything |= {f"{name}@{member}": found for name, found in theirs.items()}
    for name, found in everything.items():
        arrays[f"{name}/logprob"] = found.logprob
        arrays[f"{name}/n_tokens"] = found.n_tokens
        arrays[f"{name}/n_bytes"] = found.n_bytes
        arrays[f"{name}/greedy"] = found.greedy
        if found.alignment is not None:
            arrays[f"{name}/alignment"] = found.alignment
        if found.lowest is not None:
            arrays[f"{name}/lowest"] = found.lowest
        if found.generated is not None:
            arrays |= {f"{name}/{key}": array for key, array in _columns(found.generated).items()}
    facts = {"step": step, "segment": segment, "definition_sha256": definition_sha256}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    keep_aside(probes, step, segment)
    content = buffer.getvalue()
    atomic_write(probe_path(probes, step), content)
    return sha256_hex(content)


def read_probe(
    path: Path, member: str | None = None
) -> tuple[dict[str, Any], dict[str, ItemScores]]:
    """Return (facts, one member's scores by experiment) of one probe file; nothing in it is
    unpickled.

    Raises:
        DamagedFile: it cannot be read, or is that of another step.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = _facts_of(path, arrays["facts"].tobytes())
            keys = {key.rpartition("/")[0] for key in arrays.files if "/" in key}
            scores = {
                key.partition("@")[0]: ItemScores(
                    arrays[f"{key}/logprob"],
                    arrays[f"{key}/n_tokens"],
                    arrays[f"{key}/n_bytes"],
                    arrays[f"{key}/greedy"],
                    _read_generated(arrays, key),
                    arrays.get(f"{key}/alignment"),
                    arrays.get(f"{key}/lowest"),
                )
                for key in keys
                if key.partition("@")[2] == (member or "")
            }
    except _BROKEN as error:
        raise _unreadable(path, error) from None
    return facts, scores


def _columns(generated: Generated) -> dict[str, Any]:
    """Return what was written as arrays without objects: all texts and tokens in a row, with the
    size of each.
    """
    texts = [text.encode() for text in generated.texts]
    return {
        "texts": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_bytes": np.array([len(text) for text in texts], dtype=np.int64),
        "written": np.concatenate([np.empty(0, dtype=np.int64), *generated.tokens]),
        "written_tokens": np.array([len(ids) for ids in generated.tokens], dtype=np.int64),
        "ended": generated.ended,
    }


def _read_generated(arrays: Mapping[str, Any], key: str) -> Generated | None:
    """Return what one experiment's items wrote; None in files of before, and where none asks."""
    if f"{key}/texts" not in arrays:
        return None
    ends = np.cumsum(arrays[f"{key}/text_bytes"])[:-1]
    texts = np.split(arrays[f"{key}/texts"], ends)
    tokens = np.split(arrays[f"{key}/written"], np.cumsum(arrays[f"{key}/written_tokens"])[:-1])
    decoded = tuple(text.tobytes().decode() for text in texts)
    return Generated(decoded, tuple(tokens), arrays[f"{key}/ended"])
