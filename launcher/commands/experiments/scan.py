"""`motet experiments scan`: what the corpora hold of the units, and units that they share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.files import atomic_write
from motet.launcher.commands import common, options
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal

if TYPE_CHECKING:
    from motet.experiments.design.in_corpus import Found

SHOWN = 10
COLUMNS = {
    "experiment": "experiment",
    "unit": "unit",
    "how": "how",
    "corpus": "corpus",
    "document": "document",
    "token": "token",
    "tokens": "tokens",
    "share": "share",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, and where to write all places."""
    options.as_json(parser)
    told = "write every place as a line of JSON"
    parser.add_argument("--out", metavar="FILE.jsonl", default="", help=told)
    shown = f"places shown per experiment (default {SHOWN})"
    parser.add_argument("--most", type=int, default=SHOWN, metavar="N", help=shown)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search all that the run trains on for texts and probes of its units; also the experiments
    for units that they share.
    """
    settings = common.load_questions(arguments)
    found, shared = scanned(settings)
    rows = [_row(one.name, place._asdict()) for one in found for place in one.places]
    if arguments.out:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(Path(arguments.out), lines)
    if arguments.json:
        told = [_counts(one) | {"units": sorted(one.held)} for one in found]
        terminal.print_json({"experiments": told, "places": rows, "shared": shared})
        return 0
    if not found:
        print("no experiments")
        return 0
    terminal.print_table([_counts(one) for one in found])
    _print_places(found, max(0, arguments.most))
    for one in shared:
        print(f"{one['teller']} tells of {one['units']} units of {one['told']}")
    if arguments.out:
        print(f"{len(rows):,} places in {arguments.out}")
    return 0


def scanned(settings: RunSettings) -> tuple[list[Found], list[dict[str, Any]]]:
    """Return what the corpora hold of each experiment, and who tells of whose units.

    Raises:
        UserError: every problem of the definitions and items.
    """
    from motet.core.errors import raise_problems
    from motet.experiments.design.assignment import ask
    from motet.experiments.design.known_overlaps import known_overlaps
    from motet.launcher.study import before_training, contamination

    library = before_training.library_of(settings)
    specs, problems = before_training.specs_of(settings, library)
    raise_problems(problems)
    if not specs:
        return [], []
    questions = [ask(spec, settings.plan_seed, library) for spec in specs]
    asked = {question.name: question.units for question in questions}
    tokenizer = before_training.tokenizer_of(settings)
    found = contamination.searched(settings, asked, tokenizer, 1 << 62)
    shared = [
        {"told": one.told, "teller": one.teller, "units": len(one.units)}
        for one in known_overlaps(questions)
    ]
    return found or [], shared


def _row(experiment: str, place: dict[str, Any]) -> dict[str, Any]:
    return {"experiment": experiment, **place}


def _counts(found: Found) -> dict[str, Any]:
    ways = [place.how for place in found.places]
    return {
        "experiment": found.name,
        "held units": len(found.held),
        "by text": len(found.by_text),
        "by probe": len(found.by_probe),
        "exact places": ways.count("exact"),
        "near places": ways.count("near"),
        "probe places": ways.count("probe"),
        "too short": found.too_short,
        "not listed": found.unlisted,
    }


def _print_places(found: Sequence[Found], most: int) -> None:
    rows = [_row(one.name, place._asdict()) for one in found for place in one.places[:most]]
    if rows:
        print()
        terminal.print_table(rows, COLUMNS)
