"""What an argument names: the settings of a RUN.yaml, the folder of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.errors import Problem, UserError
from motet.launcher.config.run_yaml import inspect, load
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir


def load_settings(arguments: argparse.Namespace) -> RunSettings:
    """The settings that RUN.yaml and the command line give."""
    return load(run_yaml(arguments), arguments.settings)


def inspect_settings(arguments: argparse.Namespace) -> tuple[RunSettings | None, list[Problem]]:
    """As `load_settings`, with the problems handed back; None when the file cannot be read at
    all.
    """
    try:
        return inspect(run_yaml(arguments), arguments.settings)
    except UserError as error:
        return None, [Problem(str(arguments.run_yaml), str(error))]


def run_yaml(arguments: argparse.Namespace) -> Path:
    """The file that a command was given."""
    path = Path(arguments.run_yaml)
    if path.is_dir() and (path / "run.yaml").exists():
        raise UserError(f"{path} is a folder; give the file, {path / 'run.yaml'}")
    if "=" in path.name and not path.exists():
        raise UserError(f"{path}: the run.yaml comes first, then settings such as this one")
    return path


def open_run(path: str) -> RunDir:
    """The run folder that an argument names."""
    return RunDir.open(Path(path))
