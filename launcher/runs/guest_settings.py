"""Which settings a guest obeys: what somebody else's loop decides is refused, not recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import Problem
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.begun import flat

NOT_READ = ("model.", "family.", "validation.", "training.", "checkpoint.", "layout.")
"""A value here would be recorded and not obeyed, but those of `READ`."""
READ = ("training.steps", "training.tokens", "layout.micro_sequences", "layout.timeout_s")
WARMUP = "training.schedule.warmup_steps"
NO_WARMUP: Mapping[str, Any] = {"training": {"schedule": {"warmup_steps": 0}}}
"""In place of the default, which leaves none of a short run."""


def not_read(settings: RunSettings) -> list[str]:
    """Return what was given in settings (over `NO_WARMUP`) that a guest does not read."""
    plain = flat(run_yaml.public(RunSettings(), whole=True)) | {WARMUP: 0}
    given = flat(run_yaml.public(settings, whole=True))
    return [
        name
        for name, value in given.items()
        if name.startswith(NOT_READ) and name not in READ and value != plain.get(name)
    ]


def inspect_questions(
    path: Path, overrides: Sequence[str]
) -> tuple[RunSettings, list[Problem], list[Problem]]:
    """Return settings whose questions are asked, (problems, warnings): a run.yaml that a guest can
    obey is not refused for the usual warm-up, which only `motet train` would do.

    Raises:
        UserError: the file is missing or is no YAML.
    """
    settings, problems = run_yaml.inspect(path, overrides)
    short = [one for one in problems if one.setting == WARMUP]
    if not short:
        return settings, problems, []
    without, left = run_yaml.inspect(path, overrides, NO_WARMUP)
    if any(one.setting == WARMUP for one in left) or not_read(without):
        return settings, problems, []
    told = f"{short[0].message} (for motet train; a guest does not read it)"
    return without, left, [Problem(WARMUP, told)]
