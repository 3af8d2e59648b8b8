"""Classes of treatment: what may share a run, and what one run cannot tell.

local: units in the stream; such experiments share a run freely. semi-global: the format or the loss
of many documents, randomized per document; one in a run, unless two declare a factorial. global: a
property of the whole run (its mixture, its repetition, its optimizer). All documents have it, so
nothing in the run can be compared with nothing: one arm a run, no test, and only another run is a
comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from motet.core.errors import Problem
from motet.experiments.design.spec import Arm

if TYPE_CHECKING:
    from motet.experiments.design.assignment import Question

TREATMENTS = ("local", "semi-global", "global")
GLOBAL_ROLE = "whole_run"
"""`role` of a global treatment: it is no question that this run answers."""


def arms_wrong(arms: Sequence[Arm], whole_run: bool) -> str | None:
    """Say why these arms cannot be compared in one run, None where they can.

    Args:
        arms: of an experiment.
        whole_run: it is a global treatment: its arm is the run itself.
    """
    if whole_run:
        if len(arms) == 1 and arms[0].dose == 0:
            return None
        return (
            f"has {len(arms)} arms; a global treatment has one in a run, the one that this run "
            "has: arms: [{name: NAME, dose: 0}] (nothing is inserted)"
        )
    if len(arms) < 2:
        return f"has {len(arms)} arms; an experiment compares at least two"
    if not any(arm.dose == 0 for arm in arms):
        return "has no dose 0; add it: held-out units are what others compare to"
    return "has no dose above 0" if all(arm.dose == 0 for arm in arms) else None


def treatment_problems(questions: Sequence[Question]) -> list[Problem]:
    """Return which experiments cannot be in one run with each other, and what would work."""
    found = []
    of_run = [one for one in questions if one.experiment.treatment == "global"]
    for other in of_run[1:]:
        message = (
            f"is a second global treatment beside {of_run[0].name}: a run has one arm of one "
            "global treatment, because nothing in it could tell the two apart; train another run"
        )
        found.append(Problem(f"experiments.{other.name}.use", message))
    broad = [one for one in questions if one.experiment.treatment == "semi-global"]
    for number, other in enumerate(broad):
        for one in broad[:number]:
            declared = {*(one.spec.shares_units_with or ()), *(other.spec.shares_units_with or ())}
            if {one.name, other.name} & declared:
                continue
            message = (
                f"changes the format or the loss of many documents, as {one.name} does: the two "
                "would disturb each other; leave one out, or declare the factorial with "
                f"shares_units_with: [{one.name}]"
            )
            found.append(Problem(f"experiments.{other.name}.use", message))
    return found
