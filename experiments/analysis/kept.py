"""Simulated figures, kept in the user's cache: the same assignment, test, assumptions and scores
have the same power, whatever the run is called and wherever it lies.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import motet
from motet.core.cache import cache_file, recall, remember
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.analysis.declared import primary_of, treatment_values, unit_effect
from motet.experiments.analysis.detectable import Detectable, detectable
from motet.experiments.analysis.estimates import Comparison, Estimate
from motet.experiments.analysis.power import Assumed, power, simulated_comparison
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.simulation import enough
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.frozen import judging_sha256
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]


def known_power(
    experiment: Experiment,
    repeater: Repeater,
    alpha: float,
    assumed: Assumed,
    simulations: int | None = None,
) -> dict[str, Any]:
    """`power` of an assigned experiment, from the cache where it is there and no number of studies
    is asked for; nothing for none.
    """
    if simulations is not None:
        return power(experiment, repeater, alpha, assumed, simulations) if simulations else {}
    found = kept_power(experiment, repeater, alpha, assumed)
    if found is None:
        found = power(experiment, repeater, alpha, assumed)
        remember(_power_file(experiment, repeater, alpha, assumed), found)
    return found


def kept_power(
    experiment: Experiment, repeater: Repeater, alpha: float, assumed: Assumed
) -> dict[str, Any] | None:
    """What `known_power` kept for these arguments; None where it was never asked."""
    kept: dict[str, Any] | None = recall(_power_file(experiment, repeater, alpha, assumed))
    return kept


def _power_file(experiment: Experiment, repeater: Repeater, alpha: float, assumed: Assumed) -> Path:
    design, outcome = repeater.design, primary_of(experiment)
    arrays = (
        design.cluster_of_unit,
        design.block_of_cluster,
        design.cluster_keys,
        repeater.arms_U,
        treatment_values(experiment, outcome),
    )
    return _file(
        "power",
        outcome,
        arrays,
        {
            "test": experiment.spec.test,
            "weights": list(design.weights),
            "key": repeater.key,
            "draws": repeater.draws,
            "alpha": alpha,
            "assumed": asdict(assumed),
        },
    )


def detectable_of(
    experiment: Experiment,
    repeater: Repeater,
    outcome: OutcomeSpec,
    values: F64,
    covariate: F64 | None,
    found: Estimate,
    alpha: float,
    key: int,
    simulations: int | None,
) -> Detectable:
    """What the declared test of an outcome would have found: `known_detectable` of its comparison,
    with as many repetitions as a simulation needs. Nothing where a group has no unit.
    """
    comparison = simulated_comparison(experiment, outcome, repeater, alpha, simulations)
    if comparison is None:
        return Detectable(None)
    alone = unit_effect(experiment, outcome) if found.arms else None
    how = (alpha, key, simulations, alone, repeater.draws)
    return known_detectable(outcome, values, covariate, comparison, found, *how)


def known_detectable(
    outcome: OutcomeSpec,
    values: F64,
    covariate: F64 | None,
    comparison: Comparison,
    found: Estimate,
    alpha: float,
    key: int,
    simulations: int | None = None,
    alone: F64 | None = None,
    draws: int | None = None,
) -> Detectable:
    """`detectable`, from the cache where it is there and no number of studies is asked for."""
    how = (alpha, key, simulations, alone, draws)
    if simulations is not None or not found.answered:
        return detectable(outcome, values, covariate, comparison, found, *how)
    none = np.empty(0)
    arrays = (
        values,
        covariate if covariate is not None and found.adjusted else none,
        none if alone is None else alone,
        comparison.units,
        comparison.score,
        comparison.arms,
        comparison.draws,
        comparison.blocks,
        comparison.clusters,
    )
    file = _file("detectable", outcome, arrays, {"alpha": alpha, "key": key, "draws": draws})
    with contextlib.suppress(TypeError, ValueError, KeyError):  # damaged
        if (kept := recall(file)) is not None:
            return Detectable(kept["size"], None if kept["power"] is None else tuple(kept["power"]))
    made = detectable(outcome, values, covariate, comparison, found, *how)
    remember(file, asdict(made))
    return made


def _file(
    kind: str, outcome: OutcomeSpec, arrays: tuple[npt.NDArray[Any], ...], more: dict[str, Any]
) -> Path:
    """Where a figure is kept, by everything that it depends on, the code's own text included."""
    asked = {
        "motet": motet.__version__,
        "code": judging_sha256(),
        "outcome": asdict(outcome),
        "arrays": [sha256_hex(np.ascontiguousarray(array).tobytes()) for array in arrays],
        "simulations": enough(outcome.binary),
        **more,
    }
    return cache_file(kind, sha256_hex(canonical_json(asked)))
