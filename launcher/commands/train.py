"""`motet train` and `motet resume`."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.experiments.errors import Problem, UserError, raise_problems
from motet.launcher import config
from motet.launcher.checks import deepspeed_settings
from motet.launcher.command import attempt_command, launch_environment, shell_text
from motet.launcher.commands import common
from motet.launcher.rundir import RunDir, read_json
from motet.launcher.settings import RunSettings

if TYPE_CHECKING:
    from motet.experiments.study import Study

# What may differ when a run goes on. Everything else decides its tokens, its updates or its questions.
RESUMABLE = (
    r"layout\..*",
    r"metrics\..*",
    r"checkpoint\..*",
    r"probes\.batch_tokens",
    r"data\.verify",
    r"data\.corpora\.\d+\.path",
    r"training\.(steps|tokens|compile)",
    r"training\.bad_steps\..*",
)


def run(arguments: argparse.Namespace) -> int:
    """Train from the start."""
    settings = common.load_settings(arguments)
    text = Path(arguments.run_yaml).read_text(encoding="utf-8")
    return start(settings, common.yaml_with_overrides(text, arguments.settings), arguments.dry_run)


def start(settings: RunSettings, yaml_text: str, dry_run: bool) -> int:
    """Check everything that can be checked before the first process starts; then train."""
    rundir = RunDir(Path(settings.runs) / settings.name)
    if dry_run:
        print_dry_run(settings, rundir)
        return 0
    refuse_existing(settings, rundir)
    from motet.launcher.run import train

    return train(settings, rundir, yaml_text=yaml_text, resume=False)


def resume(arguments: argparse.Namespace) -> int:
    """Go on from the last checkpoint, perhaps on other processes, perhaps for longer."""
    rundir = common.open_run(arguments.run)
    if read_json(rundir.manifest).get("guest"):
        raise UserError(
            f"{rundir.root} is trained by your own loop; start its script again, with motet.Guest(..., resume=True)"
        )
    before = config.load(rundir.resolved_yaml)
    overrides = [f"runs={rundir.root.parent}", *_length_override(before, arguments.settings)]
    overrides = [*_engine_override(before, arguments.settings), *overrides]
    settings = config.load(rundir.resolved_yaml, overrides)
    raise_problems(frozen_problems(before, settings) or _layout_problems(settings, rundir))
    if arguments.dry_run:
        print_command(settings, rundir)
        _check_asked_device(settings)
        steps = rundir.checkpoint_steps()
        common.print_facts([("goes on from", f"step {steps[-1]:,}" if steps else "the start")])
        return 0
    from motet.launcher.run import train

    text = common.yaml_with_overrides(rundir.run_yaml.read_text("utf-8"), arguments.settings)
    return train(settings, rundir, yaml_text=text, resume=True)


def _layout_problems(settings: RunSettings, rundir: RunDir) -> list[Problem]:
    """What a begun run finds wrong with its layout now; the manifest knows the model."""
    from motet.launcher.checks import deepspeed_library_problems, layout_problems
    from motet.models.config import ModelConfig

    model = ModelConfig(**read_json(rundir.manifest)["model"])
    found = layout_problems(settings, settings.layout.processes, model)
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
    old, new = flat(config.public(before)), flat(config.public(after))
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
            f"{after.steps:,} steps are fewer than the {before.steps:,} that the plan was made for; a run can only be extended",
        )
    ]
    return [
        Problem(
            path,
            f"is {common.cell(old)} in this run and cannot become {common.cell(new)} when it goes on; "
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


def print_dry_run(settings: RunSettings, rundir: RunDir) -> None:
    """What `print_command` prints, every problem of the experiments, and how much room they take."""
    from motet.launcher.run import check_layout
    from motet.launcher.study import build, check

    print_command(settings, rundir)
    raise_problems(check(settings))
    check_layout(settings)
    _check_asked_device(settings)
    common.print_facts(_plan_facts(build(settings)))


def _check_asked_device(settings: RunSettings) -> None:
    """Refuse GPUs that were asked for and are not here; `auto` would import torch only to find what is."""
    if settings.layout.device == "cuda":
        from motet.launcher.run import check_devices

        check_devices(settings)


def print_command(settings: RunSettings, rundir: RunDir) -> None:
    """The settings, the command and the facts of a run: valid YAML, with the rest as comments."""
    print(config.to_yaml(settings), end="")
    attempt = rundir.latest_attempt() + 1
    cores = len(os.sched_getaffinity(0))
    environment = launch_environment(settings, rundir, {}, cores)
    print(f"\n# {shell_text(attempt_command(settings, rundir, attempt), environment)}")
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
