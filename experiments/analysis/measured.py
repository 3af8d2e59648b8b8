"""One experiment after training: what was measured, and the plain facts about it.

`measure` joins scores with what the plan and the ledger say of each unit.

Shapes: U units, S probe steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.declared import treatment_values
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.scores import Probed
from motet.experiments.design.assignment import Design, Question
from motet.experiments.design.declared import declared_test
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.known_overlaps import known_overlaps
from motet.experiments.design.overlap import Overlap
from motet.experiments.design.shares import declared, exposures_of
from motet.experiments.stream.audit import Compliance, per_unit
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.types import ItemScores, OutcomeSpec, Unit

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

TOLERATED_MISSING_SHARE = 0.02
"""More planned exposures than this not consumed makes an experiment invalid; fewer are a note."""
PLACEBO_THRESHOLD = 0.01
"""An A/A p-value below this makes the run invalid: at .05 one sound run in 20 would be lost."""
EXAMPLE_CHARACTERS = 400
MOST_COUNTED = 1e9
"""Assignments up to this number are counted as a whole number."""


@dataclass(frozen=True)
class ByOther:
    """What another experiment's exposures told of this one's units.

    shown: int64 [U], consumed exposures of texts that tell of each unit. declared: either entry
    says that the two share units. twin: int64 [U], the one unit of the other experiment that is
    told of by, or tells of, each unit; -1 where there is none, or several.
    """

    name: str
    declared: bool
    shown: I64
    twin: I64


@dataclass
class Measured:
    """One experiment after training, measured on one member. See `spec` for what a step means.

    arms, timing: int64 [U] (timing 0 early, 1 late, or None). steps: int64 [S], ascending, one
    ItemScores each. planned, consumed: int64 [U], exposures of the unit's own text (no placebos).
    exposure_steps: per unit, int64, ascending, steps of those consumed. member: whose scores these
    are; None is the whole model. by_others: other experiments whose texts tell of these units.
    """

    experiment: Experiment
    units: list[Unit]
    arms: I64
    timing: I64 | None
    design: Design
    steps: I64
    scores: list[ItemScores]
    planned: I64
    consumed: I64
    exposure_steps: list[I64]
    loss_tokens_skipped: int = 0
    member: str | None = None
    run_steps: int | None = None
    """Length of the run as it was frozen, which fractions in the schedule refer to; None: the last
    probe.
    """
    by_others: list[ByOther] = field(default_factory=list)
    parameters: int | None = None
    """Of the member; None where sizes are not known."""

    @property
    def name(self) -> str:
        """The experiment's name; the same experiment measured on another member shares it."""
        return self.experiment.spec.name


def measure(
    questions: Sequence[Question],
    probed: Mapping[str, Probed],
    plan: ExposurePlan,
    steps: Steps,
    audit: Compliance,
    member: str | None = None,
    run_steps: int | None = None,
    overlaps: Sequence[Overlap] | None = None,
    parameters: int | None = None,
) -> list[Measured]:
    """Join questions, one member's probes and what the ledger says was consumed.

    Experiments without a probe are left out. Exposures are planned and consumed as far as the last
    probe can show them. `overlaps` are those of all questions, looked for here when they are not
    given. `parameters` are those of the member.
    """
    found = known_overlaps(questions) if overlaps is None else overlaps
    exposures = _Exposures(questions, plan, steps, audit, run_steps, found)
    return [
        replace(exposures.measured(question, probed[question.name], member), parameters=parameters)
        for question in questions
        if question.name in probed
    ]


