"""Which segments of the ledger anything of a run grew from, by what checkpoints and probe files say
of themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from motet.core.errors import DamagedFile
from motet.experiments.scoring.store import probe_files, read_facts
from motet.experiments.stream.ledger import read_segment, segment_numbers
from motet.launcher.runs import seals
from motet.launcher.runs.rundir import RunDir


def segments_used(run: RunDir, checkpoints: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Return the numbers of segments on which a checkpoint or a measurement rests, and of the
    newest, which may be trained now.

    Where a file that would say so cannot be read, that is every segment, to be on the safe side.

    Args:
        checkpoints: the manifests that can be read, by step.
    """
    every = set(segment_numbers(run.ledger))
    if len(checkpoints) != len(run.checkpoint_steps()):
        return every
    try:
        grown = [seals.read_checkpoint(run, step, grown=True) for step in run.grown_steps()]
        manifests = (*checkpoints.values(), *grown)
        used = {int(one["segment"]) for one in manifests}
        # Also where one of them is damaged, beyond which its own parents are not known.
        used |= {int(a["segment"]) for one in manifests for a in one.get("lineage", ())}
        used |= {int(read_facts(path)["segment"]) for path in probe_files(run.probes)}
    except DamagedFile:
        return every
    newest = {max(every)} if every else set()
    return {number for tip in used | newest for number in _upwards(run, tip)}


def _upwards(run: RunDir, segment: int) -> Iterator[int]:
    """The segment and those that it grew from, up to the first one or one that cannot be read."""
    seen: set[int] = set()
    while segment and segment not in seen:
        seen.add(segment)
        yield segment
        try:
            segment = read_segment(run.ledger, segment).parent
        except DamagedFile:
            return
