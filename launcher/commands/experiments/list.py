"""`motet experiments list`: the experiments of a run.yaml, or those that are built in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.launcher.commands import common, options
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal

if TYPE_CHECKING:
    from motet.experiments.library.kinds import Library


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, or none."""
    options.as_json(parser)
    options.run_yaml(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """The experiments of a run.yaml; without one, the kinds that are built in or installed."""
    if arguments.run_yaml is None:
        rows, own = _built_in_rows(), list[str]()
    else:
        rows, own = _run_rows(common.load_questions(arguments))
    if arguments.json:
        terminal.print_json(rows)
    elif rows:
        terminal.print_table(rows)
        for line in own:
            print(line)
    else:
        print("no experiments")
    return 0


def _built_in_rows() -> list[dict[str, Any]]:
    from motet.experiments.library.kinds import LIBRARY, Library, installed

    library = Library(Path.cwd())
    rows = [_kind_row(use, kind, library) for use, kind in LIBRARY.items()]
    for use, value in installed().items():
        try:
            row = _kind_row(use, library.kind(use, f"experiments.{use}"), library)
        except UserError as error:  # a package that does not load hides no other
            row = {"use": use, "description": f"cannot be used: {error}"}
        rows.append(row | {"description": f"{row['description']} ({value})"})
    return rows


def _run_rows(settings: RunSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per experiment of a run.yaml, and what the user's own classes among them declare."""
    from motet.core.plugins import is_plugin
    from motet.experiments.library.kinds import declared_lines
    from motet.launcher.study.before_training import library_of

    library = library_of(settings)
    rows: list[dict[str, Any]] = []
    own: dict[str, list[str]] = {}
    for entry in settings.experiments.list:
        use = str(entry.get("use"))
        kind = library.kind(use, f"experiments.{entry.get('name')}.use")
        rows.append(_row(entry, kind))
        if is_plugin(kind):
            own[use] = declared_lines(use, kind)
    return rows, [line for lines in own.values() for line in ["", *lines]]


def _kind_row(use: str, kind: Any, library: Library) -> dict[str, Any]:
    from motet.experiments.design.parser import parse_experiments

    (spec,), _ = parse_experiments([{"name": use, "use": use}], Path.cwd(), library)
    primary = next(outcome for outcome in kind(spec).outcomes if outcome.primary)
    return {
        "use": use,
        "treatment": kind.treatment,
        "doses": list(spec.doses),
        "primary outcome": f"{primary.label} ({primary.unit})",
        "description": kind.description,
    }


def _row(entry: Any, kind: Any) -> dict[str, Any]:
    doses = entry.get("doses") or [arm.get("dose") for arm in entry.get("arms") or []]
    return {
        "name": entry.get("name"),
        "use": entry.get("use"),
        "doses": doses or kind.defaults.get("doses"),
        "items": entry.get("items")
        or (f"generated: {entry['generate']}" if "generate" in entry else None),
        "hypothesis": entry.get("hypothesis") or kind.defaults.get("hypothesis"),
    }
