"""How an effect grows with the size of the model: one number for all members of a family.

The statistic is the least-squares slope of the effect at each member over log2 of its parameters.
An effect is linear in the outcome, so the slope of effects is the effect on each unit's own slope:
`sum_m w_m y_m`, with the weights of a least-squares slope. That makes it an outcome like any other,
and the same assignment is repeated for all members at once: p-value and interval need no word on
how the members' scores hang together, which they do, as members share weights and exposures.

Shapes: M members, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.answers import OUTSIDE, Answer
from motet.experiments.analysis.by_arm import contrast_text
from motet.experiments.analysis.coverage import known_coverage
from motet.experiments.analysis.declared import (
    comparison_of,
    estimate_by,
    group_scores,
    primary_of,
)
from motet.experiments.analysis.shares import within
from motet.experiments.design.declared import declared_test

F64 = npt.NDArray[np.float64]
NAME = "size_slope"


def slope_weights(parameters: Sequence[float]) -> F64 | None:
    """Return float64 [M] whose product with values at each member is their least-squares slope
    over log2(parameters); None where all members have one size.
    """
    if len(parameters) < 2:
        return None
    x_M = np.log2(np.asarray(parameters, dtype=np.float64))
    x_M = x_M - x_M.mean()
    spread = float(x_M @ x_M)
    return x_M / spread if spread > 1e-12 else None


def unit_slopes(values_MU: Sequence[F64], weights_M: F64) -> F64:
    """Return each unit's slope, float64 [U]; NaN for a unit without a value at some member."""
    return weights_M @ np.stack(list(values_MU))


def size_slope(
    studies: Sequence[Answer], declared: bool, detect_alpha: float
) -> dict[str, Any] | None:
    """Return the slope of the primary outcome's effect over log2(parameters) as an OUTCOME of the
    report; None for a test that has no single effect, or with fewer than two sizes.

    Its further fields: `over` = "parameters", `declared`, and `sizes`, of the members that it is
    made of.

    Args:
        studies: the experiment at every member of known size, the judged one first; they share the
            repetitions of one assignment.
        declared: it was declared before training, and is corrected with the primary outcomes.
        detect_alpha: level that its smallest detectable effect is for.
    """
    known = [study for study in studies if study.m.parameters]
    weights_M = slope_weights([study.m.parameters or 1 for study in known])
    first = studies[0]
    experiment = first.m.experiment
    primary = primary_of(experiment)
    test = declared_test(experiment, primary)
    comparison = comparison_of(experiment, primary, first.repeater)
    if weights_M is None or test == "omnibus" or comparison is None:
        return None
    values_U = unit_slopes([study.values(primary) for study in known], weights_M)
    earlier = [study.baseline(primary) for study in known]
    covariates = [one for one in earlier if one is not None]
    covariate_U = unit_slopes(covariates, weights_M) if len(covariates) == len(known) else None
    found = estimate_by(test, values_U, covariate_U, comparison, OUTSIDE, detect_alpha)
    span = float(np.ptp(comparison.score)) if test == "trend" else 1.0
    found = within(found, primary.reach * float(np.abs(weights_M).sum()) / span)
    if test == "contrast":
        found = replace(found, coverage=known_coverage(found, values_U, comparison, False))
    outcome = replace(primary, name=NAME, label=f"the effect on {primary.label}", primary=False)
    score_U = group_scores(experiment, primary)[first.m.arms]
    fields = first.fields(
        outcome, contrast_text(first.m, primary.contrast, test), found, values_U, score_U
    )
    return {
        **fields,
        **({"test": test} if test != "contrast" else {}),
        "over": "parameters",
        "declared": declared,
        "sizes": [{"member": one.member, "parameters": one.m.parameters} for one in known],
        "smallest_detectable": found.smallest_detectable,
    }
