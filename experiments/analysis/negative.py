"""The negative control of a question: its own test, where nothing can be found yet.

The test of the primary outcome, with the question's own units, blocks, clusters and arms, is
applied to the last probe before any exposure. What it finds there cannot be an effect: the arms
were not dealt as the analysis repeats them, or the units were shown in some way that the plan does
not know. The A/A control cannot see that; it has other units, no blocks and no clusters.

Where that probe is not the first one, the value is tested twice: as it is, and adjusted for the
first probe. The first test alone is blind to what moved a few units a little between the two; the
second alone is blind to arms that differed from the start, because it removes just that.

The repetitions of the assignment are those of the primary outcome. They are made without looking at
any outcome, so both p-values are exact; fresh ones would cost time and change nothing but chance.

Shapes: U units, S probe steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Estimate
from motet.experiments.analysis.measured import Measured
from motet.experiments.analysis.verdict import amount, p_text
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
Test = Callable[[F64, F64 | None], Estimate]

NEGATIVE_THRESHOLD = 0.01
"""A p-value below this makes the answer invalid. At .05 one sound question in 20 would be lost."""


def last_before_exposure(m: Measured) -> int | None:
    """Return which probe is the last one that no exposure of the experiment can have moved.

    A probe at step e comes before an exposure at step e. None where there is no such probe.
    """
    if len(m.steps) == 0:
        return None
    first = m.experiment.spec.schedule.first_step(m.run_steps or int(m.steps[-1]))
    shown = [int(when[0]) for when in m.exposure_steps if len(when)]
    before = np.flatnonzero(m.steps <= min([first, *shown]))
    return int(before[-1]) if len(before) else None


def negative_control(
    m: Measured, series: Mapping[str, F64], outcome: OutcomeSpec, contrast: str, test: Test
) -> dict[str, Any]:
    """Return the `negative_control` of an entry of report.json.

    Args:
        m: the experiment after training.
        series: what was measured at every probe, float64 [S, U].
        outcome: the primary one.
        contrast: what is compared, in words.
        test: of the primary outcome; takes values and covariate (or None), float64 [U] each.

    Returns:
        `ok` (None = it could not have failed, or could not be made), `sentence`, and of the test
        that was nearest to failing: `series`, `label`, `unit`, `step`, `adjusted`, `contrast`,
        `effect`, `low`, `high`, `p`, and `p_corrected`, which is corrected for `tests`.
    """
    place = last_before_exposure(m)
    if place is None:
        why = "no probe was made before the first exposure"
        return _untested(contrast, f"There is none: {why}, so {UNSEEN}.")
    names, instead = _series_of(outcome, series)
    if not names:
        why = "nothing was measured before the first exposure"
        return _untested(contrast, f"There is none: {why}, so {UNSEEN}.")
    step = int(m.steps[place])
    tests = list(_tests(m, series, names, place, test))
    able = [one for one in tests if one.found.smallest_p * len(tests) < NEGATIVE_THRESHOLD]
    worst = min(able or tests, key=lambda one: one.found.p)
    corrected = min(1.0, worst.found.p * len(able or tests))
    known = {one.name: one for one in m.experiment.outcomes}
    spec = known.get(worst.series)
    facts = {
        "series": worst.series,
        "label": spec.label if spec else worst.series,
        "unit": spec.unit if spec else outcome.unit,
        "step": step,
        "adjusted": worst.found.adjusted,
        "contrast": contrast,
        "effect": worst.found.effect,
        "low": worst.found.low,
        "high": worst.found.high,
        "p": worst.found.p,
        "p_corrected": corrected,
        "tests": len(able or tests),
    }
    what = _what(facts, int(m.steps[0]), outcome.label if instead else "")
    if not able:
        return facts | {"ok": None, "sentence": _could_not_fail(worst.found, what, step)}
    ok = corrected >= NEGATIVE_THRESHOLD
    told = _passed(facts, what) if ok else _failed(facts, what, outcome)
    return facts | {"ok": ok, "sentence": told}


def fault(entry: Mapping[str, Any]) -> str:
    """Return why the negative control makes an entry's answer invalid, or ""."""
    control = entry["negative_control"]
    return str(control["sentence"]) if control["ok"] is False else ""


UNSEEN = "nothing shows that the arms were alike beforehand"


@dataclass(frozen=True)
class _Tested:
    series: str
    found: Estimate


def _series_of(outcome: OutcomeSpec, series: Mapping[str, F64]) -> tuple[list[str], bool]:
    """The series to test, and whether they only stand in for an outcome that has none.

    Any of them can show that the arms differed; which one would is not known, so all are tried.
    """
    for name in (outcome.baseline, outcome.name):
        if name and name in series:
            return [name], False
    return list(series), True


def _tests(
    m: Measured, series: Mapping[str, F64], names: list[str], place: int, test: Test
) -> Iterator[_Tested]:
    """Every series as it is, and adjusted for the first probe where that is an earlier one."""
    for name in names:
        values_U = series[name][place]
        yield _Tested(name, test(values_U, None))
        if place > 0:
            adjusted = test(values_U, series[name][0])
            if adjusted.adjusted:
                yield _Tested(name, adjusted)


def _untested(contrast: str, sentence: str) -> dict[str, Any]:
    names = ("series", "label", "unit", "step", "effect", "low", "high", "p", "p_corrected")
    nothing = dict.fromkeys(names)
    return nothing | {
        "adjusted": False,
        "contrast": contrast,
        "tests": 0,
        "ok": None,
        "sentence": sentence,
    }


def _what(facts: Mapping[str, Any], first_step: int, instead_of: str) -> str:
    """What was tested, in words."""
    text = str(facts["label"])
    if facts["adjusted"]:
        text += f" (adjusted for step {first_step})"
    if instead_of:
        text += f" (in place of {instead_of}, which has no value before exposure)"
    return text


def _of_tests(facts: Mapping[str, Any]) -> str:
    n, p = facts["tests"], p_text(facts["p_corrected"])
    return p if n == 1 else f"{p} after correction over {n} tests"


def _passed(facts: Mapping[str, Any], what: str) -> str:
    return (
        f"Before any exposure (step {facts['step']}) no difference between the arms was found in "
        f"{what} ({facts['contrast']}; {_of_tests(facts)}), as it should be."
    )


def _failed(facts: Mapping[str, Any], what: str, outcome: OutcomeSpec) -> str:
    who = "Units that were to be shown" if outcome.contrast is None else "The arms compared"
    effect = facts["effect"]
    if effect is None:
        size = "differed between the arms"
    else:
        direction = "higher" if effect > 0 else "lower" if effect < 0 else "different"
        size = f"was {amount(abs(effect), facts['unit'])} {direction}"
    return (
        f"{who} already differed before anything was shown: at step {facts['step']} {what} {size} "
        f"({facts['contrast']}; {_of_tests(facts)}; a sound question does so once in "
        f"{1 / NEGATIVE_THRESHOLD:.0f})."
    )


def _could_not_fail(found: Estimate, what: str, step: int) -> str:
    if found.smallest_p < 1:
        why = f"no p-value below {found.smallest_p:.2g} was possible for {what} at step {step}"
    elif found.note and found.low is None:  # else the note is on the interval's method
        why = f"for {what} at step {step}, {found.note}"
    else:
        why = f"{what} did not vary at step {step}"
    return f"It could not have failed, because {why}; {UNSEEN}."
