"""What an argument names: the settings of a RUN.yaml, a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.access import follow
from motet.core.errors import Problem, UserError, raise_problems
from motet.launcher.config.run_yaml import inspect, load
from motet.launcher.config.sections import RunSettings
from motet.launcher.follow.facts import find_runs
from motet.launcher.runs.rundir import RunDir


def load_settings(arguments: argparse.Namespace) -> RunSettings:
    """The settings that RUN.yaml and the command line give."""
    return load(run_yaml(arguments), arguments.settings)


def inspected(
    arguments: argparse.Namespace,
) -> tuple[RunSettings | None, list[Problem], list[Problem]]:
    """As `load_questions`, with problems and warnings handed back; None when the file cannot be
    read at all.
    """
    from motet.launcher.runs.guest_settings import inspect_questions

    try:
        return inspect_questions(run_yaml(arguments), arguments.settings)
    except UserError as error:
        return None, [Problem(str(arguments.run_yaml), str(error))], []


def load_questions(arguments: argparse.Namespace) -> RunSettings:
    """As `load_settings`, for commands that only read the questions: a guest's file will do."""
    from motet.launcher.runs.guest_settings import inspect_questions

    settings, problems, _ = inspect_questions(run_yaml(arguments), arguments.settings)
    raise_problems(problems)
    return settings


def run_yaml(arguments: argparse.Namespace) -> Path:
    """The file that a command was given."""
    path = Path(arguments.run_yaml)
    if path.is_dir() and (path / "run.yaml").exists():
        raise UserError(f"{path} is a folder; give the file, {path / 'run.yaml'}")
    if "=" in path.name and not path.exists():
        raise UserError(f"{path}: the run.yaml comes first, then settings such as this one")
    return path


def open_run(name: str, runs: str = "runs") -> RunDir:
    """The run that an argument names: its folder, its name inside the folder of runs, or the
    run.yaml that it was made of.

    Raises:
        UserError: there is none, or a run.yaml has several.
    """
    path, inside = Path(name), Path(runs) / name
    if path.is_file():
        found = _run_of(path)
    elif not path.exists() and (inside / "resolved.yaml").exists():
        found = RunDir.open(inside)
    else:
        found = RunDir.open(path)
    follow(found.root)  # what is written into it, or made of it, is as open as it is
    return found


def ended(rundir: RunDir, code: int, machine: int = 0) -> int:
    """Tell trackers and alerts how a run ended, on the first machine; return its exit code."""
    if machine == 0 and rundir.resolved_yaml.exists():
        from motet.launcher.report import ended

        ended.after(rundir, f"exit code {code}" if code else "")
    return code


def _run_of(file: Path) -> RunDir:
    if (file.parent / "resolved.yaml").exists():  # a file of the run itself
        return RunDir.open(file.parent)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file} is no run; give its folder, such as runs/NAME, or its run.yaml")
    # What is wrong with the file by now does not matter: where its runs lie is asked, no more.
    settings, _ = inspect(file, begun=lambda settings: True)
    runs = Path(settings.runs)
    if settings.name and (runs / settings.name / "resolved.yaml").exists():
        return RunDir.open(runs / settings.name)
    found = _made_of(file, settings) if runs.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(run.root) for run in found)
        raise UserError(f"{file} has {len(found)} runs; give one of {listed}")
    raise UserError(
        f"{file} has no run yet: there is no {runs / (settings.name or 'NAME')}; "
        f"`motet train {file}` starts it"
    )


def _made_of(file: Path, settings: RunSettings) -> list[RunDir]:
    """Runs that were given another name on the command line, and those of an array of seeds."""
    text, seeds = file.read_text(encoding="utf-8").rstrip(), f"{settings.name}-seed"
    return [
        run
        for run in find_runs(Path(settings.runs))
        if (settings.name and run.name.startswith(seeds) and run.name[len(seeds) :].isdigit())
        or (run.run_yaml.exists() and run.run_yaml.read_text(encoding="utf-8").startswith(text))
    ]
