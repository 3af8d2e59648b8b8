"""One attempt of a run, from the user's terminal: freeze, start torchrun, pass on a stop, say how
it ended.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import motet
from motet.core.access import follow
from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import atomic_write, write_json
from motet.core.plugins import is_reference
from motet.launcher.config import run_yaml
from motet.launcher.config.checks import (
    deepspeed_library_problems,
    device_problems,
    layout_problems,
)
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.agent import OTHER_RANKS, run_agent
from motet.launcher.launch.alone import found_here
from motet.launcher.launch.command import (
    ONE_NODE,
    NodePlace,
    attempt_command,
    launch_environment,
    recorded_environment,
)
from motet.launcher.launch.holding import only_one
from motet.launcher.launch.in_turn import in_turn
from motet.launcher.launch.joining import ask_to_join, gather
from motet.launcher.launch.start_watch import StartWatch
from motet.launcher.runs import snapshot
from motet.launcher.runs.attempts import refusal
from motet.launcher.runs.blame import blame
from motet.launcher.runs.described_model import check_weights, imported_model
from motet.launcher.runs.families import draws_of, new_family, new_members
from motet.launcher.runs.manifest import (
    corpus_problems,
    data_facts,
    open_corpora,
    training_sources,
    validation_streams,
)
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import seal_frozen
from motet.launcher.runs.stage_layouts import checked_layouts, family_of, stage_settings
from motet.launcher.study import before_training, cautions, contamination
from motet.launcher.study.preregistration import check_registered, keep_registered
from motet.models import counts
from motet.models.config import ModelConfig, preset


def train(
    settings: RunSettings,
    rundir: RunDir,
    *,
    yaml_text: str,
    resume: bool,
    recorded: Sequence[str] = (),
) -> int:
    """Freeze a new run or go on with an old one, train it here, and return the exit code.

    Args:
        settings: checked.
        rundir: where; for a new run its folder must not hold one.
        yaml_text: the user's file, kept as it is.
        resume: go on from the newest checkpoint.
        recorded: what begins further names of variables that are kept with the attempt.
    """
    if resume and rundir.finished(settings.steps):
        print(
            f"{rundir.root} is finished: {settings.steps:,} steps; `motet report {rundir.root}` "
            "shows it"
        )
        return 0
    check_devices(settings, rundir if resume else None)
    verify_corpora(settings)
    if not resume:
        check_layout(settings)
        check_weights(settings)
        prepare_run(settings, rundir, yaml_text)
    with only_one(rundir) as held:
        start = partial(launch, settings, rundir, held=held, recorded=recorded)
        return in_turn(settings, rundir, start)


def train_together(
    settings: RunSettings,
    rundir: RunDir,
    nodes: NodePlace,
    *,
    yaml_text: str,
    resume: bool,
    recorded: Sequence[str] = (),
) -> int:
    """As `train`, as one of several machines; the first one makes the run and holds it."""
    check_devices(settings)
    verify_corpora(settings)
    if nodes.rank:
        attempt, among = ask_to_join(rundir, settings, nodes)
        return launch(settings, rundir, attempt, nodes=among)
    if resume and rundir.finished(settings.steps):
        raise UserError(f"{rundir.root} is finished: {settings.steps:,} steps")
    if not resume:
        raise_problems(deepspeed_library_problems(settings))
        check_weights(settings)
        prepare_run(settings, rundir, yaml_text)
    with only_one(rundir) as held:
        attempt, among = gather(rundir, settings, nodes.count, nodes.endpoint)
        return launch(settings, rundir, attempt, held=held, nodes=among, recorded=recorded)


def launch(
    settings: RunSettings,
    rundir: RunDir,
    attempt: int,
    *,
    held: int = -1,
    nodes: NodePlace = ONE_NODE,
    recorded: Sequence[str] = (),
    own: RunSettings | None = None,
    stage: int | None = None,
) -> int:
    """Train here from an attempt that was claimed, and restart it when a rank dies; return the exit
    code.

    Args:
        held: file descriptor of the run's lock, -1 where another machine holds it.
        nodes: the machines, and which one this is.
        recorded: what begins further names of variables that are kept with the attempt.
        own, stage: settings and number of the stage that it begins with, where it has its own.
    """
    follow(rundir.root)
    own = own or settings
    cores = len(os.sched_getaffinity(0))
    terminal = sys.stdout.isatty() and nodes.rank == 0
    with found_here(nodes, rundir.meeting(attempt)) as place:
        environment = launch_environment(own, rundir, os.environ, cores, attempt, place)
        environment |= {} if stage is None else {"MOTET_STAGE": str(stage)}
        command = attempt_command(own, rundir, attempt, place, terminal)
        if nodes.rank == 0:
            record_launch(rundir, attempt, settings, command, environment, recorded)
        watch = StartWatch(rundir, attempt, settings.layout.timeout_s, nodes)
        meeting = Path(place.folder) if nodes.count > 1 else None
        first = nodes.rank == 0
        code = run_agent(
            command, environment, rundir, attempt, held, first, watch=watch, meeting=meeting
        )
    return _say_how_it_ended(rundir, attempt, code)


def record_launch(
    rundir: RunDir,
    attempt: int,
    settings: RunSettings,
    command: Sequence[str],
    environment: Mapping[str, str],
    recorded: Sequence[str] = (),
) -> None:
    """Write down what a launch begins with; its settings become the run's once ranks train."""
    run_yaml.store(rundir.launch_settings(attempt), settings)
    write_json(
        rundir.attempt(attempt) / "environment.json",
        {"command": list(command), "environment": recorded_environment(environment, recorded)},
        private=True,
    )


