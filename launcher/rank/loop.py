"""The step loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile
from motet.core.files import atomic_write
from motet.core.hashing import sha256_file
from motet.experiments.scoring.store import probe_path, read_probe, set_aside
from motet.experiments.stream.ledger import LedgerWriter, ancestry, open_segment
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.growing import facts_of, grow, growth_due, has_grown
from motet.launcher.rank.job import ORDER, StepDone, TrainingJob
from motet.launcher.rank.probe_budget import THINNED
from motet.launcher.rank.probing import Interrupted
from motet.launcher.rank.stage_ends import restore as restore_trend
from motet.launcher.rank.stage_ends import watch
from motet.launcher.rank.stop import SpikeGuard
from motet.launcher.runs.attempts import HANDED_OVER
from motet.launcher.runs.lr_schedule import learning_rate
from motet.launcher.runs.metrics import SKIPPED
from motet.models.family.base import stage_of
from motet.models.member import StepChoices, name_of
from motet.parallel.engines.protocol import Engine, Guard, StepResult
from motet.parallel.runtime.mesh import agree_any, tell_all


def train(job: TrainingJob, step: int) -> tuple[int, str]:
    """Train from `step` until the run ends or a stop is asked for; return (step reached, why)."""
    total, stopping = job.settings.steps, agree_any(job.stop.requested(), job.world)
    if job.slices and step < total and not stopping:
        compile_ahead(job, step)
    while True:
        job.reached = step
        stopping = stopping or not probe(job, step)
        finished = step >= total and not stopping
        if finished or checkpoint_due(job, step) or (stopping and step > job.segment.start_step):
            save(job, step, last=finished or stopping)
        leaves = growth_due(job, step) and not job.layouts.runs_here(job.stage_at(step))
        if finished or stopping or leaves:
            reason = "finished" if finished else "stopped" if stopping else HANDED_OVER
            job.at("at_end", step, reason=reason)
            return step, reason
        if growth_due(job, step):
            grow(job, step)
            if job.slices:
                compile_ahead(job, step)
        if order_due(job, step):
            order(job, step)
        stage = stage_of(job.family, step) if job.family else None
        lr = learning_rate(job.settings.training.schedule, step, total, job.peak_lr, stage)
        job.at("before_step", step, lr=lr)
        result = train_step(job, step, lr)
        watch(job, step + 1, result)
        tell_skipped(job, job.checkpoints.skipped())
        job.at("after_step", step + 1, **numbers_of(result), lr=lr)
        stopping = result.stop or job.asked_to_stop()
        if not result.applied:
            bad_step(job, step)
        step += 1


def compile_ahead(job: TrainingJob, step: int) -> None:
    """Compile what trains each member, on the first sequences to come: no later step waits for it,
    and what cannot be compiled ends the run here. Nothing where the run does not compile.
    """
    if not job.settings.training.compile:
        return
    started = time.perf_counter()
    with job.progress.phase("compiling"):
        job.progress.print(f"compiling the whole model and {len(job.slices)} members")
        job.engine.compile_ahead(job.feed.read(step).batches[0], job.slices)
    seconds = time.perf_counter() - started
    job.metrics.log("event", step, event="compiled", members=len(job.slices), seconds=seconds)


def order_due(job: TrainingJob, step: int) -> bool:
    """Return whether channels are to be put in order before a step: once, and again where a
    checkpoint of before was loaded.
    """
    ordering = None if job.family is None else job.family.ordering(step)
    return ordering is not None and step >= ordering[0] and ORDER not in job.facts


def order(job: TrainingJob, step: int) -> None:
    """Put channels in the order of their importance on the sequences that come next; checkpoints
    from here on say how (`models.family.importance`).
    """
    assert job.family is not None
    ordering = job.family.ordering(step)
    assert ordering is not None
    batches, sequences, ahead = [], 0, step
    while sequences < ordering[1] and ahead < job.settings.steps:
        batches += job.feed.read(ahead).batches
        sequences, ahead = sequences + job.steps.sequences(ahead), ahead + 1
    groups = max((member.groups for member in job.slices), default=1)
    orders = job.engine.order_channels(batches, groups)
    job.facts[ORDER] = {"step": step, "orders": orders}
    job.metrics.log("event", step, event="ordered", sequences=sequences)


def train_step(job: TrainingJob, step: int, lr: float) -> StepResult:
    """Read a step's sequences and train on them."""
    started = time.perf_counter()
    if job.draw_check is not None:
        job.draw_check.ahead(step)
    share = job.feed.take(step)
    draw = "" if job.draw_check is None else job.draw_check.checked(step, share.draws)
    waited = time.perf_counter() - started
    guard: Guard = job.guard
    if job.growing is not None:
        job.engine.freeze(job.growing.frozen(step))
        new = partial(job.growing.new_elements, step)
        job.engine.rewarm(job.growing.rewarm_share(step), new)
    members = share.members
    slices = job.growing is None or job.growing.trains_slices(step)
    if not slices:
        members = followers(job, step, len(share.batches))
    if job.held is not None or not slices:
        guard = partial(of_member, job.guard, name_of(job.held))
    result = job.engine.step(share.batches, lr, guard, job.stop.requested, members)
    if job.held is not None:
        result = replace(result, losses=named(job.held.name, result.losses, result.loss))
    job.seconds |= {"data": waited, "train": time.perf_counter() - started - waited}
    if job.budget is not None:
        job.budget.train_s += job.seconds["data"] + job.seconds["train"]
    job.last = StepDone(share, result, lr, draw)
    return result


