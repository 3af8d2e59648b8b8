"""The parser of the command line, and the arguments that several commands share. Nothing heavy is
imported here.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from motet.core.errors import suggest

EXIT_USER_ERROR = 2
RUN_HELP = "a run: its folder, its name in the folder of runs, or the run.yaml it was made of"
SETTINGS_HELP = "any setting of docs/reference.md, such as training.steps=100"


class Parser(argparse.ArgumentParser):
    """Suggests the nearest command when one is misspelt."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if match:
            options = [option.strip(" '") for option in match[2].split(",")]
            hint = suggest(match[1], options)
            message = f"{match[1]!r} is no command{hint}; there are {', '.join(options)}"
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}\n")


def dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and do nothing"
    )


def as_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run_yaml(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add RUN.yaml and settings that follow it."""
    parser.add_argument("run_yaml", metavar="RUN.yaml", nargs=None if required else "?")
    settings(parser)


def grid(parser: argparse.ArgumentParser) -> None:
    """Add --grid."""
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="a.b.c=V,V",
        help="a run and a job for each value; several --grid: for each combination",
    )


def settings(parser: argparse.ArgumentParser, help_text: str = SETTINGS_HELP) -> None:
    """Add settings, as a.b.c=value."""
    # With a default argparse does not call them required.
    parser.add_argument("settings", metavar="a.b.c=value", nargs="*", default=[], help=help_text)


def run_folder(parser: argparse.ArgumentParser) -> None:
    """Add RUN."""
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def runs_folder(parser: argparse.ArgumentParser) -> None:
    """Add --runs."""
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="default: runs")


def nodes(parser: argparse.ArgumentParser) -> None:
    """Add the machines that train together."""
    count = "machines; give each the same command (default: 1)"
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help=count)
    which = "which machine this is, from 0"
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help=which)
    parser.add_argument(
        "--endpoint", default="", metavar="HOST:PORT", help="of machine 0; its network is the run's"
    )


def preregistered(parser: argparse.ArgumentParser) -> None:
    """The definition that a run is held to."""
    what = "what `motet experiments freeze` wrote: the report lists every deviation from it"
    parser.add_argument("--preregistered", metavar="FILE", help=what)


def hold_to(arguments: argparse.Namespace) -> None:
    """Let --preregistered be a setting, as if it stood in run.yaml."""
    if arguments.preregistered:
        path = Path(arguments.preregistered).absolute()
        arguments.settings = [*arguments.settings, f"experiments.preregistered={path}"]


def verify(parser: argparse.ArgumentParser) -> None:
    """Add --verify."""
    how = "hash every file of the corpora again, not those alone that were written since (full)"
    parser.add_argument("--verify", choices=("known", "full"), default="known", help=how)


def step_of_run(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint of a run."""
    parser.add_argument("--step", type=int, help="checkpoint (default: the last)")


def one_model(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """--member, --params or --spec: which model of a run; returns their group, for one more way."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--member", metavar="NAME", help="of its family (default: the whole model)")
    params = "the slice, trained or not, that is nearest to so many parameters, as 200m"
    which.add_argument("--params", metavar="SIZE", help=params)
    spec = "any slice, as '{n_layers: 4, d_ffn: 0.5}': axes as in family.options.members"
    which.add_argument("--spec", metavar="YAML", help=spec)
    return which
