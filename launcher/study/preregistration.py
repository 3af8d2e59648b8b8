"""A run held to a definition that was signed off before it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.design.frozen import freeze, read_definition
from motet.experiments.design.preregistered import (
    deviations_from,
    preregistration,
    read_preregistration,
)
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir
from motet.launcher.study.before_training import build
from motet.launcher.study.contamination import with_found

SETTING = "experiments.preregistered"
KEPT = "preregistered.json"
"""In `plan/` of a run."""


def registered_text(settings: RunSettings) -> tuple[str, str]:
    """Return (text of the file, SHA-256 of the definition) as a run of these settings would be
    frozen with.

    Raises:
        UserError: every problem that `check` tells; no experiments.
    """
    study = with_found(build(settings, must_answer=True), settings)
    if not study.questions:
        raise UserError("experiments: there are none to freeze")
    with tempfile.TemporaryDirectory() as folder:
        freeze(study, Path(folder))
        definition, sha256 = read_definition(Path(folder))
    return preregistration(definition), sha256


def check_registered(settings: RunSettings) -> None:
    """Refuse a file of preregistration that is none, before anything starts."""
    if settings.experiments.preregistered:
        read_preregistration(Path(settings.experiments.preregistered), SETTING)


def keep_registered(settings: RunSettings, run: RunDir) -> list[str]:
    """Copy the file that a run is held to into its folder; return how the run deviates."""
    if not settings.experiments.preregistered:
        return []
    registered = read_preregistration(Path(settings.experiments.preregistered), SETTING)
    atomic_write(run.plan / KEPT, preregistration(registered))
    found = deviations_from(registered, read_definition(run.plan)[0])
    return [f"not as preregistered: {told}" for told in found]


def preregistered(run: RunDir, definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"preregistered": its SHA-256 and how the frozen definition deviates}; {} for a run
    that is held to none.
    """
    if not (run.plan / KEPT).is_file():
        return {}
    registered = read_preregistration(run.plan / KEPT, SETTING)
    found = deviations_from(registered, definition)
    sha256 = sha256_hex(canonical_json(registered))
    return {"preregistered": {"sha256": sha256, "deviations": found}}
