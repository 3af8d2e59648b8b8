"""Which checkpoint has which model of a run whose members grow one into the other. Torch-free."""

from __future__ import annotations

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.models.family.base import WHOLE


def refuse_slices(rundir: RunDir, option: str) -> None:
    """Raise `UserError` where the models of a run are no slices of one."""
    if is_growing(rundir):
        raise UserError(
            f"{option}: members of this run grew one into the other, and none is a slice; give "
            "--member or all of them"
        )


def is_growing(rundir: RunDir) -> bool:
    """Whether the members of a run are models of their own that grow one into the other."""
    return bool(read_json(rundir.manifest).get("stages"))


def held_by(rundir: RunDir, step: int) -> str:
    """The name of the model that a checkpoint has."""
    return str((read_checkpoint(rundir, step).get("stage") or {}).get("name", WHOLE))


def step_of(rundir: RunDir, step: int, name: str) -> int:
    """The step of the checkpoint that has a model as it was after `step` updates: of one that has
    grown since, the last of its own.
    """
    if not is_growing(rundir):
        return step
    known = [one for one in rundir.checkpoint_steps() if one <= step]
    found = [one for one in known if held_by(rundir, one) == name]
    if not found:
        there = ", ".join(dict.fromkeys(held_by(rundir, one) for one in known)) or "none"
        raise UserError(
            f"--member {name}: no checkpoint up to step {step:,} has it; there are {there}"
        )
    return found[-1]
