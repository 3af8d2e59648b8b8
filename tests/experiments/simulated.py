"""Experiments as they are after training, with scores from a formula instead of a model.

Real classes, units and assignment; deterministic on every machine and with every numpy, because
`RandomState` is the one generator whose stream numpy promises to keep.

Shapes: U units, I probe items (in the order of units, then of each unit's items).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from motet.experiments.analysis.measured import Measured
from motet.experiments.design.assignment import Design, assign, assignment_key, make_design
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import I64, ItemScores, Unit

STEPS_TOTAL = 2000


def as_it_is(units: list[Unit]) -> list[Unit]:
    """Leave the units alone."""
    return units


def dealt(
    entry: dict[str, Any], seed: int, edit: Callable[[list[Unit]], list[Unit]] = as_it_is
) -> tuple[Experiment, list[Unit], Design, I64, I64]:
    """An experiment from its entry in run.yaml, its units, their design and arms, and how often
    each is to be shown.
    """
    specs, problems = parse_experiments([entry], Path(), Library(Path()))
    assert not problems, problems
    spec = specs[0]
    experiment = LIBRARY[spec.use](spec)
    units = edit(experiment.units())
    design = make_design(units, spec.arms)
    arms = assign(design, assignment_key(seed, spec.name))
    doses = np.array([arm.dose for arm in spec.arms], dtype=np.int64)[arms]
    planned = doses if experiment.inserts_units else np.zeros_like(doses)
    return experiment, units, design, arms, planned


def simulated(
    entry: dict[str, Any],
    gain: Callable[[int], float],
    seed: int = 0,
    edit: Callable[[list[Unit]], list[Unit]] = as_it_is,
) -> Measured:
    """One experiment of a run of 2,000 steps in which every planned exposure was consumed.

    Args:
        entry: its entry in run.yaml.
        gain: log-probability (nats) that a unit's own right answers have gained once its text was
            shown so many times.
        seed: of the run and of the scores.
        edit: gives the units other clusters or blocks.
    """
    experiment, units, design, arms, planned = dealt(entry, seed, edit)
    schedule = experiment.spec.schedule.resolve(STEPS_TOTAL)
    start = int(schedule.first_step(STEPS_TOTAL))
    gap = int(schedule.every) if schedule.kind == "every" else 10
    shown = [start + gap * np.arange(count, dtype=np.int64) for count in planned]
    steps = np.array(sorted(experiment.probe_steps(STEPS_TOTAL)), dtype=np.int64)
    scores = _scores(units, steps, shown, gain, np.random.RandomState([seed, 12]))
    return Measured(
        experiment, units, arms, None, design, steps, scores, planned, planned.copy(), shown
    )


def _scores(
    units: list[Unit],
    steps: np.ndarray,
    shown: list[np.ndarray],
    gain: Callable[[int], float],
    rng: np.random.RandomState,
) -> list[ItemScores]:
    """Difficulty of units and items that lasts, noise that does not, and the gain of exposures."""
    unit_I = np.repeat(np.arange(len(units)), [len(unit.items) for unit in units])
    kinds = [item.kind for unit in units for item in unit.items]
    right_I = np.array(["reference" not in kind and kind != "wrong" for kind in kinds])
    n_tokens = rng.randint(3, 12, size=len(units))[unit_I].astype(np.int64)
    n_bytes = n_tokens + rng.randint(1, 9, size=len(unit_I)).astype(np.int64)
    lasting_I = rng.normal(0, 1.5, len(unit_I)) - rng.exponential(1.0, len(units))[unit_I]
    found = []
    for step in steps:
        seen = [int((when < step).sum()) for when in shown]
        gain_I = np.array([gain(count) for count in seen])[unit_I] * right_I
        noise_I = rng.gumbel(0, 0.5, len(unit_I)) + rng.normal(0, 0.5, len(units))[unit_I]
        logprob_I = lasting_I + noise_I + gain_I - 2.0 * n_tokens
        greedy_I = logprob_I > 1.0 - 2.0 * n_tokens
        found.append(ItemScores(logprob_I, n_tokens, n_bytes, greedy_I))
    return found
