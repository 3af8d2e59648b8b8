"""How small an effect a run can find, before any training, from stated assumptions.

The run's own assignment and test are simulated (`simulation`), no formula is asked: blocks, unequal
clusters, several arms, ties and the ends of the possible range all cost power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.format import percent
from motet.experiments.analysis.arm_studies import ArmStudies
from motet.experiments.analysis.declared import comparison_of, primary_of, unit_effect
from motet.experiments.analysis.estimates import POWER, Comparison
from motet.experiments.analysis.marginals import Marginal, latent_correlation
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.simulation import Studies, enough, repetitions_in_all
from motet.experiments.design.declared import declared_test
from motet.experiments.design.experiment import Experiment
from motet.experiments.stream.random import name_key
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
CLEAR, CLEAR_STUDIES, FEWEST_CLEAR = 2.0, 100, 16


@dataclass(frozen=True)
class Assumed:
    """What has to be assumed before anything is measured.

    icc: correlation between the outcomes of two units of a cluster; 1 = they agree completely.
    baseline_correlation: of the outcome and its value before any exposure, in held-out units; what
    of the outcome was there before is taken out by the analysis.
    """

    icc: float = 1.0
    baseline_correlation: float = 0.0


def power(
    experiment: Experiment,
    repeater: Repeater,
    alpha: float = 0.05,
    assumed: Assumed | None = None,
    simulations: int | None = None,
) -> dict[str, Any]:
    """Smallest effect on the primary outcome that this assignment finds with 80 % power, two-sided.

    Args:
        experiment: with its outcomes.
        repeater: its actual assignment, and how that is repeated.
        alpha: level of the test.
        assumed: what nothing is known of yet.
        simulations: how many studies; None = enough of them.

    Returns:
        the `power` fields of the report: `smallest_detectable` in the outcome's unit where that
        is known beforehand (a share from its chance rate; canary exposure from its null
        distribution), else None; `standardized` in standard deviations between units (Cohen's h
        for shares); `possible`, whether any possible effect is found so often; `at_largest`, the
        power at the largest effect that is possible; `assumption`, in words.
    """
    assumed = assumed or Assumed()
    outcome = primary_of(experiment)
    comparison = simulated_comparison(experiment, outcome, repeater, alpha, simulations)
    result: dict[str, Any] = {
        "smallest_detectable": None,
        "unit": outcome.unit,
        "standardized": None,
        "power": POWER,
        "alpha": alpha,
        "possible": False,
        "at_largest": 0.0,
    }
    if comparison is None:
        return result | {"assumption": "a group has no unit, so no effect can be found"}
    marginal = expected(outcome)
    studies = _studies(experiment, comparison, repeater, alpha, assumed, simulations)
    size, at_largest = studies.smallest(marginal)
    result |= {"possible": size is not None, "at_largest": at_largest}
    result["assumption"] = _said(comparison, outcome, assumed, size, at_largest)
    if declared_test(experiment, outcome) == "omnibus":
        result["assumption"] += "; an effect of one arm alone, the smallest, all arms tested"
    if size is not None:
        result["standardized"] = _standardized(outcome, marginal, size)
        if outcome.chance is not None or marginal.values is not None:
            result["smallest_detectable"] = size
    return result


def power_at_largest(
    experiment: Experiment,
    repeater: Repeater,
    alpha: float,
    assumed: Assumed | None = None,
    simulations: int | None = None,
) -> float:
    """Share of simulated runs that find the largest effect that is possible: a design that misses
    even that in many of them can find nothing.

    One size is simulated, so it takes a fraction of `power`'s time; arguments as there. 0 where a
    group has no unit.
    """
    outcome = primary_of(experiment)
    comparison = simulated_comparison(experiment, outcome, repeater, alpha, simulations)
    if comparison is None:
        return 0.0
    known = assumed or Assumed()
    studies = _studies(experiment, comparison, repeater, alpha, known, simulations)
    marginal = expected(outcome)
    return studies.power(marginal, studies.largest_shift(marginal))


def clearly_found(
    experiment: Experiment, repeater: Repeater, alpha: float, assumed: Assumed
) -> bool:
    """Whether the largest possible effect is so large that no assignment need be repeated to know
    that it is found: the squared statistic of every simulated study is at least CLEAR times what a
    normal distribution asks for, with FEWEST_CLEAR clusters or more on either side.

    Few clusters have heavier tails, so there, and where it is not so clear, False: simulate.
    """
    outcome = primary_of(experiment)
    if declared_test(experiment, outcome) == "omnibus":
        return False
    comparison = comparison_of(experiment, outcome, repeater.first(1))
    if comparison is None or fewest_clusters(comparison) < FEWEST_CLEAR:
        return False
    studies = _studies(experiment, comparison, repeater, alpha, assumed, CLEAR_STUDIES)
    marginal = expected(outcome)
    normal = NormalDist().inv_cdf(alpha / 2) ** 2
    return studies.actual(marginal, studies.largest_shift(marginal)) >= CLEAR * normal


def fewest_clusters(comparison: Comparison) -> int:
    """Clusters on the smaller of the two sides, with a treatment above 0 and without."""
    treated = comparison.score[comparison.arms] > 0
    return min(len(np.unique(comparison.clusters[side])) for side in (treated, ~treated))


def simulated_comparison(
    experiment: Experiment,
    outcome: OutcomeSpec,
    repeater: Repeater,
    alpha: float,
    simulations: int | None = None,
) -> Comparison | None:
    """What the declared test compares, with as many repetitions as all parts of a simulation need;
    None when a group has no unit.
    """
    studies = enough(outcome.binary) if simulations is None else simulations
    size = (len(repeater.arms_U), repeater.design.n_clusters, studies)
    count = repetitions_in_all(alpha, repeater.draws, *size)
    found = comparison_of(experiment, outcome, repeater.first(count))
    return None if found is None else replace(found, draws=found.draws[:count])


def _studies(
    experiment: Experiment,
    comparison: Comparison,
    repeater: Repeater,
    alpha: float,
    assumed: Assumed,
    simulations: int | None,
) -> Studies:
    """The simulated studies of the declared test."""
    outcome = primary_of(experiment)
    latent, key = _latent(assumed, outcome, expected(outcome)), name_key(repeater.key, "power")
    count = enough(outcome.binary) if simulations is None else simulations
    if declared_test(experiment, outcome) == "omnibus":
        alone = unit_effect(experiment, outcome)
        return ArmStudies(comparison, alone, alpha, *latent, key, None, count, repeater.draws)
    return Studies(comparison, alpha, *latent, key, None, count, draws=repeater.draws)


def expected(outcome: OutcomeSpec) -> Marginal:
    """What a unit's outcome looks like without an effect, as far as its class says; in standard
    deviations where that says nothing.
    """
    if outcome.binary and outcome.chance is not None:
        # A chance of nothing at all (extraction) leaves nothing to compare: one in 1,000.
        return Marginal(share=min(max(outcome.chance, 0.001), 0.999))
    if outcome.null_values is not None:
        values = np.sort(np.array(outcome.null_values, dtype=np.float64))
        low, high = possible_range(outcome)
        return Marginal(values=values, low=low, high=high)
    if outcome.null_sd is not None:
        from scipy.special import ndtri

        grid = ndtri((np.arange(1000) + 0.5) / 1000)
        return Marginal(values=grid * (outcome.null_sd / grid.std()))
    return Marginal()


def possible_range(outcome: OutcomeSpec) -> tuple[float, float]:
    """The ends of an outcome's possible range, infinite where there is none."""
    low, high = outcome.range
    return -math.inf if low is None else low, math.inf if high is None else high