def followers(job: TrainingJob, step: int, micro_batches: int) -> StepChoices | None:
    """Return what a model that grows is told of its loss: to follow a frozen one, or None: the
    labels.
    """
    assert job.growing is not None
    term = job.growing.term(step)
    return None if term is None else StepChoices(((term,),) * micro_batches, (None,))


def of_member(
    guard: SpikeGuard,
    name: str | None,
    loss: float,
    grad_norm: float,
    losses: Mapping[str | None, float] | None = None,
) -> bool:
    """Ask the guard about a step of one model, and of its slices where they train: each model that
    grows has a window of its own.
    """
    return guard(loss, grad_norm, named(name, losses or {}, loss))


def named(
    name: str | None, losses: Mapping[str | None, float], loss: float
) -> dict[str | None, float]:
    """Return the losses of an engine's members, with the name of its model; where that trained
    alone, the loss of the step.
    """
    if set(losses) <= {None}:
        return {name: loss}
    return {name if one is None else one: value for one, value in losses.items()}


def numbers_of(result: StepResult) -> dict[str, Any]:
    """Return what a step gave, the same on every rank."""
    names = ("loss", "z_loss", "balance_loss", "grad_norm", "applied")
    return {name: getattr(result, name) for name in names}


def checkpoint_due(job: TrainingJob, step: int) -> bool:
    """Return whether a checkpoint is due before `step` trains; not right after one was loaded. A
    model that is about to grow is kept.
    """
    every = job.settings.checkpoint.every_steps
    due = (every > 0 and step % every == 0) or growth_due(job, step)
    return due and step > job.segment.start_step


def save(job: TrainingJob, step: int, last: bool) -> None:
    """Save in the background; the ledger is on disk before the checkpoint is published.

    Where the disk has no room the run may go on without, by policy; not at its end, nor where a
    model grows from it.
    """
    started = time.perf_counter()
    tell_skipped(job, job.checkpoints.wait())
    optional = job.settings.checkpoint.no_room == "skip" and not (last or growth_due(job, step))
    tensors, facts = job.engine.tensors(), facts_of(job)
    why = job.checkpoints.save(step, tensors, facts, job.ledger.sync, may_skip=optional)
    job.seconds["checkpoint"] = time.perf_counter() - started
    if why:
        tell_skipped(job, why)
    else:
        if job.world.rank == 0:  # the newest is under way
            with contextlib.suppress(OSError):
                job.run.skipped(job.segment.attempt).unlink(missing_ok=True)
        job.at("at_checkpoint", step, folder=str(job.run.checkpoint(step)))


def tell_skipped(job: TrainingJob, why: str) -> None:
    """Say once that a checkpoint was skipped, and leave word for `status` until the next is begun,
    as far as the disk takes it; on rank 0.
    """
    if job.world.rank or why in ("", job.told_skipped):
        return
    job.told_skipped = why
    with contextlib.suppress(OSError):
        atomic_write(job.run.skipped(job.segment.attempt), f"{why}\n")
    job.progress.print(f"skipped: {why}")
    job.metrics.log("event", job.reached, event=SKIPPED, why=why)


def load(
    checkpoints: Checkpoints,
    engine: Engine,
    step: int,
    expected: dict[str, Any] | None = None,
    grown: bool = False,
) -> dict[str, Any]:
    """Let the engine go on from a checkpoint; return its manifest."""
    tensors = engine.tensors()
    manifest = checkpoints.load(step, tensors, expected, grown)
    engine.restore(tensors)
    return manifest


