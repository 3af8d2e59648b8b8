"""`motet plan`: ranked layouts of a run.yaml on a cluster, with time, memory and cost; why others
are not there; what a budget allows.

It starts nothing, but with --probe: a short run of one of the layouts, which calibrates the
predictions.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config import load as config
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.launcher.planning import summary as plan_words
from motet.launcher.planning import table as plan_table

if TYPE_CHECKING:
    from motet.parallel.cluster.description import Cluster
    from motet.parallel.planner.budget import Budget
    from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout

CALIBRATED = "calibrated.yaml"
HISTORY: tuple[str, ...] = ("run", "attempt", "devices", "layout", "predicted_s", "measured_s")
HISTORY += ("error", "predicted_gib", "measured_gib", "problem")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is planned, what is asked of it and what is written."""
    options.dry_run(parser)
    options.as_json(parser)
    parser.add_argument("--cluster", metavar="FILE", help="cluster.yaml (default: this machine)")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="layouts shown (default 8)")
    parser.add_argument("--why", metavar="DEGREES", help="why not, such as tp=4,pp=2; or all")
    parser.add_argument("--html", metavar="FILE", help="the pipeline's timeline, memory over time")
    parser.add_argument("--write", metavar="FILE", help="layout.yaml of the best layout")
    parser.add_argument("--pick", type=int, metavar="N", help="write this one instead of the best")
    _budget_arguments(parser)
    _measuring_arguments(parser)
    options.run_yaml(parser, required=False)


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    hours = "largest model that it trains"
    parser.add_argument("--budget", metavar="NUMBERgpu-hours", help=hours)
    price = "the same, for a price"
    parser.add_argument("--budget-price", type=float, metavar="NUMBER", help=price)
    parser.add_argument("--days", type=float, metavar="NUMBER", help="the same, in so many days")
    fastest = "the shortest time for this model within the budget, instead"
    parser.add_argument("--fastest", action="store_true", help=fastest)


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
        print(_calibrated_text(arguments, found, sentences), end="")
        return 0
    write_calibrated(arguments, found, sentences)
    if arguments.json:
        terminal.print_json({"output": arguments.output, "cluster": found.to_mapping()})
    return 0


def _calibrated_text(arguments: argparse.Namespace, found: Cluster, sentences: list[str]) -> str:
    from motet.launcher.planning.calibrate import text_of

    before = Path(arguments.cluster).read_text(encoding="utf-8") if arguments.cluster else ""
    return text_of(found, sentences, before)


def write_calibrated(arguments: argparse.Namespace, found: Cluster, sentences: list[str]) -> None:
    """Write calibrated machines to --output, and say how to use them."""
    from motet.core.files import atomic_write

    path = arguments.output or CALIBRATED
    atomic_write(Path(path), _calibrated_text(arguments, found, sentences))
    if not arguments.json:
        for sentence in sentences:
            print(sentence)
        print(
            f"wrote {path}; `--cluster {path}` plans with it, layout.cluster={path} trains with it"
        )


def _settings(arguments: argparse.Namespace) -> RunSettings:
    """The run's settings; what its layout says is what the search decides."""
    settings, found = config.inspect(common.run_yaml(arguments), arguments.settings)
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
    if arguments.fastest and _budget(arguments) is None:
        raise UserError(
            "--fastest asks what a budget allows; give --budget, --budget-price or --days"
        )
    path = arguments.output or (CALIBRATED if arguments.probe is not None else None)
    if path and path != arguments.cluster and Path(path).exists() and not arguments.force:
        raise UserError(f"{path} exists; --force replaces it, --output names another file")


def _question(arguments: argparse.Namespace, settings: RunSettings) -> PlanQuestion:
    from motet.launcher.planning.prediction import expected_training
    from motet.launcher.planning.run_facts import model_of
    from motet.parallel.planner.question import FIXABLE, PlanQuestion

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
    from motet.parallel.cluster import this_machine as machine
    from motet.parallel.cluster.file import read

    if arguments.cluster is not None:
        return read(Path(arguments.cluster))
    if arguments.probe is None or arguments.dry_run or machine.gpus():
        return machine.this_machine()
    from motet.launcher.commands.plan_probe import measured

    return measured()


def _answer(arguments: argparse.Namespace, settings: RunSettings, question: PlanQuestion) -> int:
    from motet.parallel.planner.best_first import plan

    tokens = settings.slots_before(settings.steps) * settings.data.sequence_length
    budget = _budget(arguments)
    if budget is not None:
        return _within(arguments, settings, question, budget, tokens)
    if arguments.why is not None:
        from motet.launcher.commands.plan_why import tell_why

        return tell_why(arguments, question)
    with telling() as tell:
        tell("searching layouts")
        answer = plan(question)
    if not answer.choices:
        raise UserError(nothing(question))
    if arguments.probe is not None:
        from motet.launcher.commands.plan_probe import probe

        return probe(arguments, settings, question, answer)
    tell_answer(arguments, settings.name, question, answer, tokens)
    return 0


