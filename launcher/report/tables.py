"""A data frame as a file for others: CSV, Parquet, Markdown or LaTeX.

CSV and Parquet hold everything. Markdown and LaTeX are for reading: answers are shown as effect,
interval and p-value, as the report prints them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.format import MINUS
from motet.launcher.report import words

if TYPE_CHECKING:
    import pandas as pd

MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}",
    MINUS: r"$-$", words.MISSING: "--", "×": r"$\times$", "…": r"\ldots{}",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def csv(frame: pd.DataFrame) -> bytes:
    """UTF-8 text with a header; numbers to the last digit.

    A text that a spreadsheet would run as a formula (it begins with = + - @, tab or return) gets an
    apostrophe before it, which spreadsheets do not show.
    """
    safe = frame.copy()
    for name in safe.columns:
        if not _numeric(safe[name]):
            safe[name] = safe[name].map(_no_formula)
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def parquet(frame: pd.DataFrame) -> bytes:
    """One Parquet file; a column of several types becomes text.

    Raises:
        UserError: pyarrow is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("--table parquet needs pyarrow: pip install 'motet[data]'; or use csv")
    from pandas.api.types import infer_dtype

    plain = frame.copy()
    for name in plain.columns:
        if infer_dtype(plain[name], skipna=True).startswith("mixed"):
            plain[name] = plain[name].map(lambda value: None if _missing(value) else str(value))
    buffer = io.BytesIO()
    plain.to_parquet(buffer, index=False)
    return buffer.getvalue()


def markdown(frame: pd.DataFrame) -> bytes:
    """A table of GitHub's Markdown; what could be taken for markup is escaped."""
    texts = readable(frame)
    numeric = [_numeric(frame[name]) if name in frame else False for name in texts.columns]
    rule = ["---:" if right else "---" for right in numeric]
    rows = [[_markdown_cell(cell) for cell in row] for row in _rows(texts)]
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
    return ("\n".join(lines) + "\n").encode()


def _markdown_cell(text: str) -> str:
    return MARKDOWN_SPECIAL.sub(r"\\\1", words.printable(text))


def latex(frame: pd.DataFrame) -> bytes:
    """A `tabular` with the rules of booktabs; every special character is escaped."""
    texts = readable(frame)
    numeric = [_numeric(frame[name]) if name in frame else False for name in texts.columns]
    rows = [" & ".join(map(_latex_cell, row)) + r" \\" for row in _rows(texts)]
    columns = "".join("r" if right else "l" for right in numeric)
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return ("\n".join(lines) + "\n").encode()


def _latex_cell(text: str) -> str:
    escaped = "".join(LATEX_SPECIAL.get(char, char) for char in words.printable(text))
    raised = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"$^{{{m[0].translate(SUPERSCRIPTS)}}}$", escaped)
    # a row that begins with a bracket would be read as the length that `\\` may take
    return f"{{}}{raised}" if raised.startswith("[") else raised


FORMATS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    "csv": csv,
    "parquet": parquet,
    "md": markdown,
    "latex": latex,
}


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as texts for a page. Answers lose the columns that only a program needs."""
    import pandas as pd

    if {"effect", "p_corrected", "contrast"} <= set(frame.columns):
        frame = _answers(frame)
    texts = {name: [_text(value) for value in frame[name]] for name in frame.columns}
    return pd.DataFrame(texts, columns=list(frame.columns), dtype=object)


def _answers(frame: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for outcome in frame.to_dict("records"):
        effect, interval = words.estimate(outcome)
        row = {name: outcome[name] for name in ("run", "experiment", "member") if name in outcome}
        row |= {"outcome": outcome["label"], "contrast": outcome["contrast"], "effect": effect}
        row |= {"interval": interval, "p": words.p_value(outcome["p_corrected"])}
        row |= {"units": words.count(outcome["n"])}
        verdict = outcome["verdict"]
        label = "" if _missing(verdict) else words.VERDICT_LABELS.get(verdict, verdict)
        rows.append(row | {"answer": label})
    columns = ["experiment", "outcome", "contrast", "effect", "interval", "p", "units", "answer"]
    found = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    one_model = "member" in found and found["member"].nunique() <= 1
    return found.drop(columns="member") if one_model else found


def _text(value: Any) -> str:
    if _missing(value):
        return words.MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _numeric(column: pd.Series[Any]) -> bool:
    from pandas.api.types import is_numeric_dtype

    return bool(is_numeric_dtype(column))


def _rows(texts: pd.DataFrame) -> list[list[str]]:
    """The header, then the rows."""
    return [[str(name) for name in texts.columns], *texts.values.tolist()]