def probe(job: TrainingJob, step: int) -> bool:
    """Measure every experiment that is due; False when a stop was asked for in the middle."""
    thin(job, step)
    if not job.probes.names(step) or has_grown(job, step) or probed_before(job, step):
        return True
    started = time.perf_counter()
    try:
        job.at("at_probe", step)
    except Interrupted:
        return False
    if job.budget is not None:
        job.budget.spent(time.perf_counter() - started, job.probes.names(step))
    return True


def thin(job: TrainingJob, step: int) -> None:
    """Leave out what the budget of probes has no room for, as rank 0 decides (a collective where
    there is a budget).
    """
    due = job.probes.names(step)
    if job.budget is None or not due:
        return
    budget = job.budget
    known = step in budget.decided
    left_out = tell_all(budget.left_out(step, due), job.world)
    if left_out and not known:
        spent = {"probe_s": budget.probe_s, "train_s": budget.train_s, "share": budget.share}
        job.metrics.log("event", step, event=THINNED, experiments=left_out, **spent)
    job.probes.leave_out(step, left_out)


def probed_before(job: TrainingJob, step: int) -> bool:
    """Return whether the checkpoint that this segment grew from was measured already, when it was
    made (a collective).
    """
    if step != job.segment.start_step or not job.segment.parent:
        return False
    path = probe_path(job.run.probes, step)
    done = False
    if job.world.rank == 0 and path.exists():
        done = _holds(job, path, set(job.probes.names(step)))
    return tell_all(done, job.world)


def _holds(job: TrainingJob, path: Path, names: set[str]) -> bool:
    """Return whether a probe file has what is due. A damaged one has not: it is kept under another
    name, and what it held is measured again, on the same weights.
    """
    start, parent = job.segment.start_step, job.segment.parent
    known = {
        one["sha256"] for one in job.measured if (one["step"], one["segment"]) == (start, parent)
    }
    try:
        if known and sha256_file(path) not in known:
            set_aside(path)
            return False
        found = [read_probe(path, name_of(member)) for member in job.scored]
    except DamagedFile:  # `keep_aside` takes it out of the way
        return False
    return all(f["segment"] == parent and set(s) >= names for f, s in found)


def bad_step(job: TrainingJob, step: int) -> None:
    """Act on an update that was left out, by policy; raises `BadRun` when it is time to give up."""
    policy = job.settings.training.bad_steps.policy
    job.metrics.log("event", step + 1, event="bad_step", policy=policy, why=job.guard.why)
    if policy == "stop" or job.guard.too_many(step):
        raise BadRun(
            f"step {step:,}: {job.guard.why}; training.bad_steps.policy={policy} gives up here"
        )
    if policy == "rollback":
        roll_back(job, step)


def roll_back(job: TrainingJob, step: int) -> None:
    """Put the last checkpoint's weights back and leave out the steps since, as PaLM did at spikes
    (arXiv:2204.02311, section 5.1).

    The steps stay in the ledger of a new segment, marked as not applied.
    """
    tell_skipped(job, job.checkpoints.wait())
    saved_steps = tell_all([s for s in job.run.checkpoint_steps() if s <= step], job.world)
    if not saved_steps:
        return
    # Within a stage: where it began, the model is the one that grew.
    grown = has_grown(job, saved_steps[-1])
    manifest = load(job.checkpoints, job.engine, saved_steps[-1], grown=grown)
    keep_order(job.facts, manifest)
    restore_trend(job, manifest)
    job.ledger.close()
    hashes = (job.segment.plan_sha256, job.segment.definition_sha256)
    if job.world.rank == 0:
        opened = open_segment(
            job.run.ledger,
            manifest["segment"],
            job.segment.attempt,
            saved_steps[-1],
            job.world.size,
            hashes,
            job.segment.draws,
        )
        job.lineage = ancestry(job.run.ledger, opened, manifest)
    job.segment = tell_all(opened if job.world.rank == 0 else job.segment, job.world)
    job.ledger = LedgerWriter(job.run.ledger, job.segment.segment, job.world.rank)
    for left_out in range(saved_steps[-1], step + 1):
        job.note(job.feed.read(left_out).records, applied=False)
    job.metrics.log("event", step + 1, event="rollback", to_step=saved_steps[-1])


def keep_order(facts: dict[str, Any], manifest: Mapping[str, Any]) -> None:
    """Let facts say of the order of channels what a checkpoint that was loaded says."""
    facts.pop(ORDER, None)
    facts |= {ORDER: manifest[ORDER]} if ORDER in manifest else {}


class BadRun(RuntimeError):
    """Training cannot go on; the last good checkpoint stays."""
