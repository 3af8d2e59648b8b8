"""What the folder of a run tells without asking anybody else."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.core import format
from motet.core.errors import DamagedFile, UserError
from motet.core.files import FROM_A_COPY, read_sealed
from motet.core.files import read_fields as core_fields
from motet.core.jobs import JOB_ID
from motet.launcher.config.sections import RunSettings
from motet.launcher.follow.pace import FEW_BYTES, Pace, read_pace
from motet.launcher.follow.processes import Locks, Process, lock_holder, read_processes
from motet.launcher.follow.tails import last_bytes
from motet.launcher.runs import job_files
from motet.launcher.runs.attempts import ENDED_WELL, STOP_MARKER
from motet.launcher.runs.blame import blame
from motet.launcher.runs.metrics import decode_row
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import LOST_SEAL, lost_seal
from motet.launcher.runs.starting import waiting_of

FRESH_S = 90.0
"""A process on another host that was seen so lately is taken to live; a rank touches its file every
5 seconds of training.
"""
DEFAULT_SCHEDULER = RunSettings().scheduler
_SCHEDULER = re.compile(r"^scheduler: *['\"]?([^\s'\"]+)", re.MULTILINE)
_STEPS = re.compile(r"^training:\n(?:  .*\n)*?  steps: *(\S+)", re.MULTILINE)
_TOKENS = re.compile(r"^training:\n(?:  .*\n)*?  tokens: *(\S+)", re.MULTILINE)
Fields = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """One run folder, read once.

    Attributes:
        guest: whether the user's own loop trains it.
        created: Unix time.
        parameters: of the model; None where the user's own loop has not brought it yet.
        steps, tokens: where the run ends; None when its settings cannot be read.
        finished: it has its DONE marker.
        cancelled: it was cancelled, so that it does not requeue itself.
        number: the newest attempt, 0 before the first.
        attempt: attempt.json of the newest attempt, {} before its ranks are ready.
        error: why the newest attempt was refused or given up, in its own words.
        culprit: which rank made it crash.
        stopped_early: a stop was asked for before the newest attempt trained.
        lock_pid: the process that holds the folder, on this host.
        processes: of the newest attempt, unless it says how it ended.
        jobs: what was submitted, newest last (fields of jobs.json).
        begun: what the newest job that began wrote down of itself, {} before.
        scheduler: to which, as the run's setting names it.
        checkpoint: step of the newest checkpoint.
        skipped: why its newest checkpoint was skipped; "" when it was not.
        waiting: what its newest launch waits for, that does not train yet; "" otherwise.
        damaged: what of the files that were read for this is damaged, in words.
    """

    run: RunDir
    guest: bool
    created: float | None
    parameters: int | None
    steps: int | None
    tokens: int | None
    finished: bool
    cancelled: bool
    number: int
    attempt: Fields
    error: str
    culprit: str
    stopped_early: bool
    lock_pid: int | None
    processes: list[Process]
    jobs: list[Fields]
    begun: Fields
    scheduler: str
    checkpoint: int | None
    pace: Pace
    skipped: str = ""
    waiting: str = ""
    damaged: tuple[str, ...] = ()

    def lives_here(self) -> bool:
        """Return whether a process trains it on this host."""
        if self.lock_pid is not None:
            return True
        return self.attempt.get("ended") is None and any(p.lives() for p in self.processes)

    def seen_elsewhere(self, now: float) -> Process | None:
        """Return a process of it on another host that gave a sign of life lately; None once the
        attempt has ended.
        """
        if self.attempt.get("ended") is not None:
            return None
        away = (p for p in self.processes if not p.is_here)
        fresh = (p for p in away if abs(now - p.seen) < FRESH_S)  # a clock may have gone back
        return next(fresh, None)


def read_facts(run: RunDir, locks: Locks) -> Facts:
    """Read a run folder; what is missing or damaged in it is left out.

    Args:
        run: its folder.
        locks: of `processes.held_locks`, read once for many runs.
    """
    manifest = read_fields(run.manifest)
    number = run.latest_attempt()
    folder = run.attempt(number)
    attempt = read_fields(folder / "attempt.json") if number else {}
    reason = attempt.get("reason", "running")
    open_end = number > 0 and reason in ("running", "lost")  # others need no sign of life
    steps, tokens = _length(run, manifest)
    finished = run.done.exists()
    ended_well = finished or reason in ENDED_WELL
    return Facts(
        run=run,
        guest=bool(manifest.get("guest")),
        created=manifest.get("created"),
        parameters=manifest.get("parameters"),
        steps=steps,
        tokens=tokens,
        finished=finished,
        cancelled=run.cancelled.exists(),
        number=number,
        attempt=attempt,
        error="" if ended_well else _text(folder / "error.txt"),
        culprit="" if ended_well or not number else _culprit(folder, attempt),
        stopped_early=bool(number) and not attempt and (folder / STOP_MARKER).exists(),
        lock_pid=lock_holder(run.lock, locks),
        processes=read_processes(folder) if open_end and not finished else [],
        jobs=(jobs := read_jobs(run)),
        begun=read_fields(run.job_begun) if jobs else {},
        scheduler=_scheduler(run) if jobs else DEFAULT_SCHEDULER,
        checkpoint=max(run.checkpoint_steps(), default=None),
        pace=read_pace(run.metrics, moving=reason == "running" and not finished),
        **(_lasting(run, number) if open_end and not finished else {}),
        damaged=tuple(_damaged(run)),
    )


def _lasting(run: RunDir, number: int) -> dict[str, str]:
    """Say what lasts in the newest attempt: skipped checkpoints, a start that waits."""
    return {"skipped": _text(run.skipped(number)), "waiting": _waiting(run)}


def _waiting(run: RunDir) -> str:
    """Say what its newest launch waits for, and how long already."""
    found = waiting_of(run)
    return f"{found.text}, for {format.clock(time.time() - found.since)}" if found else ""


def _damaged(run: RunDir) -> Iterator[str]:
    """Say what of the small files that a run's state is read from is damaged: they are left out
    everywhere else. Whether the rest is whole, `motet verify` says.
    """
    newest = run.attempt(run.latest_attempt()) / "attempt.json"
    readers: list[tuple[Callable[[Path], Any], Path]] = [
        (lambda path: core_fields(path, {"config": dict}), run.manifest),
        (lambda path: _sealed(path, read_fields(run.manifest)), run.resolved_yaml),
        (lambda _: run.done_step(), run.done),
        (_mapping, newest),
        (lambda _: job_files.read_jobs(run), run.jobs_json),
        (lambda _: job_files.read_begun(run), run.job_begun),
        (lambda _: job_files.read_command(run), run.job_command),
    ]
    for read, path in readers:
        try:
            if path.exists():
                read(path)
        except DamagedFile as error:
            yield f"{path.relative_to(run.root)} {error.what}"
    # Only the rows that a state is made of: 500 runs are to be shown in a second.
    tail = last_bytes(run.metrics, FEW_BYTES).split(b"\n")
    if any(line.endswith(b"}") and decode_row(line) is None for line in tail):
        yield f"{run.metrics.name} was altered in its last rows"
    for step in run.checkpoint_steps()[-1:]:
        mark = read_fields(run.checkpoint(step) / "manifest.json").get("metrics") or {}
        if mark and (not run.metrics.exists() or run.metrics.stat().st_size < mark["bytes"]):
            yield f"{run.metrics.name} is cut short: it lacks rows before step {step:,}"


def _sealed(path: Path, manifest: Fields) -> None:
    _, sealed = read_sealed(path)
    if lost_seal(sealed, manifest):
        raise DamagedFile(path, LOST_SEAL, FROM_A_COPY)


def _mapping(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; attempt.json must be of the attempt in whose folder it is."""
    found = core_fields(path, {})
    number = found.get("attempt")
    if path.name == "attempt.json" and number is not None and str(number) != path.parent.name:
        raise DamagedFile(path, f"is that of attempt {number}", "put each back into its own folder")
    return found


