"""The launches of a run on one machine: one, or, where the stages of its family have other numbers
of ranks, one after the other.
"""

from __future__ import annotations

from typing import Protocol

from motet.core.errors import UserError
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.agent import OTHER_RANKS
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.stage_layouts import beginning


class StageStart(Protocol):
    """Launches a run from an attempt that was claimed, by the settings of a stage; returns the exit
    code.
    """

    def __call__(self, attempt: int, *, own: RunSettings, stage: int | None) -> int: ...


def in_turn(settings: RunSettings, rundir: RunDir, start: StageStart) -> int:
    """Launch a run until it ends, with the ranks that the stage at hand has; return the exit code.

    A stage that is over is no failure: what goes on is another launch, from its last checkpoint.

    Raises:
        UserError: ranks ended so that others go on, and those would be the same.
    """
    before = None
    while True:
        own, stage = beginning(settings, rundir)
        if own.layout == before:
            raise UserError(
                f"{rundir.root}: the ranks of stage {stage} ended for those of another stage, and "
                f"the newest checkpoint is of the same; to go on: motet resume {rundir.root}"
            )
        code = start(rundir.next_attempt(), own=own, stage=stage)
        if code != OTHER_RANKS:
            return code
        before = own.layout
