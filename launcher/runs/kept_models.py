"""Which checkpoint has which model of a run whose members grow one into the other. Torch-free."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.errors import DamagedFile, UserError
from motet.core.files import read_json
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.models.family.base import WHOLE, Member


def refuse_slices(rundir: RunDir, option: str) -> None:
    """Raise `UserError` where the models of a run are no slices of one."""
    if is_growing(rundir) and not (read_json(rundir.manifest)["stages"][-1].get("members")):
        raise UserError(
            f"{option}: members of this run grew one into the other, and none is a slice of the "
            "last; give --member or all of them"
        )


def is_growing(rundir: RunDir) -> bool:
    """Whether the members of a run are models of their own that grow one into the other."""
    return bool(read_json(rundir.manifest).get("stages"))


def stage_with(stages: Sequence[Mapping[str, Any]], name: str) -> str:
    """The name of the stage that trains a member: itself, or, of a slice, the one that has it
    (`stages` of a manifest); what no stage names is a slice of the last.
    """
    if name in {stage["name"] for stage in stages}:
        return name
    having = [stage["name"] for stage in stages if name in stage.get("members", ())]
    return str((having or [stages[-1]["name"]])[0])


def inside_of(rundir: RunDir, member: Member | None) -> Member | None:
    """A member as a slice of the model of its checkpoint; None where it is that model itself."""
    if member is None or not (stages := read_json(rundir.manifest).get("stages")):
        return member
    return None if stage_with(stages, member.name) == member.name else member


def chains(manifest: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """The models of a run in the orders in which neighbours are compared: as they grew; then of
    each stage the slices with their model, by size, and those that joined it each after what it
    was.

    Args:
        names: of those that there are, by size.
    """
    stages = manifest.get("stages") or ()
    found = [[stage["name"] for stage in stages if stage["name"] in names]]
    for stage in stages:
        inside = {*stage.get("members", ()), stage["name"]}
        found.append([name for name in names if name in inside])
        carried = stage.get("carried", {})
        found += [[was, now] for now, was in carried.items() if {was, now} <= {*names}]
    if not stages:
        found.append(list(names))
    return [chain for chain in found if len(chain) > 1]


def sequences_read(settings: RunSettings, stages: Sequence[Mapping[str, Any]]) -> int:
    """How many sequences a run reads: those that it trains on, and behind them those that maps of
    learned operators do. Held-out text that lies among them is not unseen.

    Args:
        stages: of its manifest.
    """
    learned = sum(stage.get("learning_tokens", 0) for stage in stages)
    return settings.slots_before(settings.steps) + learned // settings.data.sequence_length


def settled_starts(rundir: RunDir) -> list[int]:
    """The steps at which stages began of a run whose loss ends some, as its newest checkpoint that
    can be read says; [] where all were known before, or nothing is known yet.
    """
    for step in reversed(rundir.checkpoint_steps()):
        with contextlib.suppress(DamagedFile):
            stage = read_checkpoint(rundir, step).get("stage") or {}
            return [int(start) for start in stage.get("starts", ())]
    return []


def stages_of(rundir: RunDir, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run's manifest, with the steps at which they really began; those that have
    not begun keep the step at which they do at the latest.
    """
    starts = settled_starts(rundir)
    return [
        {**stage, "start_step": starts[number] if number < len(starts) else stage["start_step"]}
        for number, stage in enumerate(manifest.get("stages") or ())
    ]


def held_by(rundir: RunDir, step: int) -> str:
    """The name of the model that a checkpoint has."""
    return str((read_checkpoint(rundir, step).get("stage") or {}).get("name", WHOLE))


def step_of(rundir: RunDir, step: int, name: str) -> int:
    """The step of the checkpoint that has a model as it was after `step` updates: of one that has
    grown since, the last of its own.
    """
    if not (stages := read_json(rundir.manifest).get("stages")):
        return step
    name = stage_with(stages, name)
    known = [one for one in rundir.checkpoint_steps() if one <= step]
    found = [one for one in known if held_by(rundir, one) == name]
    if not found:
        there = ", ".join(dict.fromkeys(held_by(rundir, one) for one in known)) or "none"
        raise UserError(
            f"--member {name}: no checkpoint up to step {step:,} has it; there are {there}"
        )
    return found[-1]
