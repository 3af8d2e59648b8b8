"""`motet completion`: what a shell needs to complete commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "tcsh", "fish")
_FILES = ("RUN.yaml", "RUN", "FILE", "FILE|RUN", "PATH")
_FOLDERS = ("FOLDER", "RUNS")


def arguments(parser: argparse.ArgumentParser) -> None:
    """A shell."""
    parser.add_argument("shell", choices=SHELLS, help="whose rules are printed")


def run(arguments: argparse.Namespace) -> int:
    """Print the script, made of the parsers of all commands."""
    import shtab

    whole: argparse.ArgumentParser = arguments.whole_parser()
    for action in _actions(whole):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
