"""What a user's own class gives is held to what is asked of it: on invented scores before training,
where what would fail in the report fails as one error with file and line, and with true scores
whenever it is asked again.

Built-in classes are held to the same by tests, and are not tried.

Shapes: U units, I probe items, S probe steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from motet.core.errors import Problem
from motet.core.plugins import PluginError, fault, is_plugin, mistakes_of
from motet.core.sealed import sealed
from motet.experiments.design.assignment import Question
from motet.experiments.design.experiment import Experiment
from motet.experiments.types import F64, I64, Generated, ItemScores, OutcomeSpec, Unit


def series_of(experiment: Experiment, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
    """Return what `measure` makes of the scores of one probe step, {series: float64 [U]}.

    Raises:
        PluginError: a mistake in a user's own class.
    """
    kind, where = type(experiment), _where(experiment)
    if not is_plugin(kind):
        return experiment.measure(units, scores)
    with mistakes_of(kind, where), sealed():
        found = experiment.measure(list(units), _read_only(scores))
    return _columns(kind, where, found, len(units), (), "measure")


def final_of(
    experiment: Experiment,
    units: Sequence[Unit],
    arms: I64,
    steps: I64,
    series: Mapping[str, F64],
    exposure_steps: Sequence[I64],
) -> dict[str, F64]:
    """Return what `summarize` makes of all series, {outcome: float64 [U]}.

    Raises:
        PluginError: a mistake in a user's own class.
    """
    kind, where = type(experiment), _where(experiment)
    if not is_plugin(kind):
        return experiment.summarize(units, arms, steps, series, exposure_steps)
    with mistakes_of(kind, where), sealed():
        names = [outcome.name for outcome in experiment.outcomes]
        found = experiment.summarize(list(units), arms, steps, series, exposure_steps)
    return _columns(kind, where, found, len(units), names, "summarize")


def trial_problems(question: Question, steps_total: int) -> list[Problem]:
    """Return what is wrong with outcomes, probes and measures of a user's class; [] for others."""
    experiment = question.experiment
    kind, where = type(experiment), _where(experiment)
    if not is_plugin(kind):
        return []
    try:
        with mistakes_of(kind, where):
            if wrong := _declared_wrong(question, steps_total):
                raise fault(kind, where, wrong)
        _try(question, steps_total)
    except PluginError as error:
        return [error.problem]
    return []


def _where(experiment: Experiment) -> str:
    return f"experiments.{experiment.spec.name}.use"


def _declared_wrong(question: Question, steps_total: int) -> str | None:
    """Say what is wrong with the outcomes and the probe steps."""
    experiment = question.experiment
    outcomes = experiment.outcomes
    good = isinstance(outcomes, (tuple, list))
    if not good or not all(isinstance(outcome, OutcomeSpec) for outcome in outcomes):
        return f"has outcomes={outcomes!r:.80}; they must be a tuple of OutcomeSpec"
    arms = {arm.name for arm in question.spec.arms}
    for outcome in outcomes:
        if wrong := _outcome_wrong(outcome, arms):
            return f"has outcome {outcome.name!r} with {wrong}"
    names = [outcome.name for outcome in outcomes]
    primary = sum(outcome.primary for outcome in outcomes)
    if primary != 1 or len(set(names)) < len(names):
        return f"has outcomes {', '.join(names)}, {primary} of them primary; one must be"
    steps = experiment.probe_steps(steps_total)
    good = isinstance(steps, (set, frozenset)) and all(type(step) is int for step in steps)
    if not good or not all(0 <= step <= steps_total for step in steps):
        message = f"they must be a set of whole numbers from 0 to {steps_total}"
        return f"has probe_steps {steps!r:.80}; {message}"
    if steps_total not in steps:
        return f"has probe_steps without the last one, {steps_total}; its answer is read there"
    return None


