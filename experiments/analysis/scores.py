"""The scores that the analysis starts from: probes of one member, read back from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.experiments.scoring.store import probe_files, read_facts, read_probe
from motet.experiments.stream.ledger import Stretch
from motet.experiments.types import ItemScores


@dataclass(frozen=True)
class Probed:
    """The probes of one experiment, in order of steps."""

    steps: list[int]
    scores: list[ItemScores]


def read_probes(
    probes: Path, stretches: Sequence[Stretch], member: str | None = None
) -> dict[str, Probed]:
    """Return the probes that measured the lineage: those taken by its segments, at steps that they
    contributed; of two at one step, that of the later segment.

    Args:
        probes: the run's folder of probe files.
        stretches: the lineage of the weights that are reported on.
        member: whose scores; None is the whole model.
    """
    ranges = {part.segment.segment: (part.start_step, part.stop_step) for part in stretches}
    newest: dict[int, tuple[int, Path]] = {}
    for path in probe_files(probes):
        facts = read_facts(path)
        step, segment = int(facts["step"]), int(facts["segment"])
        first, last = ranges.get(segment, (1, 0))
        if first <= step <= last and newest.get(step, (0, path))[0] <= segment:
            newest[step] = (segment, path)
    found: dict[str, Probed] = {}
    for step in sorted(newest):
        for name, part in read_probe(newest[step][1], member=member)[1].items():
            entry = found.setdefault(name, Probed([], []))
            entry.steps.append(step)
            entry.scores.append(part)
    return found


def first_segment(probes: Path, step: int) -> int | None:
    """Return the segment that was the first to be measured at a step; None when none was.

    A run that goes on, crashes and is trained again, or is taken back to an earlier checkpoint
    reaches a step more than once. The frozen run would have ended at the first.
    """
    found = [int(read_facts(path)["segment"]) for path in probe_files(probes, step)]
    return min(found, default=None)
