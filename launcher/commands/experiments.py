"""`motet experiments list | check | power | preview | audit`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.launcher.commands import common
from motet.launcher.config.sections import RunSettings

POWER_COLUMNS = {
    "name": "experiment",
    "use": "use",
    "units": "units",
    "smallest_detectable": "smallest detectable effect",
    "unit": "unit",
    "standardized": "in standard deviations",
}


def show_list(arguments: argparse.Namespace) -> int:
    """The experiments of a run.yaml; without one, the kinds that are built in."""
    if arguments.run_yaml is None:
        rows = [_kind_row(use, kind) for use, kind in _library().items()]
    else:
        rows = [_row(entry) for entry in common.load_settings(arguments).experiments.list]
    if arguments.json:
        common.print_json(rows)
    elif rows:
        common.print_table(rows)
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


def check(arguments: argparse.Namespace) -> int:
    """Every problem of the settings, the experiments and their items, at once."""
    settings, problems = common.inspect_settings(arguments)
    if settings is not None and not problems:
        problems = _study_problems(settings)
    if arguments.json:
        listed = [problem._asdict() for problem in problems]
        common.print_json({"ok": not problems, "problems": listed})
        return 2 if problems else 0
    raise_problems(problems)
    assert settings is not None
    count = len(settings.experiments.list)
    controls = " and the controls" if settings.experiments.controls else ""
    print(f"no problems in {count} experiment{'s' if count != 1 else ''}{controls}")
    return 0


def _study_problems(settings: RunSettings) -> list[Problem]:
    from motet.launcher.study import build as study

    try:
        return list(study.check(settings))
    except UserError as error:
        return [Problem("experiments", str(error))]


def power(arguments: argparse.Namespace) -> int:
    """The smallest effect that each experiment can detect, before any training."""
    from motet.launcher.study import build as study

    rows = study.power_table(common.load_settings(arguments))
    if arguments.json:
        common.print_json(rows)
    elif not rows:
        print("no experiments")
    else:
        common.print_table(rows, POWER_COLUMNS)
        print()
        for row in rows:
            alpha, power_ = common.cell(row.get("alpha")), common.cell(row.get("power"))
            print(f"{row['name']}: power {power_} at alpha {alpha}; {row.get('assumption')}")
    return 0


def preview(arguments: argparse.Namespace) -> int:
    """Sample exposures, decoded in their context."""
    from motet.launcher.study import build as study

    if arguments.count < 1:
        raise UserError(f"--count {arguments.count} must be at least 1")
    print(study.preview(common.load_settings(arguments), arguments.count))
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Whether every planned exposure was consumed exactly once in the lineage of the final weights."""
    from motet.launcher.study.outcome import audit_run

    result = audit_run(common.open_run(arguments.run).root, arguments.replay)
    if arguments.json:
        common.print_json({"ok": result.ok, "lines": list(result.lines)})
    else:
        for line in result.lines:
            print(line)
        sys.stdout.flush()
    return 0 if result.ok else 1
