"""The judgement of a run: made once, at the frozen steps, kept in `judgement.json`, and never
overwritten.

The first report that can give verdicts records them. A later one that comes to others (by altered
files, or by other code) says so, and the recorded ones stay on the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile
from motet.core.files import read_fields, write_json
from motet.core.hashing import canonical_json
from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.standing import (
    add_exploratory,
    differing,
    entries_of,
    without_verdicts,
)
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.verify import JUDGED, inspect
from motet.launcher.study.after_training import StudyResult, load_measured

Answers = dict[str, Any]
VERSION = 1
MOST_SIMULATED = 30
"""Smallest detectable effects of more experiments are not simulated, which takes seconds for each:
they are computed from standard errors, and the report says so."""
NOT_SIMULATED = (
    f"With more than {MOST_SIMULATED} experiments in a run the smallest detectable effect is "
    "computed from the standard error, not simulated; motet experiments power simulates what it "
    "was before training."
)
KEPT = (
    "name",
    "use",
    "role",
    "member",
    "primary",
    "secondary",
    "size_slope",
    "negative_control",
    "verdict",
    "ok",
    "sentence",
    "by_member",
)


def judged(
    root: Path, details: bool = True, record: bool = False, damaged: Sequence[str] | None = None
) -> tuple[StudyResult, Answers | None]:
    """Return what was measured in a run, and its answers with the verdicts that stand; no answers
    where nothing was measured.

    Args:
        root: the run folder.
        details: False leaves out effects per arm and curves.
        damaged: what is known to be damaged, in words; None looks.
        record: keep the judgement in the run folder, when it is the first.

    Raises:
        UserError: nothing can be reported on yet, or a file is damaged.
    """
    if damaged is None:
        damaged = inspect(RunDir.open(root), JUDGED).spoils
    study = load_measured(root, damaged)
    if not study.measured:
        return study, None
    run = RunDir.open(root)
    answers = _analyzed(study, details)
    recorded, told = read_record(run, study)
    computed = answers
    if recorded is not None:
        answers, more = _as_recorded(answers, recorded, study)
        told += more
    elif study.standing.kind != "judged":
        answers = without_verdicts(answers, study.standing.kind, study.standing.why)
        if study.standing.kind == "exploratory":
            told.append("No verdict is given: all figures are exploratory.")
    elif record:
        write_record(run, study, computed)
    if study.later:
        later = analyze(
            study.later, study.seed, study.draws, False, study.n_questions, simulations=0
        )
        answers = add_exploratory(answers, later, study.standing.step, study.standing.beyond)
    where = replace(study.standing, told=[*study.standing.told, *told])
    return replace(study, standing=where), answers


def _analyzed(study: StudyResult, details: bool) -> Answers:
    """The answers of a study, computed now."""
    many = len({one.name for one in study.measured}) > MOST_SIMULATED
    how = (study.seed, study.draws, details, study.n_questions, study.assumed)
    answers = analyze(study.measured, *how, simulations=0 if many else None)
    for entry in answers["experiments"] if many else []:
        entry["notes"].append(NOT_SIMULATED)
    return answers


def _as_recorded(
    answers: Answers, recorded: Mapping[str, Any], study: StudyResult
) -> tuple[Answers, list[str]]:
    """The recorded verdicts with their figures, what was computed now beside them where it
    differs, and what to say of it.
    """
    changed = differing(recorded["answers"], answers)
    if not changed and study.standing.kind == "judged":
        return answers, []
    when = recorded["recorded"]
    kept = {entry["name"]: entry for entry in entries_of(recorded["answers"])}

    def put_back(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["name"] in kept:
            return {**entry, **kept[entry["name"]]}
        unjudged = without_verdicts(
            {**answers, "experiments": [entry]}, "exploratory", "it was not judged then"
        )
        return dict(unjudged["experiments"][0])

    back = answers | {
        "experiments": [put_back(entry) for entry in answers["experiments"]],
        "controls": {
            name: None if control is None else put_back(control)
            for name, control in answers["controls"].items()
        },
    }
    if not changed:
        return back, [f"Judged on {when}; the judgement of then is shown."]
    why = f"the judgement of {when} stands, and these figures are not its"
    told = (
        f"Judged on {when}: what is computed now differs for {', '.join(changed)}; the judgement "
        "of then stands, and the new figures are exploratory."
    )
    return add_exploratory(back, answers, study.standing.step, why), [told]


def read_record(run: RunDir, study: StudyResult) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the recorded judgement, None without one, and what is wrong with it in words."""
    if not run.judgement.exists():
        return None, []
    try:
        content = read_fields(run.judgement, {})
    except DamagedFile:
        return None, [f"{run.judgement.name} was altered, so the judgement of then is unknown."]
    if not _is_record(content):
        return None, [
            f"{run.judgement.name} is none that this Motet wrote (version {VERSION}), so the "
            "judgement of then is unknown."
        ]
    if content["definition_sha256"] != study.definition_sha256:
        return None, [f"{run.judgement.name} is of another definition, and is left aside."]
    return content, []


def _is_record(content: Mapping[str, Any]) -> bool:
    """Whether a record has what is read of it; a whole one may be another version's."""
    try:
        entries = entries_of(content["answers"])
        named = all({"name", "primary", "verdict"} <= entry.keys() for entry in entries)
        return named and content["version"] == VERSION and bool(content["definition_sha256"])
    except (KeyError, TypeError, AttributeError):
        return False


def write_record(run: RunDir, study: StudyResult, answers: Answers) -> None:
    """Keep the judgement, unless another process has kept one in the meantime."""
    kept = json.loads(
        canonical_json(
            {
                "version": VERSION,
                "recorded": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                "definition_sha256": study.definition_sha256,
                "judged_at": study.standing.judged_at,
                "alpha": answers["alpha"],
                "draws": answers["draws"],
                "answers": {
                    "experiments": [_kept(entry) for entry in answers["experiments"]],
                    "controls": {
                        name: None if control is None else _kept(control)
                        for name, control in answers["controls"].items()
                    },
                },
            }
        )
    )
    part = run.judgement.with_name(f".{run.judgement.name}.{os.getpid()}")
    write_json(part, kept)
    try:
        os.link(part, run.judgement)
    except FileExistsError:
        pass
    finally:
        part.unlink()


def _kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in KEPT if name in entry}
