"""What a run found: `report.json`, one HTML page, a table for the terminal, and data frames.

Others use `build` (writes both files; the page needs nothing but itself), `terminal_summary`,
`loaded` (`motet.load`) and `tables` (frames as CSV, Parquet, Markdown and LaTeX).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from motet.launcher.runs.rundir import RunDir

__all__ = ["build", "terminal_summary"]


def build(rundir: RunDir) -> Path:
    """Write `report.json` and `report.html` of a run, each whole or not at all; return the path of
    the page.

    Works at any time: an unfinished run gives a provisional page.

    Raises:
        UserError: the folder has no manifest, so it is no run.
    """
    from motet.core.files import atomic_write, write_json
    from motet.launcher.report.collect import assemble, collect
    from motet.launcher.report.page import render
    from motet.launcher.report.places import without_places

    report = without_places(assemble(collect(rundir)), rundir.root)
    write_json(rundir.report_json, report)
    atomic_write(rundir.report_html, render(report))
    return rundir.report_html


def terminal_summary(report: Mapping[str, Any]) -> Group:
    """The answers of a `report.json` as something that `rich` prints."""
    from motet.launcher.report.terminal import terminal_summary as summary

    return summary(report)
