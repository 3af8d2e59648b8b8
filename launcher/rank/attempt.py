"""One attempt on one rank, from joining the others to saying how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore

import motet
from motet.core.errors import UserError, raise_problems
from motet.core.files import atomic_write, read_json, write_json
from motet.core.hashing import sha256_hex
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.planning.prediction import record
from motet.launcher.rank.assembly import build_job
from motet.launcher.rank.disk import disk_is_out
from motet.launcher.rank.job import TrainingJob
from motet.launcher.rank.loop import BadRun, train
from motet.launcher.rank.signals import Lifeline, end_now
from motet.launcher.rank.stage_engines import OtherRanks
from motet.launcher.rank.stop import StopRequest
from motet.launcher.runs.attempts import ENDED_WELL, HANDED_OVER, begun, claim, crash_loop
from motet.launcher.runs.blame import Heartbeat
from motet.launcher.runs.manifest import check_frozen, corpus_problems
from motet.launcher.runs.metrics import unmirrored
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_manifest
from motet.launcher.runs.stage_layouts import (
    RunLayouts,
    checked_layouts,
    family_of,
    stage_to_begin,
)
from motet.launcher.runs.starting import Starting, StartStage
from motet.models.config import ModelConfig
from motet.parallel.runtime.mesh import World, agree_any, first_complaint, join, leave, tell_all

CRASHED, USER_ERROR, BAD_RUN = 1, 2, 3
RESERVE, RESERVE_BYTES = "reserve", 1 << 16
"""File that holds room on the disk for the words in which a launch that found it full ends."""
MIRROR_WAIT_S = 1.5
"""How long a run that was stopped or crashed waits for W&B; the next attempt sends what was lost.
"""


class CrashLoop(RuntimeError):
    """The attempts before crashed at the same place, and so would this one."""


def rank_main(
    run: RunDir, launch: int, stop: StopRequest, lifeline: Lifeline, starting: Starting
) -> int:
    """Join the other ranks, take an attempt together, train; return the exit code of a refusal.

    Nothing else returns: threads and collectives may wait for a rank that is gone.
    """
    attempt = launch
    try:
        settings, layouts = _settings(run, launch)
        starting.at(StartStage.MEETING, _meeting(), waits=True)
        _store = _hold_store(settings.layout.timeout_s)  # until this rank ends
        world = join(settings.layout.device, settings.layout.timeout_s, layouts.of(layouts.begun))
        attempt = _take(run, launch, world)
        heartbeat = Heartbeat(run.attempt(attempt), world.rank)
        lifeline.belongs_to(run.attempt(attempt), world.rank)
        refuse_crash_loop(run, launch, attempt, world)
        _attempt(run, settings, attempt, world, layouts, stop, heartbeat, lifeline, starting)
    except OtherRanks as told:
        if os.environ["RANK"] == "0":
            _amend(run, attempt, end_step=told.step, reason=HANDED_OVER)
        agree_any(False, world)  # none leaves before that is on disk
    except (UserError, BadRun, CrashLoop) as error:
        with contextlib.suppress(OSError):  # a full disk must not hold up the end
            _refuse(run, attempt, error)
        leave()
        return _exit_code(error)
    except Exception as error:
        _crash(run, launch, attempt, error, lifeline)
        end_now(CRASHED)
    # All is on disk. Taking torch apart takes a second that a preempted job may not have, and on
    # loaded machines it has ended in an abort, which made a failure of a run that was finished.
    end_now(0)


def _crash(run: RunDir, launch: int, attempt: int, error: Exception, lifeline: Lifeline) -> None:
    """Leave what went wrong, as far as the disk takes it: the end must not depend on that.

    A disk that takes no more is the reason of the whole launch: starting anew would not help.
    """
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
        sys.stderr.flush()
    if full := disk_is_out(error):
        with contextlib.suppress(OSError):
            (run.attempt(launch) / RESERVE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _refuse(run, attempt, UserError(f"{run.root}: {full}; the newest checkpoint is whole"))
        return
    with contextlib.suppress(OSError):
        if lifeline.attempt is not None or not begun(run, launch):
            text = "".join(traceback.format_exception(error))
            atomic_write(run.attempt(attempt) / f"crash-{os.environ['RANK']}.txt", text)


def _settings(run: RunDir, launch: int) -> tuple[RunSettings, RunLayouts]:
    """Read the settings of this launch, and split the world as they say, in every stage."""
    own = run.launch_settings(launch)
    settings = run_yaml.load(own if own.exists() else run.resolved_yaml)
    world_size = int(os.environ["WORLD_SIZE"])
    manifest = read_manifest(run)
    model = ModelConfig(**manifest["model"])
    family = family_of(settings, model, run, manifest)
    begun = os.environ.get("MOTET_STAGE") or stage_to_begin(run, family)
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    return settings, checked_layouts(
        settings, manifest, model, world_size, family=family, begun=int(begun), alone=alone
    )


def _meeting() -> str:
    """What a rank waits for that joins the others."""
    size = os.environ["WORLD_SIZE"]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"all {size} ranks to meet" + ("" if "MOTET_STORE" in os.environ else f" at {where}")


def _hold_store(timeout_s: float) -> TCPStore | None:
    """Hold the store through which ranks find each other, on the rank that torchrun put at its
    address.

    torchrun's own would outlive a restart, with the addresses of dead ranks in it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "False" or "MOTET_STORE" in os.environ:
        return None
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # to all ranks it is another process's
    if os.environ["MOTET_HOLDS_STORE"] != "1":
        return None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def _take(run: RunDir, launch: int, world: World) -> int:
    """Take an attempt: rank 0 does, and tells the others (torchrun counts restarts differently on
    every machine).
    """
    mine = claim(run, launch, world.size) if world.rank == 0 else 0
    if world.rank == 0 and not (reserve := run.attempt(launch) / RESERVE).exists():
        reserve.write_bytes(os.urandom(RESERVE_BYTES))
    return tell_all(mine, world)


