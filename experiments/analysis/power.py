"""How small an effect a design can find, before any training.

The formula treats a cluster as one observation (units of a cluster may agree completely), which is
exact for clusters of one and cautious otherwise. `simulated_power` asks the real assignment and the
real test instead.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.declared import group_scores, primary_of
from motet.experiments.analysis.estimates import POWER, Comparison, estimate
from motet.experiments.design.assignment import Design, assign_many
from motet.experiments.design.declared import declared_test
from motet.experiments.design.experiment import Experiment
from motet.experiments.stream.random import name_key
from motet.experiments.types import Unit

F64 = npt.NDArray[np.float64]
LARGEST_STANDARDIZED = 100.0


def power(
    experiment: Experiment, units: list[Unit], design: Design, alpha: float = 0.05
) -> dict[str, Any]:
    """Smallest effect on the primary outcome that is found with 80 % power, two-sided.

    Returns the `power` fields of the report: `smallest_detectable` in the outcome's unit where that
    is known beforehand (a share from its chance rate; canary exposure from its null distribution),
    else None; `standardized` in standard deviations between units (Cohen's h for shares).
    """
    outcome = primary_of(experiment)
    scores = group_scores(experiment, outcome)
    weights = np.array(design.weights, dtype=np.float64)
    share = weights / weights.sum()
    n_control = design.n_clusters * float(share[scores == 0].sum())
    n_treated = design.n_clusters * float(share[scores == 1].sum())
    size = smallest_standardized(n_control, n_treated, alpha, outcome.binary)
    groups = f"{n_treated:.0f} treated and {n_control:.0f} control clusters, two-sided test"
    result: dict[str, Any] = {
        "smallest_detectable": None,
        "unit": outcome.unit,
        "standardized": size,
        "power": POWER,
        "alpha": alpha,
        "assumption": f"{groups}; a cluster counts as one observation; no covariate",
    }
    if (test := declared_test(experiment, outcome)) != "contrast":
        result |= {"standardized": None, "assumption": f"unknown for test: {test}"}
    elif size is None:
        result["assumption"] = f"{groups}: too few for any effect to be found"
    elif outcome.binary and outcome.chance is not None:
        result["smallest_detectable"] = share_difference(outcome.chance, size)
        result["assumption"] += f"; control group at {outcome.chance:.0%}"
    elif outcome.null_sd is not None:
        result["smallest_detectable"] = size * outcome.null_sd
        result["assumption"] += f"; standard deviation {outcome.null_sd:.2f} as without effect"
    return result


def smallest_standardized(
    n_control: float, n_treated: float, alpha: float, binary: bool = False
) -> float | None:
    """Cohen's d (t-test) or h (normal approximation, shares) found with 80 % power, or None."""
    from scipy.optimize import brentq
    from statsmodels.stats.power import NormalIndPower, TTestIndPower

    if min(n_control, n_treated) < 1 or n_control + n_treated < 3:
        return None
    design = NormalIndPower() if binary else TTestIndPower()

    def lacking(effect: float) -> float:
        ratio = n_treated / n_control
        found = float(design.power(effect, n_control, alpha, ratio))
        if math.isnan(found):  # scipy's far tail of a large effect, which adds nothing to the near
            found = float(design.power(effect, n_control, alpha / 2, ratio, alternative="larger"))
        return found - POWER

    upper = 0.05
    while not lacking(upper) > 0:
        upper *= 1.5
        if upper > LARGEST_STANDARDIZED:
            return None
    return float(brentq(lacking, 1e-6, upper))


def share_difference(chance: float, h: float) -> float | None:
    """The difference from a share of `chance` that is Cohen's h; None if it would pass 100 %."""
    angle = math.asin(math.sqrt(chance)) + h / 2
    return math.sin(angle) ** 2 - chance if angle <= math.pi / 2 else None


def simulated_power(
    experiment: Experiment,
    design: Design,
    effect_sd: float,
    alpha: float = 0.05,
    simulations: int = 500,
    draws: int = 999,
    key: int = 0,
    within_cluster: float = 1.0,
) -> float:
    """Share of simulated studies whose randomization test rejects, with this design's assignment.

    Outcomes are normal with variance 1 between units, of which the share `within_cluster` belongs
    to the cluster; treatment adds `effect_sd`.
    """
    scores = group_scores(experiment, primary_of(experiment))
    everyone = np.arange(len(design.cluster_of_unit))
    blocks = design.block_of_cluster[design.cluster_of_unit]
    null = assign_many(design, name_key(key, "null"), draws)
    actual = assign_many(design, name_key(key, "actual"), simulations)
    rng = np.random.Generator(np.random.Philox(key=key))
    rejected = 0
    for arms in actual:
        cluster_part = rng.normal(size=design.n_clusters)[design.cluster_of_unit]
        unit_part = rng.normal(size=len(everyone))
        noise = math.sqrt(within_cluster) * cluster_part + math.sqrt(1 - within_cluster) * unit_part
        treated = np.nan_to_num(scores[arms])
        comparison = Comparison(
            everyone,
            np.nan_to_num(scores),
            arms.astype(np.int64),
            null,
            blocks,
            design.cluster_of_unit,
        )
        rejected += estimate(noise + effect_sd * treated, None, comparison, alpha).p <= alpha
    return rejected / simulations
