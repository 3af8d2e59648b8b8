"""The study of a run: all its questions, assigned to arms, with a place for every exposure. Nothing
is written here; `frozen` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from motet.core.errors import Problem, UserError, problems_in, raise_problems
from motet.experiments.design.assignment import Question, ask
from motet.experiments.design.decontaminate import NOTHING, Decision, Fixed, overlays
from motet.experiments.design.imported import WHERE, fixed_of
from motet.experiments.design.lock import (
    CHANGED,
    Registered,
    next_lock,
    placed_tombstones,
    placement_hash,
    read_lock,
)
from motet.experiments.design.removal import removal_request
from motet.experiments.design.requests import Setting, build_request, request_problems
from motet.experiments.design.room import room_problem
from motet.experiments.design.shares import sharing_problems
from motet.experiments.design.spec import ExperimentSpec, Schedule
from motet.experiments.design.trial import trial_problems
from motet.experiments.design.windows import fitting_schedules, said
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import CompiledPlan, Request, compile_plan

CONTROLS = (
    {"name": "aa-placebo", "use": "placebo"},
    {"name": "positive-control", "use": "positive_control"},
)


@dataclass(frozen=True)
class Study:
    """Every question of a run with its exposures, compiled but not yet written."""

    setting: Setting
    questions: tuple[Question, ...]
    requests: tuple[Request, ...]
    lock: tuple[Registered, ...]
    tombstones: Mapping[str, Claims]
    plan: CompiledPlan
    decision: Decision = NOTHING
    fixed: Fixed | None = None
    imported: Fixed | None = None


def with_controls(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries, with an A/A placebo and a positive control added where none is listed."""
    if not entries:
        return []
    used = {entry.get("use") for entry in entries if isinstance(entry, Mapping)}
    return [*entries, *(control for control in CONTROLS if control["use"] not in used)]


class Asking(Protocol):
    """The questions of a run and where they are asked; a `Study` and a `Draft` are such."""

    @property
    def setting(self) -> Setting: ...

    @property
    def questions(self) -> tuple[Question, ...]: ...


@dataclass(frozen=True)
class _One:
    """One experiment with everything that is known before places are drawn."""

    question: Question
    request: Request
    entry: Registered


@dataclass(frozen=True)
class Draft:
    """Every question of a run and the exposures that it asks for, before places are drawn.

    Attributes:
        setting: the run.
        asked: in the order in which they were given; those whose items cannot be read are left out.
        registered, tombstones: of the earlier run whose placements must not move.
        problems: of items, schedules and undeclared sharing.
        placeable: no experiment asks for exposures that cannot be.
        decision: what is done about units that the corpora hold.
    """

    setting: Setting
    asked: tuple[_One, ...]
    registered: tuple[Registered, ...]
    tombstones: Mapping[str, Claims]
    problems: tuple[Problem, ...]
    placeable: bool
    decision: Decision = NOTHING

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(one.question for one in self.asked)


def draft_study(
    specs: Sequence[ExperimentSpec],
    setting: Setting,
    lock_folder: Path | None = None,
    decision: Decision = NOTHING,
) -> Draft:
    """Assign units and list the exposures that every experiment asks for, with every problem.

    Args:
        specs: in any order.
        setting: the run.
        lock_folder: `plan/` of an earlier run, whose placements must not move.
        decision: what is done about units that the corpora hold.

    Raises:
        UserError: that plan cannot be gone on from.
    """
    setting = replace(setting, avoid=decision.avoid)
    registered: tuple[Registered, ...] = ()
    tombstones: dict[str, Claims] = {}
    if lock_folder:
        registered, tombstones = read_lock(lock_folder, setting.seed, setting.sequence_length)
    known = {entry.name: entry for entry in registered}
    problems: list[Problem] = []
    found = [
        _asked(spec, known.get(spec.name), setting, problems, decision.excluded.get(spec.name))
        for spec in specs
    ]
    asked = tuple(one for one in found if one is not None)
    impossible = [wrong for one in asked for wrong in request_problems(one.request, setting)]
    problems += impossible
    problems += sharing_problems([one.question for one in asked], [one.request for one in asked])
    placeable = not impossible
    return Draft(setting, asked, registered, tombstones, tuple(problems), placeable, decision)


