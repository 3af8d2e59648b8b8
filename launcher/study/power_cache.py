"""Simulated power, kept in the user's cache: the same assignment, test and assumptions have the
same power whatever the run is called and wherever it lies.

One small JSON file each in `$XDG_CACHE_HOME/motet/power` (`~/.cache/motet/power`); any may be
deleted at any time, and a cache that cannot be written only costs the seconds again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import motet
from motet.core.files import atomic_write
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.analysis import arm_studies, simulation, wald
from motet.experiments.analysis import power as power_module
from motet.experiments.analysis.declared import primary_of, treatment_values
from motet.experiments.analysis.power import Assumed, power
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Question
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
    kept = kept_power(question, seed, draws, alpha, assumed)
    if kept is not None:
        return kept
    key = name_key(seed, "analysis", question.name)
    file = _file(question, seed, draws, alpha, assumed)
    draws = min(draws, simulation.repetitions(alpha))
    repeater = Repeater(question.design, question.arms, key, draws)
    found = power(question.experiment, repeater, alpha, assumed)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(found))
    except OSError:
        pass  # a home that cannot be written
    return found


def kept_power(
    question: Question, seed: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any] | None:
    """Return what `power_of` kept for these arguments; None where it was never asked."""
    try:
        text = _file(question, seed, draws, alpha, assumed).read_text(encoding="utf-8")
        kept: dict[str, Any] = json.loads(text)
        return kept
    except (OSError, ValueError):
        return None


def _file(question: Question, seed: int, draws: int, alpha: float, assumed: Assumed) -> Path:
    key = name_key(seed, "analysis", question.name)
    draws = min(draws, simulation.repetitions(alpha))
    asked = _asked(question, key, draws, alpha, assumed)
    return cache_folder() / f"{sha256_hex(canonical_json(asked))}.json"


def cache_folder() -> Path:
    """Return where figures are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "motet" / "power"


def _asked(
    question: Question, key: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any]:
    """Everything that the figures depend on, the code's own text included."""
    design, outcome = question.design, primary_of(question.experiment)
    scores = treatment_values(question.experiment, outcome)
    modules = (power_module, simulation, arm_studies, wald)
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    arrays = (
        design.cluster_of_unit,
        design.block_of_cluster,
        design.cluster_keys,
        question.arms,
        scores,
    )
    return {
        "motet": motet.__version__,
        "code": sha256_hex(b"".join(sources)),
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
