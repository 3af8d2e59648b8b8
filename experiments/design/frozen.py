"""A study on disk: frozen and hashed before step 1, and read back afterwards.

A frozen study is the folder `plan/`: `definition.json` (canonical; its SHA-256 is the study's
identity), `lock.json` (order of registration and absolute schedules), `exposures.plan`,
`units/NAME.jsonl`, and `tombstones/NAME.npy` for removed experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import DamagedFile
from motet.core.files import atomic_write, read_text, write_json
from motet.core.hashing import canonical_json, sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.design.assignment import Question, make_design
from motet.experiments.design.experiment import Kinds, make
from motet.experiments.design.imported import facts_of_import
from motet.experiments.design.in_corpus import found_json
from motet.experiments.design.lock import Registered, schedule_of
from motet.experiments.design.requests import Setting
from motet.experiments.design.spec import Arm, ExperimentSpec
from motet.experiments.design.study import Study
from motet.experiments.stream.exposure_plan import write_plan
from motet.experiments.stream.placement import Request
from motet.experiments.types import ProbeItem, Unit

ROOM = Path(__file__).parents[1]
JUDGING = (
    "analysis/*.py",
    "library/*.py",
    "design/assignment.py",
    "design/declared.py",
    "design/experiment.py",
    "design/in_common.py",
    "design/known_overlaps.py",
    "design/overlap.py",
    "design/places.py",
    "design/shares.py",
    "design/spec.py",
    "design/treatments.py",
    "design/trial.py",
    "design/wording.py",
    "design/words.py",
    "stream/random.py",
    "types.py",
)


@dataclass(frozen=True)
class Hashes:
    """What a run, its checkpoints and W&B keep of a frozen study."""

    definition_sha256: str
    plan_sha256: str


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
        **({} if study.decision.policy == "report" else {"decontaminate": study.decision.facts()}),
        **_imported(study),
        **({"members": dict(setting.sizes)} if setting.sizes else {}),
        "analysis": {
            "draws": setting.draws,
            "alpha": setting.alpha,
            "inference": "randomization test that repeats the assignment",
            "primaries": "Holm",
            "secondaries": "Benjamini-Hochberg",
        },
        "judged_by_sha256": judging_sha256(),
        "plan_sha256": plan_sha256,
        "experiments": [
            _defined(question, request, by_name[question.name], setting)
            for question, request in zip(study.questions, study.requests, strict=True)
        ],
    }


def _imported(study: Study) -> dict[str, Any]:
    path = study.setting.insertions
    if path is None or study.imported is None:
        return {}
    return {"imported": facts_of_import(path, study.imported)}


def _defined(
    question: Question, request: Request, entry: Registered, setting: Setting
) -> dict[str, Any]:
    rows = unit_rows(question)
    treatment = (
        ~request.placebo if question.experiment.inserts_units else np.ones(len(request), bool)
    )
    lengths = request.texts.lengths()[request.text]
    judged = question.spec.judged_step(setting.steps_total)
    return {
        "spec": question.spec.to_json(),
        "schedule_in_steps": asdict(entry.schedule),
        "outcomes": [outcome.frozen() for outcome in question.experiment.outcomes],
        "units": len(rows),
        "units_sha256": sha256_hex("\n".join(canonical_json(row) for row in rows)),
        "judged_at_step": judged,
        "probe_steps": sorted(question.experiment.probe_steps(setting.steps_total) | {judged}),
        "exposures": int(treatment.sum()),
        "placebo_exposures": int((~treatment).sum()),
        "tokens": int(lengths.sum()),
    }


def judging_sha256() -> str:
    """Return the SHA-256 of the sources that turn scores into verdicts: the built-in classes, the
    repeated assignment and the analysis. A user's own class is hashed with its experiment.
    """
    files = (path for part in JUDGING for path in sorted(ROOM.glob(part)))
    parts = [f"{path.relative_to(ROOM)}\n{sha256_hex(path.read_bytes())}\n" for path in files]
    return sha256_hex("".join(parts))


def judged_steps(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the step at which each experiment of a definition is judged, by name; definitions
    of 0.1.0 do not say so, and mean the end of the run.
    """
    return {
        entry["spec"]["name"]: int(entry.get("judged_at_step", content["steps_total"]))
        for entry in content["experiments"]
    }