def read_fields(path: Path) -> Fields:
    """Return a JSON object; {} when it is missing, damaged or something else."""
    try:
        return _mapping(path)
    except DamagedFile:
        return {}


def read_jobs(run: RunDir) -> list[Fields]:
    """Return the submitted jobs of a run, newest last."""
    try:
        jobs = job_files.read_jobs(run, strict=False)
    except DamagedFile:
        return []
    return [job for job in jobs if JOB_ID.fullmatch(job["job_id"])]


def all_attempts(run: RunDir) -> list[Fields]:
    """Return attempt.json of every attempt, by number; `attempt` and `why` are always there."""
    return [
        {"attempt": number, **read_fields(folder / "attempt.json"), "why": _why(folder)}
        for number in range(1, run.latest_attempt() + 1)
        if (folder := run.attempt(number)).is_dir()
    ]


def find_runs(folder: Path) -> list[RunDir]:
    """Return the runs in a folder, by name.

    Raises:
        UserError: there is no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--runs={folder} is no folder; give the folder that holds the run folders, or the "
            "name of one run"
        ) from None
    runs = (RunDir(folder / name) for name in names)
    return [run for run in runs if run.resolved_yaml.exists()]


def _length(run: RunDir, manifest: Fields) -> tuple[int | None, int | None]:
    """Return steps and tokens of the whole run: `training.steps` may have grown since the manifest,
    the batch may not.

    Only two lines of resolved.yaml are looked at: to parse the settings of 500 runs would take
    seconds.
    """
    try:
        text = run.resolved_yaml.read_text(encoding="utf-8")
        batch = manifest["config"]["batch"]
        length, per_step = int(manifest["sequence_length"]), int(manifest["tokens_per_step"])
        steps, tokens = _whole(_STEPS, text), _whole(_TOKENS, text)
        if batch["ramp"]:
            from motet.experiments.stream.batch_sizes import Steps

            stages = {0: batch["sequences"], **{s["step"]: s["sequences"] for s in batch["ramp"]}}
            ramp = Steps.of(batch["sequences"], sorted(stages.items()))
            steps = ramp.steps_for(-(-(tokens or 0) // length)) if steps is None else steps
            return steps, ramp.slots_before(steps) * length
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    if steps is None:
        steps = -(-(tokens or 0) // per_step)
    return steps, steps * per_step


def _scheduler(run: RunDir) -> str:
    """Return what the run's settings name; one line is looked at, as for its length."""
    found = _SCHEDULER.search(_text(run.resolved_yaml))
    return found[1] if found else DEFAULT_SCHEDULER


def _whole(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return None if match is None or match[1] == "null" else int(match[1].replace("_", ""))


def _why(folder: Path) -> str:
    """Return why an attempt failed, in one line; "" when it left no word."""
    told = _text(folder / "error.txt")
    path = folder / "attempt.json"
    if path.exists() and not read_fields(path):
        return f"attempts/{folder.name}/attempt.json is damaged"
    return told.splitlines()[0] if told else _culprit(folder, read_fields(folder / "attempt.json"))


def _culprit(folder: Path, attempt: Fields) -> str:
    """Return which rank made an attempt crash: as was written down at its end, or as its files
    tell.
    """
    if attempt.get("culprit"):
        return str(attempt["culprit"])
    try:
        return blame(folder) or ""
    except (OSError, ValueError):
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
