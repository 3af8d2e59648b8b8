"""Numbers and verdicts as a reader wants them.

Pure text, no markup: escaping is the template's work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.format import (
    MISSING,
    finite,
    number,
    sign_of,
)
from motet.core.format import big as big
from motet.core.format import count as count
from motet.core.format import duration as duration
from motet.core.format import percent as percent
from motet.core.marks import marked

PERCENT_UNITS = frozenset({"accuracy", "probability", "rate", "share", "fraction"})

VERDICT_LABELS = {
    "found": "Effect found",
    "not_found": "Not detected",
    "negligible": "Negligible",
    "saturated": "Saturated",
    "invalid": "Not valid",
    "interim": "Interim",
    "exploratory": "Exploratory",
}

LABELS = ("found", "not found", "negligible", "saturated", "invalid", "interim", "exploratory")
TERMS = (
    (
        "unit",
        "The smallest thing that was assigned at random: a canary, a question, a fact, a document. "
        "Near-duplicates form a cluster and are assigned together.",
    ),
    (
        "dose",
        "How often the text of a unit was put into the training stream. Dose 0 is the control: "
        "prepared in the same way, never shown.",
    ),
    (
        "placebo",
        "Ordinary corpus text of equal length, given to dose-0 units in place of their own text.",
    ),
    (
        "effect",
        "Mean outcome of treated units minus mean outcome of dose-0 units, in this one run. "
        "The interval says how precisely these units determine it, not how much other seeds would "
        "vary.",
    ),
    (
        "corrected p",
        "How often an effect at least this large arises when units are re-assigned at random "
        "as in this run, corrected for asking several questions (Holm).",
    ),
    (
        "smallest detectable",
        "The effect that this design finds in 80 % of runs. A smaller true effect "
        "can be missed: “not detected” is no proof of absence.",
    ),
    (
        "negative control",
        "The same test of the same units on the last probe before anything was shown. It must find "
        "nothing; below p = .01 the answer is not valid.",
    ),
    (
        "negligible",
        "The whole interval lies within the margin that was declared before training as too "
        "small to matter.",
    ),
    (
        "saturated",
        "Held-out units were so near the end of the possible range that an effect could hardly "
        "show, whether there is one or not.",
    ),
    (
        "exploratory",
        "A figure of another step, or by other means, than were frozen before training: a hint for "
        "the next run, never a verdict. “Interim” is the same before the step of judgement.",
    ),
)


CELLS = ("neither", "this one", "the other", "both")
"""Who showed a unit that two experiments share, in the order of an OUTCOME's `cells`."""


def is_percent(unit: str) -> bool:
    """Whether values of this unit are shares of one, shown in percent."""
    return unit in PERCENT_UNITS


def shown_unit(unit: str, difference: bool = False) -> str:
    """The unit as printed: differences of shares are percentage points."""
    if is_percent(unit):
        return "pp" if difference else "%"
    return unit


def scaled(value: Any, unit: str) -> float | None:
    """`value` in the unit that is printed."""
    x = finite(value)
    return x if x is None or not is_percent(unit) else 100 * x


def difference(value: Any, unit: str) -> str:
    """A signed effect with its unit: `+19.2 pp`, `−0.31 bits`."""
    text = number(scaled(value, unit), signed=True)
    return text if text == MISSING else f"{text} {shown_unit(unit, True)}".rstrip()


def level(value: Any, unit: str) -> str:
    """A mean with its unit: `55.2 %`, `3.10 bits`."""
    text = number(scaled(value, unit))
    return text if text == MISSING else f"{text} {shown_unit(unit)}".rstrip()


def size(value: Any, unit: str) -> str:
    """An unsigned difference: `1.2 pp`."""
    return difference(value, unit).lstrip("+")


def estimate(outcome: Any) -> tuple[str, str]:
    """Effect with unit, and interval, to the precision that the interval has (two digits of its
    half).

    `("+4.31 bits", "[+3.39, +5.23]")`; the interval is "" when there is none.
    """
    test = outcome.get("test")
    if test == "omnibus":
        return _most_moved(outcome)
    unit = str(outcome.get("unit") or "")
    names = (
        ("effect", "low", "high") if "effect" in outcome else ("slope_per_doubling", "low", "high")
    )
    effect, low, high = (scaled(outcome.get(name), unit) for name in names)
    if effect is None:
        return MISSING, ""
    if low is None or high is None or high <= low:
        return difference(outcome[names[0]], unit), ""
    places = min(8, max(0, 1 - math.floor(math.log10((high - low) / 2))))
    texts = [sign_of(round(x, places), True) + f"{abs(x):,.{places}f}" for x in (effect, low, high)]
    per = " per doubling" if test == "trend" else ""
    per += " per doubling of parameters" if outcome.get("over") == "parameters" else ""
    return f"{texts[0]} {shown_unit(unit, True)}".rstrip() + per, f"[{texts[1]}, {texts[2]}]"


def _most_moved(outcome: Mapping[str, Any]) -> tuple[str, str]:
    """The arm of an omnibus test that differs most from dose 0, with its simultaneous interval."""
    most = most_moved(outcome)
    if most is None:
        return MISSING, ""
    effect, interval = estimate({**most, "unit": outcome.get("unit")})
    return f"{effect} in {most['arm']}", interval


