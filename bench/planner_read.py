"""Reads a table of measured runs: files are recognized by their columns, rows that say nothing that
could run are told and left out.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from planner_observation import Observation, Row, unsound
from planner_rows import READERS, Reader

SHOWN = 5
"""Of the rows that are left out."""


def read(path: Path, where: str = "") -> list[Observation]:
    """Return the rows of a table.

    Args:
        where: "COLUMN=VALUE|VALUE,...": only rows whose columns have these values.

    Raises:
        SystemExit: no such file, columns of no table that is known or without those of `where`, no
            row that can be predicted.
    """
    rows, columns = _cells(path)
    reader = next((reader for needed, reader in READERS if needed <= set(columns)), None)
    if reader is None:
        tables = "; ".join(", ".join(sorted(needed)) for needed, _ in READERS)
        raise SystemExit(
            f"bench/planner.py: {path} has columns of no known table; known are: {tables}"
        )
    wanted = _wanted(path, where, columns)
    found, left_out = [], []
    for line, row in enumerate(rows, 2):
        if all(row[name] in values for name, values in wanted.items()):
            one, why = _read(reader, row)
            if why:
                left_out.append(f"line {line}: {why}")
            elif one is not None:
                found.append(one)
    if left_out:
        told = "; ".join(left_out[:SHOWN]) + ("; ..." if len(left_out) > SHOWN else "")
        print(f"bench/planner.py: {path}: {len(left_out)} rows left out: {told}", file=sys.stderr)
    if not found:
        raise SystemExit(f"bench/planner.py: {path} has no row to predict")
    return found


def _cells(path: Path) -> tuple[list[Row], list[str]]:
    """Return rows and columns; a cell that is not there is empty."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            columns = list(table.fieldnames or [])
            rows = [{k: v or "" for k, v in row.items() if k is not None} for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"bench/planner.py: {path}: {error}") from None
    return rows, columns


def _wanted(path: Path, where: str, columns: list[str]) -> dict[str, list[str]]:
    wanted = dict(part.split("=", 1) for part in where.split(",") if "=" in part)
    unknown = [name for name in wanted if name not in columns]
    if unknown or (where and not wanted):
        raise SystemExit(
            f"bench/planner.py: {path} has no column {', '.join(unknown) or where!r}; columns: "
            f"{', '.join(columns)}"
        )
    return {name: values.split("|") for name, values in wanted.items()}


def _read(reader: Reader, row: Row) -> tuple[Observation | None, str | None]:
    """Return a row, and why it is left out."""
    try:
        one = reader(row)
        return one, unsound(one) if one is not None else None
    except KeyError as error:
        return None, f"no column {error}"
    except ZeroDivisionError:
        return None, "a number is 0"
    except ValueError as error:
        return None, str(error)
