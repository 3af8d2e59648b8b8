"""The study of a run: all its questions, assigned, frozen and hashed before step 1, and read back
afterwards.

A frozen study is the folder `plan/`: `definition.json` (canonical; its SHA-256 is the study's
identity), `lock.json` (order of registration and absolute schedules), `exposures.plan`,
`units/NAME.jsonl`, and `tombstones/NAME.npy` for removed experiments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import atomic_write
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import assign, assign_timing, assignment_key, make_design
from motet.experiments.design.requests import Question, build_request, request_problems
from motet.experiments.design.spec import Arm, ExperimentSpec, Schedule
from motet.experiments.library import LIBRARY
from motet.experiments.library.base import ProbeItem, Unit
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import CompiledPlan, Plan, compile_plan, write_plan
from motet.experiments.stream.placement import Claims, Request
from motet.experiments.stream.random import name_key
from motet.experiments.stream.stream import Stream

CHANGED = (
    "its units, doses, lengths or windows differ from those registered in experiments.lock; "
    "restore them, or give the changed experiment a new name"
)
CONTROLS = (
    {"name": "aa-placebo", "use": "placebo"},
    {"name": "positive-control", "use": "positive_control"},
)


@dataclass(frozen=True)
class Setting:
    """The run that a study takes place in.

    Attributes:
        seed: of assignment, placement and analysis.
        steps, steps_total: batch sizes, and the length of the run.
        tokenizer: the run's.
        stream: the clean stream (no plan).
        draws: re-randomizations of the analysis.
        facts: further JSON that identifies the data (corpora and weights).
    """

    seed: int
    steps: Steps
    steps_total: int
    tokenizer: Tokenizer
    stream: Stream
    draws: int
    facts: Mapping[str, Any]

    @property
    def sequence_length(self) -> int:
        return self.stream.sequence_length


@dataclass(frozen=True)
class Registered:
    """One entry of the lock: an experiment, in order of registration.

    `asked` is the schedule as written and `schedule` has absolute steps; `placement_sha256`
    identifies everything that its positions depend on.
    """

    name: str
    asked: Schedule
    schedule: Schedule
    placement_sha256: str
    removed: bool = False


@dataclass(frozen=True)
class Study:
    """Every question of a run with its exposures, compiled but not yet written."""

    setting: Setting
    questions: tuple[Question, ...]
    requests: tuple[Request, ...]
    lock: tuple[Registered, ...]
    tombstones: Mapping[str, Claims]
    plan: CompiledPlan


@dataclass(frozen=True)
class Hashes:
    """What a run, its checkpoints and W&B keep of a frozen study."""

    definition_sha256: str
    plan_sha256: str


def with_controls(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries, with an A/A placebo and a positive control added where none is listed."""
    if not entries:
        return []
    used = {entry.get("use") for entry in entries if isinstance(entry, Mapping)}
    return [*entries, *(control for control in CONTROLS if control["use"] not in used)]


def ask(spec: ExperimentSpec, seed: int) -> Question:
    """Return an experiment with its units assigned to arms."""
    experiment = LIBRARY[spec.use](spec)
    units = experiment.units()
    design = make_design(units, spec.arms)
    arms = assign(design, assignment_key(seed, spec.name))
    timing = None
    if spec.schedule.kind == "early_late":
        timing = assign_timing(design, name_key(seed, "timing", spec.name))
    return Question(experiment, units, design, arms, timing)


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
    registered, tombstones = read_lock(lock_folder, setting) if lock_folder else ((), {})
    known = {entry.name: entry for entry in registered}
    asked: dict[str, tuple[Question, Request]] = {}
    entries: dict[str, Registered] = {}
    problems: list[Problem] = []
    for spec in specs:
        try:
            question = ask(spec, setting.seed)
        except UserError as error:
            problems.append(Problem(f"experiments.{spec.name}", str(error)))
            continue
        before = known.get(spec.name)
        schedule = before.schedule if before else spec.schedule.resolve(setting.steps_total)
        if before and spec.schedule != before.asked:
            problems.append(Problem(f"experiments.{spec.name}.schedule", CHANGED))
        request = _request(question, schedule, setting)
        entries[spec.name] = Registered(spec.name, spec.schedule, schedule, placement_hash(request))
        asked[spec.name] = question, request
        problems += request_problems(
            request, setting.steps_total, setting.steps, setting.sequence_length
        )
        problems += _changed(before, entries[spec.name])
    raise_problems(problems)
    order = [entry.name for entry in registered if entry.name in asked]
    order += sorted(asked.keys() - known.keys(), key=lambda name: (tightness(asked[name][1]), name))
    questions = tuple(asked[name][0] for name in order)
    requests = tuple(asked[name][1] for name in order)
    lock = _next_lock(registered, entries, order)
    plan = compile_plan(
        requests,
        setting.seed,
        setting.sequence_length,
        _placed_tombstones(lock, tombstones),
        setting.stream.boundaries,
    )
    return Study(setting, questions, requests, lock, tombstones, plan)


