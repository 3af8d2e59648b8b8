"""`motet plan`: ranked layouts of a run.yaml on a cluster, with time, memory and cost; why others are not there. Starts nothing."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.experiments.errors import UserError, raise_problems, suggest
from motet.launcher import config, plan_table
from motet.launcher.commands import common
from motet.launcher.settings import RunSettings

if TYPE_CHECKING:
    from motet.parallel.cluster import Cluster
    from motet.parallel.plan_budget import Budget
    from motet.parallel.plan_terms import Answer, Question

UNKNOWN_VOCABULARY = 1 << 15
NO_OUTER = (
    "A link this slow calls for low-communication training between groups (outer optimizer steps, DiLoCo), which Motet cannot run "
    "yet: no layout here uses it."
)
SLOW_SHARE = 0.15
HISTORY: tuple[str, ...] = ("run", "attempt", "devices", "layout", "predicted_s", "measured_s")
HISTORY += ("error", "predicted_gib", "measured_gib", "problem")


def run(arguments: argparse.Namespace) -> int:
    """Search, and tell what was found."""
    from motet.parallel.cluster import ClusterError

    if arguments.history is not None:
        return _history(Path(arguments.history), arguments.json)
    if arguments.calibrate:
        from motet.launcher.prediction import calibrate

        print(calibrate([Path(folder) for folder in arguments.calibrate]), end="")
        return 0
    if arguments.run_yaml is None:
        raise UserError("plan: give a RUN.yaml, or --history or --calibrate with folders of runs")
    settings = _settings(arguments)
    _check(arguments)
    try:
        question = _question(arguments, settings)
        return _answer(arguments, settings, question)
    except ClusterError as error:
        raise UserError(str(error)) from None


def _history(runs: Path, as_json: bool) -> int:
    """Predicted and measured time and memory of every attempt of the runs in a folder."""
    from motet.launcher.prediction import history

    rows = history(runs)
    if as_json:
        common.print_json({"attempts": rows})
        return 0
    columns = {name: name.replace("_", " ") for name in HISTORY}
    common.print_table([{name: row.get(name) for name in HISTORY} for row in rows], columns)
    return 0


def _settings(arguments: argparse.Namespace) -> RunSettings:
    """The run's settings; what its layout says is what the search decides."""
    settings, found = config.inspect(common.run_yaml(arguments), arguments.settings)
    raise_problems([p for p in found if not p.setting.startswith(("layout", "batch.sequences"))])
    if settings is None:
        raise_problems(found)
    assert settings is not None, "there was a problem"
    return settings


