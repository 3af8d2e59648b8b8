"""The audit: proof from the ledger that the plan was carried out, exposure by exposure.

For the weights of one checkpoint it walks the lineage and shows that every step consumed exactly
its slots, that every planned exposure was laid over them exactly once and none that was not
planned, under one plan, and that those members of a family trained on every slot who were drawn
for it; with `replay`, it also recomputes the digest of every consumed token from the corpora and
the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.ledger import (
    Record,
    Stretch,
    lineage,
    segment_folder,
    stretch_records,
)
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.stream.who_trained import NOBODY, Drawn, MembersTrained, trained_lines

I64 = npt.NDArray[np.int64]
MOST_SHOWN = 5
Digest = Callable[[int, int], int]
"""(first slot, count) -> digest of what a stream gives there."""


@dataclass
class Compliance:
    """What became of the planned exposures in the lineage of one checkpoint.

    Attributes:
        step: the model audited, after that many updates.
        consumed: int64 [rows of the plan], how often each exposure was consumed.
        applied: int64 [rows], how often it was in a step whose update was applied.
        due: bool [rows], its slot lies before `step`.
        unplanned: exposures in the ledger that the plan does not hold.
        skipped_steps: steps whose update was left out.
        problems: what speaks against the run, in words; empty when all is well.
        replayed: digests that were recomputed.
        trained: who trained, in all steps of the lineage.
        choice: int64 [rows], number in `trained.choices` of those who trained on each exposure in
            an applied step; `NOBODY` where there is none.
    """

    step: int
    consumed: I64
    applied: I64
    due: npt.NDArray[np.bool_]
    unplanned: int
    skipped_steps: list[int]
    problems: list[str]
    replayed: int = 0
    worlds: list[int] = field(default_factory=list)
    trained: MembersTrained = field(default_factory=MembersTrained)
    choice: I64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def planned(self) -> int:
        return int(self.due.sum())

    @property
    def missing(self) -> int:
        return int((self.due & (self.consumed == 0)).sum())

    @property
    def duplicated(self) -> int:
        return int((self.consumed > 1).sum())

    @property
    def consumed_once(self) -> int:
        return int((self.due & (self.consumed == 1)).sum())

    @property
    def not_applied(self) -> int:
        return int((self.due & (self.consumed > 0) & (self.applied == 0)).sum())

    @property
    def ok(self) -> bool:
        return not self.problems


def check_ledger(
    ledger: Path,
    plan: ExposurePlan,
    steps: Steps,
    segment: int,
    step: int,
    digest: Digest | None = None,
    drawn: Drawn | None = None,
) -> Compliance:
    """Audit the lineage of the checkpoint at (segment, step).

    Args:
        ledger: the run's ledger folder.
        plan: the frozen plan.
        steps: batch sizes.
        digest: recomputes what was consumed; None skips the replay.
        drawn: draws again who trained; None skips that.
    """
    rows = plan.exposures()
    audit = Compliance(
        step=step,
        consumed=np.zeros(len(rows), dtype=np.int64),
        applied=np.zeros(len(rows), dtype=np.int64),
        due=rows.slot < steps.slots_before(step),
        unplanned=0,
        skipped_steps=[],
        problems=[],
        choice=np.full(len(rows), NOBODY, dtype=np.int64),
    )
    order = np.argsort(rows.id)
    sorted_ids = rows.id[order]
    expected = 0
    for stretch in lineage(ledger, segment, step):
        _check_segment(stretch, expected, plan, audit)
        expected = stretch.stop_step
        records = [record for _, record in stretch_records(ledger, stretch)]
        _check_slots(records, stretch, steps, audit)
        _count(records, order, sorted_ids, audit)
        _note_members(records, order, sorted_ids, rows.slot, audit)
        if drawn is not None:
            audit.trained.compare(records, steps, drawn, stretch.segment.draws)
        if digest is not None:
            _replay(records, digest, audit)
    _judge(audit)
    return audit


def _check_segment(stretch: Stretch, expected: int, plan: ExposurePlan, audit: Compliance) -> None:
    """A stretch must begin where the one before ended, under the same plan."""
    if stretch.start_step != expected:
        audit.problems.append(
            f"steps {expected:,} to {stretch.start_step:,} are in no segment of the lineage"
        )
    audit.worlds.append(stretch.segment.world_size)
    if stretch.segment.plan_sha256 != plan.sha256:
        audit.problems.append(f"segment {stretch.segment.segment} trained under another plan")


def _check_slots(records: list[Record], stretch: Stretch, steps: Steps, audit: Compliance) -> None:
    """Every step of the stretch must be tiled by its records without gap or overlap."""
    by_step: dict[int, list[Record]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record)
    bad = []
    for step in range(stretch.start_step, stretch.stop_step):
        position = steps.slots_before(step)
        for record in sorted(by_step.get(step, []), key=lambda record: record.first_slot):
            position = position + record.count if record.first_slot == position else -1
        if position != steps.slots_before(step + 1):
            bad.append(step)
        applied = {record.applied for record in by_step.get(step, [])}
        if applied == {False}:
            audit.skipped_steps.append(step)
        elif len(applied) == 2:
            audit.problems.append(f"step {step:,}: ranks disagree whether its update was applied")
    if bad:
        shown = ", ".join(f"{step:,}" for step in bad[:MOST_SHOWN])
        audit.problems.append(
            f"ledger/{segment_folder(Path(), stretch.segment.segment)}: the records of "
            f"{len(bad):,} steps do not cover "
            "their slots exactly once "
            f"(steps {shown}{', ...' if len(bad) > MOST_SHOWN else ''})"
        )


def _count(
    records: list[Record], order: I64, sorted_ids: npt.NDArray[np.uint64], audit: Compliance
) -> None:
    """Count how often each planned exposure was consumed."""
    for applied in (True, False):
        parts = [record.exposure_ids for record in records if record.applied == applied]
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
        if len(ids) == 0:
            continue
        place = np.minimum(np.searchsorted(sorted_ids, ids), max(len(sorted_ids) - 1, 0))
        known = sorted_ids[place] == ids if len(sorted_ids) else np.zeros(len(ids), dtype=bool)
        audit.unplanned += int((~known).sum())
        np.add.at(audit.consumed, order[place[known]], 1)
        if applied:
            np.add.at(audit.applied, order[place[known]], 1)


def _note_members(
    records: list[Record],
    order: I64,
    sorted_ids: npt.NDArray[np.uint64],
    slots: I64,
    audit: Compliance,
) -> None:
    """Note who trained on each planned exposure of an applied step."""
    audit.trained.add(records)
    for record in records:
        if not record.applied or not len(record.exposure_ids) or not len(sorted_ids):
            continue
        place = np.minimum(np.searchsorted(sorted_ids, record.exposure_ids), len(sorted_ids) - 1)
        rows = order[place[sorted_ids[place] == record.exposure_ids]]
        audit.choice[rows] = audit.trained.choices_at(record, slots[rows])


def _replay(records: list[Record], digest: Digest, audit: Compliance) -> None:
    """Recompute what every record says was consumed."""
    bad = []
    for record in records:
        audit.replayed += 1
        if digest(record.first_slot, record.count) != record.digest:
            bad.append(record.step)
    if bad:
        audit.problems.append(
            f"{len(bad):,} records do not match the tokens of the corpora and the plan (first at "
            f"step {min(bad):,})"
        )


def _judge(audit: Compliance) -> None:
    """Say in words what the counts speak against."""
    early = int((~audit.due & (audit.consumed > 0)).sum())
    for count, what in (
        (audit.missing, "planned exposures were never consumed"),
        (audit.duplicated, "exposures were consumed more than once"),
        (audit.unplanned, "exposures were consumed that the plan does not hold"),
        (early, "exposures were consumed before their slot"),
    ):
        if count:
            audit.problems.append(f"{count:,} {what}")
    if wrong := audit.trained.wrong_records:
        audit.problems.append(
            f"{wrong:,} records name other members than the family draws (first at "
            f"{audit.trained.first_wrong})"
        )


def per_unit(plan: ExposurePlan, number: int, n_units: int, counts: I64, placebos: bool) -> I64:
    """Return exposures per unit of one experiment, int64 [n_units].

    Args:
        number: of the experiment in the plan.
        counts: int64 [rows of the plan], what to add up.
        placebos: count placebo rows (an A/A experiment has no others) instead of the units' own
            texts.
    """
    rows = plan.exposures()
    mine = (rows.experiment == number) & (((rows.flags & PLACEBO_FLAG) > 0) == placebos)
    totals = np.zeros(n_units, dtype=np.int64)
    np.add.at(totals, rows.unit[mine], counts[mine])
    return totals


def audit_lines(audit: Compliance) -> list[str]:
    """Return the audit in words."""
    worlds = " -> ".join(str(size) for size in audit.worlds)
    lines = [
        f"model after step {audit.step:,}; {len(audit.worlds)} segment(s), ranks {worlds}",
        f"planned exposures up to here: {audit.planned:,}; consumed exactly once: "
        f"{audit.consumed_once:,}; "
        f"missing {audit.missing:,}, repeated {audit.duplicated:,}, unplanned {audit.unplanned:,}",
    ]
    if audit.skipped_steps:
        lines.append(
            f"{len(audit.skipped_steps):,} steps left their update out; {audit.not_applied:,} "
            "exposures lay in them"
        )
    if audit.replayed:
        lines.append(f"recomputed the tokens of {audit.replayed:,} records from corpora and plan")
    lines += trained_lines(audit.trained)
    lines += [f"PROBLEM: {problem}" for problem in audit.problems]
    lines.append("audit passed" if audit.ok else "AUDIT FAILED")
    return lines