def check_layout(settings: RunSettings, ranks: int | None = None, alone: bool = True) -> None:
    """Refuse layouts that do not fit the models of a new run on so many ranks; None: the processes
    of this machine. `alone`: it is the only one, and no job.
    """
    processes = settings.layout.processes if ranks is None else ranks
    model = model_of(settings)[0]
    family = family_of(settings, model, None, {})
    facts = {} if layout_problems(settings, processes, model) else new_members(settings, model)
    checked_layouts(settings, facts, model, processes, family=family, alone=alone)
    if facts:
        draws_of(new_family(settings, model), settings, settings.layout_for(processes))
    raise_problems(deepspeed_library_problems(settings))


def check_devices(settings: RunSettings, run: RunDir | None = None) -> None:
    """Refuse devices that are not here, and a description of machines that cannot be read, before
    any process starts.

    Args:
        run: one that was made; None: it is not yet.
    """
    layout = settings.layout
    if layout.cluster:
        from motet.parallel.cluster.this_machine import read_cluster

        read_cluster(layout.cluster)
    if layout.device == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    raise_problems(device_problems(layout.device, layout.processes, gpus))
    for label, one in stage_settings(settings, lambda: model_of(settings)[0], run).items():
        found = device_problems(layout.device, one.layout.processes, gpus)
        raise_problems([Problem(f"stage {label}: {p.setting}", p.message) for p in found])


def verify_corpora(settings: RunSettings, full: bool = False) -> None:
    """Check the SHA-256 of every shard, naming each that is missing, cut short or altered; `full`:
    also of those whose size and times are as when they were hashed last.
    """
    if settings.data.verify:
        raise_problems(corpus_problems(settings, full=full))
    training_sources(settings)
    validation_streams(settings)