def most_moved(outcome: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of `per_arm` that differs most from dose 0: the smallest p, then the largest effect;
    None where no arm has an effect.
    """
    rows = [row for row in outcome.get("per_arm") or [] if finite(row.get("effect")) is not None]
    most = min(
        rows, key=lambda row: (finite(row.get("p")) or 0.0, -abs(row["effect"])), default=None
    )
    return most


def units_in_arms(numbers: Sequence[Any]) -> str:
    """How many units stand behind the means of arms: `16 units in each arm`, `12 to 48 units in an
    arm`; "" in a report that does not say.
    """
    known = [int(n) for n in numbers if finite(n) is not None]
    if not known:
        return ""
    few, most = min(known), max(known)
    if few < most:
        return f"{few:,} to {most:,} units in an arm"
    return f"{plural(most, 'unit')} in each arm"


def p_value(value: Any) -> str:
    """Two significant digits, `< 0.0001` below that."""
    p = finite(value)
    if p is None:
        return MISSING
    if p < 1e-4:
        return "< 0.0001"
    if p < 0.001:
        return f"{p:.4f}"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def dose(value: Any) -> str:
    """A dose: `16`, `0.001`."""
    x = finite(value)
    return MISSING if x is None else f"{x:g}"


def per_unit(amount: int, units: int) -> str:
    """A count as so many per unit: `5.3`."""
    return f"{amount / units:,.1f}" if units else MISSING


def sentence(verdict: Mapping[str, Any]) -> str:
    """The verdict in words, without the label that is shown beside it."""
    text = str(verdict.get("sentence") or "")
    label, colon, rest = text.partition(": ")
    if colon and label.lower() in LABELS:
        return rest[:1].upper() + rest[1:]
    return text


def printable(text: Any) -> str:
    """One line, with marks for control characters, which could end an SVG or command a terminal."""
    return marked(str(text).translate({9: " ", 10: " ", 13: " "}))


def member(name: str | None) -> str:
    """The name of a member; None is the whole model."""
    return "whole model" if name is None else name


def plural(amount: int, noun: str, many: str = "") -> str:
    """`1 question`, `2 questions`; `many` where an s does not make the plural."""
    return f"{amount:,} {noun if amount == 1 else many or noun + 's'}"


def star(chosen: bool | None) -> str:
    """A star behind what is chosen."""
    return " ★" if chosen else ""


def tally(experiments: Sequence[Mapping[str, Any]]) -> str:
    """One sentence over all questions: how many found what."""
    kinds = [entry.get("verdict", {}).get("kind") for entry in experiments]
    if not kinds:
        return "This run carries no questions."
    phrases = (
        ("found", "found an effect"),
        ("negligible", "found it negligible"),
        ("not_found", "did not detect one"),
        ("saturated", "had no room to show one"),
        ("invalid", "gave no valid answer"),
        ("interim", "not judged yet"),
        ("exploratory", "only explored"),
    )
    parts = [f"{kinds.count(kind)} {phrase}" for kind, phrase in phrases if kind in kinds]
    asked = f"{plural(len(kinds), 'question')} asked"
    return f"{asked}: {', '.join(parts)}." if parts else f"{asked}, none answered yet."


NUMBER_WORDS = [
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


def spelled(amount: int, noun: str) -> str:
    """`six questions`: small numbers as words."""
    if 0 <= amount < len(NUMBER_WORDS):
        return f"{NUMBER_WORDS[amount]} {noun}" + ("" if amount == 1 else "s")
    return plural(amount, noun)


def summary(
    run: Mapping[str, Any], cost: Mapping[str, Any], n_questions: int, unread: bool = False
) -> str:
    """The opening paragraph: what was trained on what, with which questions inside; `unread`: which
    there are could not be read.
    """
    model = run.get("model") or {}
    shape = ""
    if model.get("n_layers") and model.get("d_model"):
        shape = f" ({model['n_layers']} layers, width {model['d_model']})"
    subject = f"A decoder of {big(run.get('parameters'))} parameters{shape}"
    if not finite(run.get("tokens")):
        return f"{subject} is set up; no step has been recorded yet."
    verb = "was trained" if run.get("finished") else "has so far been trained"
    text = f"{subject} {verb} on {big(run.get('tokens'))} tokens{corpora(run.get('data') or [])}"
    text += f" in {run['steps']:,} steps. " if finite(run.get("steps")) else ". "
    if not n_questions:
        return text.strip() if unread else text + "It carries no randomized experiments."
    share = finite(cost.get("experiment_share"))
    taken = "" if share is None else f" and took {percent(share)} of its tokens"
    verb = "was" if n_questions == 1 else "were"
    asked = spelled(n_questions, "randomized experiment")
    return (
        f"{text}{asked[0].upper()}{asked[1:]} {verb} placed inside this one training run{taken}"
        f"{', controls included' if taken else ''}. "
        "Every answer compares units of this run that chance alone told apart."
    )


def told_by_other(row: Mapping[str, Any]) -> str:
    """Which held-out units another experiment showed: a row of `told_by_others`."""
    times = row["held_out_exposures"]
    tail = "as declared" if row["declared"] else "which nobody declared before training"
    return (
        f"{row['held_out_units']} of {row['held_out']} held-out units of {row['name']} were shown "
        f"{times:,} times by {row['by']}, {tail}."
    )


def corpora(data: Sequence[Mapping[str, Any]]) -> str:
    """` of the corpus stdlib`, or of several."""
    names = [str(d.get("path") or "?").rstrip("/").rsplit("/", 1)[-1] for d in data]
    if not names:
        return ""
    if len(names) == 1:
        return f" of the corpus {names[0]}"
    return f" of {len(names)} corpora ({', '.join(names)})"


def plain(value: Any) -> Any:
    """A copy as plain JSON: NumPy becomes Python, NaN becomes null, lone surrogates become `?`."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {clean_text(str(name)): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    if value is None or isinstance(value, bool | int):
        return value
    return clean_text(str(value))


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
