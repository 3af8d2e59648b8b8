"""`motet experiments list`: the experiments of a run.yaml, or those that are built in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from motet.launcher.commands import common, options
from motet.launcher.output import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, or none."""
    options.as_json(parser)
    options.run_yaml(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """The experiments of a run.yaml; without one, the kinds that are built in."""
    if arguments.run_yaml is None:
        rows = [_kind_row(use, kind) for use, kind in _library().items()]
    else:
        rows = [_row(entry) for entry in common.load_settings(arguments).experiments.list]
    if arguments.json:
        terminal.print_json(rows)
    elif rows:
        terminal.print_table(rows)
    else:
        print("no experiments")
    return 0


def _library() -> dict[str, Any]:
    from motet.experiments.library import LIBRARY

    return dict(LIBRARY)


def _kind_row(use: str, kind: Any) -> dict[str, Any]:
    from motet.experiments.design.spec import parse_experiments

    (spec,), _ = parse_experiments([{"name": use, "use": use}], Path.cwd())
    primary = next(outcome for outcome in kind(spec).outcomes if outcome.primary)
    return {
        "use": use,
        "doses": list(spec.doses),
        "primary outcome": f"{primary.label} ({primary.unit})",
        "description": kind.description,
    }


def _row(entry: Any) -> dict[str, Any]:
    kind = _library().get(str(entry.get("use")))
    doses = entry.get("doses") or [arm.get("dose") for arm in entry.get("arms") or []]
    return {
        "name": entry.get("name"),
        "use": entry.get("use"),
        "doses": doses or getattr(kind, "defaults", {}).get("doses"),
        "items": entry.get("items")
        or (f"generated: {entry['generate']}" if "generate" in entry else None),
        "hypothesis": entry.get("hypothesis") or getattr(kind, "defaults", {}).get("hypothesis"),
    }