class _Exposures:
    """The rows of the plan with the step of each, read once for all experiments."""

    def __init__(
        self,
        questions: Sequence[Question],
        plan: ExposurePlan,
        steps: Steps,
        audit: Compliance,
        run_steps: int | None,
        overlaps: Sequence[Overlap],
    ) -> None:
        self.questions = {question.name: question for question in questions}
        self.overlaps = overlaps
        self.plan, self.audit, self.run_steps = plan, audit, run_steps
        self.rows = plan.exposures()
        self.step = steps.step_of(self.rows.slot)
        self.placebo = (self.rows.flags & PLACEBO_FLAG) > 0
        self.lengths = plan.row_lengths()

    def measured(self, question: Question, probed: Probed, member: str | None) -> Measured:
        """One experiment: exposures count when the last probe could see them."""
        plan, audit = self.plan, self.audit
        number = plan.experiments.index(question.name)
        n_units = len(question.units)
        # An experiment that never inserts its units' texts (A/A) is told by its placebos.
        placebos = not question.experiment.inserts_units
        mine = (self.rows.experiment == number) & (self.placebo == placebos)
        visible = self.step < probed.steps[-1]
        seen = np.where(visible, audit.applied, 0)
        lost = mine & audit.due & (audit.applied == 0)
        return Measured(
            experiment=question.experiment,
            units=question.units,
            arms=question.arms,
            timing=question.timing,
            design=question.design,
            steps=np.array(probed.steps, dtype=np.int64),
            scores=probed.scores,
            planned=per_unit(plan, number, n_units, visible.astype(np.int64), placebos),
            consumed=per_unit(plan, number, n_units, seen, placebos),
            exposure_steps=self.steps_by_unit(mine & (seen > 0), n_units),
            loss_tokens_skipped=int(self.lengths[lost].sum()),
            member=member,
            run_steps=self.run_steps,
            by_others=self.by_others(question, seen),
        )

    def by_others(self, question: Question, seen: I64) -> list[ByOther]:
        """Other experiments that told of this one's units with exposures that were `seen`."""
        found = []
        for overlap in self.overlaps:
            if overlap.told != question.name:
                continue
            teller = self.questions[overlap.teller]
            number = self.plan.experiments.index(teller.name)
            rows = (self.rows.experiment == number) & ~self.placebo & (seen > 0)
            shown = exposures_of(
                overlap.links,
                len(question.units),
                teller,
                self.rows.unit[rows],
                self.rows.repetition[rows],
                seen[rows],
            )
            if shown.any():
                said = declared(question.spec, teller.spec)
                twin = self.twins(question, teller)
                found.append(ByOther(teller.name, said, shown, twin))
        return found

    def twins(self, question: Question, other: Question) -> I64:
        """The one unit of another experiment that goes with each unit, see `ByOther`."""
        pairs: set[tuple[int, int]] = set()
        for overlap in self.overlaps:
            if (overlap.told, overlap.teller) == (question.name, other.name):
                pairs |= {(link.unit, link.teller) for link in overlap.links}
            elif (overlap.told, overlap.teller) == (other.name, question.name):
                pairs |= {(link.teller, link.unit) for link in overlap.links}
        twin = np.full(len(question.units), -1, dtype=np.int64)
        units, count = np.unique([unit for unit, _ in pairs], return_counts=True)
        alone = set(units[count == 1].tolist())
        for unit, its in pairs:
            if unit in alone:
                twin[unit] = its
        return twin

    def steps_by_unit(self, shown: npt.NDArray[np.bool_], n_units: int) -> list[I64]:
        """Steps of the rows that are `shown`, per unit, ascending."""
        by_unit: list[list[int]] = [[] for _ in range(n_units)]
        for unit, step in zip(self.rows.unit[shown], self.step[shown], strict=True):
            by_unit[int(unit)].append(int(step))
        return [np.array(sorted(found), dtype=np.int64) for found in by_unit]


def arm_row(m: Measured, number: int) -> dict[str, Any]:
    """How many units an arm has, and how many exposures they were to get and got."""
    members = m.arms == number
    row = {
        "name": m.experiment.spec.arms[number].name,
        "dose": m.experiment.spec.arms[number].dose,
        "n_units": int(members.sum()),
        "n_clusters": len(np.unique(m.design.cluster_of_unit[members])),
        "planned_exposures": int(m.planned[members].sum()),
        "consumed_exposures": int(m.consumed[members].sum()),
    }
    if m.by_others:
        shown = sum(int(other.shown[members].sum()) for other in m.by_others)
        row["exposures_by_others"] = shown
    return row


def notes(m: Measured, repeater: Repeater, detect_alpha: float, primary: OutcomeSpec) -> list[str]:
    """What a reader must know beside the numbers."""
    found: list[str] = []
    empty = [
        arm.name
        for number, arm in enumerate(m.experiment.spec.arms)
        if not (m.arms == number).any()
    ]
    if empty:
        found.append(f"No unit was assigned to: {', '.join(empty)}.")
    smallest = smallest_p_of(m.experiment, primary, repeater)
    if smallest > detect_alpha:
        found.append(
            f"The design is so small that no result can have a p-value below {smallest:.2g}; "
            f"{detect_alpha:.2g} is needed. More units or clusters are needed to find anything."
        )
    missing = int(np.maximum(m.planned - m.consumed, 0).sum())
    if missing:
        found.append(
            f"{missing} of {int(m.planned.sum())} planned exposures were not consumed; "
            "units are compared as they were assigned."
        )
    if m.loss_tokens_skipped:
        found.append(f"{m.loss_tokens_skipped:,} exposure tokens were in skipped updates.")
    found += [
        f"{told_text(m, other)} This was declared. The two assignments are independent, so the "
        f"comparison stays a randomized one; the effect is averaged over the arms of {other.name}."
        for other in m.by_others
        if other.declared
    ]
    largest = int(np.bincount(m.design.cluster_of_unit).max(initial=0))
    if largest * 4 > len(m.units) and m.design.n_clusters > 1:
        found.append(f"One cluster of near-duplicates holds {largest} of the units.")
    return found


