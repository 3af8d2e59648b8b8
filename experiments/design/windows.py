"""Schedules that fit: where experiments ask for the same few steps, other steps that have room.

Forgetting shows everything in one step, knowledge every hundred steps; a run of many such
experiments at their defaults has no room there, and plenty next to it. Steps are looked for in the
order in which experiments claim their places, with the placing itself, so that what is proposed
fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from motet.core.errors import Problem, UserError
from motet.experiments.design.requests import Setting, slot_windows
from motet.experiments.design.spec import Schedule
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import Request, place

SHIFTED = ("steps", "every")
FULLEST = 0.6
"""A window that would be fuller is not tried: random places fill three quarters at most."""
FARTHEST = 2_000
"""Steps further away are not looked at: a run of a million would try each for each experiment."""


def fitting_schedules(
    requests: Sequence[Request],
    schedules: Mapping[str, Schedule],
    setting: Setting,
    taken: Claims,
) -> dict[str, Schedule] | None:
    """Return other schedules for the experiments that find no room; None where none are found.

    Args:
        requests: in the order in which they claim; none was placed by an earlier run.
        schedules: of each experiment, with times as whole steps.
        setting: the run.
        taken: what claims before all of them.
    """
    found: dict[str, Schedule] = {}
    for request in requests:
        name = request.experiment
        schedule, fitted = schedules[name], None
        may_move = schedule.kind in SHIFTED and request.offset is None
        for number, moved in enumerate(_moved(schedule, setting.steps_total if may_move else 0)):
            tried = _asking(request, moved, setting) if number else request
            if number and not _has_room(tried, setting, taken):
                continue
            try:
                fitted = place(
                    tried,
                    setting.seed,
                    setting.sequence_length,
                    taken,
                    setting.stream.boundaries,
                )
            except UserError:
                continue
            found |= {name: moved} if number else {}
            break
        if fitted is None:
            return None
        taken = fitted.claims
    return found


def said(problems: Sequence[Problem], fitting: Mapping[str, Schedule]) -> list[Problem]:
    """Problems of room, each with the schedule that fits."""
    told = []
    for problem in problems if fitting else ():
        name = problem.setting.removeprefix("experiments.")
        what = "; it fits where it is once the others have the schedules proposed for them"
        if name in fitting:
            what = f"; schedule: {written(fitting[name])} fits, beside what is said of the others"
        told.append(Problem(problem.setting, problem.message + what))
    return told or list(problems)


def written(schedule: Schedule) -> str:
    """A schedule as YAML."""
    if schedule.kind == "steps":
        return f"{{kind: steps, at: [{', '.join(str(int(step)) for step in schedule.at)}]}}"
    return f"{{kind: every, every: {int(schedule.every)}, start: {int(schedule.start)}}}"


def _moved(schedule: Schedule, steps_total: int) -> Iterator[Schedule]:
    """The schedule itself, then the same some steps later or earlier, nearest first."""
    yield schedule
    for distance in range(1, min(steps_total, FARTHEST)):
        yield shifted(schedule, distance)
        yield shifted(schedule, -distance)


def shifted(schedule: Schedule, by: int) -> Schedule:
    """All times so many steps later."""
    at = tuple(int(step) + by for step in schedule.at)
    return replace(schedule, at=at, start=int(schedule.start) + by)


def _asking(request: Request, schedule: Schedule, setting: Setting) -> Request:
    repetition = request.repetition.astype(np.int64)
    steps, length = setting.steps, setting.sequence_length
    first, last = slot_windows(schedule, steps, length, repetition, None)
    return replace(request, first_slot=first, last_slot=last)


def _has_room(request: Request, setting: Setting, taken: Claims) -> bool:
    """Whether each of its windows lies after the first step in the run, with room for it."""
    first, last = request.first_slot, request.last_slot
    least, most = (setting.steps.slots_before(step) for step in (1, setting.steps_total))
    if len(first) == 0 or first.min() < least or last.max() > most:
        return False
    windows, row = np.unique(np.stack([first, last], axis=1), axis=0, return_inverse=True)
    asked = np.bincount(row.ravel(), weights=request.texts.lengths()[request.text])
    length = setting.sequence_length
    for (start, stop), tokens in zip((windows * length).tolist(), asked.tolist(), strict=True):
        within = np.minimum(taken.stop, stop) - np.maximum(taken.start, start)
        if tokens + within[within > 0].sum() > FULLEST * (stop - start):
            return False
    return True