def _check(arguments: argparse.Namespace) -> None:
    for name in ("top", "pick"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is not at least 1")
    if arguments.pick and not arguments.write:
        raise UserError("--pick chooses what --write FILE writes; give --write as well")
    if arguments.pick and arguments.pick > arguments.top:
        raise UserError(f"--pick {arguments.pick} is beyond --top {arguments.top}")


def _question(arguments: argparse.Namespace, settings: RunSettings) -> Question:
    from motet.launcher.commands.layout import _model
    from motet.launcher.prediction import expected_training
    from motet.parallel.plan_terms import FIXABLE, Question

    cluster = _cluster(arguments.cluster)
    training, traits = expected_training(settings, cluster)
    given = [one.partition("=")[0].removeprefix("layout.") for one in arguments.settings]
    given = [name for name in given if name in FIXABLE]
    fixed = {name: getattr(settings.layout, name) for name in given}
    return Question(
        _model(settings)[0],
        cluster,
        replace(training, zero_stage=None, offload=False),
        engines=("native", "deepspeed"),
        fixed=fixed,
        compiled=settings.training.compile,
        top=arguments.top,
        traits=traits,
    )


def _cluster(path: str | None) -> Cluster:
    from motet.launcher.machine import this_machine
    from motet.parallel.cluster import read

    return this_machine() if path is None else read(Path(path))


def _answer(arguments: argparse.Namespace, settings: RunSettings, question: Question) -> int:
    from motet.parallel.planner import plan

    tokens = settings.slots_before(settings.steps) * settings.data.sequence_length
    budget = _budget(arguments)
    if budget is not None:
        return _largest(arguments, question, budget, settings.training.tokens)
    answer = plan(question)
    if not answer.choices:
        raise UserError(_nothing(question))
    if arguments.why is not None:
        return _why(arguments, question, answer)
    rows = [plan_table.row(i, choice, tokens) for i, choice in enumerate(answer.choices, 1)]
    if arguments.html:
        from motet.launcher import plan_page
        from motet.launcher.rundir import atomic_write

        page = plan_page.page(settings.name, question, answer, rows)
        atomic_write(Path(arguments.html), page)
    if arguments.write:
        _write(arguments, answer)
    if arguments.json:
        common.print_json(_plain(question, answer, rows, tokens))
    else:
        _print(question, answer, rows, tokens)
    return 0


def _nothing(question: Question) -> str:
    from motet.parallel.plan_reasons import remedies, tightest

    nearest = tightest(question)
    if nearest is None or nearest.fill <= 1.0:
        asked = ", ".join(f"layout.{k}={v}" for k, v in question.fixed.items()) or "this batch"
        return f"no layout has {asked} on {question.cluster.devices:,} devices; change batch.sequences, or leave settings out"
    found = remedies(question)
    would = "; ".join(found) if found else "no single change that was tried: a smaller model"
    return f"no layout fits: the least is {nearest}. What would fit: {would}"


def _budget(arguments: argparse.Namespace) -> Budget | None:
    from motet.parallel.plan_budget import Budget

    hours = None
    if arguments.budget is not None:
        found = re.fullmatch(
            r"([0-9][0-9_,.]*(?:e[0-9]+)?)\s*gpu-?hours?", arguments.budget.lower()
        )
        if found is None:
            raise UserError(f"--budget: {arguments.budget!r} is not like 10000gpu-hours")
        hours = float(found[1].replace(",", "").replace("_", ""))
    limits = Budget(hours, arguments.budget_price, arguments.days)
    for name, value in (("budget-price", limits.price), ("days", limits.days), ("budget", hours)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: {value} is not above 0")
    return None if limits == Budget() else limits


def _largest(
    arguments: argparse.Namespace, question: Question, budget: Budget, tokens: int | None
) -> int:
    from motet.parallel.plan_budget import largest, size

    found = largest(question, budget, tokens)
    if found is None:
        raise UserError("this budget trains none of the presets to its end; raise it")
    row = plan_table.row(1, found.choice, found.tokens)
    if arguments.json:
        common.print_json({"model": found.name, "tokens": found.tokens, **row})
        return 0
    print(
        f"The largest: {found.name} ({size(found.model)} parameters) on {found.tokens:.3g} tokens"
    )
    common.print_table([row], plan_table.COLUMNS)
    return 0


# --- one degree after the other


def _why(arguments: argparse.Namespace, question: Question, answer: Answer) -> int:
    from motet.parallel.plan_reasons import why

    lines = why(question, answer.best, degrees(arguments.why))
    if arguments.json:
        common.print_json({"why": arguments.why, "reasons": lines})
        return 0
    print(f"{arguments.why}: {lines[0]}")
    for line in lines[1:]:
        print(line)
    return 0


def degrees(text: str) -> dict[str, Any]:
    """Return what "tp=4,pp=2,recompute=full" fixes.

    Raises:
        UserError: a name that nothing has, or a value that is none of its.
    """
    from motet.parallel.layout import Layout
    from motet.parallel.plan_terms import FIXABLE

    out: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.removeprefix("layout.")
        if not equals or name not in FIXABLE:
            hint = suggest(name, FIXABLE)
            raise UserError(f"--why: {part!r} is not NAME=VALUE{hint}; names: {', '.join(FIXABLE)}")
        kind = type(getattr(Layout(), name, 0 if name == "zero_stage" else ""))
        if kind is bool and value in ("true", "false"):
            out[name] = value == "true"
        elif kind is int and value.isdecimal() and int(value):
            out[name] = int(value)
        elif kind is str and value:
            out[name] = value
        else:
            raise UserError(f"--why: {name}={value!r} is not a {kind.__name__} that it can be")
    return out


# --- what is told


def _advice(question: Question, answer: Answer) -> list[str]:
    best = answer.best
    lines = [f"Doubt: {reason}" for reason in best.prediction.trust]
    if answer.bound_s:
        lines.append(
            f"The search ended after {answer.counts['tried']:,} sets of degrees and machines; none that is left takes less than "
            f"{answer.bound_s:.3g} s."
        )
    crossing = sum(best.prediction.parts.get(k, 0.0) for k in ("pipeline_send", "data_parallel"))
    left_out = len(best.cluster.groups) < len(question.cluster.groups)
    if len(question.cluster.groups) > 1:
        if left_out:
            names = {g.name for g in question.cluster.groups} - {
                g.name for g in best.cluster.groups
            }
            lines.append(f"Faster without {', '.join(sorted(names))}.")
        if left_out or crossing > SLOW_SHARE * best.prediction.step_time_s:
            lines.append(NO_OUTER)
    return lines


def _print(question: Question, answer: Answer, rows: list[dict[str, Any]], tokens: float) -> None:
    from motet.parallel.plan_probes import probes

    common.print_table(rows, plan_table.COLUMNS)
    counts = ", ".join(f"{n:,} {name}" for name, n in sorted(answer.counts.items()))
    print(f"\n{tokens:.3g} tokens. Candidates: {counts}.")
    used = ", ".join(
        f"{name} over {word}" for name, word in plan_table.transports(answer.best).items()
    )
    if used:
        print(f"Transport of the first: {used}.")
    for line in _advice(question, answer):
        print(line)
    probe = probes(answer.choices)[0]
    print(
        f"A one-minute run of layout {probe.number} would tell most ({probe.phase.replace('_', ' ')}): uncertainty "
        f"{probe.before:.0%} -> {probe.after:.0%}."
    )


def _plain(
    question: Question, answer: Answer, rows: list[dict[str, Any]], tokens: float
) -> dict[str, Any]:
    from motet.parallel.plan_probes import probes

    layouts = []
    for row, choice in zip(rows, answer.choices, strict=True):
        found = choice.prediction
        layouts.append(
            {
                **row,
                "settings": plan_table.section(choice),
                "step_time_s": found.step_time_s,
                "interval_s": list(found.interval_s),
                "memory_gib": found.memory_gib,
                "capacity_gib": found.capacity_gib,
                "parts_s": dict(found.parts),
                "memory_parts_gib": dict(found.memory_parts),
                "transports": plan_table.transports(choice),
                "trust": list(found.trust),
            }
        )
    return {
        "tokens": tokens,
        "devices": question.cluster.devices,
        "candidates": dict(answer.counts),
        "bound_s": answer.bound_s or None,
        "advice": _advice(question, answer),
        "layouts": layouts,
        "probes": [vars(one) for one in probes(answer.choices)],
    }


def _write(arguments: argparse.Namespace, answer: Answer) -> None:
    from motet.launcher.rundir import atomic_write

    number = arguments.pick or 1
    if number > len(answer.choices):
        raise UserError(f"--pick {number}: only {len(answer.choices)} layouts are ranked")
    choice = answer.choices[number - 1]
    text = plan_table.layout_text(choice)
    atomic_write(Path(arguments.write), text)
