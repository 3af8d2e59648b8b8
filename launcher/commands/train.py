"""`motet train`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config import run_yaml
from motet.launcher.config.checks import deepspeed_settings
from motet.launcher.config.layout import names_layouts
from motet.launcher.config.sections import RunSettings
from motet.launcher.follow.state import shown as shown_path
from motet.launcher.jobs import schedulers
from motet.launcher.launch.command import (
    ONE_NODE,
    NodePlace,
    attempt_command,
    launch_environment,
    shell_text,
)
from motet.launcher.output import terminal
from motet.launcher.planning import run_facts
from motet.launcher.runs.begun import refuse_existing, yaml_with_overrides
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from motet.experiments.design.study import Study


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, and the machines that train together."""
    options.dry_run(parser)
    options.grid(parser)
    options.run_yaml(parser)
    options.nodes(parser)
    options.verify(parser)
    options.preregistered(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train from the start."""
    options.hold_to(arguments)
    if arguments.grid:
        raise UserError(
            f"--grid {arguments.grid[0]}: `motet train` trains one run; `motet submit` makes a job "
            "of each, and a loop of the shell trains one after the other: for v in ...; do motet "
            "train RUN.yaml name=NAME-$v SETTING=$v; done"
        )
    nodes = asked_nodes(arguments)
    if nodes.count == 1:
        settings = common.load_settings(arguments)
    else:
        settings = run_yaml.load(
            common.run_yaml(arguments), arguments.settings, world=lambda s: ranks_on(s, nodes)
        )
    text = Path(arguments.run_yaml).read_text(encoding="utf-8")
    text = yaml_with_overrides(text, arguments.settings)
    if arguments.verify == "full" and not arguments.dry_run:
        from motet.launcher.launch.local import verify_corpora

        verify_corpora(settings, full=True)
    return start(settings, text, arguments.dry_run, nodes)


def ranks_on(settings: RunSettings, nodes: NodePlace) -> int:
    """Return the processes of all machines: of the job that the run asks for where its nodes are as
    many, else as many on each as here.
    """
    asked, processes = schedulers.size_of(settings)
    if asked == nodes.count:
        return processes
    return settings.layout.processes * nodes.count


def start(settings: RunSettings, yaml_text: str, dry_run: bool, nodes: NodePlace = ONE_NODE) -> int:
    """Check everything that can be checked before the first process starts; then train."""
    rundir = RunDir(Path(settings.runs) / settings.name)
    if dry_run:
        print_dry_run(settings, rundir, nodes)
        return 0
    if nodes.rank == 0:
        refuse_existing(settings, rundir)
    announce(settings, rundir, nodes)
    from motet.launcher.launch.local import train, train_together

    also = schedulers.recorded()
    if nodes.count > 1:
        code = train_together(
            settings, rundir, nodes, yaml_text=yaml_text, resume=False, recorded=also
        )
    else:
        code = train(settings, rundir, yaml_text=yaml_text, resume=False, recorded=also)
    return common.ended(rundir, code, nodes.rank)


def announce(settings: RunSettings, rundir: RunDir, nodes: NodePlace = ONE_NODE) -> None:
    """Say what starts, where, and how to watch it, before anything that takes time."""
    layout, shown = settings.layout, shown_path(rundir.root)
    where = f"{layout.processes} process{'es' if layout.processes > 1 else ''} ({layout.device})"
    if names_layouts(settings.family.options):
        where += " in the last stage"
    if nodes.count > 1:
        where += f" of machine {nodes.rank} of {nodes.count}"
    print(
        f"motet: {settings.name}: {settings.steps:,} steps on {where}, in {shown}; "
        f"motet status {shown} and motet logs {shown} -f show it",
        flush=True,
    )


def asked_nodes(arguments: argparse.Namespace) -> NodePlace:
    """The machines of --nnodes, --node-rank and --endpoint.

    Raises:
        UserError: they contradict each other.
    """
    count, rank, endpoint = arguments.nnodes, arguments.node_rank, arguments.endpoint
    if count < 1 or not 0 <= rank < count:
        last = max(0, count - 1)
        raise UserError(
            f"--nnodes {count} --node-rank {rank}: at least 1 machine, numbered from 0 to {last}"
        )
    if count == 1:
        if endpoint:
            raise UserError(f"--endpoint {endpoint} is for several machines; give --nnodes as well")
        return ONE_NODE
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) < 1 << 16:
        raise UserError(
            f"--nnodes {count} needs --endpoint HOST:PORT of machine 0, such as "
            f"{endpoint or 'head'}:29400"
            if not host
            else f"--endpoint {endpoint}: {port!r} is no port from 1 to 65535"
        )
    return NodePlace(count, rank, endpoint)


def print_dry_run(settings: RunSettings, rundir: RunDir, nodes: NodePlace = ONE_NODE) -> None:
    """What `print_command` prints, every problem of the experiments, and how much room they
    take.
    """
    from motet.launcher.study.before_training import build, check

    print_command(settings, rundir, nodes)
    raise_problems(check(settings))
    # These import torch, which is not needed to say what is wrong in experiments.
    from motet.launcher.launch.local import check_layout
    from motet.launcher.runs.described_model import check_weights

    check_layout(settings, ranks_on(settings, nodes), alone=nodes.count == 1)
    check_weights(settings, values=False)
    check_asked_device(settings)
    terminal.print_facts(_plan_facts(build(settings)))


def check_asked_device(settings: RunSettings) -> None:
    """Refuse GPUs that were asked for and are not here; `auto` would import torch only to find what
    is.
    """
    if settings.layout.device == "cuda":
        from motet.launcher.launch.local import check_devices

        check_devices(settings)


def print_command(settings: RunSettings, rundir: RunDir, nodes: NodePlace = ONE_NODE) -> None:
    """The settings, the command and the facts of a run: valid YAML, with the rest as comments."""
    print(run_yaml.to_yaml(settings), end="")
    attempt = rundir.latest_attempt() + 1
    cores = len(os.sched_getaffinity(0))
    own = _begins(settings, rundir)
    environment = launch_environment(own, rundir, {}, cores, attempt, nodes)
    live = sys.stdout.isatty() and nodes.rank == 0
    command = attempt_command(own, rundir, attempt, nodes, live)
    print(f"\n# {shell_text(command, environment)}")
    if settings.layout.engine == "deepspeed":
        shown = json.dumps(deepspeed_settings(settings), indent=2).replace("\n", "\n# ")
        print(f"# DeepSpeed's configuration: {shown}")
    terminal.print_facts(run_facts.run_facts(settings))


def _begins(settings: RunSettings, rundir: RunDir) -> RunSettings:
    """The settings of the stage that comes next, where stages have layouts of their own."""
    if not names_layouts(settings.family.options):
        return settings
    from motet.launcher.runs.stage_layouts import beginning, stage_settings

    if rundir.manifest.exists():
        return beginning(settings, rundir)[0]
    from motet.launcher.launch.local import model_of

    stages = stage_settings(settings, lambda: model_of(settings)[0], None)
    return next(iter(stages.values()), settings)


def _plan_facts(study: Study) -> list[tuple[str, str]]:
    """How much of the run the exposures take, in all and per experiment."""
    plan, setting = study.plan, study.setting
    length = plan.texts.lengths()[plan.rows.text]
    total = setting.steps.slots_before(setting.steps_total) * setting.sequence_length
    facts = [("exposures", _share(len(length), int(length.sum()), total))]
    for number, question in enumerate(study.questions):
        mine = length[plan.rows.experiment == number]
        shown = _share(len(mine), int(mine.sum()), total)
        facts.append((f"  {question.name}", f"{shown}, {len(question.units):,} units"))
    return facts


def _share(exposures: int, tokens: int, total: int) -> str:
    return f"{exposures:,} = {tokens:,} tokens ({tokens / total:.2%} of the run)"
