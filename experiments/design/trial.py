"""A user's own class is tried on invented scores before training: what would fail in the report
fails here, as one error with file and line.

Built-in classes are held to the same by tests, and are not tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from motet.core.errors import Problem
from motet.core.plugins import PluginError, fault, is_plugin, mistakes_of
from motet.experiments.design.assignment import Question
from motet.experiments.types import F64, ItemScores, OutcomeSpec


def trial_problems(question: Question, steps_total: int) -> list[Problem]:
    """Return what is wrong with outcomes, probes and measures of a user's class; [] for others."""
    kind, where = type(question.experiment), f"experiments.{question.name}.use"
    if not is_plugin(kind):
        return []
    try:
        with mistakes_of(kind, where):
            wrong = _wrong(question, steps_total)
    except PluginError as error:
        return [error.problem]
    return [fault(kind, where, wrong).problem] if wrong else []


def _wrong(question: Question, steps_total: int) -> str | None:
    experiment, units = question.experiment, question.units
    outcomes = tuple(experiment.outcomes)
    if not all(isinstance(outcome, OutcomeSpec) for outcome in outcomes):
        return f"has outcomes={outcomes!r:.80}; they must be OutcomeSpec"
    names = [outcome.name for outcome in outcomes]
    primary = sum(outcome.primary for outcome in outcomes)
    if primary != 1 or len(set(names)) < len(names):
        return f"has outcomes {', '.join(names)}, {primary} of them primary; one must be"
    steps = sorted(experiment.probe_steps(steps_total))
    if not all(isinstance(step, int) and 0 <= step <= steps_total for step in steps):
        return f"has probe_steps {steps!r:.80}; they must be whole numbers from 0 to {steps_total}"
    series = experiment.measure(units, _invented(question))
    if message := _unlike(series, len(units), (), "measure"):
        return message
    rows = np.array([0, steps_total], dtype=np.int64)
    over_time = {name: np.stack([values, values]) for name, values in series.items()}
    none_shown = [np.empty(0, dtype=np.int64) for _ in units]
    final = experiment.summarize(units, question.arms, rows, over_time, none_shown)
    return _unlike(final, len(units), names, "summarize")


def _invented(question: Question) -> ItemScores:
    """Scores as of a model that gives every target one nat per token, each of one token."""
    count = sum(len(unit.items) for unit in question.units)
    return ItemScores(
        logprob=np.full(count, -1.0),
        n_tokens=np.ones(count, dtype=np.int64),
        n_bytes=np.ones(count, dtype=np.int64),
        greedy=np.zeros(count, dtype=bool),
    )


def _unlike(values: Any, n_units: int, names: list[str] | tuple[()], method: str) -> str | None:
    """Say how the answer of a method differs from {name: one number per unit}."""
    if not isinstance(values, dict):
        return f"gives {type(values).__name__} from {method}; it must be {{name: one per unit}}"
    if lacking := [name for name in names if name not in values]:
        return f"gives no {', '.join(lacking)} from {method}; every outcome needs one per unit"
    for name, column in values.items():
        array: F64 = np.asarray(column)
        if array.shape != (n_units,) or array.dtype.kind not in "fiub":
            shape, wanted = f"{array.dtype} {list(array.shape)}", f"{n_units} numbers"
            return f"gives {name} of {shape} from {method}; it must be {wanted}, one per unit"
    return None
