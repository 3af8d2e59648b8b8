"""The study of a run: all its questions, assigned to arms, with a place for every exposure. Nothing
is written here; `frozen` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.plugins import PluginError
from motet.experiments.design.assignment import Question, ask
from motet.experiments.design.lock import (
    CHANGED,
    Registered,
    next_lock,
    placed_tombstones,
    placement_hash,
    read_lock,
)
from motet.experiments.design.requests import Setting, build_request, request_problems
from motet.experiments.design.shares import sharing_problems
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.design.trial import trial_problems
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


def with_controls(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries, with an A/A placebo and a positive control added where none is listed."""
    if not entries:
        return []
    used = {entry.get("use") for entry in entries if isinstance(entry, Mapping)}
    return [*entries, *(control for control in CONTROLS if control["use"] not in used)]


@dataclass(frozen=True)
class _Asked:
    """One experiment with everything that is known before places are drawn."""

    question: Question
    request: Request
    entry: Registered


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
        UserError: every problem of items, schedules and room, at once.
    """
    registered: tuple[Registered, ...] = ()
    tombstones: dict[str, Claims] = {}
    if lock_folder:
        registered, tombstones = read_lock(lock_folder, setting.seed, setting.sequence_length)
    known = {entry.name: entry for entry in registered}
    problems: list[Problem] = []
    found = [_asked(spec, known.get(spec.name), setting, problems) for spec in specs]
    raise_problems(problems)
    asked = {one.entry.name: one for one in found if one is not None}
    named = [asked[spec.name] for spec in specs]
    problems += sharing_problems([one.question for one in named], [one.request for one in named])
    raise_problems(problems)
    # Who registered first claims first. New ones come after, those with little choice before those
    # that can go elsewhere; a name breaks ties, so that the order in the file decides nothing.
    order = [entry.name for entry in registered if entry.name in asked]
    new = asked.keys() - known.keys()
    order += sorted(new, key=lambda name: (tightness(asked[name].request), name))
    requests = tuple(asked[name].request for name in order)
    lock = next_lock(registered, {name: one.entry for name, one in asked.items()}, order)
    plan = compile_plan(
        requests,
        setting.seed,
        setting.sequence_length,
        placed_tombstones(lock, tombstones),
        setting.stream.boundaries,
    )
    questions = tuple(asked[name].question for name in order)
    return Study(setting, questions, requests, lock, tombstones, plan)


def _asked(
    spec: ExperimentSpec, before: Registered | None, setting: Setting, problems: list[Problem]
) -> _Asked | None:
    """Assign one experiment's units and list the exposures that it asks for."""
    where = f"experiments.{spec.name}"
    try:
        question = ask(spec, setting.seed, setting.kinds)
    except PluginError as error:
        problems.append(error.problem)
        return None
    except UserError as error:
        problems.append(Problem(where, str(error)))
        return None
    if wrong := trial_problems(question, setting.steps_total):
        problems += wrong
        return None
    if said := _judged_too_early_or_late(spec, setting.steps_total):
        problems.append(Problem(f"{where}.judge_at", said))
    schedule = before.schedule if before else spec.schedule.resolve(setting.steps_total)
    if before and spec.schedule != before.asked:
        problems.append(Problem(f"{where}.schedule", CHANGED))
    request = build_request(question, schedule, setting)
    entry = Registered(spec.name, spec.schedule, schedule, placement_hash(request))
    problems += request_problems(request, setting)
    if before and before.placement_sha256 != entry.placement_sha256:
        problems.append(Problem(where, CHANGED))
    return _Asked(question, request, entry)


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