def prepare_run(
    settings: RunSettings,
    rundir: RunDir,
    yaml_text: str,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Make the run folder: plan and definition frozen and hashed, code copied, manifest written
    last. Then say what makes its answers weaker.

    A failure leaves no folder behind. `model` is what the manifest says of it, where Motet does not
    build it itself.
    """
    _plugins(settings)
    check_registered(settings)
    model = model_facts(settings) if model is None else model
    built = before_training.build(settings, must_answer=True)
    built = contamination.with_found(built, settings)
    warned = cautions.study_warnings(built, settings)
    existed = rundir.root.exists()
    try:
        rundir.create(settings.access)
        hashes = before_training.freeze_study(built, before_training.library_of(settings), rundir)
        cautions.keep(warned, rundir.plan)
        registered = keep_registered(settings, rundir)
        snapshot.take(rundir)
        atomic_write(rundir.run_yaml, yaml_text)
        frozen = manifest(settings, model, hashes.definition_sha256, hashes.plan_sha256)
        frozen |= _plugins(settings, rundir)
        write_json(rundir.manifest, frozen | {"frozen_sha256": seal_frozen(rundir)})
        run_yaml.store(rundir.resolved_yaml, settings)
    except BaseException:
        if not existed:
            shutil.rmtree(rundir.root, ignore_errors=True)
        raise
    for warning in (*corpus_cautions(settings), *warned, *registered):
        print(f"motet: warning: {warning}", file=sys.stderr)


def corpus_cautions(settings: RunSettings) -> list[str]:
    """What seemed odd when the corpora were made: said again where it begins to matter."""
    return [
        f"{corpus.path}: {caution}"
        for corpus in open_corpora(settings)
        for caution in corpus.cautions
    ]


def _plugins(settings: RunSettings, rundir: RunDir | None = None) -> dict[str, Any]:
    """Check the classes of the user's own that a run names, or keep them in its folder and return
    what its manifest says of them.
    """
    if not settings.training.hooks and not is_reference(settings.family.kind):
        return {}
    from motet.launcher.rank import plugins  # brings torch, for which few runs need to wait here

    if rundir is not None:
        return plugins.keep_plugins(settings, rundir)
    plugins.check_plugins(settings)
    return {}


def model_of(settings: RunSettings) -> tuple[ModelConfig, bool]:
    """Return the model's sizes, and whether its weights are imported (`check_weights`)."""
    if settings.model.from_hf:
        return imported_model(settings), True
    overrides = settings.model.overrides()
    size = overrides.pop("vocabulary_size", None)
    needed = open_corpora(settings)[0].vocabulary_size
    size = size or -(-needed // 64) * 64
    if size < needed:
        raise UserError(
            f"model.vocabulary_size={size:,} is smaller than the tokenizer's {needed:,}; leave it "
            "out, or raise it"
        )
    return preset(settings.model.preset, size, **overrides), False


def model_facts(settings: RunSettings) -> dict[str, Any]:
    """Return what the manifest says of the model that the settings describe."""
    model, imported = model_of(settings)
    return {
        "model": vars(model),
        "imported_weights": imported,
        "parameters": counts.parameters(model),
        "parameters_non_embedding": counts.parameters_non_embedding(model),
        "flops_per_token": counts.training_flops_per_token(model, settings.data.sequence_length),
        **new_members(settings, model),
    }


def manifest(
    settings: RunSettings,
    model: Mapping[str, Any],
    definition_sha256: str,
    plan_sha256: str,
) -> dict[str, Any]:
    """Return the frozen facts of a run."""
    length = settings.data.sequence_length
    return {
        "version": 1,
        "name": settings.name,
        "created": time.time(),
        "motet_version": motet.__version__,
        "definition_sha256": definition_sha256,
        "plan_sha256": plan_sha256,
        **model,
        "sequence_length": length,
        "tokens_per_step": settings.batch.sequences * length,
        "data": data_facts(settings),
        "corpora": [
            {
                "path": str(corpus.path),
                "fingerprint": corpus.fingerprint,
                "tokens": corpus.n_tokens,
                "documents": corpus.n_documents,
                "weight": entry.weight,
            }
            for corpus, entry in zip(open_corpora(settings), settings.data.corpora, strict=True)
        ],
        "config": run_yaml.public(settings),
    }


def _say_how_it_ended(rundir: RunDir, attempt: int, code: int) -> int:
    """Print the next command; return the exit code."""
    shown = _relative(rundir.root)
    if not rundir.manifest.exists():
        print(
            f"motet: {shown} was removed while the run was going on (it has no manifest.json any "
            "more), so there is nothing to go on from; start the run anew, or put the folder back "
            f"from a copy and `motet resume {shown}`",
            file=sys.stderr,
        )
        return code or 2
    last = rundir.latest_attempt()
    if code == 0 and rundir.done.exists():
        print(f"finished; `motet report {shown}` shows the answers")
        return 0
    steps = rundir.checkpoint_steps()
    at = f"the checkpoint after step {steps[-1]:,}" if steps else "the start"
    error = refusal(rundir, attempt)
    if code == OTHER_RANKS:
        print(f"a stage is over; other processes go on from {at}")
        return code
    if code == 0:
        print(f"stopped; to go on from {at}:\n  motet resume {shown}")
        return 0
    if error is not None:
        print(f"motet: {error.read_text().rstrip()}", file=sys.stderr)
    elif culprit := blame(rundir.attempt(last)):
        print(f"motet: {culprit}", file=sys.stderr)
    print(
        f"motet: attempt {last} failed (logs in {rundir.attempt(last)}); to go on from {at}:\n  "
        f"motet resume {shown}",
        file=sys.stderr,
    )
    return code


def _relative(path: Path) -> str:
    shown = os.path.relpath(path)
    return str(path) if shown.startswith("..") else shown