def _outcome_wrong(outcome: OutcomeSpec, arms: set[str]) -> str | None:
    """Say what is wrong with one outcome."""
    for name in ("name", "label", "unit", "higher_is"):
        if not isinstance(value := getattr(outcome, name), str):
            return f"{name}={value!r:.60}; it must be text"
    for name in ("binary", "primary", "secondary"):
        if not isinstance(value := getattr(outcome, name), bool):
            return f"{name}={value!r:.60}; it must be True or False"
    chance, deviation = outcome.chance, outcome.null_sd
    if chance is not None and not (_is_number(chance) and 0 <= chance <= 1):
        return f"chance={chance!r:.60}; it must be None or a share between 0 and 1"
    if deviation is not None and not (_is_number(deviation) and 0 < deviation < np.inf):
        return f"null_sd={deviation!r:.60}; it must be None or a number above 0"
    if outcome.baseline is not None and not isinstance(outcome.baseline, str):
        return f"baseline={outcome.baseline!r:.60}; it must be None or the name of a series"
    sides = outcome.contrast
    if sides is None:
        return None
    pair = isinstance(sides, (tuple, list)) and len(sides) == 2
    if not pair or not all(isinstance(side, (tuple, list)) and arms & {*side} for side in sides):
        known = ", ".join(sorted(arms))
        return f"contrast={sides!r:.60}; it must be ((treated arms), (control arms)) of {known}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _try(question: Question, steps_total: int) -> None:
    """Measure and summarize invented scores; PluginError when that fails."""
    experiment, units = question.experiment, question.units
    if any(item.max_tokens for unit in units for item in unit.items):
        series_of(experiment, units, _invented(question, WRITTEN))
    series = series_of(experiment, units, _invented(question))
    named = [(outcome.name, outcome.baseline) for outcome in experiment.outcomes]
    for name, baseline in named:
        if baseline and baseline not in series:
            has = f"measure gives {', '.join(series)}"
            message = f"has outcome {name!r} with baseline={baseline!r}; {has}"
            raise fault(type(experiment), _where(experiment), message)
    rows = np.array([0, steps_total], dtype=np.int64)
    over_time = {name: np.stack([values, values]) for name, values in series.items()}
    none_shown = [np.empty(0, dtype=np.int64) for _ in units]
    final_of(experiment, units, question.arms, rows, over_time, none_shown)


WRITTEN = " Some words: 7, and more."
"""What an invented model writes, beside nothing at all."""


def _invented(question: Question, written: str = "") -> ItemScores:
    """Scores as of a model that gives every target one nat per token, each of one token, and
    writes the same after every prompt that asks for text.
    """
    items = [item for unit in question.units for item in unit.items]
    count = len(items)
    nothing = np.empty(0, dtype=np.int64)
    generated = None
    if any(item.max_tokens for item in items):
        texts = tuple(written if item.max_tokens else "" for item in items)
        generated = Generated(texts, (nothing,) * count, np.ones(count, dtype=bool))
    return ItemScores(
        generated=generated,
        logprob=np.full(count, -1.0),
        n_tokens=np.ones(count, dtype=np.int64),
        n_bytes=np.ones(count, dtype=np.int64),
        greedy=np.zeros(count, dtype=bool),
    )


def _read_only(scores: ItemScores) -> ItemScores:
    """The same scores, in arrays that refuse to be written to: others read them afterwards."""
    views: dict[str, Any] = {
        name: array.view() for name, array in vars(scores).items() if isinstance(array, np.ndarray)
    }
    for view in views.values():
        view.flags.writeable = False
    return replace(scores, **views)


def _columns(
    kind: type, where: str, values: Any, n_units: int, names: Sequence[str], method: str
) -> dict[str, F64]:
    """Return the answer of a method as float64 [U] by name; PluginError when it is none."""
    if wrong := _unlike(values, n_units, names, method):
        raise fault(kind, where, wrong)
    return {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}


def _unlike(values: Any, n_units: int, names: Sequence[str], method: str) -> str | None:
    """Say how the answer of a method differs from {name: one number per unit}."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        return f"gives {values!r:.60} from {method}; it must be {{name: one number per unit}}"
    if lacking := [name for name in names if name not in values]:
        return f"gives no {', '.join(lacking)} from {method}; every outcome needs one per unit"
    for name, column in values.items():
        try:
            array = np.asarray(column)
        except ValueError:  # rows of different lengths
            array = np.empty(0, dtype=object)
        if array.shape != (n_units,) or array.dtype.kind not in "fiub":
            shape, wanted = f"{array.dtype} {list(array.shape)}", f"{n_units} numbers"
            return f"gives {name} of {shape} from {method}; it must be {wanted}, one per unit"
    return None