def tell_answer(
    arguments: argparse.Namespace,
    name: str,
    question: PlanQuestion,
    answer: PlanAnswer,
    tokens: float,
) -> None:
    """Print the table, and write what was asked for."""
    rows = [plan_table.row(i, choice, tokens) for i, choice in enumerate(answer.choices, 1)]
    if arguments.html:
        from motet.core.files import atomic_write
        from motet.launcher.planning import page as plan_page

        atomic_write(Path(arguments.html), plan_page.page(name, question, answer, rows, tokens))
    if arguments.write:
        _write(arguments, answer)
    if arguments.json:
        terminal.print_json(plan_words.plain(question, answer, rows, tokens))
        return
    terminal.print_table(rows, plan_table.COLUMNS)
    print()
    for line in plan_words.lines(question, answer, tokens):
        print(line)


@contextlib.contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """What is tried now, as a moving line at a terminal; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True, highlight=False).status("planning") as status:
        yield lambda text: status.update(escape(text))


def nothing(question: PlanQuestion) -> str:
    """Say why no layout is left, and what would make one fit."""
    from motet.parallel.planner.reasons import best_with, remedies, tightest

    nearest = tightest(question)
    if nearest is None or nearest.fill <= 1.0:
        asked = ", ".join(f"layout.{k}={v}" for k, v in question.fixed.items()) or "the run"
        found = best_with(replace(question, fixed={}), question.fixed)
        why = found[0] if isinstance(found, list) else "the search ended before one was found"
        return f"no layout for {asked} on {question.cluster.devices:,} devices: {why}"
    would = "; ".join(remedies(question)) or "no single change that was tried: a smaller model"
    return f"no layout fits: the least is {nearest}. What would fit: {would}"


# --- what a budget allows


def _budget(arguments: argparse.Namespace) -> Budget | None:
    from motet.parallel.planner.budget import Budget

    hours = None
    if arguments.budget is not None:
        found = re.fullmatch(
            r"([0-9][0-9_,.]*(?:e[0-9]+)?)\s*(?:gpu|device)-?hours?", arguments.budget.lower()
        )
        try:
            hours = float(found[1].replace(",", "").replace("_", "")) if found else None
        except ValueError:
            hours = None
        if hours is None:
            raise UserError(f"--budget: {arguments.budget!r} is not like 10000gpu-hours")
    limits = Budget(hours, arguments.budget_price, arguments.days)
    for name, value in (("budget-price", limits.price), ("days", limits.days), ("budget", hours)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: {value} is not above 0")
    return None if limits == Budget() else limits


def _within(
    arguments: argparse.Namespace,
    settings: RunSettings,
    question: PlanQuestion,
    budget: Budget,
    tokens: float,
) -> int:
    """Tell the largest model that a budget trains, or the shortest time for the run's own model."""
    from motet.parallel.planner.budget import Affordable, fastest, largest, size

    unpriced = [g.name for g in question.cluster.groups if not g.device.price_per_hour]
    if budget.price is not None and len(unpriced) == len(question.cluster.groups):
        raise UserError(
            f"--budget-price: no price is known of {', '.join(unpriced)}; set price_per_hour of "
            "its device"
        )
    with telling() as tell:
        if arguments.fastest:
            found = fastest(question, budget, tokens, settings.name, tell)
        else:
            found = largest(question, budget, settings.training.tokens, tell)
    if not isinstance(found, Affordable):
        what = "this run's model" if arguments.fastest else "any of the presets"
        raise UserError(f"this budget does not train {what} to the end: {found}")
    row = plan_table.row(1, found.choice, found.tokens)
    if arguments.json:
        told = {"model": found.name, "tokens": found.tokens, "binds": found.binds or None}
        trust = list(found.choice.prediction.trust)
        settings_of = plan_table.section(found.choice)
        terminal.print_json({**told, **row, "settings": settings_of, "trust": trust})
        return 0
    what = "The shortest time" if arguments.fastest else "The largest"
    shown = f"{found.name} ({size(found.model)} parameters) on {found.tokens:.3g} tokens"
    print(f"{what}: {shown}")
    terminal.print_table([row], plan_table.COLUMNS)
    print(f"The budget binds: {found.binds}." if found.binds else "The budget does not bind.")
    for line in plan_words.doubts_of(found.choice):
        print(line)
    if arguments.write:
        _write_choice(arguments.write, found.choice)
    return 0


# --- files


def _write(arguments: argparse.Namespace, answer: PlanAnswer) -> None:
    number = arguments.pick or 1
    if number > len(answer.choices):
        raise UserError(f"--pick {number}: only {len(answer.choices)} layouts are ranked")
    _write_choice(arguments.write, answer.choices[number - 1])


def _write_choice(path: str, choice: RankedLayout) -> None:
    from motet.core.files import atomic_write

    atomic_write(Path(path), plan_table.layout_text(choice))
