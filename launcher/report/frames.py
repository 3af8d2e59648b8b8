"""What a run knows as pandas data frames: pure functions over what was read.

Every frame has its columns also when it has no row. `member` is the name of a member, or `whole`
for the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from motet.core.plugins import PluginError
from motet.experiments.design.trial import series_of
from motet.experiments.types import generated_texts

if TYPE_CHECKING:
    import pandas as pd

    from motet.experiments.analysis.measured import Measured
    from motet.experiments.design.assignment import Question
from motet.launcher.runs.metrics import Row

WHOLE = "whole"
ALL = "all"
"""`member` of what is made of all members."""
PASSED = {True: "passed", False: "failed", None: "uninformative"}
TIMES = {0: "early", 1: "late"}
UNIT_COLUMNS = ("experiment", "role", "unit", "arm", "dose", "timing", "cluster", "block")
SCORE_COLUMNS = ("step", "experiment", "unit", "member", "series", "value")
ITEM_COLUMNS = (
    "step", "experiment", "unit", "member", "item", "kind", "logprob", "tokens", "bytes", "greedy",
    "generated",
)  # fmt: skip
OUTCOME_COLUMNS = (
    "effect", "low", "high", "confidence", "p", "p_corrected", "control_mean", "treated_mean", "n",
    "smallest_detectable", "assumption",
)  # fmt: skip
NOTED = "coverage_note"
"""Only outcomes whose interval is known to miss more often than it says have one."""
ANSWER_COLUMNS = (
    "experiment", "use", "role", "member", "primary", "outcome", "label", "unit", "test",
    "contrast", *OUTCOME_COLUMNS, NOTED, "verdict", "sentence", "negative_control",
    "negative_control_p",
)  # fmt: skip


def metrics(rows: Iterable[Row], kind: str) -> pd.DataFrame:
    """Rows of one kind of `metrics.jsonl`; what is nested is named with a dot (`seconds.train`)."""
    import pandas as pd

    chosen = [
        {key: value for key, value in row.items() if key != "kind"}
        for row in rows
        if row["kind"] == kind
    ]
    return pd.json_normalize(chosen) if chosen else pd.DataFrame(columns=["step", "time"])


def units(questions: Sequence[Question]) -> pd.DataFrame:
    """One row per unit of every experiment; a unit's attributes are columns `attribute.NAME`."""
    import pandas as pd

    rows = []
    for question in questions:
        arms = question.spec.arms
        for number, unit in enumerate(question.units):
            arm = arms[int(question.arms[number])]
            timing = None if question.timing is None else TIMES[int(question.timing[number])]
            row = (
                question.name, question.experiment.role, unit.id, arm.name, float(arm.dose), timing,
                unit.cluster, unit.block,
            )  # fmt: skip
            found = dict(zip(UNIT_COLUMNS, row, strict=True))
            rows.append(found | {f"attribute.{k}": v for k, v in unit.attributes.items()})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(UNIT_COLUMNS))


def scores(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per probe step, unit, member and series; a series is what an experiment makes of the
    scores of a unit's items (see its page in docs/experiments.md).
    """
    parts: list[dict[str, Any]] = []
    for m in measured:
        ids = np.array([unit.id for unit in m.units], dtype=object)
        for step, found in zip(m.steps.tolist(), m.scores, strict=True):
            try:
                series = series_of(m.experiment, m.units, found)
            except PluginError as error:  # the others have theirs
                warnings.warn(f"{m.name} has no scores: {error}", stacklevel=2)
                break
            for name, values_U in series.items():
                row = (step, m.name, ids, m.member or WHOLE, name, values_U)
                parts.append(dict(zip(SCORE_COLUMNS, row, strict=True)))
    return _stacked(parts, SCORE_COLUMNS)


def items(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per probe step, probe item and member: what the model said, before any summary."""
    parts: list[dict[str, Any]] = []
    for m in measured:
        pairs = [(unit, item) for unit in m.units for item in unit.items]
        unit_I = np.array([unit.id for unit, _ in pairs], dtype=object)
        item_I = np.array([item.id for _, item in pairs], dtype=object)
        kind_I = np.array([item.kind for _, item in pairs], dtype=object)
        for step, found in zip(m.steps.tolist(), m.scores, strict=True):
            row = (
                step, m.name, unit_I, m.member or WHOLE, item_I, kind_I, found.logprob,
                found.n_tokens, found.n_bytes, found.greedy,
                np.array(generated_texts(found), dtype=object),
            )  # fmt: skip
            parts.append(dict(zip(ITEM_COLUMNS, row, strict=True)))
    return _stacked(parts, ITEM_COLUMNS)


def _stacked(parts: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """One frame of many; a single value of a part stands in all of its rows."""
    import pandas as pd

    if not parts:
        return pd.DataFrame(columns=list(columns))
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)


def answers(found: Mapping[str, Any]) -> pd.DataFrame:
    """One row per outcome, experiment and member, the primary outcome first; controls follow the
    questions.

    Args:
        found: the `answers` part of report.json.
    """
    import pandas as pd

    controls = [control for control in found["controls"].values() if control is not None]
    rows = []
    for entry in [*found["experiments"], *controls]:
        judged = _outcome(entry, entry.get("member"), entry["primary"], True, entry["verdict"])
        rows.append(judged | _negative(entry["negative_control"]))
        rows += [_outcome(entry, entry.get("member"), o, False, {}) for o in entry["secondary"]]
        if slope := entry.get("size_slope"):
            rows.append(_outcome(entry, None, slope, False, slope["verdict"]) | {"member": ALL})
        for other in entry.get("exploratory") or []:
            told = {"kind": "exploratory", "sentence": other["sentence"]}
            rows.append(_outcome(entry, entry.get("member"), other["primary"], False, told))
        for other in entry.get("members") or []:
            outcomes = [other["primary"], *other["secondary"]]
            rows += [_outcome(entry, other["member"], o, False, {}) for o in outcomes]
    return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))


def _negative(control: Mapping[str, Any]) -> dict[str, Any]:
    told = {"negative_control": PASSED[control["ok"]]}
    return told | {"negative_control_p": control["p_corrected"]}


def _outcome(
    entry: Mapping[str, Any],
    member: str | None,
    outcome: Mapping[str, Any],
    primary: bool,
    verdict: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "experiment": entry["name"],
        "use": entry["use"],
        "role": entry["role"],
        "member": member or WHOLE,
        "primary": primary,
        "outcome": outcome["name"],
        "test": outcome.get("test", "contrast"),
        **{name: outcome[name] for name in ("label", "unit", "contrast", *OUTCOME_COLUMNS)},
        NOTED: outcome.get(NOTED),
        "verdict": verdict.get("kind"),
        "sentence": verdict.get("sentence"),
    }
