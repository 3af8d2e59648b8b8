"""The answers as text to copy: Markdown, CSV and LaTeX, in one frame that needs nothing but
report.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.launcher.report import answer_rows, tables, words

LABELS = {"md": "Markdown", "csv": "CSV", "latex": "LaTeX"}


def copies(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name of the format, text) of the table of answers, questions and controls; nothing
    where there are none. Numbers of the CSV have all their digits, those of the others are as on
    the page.
    """
    import pandas as pd

    rows = answer_rows.table(report)
    if not rows:
        return []
    whole = pd.DataFrame(rows, columns=list(answer_rows.COLUMNS))
    shown = pd.DataFrame(_shown(whole.to_dict("records")))
    forms = {"md": (tables.markdown, shown), "csv": (tables.csv, whole)}
    forms["latex"] = (tables.latex, shown)
    return [(LABELS[form], write(frame).decode()) for form, (write, frame) in forms.items()]


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows as the page shows them."""
    found = []
    for row in rows:
        effect, interval = words.estimate(row)
        corrected = words.finite(row["p_corrected"])
        found.append(
            {
                "experiment": words.printable(str(row["experiment"])),
                "outcome": words.printable(str(row["outcome"] or words.MISSING)),
                "effect": effect,
                "interval": interval,
                "p": words.p_value(row["p"] if corrected is None else corrected),
                "units": words.count(row["units"]),
                "answer": words.VERDICT_LABELS.get(str(row["verdict"]), words.MISSING),
            }
        )
    return found
