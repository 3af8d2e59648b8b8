"""`motet compare`: runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.commands import common, options
from motet.launcher.output import terminal

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

VERDICTS = {"found": "found", "not_found": "not found", "negligible": "negligible"}
CHANCE = (
    "Runs of one seed each show no chance between runs: a difference of losses has no interval "
    "here. Give several seeds of each arm before it is believed."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs or more."""
    options.as_json(parser)
    parser.add_argument("runs", metavar="RUN", nargs="+", help=options.RUN_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Show what was set otherwise, the losses, and each effect with how far it moved."""
    if len(arguments.runs) < 2:
        raise UserError(f"{arguments.runs[0]} is one run; give two or more to compare")
    runs = [common.open_run(name) for name in arguments.runs]
    found = comparison(runs)
    if arguments.json:
        terminal.print_json(found)
        return 0
    tables = (run_rows(found), setting_rows(found), effect_rows(found), whole_rows(found))
    for rows in filter(None, tables):
        terminal.print_table(rows)
        print()
    print(CHANCE)
    return 0


def comparison(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Compare the reports of runs.

    Raises:
        UserError: a run has no report yet, or a damaged file.
    """
    from motet.launcher.report.compared import compared
    from motet.launcher.report.loaded import load

    missing = [str(one.root) for one in runs if not one.report_json.exists()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no report yet; `motet report {missing[0]}` makes it"
        )
    return compared(
        [read_json(one.report_json) for one in runs], [load(one.root).settings for one in runs]
    )


def column_names(found: Mapping[str, Any]) -> list[str]:
    """A heading for each run: its name, numbered where two are called alike."""
    names = [str(row["name"]) for row in found["runs"]]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, start=1)
    ]


def run_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each run."""
    texts = dict.fromkeys(name for row in found["runs"] for name in row["validation"])
    first, rows = found["runs"][0], []
    for row, name in zip(found["runs"], column_names(found), strict=True):
        shown = {"run": name, "steps": row["steps"], "tokens": row["tokens"]}
        shown |= {"parameters": row["parameters"], "loss": _loss(row["loss"], first["loss"])}
        for text in texts:
            values = (row["validation"].get(text), first["validation"].get(text))
            shown[f"loss on {text}"] = _loss(*values)
        rows.append(shown)
    return rows


def _loss(value: float | None, first: float | None) -> str | None:
    if value is None:
        return None
    moved = "" if first is None or value == first else f" ({value - first:+.4f})"
    return f"{value:.4f}{moved}"


def setting_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each setting that is not alike in all runs."""
    names = column_names(found)
    return [
        {"setting": name, **dict(zip(names, values, strict=True))}
        for name, values in found["differing"].items()
    ]


def effect_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each experiment: its effect in each run, and how far it moved from the first."""
    from motet.launcher.report import words

    names, rows = column_names(found), []
    for entry in found["experiments"]:
        row = {"experiment": entry["name"]}
        for name, effect in zip(names, entry["effects"], strict=True):
            row[name] = "–" if effect is None else _effect(effect)
        for name, moved, alike in zip(
            names[1:], entry["differences"], entry["asked_alike"], strict=True
        ):
            text = "–" if alike else "another question"
            if moved is not None:
                text = " ".join(words.estimate({**moved, "unit": entry["unit"]}))
            row[f"{name} less {names[0]}"] = text
        rows.append(row)
    return rows


def _effect(effect: Mapping[str, Any]) -> str:
    from motet.launcher.report import words

    said = VERDICTS.get(effect["verdict"] or "", effect["verdict"] or "")
    return f"{' '.join(words.estimate(effect))} {said}"


def whole_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each global treatment: its arm and what was measured in each run."""
    names = column_names(found)
    return [
        {"global treatment": one["name"]}
        | {
            name: None if mean is None else f"{arm}: {mean:.4g}"
            for name, arm, mean in zip(names, one["arms"], one["means"], strict=True)
        }
        for one in found["whole_run"]
    ]
