"""Puts one attempt together on one rank: the model, its data, and the newest good checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import motet
from motet.core.errors import UserError
from motet.experiments.stream.ledger import LedgerWriter, Segment, ancestry, open_segment
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.checkpoint import Checkpoints, NotShown
from motet.launcher.rank.choices import DrawCheck
from motet.launcher.rank.device import choose_precision, memory_meter, peak_flops
from motet.launcher.rank.evaluating import MemberEvaluation
from motet.launcher.rank.feed import Draws, Feed
from motet.launcher.rank.growth_inputs import read_teacher
from motet.launcher.rank.hooks import Hooks
from motet.launcher.rank.job import TrainingJob
from motet.launcher.rank.loop import keep_order, load
from motet.launcher.rank.own_hooks import own_hooks
from motet.launcher.rank.plugins import load_hooks
from motet.launcher.rank.probing import ProbeSet
from motet.launcher.rank.progress import TrainingProgress
from motet.launcher.rank.stage_ends import restore as restore_trend
from motet.launcher.rank.stage_ends import settle
from motet.launcher.rank.stage_engines import StageEngines, layout_at
from motet.launcher.rank.stop import SpikeGuard, StopRequest
from motet.launcher.rank.trackers import open_trackers
from motet.launcher.rank.validating import Validation
from motet.launcher.rank.wandb_mirror import model_facts_of
from motet.launcher.runs import extension_locks
from motet.launcher.runs.attempts import DAMAGED, refuse_start_over
from motet.launcher.runs.blame import Heartbeat
from motet.launcher.runs.families import draws_of, open_family
from motet.launcher.runs.manifest import check_frozen, open_stream
from motet.launcher.runs.metrics import MetricsWriter, all_rows
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint, run_sha256
from motet.launcher.runs.stage_layouts import RunLayouts
from motet.launcher.runs.starting import Starting, StartStage
from motet.models.config import ModelConfig
from motet.models.family.base import Family, Member, choices, teacher_update_of
from motet.models.family.progressive import ProgressiveFamily
from motet.parallel.engines.embedding_noise import refuse_noise
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, agree_any, first_complaint, tell_all


@dataclass(frozen=True)
class Start:
    """The checkpoint that an attempt begins with: its step, its segment of the ledger and its
    facts; 0, 0 and None for fresh weights. `held`: whose model it has, where a family grows, and
    `layout` how it lies.
    """

    step: int = 0
    segment: int = 0
    facts: dict[str, Any] | None = None
    held: Member | None = None
    layout: Layout | None = None


def build_job(
    run: RunDir,
    settings: RunSettings,
    attempt: int,
    world: World,
    layouts: RunLayouts,
    stop: StopRequest,
    manifest: dict[str, Any],
    heartbeat: Heartbeat,
    starting: Starting,
) -> tuple[TrainingJob, int]:
    """Put an attempt together and load the newest good checkpoint; return the job and its first
    step.

    Raises:
        OtherRanks: on every rank: the ranks of this launch cannot go on from that checkpoint.
    """
    _, plan = check_frozen(run, settings)
    hashes = {
        "definition_sha256": manifest["definition_sha256"],
        "plan_sha256": plan.sha256,
        "run_sha256": run_sha256(manifest),
    }
    model, training = ModelConfig(**manifest["model"]), settings.training
    for layout in layouts.layouts:
        refuse_noise(plan.noise, layout, model.n_experts > 0)
    family, members = open_family(run, settings, manifest)
    precision = _precision(run, settings, world)
    starting.at(StartStage.ENGINE, "the model to be built", detail=_extension)
    growing = family if isinstance(family, ProgressiveFamily) else None
    options = engine_options(settings, precision, family)
    engines = StageEngines(model, options, world)
    if growing is not None:
        engines.taught_by, engines.update_rule = growing.taught_by, growing.update_rule
    if growing is None:  # else the checkpoint says whose model it is
        engines.of(None, layouts.of(0))
    checkpoints = _checkpoints(run, settings, world, growing)
    public = run_yaml.public(settings)
    mirror = open_trackers(run, public, world.rank, hashes | model_facts_of(manifest))
    metrics = MetricsWriter(run, public, world.rank, mirror)
    starting.at(StartStage.CHECKPOINT, "a checkpoint to be read")
    start = _load_newest(run, engines, layouts, growing, checkpoints, metrics, world, hashes)
    layout, held = start.layout or layouts.of(0), start.held
    engine = engines.of(held, layout)
    if start.facts is None and settings.model.from_hf:
        engine.load_model(_imported(settings.model.from_hf))
    steps = settings.batch_steps
    begun = (start.facts or {}).get("draws")
    # The whole model alone trains on all of a step: each rank reads, and proves, it in one piece.
    number = draws_of(family, settings, layouts.layouts[-1], begun) if members else 1
    choose = partial(choices, family, members, draws=number)
    draws = Draws(number, choose, family.by_replica, partial(teacher_update_of, family))
    if growing is not None:
        draws = draws._replace(told=growing.engine_choices)
    draw_check = DrawCheck(family, members, number, settings.steps, world)
    draw_check.ahead(start.step)
    segment = _open_segment(run, start, attempt, world, hashes, number if members else None)
    job = TrainingJob(
        settings=settings,
        run=run,
        world=world,
        layouts=layouts,
        layout=layout,
        engine=engine,
        steps=steps,
        feed=Feed(
            open_stream(settings, plan),
            steps,
            layout,
            world.rank,
            draws,
        ),
        probes=ProbeSet.of_run(run, settings, () if growing is None else growing.ends()),
        checkpoints=checkpoints,
        metrics=metrics,
        mirror=mirror,
        progress=TrainingProgress(
            settings.steps, start.step, world.rank, log=run.first_rank_log(attempt)
        ),
        stop=stop,
        heartbeat=heartbeat,
        starting=starting,
        guard=SpikeGuard(training.bad_steps),
        segment=segment,
        ledger=LedgerWriter(run.ledger, segment.segment, world.rank),
        facts={
            **hashes,
            "model": manifest["model"],
            "motet_version": motet.__version__,
            "precision": precision,
            **({"members": manifest["members"], "draws": number} if members else {}),
        },
        peak_lr=training.optimizer.learning_rate(manifest["parameters_non_embedding"]),
        flops_per_token=manifest["flops_per_token"],
        family=family,
        members=members,
        draw_check=draw_check,
        evaluation=MemberEvaluation.of_run(settings, members, manifest.get("stages") or ()),
        validation=Validation.of_run(settings),
        engines=None if growing is None else engines.another,
        held=held,
        peak_flops=peak_flops(world.device),
        memory_mib=memory_meter(world.device),
    )
    job.budget = job.probes.budget(settings.probes.budget)
    if job.budget is not None and world.rank == 0:
        job.budget.recall(all_rows(run.metrics))
    if start.facts is not None:
        job.guard.restore(start.facts["judge"])
        restore_trend(job, start.facts)
        read_teacher(job)
        keep_order(job.facts, start.facts)
        job.measured += start.facts.get("probes", [])
    if world.rank == 0:
        job.lineage = ancestry(run.ledger, segment, start.facts)
    job.hooks = Hooks(world, own_hooks(job), load_hooks(run, settings, manifest, world))
    first = "the first step, which compiles the model" if training.compile else "the first step"
    starting.at(StartStage.FIRST_STEP, first, detail=_extension)
    return job, start.step


def _extension() -> tuple[str, bool] | None:
    """What is waited for where an extension is compiled, here or by another process."""
    lock = extension_locks.waited_for()
    if lock is not None:
        return extension_locks.told(lock)
    return ("an extension to be compiled", False) if extension_locks.compiles() else None


def _checkpoints(
    run: RunDir, settings: RunSettings, world: World, growing: ProgressiveFamily | None
) -> Checkpoints:
    kept, always = settings.checkpoint, () if growing is None else growing.ends()
    return Checkpoints(run, world, kept.keep, kept.keep_every_steps, kept.async_, always)


def _open_segment(
    run: RunDir,
    start: Start,
    attempt: int,
    world: World,
    hashes: dict[str, str],
    draws: int | None,
) -> Segment:
    """Open a segment of the ledger: rank 0 does, and tells the others."""
    opened = None
    if world.rank == 0:
        under = (hashes["plan_sha256"], hashes["definition_sha256"])
        parent, step = start.segment, start.step
        opened = open_segment(run.ledger, parent, attempt, step, world.size, under, draws)
    segment = tell_all(opened, world)
    assert segment is not None
    return segment


def _precision(run: RunDir, settings: RunSettings, world: World) -> str:
    """Return the precision of this attempt, the same on all ranks, and set what goes with it."""
    training = settings.training
    if world.device.type == "cuda":
        torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
    mine = _begun_precision(run, world) or choose_precision(training.precision, world.device)
    return "fp32" if agree_any(mine == "fp32", world) else mine  # the slowest decides


def _begun_precision(run: RunDir, world: World) -> str | None:
    """Return the precision that the newest checkpoint was trained with: "auto" is decided once for
    a run.
    """
    found = None
    for step in run.checkpoint_steps() if world.rank == 0 else []:
        with contextlib.suppress(
            UserError, KeyError
        ):  # a damaged one is dealt with when it is loaded
            found = str(read_checkpoint(run, step)["precision"])
    return tell_all(found, world)


def engine_options(settings: RunSettings, precision: str, family: Family) -> EngineOptions:
    """Return what the engine needs of the settings and of the family."""
    training, optimizer = settings.training, settings.training.optimizer
    return EngineOptions(
        precision=precision,
        compile=training.compile,
        clip_norm=training.clip_norm,
        z_loss=training.z_loss,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=optimizer.fused,
        mask_update=family.mask_update,
        by_users=family.normalize == "users",
        teacher=family.has_teacher,
        base_width=family.base if isinstance(family, ProgressiveFamily) else None,
        seed=settings.seed,
        zero_stage=settings.layout.zero_stage,
        offload=settings.layout.offload,
        deepspeed=settings.layout.deepspeed,
    )


def _load_newest(
    run: RunDir,
    engines: StageEngines,
    layouts: RunLayouts,
    growing: ProgressiveFamily | None,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    world: World,
    hashes: dict[str, str],
) -> Start:
    """Load the newest undamaged checkpoint; return what it is.

    Raises:
        NotShown: some ranks see another folder than others: no checkpoint is given up for that.
        UserError: there are checkpoints, and all are damaged: nothing is trained over them.
        OtherRanks: the newest has the model of a stage that has other ranks.
    """
    known = tell_all(run.checkpoint_steps(), world)
    complaints = []
    grew = set(tell_all(run.grown_steps(), world))
    kept = [(step, grown) for step in known for grown in (False, True) if step in grew or not grown]
    for step, grown in reversed(kept):
        try:
            held = _held_by(run, growing, step, grown, world)
            layout = layout_at(layouts, growing, step, held)
            manifest = load(checkpoints, engines.of(held, layout), step, hashes, grown)
            return Start(step, manifest["segment"], manifest, held, layout)
        except NotShown:
            raise
        except UserError as error:
            complaints.append(str(error))
            metrics.log("event", step, event="damaged_checkpoint", why=str(error))
            if world.rank == 0:
                print(f"motet: {error}; trying the one before", file=sys.stderr)
                set_aside(run, step, grown)
    if complaints:
        raise UserError("no checkpoint of this run can be used:\n" + "\n".join(complaints))
    refuse_start_over(run)
    held = None if growing is None else growing.member_at(0)
    return Start(held=held, layout=layout_at(layouts, growing, 0, held))


def _held_by(
    run: RunDir, growing: ProgressiveFamily | None, step: int, grown: bool, world: World
) -> Member | None:
    """Return whose model a checkpoint has; the family learns where its stages began (a collective
    where it grows).

    Raises:
        UserError: on every rank: the checkpoint says nothing that can be read.
    """
    if growing is None:
        return None
    facts: dict[str, Any] = {}
    complaint = None
    try:
        facts = read_checkpoint(run, step, grown=grown) if world.rank == 0 else {}
    except UserError as error:
        complaint = str(error)
    if told := first_complaint(complaint, world):
        raise UserError(f"checkpoint {run.checkpoint(step, grown)} is damaged: {told}")
    settle(growing, tell_all(facts, world))
    return growing.member_at(step if grown else max(step - 1, 0))


def set_aside(run: RunDir, step: int, grown: bool = False) -> None:
    """Rename a checkpoint that cannot be used: retention must not count it among the newest."""
    folder = run.checkpoint(step, grown)
    folder.rename(folder.with_name(f"{folder.name}{DAMAGED}{time.time_ns()}"))


def _imported(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face folder under the decoder's names."""
    from motet.models.hf import from_hf

    return from_hf(Path(folder))[1]
