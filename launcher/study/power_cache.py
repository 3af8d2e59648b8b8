"""Simulated power, kept in the user's cache: the same assignment, test and assumptions have the
same power whatever the run is called and wherever it lies.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import motet
from motet.core.cache import cache_file, recall, remember
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.analysis import simulation
from motet.experiments.analysis.declared import primary_of, treatment_values
from motet.experiments.analysis.power import Assumed, power
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Question
from motet.experiments.design.frozen import judging_sha256
from motet.experiments.stream.random import name_key


def power_of(
    question: Question, seed: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any]:
    """Return `analysis.power.power` of an assigned question, from the cache where it is there.

    Args:
        question: with its assignment.
        seed: of the run.
        draws: repetitions of the analysis.
        alpha: level of its test.
        assumed: what nothing is known of yet.
    """
    file = _file(question, seed, draws, alpha, assumed)
    kept: dict[str, Any] | None = recall(file)
    if kept is not None:
        return kept
    key = name_key(seed, "analysis", question.name)
    draws = min(draws, simulation.repetitions(alpha))
    repeater = Repeater(question.design, question.arms, key, draws)
    found = power(question.experiment, repeater, alpha, assumed)
    remember(file, found)
    return found


def kept_power(
    question: Question, seed: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any] | None:
    """Return what `power_of` kept for these arguments; None where it was never asked."""
    kept: dict[str, Any] | None = recall(_file(question, seed, draws, alpha, assumed))
    return kept


def _file(question: Question, seed: int, draws: int, alpha: float, assumed: Assumed) -> Path:
    key = name_key(seed, "analysis", question.name)
    draws = min(draws, simulation.repetitions(alpha))
    asked = _asked(question, key, draws, alpha, assumed)
    return cache_file("power", sha256_hex(canonical_json(asked)))


def _asked(
    question: Question, key: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any]:
    """Everything that the figures depend on, the code's own text included."""
    design, outcome = question.design, primary_of(question.experiment)
    scores = treatment_values(question.experiment, outcome)
    arrays = (
        design.cluster_of_unit,
        design.block_of_cluster,
        design.cluster_keys,
        question.arms,
        scores,
    )
    return {
        "motet": motet.__version__,
        "code": judging_sha256(),
        "design": [sha256_hex(array.tobytes()) for array in arrays],
        "test": question.spec.test,
        "weights": list(design.weights),
        "outcome": asdict(outcome),
        "key": key,
        "draws": draws,
        "alpha": alpha,
        "assumed": asdict(assumed),
        "simulations": simulation.SIMULATIONS,
    }
