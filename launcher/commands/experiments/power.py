"""`motet experiments power`: the smallest effect that each experiment can detect."""

from __future__ import annotations

import argparse
from typing import Any

from motet.launcher.commands import common, options
from motet.launcher.output import terminal

POWER_COLUMNS = {
    "name": "experiment",
    "use": "use",
    "units": "units",
    "smallest_detectable": "smallest detectable effect",
    "unit": "unit",
    "standardized": "in standard deviations",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml."""
    options.as_json(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """The smallest effect that each experiment can detect, before any training."""
    from motet.launcher.study import before_training

    rows = before_training.power_table(common.load_questions(arguments))
    if arguments.json:
        terminal.print_json(rows)
    elif not rows:
        print("no experiments")
    else:
        terminal.print_table([row | _none_possible(row) for row in rows], POWER_COLUMNS)
        print()
        for row in rows:
            alpha, power_ = terminal.cell(row.get("alpha")), terminal.cell(row.get("power"))
            print(f"{row['name']}: power {power_} at alpha {alpha}; {row.get('assumption')}")
    return 0


def _none_possible(row: dict[str, Any]) -> dict[str, Any]:
    """Say where no possible effect is found so often; an empty cell would say nothing."""
    return {} if row["possible"] else {"smallest_detectable": "none is possible"}