def refuse_crash_loop(run: RunDir, launch: int, attempt: int, world: World) -> None:
    """Raise `CrashLoop` on all ranks when this attempt would be one crash too many."""
    found = crash_loop(run, launch, before=attempt) if world.rank == 0 else None
    if told := tell_all(found, world):
        raise CrashLoop(told)


def _refuse(run: RunDir, attempt: int, error: Exception) -> None:
    """Leave the reason for the user, once."""
    told = run.attempt(attempt) / "error.txt"
    if os.environ["RANK"] != "0" and told.exists():
        return
    print(f"motet: {error}", file=sys.stderr)
    atomic_write(told, f"{error}\n")
    if os.environ["RANK"] == "0" and begun(run, attempt):
        _amend(run, attempt, reason="crash_loop" if isinstance(error, CrashLoop) else "refused")


def _exit_code(error: Exception) -> int:
    if isinstance(error, CrashLoop):
        return CRASHED
    return BAD_RUN if isinstance(error, BadRun) else USER_ERROR


def _amend(run: RunDir, attempt: int, **facts: Any) -> None:
    """Change facts in attempt.json; one that ended already keeps its end, unless it was taken for
    lost too early.
    """
    path = run.attempt(attempt) / "attempt.json"
    before = read_json(path)
    ended_well = facts.get("reason") in ENDED_WELL
    if before.get("ended") is None or (before.get("reason") == "lost" and ended_well):
        ended = {} if facts.get("reason") == "running" else {"ended": time.time()}
        write_json(path, before | ended | facts)


