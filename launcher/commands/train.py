"""`motet train` and `motet resume`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import read_json
from motet.launcher.commands import common
from motet.launcher.config import load as config
from motet.launcher.config.batch import world_size
from motet.launcher.config.checks import deepspeed_settings
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.command import (
    ONE_NODE,
    NodePlace,
    attempt_command,
    launch_environment,
    shell_text,
)
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from motet.experiments.design.study import Study

# What may differ when a run goes on. Everything else decides its tokens, its updates or its
# questions.
RESUMABLE = (
    r"layout\..*",
    r"metrics\..*",
    r"checkpoint\..*",
    r"probes\.batch_tokens",
    r"data\.verify",
    r"data\.corpora\.\d+\.path",
    r"training\.(steps|tokens|compile)",
    r"training\.bad_steps\..*",
    r"training\.max_restarts",
    r"slurm\..*",
)


def run(arguments: argparse.Namespace) -> int:
    """Train from the start."""
    nodes = asked_nodes(arguments)
    if nodes.count == 1:
        settings = common.load_settings(arguments)
    else:
        settings = config.load(
            common.run_yaml(arguments), arguments.settings, world=lambda s: ranks_on(s, nodes)
        )
    text = Path(arguments.run_yaml).read_text(encoding="utf-8")
    text = common.yaml_with_overrides(text, arguments.settings)
    return start(settings, text, arguments.dry_run, nodes)


def ranks_on(settings: RunSettings, nodes: NodePlace) -> int:
    """Return the processes of all machines: of slurm.groups where they are as many, else as many on
    each as here.
    """
    if settings.slurm.groups and sum(group.nodes for group in settings.slurm.groups) == nodes.count:
        return world_size(settings)
    return settings.layout.processes * nodes.count


def start(settings: RunSettings, yaml_text: str, dry_run: bool, nodes: NodePlace = ONE_NODE) -> int:
    """Check everything that can be checked before the first process starts; then train."""
    rundir = RunDir(Path(settings.runs) / settings.name)
    if dry_run:
        print_dry_run(settings, rundir, nodes)
        return 0
    if nodes.rank == 0:
        refuse_existing(settings, rundir)
    from motet.launcher.launch.local import train, train_together

    if nodes.count > 1:
        return train_together(settings, rundir, nodes, yaml_text=yaml_text, resume=False)
    return train(settings, rundir, yaml_text=yaml_text, resume=False)


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


def resume(arguments: argparse.Namespace) -> int:
    """Go on from the last checkpoint, perhaps on other processes, perhaps for longer."""
    rundir = common.open_run(arguments.run)
    if read_json(rundir.manifest).get("guest"):
        raise UserError(
            f"{rundir.root} is trained by your own loop; start its script again, with "
            "motet.Guest(..., resume=True)"
        )
    nodes = asked_nodes(arguments)
    before = config.load(rundir.resolved_yaml)
    overrides = [f"runs={rundir.root.parent}", *_length_override(before, arguments.settings)]
    overrides = [*_engine_override(before, arguments.settings), *overrides]
    settings = config.load(rundir.resolved_yaml, overrides)
    on_slurm = rundir.slurm_jobs.exists()
    ranks = world_size(settings) if on_slurm else settings.layout.processes * nodes.count
    raise_problems(frozen_problems(before, settings) or _layout_problems(settings, rundir, ranks))
    text = common.yaml_with_overrides(rundir.run_yaml.read_text("utf-8"), arguments.settings)
    if on_slurm:
        from motet.launcher.commands import submit

        return submit.resume(rundir, settings, text, dry_run=arguments.dry_run)
    if arguments.dry_run:
        print_command(settings, rundir, nodes)
        _check_asked_device(settings)
        steps = rundir.checkpoint_steps()
        common.print_facts([("goes on from", f"step {steps[-1]:,}" if steps else "the start")])
        return 0
    from motet.launcher.launch.local import train, train_together

    if nodes.count > 1:
        return train_together(settings, rundir, nodes, yaml_text=text, resume=True)
    return train(settings, rundir, yaml_text=text, resume=True)


def _layout_problems(settings: RunSettings, rundir: RunDir, ranks: int) -> list[Problem]:
    """What a begun run finds wrong with its layout on so many ranks; the manifest knows the model."""
    from motet.launcher.config.checks import deepspeed_library_problems, layout_problems
    from motet.models.config import ModelConfig

    model = ModelConfig(**read_json(rundir.manifest)["model"])
    found = layout_problems(settings, ranks, model)
    return found or deepspeed_library_problems(settings)


def _engine_override(before: RunSettings, overrides: list[str]) -> list[str]:
    """Under another engine, what was said to the one before is forgotten, unless it is said again."""
    asked = [o.partition("=")[2] for o in overrides if o.startswith("layout.engine=")]
    if not asked or asked[-1] == before.layout.engine:
        return []
    return [
        "layout.zero_stage=2",
        "layout.offload=none",
        "layout.deepspeed={}",
        "layout.accelerate_config=null",
    ]


def _length_override(before: RunSettings, overrides: list[str]) -> list[str]:
    """Giving the length in the other unit replaces it."""
    names = {override.partition("=")[0] for override in overrides}
    extra = []
    if "training.tokens" in names and before.training.steps is not None:
        extra.append("training.steps=null")
    if "training.steps" in names and before.training.tokens is not None:
        extra.append("training.tokens=null")
    return [*extra, *overrides]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> scalar."""
    if isinstance(value, Mapping | list) and value:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        out: dict[str, Any] = {}
        for key, child in pairs:
            out |= flat(child, f"{path}.{key}" if path else str(key))
        return out
    return {path: value}