def held_out_units(m: Measured) -> npt.NDArray[np.bool_]:
    """Which units are in an arm of dose 0, bool [U]."""
    return np.array([arm.is_control for arm in m.experiment.spec.arms])[m.arms]


def told_text(m: Measured, other: ByOther) -> str:
    """How many held-out units another experiment showed, and how often."""
    held_out = held_out_units(m)
    units = int((held_out & (other.shown > 0)).sum())
    times = int(other.shown[held_out].sum())
    return (
        f"{units} of {int(held_out.sum())} held-out units were shown {times} times by "
        f"{other.name}, whose texts tell of them."
    )


def noncompliance(m: Measured) -> str:
    """Why the exposures that were consumed make the comparison meaningless, or ""."""
    planned, consumed = m.planned, m.consumed
    held_out = held_out_units(m)
    undeclared = [
        told_text(m, other)
        for other in m.by_others
        if not other.declared and (other.shown[held_out] > 0).any()
    ]
    if undeclared:
        return " ".join(undeclared)
    leaked = int((consumed[held_out] > 0).sum())
    if leaked and m.experiment.inserts_units:
        return f"{leaked} held-out units were shown in training."
    extra = int(np.maximum(consumed - planned, 0).sum())
    if extra:
        return f"{extra} exposures were consumed more often than planned."
    missing = int(np.maximum(planned - consumed, 0).sum())
    if missing > TOLERATED_MISSING_SHARE * max(1, int(planned.sum())):
        return f"{missing} of {int(planned.sum())} planned exposures were not consumed."
    return ""


def examples(m: Measured) -> list[dict[str, str]]:
    """One unit of each arm, the first by id."""
    found = []
    for number, arm in enumerate(m.experiment.spec.arms):
        members = [m.units[i] for i in np.flatnonzero(m.arms == number).tolist()]
        if members:
            unit = min(members, key=lambda member: member.id)
            text = unit.texts[0]
            short = text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"
            found.append({"unit": unit.id, "arm": arm.name, "text": short})
    return found


def smallest_p_of(experiment: Experiment, outcome: OutcomeSpec, repeater: Repeater) -> float:
    """The smallest p-value that an outcome could have by the test that the experiment declared."""
    omnibus = declared_test(experiment, outcome) == "omnibus"
    return smallest_p(repeater, treatment_values(experiment, outcome), omnibus)


def smallest_p(repeater: Repeater, treatment: F64, names_only: bool = False) -> float:
    """The smallest p-value that any outcome could have, from the number of distinct assignments.

    Assignments of one statistic count together: an assignment and its mirror image, when the blocks
    are alike in both; with `names_only` (a test of all arms at once) also those in which arms of
    equal size have changed places.

    Args:
        repeater: the assignment.
        treatment: the treatment's value in every arm, NaN for an arm that takes no part.
        names_only: the values tell groups apart and mean nothing else.
    """
    _, first = np.unique(repeater.design.cluster_of_unit, return_index=True)
    values = treatment[repeater.arms_U[first]]
    blocks = repeater.blocks_U[first]
    kinds = np.unique(treatment[np.isfinite(treatment)])
    counts = np.array(
        [[np.sum(values[blocks == block] == kind) for kind in kinds] for block in np.unique(blocks)]
    )
    log_count = 0.0
    for row in counts.tolist():
        left = sum(row)
        for count in row:
            log_count += math.log(math.comb(left, count))
            left -= count
    mirrored = np.allclose(kinds + kinds[::-1], kinds[0] + kinds[-1]) and np.array_equal(
        counts, counts[:, ::-1]
    )
    alike = 2.0 if mirrored else 1.0
    if names_only:
        _, sizes = np.unique(counts, axis=1, return_counts=True)
        alike = float(math.prod(math.factorial(size) for size in sizes.tolist()))
    ways = math.exp(min(log_count, 50.0))
    if ways < MOST_COUNTED:  # a whole number: 1 of 20 is not a little more than .05
        ways = round(ways)
    return min(1.0, max(alike / ways, 1.0 / (1 + repeater.draws)))
