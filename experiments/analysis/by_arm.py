"""One outcome arm by arm: means, and effects against the control arms.

Shapes: U units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Estimate
from motet.experiments.analysis.measured import Measured

F64 = npt.NDArray[np.float64]


def per_arm(
    m: Measured, values_U: F64, scores: F64, overall: Estimate, pair: Callable[[int], Estimate]
) -> list[dict[str, Any]]:
    """Every arm that takes part: its mean, and its effect against the control arms.

    Args:
        m: the experiment after training.
        values_U: the outcome.
        scores: per arm 1 (treated), 0 (control) or NaN (takes no part).
        overall: the estimate of the whole comparison. Of a single treated arm it is the arm's own;
            a test of all arms at once has made the arms' effects already, with intervals that hold
            for all arms together and p-values that are corrected over them.
        pair: estimates one treated arm against the control arms.
    """
    treated = np.flatnonzero(scores == 1).tolist()
    at_once = {treated[one.group - 1]: one for one in overall.arms}
    rows = []
    for number in np.flatnonzero(np.isfinite(scores)).tolist():
        arm = m.experiment.spec.arms[number]
        own = values_U[m.arms == number]
        own = own[np.isfinite(own)]
        row: dict[str, Any] = {"arm": arm.name, "dose": arm.dose}
        row["mean"] = float(own.mean()) if len(own) else None
        row |= {"effect": None, "low": None, "high": None, "p": None, "n": len(own)}
        if number in at_once:
            one = at_once[number]
            row |= {"effect": one.effect, "low": one.low, "high": one.high, "p": one.p}
        elif number in treated:
            found = overall if len(treated) == 1 else pair(number)
            row |= {"effect": found.effect, "low": found.low, "high": found.high}
            row["p"] = found.p if found.effect is not None else None
        rows.append(row)
    return rows


def contrast_text(m: Measured, contrast: tuple[tuple[str, ...], ...] | None, test: str) -> str:
    """What a test compares, in words."""
    arms = m.experiment.spec.arms
    doses = sorted({arm.dose for arm in arms})
    if test == "trend":
        return f"slope over the doses {', '.join(f'{dose:g}' for dose in doses)}"
    if test == "omnibus":
        return f"{sum(not arm.is_control for arm in arms)} arms vs dose 0, all at once"
    if contrast is not None:
        return " vs ".join(", ".join(names) for names in contrast)
    if m.experiment.role == "placebo":
        return " vs ".join(
            ", ".join(arm.name for arm in arms if arm.is_control == control)
            for control in (False, True)
        )
    positive = [dose for dose in doses if dose > 0]
    return f"dose {positive[0]:g} vs dose 0" if len(positive) == 1 else "any dose vs dose 0"
