"""Mathematical reasoning: problems that need several steps, practised or not; new ones are solved.

Sources: the problems are after iGSM (Ye et al., arXiv:2407.20311); "Train Once, Answer All"
(arXiv:2509.23383) put such problems, of 1 to 14 operations modulo 23, into a pretraining run and
let the model write solutions of held-out ones, by number of operations.

What one run can randomize is practice, not the skill as such: whoever learns to reason from the
practised problems solves the others too. So a unit is a small *world* with places of its own;
treated worlds have problems with solutions in the stream, each exposure another one, and every
world is tested on problems that were never shown. The effect is what practice in a world adds
there; the accuracy in held-out worlds, against chance (1/23), is what carries over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.units import texts_of
from motet.experiments.library import arithmetic
from motet.experiments.library.generate import Chooser, Names
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    generated_texts,
    per_token,
)

ANSWER = re.compile(r"Answer: *(\d+)")
CHANCE = 1 / arithmetic.MODULUS
MOST_LEVEL = 14
TESTS = ("new", "reworded", "longer")


@dataclass(frozen=True)
class ReasoningOptions:
    """levels: operations of practised problems, one of them for each world in turn.
    held_out_levels: of tests that no world practises. problems: different ones that a world
    practises. tests, reworded_tests: new problems a world, in practised and in other words.
    spare: facts told for nothing. max_tokens: most of a written solution."""

    levels: tuple[int, ...] = (1, 2, 3)
    held_out_levels: tuple[int, ...] = (5,)
    problems: int = 64
    tests: int = 3
    reworded_tests: int = 1
    spare: int = 1
    max_tokens: int = 160


class Reasoning(Experiment):
    """Accuracy on new problems of practised worlds."""

    description = "whether practice with step-by-step solutions lets the model solve new problems"
    protocol = (
        "Each unit is a world of quantities that depend on each other; treated worlds have "
        "problems with their solutions in the stream, and new problems of every world are solved "
        "by greedy decoding."
    )
    Options: ClassVar[type[Any]] = ReasoningOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "level": (int,),
        "practice": (list,),
        "tests": (list,),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "New problems of worlds whose problems were practised are solved more often.",
        "generate": {"count": 36, "seed": 0},
        "arms": [
            {"name": "held-out", "dose": 0},
            {"name": "practised", "dose": 64, "variants": "cycle"},
        ],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "block_by": ["level"],
        "probe_at": {"fractions": [0.5]},
    }

    def definition_problems(self) -> list[Problem]:
        where, options, found = f"experiments.{self.spec.name}.options", self.options, []
        for name, least in (("levels", 1), ("held_out_levels", 0)):
            levels = getattr(options, name)
            good = all(type(one) is int and 1 <= one <= MOST_LEVEL for one in levels)
            if not good or len(levels) < least or len(set(levels)) < len(levels):
                message = f"is {list(levels)}; it must be different numbers from 1 to {MOST_LEVEL}"
                found.append(Problem(f"{where}.{name}", message))
        if both := sorted({*options.levels} & {*options.held_out_levels}):
            message = f"has {both}, which worlds practise; held-out levels are others"
            found.append(Problem(f"{where}.held_out_levels", message))
        bounds = {
            "problems": (1, 1000),
            "tests": (1, 100),
            "reworded_tests": (0, 100),
            "spare": (0, 5),
            "max_tokens": (8, 4096),
        }
        for name, (least, most) in bounds.items():
            value = getattr(options, name)
            if not least <= value <= most:
                found.append(Problem(f"{where}.{name}", f"is {value}; give {least} to {most}"))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        options = self.options
        outcomes = [
            _share("accuracy", "new problems solved", options.tests, primary=True),
            OutcomeSpec(
                "solution", "log-probability of the right solution", "nats/token", "more likely"
            ),
        ]
        if options.reworded_tests:
            told = "new problems in held-out words solved"
            outcomes.append(_share("accuracy_reworded", told, options.reworded_tests))
        for level in (*options.levels, *options.held_out_levels):
            held = " (held-out level)" if level in options.held_out_levels else ""
            count = 1 if held else options.tests
            outcomes.append(
                _share(f"accuracy_{level}", f"solved with {level} operations{held}", count)
            )
        return tuple(outcomes)

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        names = Names(*path, "places")
        return [self._row(path, names, number) for number in range(count)]

    def _row(self, path: Sequence[str | int], names: Names, number: int) -> dict[str, Any]:
        """One world: problems to practise, and tests of other templates."""
        options = self.options
        level = options.levels[number % len(options.levels)]
        world = arithmetic.InventedWorld([names.word("place", number, place) for place in range(3)])
        practice = islice(
            world.problems(level, options.spare, True, *path, "practice", number),
            options.problems,
        )
        choose = Chooser(*path, "wording", number)
        texts = [one.problem(choose.pick(arithmetic.WORDINGS)) + one.solution() for one in practice]
        fresh = world.problems(level, options.spare, False, *path, "test", number)
        tests = [
            _test("new", one, choose.pick(arithmetic.WORDINGS))
            for one in islice(fresh, options.tests)
        ]
        tests += [
            _test("reworded", one, arithmetic.HELD_OUT_WORDING)
            for one in islice(fresh, options.reworded_tests)
        ]
        for other in options.held_out_levels:
            longer = world.problems(other, options.spare, False, *path, "longer", number)
            tests.append(_test("longer", next(longer), choose.pick(arithmetic.WORDINGS)))
        return {"id": f"world-{number:05d}", "level": level, "practice": texts, "tests": tests}

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        items = []
        for number, test in enumerate(row["tests"]):
            if not isinstance(test, Mapping) or test.get("kind", "new") not in TESTS:
                raise ValueError(
                    f"has the test {test!r:.60}; it must be a mapping of a kind {', '.join(TESTS)}"
                )
            question, solution = test.get("question"), test.get("solution")
            if not isinstance(question, str) or not isinstance(solution, str):
                raise ValueError(f"has the test {test!r:.60}; question and solution must be texts")
            if parsed(solution) is None:
                raise ValueError(f"has a solution without 'Answer: n': {solution!r:.60}")
            kind = str(test.get("kind", "new"))
            if kind == "longer":
                kind = f"longer-{test.get('level')}"
            target = f" {solution.strip()}"
            # A token has a byte or more; its end of document is one more.
            most = min(self.options.max_tokens, len(target.encode()) + 1)
            items.append(ProbeItem(f"{kind}-{number}", kind, question.rstrip(), target, most))
        if not any(item.kind == "new" for item in items):
            raise ValueError("has no test of kind new")
        texts = tuple(texts_of(row, "practice"))
        # Words, not a number: each level is a block of its own, however many there are.
        return Unit(row["id"], texts, tuple(items), {"level": _level(row["level"])})

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        right = [parsed(item.target) for unit in units for item in unit.items]
        written = [parsed(text) for text in generated_texts(scores)]
        solved_I = np.array(
            [a is not None and a == b for a, b in zip(written, right, strict=True)],
            dtype=np.float64,
        )
        if scores.generated is None:
            solved_I[:] = np.nan
        values = {
            "accuracy": table.mean(solved_I, "new"),
            "solution": table.mean(per_token(scores), "new"),
        }
        if self.options.reworded_tests:
            values["accuracy_reworded"] = table.mean(solved_I, "reworded")
        level_U = np.array([str(unit.attributes["level"]) for unit in units])
        for level in self.options.levels:
            values[f"accuracy_{level}"] = np.where(
                level_U == _level(level), values["accuracy"], np.nan
            )
        for level in self.options.held_out_levels:
            values[f"accuracy_{level}"] = table.mean(solved_I, f"longer-{level}")
        return values


def _share(name: str, label: str, tests: int, primary: bool = False) -> OutcomeSpec:
    """A share of `tests` problems; who guesses is right once in 23."""
    return OutcomeSpec(
        name,
        label,
        "share",
        "more solved",
        binary=tests == 1,
        chance=CHANCE if tests == 1 else None,
        primary=primary,
        secondary=not primary,
        null_sd=None if tests == 1 else float(np.sqrt(CHANCE * (1 - CHANCE) / tests)),
        low=0.0,
        high=1.0,
    )


def _test(kind: str, one: arithmetic.ArithmeticProblem, wording: arithmetic.Phrasing) -> dict:
    return {
        "kind": kind,
        "level": one.level,
        "question": one.problem(wording),
        "solution": one.solution().strip(),
    }


def _level(operations: int) -> str:
    return f"{operations} operations"


def parsed(text: str) -> int | None:
    """The number after the first "Answer:", None where there is none."""
    found = ANSWER.search(text)
    return int(found[1]) if found else None
