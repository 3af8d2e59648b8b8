"""Which scheduler a run has: a registered one, or a class of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from motet.core.errors import UserError, suggest
from motet.core.files import read_json, write_json
from motet.core.plugins import (
    is_reference,
    keep_source,
    load_class,
    mistakes_of,
    parse_reference,
    source_sha256,
)
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs.own_scheduler import guarded
from motet.launcher.jobs.scheduler import Scheduler
from motet.launcher.jobs.slurm_scheduler import SlurmScheduler
from motet.launcher.runs.rundir import RunDir

SCHEDULERS: dict[str, type[Scheduler]] = {"slurm": SlurmScheduler}
SETTING = "scheduler"


def make(name: str, folder: Path, sha256: str | None = None) -> Scheduler:
    """Return the scheduler of a setting.

    Args:
        name: registered, or a reference such as `my_scheduler.py:MyQueue`.
        folder: of run.yaml, or of a frozen run's plugins.
        sha256: of the source, as it was frozen.

    Raises:
        UserError: there is none of this name, or its file has a mistake.
    """
    if is_reference(name):
        kind = load_class(parse_reference(name, SETTING), folder, Scheduler, SETTING, sha256)
        with mistakes_of(kind, SETTING):
            made: Scheduler = guarded(kind)()
        return made
    if name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise UserError(
            f"{SETTING}: is {name!r}; there are {known}{suggest(name, SCHEDULERS)}, or a class of "
            "your own as my_scheduler.py:MyQueue"
        )
    return SCHEDULERS[name]()


def of_settings(settings: RunSettings) -> Scheduler:
    """Return the scheduler of a run that is about to be made: a class of the user's own lies beside
    its run.yaml.
    """
    return make(settings.scheduler, Path(settings.base))


def of_run(run: RunDir, name: str) -> Scheduler:
    """Return the scheduler that a run was frozen with; a class of the user's own is read from its
    snapshot.

    Raises:
        UserError: the run was frozen without it, or its source is missing or altered.
    """
    if not is_reference(name):
        return make(name, run.plugins)
    known = read_json(run.manifest).get("plugins", {})
    if name not in known:
        raise UserError(f"{SETTING}: is {name!r}, and the run was frozen without it; leave it out")
    return make(name, run.plugins, known[name])


class Schedulers:
    """The schedulers of many runs, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Scheduler] = {}

    def of(self, run: RunDir, name: str) -> Scheduler:
        """As `of_run`; runs that were frozen with one source share their scheduler."""
        source = read_json(run.manifest).get("plugins", {}).get(name, "") if ":" in name else ""
        if (name, source) not in self._made:
            self._made[name, source] = of_run(run, name)
        return self._made[name, source]


def keep(settings: RunSettings, run: RunDir) -> None:
    """Copy the source of a scheduler of the user's own into the run's snapshot, and its SHA-256
    into the manifest.
    """
    name = settings.scheduler
    if not is_reference(name):
        return
    reference = parse_reference(name, SETTING)
    keep_source(reference, Path(settings.base), run.plugins)
    manifest: dict[str, Any] = read_json(run.manifest)
    hashes = {**manifest.get("plugins", {}), name: source_sha256(reference, run.plugins, SETTING)}
    write_json(run.manifest, {**manifest, "plugins": hashes})


def size_of(settings: RunSettings) -> tuple[int, int]:
    """Return (nodes, processes of all of them) that a run which is to be made asks for."""
    return of_settings(settings).size(settings)


def world_size(settings: RunSettings) -> int:
    """Return the processes of a run that is to be submitted, over all nodes."""
    return size_of(settings)[1]


def title(name: str) -> str:
    """Return the name of a scheduler in messages, without loading it."""
    if name in SCHEDULERS:
        return SCHEDULERS[name].title
    return name.rpartition(":")[2] or name


def recorded() -> tuple[str, ...]:
    """Return what begins the names of variables of all registered schedulers that are kept with an
    attempt.
    """
    return tuple(prefix for kind in SCHEDULERS.values() for prefix in kind.recorded)
