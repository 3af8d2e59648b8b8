"""The run folder as one dictionary, `report.json`: pure functions over what was read, then one that
reads.

Everything in it is plain JSON: no NaN, no NumPy value, no text that UTF-8 cannot hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.launcher.report.benchmarks import benchmark_rows
from motet.launcher.report.consistency import divergence_of, neighbours
from motet.launcher.report.family import family_part
from motet.launcher.report.standing import first_line, standing
from motet.launcher.report.training import MOST_POINTS, training_record
from motet.launcher.report.words import finite, plain
from motet.launcher.runs.attempts import facts_of
from motet.launcher.runs.kept_models import stages_of
from motet.launcher.runs.metrics import Row, read_metrics, rows_of
from motet.launcher.runs.seals import read_manifest
from motet.launcher.runs.verify import JUDGED, Findings, inspect

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

VERSION = 1
NO_ANSWERS: dict[str, Any] = {
    "alpha": None,
    "draws": None,
    "experiments": [],
    "controls": {"placebo": None, "positive": None},
    "multiplicity": {},
}
NO_COMPLIANCE: dict[str, Any] = {
    "planned": 0,
    "consumed_once": 0,
    "missing": 0,
    "duplicated": 0,
    "skipped_updates": 0,
    "per_experiment": [],
    "ledger_ok": None,
    "problems": [],
}
Analysed = tuple[Any, Mapping[str, Any] | None, list[str]]
NOTHING: Analysed = (None, None, [])
HASHES = ("definition_sha256", "plan_sha256", "lock_sha256")


@dataclass(frozen=True)
class Sources:
    """What a report is made of. Only the manifest must be there.

    Attributes:
        manifest: `manifest.json`, {} when it is damaged.
        damaged: what of the run folder is damaged, in words.
        rows: of `metrics.jsonl`, superseded steps left out.
        attempts: each `attempt.json`, in order.
        config_yaml: the configuration as text, without secrets.
        finished: the run has its DONE marker.
        study: what `launcher.study.after_training.load_measured` gave, or None.
        answers: what `experiments.analysis.analyze.analyze` gave, or None.
        problems: why study or answers are missing, in words.
        unread: it was frozen with experiments, and none of them could be read.
        benchmarks: what `motet eval` found: `benchmarks.benchmark_rows`.
        prediction: how time and memory compare with what was predicted, in one line; "" unknown.
    """

    manifest: Mapping[str, Any]
    rows: Sequence[Row] = ()
    attempts: Sequence[Mapping[str, Any]] = ()
    config_yaml: str = ""
    finished: bool = False
    study: Any = None
    answers: Mapping[str, Any] | None = None
    problems: Sequence[str] = field(default_factory=tuple)
    unread: bool = False
    prediction: str = ""
    damaged: Sequence[str] = field(default_factory=tuple)
    benchmarks: Sequence[Mapping[str, Any]] = ()
    divergence: Mapping[str, Any] | None = None


def assemble(sources: Sources) -> dict[str, Any]:
    """The report of a run as plain JSON, with the keys of `report.json`."""
    study = sources.study
    definition = dict(study.definition) if study is not None else {}
    training = training_record(sources.rows, exposure_steps(study.measured if study else ()))
    found = compliance(study, sources.problems)
    family = family_part(sources.manifest, sources.rows, found)
    if sources.manifest.get("stages"):
        measured = study.measured if study else ()
        family |= {"neighbours": neighbours(sources.manifest, measured)}
    if family:
        family["divergence"] = sources.divergence
    return plain(
        {
            "version": VERSION,
            "first_line": first_line(study, sources.damaged, sources.problems),
            "damaged": list(sources.damaged),
            **({"experiments_unread": True} if sources.unread else {}),
            "standing": standing(study),
            "run": run_facts(sources),
            "answers": in_order_of_the_file(
                {**NO_ANSWERS, **(sources.answers or {})}, sources.manifest
            ),
            "compliance": found,
            **({"family": family} if family else {}),
            **({"benchmarks": list(sources.benchmarks)} if sources.benchmarks else {}),
            "training": training,
            "cost": cost(sources, definition, training["seconds"]) | really_ran(family),
            "definition": definition,
            "hashes": {
                name: sources.manifest[name] for name in HASHES if sources.manifest.get(name)
            },
        }
    )


def in_order_of_the_file(answers: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The answers with experiments as run.yaml lists them, those of other files behind: the plan's
    own order is that of precedence, which tells a reader nothing.
    """
    listed = ((manifest.get("config") or {}).get("experiments") or {}).get("list") or []
    place = {str(one.get("name")): number for number, one in enumerate(listed)}
    entries = sorted(answers["experiments"], key=lambda e: place.get(str(e["name"]), len(place)))
    return {**answers, "experiments": entries}