def place_study(draft: Draft) -> Study:
    """Place every exposure of a placeable draft.

    Precedence is the lock's; new experiments follow, narrow windows first, then by name.

    Raises:
        UserError: every experiment for which there is no room.
    """
    setting, registered = draft.setting, draft.registered
    known = {entry.name for entry in registered}
    asked = {one.entry.name: one for one in draft.asked}
    # Who registered first claims first. New ones come after, those with little choice before those
    # that can go elsewhere; a name breaks ties, so that the order in the file decides nothing.
    order = [entry.name for entry in registered if entry.name in asked]
    new = asked.keys() - known
    order += sorted(new, key=lambda name: (tightness(asked[name].request), name))
    requests = tuple(asked[name].request for name in order)
    lock = next_lock(registered, {name: one.entry for name, one in asked.items()}, order)
    fixed = overlays(draft.decision, setting)
    imported = None if setting.insertions is None else fixed_of(setting.insertions, setting)
    there = [one for one in (fixed, imported) if one is not None]
    if fixed is not None and imported is not None:
        theirs, own = imported.placed.claims, fixed.placed.claims
        if own.overlap(theirs.start, theirs.stop).any():
            raise UserError(
                f"{WHERE}={setting.insertions}: some rows lie where base text is replaced; use "
                "experiments.decontaminate.policy: exclude"
            )
    schedules = {name: asked[name].entry.schedule for name in order}
    plan = _compiled(requests, lock, there, draft, schedules)
    questions = tuple(asked[name].question for name in order)
    tombstones, decision = draft.tombstones, draft.decision
    return Study(setting, questions, requests, lock, tombstones, plan, decision, fixed, imported)


def _compiled(
    requests: Sequence[Request],
    lock: Sequence[Registered],
    there: Sequence[Fixed],
    draft: Draft,
    schedules: Mapping[str, Schedule],
) -> CompiledPlan:
    """Place all requests. Where there is no room, the error of a new run proposes schedules that
    fit, if there are any.
    """
    setting, fixed = draft.setting, [(one.request, one.placed) for one in there]
    held = placed_tombstones(lock, draft.tombstones)
    try:
        return compile_plan(
            requests,
            setting.seed,
            setting.sequence_length,
            held,
            setting.stream.boundaries,
            fixed,
        )
    except UserError as error:
        if draft.registered:
            raise
        taken = Claims.none()
        for _, placed in fixed:
            taken = taken.add(placed.claims.start, placed.claims.stop)
        fitting = fitting_schedules(requests, schedules, setting, taken)
        raise_problems(said(problems_in(error, "experiments"), fitting or {}))
        raise


def build_study(
    specs: Sequence[ExperimentSpec], setting: Setting, lock_folder: Path | None = None
) -> Study:
    """Assign units, resolve schedules, and place every exposure.

    Args:
        specs: in any order; precedence is the lock's; new ones follow, narrow windows first, then
            by name.
        setting: the run.
        lock_folder: `plan/` of an earlier run, whose placements must not move.

    Raises:
        UserError: every problem of items, schedules and shared units at once; where there is none,
            every experiment without room.
    """
    draft = draft_study(specs, setting, lock_folder)
    raise_problems(draft.problems)
    return place_study(draft)


def _asked(
    spec: ExperimentSpec,
    before: Registered | None,
    setting: Setting,
    problems: list[Problem],
    without: frozenset[str] | None,
) -> _One | None:
    """Assign one experiment's units and list the exposures that it asks for; None where its units
    cannot be read, or a dose is no exposure.
    """
    where = f"experiments.{spec.name}"
    try:
        tokens = setting.steps.slots_before(setting.steps_total) * setting.sequence_length
        if lacking := room_problem(spec, setting.kinds, setting.tokenizer, tokens):
            problems.append(lacking)
            return None
        question = ask(spec, setting.seed, setting.kinds, without or frozenset())
    except UserError as error:
        problems += problems_in(error, where)
        return None
    problems += trial_problems(question, setting.steps_total)
    if said := _judged_too_early_or_late(spec, setting.steps_total):
        problems.append(Problem(f"{where}.judge_at", said))
    schedule = before.schedule if before else spec.schedule.resolve(setting.steps_total)
    if before and spec.schedule != before.asked:
        problems.append(Problem(f"{where}.schedule", CHANGED))
    try:
        request = (
            removal_request(question, setting)
            if question.experiment.removes
            else build_request(question, schedule, setting)
        )
    except UserError as error:
        problems += problems_in(error, where)
        return None
    entry = Registered(spec.name, spec.schedule, schedule, placement_hash(request))
    if before and before.placement_sha256 != entry.placement_sha256:
        problems.append(Problem(where, CHANGED))
    return _One(question, request, entry)


def _judged_too_early_or_late(spec: ExperimentSpec, steps_total: int) -> str | None:
    """Say why nothing could be judged at the step that an experiment asks for."""
    judged, first = spec.judged_step(steps_total), spec.schedule.first_step(steps_total)
    if judged > steps_total:
        return f"is step {judged:,}, but the run ends after step {steps_total:,}"
    if spec.judge_at is not None and judged <= first:
        return (
            f"is step {judged:,}, before any exposure can be seen: the first may be in step "
            f"{first + 1:,}; judge later, or move the schedule"
        )
    return None


def tightness(request: Request) -> int:
    """Return the narrowest window of a request in slots."""
    return int((request.last_slot - request.first_slot).min(initial=1 << 62))
