"""The one place that knows how the declared test is made: report, negative control and power ask
here.

Shapes: U units.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison, Estimate, estimate
from motet.experiments.analysis.omnibus import omnibus
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.declared import declared_test
from motet.experiments.design.experiment import Experiment
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]


def primary_of(experiment: Experiment) -> OutcomeSpec:
    """The one primary outcome."""
    return next(outcome for outcome in experiment.outcomes if outcome.primary)


def group_scores(experiment: Experiment, outcome: OutcomeSpec) -> F64:
    """Per arm 1 (treated), 0 (control) or NaN (takes no part in this outcome's comparison)."""
    arms = experiment.spec.arms
    if outcome.contrast is None:
        return np.array([0.0 if arm.is_control else 1.0 for arm in arms])
    treated, control = outcome.contrast
    return np.array(
        [1.0 if arm.name in treated else 0.0 if arm.name in control else np.nan for arm in arms]
    )


def treatment_values(experiment: Experiment, outcome: OutcomeSpec) -> F64:
    """The treatment's value in every arm, float64 [arms], as the declared test takes it.

    contrast: 1, 0 or NaN. trend: log2(1 + dose). omnibus: 0 for the control, then 1, 2, ... for the
    arms with a dose: names of groups, not amounts.
    """
    test, scores = declared_test(experiment, outcome), group_scores(experiment, outcome)
    if test == "trend":
        return np.log2(1 + np.array(experiment.spec.doses, dtype=np.float64))
    return np.cumsum(scores) * scores if test == "omnibus" else scores


def comparison_of(
    experiment: Experiment, outcome: OutcomeSpec, repeater: Repeater
) -> Comparison | None:
    """What the declared test compares; None when a group has no unit."""
    values = treatment_values(experiment, outcome)
    if declared_test(experiment, outcome) == "contrast":
        return repeater.groups(values)
    return repeater.whole(values)


def estimate_by(
    test: str,
    values_U: F64,
    covariate_U: F64 | None,
    comparison: Comparison,
    alpha: float,
    detect_alpha: float | None = None,
) -> Estimate:
    """Estimate by one of the tests, with the comparison that `comparison_of` gave.

    The effect of a trend is per doubling of 1 + dose. That of an omnibus test is None: its effects
    are in `arms`.
    """
    run = omnibus if test == "omnibus" else estimate
    return run(values_U, covariate_U, comparison, alpha, detect_alpha)


def unit_effect(experiment: Experiment, outcome: OutcomeSpec) -> F64:
    """What an effect of 1 adds to the units of every arm, float64 [arms]: the alternative that the
    power of the declared test is asked for.

    contrast: 1 in every arm with a dose. trend: 1 per doubling of 1 + dose. omnibus: 1 in one arm
    alone, that with the fewest units, and nothing in the others.
    """
    values = np.nan_to_num(treatment_values(experiment, outcome))
    if declared_test(experiment, outcome) != "omnibus":
        return values
    weights = np.array([arm.weight for arm in experiment.spec.arms], dtype=np.float64)
    alone = np.zeros(len(values))
    alone[int(np.argmin(np.where(values > 0, weights, np.inf)))] = 1.0
    return alone
