"""The exact insertions of a run, or of one that its settings would make, as a file for others."""

from __future__ import annotations

import tempfile
from pathlib import Path

from motet.core.errors import UserError
from motet.experiments.design.exchange import write_insertions
from motet.experiments.design.frozen import freeze
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir
from motet.launcher.study.before_training import build, tokenizer_of
from motet.launcher.study.contamination import with_found


def export_run(run: RunDir, output: Path) -> int:
    """Write the insertions that a run was frozen with; return how many they are."""
    return write_insertions(run.plan, tokenizer_of(run_yaml.load(run.resolved_yaml)), output)


def export_settings(settings: RunSettings, output: Path) -> int:
    """Write the insertions that a run of these settings would have; return how many they are.

    Raises:
        UserError: every problem that `check` tells; no experiments.
    """
    study = with_found(build(settings, must_answer=True), settings)
    if not study.questions:
        raise UserError("experiments: there are none to export")
    with tempfile.TemporaryDirectory() as folder:
        freeze(study, Path(folder))
        return write_insertions(Path(folder), study.setting.tokenizer, output)
