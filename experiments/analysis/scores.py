"""The scores that the analysis starts from: probes of one member, read back from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.experiments.scoring.store import read_probe
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
    contributed.

    A probe taken between a checkpoint and a crash is taken again by the segment that resumes, and
    then replaces the first.

    Args:
        probes: the run's folder of probe files.
        stretches: the lineage of the weights that are reported on.
        member: whose scores; None is the whole model.
    """
    ranges = {part.segment.segment: (part.start_step, part.stop_step) for part in stretches}
    found: dict[str, Probed] = {}
    for path in sorted(probes.glob("step-*.npz")):
        facts, scores = read_probe(path, member=member)
        first, last = ranges.get(facts["segment"], (1, 0))
        if first <= facts["step"] <= last:
            for name, part in scores.items():
                entry = found.setdefault(name, Probed([], []))
                entry.steps.append(facts["step"])
                entry.scores.append(part)
    return found