def run_facts(sources: Sources) -> dict[str, Any]:
    """What was trained on what, and in which attempts."""
    manifest, attempts = sources.manifest, sources.attempts
    config = manifest.get("config") or {}
    latest = attempts[-1] if attempts else {}
    kept = ("attempt", "start_step", "end_step", "reason", "world_size")
    return {
        "name": manifest.get("name"),
        "created": moment(manifest.get("created")),
        "finished": moment(latest.get("ended") or manifest.get("created"))
        if sources.finished
        else None,
        "steps": last_step(sources.rows),
        "tokens": tokens_consumed(sources),
        "parameters": manifest.get("parameters"),
        "parameters_non_embedding": manifest.get("parameters_non_embedding"),
        **member_facts(manifest),
        "model": manifest.get("model") or config.get("model") or {},
        "data": [corpus_facts(corpus) for corpus in manifest.get("corpora") or []],
        "sequence_length": manifest.get("sequence_length"),
        "batch": (config.get("batch") or {}).get("sequences"),
        "world_size": latest.get("world_size"),
        "precision": latest.get("precision"),
        "definition_sha256": manifest.get("definition_sha256"),
        "plan_sha256": manifest.get("plan_sha256"),
        "motet_version": manifest.get("motet_version"),
        "config_yaml": sources.config_yaml,
        "attempts": [{name: attempt.get(name) for name in kept} for attempt in attempts],
    }


def member_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`members` of a family, with their sizes; nothing for a run of one model."""
    kept = ("name", "parameters", "parameters_non_embedding", "flops_per_token")
    members = manifest.get("members") or []
    return {"members": [{key: one.get(key) for key in kept} for one in members]} if members else {}


def corpus_facts(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """One corpus of the manifest."""
    return {
        "path": corpus.get("path"),
        "fingerprint": corpus.get("fingerprint"),
        "tokens": corpus.get("tokens", corpus.get("n_tokens")),
        "documents": corpus.get("documents", corpus.get("n_documents")),
        "weight": corpus.get("weight", 1.0),
    }


def last_step(rows: Sequence[Row]) -> int:
    """Updates completed."""
    return max((row["step"] for row in rows_of(rows, "step")), default=0)


def tokens_consumed(sources: Sources) -> int:
    """Tokens read up to the last recorded step; rows count them from the start of the run."""
    counted = [row["tokens"] for row in rows_of(sources.rows, "step") if row.get("tokens")]
    per_step = sources.manifest.get("tokens_per_step") or 0
    return int(max(counted, default=last_step(sources.rows) * per_step))


def exposure_steps(measured: Iterable[Any]) -> dict[str, list[int]]:
    """Steps at which each experiment put text into the stream, at most `MOST_POINTS`, ascending."""
    import numpy as np

    found = {}
    for one in measured:
        parts = [np.asarray(steps) for steps in one.exposure_steps]
        steps = np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)
        chosen = np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(np.int64)
        found[one.name] = [int(step) for step in steps[chosen]]
    return found


def cost(
    sources: Sources, definition: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Time, tokens and arithmetic, and the shares that experiments took of them."""
    manifest, steps = sources.manifest, rows_of(sources.rows, "step")
    tokens = tokens_consumed(sources)
    per_token = finite(manifest.get("flops_per_token"))
    rates = [r for row in steps if (r := finite(row.get("tokens_per_s"))) is not None]
    used = [m for row in steps if (m := finite(row.get("mfu"))) is not None]
    taken = experiment_tokens(definition, last_step(sources.rows))
    busy_s = sum(seconds.values())
    return {
        "wall_s": wall_seconds(sources),
        "tokens": tokens,
        "tokens_per_s": statistics.median(rates) if rates else None,
        "flops": per_token * tokens if per_token is not None else None,
        "mfu": statistics.median(used) if used else None,
        "experiment_tokens": taken,
        "experiment_share": taken / tokens if taken is not None and tokens else None,
        "probe_share": seconds["probe"] / busy_s if busy_s else None,
        "prediction": sources.prediction,
    }


def really_ran(family: Mapping[str, Any]) -> dict[str, Any]:
    """`flops` of a family's run, of every pass that its ledger names; nothing where that is not
    known, or for a run of one model.
    """
    spent = family.get("cost")
    return {"flops": spent["flops"]} if spent else {}


def experiment_tokens(definition: Mapping[str, Any], steps: int) -> int | None:
    """Tokens that exposures and placebos took; in proportion to steps while the run is not
    finished.
    """
    counted = [entry.get("tokens") for entry in definition.get("experiments") or []]
    if not counted or any(tokens is None for tokens in counted):
        return None
    total = definition.get("steps_total") or steps
    return round(sum(counted) * min(1.0, steps / total)) if total else 0


