"""A run folder against the hashes that it keeps of itself: everything that an answer rests on.

`inspect` names every damaged thing. `motet verify` looks at all parts; `resume`, `report`, `audit`
and `export` look at those that they use, by the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile, UserError
from motet.core.files import FROM_A_COPY, SEAL, read_fields, read_json, read_sealed
from motet.core.hashing import sha256_file
from motet.core.listed import altered_files
from motet.core.plugins import NOT_THE_SOURCE
from motet.experiments.design.frozen import read_definition, read_questions
from motet.experiments.library.kinds import Library
from motet.experiments.scoring.store import probe_files, probe_path, read_facts, read_probe
from motet.experiments.stream.audit import check_ledger
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.ledger import (
    Segment,
    read_records,
    read_segment,
    segment_folder,
    segment_numbers,
)
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs import listed, mending, metrics, seals
from motet.launcher.runs.begun import unlike_frozen
from motet.launcher.runs.findings import GIVEN_UP, TOLD_ONLY, UNKNOWN, Findings
from motet.launcher.runs.manifest import (
    corpus_problems,
    open_corpora,
    open_validation_corpora,
)
from motet.launcher.runs.rundir import RunDir

NOTHING_GREW = "no checkpoint and no measurement of the run grew from it"


def inspect(
    run: RunDir, parts: Sequence[str] = (), full: bool = False, step: int | None = None
) -> Findings:
    """Look at a run folder.

    Args:
        parts: of PARTS; all of them where none is named.
        full: hash corpora again even where content, size and time are known.
        step: the checkpoint whose weights are looked at; None: all.
    """
    found = Findings(run, full, step)
    for part in parts or WHOLE:
        found.look(part, PARTS[part])
    return found


def refuse_damage(run: RunDir, parts: Sequence[str], step: int | None = None) -> Findings:
    """Look at parts of a run that a command is about to rely on.

    Raises:
        UserError: every damaged thing in them.
    """
    found = inspect(run, parts, step=step)
    if found.damage:
        told = "\n".join(f"  - {one}" for one in found.damage)
        raise UserError(f"{run.root} is damaged:\n{told}")
    return found


def _manifest(found: Findings) -> None:
    if found.manifest and "frozen_sha256" not in found.manifest:
        found.unknown.append(f"manifest.json, code/ and the settings: {UNKNOWN}")


def _settings(found: Findings) -> None:
    """`resolved.yaml`: its own hash, and what may not change against the frozen copy."""
    path = found.run.resolved_yaml
    _, sealed = read_sealed(path, run_yaml_remedy(found.run))
    if seals.lost_seal(sealed, found.manifest):
        found.add(path, seals.LOST_SEAL, run_yaml_remedy(found.run))
    settings = run_yaml.load(path)
    for problem in unlike_frozen(found.manifest, settings):
        found.add(path, f"is not as the run was frozen: {problem}", run_yaml_remedy(found.run))


def run_yaml_remedy(run: RunDir) -> str:
    """What to do about `resolved.yaml`: the newest launch has a copy."""
    kept = [run.launch_settings(number) for number in range(run.latest_attempt(), 0, -1)]
    newest = next((path for path in kept if path.exists()), None)
    if newest is None:
        return FROM_A_COPY
    return f"put {newest.relative_to(run.root)} in its place"


def _plan(found: Findings) -> None:
    """Definition, units and every column of the plan."""
    run, manifest = found.run, found.manifest
    read = found.reading(read_definition, run.plan)
    if read is not None and manifest and read[1] != manifest["definition_sha256"]:
        found.add(run.plan / "definition.json", "is not the one that the run was frozen with")
        return
    expected = manifest.get("plan_sha256")
    found.reading(_verify_plan, run, expected)
    if read is not None:
        read_questions(run.plan, Library(run.plugins))
    _frozen(found, "plan/")


def _verify_plan(run: RunDir, expected: str | None) -> None:
    ExposurePlan(run.plan / "exposures.plan").verify(expected)


def _code(found: Findings) -> None:
    _frozen(found, "code/")


def _frozen(found: Findings, within: str) -> None:
    """The frozen files of one folder, and files of the code that were not there."""
    files = seals.read_frozen(found.run, found.manifest)
    if files is None:
        return
    mine = {name: facts for name, facts in files.items() if name.startswith(within)}
    for name, what in altered_files(found.run.root, mine):
        path = found.run.root / name
        if path.is_relative_to(found.run.plugins) and path.is_file():
            what = f"{NOT_THE_SOURCE} ({what})"
        found.add(path, what)
    package = found.run.code / "motet"
    for path in seals.frozen_files(found.run):
        name = path.relative_to(found.run.root).as_posix()
        if name not in files and within == "code/" and path.is_relative_to(package):
            found.add(path, "was not there when the run was frozen", "take it away")


def _checkpoints(found: Findings) -> None:
    """Manifests, whose step and run they are, and the weights."""
    found_here = [(found.run.checkpoint(step), one) for step, one in found.checkpoints.items()]
    for folder, manifest in [*found_here, *_grown(found)]:
        step = manifest["step"]
        for key, now in _identity(found.manifest).items():
            if manifest.get(key, now) != now:
                found.add(folder, f"is of another run: its {key} differs", "take it away")
        if found.step in (None, step):
            for name, what in altered_files(folder, manifest.get("files", {})):
                found.add(folder / name, what, "use another checkpoint")


def _grown(found: Findings) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints of models that grew, with what they say of themselves."""
    for step in found.run.grown_steps():
        if found.step is None or found.step < 0:
            read = found.reading(
                seals.read_checkpoint, found.run, step, seals.CHECKPOINT_NEEDS, True
            )
            if read:
                yield found.run.checkpoint(step, grown=True), read


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must have in common with its run."""
    if not manifest:
        return {}
    keys = {key: manifest[key] for key in ("definition_sha256", "plan_sha256", "model")
            if manifest.get(key) is not None}  # fmt: skip
    return {**keys, "run_sha256": seals.run_sha256(manifest)}


def _newest(found: Findings) -> None:
    """The manifests of all checkpoints, without their weights."""
    found.step = -1
    _checkpoints(found)


def _ledger(found: Findings) -> None:
    """The segments that a checkpoint or a measurement grew from."""
    for number in sorted(found.segments_used):
        _read_segment(found, number)


def _given_up(found: Findings) -> None:
    """The other segments: their steps were trained again. No answer rests on them."""
    before = len(found.damage)
    for number in set(segment_numbers(found.run.ledger)) - found.segments_used:
        _read_segment(found, number)
    for place, one in enumerate(found.damage[before:], start=before):
        remedy = f"{NOTHING_GREW}: take {Path(one.path).parent} away"
        found.damage[place] = replace(one, remedy=remedy)


def _read_segment(found: Findings, number: int) -> None:
    folder = segment_folder(found.run.ledger, number)
    files = sorted(folder.glob("rank-*.bin"))
    if files or (folder / "segment.json").exists():
        try:
            _check_segment(found, folder, read_segment(found.run.ledger, number))
        except DamagedFile as error:
            what_works = mending.remedy(found.run, number, found.checkpoints)
            found.add(error.path, error.what, what_works)
    for path in files:
        found.reading(_read_through, path)


def _read_through(path: Path) -> None:
    """Read every record, which checks the checksum of each."""
    for _ in read_records(path):
        pass


def _lineage(found: Findings) -> None:
    """Whether all records up to the newest checkpoint are there: the audit, without a replay."""
    run = found.run
    steps = run.checkpoint_steps()
    if not steps or any(one.part == "ledger" for one in found.damage):
        return
    newest = seals.read_checkpoint(run, steps[-1])
    settings = run_yaml.load(run.resolved_yaml)
    plan = ExposurePlan(run.plan / "exposures.plan")
    audited = check_ledger(
        run.ledger, plan, settings.batch_steps, newest["segment"], newest["step"]
    )
    for problem in audited.problems:
        found.add(run.ledger, f"does not prove the run: {problem}")


def _check_segment(found: Findings, folder: Path, segment: Segment) -> None:
    known = found.manifest.get("definition_sha256")
    if known and segment.definition_sha256 != known:
        found.add(folder / "segment.json", "is of another run", "take it away")


def _probes(found: Findings) -> None:
    """Each file against what metrics and checkpoints say of it."""
    run = found.run
    vouched = probe_hashes(run, found.checkpoints)
    for path in probe_files(run.probes):
        facts = found.reading(_read_whole, path)
        if facts is None:
            continue
        known = vouched.get((facts["step"], facts["segment"]))
        if known is None:
            found.unknown.append(f"{path.relative_to(run.root)}: {UNKNOWN}")
        elif sha256_file(path) not in known:
            found.add(path, "is not the one that was measured: its SHA-256 is another one")
    for step in sorted(_measured_steps(run)):
        if not probe_path(run.probes, step).exists():
            found.add(probe_path(run.probes, step), "is missing, and metrics.jsonl has it")


def _read_whole(path: Path) -> dict[str, Any]:
    """Read every array of a probe file, which checks what the archive says of each."""
    read_probe(path)
    return read_facts(path)


def _measured_steps(run: RunDir) -> set[int]:
    """Steps whose probes belong to the lineage of now, and have a hash."""
    rows = metrics.rows_of(metrics.read_metrics(run.metrics), "probe")
    return {row["step"] for row in rows if SEAL in row}


def probe_hashes(
    run: RunDir, checkpoints: Mapping[int, Mapping[str, Any]]
) -> dict[tuple[int, int], set[str]]:
    """Return {(step, segment): hashes of its probe file}, by metrics and checkpoints."""
    found: dict[tuple[int, int], set[str]] = {}
    for row in metrics.all_rows(run.metrics):
        if row["kind"] == "probe" and SEAL in row:
            found.setdefault((row["step"], row.get("segment", 0)), set()).add(row[SEAL])
    for manifest in checkpoints.values():
        for one in manifest.get("probes", ()):
            found.setdefault((one["step"], one["segment"]), set()).add(one[SEAL])
    return found


def _metrics(found: Findings) -> None:
    """Each row's checksum, and all rows up to each checkpoint against its manifest."""
    path = found.run.metrics
    for number in metrics.altered_lines(path):
        found.add(path, f"was altered in line {number:,}")
    marks = [one["metrics"] for one in found.checkpoints.values() if one.get("metrics")]
    if marks and not path.exists():
        found.add(path, "is missing")
    elif marks and (why := _prefix_problem(path, max(marks, key=lambda mark: mark["bytes"]))):
        found.add(path, why)


