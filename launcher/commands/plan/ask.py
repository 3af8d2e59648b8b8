"""`motet plan`: ranked layouts of a run.yaml on a cluster, with time, memory and cost; why others
are not there; what a budget allows.

It starts nothing, but with --probe: a short run of one of the layouts, which calibrates the
predictions.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.commands.plan import budget, told
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.models.family.base import WHOLE

if TYPE_CHECKING:
    from motet.launcher.planning.family_costs import PlannedFamily
    from motet.parallel.cluster.description import Cluster
    from motet.parallel.planner.question import PlanAnswer, PlanQuestion

HISTORY: tuple[str, ...] = ("run", "attempt", "devices", "layout", "predicted_s", "measured_s")
HISTORY += ("error", "predicted_gib", "measured_gib", "problem")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is planned, what is asked of it and what is written."""
    options.dry_run(parser)
    options.as_json(parser)
    parser.add_argument("--cluster", metavar="FILE", help="cluster.yaml (default: this machine)")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="layouts shown (default 8)")
    seconds = "end each search after so long: the best found, and by how much it may be beaten"
    parser.add_argument("--seconds", type=float, metavar="NUMBER", help=seconds)
    parser.add_argument("--why", metavar="DEGREES", help="why not, such as tp=4,pp=2; or all")
    parser.add_argument("--html", metavar="FILE", help="the pipeline's timeline, memory over time")
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="layout.yaml of the best layout that leaves a tenth of the memory free",
    )
    parser.add_argument("--pick", type=int, metavar="N", help="write this one instead")
    budget.arguments(parser)
    _measuring_arguments(parser)
    options.run_yaml(parser, required=False)


def _measuring_arguments(parser: argparse.ArgumentParser) -> None:
    probe = "train a layout for a minute (default: the one that tells most), calibrate, plan again"
    parser.add_argument("--probe", nargs="?", type=int, const=0, metavar="N", help=probe)
    history = "predicted and measured, by attempt"
    parser.add_argument("--history", nargs="?", const="runs", metavar="RUNS", help=history)
    runs = "fit constants to the runs in a folder"
    parser.add_argument("--calibrate", action="append", metavar="RUNS", help=runs)
    output = (
        "cluster.yaml with fitted constants (default: --probe calibrated.yaml, --calibrate prints)"
    )
    parser.add_argument("--output", metavar="FILE", help=output)
    parser.add_argument("--force", action="store_true", help="replace --output when it exists")


def run(arguments: argparse.Namespace) -> int:
    """Search, and tell what was found."""
    if arguments.history is not None:
        return _history(Path(arguments.history), arguments.json)
    _check(arguments)
    if arguments.calibrate:
        return _calibrate(arguments)
    if arguments.run_yaml is None:
        raise UserError("plan: give a RUN.yaml, or --history or --calibrate with folders of runs")
    settings = _settings(arguments)
    return _answer(arguments, settings, _question(arguments, settings))


def _history(runs: Path, as_json: bool) -> int:
    """Predicted and measured time and memory of every attempt of the runs in a folder."""
    from motet.launcher.planning.prediction import history

    rows = history(runs)
    if as_json:
        terminal.print_json({"attempts": rows})
        return 0
    columns = {name: name.replace("_", " ") for name in HISTORY}
    terminal.print_table([{name: row.get(name) for name in HISTORY} for row in rows], columns)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    """Fit constants to runs, and write the cluster that carries them, or print it."""
    from motet.launcher.planning.calibrate import calibrate
    from motet.parallel.cluster.file import read

    runs = [Path(folder) for folder in arguments.calibrate]
    cluster = None if arguments.cluster is None else read(Path(arguments.cluster))
    found, sentences = calibrate(runs, cluster)
    if arguments.output is None or arguments.dry_run:
        print(told.calibrated_text(arguments, found, sentences), end="")
        return 0
    told.write_calibrated(arguments, found, sentences)
    if arguments.json:
        terminal.print_json({"output": arguments.output, "cluster": found.to_mapping()})
    return 0