def unit_rows(question: Question) -> list[dict[str, Any]]:
    """Return one JSON row per unit, with its arm."""
    rows = []
    for number, unit in enumerate(question.units):
        row = asdict(unit)
        for item in row["items"]:
            if not item["max_tokens"]:  # reads as it did before probes could write
                del item["max_tokens"]
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
        atomic_write(folder / "units" / f"{question.name}.jsonl", lines)
    if study.decision.found:
        rows = found_json(study.decision.found)
        write_json(folder / "in_corpus.json", rows)
    for fixed in (study.fixed, study.imported):
        if fixed is not None:
            lines = "".join(canonical_json({"id": name}) + "\n" for name in fixed.names)
            name = f"{fixed.request.experiment}.jsonl"
            atomic_write(folder / "units" / name, lines)
    removed = [entry.name for entry in study.lock if entry.removed]
    for name in removed:
        (folder / "tombstones").mkdir(exist_ok=True)
        claims = study.tombstones[name]
        np.save(folder / "tombstones" / f"{name}.npy", np.stack([claims.start, claims.stop]))
    plan_sha256 = write_plan(study.plan, folder / "exposures.plan")
    entries = [asdict(entry) for entry in study.lock]
    write_json(folder / "lock.json", {"version": 1, "experiments": entries})
    text = canonical_json(definition(study, plan_sha256))
    atomic_write(folder / "definition.json", text)
    return Hashes(sha256_hex(text), plan_sha256)


def read_definition(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a frozen definition and the SHA-256 of its file.

    Raises:
        DamagedFile: it is missing or no JSON.
    """
    path = folder / "definition.json"
    text = read_text(path)
    try:
        return dict(parse_json(text)), sha256_hex(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read: {error}", "restore it from a copy") from None


def arm_of(fields: Mapping[str, Any]) -> Arm:
    """Return an arm from its frozen JSON."""
    window = fields.get("window")
    return Arm(**{**fields, "window": None if window is None else tuple(window)})


def spec_of(fields: Mapping[str, Any]) -> ExperimentSpec:
    """Return a spec from its frozen JSON; its items are in the frozen units, so no file is
    needed.
    """
    values = dict(fields)
    values["items"] = None
    values["arms"] = tuple(arm_of(arm) for arm in fields["arms"])
    values["schedule"] = schedule_of(fields["schedule"])
    values["block_by"] = tuple(fields["block_by"])
    if fields.get("shares_units_with") is not None:
        values["shares_units_with"] = tuple(fields["shares_units_with"])
    return ExperimentSpec(**values)


def read_questions(folder: Path, kinds: Kinds) -> list[Question]:
    """Read back the assigned questions of a frozen study.

    Args:
        folder: `plan/` of the run.
        kinds: where its classes are found, users' own in the run's snapshot.

    Raises:
        UserError: a file of units, or a user's class, is not the one that was frozen.
    """
    content, _ = read_definition(folder)
    return [_read_question(folder, entry, kinds) for entry in content["experiments"]]


def check_kinds(folder: Path, kinds: Kinds) -> None:
    """Refuse a frozen study whose users' own classes are missing or are not those of then.

    Raises:
        UserError: which one, and why.
    """
    content, _ = read_definition(folder)
    for entry in content["experiments"]:
        if "use_sha256" in entry["spec"]:
            make(spec_of(entry["spec"]), kinds)


def _read_question(folder: Path, entry: Mapping[str, Any], kinds: Kinds) -> Question:
    spec = spec_of(entry["spec"])
    experiment = make(spec, kinds)
    path = folder / "units" / f"{spec.name}.jsonl"
    lines = read_text(path).removesuffix("\n")
    if sha256_hex(lines) != entry["units_sha256"]:
        why = "was altered since the study was frozen"
        raise DamagedFile(path, why, "restore it from a copy")
    rows = [parse_json(line) for line in lines.split("\n")]
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
    return Question(experiment, units, make_design(units, spec.arms), arms, timing)
