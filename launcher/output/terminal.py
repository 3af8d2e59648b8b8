"""Tables, facts and JSON on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.core.marks import marked_json, rich_console

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """JSON for machines; NaN, which JSON lacks, becomes null."""
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str, allow_nan=False)
    print(marked_json(text))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def console() -> Console:
    """Rich's console on standard output; wide when it is no terminal, so that files hold whole
    lines.
    """
    out = rich_console(highlight=False)
    return out if out.is_terminal else rich_console(highlight=False, width=160)


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(child) for child in value)
    return str(value)


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> None:
    """A table of dictionaries; `columns` maps keys to headings (default: the keys of the rows)."""
    from rich.table import Table
    from rich.text import Text

    if columns is None:
        columns = {key: key.replace("_", " ") for row in rows for key in row}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key, heading in columns.items():
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in columns))
    console().print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned lines, as comments, so that the whole dry run can be pasted."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"# {name.ljust(width)}  {value}")
