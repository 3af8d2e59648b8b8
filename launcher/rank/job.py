"""Puts one attempt together on one rank: the model, its data, and the newest good checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

import motet
from motet.core.errors import UserError
from motet.core.files import read_json
from motet.experiments.design.study import read_definition
from motet.experiments.stream.ledger import LedgerWriter, open_segment
from motet.launcher.config import load as settings_io
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.device import choose_precision, memory_meter, peak_flops
from motet.launcher.rank.feed import Feed
from motet.launcher.rank.loop import Job, load
from motet.launcher.rank.probing import ProbeSet
from motet.launcher.rank.progress import Progress
from motet.launcher.rank.stop import Judge, StopRequest
from motet.launcher.rank.wandb_mirror import open_mirror
from motet.launcher.runs.blame import Sign
from motet.launcher.runs.manifest import check_frozen, open_stream
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, agree_any, tell_all


def build_job(
    run: RunDir,
    settings: RunSettings,
    attempt: int,
    world: World,
    layout: Layout,
    stop: StopRequest,
    manifest: dict[str, Any],
    sign: Sign,
) -> tuple[Job, int]:
    """Put an attempt together and load the newest good checkpoint; return the job and its first
    step.
    """
    _, definition_sha256 = read_definition(run.plan)
    _, plan = check_frozen(run, settings)
    steps = settings.batch_steps
    stream = open_stream(settings, plan)
    model = ModelConfig(**manifest["model"])
    training = settings.training
    precision = _begun_precision(run, world) or choose_precision(training.precision, world.device)
    precision = (
        "fp32" if agree_any(precision == "fp32", world) else precision
    )  # the slowest decides
    if world.device.type == "cuda":
        torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
    engine = build_engine(model, engine_options(settings, precision), layout, world)
    checkpoints = Checkpoints(
        run,
        world,
        settings.checkpoint.keep,
        settings.checkpoint.keep_every_steps,
        settings.checkpoint.async_,
    )
    judge = Judge(training.bad_steps)
    hashes = {
        "definition_sha256": definition_sha256,
        "plan_sha256": plan.sha256,
    }
    mirror = open_mirror(run, settings_io.public(settings), world.rank, hashes)
    metrics = MetricsWriter(run, settings_io.public(settings), world.rank, mirror)
    step, parent, loaded = _load_newest(run, engine, checkpoints, metrics, world, hashes)
    if loaded:
        judge.restore(loaded["judge"])
    elif settings.model.from_hf:
        engine.load_model(_imported(settings.model.from_hf))
    opened = None
    if world.rank == 0:
        opened = open_segment(
            run.ledger, parent, attempt, step, world.size, (plan.sha256, definition_sha256)
        )
    segment = tell_all(opened, world)
    assert segment is not None
    job = Job(
        settings=settings,
        run=run,
        world=world,
        layout=layout,
        engine=engine,
        steps=steps,
        feed=Feed(stream, steps, layout, world.rank),
        probes=ProbeSet.of_run(run, settings),
        checkpoints=checkpoints,
        metrics=metrics,
        mirror=mirror,
        progress=Progress(settings.steps, step, world.rank, log=run.first_rank_log(attempt)),
        stop=stop,
        sign=sign,
        judge=judge,
        segment=segment,
        ledger=LedgerWriter(run.ledger, segment.segment, world.rank),
        facts={
            **hashes,
            "model": manifest["model"],
            "motet_version": motet.__version__,
            "precision": precision,
        },
        peak_lr=training.optimizer.learning_rate(manifest["parameters_non_embedding"]),
        flops_per_token=manifest["flops_per_token"],
        peak_flops=peak_flops(world.device),
        memory_mib=memory_meter(world.device),
    )
    return job, step


def _begun_precision(run: RunDir, world: World) -> str | None:
    """Return the precision that the newest checkpoint was trained with: "auto" is decided once for
    a run.
    """
    found = None
    for step in run.checkpoint_steps() if world.rank == 0 else []:
        with contextlib.suppress(
            UserError, KeyError
        ):  # a damaged one is dealt with when it is loaded
            found = str(read_json(run.checkpoint(step) / "manifest.json")["precision"])
    return tell_all(found, world)


def engine_options(settings: RunSettings, precision: str) -> EngineOptions:
    """Return what the engine needs of the settings."""
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
        seed=settings.seed,
        zero_stage=settings.layout.zero_stage,
        offload=settings.layout.offload,
        deepspeed=settings.layout.deepspeed,
    )


def _load_newest(
    run: RunDir,
    engine: Engine,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    world: World,
    hashes: dict[str, str],
) -> tuple[int, int, dict[str, Any] | None]:
    """Load the newest undamaged checkpoint; return (step, segment, its manifest), (0, 0, None) when
    there is none.

    Raises:
        UserError: there are checkpoints, and all are damaged: nothing is trained over them.
    """
    known = tell_all(run.checkpoint_steps(), world)
    complaints = []
    for step in reversed(known):
        try:
            manifest = load(checkpoints, engine, step, hashes)
            return step, manifest["segment"], manifest
        except UserError as error:
            complaints.append(str(error))
            metrics.log("event", step, event="damaged_checkpoint", why=str(error))
            if world.rank == 0:
                print(f"motet: {error}; trying the one before", file=sys.stderr)
                set_aside(run, step)
    if complaints:
        raise UserError("no checkpoint of this run can be used:\n" + "\n".join(complaints))
    return 0, 0, None


def set_aside(run: RunDir, step: int) -> None:
    """Rename a checkpoint that cannot be used: retention must not count it among the newest."""
    folder = run.checkpoint(step)
    folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def _imported(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face folder under the decoder's names."""
    from motet.models.hf import from_hf

    return from_hf(Path(folder))[1]
