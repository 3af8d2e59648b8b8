"""`motet plan RUN.yaml --why`: why layouts with some degrees are not the first; or, for all, what
each value of each setting costs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError, suggest
from motet.launcher.commands.plan.told import nothing, telling
from motet.launcher.output import terminal
from motet.launcher.planning import table as plan_table

if TYPE_CHECKING:
    from motet.parallel.planner.question import PlanQuestion, RankedLayout

REASONS = {
    "setting": "setting",
    "value": "value",
    "time_s": "best step (s)",
    "longer": "longer",
    "why": "why it is not the first",
}


def tell_why(arguments: argparse.Namespace, question: PlanQuestion) -> int:
    """Tell why layouts with some degrees are not the first; what they take is told before the
    fastest of all is searched.
    """
    from motet.parallel.planner.reasons import best_with, slower

    if arguments.why == "all":
        return _why_all(arguments, question)
    with telling() as tell:
        tell(f"searching layouts with {arguments.why}")
        found = best_with(question, degrees(arguments.why))
    lines = found if isinstance(found, list) else [_taken(found)]
    if not arguments.json:
        print(f"{arguments.why}: {lines[0]}", *lines[1:], sep="\n", flush=True)
    if not isinstance(found, list):
        with telling() as tell:
            tell("searching the fastest layout")
            more = slower(found, _fastest(question))
        lines += more
        if not arguments.json:
            print(*more, sep="\n")
    if arguments.json:
        terminal.print_json({"why": arguments.why, "reasons": lines})
    return 0


def _taken(choice: RankedLayout) -> str:
    found = choice.prediction
    return (
        f"{found.step_time_s:.3g} s with {plan_table.words(choice)}, on "
        f"{plan_table.machines(choice)}"
    )


def _why_all(arguments: argparse.Namespace, question: PlanQuestion) -> int:
    """Tell of every setting's values what the best layout with it takes."""
    from motet.parallel.planner.reasons import every_degree

    with telling() as tell:
        tell("searching the fastest layout")
        rows = every_degree(question, _fastest(question), tell)
    if arguments.json:
        terminal.print_json({"why": "all", "settings": rows})
    else:
        terminal.print_table(rows, REASONS)
    return 0


def _fastest(question: PlanQuestion) -> RankedLayout:
    from motet.parallel.planner.best_first import plan

    answer = plan(replace(question, top=1, worth=1.0))
    if not answer.choices:
        raise UserError(nothing(question))
    return answer.best


def degrees(text: str) -> dict[str, Any]:
    """Return what "tp=4,pp=2,recompute=full" fixes.

    Raises:
        UserError: a name that nothing has, a name twice, or a value that is none of its.
    """
    from motet.parallel.planner.question import FIXABLE

    out: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.removeprefix("layout.")
        if not equals or name not in FIXABLE:
            hint = suggest(name, FIXABLE)
            raise UserError(f"--why: {part!r} is not NAME=VALUE{hint}; names: {', '.join(FIXABLE)}")
        if name in out:
            raise UserError(f"--why: {name} is given twice")
        out[name] = _value(name, value)
    return out


def _value(name: str, value: str) -> Any:
    from motet.parallel.layout.layout import RECOMPUTE, SCHEDULES, Layout
    from motet.parallel.planner.zero import OFFLOAD, ZERO_STAGES

    choices: dict[str, tuple[Any, ...]] = {
        "schedule": SCHEDULES,
        "recompute": RECOMPUTE,
        "engine": ("native", "deepspeed"),
        "offload": OFFLOAD,
        "zero_stage": ZERO_STAGES,
        "sequence_parallel": (True, False),
    }
    if name in choices:
        shown = {str(one).lower(): one for one in choices[name]}
        if value.lower() in shown:
            return shown[value.lower()]
        raise UserError(f"--why: {name}={value!r} is none of {', '.join(shown)}")
    assert isinstance(getattr(Layout(), name), int), name
    if not value.isdecimal() or not int(value):
        raise UserError(f"--why: {name}={value!r} is not a whole number above 0")
    return int(value)