def _settings(arguments: argparse.Namespace) -> RunSettings:
    """The run's settings; what its layout says is what the search decides."""
    settings, found = run_yaml.inspect(common.run_yaml(arguments), arguments.settings)
    raise_problems([p for p in found if not p.setting.startswith(("layout", "batch.sequences"))])
    if settings is None:
        raise_problems(found)
    assert settings is not None, "there was a problem"
    return settings


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read."""
    for name in ("top", "pick"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is not at least 1")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UserError(f"--seconds: {arguments.seconds:g} is not a number above 0, such as 10")
    if arguments.probe is not None and arguments.probe < 0:
        raise UserError(f"--probe: {arguments.probe} is not the number of a layout")
    if arguments.probe is not None and arguments.json and not arguments.dry_run:
        raise UserError("--json: a probe prints what its run says; plan with its --output for JSON")
    if arguments.pick and not arguments.write:
        raise UserError("--pick chooses what --write FILE writes; give --write as well")
    if arguments.pick and arguments.pick > arguments.top:
        raise UserError(f"--pick {arguments.pick} is beyond --top {arguments.top}")
    calibrates = bool(arguments.calibrate) or arguments.probe is not None
    if arguments.output and not calibrates:
        raise UserError(
            "--output is where --calibrate or --probe write to; --write FILE is for layout.yaml"
        )
    if arguments.fastest and budget.limits(arguments) is None:
        raise UserError(
            "--fastest asks what a budget allows; give --budget, --budget-price or --days"
        )
    path = arguments.output or (told.CALIBRATED if arguments.probe is not None else None)
    if path and path != arguments.cluster and Path(path).exists() and not arguments.force:
        raise UserError(f"{path} exists; --force replaces it, --output names another file")


def _question(arguments: argparse.Namespace, settings: RunSettings) -> PlanQuestion:
    from motet.launcher.planning.prediction import expected_training
    from motet.launcher.runs.described_model import model_of
    from motet.parallel.planner.question import FIXABLE, PlanQuestion
    from motet.parallel.planner.space import Limits

    cluster = _cluster(arguments)
    training, traits = expected_training(settings, cluster)
    given = [one.partition("=")[0].removeprefix("layout.") for one in arguments.settings]
    given = [name for name in given if name in FIXABLE]
    fixed = {name: getattr(settings.layout, name) for name in given}
    return PlanQuestion(
        model_of(settings)[0],
        cluster,
        replace(training, zero_stage=None, offload=False),
        engines=_engines(arguments, cluster),
        fixed=fixed,
        compiled=settings.training.compile,
        top=arguments.top,
        limits=Limits(seconds=arguments.seconds),
        traits=traits,
    )


def _engines(arguments: argparse.Namespace, cluster: Cluster) -> tuple[str, ...]:
    """DeepSpeed is looked at where there are GPUs, and, on this machine, where it is installed."""
    from importlib.util import find_spec

    gpus = any(group.device.kind != "cpu" for group in cluster.groups)
    there = arguments.cluster is not None or find_spec("deepspeed") is not None
    asked = any(one.startswith("layout.engine=deepspeed") for one in arguments.settings)
    return ("native", "deepspeed") if asked or (gpus and there) else ("native",)


def _cluster(arguments: argparse.Namespace) -> Cluster:
    """The machines of --cluster, or this one: by data sheets, or measured where a probe is to
    calibrate its cores.
    """
    from motet.parallel.cluster import this_machine
    from motet.parallel.cluster.file import read

    if arguments.cluster is not None:
        return read(Path(arguments.cluster))
    if arguments.probe is None or arguments.dry_run or this_machine.gpus():
        return this_machine.this_machine()
    from motet.launcher.commands.plan.probe import measured

    return measured()


def _answer(arguments: argparse.Namespace, settings: RunSettings, question: PlanQuestion) -> int:
    from motet.launcher.runs.families import units_of
    from motet.parallel.planner.best_first import plan

    tokens = settings.slots_before(settings.steps) * settings.data.sequence_length
    limits, family = budget.limits(arguments), _family(settings, question)
    units = units_of(settings, None if family is None else family.family)
    question = replace(question, units=units)
    if limits is not None:
        return budget.within(arguments, settings, question, limits, tokens)
    if arguments.why is not None:
        from motet.launcher.commands.plan.why import tell_why

        return tell_why(arguments, question)
    if family is not None:
        question = replace(question, engines=("native",))
    with told.telling() as tell:
        tell("searching layouts")
        answer = plan(question)
        if family is not None and answer.choices:
            question, answer, left_out = _for_family(family, question, answer)
    if not answer.choices:
        raise UserError(told.nothing(question))
    if arguments.probe is not None:
        from motet.launcher.commands.plan.probe import probe

        return probe(arguments, settings, question, answer)
    if family is None:
        told.tell_answer(arguments, settings.name, question, answer, tokens)
        return 0
    with told.telling() as tell:
        tell("searching layouts of the family")
        priced = {**family.prices(question, answer.best), "left_out": left_out}
    note = partial(family.note, question)
    told.tell_answer(arguments, settings.name, question, answer, tokens, priced, note)
    return 0


def _family(settings: RunSettings, question: PlanQuestion) -> PlannedFamily | None:
    """The run's family; None where it trains one model.

    Raises:
        UserError: the family cannot be.
    """
    if settings.family.kind == WHOLE:
        return None
    from motet.launcher.planning.family_costs import PlannedFamily

    family = PlannedFamily(settings, question.model)
    return family if family.members else None


def _for_family(
    family: PlannedFamily, question: PlanQuestion, answer: PlanAnswer
) -> tuple[PlanQuestion, PlanAnswer, list[str]]:
    """Leave out ranked layouts that cannot train the family; where none is left, search among those
    that divide no member.

    Raises:
        UserError: none of these can either.
    """
    from motet.parallel.planner.best_first import plan

    choices, reasons = family.trainable(answer)
    if not choices:
        undivided = {name: 1 for name in ("tp", "pp", "ep", "etp") if name not in question.fixed}
        question = replace(question, fixed={**question.fixed, **undivided})
        answer = plan(question)
        choices, again = family.trainable(answer)
        if answer.choices and not choices:
            raise UserError(f"no layout can train the family: {again[0]}")
    return question, replace(answer, choices=choices), list(dict.fromkeys(reasons))
