"""Verdicts as sentences for a reader who was not there."""

from __future__ import annotations

import math
from typing import Any

from motet.core.format import decimals, percent, sign_of
from motet.experiments.analysis.estimates import POWER

MOST_ARMS_TOLD = 4
POINTS = ("accuracy", "share", "share of peak gain")
UNITS = {"nats/token": "nats per token"}


def amount(value: float | None, unit: str, signed: bool = False) -> str:
    """A number with its unit, to three digits; shares as percentage points."""
    if value is None:
        return "unknown"
    scaled, name = (
        (100 * value, "percentage points") if unit in POINTS else (value, UNITS.get(unit, unit))
    )
    return f"{number(scaled, signed)} {name}"


def number(value: float, signed: bool = False) -> str:
    """Three significant digits, never in scientific notation above a millionth."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{sign_of(value, signed)}{abs(value):.{decimals(value)}f}"


def p_text(p: float | None) -> str:
    """p = .012, or p < .001."""
    if p is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interval_text(outcome: dict[str, Any]) -> str:
    """The interval in words."""
    if outcome["low"] is None or outcome["high"] is None:
        return "no interval can be given"
    low, high = (amount(outcome[end], outcome["unit"], signed=True) for end in ("low", "high"))
    (least, unit), (most, _) = (end.split(" ", 1) for end in (low, high))
    return f"{percent(outcome['confidence'])} interval {least} to {most} {unit}" + (
        f", {outcome['coverage_note']}" if outcome.get("coverage_note") else ""
    )


def judge(
    outcome: dict[str, Any],
    alpha: float,
    margin: float | None,
    invalid: str,
    corrected_over: int,
    where: str = "",
    room: float | None = None,
) -> dict[str, str]:
    """The verdict on a primary outcome (the report's OUTCOME fields).

    Args:
        outcome: the OUTCOME, corrected.
        alpha: significance level.
        margin: effects within it are too small to matter; None was not declared.
        invalid: why no answer of this run can be trusted, or "".
        corrected_over: how many primary outcomes Holm's method corrected for.
        where: the member that the answer is for (` of member NAME`), or "" when there is one only.
        room: how far a control group near the end of the possible range could still rise; None
            where it could move freely.
    """
    estimate = estimate_text(outcome, corrected_over, where)
    if invalid:
        return {
            "kind": "invalid",
            "sentence": f"Invalid: {invalid} The estimate, not to be relied on: {estimate}.",
        }
    if outcome["p"] is None:
        return {
            "kind": "invalid",
            "sentence": f"Invalid: nothing could be estimated; {outcome['assumption']}.",
        }
    if room is not None and not _fell(outcome, alpha):
        left = (
            f"the outcome had only {amount(room, outcome['unit'])} left to move in held-out units"
        )
        return {
            "kind": "saturated",
            "sentence": f"Saturated: {left}, so an effect could hardly show; {estimate}.",
        }
    if margin is not None and _within(outcome, margin):
        whole = "the interval of every arm" if _is_omnibus(outcome) else "the whole interval"
        inside = f"{whole} lies within the margin of {_size(outcome, margin)} set before training"
        return {"kind": "negligible", "sentence": f"Negligible: {inside}; {estimate}."}
    if outcome["p_corrected"] is not None and outcome["p_corrected"] <= alpha:
        return {"kind": "found", "sentence": f"Found: {estimate}.{_overestimated(outcome)}"}
    limit = _limit_text(outcome)
    return {"kind": "not_found", "sentence": f"Not found: {estimate}. {limit}."}


def _fell(outcome: dict[str, Any], alpha: float) -> bool:
    """Whether a drop was found: an outcome near its ceiling has room for that."""
    found = outcome["p_corrected"] is not None and outcome["p_corrected"] <= alpha
    return found and outcome["effect"] is not None and outcome["effect"] < 0


def _limit_text(outcome: dict[str, Any]) -> str:
    """How large an effect such runs would have found, and how often."""
    size, arm = outcome["smallest_detectable"], " in one arm alone" if _is_omnibus(outcome) else ""
    often, why = "4 of 5 such runs", ""
    if outcome.get("detectable_power"):
        often = f"{_often(outcome)} of such runs"
        why = ", depending on the control group's mean, which is an estimate too"
    if size is None:
        which = "The largest effect" if why else "No effect"
        return f"{which} that is possible{arm} would have been found in {often}{why}"
    text = f"An effect of {_size(outcome, size)}{arm} would have been found in {often}{why}"
    return f"{text}; smaller ones may exist"


def _often(outcome: dict[str, Any]) -> str:
    """The range of power in words: `59 to 96 %`."""
    least, most = outcome.get("detectable_power") or (POWER, POWER)
    return f"{100 * least:.0f} to {percent(most)}"


def _is_omnibus(outcome: dict[str, Any]) -> bool:
    return outcome.get("test") == "omnibus"


def _size(outcome: dict[str, Any], value: float) -> str:
    """An effect of this size in words; that of a trend, or of a slope over sizes, is per
    doubling.
    """
    per = " per doubling of 1 + dose" if outcome.get("test") == "trend" else ""
    per += " per doubling of parameters" if outcome.get("over") == "parameters" else ""
    return amount(value, outcome["unit"]) + per


def _overestimated(outcome: dict[str, Any]) -> str:
    """Say that a found effect is likely overestimated where it is below what 4 of 5 runs find.

    Of effects that small only those whose estimate came out large are found (type M error; Gelman
    and Carlin, "Beyond Power Calculations", Perspectives on Psychological Science 2014).
    """
    size, effect = outcome["smallest_detectable"], outcome["effect"]
    if effect is None or (size is not None and abs(effect) >= size):
        return ""
    often = f"{_often(outcome)} of such" if outcome.get("detectable_power") else "4 of 5 such"
    less = f"smaller than {_size(outcome, size)}, which" if size is not None else "what"
    return (
        f" Likely overestimated: it is {less} {often} runs would have found, and runs that "
        "find smaller effects are those in which they came out too large."
    )


def _within(outcome: dict[str, Any], margin: float) -> bool:
    """Whether all of the interval, or of every arm's, lies within the margin."""
    rows = _arms(outcome) if _is_omnibus(outcome) else [outcome]
    ends = [(row["low"], row["high"]) for row in rows]
    return all(
        low is not None and high is not None and -margin < low and high < margin
        for low, high in ends
    )


def _arms(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The arms with a dose of an omnibus test, in the order of their p-values."""
    rows = [row for row in outcome["per_arm"] if row["effect"] is not None]
    return sorted(rows, key=lambda row: float(row["p"]))


def estimate_text(outcome: dict[str, Any], corrected_over: int, where: str) -> str:
    effect, label = outcome["effect"], outcome["label"] + where
    correction = (
        f" after Holm's correction over {corrected_over} questions" if corrected_over > 1 else ""
    )
    p = f"{p_text(outcome['p_corrected'])}{correction}"
    if _is_omnibus(outcome) and outcome["p"] is not None:
        told = [_arm_text(row, outcome) for row in _arms(outcome)]
        more = f", and {len(told) - MOST_ARMS_TOLD} more arms" if len(told) > MOST_ARMS_TOLD else ""
        arms = ", ".join(told[:MOST_ARMS_TOLD]) + more
        return f"{label} differs between the arms ({outcome['contrast']}; {p}): {arms}"
    if effect is None:
        return f"{label}, {outcome['contrast']}: no estimate"
    size = _size(outcome, abs(effect))
    compared = f"{outcome['contrast']}; {interval_text(outcome)}; {p}"
    if outcome.get("over") == "parameters":
        verb = "grows" if effect > 0 else "shrinks" if effect < 0 else "changes"
        return f"{label} {verb} by {size} ({compared})"
    if outcome.get("test") != "trend":
        return f"{label} is {size} {_direction(effect)} ({compared})"
    verb = "rises" if effect > 0 else "falls" if effect < 0 else "changes"
    return f"{label} {verb} by {size} ({compared})"


def _direction(effect: float) -> str:
    return "higher" if effect > 0 else "lower" if effect < 0 else "different"


def _arm_text(row: dict[str, Any], outcome: dict[str, Any]) -> str:
    """One arm of an omnibus test; its interval holds together with the other arms'."""
    size = amount(abs(row["effect"]), outcome["unit"])
    told = interval_text({**outcome, "low": row["low"], "high": row["high"]})
    kind = "" if row["low"] is None else "simultaneous "
    return f"{row['arm']} {size} {_direction(row['effect'])} ({kind}{told})"


def placebo_sentence(
    p: float | None, threshold: float, alpha: float, smallest: float = 0.0
) -> tuple[bool, str]:
    """Whether the A/A control is sound, and what to say.

    It fails below `threshold`, not `alpha`; one whose p cannot fall below it (`smallest`, from its
    design) could not fail, so it vouches for nothing.
    """
    if p is not None and smallest >= threshold:
        return False, (
            f"The A/A control is too small to fail: its p-value cannot fall below {smallest:.2g}, "
            f"and {threshold:g} is needed; so nothing vouches for this run."
        )
    if p is None:
        return False, "The A/A control was not measured, so nothing vouches for this run."
    if p < threshold:
        return False, (
            f"The A/A control found a difference where nothing was done ({p_text(p)}; a sound run "
            f"does so once in {1 / threshold:.0f}), so something other than treatment moves the "
            "scores."
        )
    if p < alpha:
        return True, (
            f"The A/A control, where nothing was done, came out at {p_text(p)}. A sound run does "
            f"so once in {1 / alpha:.0f}; the run is rejected only below {threshold:g}."
        )
    return (
        True,
        f"The A/A control, where nothing was done, found nothing ({p_text(p)}), as it should.",
    )


def positive_sentence(outcome: dict[str, Any], alpha: float) -> tuple[bool, str]:
    """Whether the positive control was found (in the planned direction), and what to say."""
    p, effect = outcome["p"], outcome["effect"]
    if p is not None and effect is not None and p <= alpha and effect > 0:
        size = amount(effect, outcome["unit"], signed=True)
        return True, f"The positive control was found ({size}, {p_text(p)}), as it should."
    if p is not None and effect is not None and p <= alpha:
        return (
            False,
            "The positive control moved in the wrong direction "
            f"({amount(effect, outcome['unit'], signed=True)}).",
        )
    return False, (
        f"The positive control was not found ({p_text(p)}): this run cannot show effects that must "
        "be there. It may be too short, or exposures did not reach the model."
    )
