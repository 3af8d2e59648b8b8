"""`motet experiments check`: every problem of a run.yaml and its questions."""

from __future__ import annotations

import argparse

from motet.core.errors import Problem, UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml."""
    options.as_json(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Every problem of the settings, the experiments and their items, at once."""
    settings, problems = common.inspect_settings(arguments)
    if settings is not None and not problems:
        problems = _study_problems(settings)
    if arguments.json:
        listed = [problem._asdict() for problem in problems]
        terminal.print_json({"ok": not problems, "problems": listed})
        return 2 if problems else 0
    raise_problems(problems)
    assert settings is not None
    count = len(settings.experiments.list)
    controls = " and the controls" if settings.experiments.controls else ""
    print(f"no problems in {count} experiment{'s' if count != 1 else ''}{controls}")
    return 0


def _study_problems(settings: RunSettings) -> list[Problem]:
    from motet.launcher.study import before_training

    try:
        return list(before_training.check(settings))
    except UserError as error:
        return [Problem("experiments", str(error))]