def _latent(
    assumed: Assumed, outcome: OutcomeSpec, marginal: Marginal
) -> tuple[float, float | None]:
    """(icc, correlation with the covariate) of the normal values behind the outcome."""
    icc, correlation = assumed.icc, assumed.baseline_correlation
    if marginal.share is not None:
        share = float(np.mean(marginal.share))
        icc = latent_correlation(icc, share)
        correlation = math.copysign(latent_correlation(abs(correlation), share), correlation)
    return icc, None if outcome.baseline == "" else correlation


def _standardized(outcome: OutcomeSpec, marginal: Marginal, size: float) -> float:
    if marginal.share is not None:
        share = float(np.mean(marginal.share))
        ends = [2 * math.asin(math.sqrt(min(1.0, x))) for x in (share, share + size)]
        return ends[1] - ends[0]
    return size if marginal.values is None else size / float(marginal.values.std())


def _said(
    comparison: Comparison,
    outcome: OutcomeSpec,
    assumed: Assumed,
    size: float | None,
    at_largest: float,
) -> str:
    """The assumptions in words, and that no effect can be found where that is so."""
    treated = comparison.score[comparison.arms] > 0
    counts = [len(np.unique(comparison.clusters[side])) for side in (treated, ~treated)]
    text = f"simulated on this run's own assignment: {counts[0]} treated and {counts[1]} control "
    text += "clusters"
    if (blocks := len(np.unique(comparison.blocks))) > 1:
        text += f" in {blocks} blocks"
    if len(np.unique(comparison.clusters)) < len(comparison.units):
        text += f"; correlation within clusters {assumed.icc:g}"
    if outcome.baseline != "":
        text += f"; correlation with the value before exposure {assumed.baseline_correlation:g}"
    if outcome.binary and outcome.chance is not None:
        text += f"; control group at {percent(outcome.chance)}"
    elif outcome.null_values is not None:
        text += "; ranks among references as by chance in the control group"
    elif outcome.null_sd is not None:
        text += f"; standard deviation {outcome.null_sd:.2f} as without effect"
    if len(np.unique(comparison.score[comparison.arms])) > 2:
        text += "; the effect is per doubling of 1 + dose"
    if size is None:
        text += (
            "; no possible effect is found in 80 % of runs "
            f"(the largest: {percent(at_largest)}): more units, clusters or larger blocks, or "
            "fewer arms, are needed"
        )
    return text