def _attempt(
    run: RunDir,
    settings: RunSettings,
    attempt: int,
    world: World,
    layouts: RunLayouts,
    stop: StopRequest,
    heartbeat: Heartbeat,
    lifeline: Lifeline,
    starting: Starting,
) -> None:
    """Check, build, train, and write down how it ended."""
    starting.at(StartStage.CHECKS, "the corpora and the plan to be checked")
    manifest = _verified(run, settings, world)
    job, step = build_job(
        run, settings, attempt, world, layouts, stop, manifest, heartbeat, starting
    )
    if world.rank == 0:
        _begin(run, job, attempt, step)
    lifeline.trains()
    reason = "crashed"
    try:
        with job.progress:
            step, reason = train(job, step)
        job.checkpoints.close()
    except (BadRun, UserError):
        reason = "refused"
        job.checkpoints.close()  # all ranks give up at one step: what is being written may finish
        raise
    finally:
        _end(run, job, attempt, step if reason in ENDED_WELL else job.reached, reason)
        if reason in ENDED_WELL:
            agree_any(False, world)  # none leaves before all is on disk
            lifeline.ends()
        if job.mirror is not None:
            job.mirror.close(None if reason == "finished" else MIRROR_WAIT_S)


def _begin(run: RunDir, job: TrainingJob, attempt: int, step: int) -> None:
    """Say that the attempt trains now (rank 0), from which step and with what; the run has its
    settings from here on.
    """
    run_yaml.store(run.resolved_yaml, job.settings)
    if step < job.settings.steps:
        run.done.unlink(missing_ok=True)
    if job.mirror is not None:
        for row in unmirrored(run.metrics, step):
            job.mirror.log(row)
    size = job.world.size
    _predict(run, job, attempt, step)
    job.metrics.log(
        "attempt",
        step,
        attempt=attempt,
        start_step=step,
        world_size=size,
        run_sha256=job.facts["run_sha256"],
        settings_sha256=sha256_hex(run_yaml.to_yaml(job.settings)),
    )
    _amend(
        run,
        attempt,
        start_step=step,
        precision=job.facts["precision"],
        device=job.world.device.type,
        segment=job.segment.segment,
        versions={
            "motet": motet.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        reason="running",
    )


def _predict(run: RunDir, job: TrainingJob, attempt: int, step: int) -> None:
    """Write down how long a step should take, to be compared with how long it does."""
    gpu = None
    if job.world.device.type == "cuda":
        found = torch.cuda.get_device_properties(job.world.device)
        gpu = (found.name, found.total_memory / 2**30)
    record(
        run,
        attempt,
        job.settings,
        job.layouts.of(job.stage_at(step)),
        sequences=job.steps.sequences(step),
        precision=job.facts["precision"],
        nodes=-(-job.world.size // int(os.environ.get("LOCAL_WORLD_SIZE", job.world.size))),
        gpu=gpu,
    )


def _end(run: RunDir, job: TrainingJob, attempt: int, step: int, reason: str) -> None:
    """Close what the attempt writes to, and say how it ended; each of it though another fails."""
    try:
        with contextlib.ExitStack() as last_first:
            last_first.callback(job.metrics.close)
            last_first.callback(job.metrics.log, "event", step, event=reason)
            last_first.callback(job.feed.close)
            last_first.callback(job.ledger.close)
    except BaseException:
        reason = "crashed" if reason in ENDED_WELL else reason
        raise
    finally:
        if job.world.rank == 0:
            if reason == "finished":
                atomic_write(run.done, f"{step}\n")
            _amend(run, attempt, end_step=step, reason=reason)


def _verified(run: RunDir, settings: RunSettings, world: World) -> dict[str, Any]:
    """Return the manifest once every rank has found definition, plan and corpora as frozen; one
    rank of each machine looks at every token, whoever started it.
    """
    complaint: str | None = None
    manifest: dict[str, Any] = {}
    mine = sha256_hex(run_yaml.to_yaml(settings))
    if tell_all(mine, world) != mine:
        complaint = (
            "this rank read other settings of the run than rank 0: a file system that shows new "
            f"files late? Look at {run.root} from here, and start again"
        )
    try:
        manifest, _ = check_frozen(run, settings)
        if settings.data.verify and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            raise_problems(corpus_problems(settings, manifest["data"]))
    except UserError as error:
        complaint = complaint or str(error)
    told = first_complaint(complaint, world)
    if told:
        raise UserError(told)
    return manifest
