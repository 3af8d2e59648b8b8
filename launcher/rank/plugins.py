"""The user's own classes that ranks run, as `training.hooks` and `family.kind` name them.

They are read from the folder of run.yaml while the run is made, and from its snapshot ever after;
the manifest has the SHA-256 of each source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.plugins import (
    MISTAKES,
    PluginError,
    is_reference,
    keep_source,
    load_class,
    parse_reference,
    place,
    source_sha256,
)
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.hooks import Hook, mistake_of
from motet.launcher.runs.families import frozen_class
from motet.launcher.runs.rundir import RunDir
from motet.models.family.base import Family
from motet.parallel.runtime.mesh import World, first_complaint


def named(settings: RunSettings) -> Iterator[tuple[str, str, type]]:
    """Yield (setting, text, base class) of every class that the settings name by a reference."""
    for number, text in enumerate(settings.training.hooks):
        yield f"training.hooks.{number}", text, Hook
    if is_reference(settings.family.kind):
        yield "family.kind", settings.family.kind, Family


def check_plugins(settings: RunSettings) -> None:
    """Load every class that a run.yaml names, before the run exists.

    Raises:
        UserError: all that are missing or wrong, at once.
    """
    problems: list[Problem] = []
    for setting, text, base in named(settings):
        try:
            made = load_class(parse_reference(text, setting), Path(settings.base), base, setting)
            if base is Hook and (why := mistake_of(made)):
                raise PluginError(setting, f"is {text!r}; {why}")
        except PluginError as error:
            problems.append(error.problem)
    raise_problems(problems)


def keep_plugins(settings: RunSettings, run: RunDir) -> dict[str, Any]:
    """Copy the sources into the run's snapshot; return what the manifest says of them, {} where
    there are none.
    """
    hashes = {}
    for setting, text, _ in named(settings):
        reference = parse_reference(text, setting)
        keep_source(reference, Path(settings.base), run.plugins)
        hashes[text] = source_sha256(reference, run.plugins, setting)
    return {"plugins": hashes} if hashes else {}


def load_hooks(
    run: RunDir, settings: RunSettings, manifest: Mapping[str, Any], world: World
) -> list[tuple[str, Hook]]:
    """Make the user's hooks from the run's snapshot (a collective where there are any).

    Raises:
        UserError: on every rank, when one of them finds a source missing or altered, or a hook
            cannot be made.
    """
    hooks: list[tuple[str, Hook]] = []
    complaint = None
    for number, text in enumerate(settings.training.hooks):
        setting = f"training.hooks.{number}"
        try:
            made = frozen_class(run, manifest, setting, text, Hook)
        except PluginError as error:
            complaint = str(error)
            break
        try:
            hooks.append((text, made()))
        except MISTAKES as error:
            complaint = f"{setting}: is {text!r}; it cannot be made: {place(error, made)}"
            break
    if settings.training.hooks and (told := first_complaint(complaint, world)):
        raise UserError(told)
    return hooks