def tightness(request: Request) -> int:
    """Return the narrowest window of a request in slots: experiments with little choice register
    first.
    """
    return int((request.last_slot - request.first_slot).min(initial=1 << 62))


def _request(question: Question, schedule: Schedule, setting: Setting) -> Request:
    return build_request(
        question,
        schedule,
        setting.steps,
        setting.sequence_length,
        setting.tokenizer,
        setting.stream.base_tokens,
        setting.seed,
    )


def placement_hash(request: Request) -> str:
    """Return the SHA-256 of everything that an experiment's positions depend on."""
    parts: list[npt.NDArray[Any]] = [
        request.unit_keys[request.unit],
        request.repetition,
        request.first_slot,
        request.last_slot,
        request.texts.lengths()[request.text],
    ]
    joined = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return sha256_hex(joined + request.placement.encode())


def _changed(before: Registered | None, now: Registered) -> list[Problem]:
    """Return a problem when an experiment is not the one that was registered under its name."""
    if before is None or before.placement_sha256 == now.placement_sha256:
        return []
    return [
        Problem(
            f"experiments.{now.name}",
            CHANGED,
        )
    ]


def _next_lock(
    registered: Sequence[Registered], entries: Mapping[str, Registered], order: Sequence[str]
) -> tuple[Registered, ...]:
    """Return the lock with new experiments appended, and missing ones kept as removed."""
    kept = [
        entries[entry.name] if entry.name in entries else replace(entry, removed=True)
        for entry in registered
    ]
    before = {entry.name for entry in registered}
    return (*kept, *(entries[name] for name in order if name not in before))


def _placed_tombstones(
    lock: Sequence[Registered], tombstones: Mapping[str, Claims]
) -> list[tuple[int, Claims]]:
    """Return (number of the first request that comes after it, claims) of each removed experiment."""
    placed, number = [], 0
    for entry in lock:
        if entry.removed:
            placed.append((number, tombstones[entry.name]))
        else:
            number += 1
    return placed


