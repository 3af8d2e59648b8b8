"""Rows as a table of HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any


def html_table(rows: Sequence[Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    """Return a table of dictionaries with the same keys, which are the headings; None is a dash,
    all else what `cell` says.
    """
    heads = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(_cell(v, cell) for v in row.values())}</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def _cell(value: Any, cell: Callable[[Any], str]) -> str:
    return f"<td>{'–' if value is None else escape(cell(value))}</td>"