def _prefix_problem(path: Path, mark: Mapping[str, Any]) -> str:
    """Return what is wrong with the rows that a checkpoint vouches for; "" when nothing is."""
    if path.stat().st_size < mark["bytes"]:
        return f"is cut short: it had {mark['bytes']:,} bytes when the newest checkpoint was made"
    digest, left = hashlib.sha256(), int(mark["bytes"])
    with path.open("rb") as file:
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return "" if digest.hexdigest() == mark[SEAL] else "was altered before its newest checkpoint"


def _attempts(found: Findings) -> None:
    """The records of each attempt, and the marker of the end."""
    run = found.run
    for number in range(1, run.latest_attempt() + 1):
        folder = run.attempt(number)
        for path in sorted(folder.glob("*.json")):
            facts = found.reading(read_json, path)
            if path.name == "attempt.json" and facts is not None:
                _check_attempt(found, path, facts, number)
        if (path := run.launch_settings(number)).exists():
            kept = found.reading(read_sealed, path)
            if kept is not None and not kept[1] and "frozen_sha256" in found.manifest:
                found.add(path, "lost the hash in its last line")
    if run.judgement.exists():
        found.reading(read_fields, run.judgement, {})
    if run.done.exists() and (step := found.reading(run.done_step)) is not None:
        _check_done(found, step)


