"""What `motet resume` does once it has said that it begins: it imports much, and checks much."""

from __future__ import annotations

import argparse
import sys

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import read_json, read_text
from motet.core.plugins import PluginError
from motet.launcher.commands import common, submit
from motet.launcher.commands.train import (
    announce,
    asked_nodes,
    check_asked_device,
    print_command,
)
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import schedulers
from motet.launcher.output import terminal
from motet.launcher.runs.attempts import give_up_damaged, refuse_start_over
from motet.launcher.runs.begun import differences, frozen_problems, yaml_with_overrides
from motet.launcher.runs.mending import mend
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.verify import EVIDENCE, TRAINED, inspect, refuse_damage
from motet.launcher.study.before_training import check_classes


def go_on(arguments: argparse.Namespace, rundir: RunDir) -> int:
    """Go on from the last checkpoint, perhaps on other processes, perhaps for longer."""
    for done in () if arguments.dry_run else mend(rundir):
        print(f"motet: mended: {done}", file=sys.stderr)
    sound(rundir)
    if read_json(rundir.manifest).get("guest"):
        raise UserError(
            f"{rundir.root} is trained by your own loop; start its script again, with "
            "motet.Guest(..., resume=True)"
        )
    nodes = asked_nodes(arguments)
    before = run_yaml.load(rundir.resolved_yaml)
    overrides = [f"runs={rundir.root.parent}", *_length_override(before, arguments.settings)]
    overrides = [*_engine_override(before, arguments.settings), *overrides]
    settings = run_yaml.load(rundir.resolved_yaml, overrides)
    ranks, submitted = settings.layout.processes * nodes.count, rundir.jobs_json.exists()
    if submitted:
        ranks = schedulers.of_run(rundir, settings.scheduler).size(settings)[1]
    alone = nodes.count == 1 and not submitted
    raise_problems(
        frozen_problems(before, settings) or _layout_problems(settings, rundir, ranks, alone)
    )
    text = yaml_with_overrides(read_text(rundir.run_yaml), arguments.settings)
    if arguments.from_start and not arguments.dry_run:
        give_up_damaged(rundir)
    if not arguments.from_start:
        refuse_start_over(rundir)
    if submitted:
        return submit.resume(rundir, settings, text, dry_run=arguments.dry_run)
    if arguments.dry_run:
        check_asked_device(settings)
        terminal.print_facts(next_facts(rundir, before, settings))
        print()
        print_command(settings, rundir, nodes)
        return 0
    announce(settings, rundir, nodes)
    from motet.launcher.launch.local import train, train_together, verify_corpora

    if arguments.verify == "full":
        verify_corpora(settings, full=True)
    also, over = schedulers.recorded(), rundir.finished(settings.steps)
    if nodes.count > 1:
        code = train_together(settings, rundir, nodes, yaml_text=text, resume=True, recorded=also)
    else:
        code = train(settings, rundir, yaml_text=text, resume=True, recorded=also)
    return code if over else common.ended(rundir, code, nodes.rank)


def next_facts(rundir: RunDir, before: RunSettings, settings: RunSettings) -> list[tuple[str, str]]:
    """What a person wants to know of the next attempt: where it begins and ends, and which settings
    are others than so far.
    """
    step, total = (rundir.checkpoint_steps() or [0])[-1], settings.steps
    left = "nothing is left to do" if step >= total else f"{total - step:,} steps are left"
    changed = [
        f"{path}: {terminal.cell(old)} becomes {terminal.cell(new)}"
        for path, (old, new) in differences(before, settings).items()
    ]
    return [
        ("goes on from", f"step {step:,}" if step else "the start"),
        ("ends at", f"step {total:,}; {left}"),
        ("as attempt", f"{rundir.latest_attempt() + 1:,}"),
        *(("changed", text) for text in changed or ["nothing"]),
    ]


def sound(rundir: RunDir) -> None:
    """Refuse a run whose training would not be what was frozen; say what else is damaged, which
    makes its answers weaker and stops nothing. A class of the user's own that is missing or changed
    comes first, by its setting, with what would work.
    """
    try:
        check_classes(rundir)
    except PluginError:
        raise
    except UserError:
        pass  # the plan itself: told below, with all else
    refuse_damage(rundir, TRAINED)
    for one in inspect(rundir, EVIDENCE).damage:
        print(f"motet: warning: damaged: {one}", file=sys.stderr)


def _layout_problems(
    settings: RunSettings, rundir: RunDir, ranks: int, alone: bool
) -> list[Problem]:
    """What a begun run finds wrong with its layouts on so many ranks; the manifest knows the model.
    `alone`: of this machine only, and of no job.
    """
    from motet.launcher.config.checks import deepspeed_library_problems, layout_problems
    from motet.launcher.runs.families import draws_begun, draws_of, open_family
    from motet.launcher.runs.stage_layouts import checked_layouts, family_of
    from motet.models.config import ModelConfig

    manifest = read_json(rundir.manifest)
    model = ModelConfig(**manifest["model"])
    if found := layout_problems(settings, ranks, model):
        return found
    checked_layouts(
        settings,
        manifest,
        model,
        ranks,
        family=family_of(settings, model, rundir, manifest),
        alone=alone,
        draws=draws_begun(rundir),
    )
    if manifest.get("members"):
        family, _ = open_family(rundir, settings, manifest)
        draws_of(family, settings, settings.layout_for(ranks), draws_begun(rundir))
    return deepspeed_library_problems(settings)


def _engine_override(before: RunSettings, overrides: list[str]) -> list[str]:
    """Under another engine, what was said to the one before is forgotten, unless it is said
    again.
    """
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
