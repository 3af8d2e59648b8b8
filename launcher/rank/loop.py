"""The step loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from motet.experiments.scoring.store import probe_path, read_probe
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.ledger import LedgerWriter, Record, Segment, open_segment
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.feed import Feed
from motet.launcher.rank.lr_schedule import learning_rate
from motet.launcher.rank.probing import Interrupted, ProbeSet
from motet.launcher.rank.progress import Progress
from motet.launcher.rank.stop import Judge, StopRequest
from motet.launcher.rank.wandb_mirror import WandbMirror
from motet.launcher.runs.blame import Sign
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from motet.parallel.engines.protocol import Engine, StepResult
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, agree_any, tell_all


@dataclass
class Job:
    """One attempt of a run, on one rank: everything that the loop drives."""

    settings: RunSettings
    run: RunDir
    world: World
    layout: Layout
    engine: Engine
    steps: Steps
    feed: Feed
    probes: ProbeSet
    checkpoints: Checkpoints
    metrics: MetricsWriter
    mirror: WandbMirror | None
    progress: Progress
    stop: StopRequest
    sign: Sign
    judge: Judge
    segment: Segment
    ledger: LedgerWriter
    facts: dict[str, Any]
    peak_lr: float
    flops_per_token: float
    peak_flops: float | None
    memory_mib: Any
    seconds: dict[str, float] = field(default_factory=dict)


def train(job: Job, step: int) -> tuple[int, str]:
    """Train from `step` until the run ends or a stop is asked for; return (step reached, why)."""
    total, stopping = job.settings.steps, agree_any(job.stop.requested(), job.world)
    while True:
        stopping = stopping or not probe(job, step)
        finished = step >= total and not stopping
        if finished or checkpoint_due(job, step) or (stopping and step > job.segment.start_step):
            save(job, step)
        if finished or stopping:
            return step, "finished" if finished else "stopped"
        started = time.perf_counter()
        share = job.feed.take(step)
        waited = time.perf_counter() - started
        lr = learning_rate(job.settings.training.schedule, step, total, job.peak_lr)
        result = job.engine.step(share.batches, lr, job.judge, job.stop.requested)
        note(job, share.record, result.applied)
        job.sign.touch()
        job.seconds |= {"data": waited, "train": time.perf_counter() - started - waited}
        report(job, step, result, lr)
        stopping = result.stop
        if not result.applied:
            bad_step(job, step)
        step += 1


def checkpoint_due(job: Job, step: int) -> bool:
    """Return whether a checkpoint is due before `step` trains; not right after one was loaded."""
    every = job.settings.checkpoint.every_steps
    return every > 0 and step % every == 0 and step > job.segment.start_step


def save(job: Job, step: int) -> None:
    """Save in the background; the ledger is on disk before the checkpoint is published."""
    started = time.perf_counter()
    facts = {**job.facts, "segment": job.segment.segment, "judge": job.judge.state()}
    job.checkpoints.save(step, job.engine.tensors(), facts, job.ledger.sync)
    job.seconds["checkpoint"] = time.perf_counter() - started
    job.metrics.log("checkpoint", step, seconds=job.seconds["checkpoint"])


def load(
    checkpoints: Checkpoints, engine: Engine, step: int, expected: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Let the engine go on from a checkpoint; return its manifest."""
    tensors = engine.tensors()
    manifest = checkpoints.load(step, tensors, expected)
    engine.restore(tensors)
    return manifest


def note(job: Job, record: Record, applied: bool) -> None:
    """Write what a data-parallel rank consumed to the ledger, once."""
    if job.layout.is_dp_leader(job.world.rank):
        job.ledger.append(replace(record, applied=applied))


def probe(job: Job, step: int) -> bool:
    """Measure every experiment that is due; training does not notice.

    Returns:
        False when a stop was asked for in the middle: nothing is written, and whoever resumes
            measures again.
    """
    if not job.probes.names(step) or probed_before(job, step):
        return True
    with job.progress.phase("probing"):
        started = time.perf_counter()
        try:
            scores = job.probes.score(step, job.engine, job.layout, job.world, job.stop.requested)
        except Interrupted:
            return False
        if job.world.rank == 0:
            job.probes.write(
                job.run, step, job.segment.segment, job.segment.definition_sha256, scores
            )
            seconds = time.perf_counter() - started
            job.metrics.log("probe", step, experiments=job.probes.means(scores), seconds=seconds)
        job.seconds["probe"] = time.perf_counter() - started
    return True


def probed_before(job: Job, step: int) -> bool:
    """Return whether the checkpoint that this segment grew from was measured already, when it was
    made (a collective).
    """
    if step != job.segment.start_step or not job.segment.parent:
        return False
    path = probe_path(job.run.probes, step)
    done = False
    if job.world.rank == 0 and path.exists():
        facts, scores = read_probe(path)
        done = facts["segment"] == job.segment.parent and set(scores) >= set(job.probes.names(step))
    return tell_all(done, job.world)


def report(job: Job, step: int, result: StepResult, lr: float) -> None:
    """Log a step."""
    tokens = job.steps.sequences(step) * job.settings.data.sequence_length
    seconds, job.seconds = job.seconds, {}
    rate = tokens / (seconds["data"] + seconds["train"])
    flops = rate * job.flops_per_token / job.world.size
    job.metrics.log(
        "step",
        step + 1,
        loss=result.loss,
        z_loss=result.z_loss,
        balance_loss=result.balance_loss,
        grad_norm=result.grad_norm,
        lr=lr,
        tokens=job.steps.slots_before(step + 1) * job.settings.data.sequence_length,
        tokens_per_s=rate,
        mfu=flops / job.peak_flops if job.peak_flops else None,
        seconds=seconds,
        memory_mib=job.memory_mib(),
        skipped=not result.applied,
        why=job.judge.why,
    )
    job.progress.update(step + 1, result.loss, rate)


def bad_step(job: Job, step: int) -> None:
    """Act on an update that was left out, by policy; raises `BadRun` when it is time to give up."""
    policy = job.settings.training.bad_steps.policy
    job.metrics.log("event", step + 1, event="bad_step", policy=policy, why=job.judge.why)
    if policy == "stop" or job.judge.too_many(step):
        raise BadRun(
            f"step {step:,}: {job.judge.why}; training.bad_steps.policy={policy} gives up here"
        )
    if policy == "rollback":
        roll_back(job, step)


def roll_back(job: Job, step: int) -> None:
    """Put the last checkpoint's weights back and leave out the steps since, as PaLM did at spikes
    (arXiv:2204.02311, section 5.1).

    The steps stay in the ledger of a new segment, marked as not applied.
    """
    job.checkpoints.wait()
    known = tell_all([s for s in job.run.checkpoint_steps() if s <= step], job.world)
    if not known:
        return
    manifest = load(job.checkpoints, job.engine, known[-1])
    job.ledger.close()
    hashes = (job.segment.plan_sha256, job.segment.definition_sha256)
    if job.world.rank == 0:
        opened = open_segment(
            job.run.ledger,
            manifest["segment"],
            job.segment.attempt,
            known[-1],
            job.world.size,
            hashes,
        )
    job.segment = tell_all(opened if job.world.rank == 0 else job.segment, job.world)
    job.ledger = LedgerWriter(job.run.ledger, job.segment.segment, job.world.rank)
    for left_out in range(known[-1], step + 1):
        note(job, job.feed.read(left_out).record, applied=False)
    job.metrics.log("event", step + 1, event="rollback", to_step=known[-1])


class BadRun(RuntimeError):
    """Training cannot go on; the last good checkpoint stays."""
