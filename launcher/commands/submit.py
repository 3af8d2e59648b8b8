"""`motet submit`: a run as a batch job, and what it will ask for and hold at most."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from motet.core.errors import UserError
from motet.core.jobs import NodeGroup
from motet.launcher.commands import common, options
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import schedulers, submission
from motet.launcher.jobs.node import with_processes
from motet.launcher.jobs.scheduler import JobRequest
from motet.launcher.output import terminal
from motet.launcher.planning import run_facts
from motet.launcher.runs.begun import refuse_existing, yaml_with_overrides
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from motet.models.config import ModelConfig

GIB = 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml."""
    options.dry_run(parser)
    options.preregistered(parser)
    options.grid(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Submit a run.yaml, or print what would be submitted."""
    options.hold_to(arguments)
    if arguments.grid:
        from motet.launcher.commands import submit_grid

        return submit_grid.run(arguments, print_dry_run)
    path = common.run_yaml(arguments)
    world_size = schedulers.world_size
    settings = run_yaml.load(path, arguments.settings, world=world_size)
    scheduler = schedulers.of_settings(settings)
    request = scheduler.request(settings)
    words = [submission.of_seed(settings, request, seed) for seed in request.seeds]
    each = [run_yaml.load(path, [*arguments.settings, *w], world=world_size) for w in words]
    whole = settings if each else None
    made = submission.submission(each or [settings], scheduler, whole)
    for one, rundir in zip(made.settings, made.rundirs, strict=True):
        refuse_existing(one, rundir)
    submission.check(made)
    if arguments.dry_run:
        print_dry_run(made)
        return 0
    text = yaml_with_overrides(path.read_text(encoding="utf-8"), arguments.settings)
    say_submitted(made, submission.submit(made, text))
    return 0


def resume(rundir: RunDir, settings: RunSettings, yaml_text: str, *, dry_run: bool) -> int:
    """Submit a run again that has left its scheduler."""
    if rundir.finished(settings.steps):
        print(f"{rundir.root} is finished: {settings.steps:,} steps; `motet report {rundir.root}`")
        return 0
    scheduler = schedulers.of_run(rundir, settings.scheduler)
    request = scheduler.request(settings)
    if request.seeds:
        raise UserError(
            f"{request.section}.array: {list(request.seeds)} makes new runs out of a run.yaml; "
            f"leave it out to go on with {rundir.name}"
        )
    made = submission.submission([settings], scheduler)
    if dry_run:
        print_dry_run(made)
        return 0
    say_submitted(made, submission.resubmit(made, yaml_text))
    return 0


def say_submitted(made: submission.Submission, ids: Sequence[str]) -> None:
    """Print the job ids, first alone on its line, and what to type next."""
    shown = made.rundirs[0].root
    print(*ids, sep="\n")
    print(f"submitted; `motet status {shown}` and `motet logs -f {shown}` follow it")


def print_dry_run(made: submission.Submission) -> None:
    """The script, the run that it starts, the most it can cost, and what the scheduler says."""
    from motet.launcher.launch.local import model_of

    print(made.script)
    settings = made.settings[0]
    model = model_of(settings)[0]
    terminal.print_facts(
        [
            *run_lines(settings, made.request),
            *([("runs", ", ".join(r.name for r in made.rundirs))] if made.request.seeds else []),
            *memory_lines(settings, model, made.request),
            *time_lines(settings, model, made.request),
            *cost_lines(made.request, len(made.settings)),
        ]
    )
    terminal.print_facts([(made.scheduler.name.lower(), submission.asked_of(made))])


def run_lines(settings: RunSettings, request: JobRequest) -> list[tuple[str, str]]:
    """What the run will be, on all nodes of all groups."""
    world = request.world_size
    facts = dict(run_facts.run_facts(with_processes(settings, world)))
    shown = " + ".join(_nodes_of(group) for group in request.groups)
    facts["processes"] = f"{world:,} ({settings.layout.device}) = {shown}"
    return list(facts.items())


def _nodes_of(group: NodeGroup) -> str:
    where = f" of {group.partition}" if group.partition else ""
    return f"{group.nodes} {'node' if group.nodes == 1 else 'nodes'}{where} x {group.processes}"


def memory_lines(
    settings: RunSettings, model: ModelConfig, request: JobRequest
) -> list[tuple[str, str]]:
    """What the fullest rank must hold."""
    from motet.models import counts
    from motet.parallel.layout.rules import micro_batches
    from motet.parallel.layout.weights import held_bytes, kept_bytes

    layout = settings.layout_for(request.world_size)
    if layout.engine != "native":
        return [("memory per rank", f"not estimated for {layout.engine}")]
    number = max(micro_batches(layout, settings.batch.sequences))
    states = [
        sum(held_bytes(model, layout, stage).values())
        + sum(kept_bytes(model, layout, number, stage).values())
        for stage in range(layout.pp)
    ]
    length = settings.data.sequence_length // layout.cp
    width = 4 if settings.training.precision == "fp32" else 2
    whole = counts.activation_bytes(
        model, length, layout.micro_sequences, width, layout.recompute == "full"
    )
    state, activations = max(states) / GIB, whole / layout.tp / GIB
    # The first of P stages has P micro-batches under way, each with a P-th of the layers.
    return [
        (
            "memory per rank",
            f"{state:.3g} GiB for weights, gradients and optimizer on the fullest rank, about "
            f"{activations:.2g} GiB of activations",
        )
    ]


def cost_lines(request: JobRequest, runs: int) -> list[tuple[str, str]]:
    """The most that is asked for: nothing costs more than that."""
    nodes, section = request.nodes, request.section
    gpus = sum(group.nodes * group.gpus for group in request.groups)
    jobs = runs * request.chain
    if request.limit_s is None:
        unlimited = f"{section}.time is empty: the partition's limit is the most it can take"
        return [("cost", unlimited)]
    hours = request.limit_s / 3600
    each = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {hours:.4g} h" + (
        f" x {jobs} jobs" if jobs > 1 else ""
    )
    most = f"at most {nodes * hours * jobs:,.4g} node-hours ({each})"
    if gpus:
        most += f", {gpus * hours * jobs:,.4g} GPU-hours"
    if request.requeue != "never" and request.max_requeues:
        most += "; as much again for each requeue, of which there are at most "
        most += f"{request.max_requeues}"
    return [("cost", most)]


def time_lines(
    settings: RunSettings, model: ModelConfig, request: JobRequest
) -> list[tuple[str, str]]:
    """How long the run takes, and whether it fits, by the cost model."""
    from motet.launcher.jobs.forecast import forecast

    world, groups = request.world_size, request.groups
    return forecast(settings, model, world, groups, request.limit_s, request.section)
