"""`motet submit --grid`: a run and a job of each combination of values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.commands import common
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import grid, schedulers, submission
from motet.launcher.runs.begun import refuse_existing, yaml_with_overrides


def run(
    arguments: argparse.Namespace, print_dry_run: Callable[[submission.Submission], None]
) -> int:
    """Check all runs, then submit them; or print the first one's job, and the names of all."""
    path = common.run_yaml(arguments)
    words = words_of_runs(arguments)
    made = _checked([_settings(path, one) for one in words])
    if arguments.dry_run:
        print_dry_run(made[0])
        print(f"# {len(made)} runs, a job of each; the script above is the first one's")
        for one, given in zip(made, words, strict=True):
            print(f"#   {one.rundirs[0].name}: {' '.join(given[len(arguments.settings) + 1 :])}")
        most = _most_node_hours(made)
        print(f"# at most {most} in all" if most else "# no time limit: see the partition's")
        return 0
    text = path.read_text(encoding="utf-8")
    texts = [yaml_with_overrides(text, one) for one in words]
    for one, ids in zip(made, submission.submit_all(made, texts), strict=True):
        print(*ids, one.rundirs[0].name)
    print(f"submitted {len(made)} runs; `motet status` lists them")
    return 0


def words_of_runs(arguments: argparse.Namespace) -> list[list[str]]:
    """The settings of each run as a command line has them: those that all share, its name, its own.

    Raises:
        UserError: the grid is none, or the run.yaml cannot be read.
    """
    path, given = common.run_yaml(arguments), list(arguments.settings)
    found = grid.points(arguments.grid, given)
    base, _ = run_yaml.inspect(path, given)
    name = base.name if base is not None and base.name else "run"
    return [[*given, f"name={name}-{point.suffix}", *point.words] for point in found]


def _settings(path: Path, words: list[str]) -> RunSettings:
    return run_yaml.load(path, words, world=schedulers.world_size)


def _checked(each: list[RunSettings]) -> list[submission.Submission]:
    """What is submitted for every run, with all checks behind it.

    Raises:
        UserError: of the first run that cannot be.
    """
    out = []
    for settings in each:
        scheduler = schedulers.of_settings(settings)
        request = scheduler.request(settings)
        if request.seeds:
            raise UserError(
                f"{request.section}.array: {list(request.seeds)} makes an array of each run of the "
                f"grid; give --grid seed={','.join(map(str, request.seeds))} instead"
            )
        made = submission.submission([settings], scheduler)
        refuse_existing(settings, made.rundirs[0])
        submission.check(made)
        out.append(made)
    return out


def _most_node_hours(made: list[submission.Submission]) -> str:
    """The most that all jobs take; "" where one has no limit of its own."""
    limits = [one.request.limit_s for one in made]
    if None in limits:
        return ""
    hours = math.fsum(
        one.request.nodes * one.request.chain * (one.request.limit_s or 0) / 3600 for one in made
    )
    return f"{hours:,.4g} node-hours, requeues not counted"
