"""FileHashes that a run keeps of itself: what was frozen, file by file, and who vouches for what.

The chain: `frozen.json` has the hash of every frozen file of plan/ and code/; `manifest.json` has
the hash of `frozen.json`, of the definition and of the plan, and the frozen settings themselves;
checkpoints and `metrics.jsonl` have the hash of the manifest and those of the probe files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile
from motet.core.files import FROM_A_COPY, read_fields, seal_of, write_json
from motet.core.hashing import sha256_file
from motet.core.listed import FileHashes, hash_of
from motet.launcher.runs.rundir import RunDir

MANIFEST_NEEDS: Mapping[str, Any] = {
    "definition_sha256": str,
    "plan_sha256": str,
}
CHECKPOINT_NEEDS: Mapping[str, Any] = {"step": int, "segment": int, "definition_sha256": str}
_GROWS = ("plugins",)
"""Keys of the manifest that may be added to while the run lives: a scheduler of the user's own."""


def read_manifest(run: RunDir) -> dict[str, Any]:
    """Return `manifest.json`.

    Raises:
        DamagedFile: it is missing, altered, or no manifest of a run.
    """
    return read_fields(run.manifest, MANIFEST_NEEDS)


LOST_SEAL = "lost the hash in its last line"


def lost_seal(sealed: bool, manifest: Mapping[str, Any]) -> bool:
    """Return whether settings without a hash had one: runs of earlier versions never did."""
    return not sealed and "frozen_sha256" in manifest


def run_sha256(manifest: Mapping[str, Any]) -> str:
    """Return the hash by which checkpoints and metrics know the frozen run."""
    return seal_of({key: value for key, value in manifest.items() if key not in _GROWS})


def read_checkpoint(
    run: RunDir, step: int, needs: Mapping[str, Any] = CHECKPOINT_NEEDS, grown: bool = False
) -> dict[str, Any]:
    """Return the manifest of a checkpoint; `grown`: see `RunDir.checkpoint`.

    Raises:
        DamagedFile: it is missing or altered, or the folder has another step's name.
    """
    path = run.checkpoint(step, grown) / "manifest.json"
    found = read_fields(path, {**needs, "step": int}, "its weights cannot be trusted: use another")
    if found["step"] != step:
        what = f"is that of step {found['step']:,}, in the folder of step {step:,}"
        raise DamagedFile(path, what, "give the folder its own name again, or use another")
    return found


def seal_frozen(run: RunDir) -> str:
    """Write `frozen.json`: size and hash of every frozen file; return its own hash."""
    files = {path.relative_to(run.root).as_posix(): path for path in frozen_files(run)}
    write_json(run.frozen_json, {"version": 1, "files": {n: hash_of(p) for n, p in files.items()}})
    return sha256_file(run.frozen_json)


def frozen_files(run: RunDir) -> Iterator[Path]:
    """Yield what never changes after a run was made; the plan's columns have hashes of their own,
    and what Python compiles is no part of the code.
    """
    for folder in (run.plan, run.code):
        for path in sorted(folder.rglob("*")):
            compiled = "__pycache__" in path.parts or path.name.endswith(".tmp")
            if path.is_file() and not compiled and path.name != "exposures.plan":
                yield path


def read_frozen(run: RunDir, manifest: Mapping[str, Any]) -> FileHashes | None:
    """Return the hashes of the frozen files; None for a run of before they were kept.

    Raises:
        DamagedFile: the list itself is not the one that the manifest knows.
    """
    if "frozen_sha256" not in manifest:
        return None
    files: FileHashes = read_fields(run.frozen_json, {"files": dict})["files"]
    if sha256_file(run.frozen_json) != manifest["frozen_sha256"]:
        raise DamagedFile(run.frozen_json, "is not the one that the run was made with", FROM_A_COPY)
    return files