def wall_seconds(sources: Sources) -> float | None:
    """Time of all attempts; one that left no end is counted to its last row."""
    last_row = max((finite(row.get("time")) or 0.0 for row in sources.rows), default=0.0)
    total, known = 0.0, False
    for i, attempt in enumerate(sources.attempts):
        start = instant(attempt.get("started"))
        end = instant(attempt.get("ended"))
        if end is None and i == len(sources.attempts) - 1:
            end = last_row or None
        if start is not None and end is not None and end >= start:
            total, known = total + end - start, True
    return total if known else None


def instant(value: Any) -> float | None:
    """Unix seconds of a number or of an ISO 8601 text."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return finite(value)


def moment(value: Any) -> str | None:
    """A time as ISO 8601 text in UTC, to the second."""
    seconds = instant(value)
    if seconds is None:
        return None
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def compliance(study: Any, problems: Sequence[str]) -> dict[str, Any]:
    """What the ledger says, with the counts of each experiment that was measured."""
    found = {**NO_COMPLIANCE, **((study.compliance or {}) if study is not None else {})}
    if study is not None and not found["per_experiment"]:
        by_name = {one.name: one for one in study.measured}  # members saw the same exposures
        found["per_experiment"] = [per_experiment(one) for one in by_name.values()]
    return {**found, "problems": [*found["problems"], *problems]}


def per_experiment(measured: Any) -> dict[str, Any]:
    """Planned and consumed exposures of one experiment, counted per unit."""
    pairs = [(int(p), int(c)) for p, c in zip(measured.planned, measured.consumed, strict=True)]
    return {
        "name": measured.name,
        "planned": sum(p for p, _ in pairs),
        "consumed_once": sum(min(p, c) for p, c in pairs),
        "missing": sum(max(0, p - c) for p, c in pairs),
        "duplicated": sum(max(0, c - p) for p, c in pairs),
    }


def collect(rundir: RunDir) -> Sources:
    """Read a run folder and analyse it. What is missing is left out and named in `problems`, what
    is damaged in `damaged`.

    Raises:
        UserError: there is no manifest, so it is no run.
    """
    if not rundir.manifest.exists():
        read_manifest(rundir)  # says what is missing: without it this is no run
    found = inspect(rundir, JUDGED)
    damaged = [str(one) for one in found.damage]
    asked = has_study(rundir)
    study, answers, problems = analysed(rundir.root, found) if asked else NOTHING
    return Sources(
        manifest=_with_stages(rundir, found.manifest),
        damaged=damaged,
        rows=read_metrics(rundir.metrics),
        attempts=read_attempts(rundir),
        config_yaml=read_text(rundir.resolved_yaml) or read_text(rundir.run_yaml),
        finished=rundir.done.exists(),
        study=study,
        answers=answers,
        problems=problems,
        unread=asked and study is None,
        prediction="" if damaged else predicted(rundir),
        benchmarks=benchmark_rows(rundir),
        divergence=divergence_of(rundir),
    )


def _with_stages(rundir: RunDir, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest, with its stages where they really began."""
    stages = stages_of(rundir, manifest)
    return {**manifest, "stages": stages} if stages else manifest


def predicted(rundir: RunDir) -> str:
    """How long a step took and what it held, against what was predicted."""
    from motet.launcher.planning.prediction import newest, sentence

    found = newest(rundir)
    return sentence(found) if found else ""


def has_study(rundir: RunDir) -> bool:
    """Whether the run was frozen with experiments."""
    # By the folders: a definition that was lost makes no run without experiments.
    return rundir.plan.is_dir() or any(rundir.ledger.glob("segment-*"))


def analysed(root: Path, found: Findings) -> Analysed:
    """Measurements, answers, and why there are none, as far as the run has come. The first
    judgement is recorded in the run folder.

    Args:
        found: what of it is damaged: then nothing that reading brings about is a fault of ours.
    """
    from motet.core.errors import UserError
    from motet.core.plugins import PluginError
    from motet.launcher.study.judgement import judged

    spoils = found.spoils
    try:
        study, answers = judged(root, record=not spoils, damaged=spoils)
    except PluginError:
        raise  # a class that is missing or changed: no report can be made of it; one that fails on
        # true scores is an experiment without an answer
    except Exception as error:
        if found.damage:
            return None, None, []
        if not isinstance(error, UserError | FileNotFoundError):
            raise
        return None, None, [f"the experiments cannot be read yet: {error}"]
    return study, answers, study.unanswered if answers else []


def read_attempts(rundir: RunDir) -> list[dict[str, Any]]:
    """Every `attempt.json`, in order; an attempt without one is left out."""
    numbers = range(1, rundir.latest_attempt() + 1)
    paths = [rundir.attempt(number) / "attempt.json" for number in numbers]
    found = (facts_of(path.parent) for path in paths if path.exists())
    return [facts for facts in found if facts]


def read_text(path: Path) -> str:
    """The text of a file, "" when it is missing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
