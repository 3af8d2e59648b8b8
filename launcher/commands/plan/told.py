"""What `motet plan` prints and writes: the ranked layouts, calibrated machines, why nothing
fits.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.core.marks import rich_console
from motet.launcher.output import terminal
from motet.launcher.planning import summary as plan_words
from motet.launcher.planning import table as plan_table
from motet.launcher.planning.table import FULLEST

if TYPE_CHECKING:
    from motet.parallel.cluster.description import Cluster
    from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout

CALIBRATED = "calibrated.yaml"


def tell_answer(
    arguments: argparse.Namespace,
    name: str,
    question: PlanQuestion,
    answer: PlanAnswer,
    tokens: float,
    family: Mapping[str, Any] | None = None,
    note: Callable[[RankedLayout], str] = lambda choice: "",
) -> None:
    """Print the table, and write what was asked for.

    Args:
        family: what its samplers cost, `family_costs.PlannedFamily.prices`.
        note: what is written below a layout.
    """
    rows = [plan_table.row(i, choice, tokens) for i, choice in enumerate(answer.choices, 1)]
    if arguments.html:
        from motet.core.files import atomic_write
        from motet.launcher.planning import page as plan_page

        files = str(arguments.run_yaml), arguments.cluster
        page = plan_page.page(name, question, answer, rows, tokens, *files)
        atomic_write(Path(arguments.html), page)
    if arguments.write:
        _write(arguments, answer, note)
    if arguments.json:
        facts = plan_words.plain(question, answer, rows, tokens)
        terminal.print_json(facts if family is None else {**facts, "family": family})
        return
    terminal.print_table(rows, plan_table.COLUMNS)
    print()
    for line in plan_words.lines(question, answer, tokens):
        print(line)
    if family is not None:
        from motet.launcher.planning.family_costs import tell

        for why in family["left_out"]:
            print(f"Left out, as it cannot train the family: {why}.")
        tell(family)


@contextlib.contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """What is tried now, as a moving line at a terminal; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.markup import escape

    with rich_console(stderr=True, highlight=False).status("planning") as status:
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


def calibrated_text(arguments: argparse.Namespace, found: Cluster, sentences: list[str]) -> str:
    """cluster.yaml with fitted constants, and what they rest on."""
    from motet.launcher.planning.calibrate import text_of

    before = Path(arguments.cluster).read_text(encoding="utf-8") if arguments.cluster else ""
    return text_of(found, sentences, before)


def write_calibrated(arguments: argparse.Namespace, found: Cluster, sentences: list[str]) -> None:
    """Write calibrated machines to --output, and say how to use them."""
    path = arguments.output or CALIBRATED
    atomic_write(Path(path), calibrated_text(arguments, found, sentences))
    if not arguments.json:
        for sentence in sentences:
            print(sentence)
        print(
            f"wrote {path}; `--cluster {path}` plans with it, layout.cluster={path} trains with it"
        )


def _write(
    arguments: argparse.Namespace, answer: PlanAnswer, note: Callable[[RankedLayout], str]
) -> None:
    """Write the layout that was picked, or the best that leaves room in memory, and say which where
    it is not the first.
    """
    picked = arguments.pick
    if picked and picked > len(answer.choices):
        raise UserError(f"--pick {picked}: only {len(answer.choices)} layouts are ranked")
    number = picked or roomy(answer.choices)
    choice = answer.choices[number - 1]
    write_choice(arguments.write, choice, note(choice))
    if picked or arguments.json:
        return
    first = answer.choices[0].prediction
    full = f"{first.memory_gib:.1f} of {first.capacity_gib:.1f} GiB"
    if number > 1:
        slower = answer.choices[number - 1].prediction.step_time_s / first.step_time_s - 1
        print(
            f"wrote layout {number} to {arguments.write}: the first fills {full}, more than "
            f"{FULLEST:.0%}, and this one is {slower:.1%} slower; --pick 1 writes the first"
        )
    elif first.memory_gib > FULLEST * first.capacity_gib:
        print(
            f"wrote layout 1 to {arguments.write}: it fills {full}, and no layout shown leaves "
            f"{1 - FULLEST:.0%} of the memory free for what a prediction misses; more are ranked "
            "with --top"
        )


def roomy(choices: Sequence[RankedLayout]) -> int:
    """Return the number of the best layout that leaves room in memory, from 1; the first where none
    does.
    """
    for number, choice in enumerate(choices, 1):
        if choice.prediction.memory_gib <= FULLEST * choice.prediction.capacity_gib:
            return number
    return 1


def write_choice(path: str, choice: RankedLayout, note: str = "") -> None:
    """Write layout.yaml of one layout, and a note below."""
    atomic_write(Path(path), plan_table.layout_text(choice) + note)
