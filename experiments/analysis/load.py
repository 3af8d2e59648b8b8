"""Everything the analysis needs, read back from a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from motet.experiments.analysis.analyze import Measured
from motet.experiments.design.requests import Question
from motet.experiments.library.base import ItemScores
from motet.experiments.scoring.store import read_probe
from motet.experiments.stream.audit import Compliance, per_unit
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import PLACEBO_FLAG, Plan
from motet.experiments.stream.ledger import Stretch


@dataclass(frozen=True)
class Probed:
    """The probes of one experiment, in order of steps."""

    steps: list[int]
    scores: list[ItemScores]


def read_probes(probes: Path, stretches: Sequence[Stretch]) -> dict[str, Probed]:
    """Return the probes that measured the lineage: those taken by its segments, at steps that they
    contributed.

    A probe taken between a checkpoint and a crash is taken again by the segment that resumes, and
    then replaces the first.
    """
    ranges = {part.segment.segment: (part.start_step, part.stop_step) for part in stretches}
    found: dict[str, Probed] = {}
    for path in sorted(probes.glob("step-*.npz")):
        facts, scores = read_probe(path)
        first, last = ranges.get(facts["segment"], (1, 0))
        if first <= facts["step"] <= last:
            for name, part in scores.items():
                entry = found.setdefault(name, Probed([], []))
                entry.steps.append(facts["step"])
                entry.scores.append(part)
    return found


def measure(
    questions: Sequence[Question],
    probed: Mapping[str, Probed],
    plan: Plan,
    steps: Steps,
    audit: Compliance,
) -> list[Measured]:
    """Join questions, probes and what the ledger says was consumed; experiments without a probe are
    left out.
    """
    rows = plan.exposures()
    rows_step = steps.step_of(rows.slot)
    everything = np.ones(len(rows), dtype=np.int64)
    lengths = plan.row_lengths()
    measured = []
    for question in questions:
        if question.name not in probed:
            continue
        number = plan.experiments.index(question.name)
        n_units = len(question.units)
        placebos = not question.experiment.inserts_units
        mine = (rows.experiment == number) & (((rows.flags & PLACEBO_FLAG) > 0) == placebos)
        measured_until = probed[question.name].steps[-1]
        seen = np.where(rows_step < measured_until, audit.applied, 0)
        shown = mine & (seen > 0)
        by_unit: list[list[int]] = [[] for _ in range(n_units)]
        for unit, step in zip(rows.unit[shown], rows_step[shown], strict=True):
            by_unit[int(unit)].append(int(step))
        lost = mine & audit.due & (audit.applied == 0)
        measured.append(
            Measured(
                experiment=question.experiment,
                units=question.units,
                arms=question.arms,
                timing=question.timing,
                design=question.design,
                steps=np.array(probed[question.name].steps, dtype=np.int64),
                scores=probed[question.name].scores,
                planned=per_unit(plan, number, n_units, everything, placebos),
                consumed=per_unit(plan, number, n_units, seen, placebos),
                exposure_steps=[np.array(sorted(found), dtype=np.int64) for found in by_unit],
                loss_tokens_skipped=int(lengths[lost].sum()),
            )
        )
    return measured
