"""What is written again where a file of a run was damaged and others hold all that it held:
`segment.json` of the ledger, which every checkpoint that grew from the segment keeps as well.

Records of the ledger, probes and weights are evidence: nothing can be put in their place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile, UserError
from motet.core.files import FROM_A_COPY
from motet.experiments.stream.ledger import (
    Segment,
    read_records,
    read_segment,
    segment_folder,
    segment_from,
    segment_numbers,
    write_segment,
)
from motet.launcher.runs import seals
from motet.launcher.runs.rundir import RunDir

NOT_KEPT = f"{FROM_A_COPY}; no checkpoint keeps what it held, so without it no audit can pass"
Manifests = Mapping[int, Mapping[str, Any]]


def mend(run: RunDir) -> list[str]:
    """Write again what can be; return what was, in words. What was there is kept beside, under a
    name that nobody reads.

    Raises:
        UserError: the folder cannot be written to.
    """
    checkpoints, done = manifests_of(run), []
    for number in segment_numbers(run.ledger):
        try:
            read_segment(run.ledger, number)
        except DamagedFile as error:
            damaged = error
        else:
            continue
        try:
            if told := _put_back(run, number):
                done.append(told)
            elif segment := kept_segment(run, number, checkpoints):
                done.append(_write_again(run, segment, damaged.what))
        except OSError as error:
            where = segment_folder(run.ledger, number)
            raise UserError(f"{where} cannot be written to: {error.strerror}") from None
    return done


def _write_again(run: RunDir, segment: Segment, what: str) -> str:
    path = segment_folder(run.ledger, segment.segment) / "segment.json"
    if path.exists():
        path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
    write_segment(run.ledger, segment)
    name = path.relative_to(run.root)
    return f"{name} {what}; it was written again, as the checkpoints that grew from it keep it"


def _put_back(run: RunDir, number: int) -> str:
    """Give `segment.json` and the records of a rank their own names again, where each lies under
    that of the other; return what was done.
    """
    path = segment_folder(run.ledger, number) / "segment.json"
    for other in sorted(path.parent.glob("rank-*.bin")):
        with other.open("rb") as file:
            begins = file.read(1)
        if begins != b"{" or not path.exists():
            continue
        _swap(path, other)
        with contextlib.suppress(DamagedFile):
            if read_segment(run.ledger, number) and all(True for _ in read_records(other)):
                inside = path.relative_to(run.root)
                return f"{inside} and {other.name} had changed places; each has its own again"
        _swap(path, other)
    return ""


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name(f"{one.name}.swap")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def remedy(run: RunDir, number: int, checkpoints: Manifests) -> str:
    """Say what to do about a `segment.json` that cannot be read."""
    if kept_segment(run, number, checkpoints) is None:
        return NOT_KEPT
    return f"the checkpoints keep what it held: motet verify {run.root} --mend writes it again"


def manifests_of(run: RunDir) -> dict[int, dict[str, Any]]:
    """The manifests of a run's checkpoints that can be read, by step."""
    found = {}
    for step in run.checkpoint_steps():
        with contextlib.suppress(DamagedFile):
            found[step] = seals.read_checkpoint(run, step)
    return found


def kept_segment(run: RunDir, number: int, checkpoints: Manifests) -> Segment | None:
    """Return a segment as the checkpoints of this run keep it; None where none does, they do not
    all say the same of it, it trained under another plan, or its own records speak against it.
    """
    try:
        manifest = seals.read_manifest(run)
    except DamagedFile:
        return None
    found = {one for one in _listed(run, manifest, checkpoints.values()) if one.segment == number}
    if len(found) != 1:
        return None
    (segment,) = found
    return segment if _fits(run, manifest, segment) else None


def _listed(
    run: RunDir, manifest: Mapping[str, Any], checkpoints: Iterable[Mapping[str, Any]]
) -> list[Segment]:
    """All that checkpoints of the run say of segments."""
    grown = []
    for step in run.grown_steps():
        with contextlib.suppress(DamagedFile):
            grown.append(seals.read_checkpoint(run, step, grown=True))
    mine = seals.run_sha256(manifest)
    listed = [
        one
        for facts in (*checkpoints, *grown)
        if facts.get("run_sha256") == mine
        for one in facts.get("lineage", ())
    ]
    return [segment_from(one) for one in listed]


def _fits(run: RunDir, manifest: Mapping[str, Any], segment: Segment) -> bool:
    """Whether a segment is of this run, and no record of its folder speaks against it."""
    of_the_run = (manifest["plan_sha256"], manifest["definition_sha256"])
    if (segment.plan_sha256, segment.definition_sha256) != of_the_run:
        return False
    for path in segment_folder(run.ledger, segment.segment).glob("rank-*.bin"):
        if int(path.stem.removeprefix("rank-")) >= segment.world_size:
            return False
        with contextlib.suppress(UserError):  # damaged itself: named where it is
            if any(record.step < segment.start_step for record in read_records(path)):
                return False
    return segment_folder(run.ledger, segment.segment).is_dir()
