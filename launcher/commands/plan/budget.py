"""`motet plan --budget`: the largest model that a budget trains, or the shortest time within it."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from motet.core.errors import UserError
from motet.launcher.commands.plan import told
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.launcher.planning import summary as plan_words
from motet.launcher.planning import table as plan_table

if TYPE_CHECKING:
    from motet.parallel.planner.budget import Affordable, Budget
    from motet.parallel.planner.question import PlanQuestion


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what limits the run, and what is asked of the limits."""
    hours = "largest model that it trains"
    parser.add_argument("--budget", metavar="NUMBERgpu-hours", help=hours)
    price = "the same, for a price"
    parser.add_argument("--budget-price", type=float, metavar="NUMBER", help=price)
    parser.add_argument("--days", type=float, metavar="NUMBER", help="the same, in so many days")
    fastest = "the shortest time for this model within the budget, instead"
    parser.add_argument("--fastest", action="store_true", help=fastest)


def limits(arguments: argparse.Namespace) -> Budget | None:
    """What the arguments allow; None when they set no budget.

    Raises:
        UserError: one of them is no positive number.
    """
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
    out = Budget(hours, arguments.budget_price, arguments.days)
    for name, value in (("budget-price", out.price), ("days", out.days), ("budget", hours)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: {value} is not above 0")
    return None if out == Budget() else out


def within(
    arguments: argparse.Namespace,
    settings: RunSettings,
    question: PlanQuestion,
    budget: Budget,
    tokens: float,
) -> int:
    """Tell the largest model that a budget trains, or the shortest time for the run's own model."""
    from motet.parallel.planner.budget import Affordable, fastest, largest

    unpriced = [g.name for g in question.cluster.groups if not g.device.price_per_hour]
    if budget.price is not None and len(unpriced) == len(question.cluster.groups):
        raise UserError(
            f"--budget-price: no price is known of {', '.join(unpriced)}; set price_per_hour of "
            "its device"
        )
    with told.telling() as tell:
        if arguments.fastest:
            found = fastest(question, budget, tokens, settings.name, tell)
        else:
            found = largest(question, budget, settings.training.tokens, tell)
    if not isinstance(found, Affordable):
        what = "this run's model" if arguments.fastest else "any of the presets"
        raise UserError(f"this budget does not train {what} to the end: {found}")
    return _tell(arguments, found)


def _tell(arguments: argparse.Namespace, best: Affordable) -> int:
    from motet.core import format
    from motet.models.counts import parameters

    row = plan_table.row(1, best.choice, best.tokens)
    if arguments.json:
        facts = {"model": best.name, "tokens": best.tokens, "binds": best.binds or None}
        trust = list(best.choice.prediction.trust)
        settings_of = plan_table.section(best.choice)
        terminal.print_json({**facts, **row, "settings": settings_of, "trust": trust})
        return 0
    what = "The shortest time" if arguments.fastest else "The largest"
    size = format.parameters(parameters(best.model))
    shown = f"{best.name} ({size} parameters) on {best.tokens:.3g} tokens"
    print(f"{what}: {shown}")
    terminal.print_table([row], plan_table.COLUMNS)
    print(f"The budget binds: {best.binds}." if best.binds else "The budget does not bind.")
    for line in plan_words.doubts_of(best.choice):
        print(line)
    if arguments.write:
        told.write_choice(arguments.write, best.choice)
    return 0
