"""Run folders of version 0.1.0, made by that version: `golden/runs-0.1.0.tar.xz`.

The archive holds a corpus, a run that is finished and one that was stopped at step 81 of 120 (code
snapshots included), what 0.1.0 reported of the first, what it exported, and the losses of the
second as it went on there. `@HERE@` stands for the folder.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "golden" / "runs-0.1.0.tar.xz"
TEXTS = (".json", ".jsonl", ".yaml")


def unpack(folder: Path) -> Path:
    """Unpack the archive so that its runs find their corpus; `runs/finished` and `runs/stopped`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in folder.rglob("*"):
        if path.suffix in TEXTS and "code" not in path.parts:
            path.write_bytes(path.read_bytes().replace(b"@HERE@", str(folder).encode()))
    return folder