def _check_attempt(found: Findings, path: Path, facts: Any, number: int) -> None:
    own = facts.get("attempt", number) if isinstance(facts, dict) else None
    if own != number:
        found.add(path, f"is that of attempt {own}", "put each back into its own folder")


def _check_done(found: Findings, step: int) -> None:
    rows = metrics.read_metrics(found.run.metrics)
    ends = {row["step"] for row in metrics.rows_of(rows, "event") if row.get("event") == "finished"}
    if ends and step not in ends:
        what = f"names step {step:,}; the run finished at step {max(ends):,}"
        found.add(found.run.done, what, "delete it, and resume")


def _corpora(found: Findings) -> None:
    settings: RunSettings = run_yaml.load(found.run.resolved_yaml)
    for corpus in (*open_corpora(settings), *open_validation_corpora(settings)):
        if not corpus.vouched:
            found.unknown.append(f"{corpus.path}: corpus.json and what it does not list: {UNKNOWN}")
    for problem in corpus_problems(settings, found.manifest.get("data"), found.full):
        found.add(Path(problem.setting), problem.message, "prepare the corpus again, or restore it")


PARTS: Mapping[str, Callable[[Findings], None]] = {
    "manifest.json": _manifest,
    "resolved.yaml": _settings,
    "plan": _plan,
    "code": _code,
    "checkpoints": _checkpoints,
    "checkpoint manifests": _newest,
    "ledger": _ledger,
    GIVEN_UP: _given_up,
    "lineage": _lineage,
    "probes": _probes,
    "metrics.jsonl": _metrics,
    "attempts": _attempts,
    "corpora": _corpora,
    "members": listed.exports,
    "eval": listed.evaluations,
}
BASIS = ("manifest.json", "resolved.yaml", "plan")
"""What every command relies on."""
JUDGED = (*BASIS, "checkpoint manifests", "ledger", "lineage", "probes", *TOLD_ONLY)
"""What a report rests on."""
AUDITED = (*BASIS, "code", "checkpoint manifests", "ledger", GIVEN_UP)
EXPORTED_FROM = ("manifest.json", "resolved.yaml", "checkpoints")
TRAINED = (*BASIS, "code")
EVIDENCE = ("ledger", GIVEN_UP, "probes", "metrics.jsonl", "attempts")
"""What a run that goes on does not need, and its answers do."""
WHOLE = tuple(part for part in PARTS if part != "checkpoint manifests")
