"""One experiment after training: what was measured, and the plain facts about it.

Shapes: U units, S probe steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.power import group_scores
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Design
from motet.experiments.library.base import Experiment, ItemScores, OutcomeSpec, Unit

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

TOLERATED_MISSING_SHARE = 0.02
"""More planned exposures than this not consumed makes an experiment invalid; fewer are a note."""
EXAMPLE_CHARACTERS = 400


@dataclass
class Measured:
    """One experiment after training. See `spec` for what a step means.

    arms, timing: int64 [U] (timing 0 early, 1 late, or None). steps: int64 [S], ascending, one
    ItemScores each. planned, consumed: int64 [U], exposures of the unit's own text (no placebos).
    exposure_steps: per unit, int64, ascending, steps of those consumed.
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


def arm_row(m: Measured, number: int) -> dict[str, Any]:
    """How many units an arm has, and how many exposures they were to get and got."""
    members = m.arms == number
    return {
        "name": m.experiment.spec.arms[number].name,
        "dose": m.experiment.spec.arms[number].dose,
        "n_units": int(members.sum()),
        "n_clusters": len(np.unique(m.design.cluster_of_unit[members])),
        "planned_exposures": int(m.planned[members].sum()),
        "consumed_exposures": int(m.consumed[members].sum()),
    }


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
    smallest = smallest_p(repeater, group_scores(m.experiment, primary))
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
    largest = int(np.bincount(m.design.cluster_of_unit).max(initial=0))
    if largest * 4 > len(m.units) and m.design.n_clusters > 1:
        found.append(f"One cluster of near-duplicates holds {largest} of the units.")
    return found


def noncompliance(m: Measured) -> str:
    """Why the exposures that were consumed make the comparison meaningless, or ""."""
    planned, consumed = m.planned, m.consumed
    held_out = np.array([arm.is_control for arm in m.experiment.spec.arms])[m.arms]
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


def smallest_p(repeater: Repeater, scores: F64) -> float:
    """The smallest p-value that any outcome could have, from the number of distinct assignments.

    Counted for two groups of clusters within blocks; when all blocks are split in half, an
    assignment and its mirror image give the same statistic.
    """
    _, first = np.unique(repeater.design.cluster_of_unit, return_index=True)
    score = scores[repeater.arms_U[first]]
    blocks = repeater.blocks_U[first]
    log_count, mirrored = 0.0, True
    for block in np.unique(blocks):
        here = score[blocks == block]
        treated, control = int((here == 1).sum()), int((here == 0).sum())
        log_count += math.log(math.comb(treated + control, treated))
        mirrored &= treated == control
    ways = math.exp(min(log_count, 50.0))
    return min(1.0, max((2.0 if mirrored else 1.0) / ways, 1.0 / (1 + repeater.draws)))