def differences(before: RunSettings, after: RunSettings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: path -> (before, after). Where the folders lie does not count."""
    old, new = (flat(config.public(one, whole=True)) for one in (before, after))
    return {
        path: (old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and path != "runs"
    }


def frozen_problems(before: RunSettings, after: RunSettings) -> list[Problem]:
    """Settings that may not change in the middle of a run; it may become longer, not shorter."""
    shorter = [
        Problem(
            "training.steps",
            f"{after.steps:,} steps are fewer than the {before.steps:,} that the plan was made "
            "for; a run can only be extended",
        )
    ]
    return [
        Problem(
            path,
            f"is {common.cell(old)} in this run and cannot become {common.cell(new)} when it goes "
            "on; "
            "start another run for that",
        )
        for path, (old, new) in differences(before, after).items()
        if not any(re.fullmatch(pattern, path) for pattern in RESUMABLE)
    ] + (shorter if after.steps < before.steps else [])


def refuse_existing(settings: RunSettings, rundir: RunDir) -> None:
    """Never train over another run: `UserError` that says what is there and what would work."""
    if not rundir.resolved_yaml.exists():
        if rundir.root.is_dir() and any(rundir.root.iterdir()):
            raise UserError(f"name: {rundir.root} exists and is no run; choose another name=...")
        return
    try:
        changed = differences(config.load(rundir.resolved_yaml), settings)
    except UserError:
        changed = {"resolved.yaml": ("settings of another version", "these")}
    state = "is finished" if rundir.done.exists() else "exists"
    if not changed:
        advice = f"`motet report {_shown(rundir)}`" if rundir.done.exists() else ""
        advice = advice or f"`motet resume {_shown(rundir)}` goes on with it"
        raise UserError(f"name: the run {rundir.root} {state}, with these settings; {advice}")
    shown = [f"{p}: {common.cell(a)} there, {common.cell(b)} here" for p, (a, b) in changed.items()]
    more = f"\n  and {len(shown) - 8} more" if len(shown) > 8 else ""
    raise UserError(
        f"name: the run {rundir.root} {state}, with other settings; choose another name=...\n  "
        + "\n  ".join(shown[:8])
        + more
    )


def _shown(rundir: RunDir) -> str:
    relative = os.path.relpath(rundir.root)
    return str(rundir.root) if relative.startswith("..") else relative


def print_dry_run(settings: RunSettings, rundir: RunDir, nodes: NodePlace = ONE_NODE) -> None:
    """What `print_command` prints, every problem of the experiments, and how much room they take."""
    from motet.launcher.launch.local import check_layout
    from motet.launcher.study.build import build, check

    print_command(settings, rundir, nodes)
    raise_problems(check(settings))
    check_layout(settings, ranks_on(settings, nodes))
    _check_asked_device(settings)
    common.print_facts(_plan_facts(build(settings)))


def _check_asked_device(settings: RunSettings) -> None:
    """Refuse GPUs that were asked for and are not here; `auto` would import torch only to find what
    is.
    """
    if settings.layout.device == "cuda":
        from motet.launcher.launch.local import check_devices

        check_devices(settings)


def print_command(settings: RunSettings, rundir: RunDir, nodes: NodePlace = ONE_NODE) -> None:
    """The settings, the command and the facts of a run: valid YAML, with the rest as comments."""
    print(config.to_yaml(settings), end="")
    attempt = rundir.latest_attempt() + 1
    cores = len(os.sched_getaffinity(0))
    environment = launch_environment(settings, rundir, {}, cores, attempt, nodes)
    terminal = sys.stdout.isatty() and nodes.rank == 0
    command = attempt_command(settings, rundir, attempt, nodes, terminal)
    print(f"\n# {shell_text(command, environment)}")
    if settings.layout.engine == "deepspeed":
        shown = json.dumps(deepspeed_settings(settings), indent=2).replace("\n", "\n# ")
        print(f"# DeepSpeed's configuration: {shown}")
    common.print_facts(common.run_facts(settings))


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