def read_lock(folder: Path, setting: Setting) -> tuple[tuple[Registered, ...], dict[str, Claims]]:
    """Read a lock, and the claims of every experiment in it (only removed ones will be used).

    Raises:
        UserError: no lock there, or one made with another seed or sequence length, under which
            every place would move.
    """
    try:
        content = json.loads((folder / "lock.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"experiments.lock={folder}: cannot be read ({error}); give the plan folder of a run"
        ) from None
    lock = tuple(
        Registered(
            entry["name"],
            schedule_of(entry["asked"]),
            schedule_of(entry["schedule"]),
            entry["placement_sha256"],
            entry["removed"],
        )
        for entry in content["experiments"]
    )
    plan = Plan(folder / "exposures.plan")
    for name, then, now in (
        ("seed", plan.seed, setting.seed),
        ("data.sequence_length", plan.sequence_length, setting.sequence_length),
    ):
        if then != now:
            raise UserError(
                f"experiments.lock={folder}: was made with {name}={then}, this run has {now}; "
                "every exposure would move"
            )
    claims = {}
    for entry in lock:
        if entry.removed:
            start, stop = np.load(folder / "tombstones" / f"{entry.name}.npy", allow_pickle=False)
            claims[entry.name] = Claims(start, stop)
        else:
            claims[entry.name] = plan.claims(entry.name)
    return lock, claims


def schedule_of(fields: Mapping[str, Any]) -> Schedule:
    """Return a Schedule from its JSON."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return Schedule(**values)


def definition(study: Study, plan_sha256: str) -> dict[str, Any]:
    """Return the frozen definition: everything that decides what is asked and how it is judged."""
    setting = study.setting
    by_name = {entry.name: entry for entry in study.lock}
    return {
        "version": 1,
        "seed": setting.seed,
        "steps_total": setting.steps_total,
        "batch": [list(change) for change in setting.steps.changes],
        "sequence_length": setting.sequence_length,
        "tokenizer_sha256": setting.tokenizer.sha256,
        "data": dict(setting.facts),
        "analysis": {
            "draws": setting.draws,
            "inference": "randomization test that repeats the assignment",
            "primaries": "Holm",
            "secondaries": "Benjamini-Hochberg",
        },
        "plan_sha256": plan_sha256,
        "experiments": [
            _defined(question, request, by_name[question.name], setting)
            for question, request in zip(study.questions, study.requests, strict=True)
        ],
    }


def _defined(
    question: Question, request: Request, entry: Registered, setting: Setting
) -> dict[str, Any]:
    rows = unit_rows(question)
    treatment = (
        ~request.placebo if question.experiment.inserts_units else np.ones(len(request), bool)
    )
    lengths = request.texts.lengths()[request.text]
    return {
        "spec": question.spec.to_json(),
        "schedule_in_steps": asdict(entry.schedule),
        "outcomes": [asdict(outcome) for outcome in question.experiment.outcomes],
        "units": len(rows),
        "units_sha256": sha256_hex("\n".join(canonical_json(row) for row in rows)),
        "probe_steps": sorted(question.experiment.probe_steps(setting.steps_total)),
        "exposures": int(treatment.sum()),
        "placebo_exposures": int((~treatment).sum()),
        "tokens": int(lengths.sum()),
    }


def unit_rows(question: Question) -> list[dict[str, Any]]:
    """Return one JSON row per unit, with its arm."""
    rows = []
    for number, unit in enumerate(question.units):
        row = asdict(unit)
        row["arm"] = question.spec.arms[int(question.arms[number])].name
        row["timing"] = None if question.timing is None else int(question.timing[number])
        rows.append(row)
    return rows


def freeze(study: Study, folder: Path) -> Hashes:
    """Write a study to `folder` (made here, only if it does not hold one yet) and return its
    hashes.
    """
    (folder / "units").mkdir(parents=True, exist_ok=True)
    for question in study.questions:
        lines = "".join(canonical_json(row) + "\n" for row in unit_rows(question))
        atomic_write(folder / "units" / f"{question.name}.jsonl", lines, private=False)
    removed = [entry.name for entry in study.lock if entry.removed]
    for name in removed:
        (folder / "tombstones").mkdir(exist_ok=True)
        claims = study.tombstones[name]
        np.save(folder / "tombstones" / f"{name}.npy", np.stack([claims.start, claims.stop]))
    plan_sha256 = write_plan(study.plan, folder / "exposures.plan")
    entries = [asdict(entry) for entry in study.lock]
    atomic_write(
        folder / "lock.json",
        json.dumps({"version": 1, "experiments": entries}, indent=1),
        private=False,
    )
    text = canonical_json(definition(study, plan_sha256))
    atomic_write(folder / "definition.json", text, private=False)
    return Hashes(sha256_hex(text), plan_sha256)


def read_definition(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a frozen definition and the SHA-256 of its file."""
    try:
        text = (folder / "definition.json").read_text(encoding="utf-8")
        return json.loads(text), sha256_hex(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/definition.json cannot be read: {error}") from None


def spec_of(fields: Mapping[str, Any]) -> ExperimentSpec:
    """Return a spec from its frozen JSON; its items are in the frozen units, so no file is needed."""
    values = dict(fields)
    values["items"] = None
    values["arms"] = tuple(Arm(**arm) for arm in fields["arms"])
    values["schedule"] = schedule_of(fields["schedule"])
    values["block_by"] = tuple(fields["block_by"])
    return ExperimentSpec(**values)


def read_questions(folder: Path) -> list[Question]:
    """Read back the assigned questions of a frozen study.

    Raises:
        UserError: a file of units is not the one that was frozen.
    """
    content, _ = read_definition(folder)
    return [_read_question(folder, entry) for entry in content["experiments"]]


def _read_question(folder: Path, entry: Mapping[str, Any]) -> Question:
    spec = spec_of(entry["spec"])
    path = folder / "units" / f"{spec.name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if sha256_hex(lines) != entry["units_sha256"]:
        raise UserError(f"{path} was altered since the study was frozen")
    rows = [json.loads(line) for line in lines.split("\n")]
    units = [
        Unit(
            id=row["id"],
            texts=tuple(row["texts"]),
            items=tuple(ProbeItem(**item) for item in row["items"]),
            attributes=row["attributes"],
            cluster=row["cluster"],
            block=row["block"],
        )
        for row in rows
    ]
    number = {arm.name: index for index, arm in enumerate(spec.arms)}
    arms = np.array([number[row["arm"]] for row in rows], dtype=np.int64)
    timing = None
    if rows and rows[0]["timing"] is not None:
        timing = np.array([row["timing"] for row in rows], dtype=np.int64)
    return Question(LIBRARY[spec.use](spec), units, make_design(units, spec.arms), arms, timing)
