"""Who trained on what: the draws of a family against the ledger, and the dose that each member had.

A family says who trains on each of so many equal shares of a step's slots. That is a function of
seed, step and share, so the audit makes it again and compares every record of the ledger.

Shapes: C choices (sets of members that trained on a slot together), A arms, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.ledger import Record

I64 = npt.NDArray[np.int64]
Together = tuple[str | None, ...]
"""Members that trained on a slot together, None for the whole model."""
Drawn = Callable[[int, int | None], Sequence[Together]]
"""(step, `Segment.draws`) -> who trains on each equal share of the step's slots."""
Contains = Callable[[str | None, str | None], bool]
"""(one member, another) -> whether the other is a part of it."""

WHOLE_ALONE: Together = (None,)
NOBODY = -1
OWN, WITHIN, PART = range(3)


@dataclass
class MembersTrained:
    """Who trained, as the ledger says.

    Attributes:
        choices: the different sets of members, in the order in which they were met.
        slots: consumed, in steps that were applied or not.
        sequences: slots on which each member trained, by name, likewise.
        compared: records whose members were drawn again.
        wrong_records: those that name other members than the draw.
        first_wrong: the first of them, in words.
    """

    choices: list[Together] = field(default_factory=lambda: [WHOLE_ALONE])
    slots: int = 0
    sequences: dict[str | None, int] = field(default_factory=dict)
    compared: int = 0
    wrong_records: int = 0
    first_wrong: str = ""

    def number(self, names: Together) -> int:
        """Return the number of a choice."""
        if names not in self.choices:
            self.choices.append(names)
        return self.choices.index(names)

    def add(self, records: Iterable[Record]) -> None:
        """Count the slots of each member."""
        for record in records:
            self.slots += record.count
            shares = record.members or (WHOLE_ALONE,)
            for names in shares:
                for name in names:
                    before = self.sequences.get(name, 0)
                    self.sequences[name] = before + record.count // len(shares)

    def choices_at(self, record: Record, slots: I64) -> I64:
        """Return the number of the choice that trained on each of some slots of a record."""
        if not record.members:
            return np.zeros(len(slots), dtype=np.int64)
        numbers = np.array([self.number(names) for names in record.members], dtype=np.int64)
        place = (slots - record.first_slot) * len(numbers) // record.count
        return numbers[np.clip(place, 0, len(numbers) - 1)]

    def compare(
        self, records: Iterable[Record], steps: Steps, drawn: Drawn, draws: int | None
    ) -> None:
        """Hold every record against the draw."""
        for record in records:
            self.compared += 1
            if wrong := _wrong(record, steps, drawn(record.step, draws)):
                self.wrong_records += 1
                self.first_wrong = self.first_wrong or wrong


def _wrong(record: Record, steps: Steps, drawn: Sequence[Together]) -> str:
    """Say where a record names others than were drawn; "" where it names the same."""
    shares = record.members or (WHOLE_ALONE,)
    size, sequences = record.count // len(shares), steps.sequences(record.step)
    if size * len(shares) != record.count:
        return (
            f"step {record.step:,}, slot {record.first_slot:,}: {record.count} slots in "
            f"{len(shares)} shares"
        )
    for number, names in enumerate(shares):
        first = record.first_slot + number * size
        inside = first - steps.slots_before(record.step)
        low, high = (at * len(drawn) // sequences for at in (inside, inside + size - 1))
        for expected in drawn[max(low, 0) : high + 1]:
            if tuple(expected) != names:
                return (
                    f"step {record.step:,}, slot {first:,}: {_names(names)} in the ledger, "
                    f"{_names(expected)} in the draw"
                )
    return ""


def _names(names: Together) -> str:
    return " + ".join("the whole model" if name is None else name for name in names) or "nobody"


def trained_lines(trained: MembersTrained) -> list[str]:
    """Return who trained in words; nothing where the whole model trained alone."""
    if set(trained.sequences) <= {None}:
        return []
    told = ", ".join(f"{_names((name,))} on {count:,}" for name, count in trained.sequences.items())
    lines = [f"sequences that members trained on: {told}"]
    if trained.compared:
        lines.append(
            f"drew again who trained in {trained.compared:,} records, from seed, step and share"
        )
    return lines


def doses(
    arm_R: I64,
    choice_R: I64,
    units_A: Sequence[int],
    names: Sequence[str],
    trained: MembersTrained,
    members: Sequence[str | None],
    contains: Contains,
) -> list[dict[str, Any]]:
    """Return the dose that each member had, by arm.

    Every consumed exposure counts once for every member: `own` where the member itself trained on
    it; else `within` where a larger one did of which it is a part, so that all of its weights were
    in the update; else `part`, where only some of its weights were.

    Args:
        arm_R, choice_R: int64 [R], arm and choice of every consumed exposure.
        units_A: how many units each arm has.
        names: of the arms.
        members: of the run, None for the whole model.
    """
    kinds = np.array(
        [[_kind(choice, member, contains) for choice in trained.choices] for member in members]
    ).reshape(len(members), len(trained.choices))
    rows = []
    for arm, name in enumerate(names):
        count_C = np.bincount(choice_R[arm_R == arm], minlength=len(trained.choices))
        each = []
        for number, member in enumerate(members):
            counts = [int(count_C[kinds[number] == kind].sum()) for kind in (OWN, WITHIN, PART)]
            own, within, part = counts
            each.append({"member": member, "own": own, "within": within, "part": part})
        rows.append(
            {"arm": name, "units": units_A[arm], "consumed": int(count_C.sum()), "members": each}
        )
    return rows


def _kind(choice: Together, member: str | None, contains: Contains) -> int:
    if member in choice:
        return OWN
    return WITHIN if any(contains(other, member) for other in choice) else PART
