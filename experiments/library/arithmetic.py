"""Invented problems of arithmetic modulo 23, with their solutions step by step.

After iGSM (Ye et al., arXiv:2407.20311): quantities depend on each other in a graph without
circles, the text tells each dependency in a sentence, in no order, some of them for nothing, and
asks for one quantity. A problem of level n needs n operations. What is told of the graph without
its numbers is the problem's template; templates are divided by their hash, as there, so that no
template of a test is ever practised.

The graph is our own: each operation takes the result of the one before it, so that all of them
are needed, and a number or another quantity. Numbers stay below 23 by reduction after each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from motet.experiments.library.generate import Chooser
from motet.experiments.stream.random import name_key

MODULUS = 23
PRACTISED_HASHES = 17
"""Templates whose hash modulo 23 is below it are practised, the others tested (iGSM's split)."""
THINGS = (
    *("apples", "bells", "boats", "candles", "chairs", "drums", "figs", "hats"),
    *("keys", "lamps", "nuts", "pears", "pots", "rings", "ropes", "shoes"),
)
KINDS = ("more", "times", "sum", "less")
SIGNS = {"more": "+", "times": "*", "sum": "+", "less": "-"}


@dataclass(frozen=True)
class Phrasing:
    """How one problem is told; {q}, {a} and {b} are quantities, {k} is a number."""

    given: str
    more: str
    times: str
    sum: str
    less: str
    question: str


WORDINGS = (
    Phrasing(
        "There are {k} {q}.",
        "There are {k} more {q} than {a}.",
        "There are {k} times as many {q} as {a}.",
        "There are as many {q} as {a} and {b} together.",
        "There are as many {q} as {a} less {b}.",
        "How many {q} are there, modulo 23?",
    ),
    Phrasing(
        "The number of {q} is {k}.",
        "The number of {q} is {k} more than that of {a}.",
        "The number of {q} is {k} times that of {a}.",
        "The number of {q} is that of {a} plus that of {b}.",
        "The number of {q} is that of {a} minus that of {b}.",
        "What is the number of {q}, modulo 23?",
    ),
)
HELD_OUT_WORDING = Phrasing(
    "Somebody counted {k} {q}.",
    "Add {k} to {a} to get {q}.",
    "Take {k} times {a} to get {q}.",
    "Add {b} to {a} to get {q}.",
    "Take {b} from {a} to get {q}.",
    "Modulo 23, what do you get for {q}?",
)


@dataclass(frozen=True)
class Fact:
    """One quantity and what it depends on: a number `k`, one quantity, or two."""

    quantity: str
    kind: str
    k: int = 0
    a: str = ""
    b: str = ""

    def told(self, wording: Phrasing) -> str:
        """The sentence."""
        form: str = getattr(wording, self.kind)
        return form.format(q=self.quantity, k=self.k, a=self.a, b=self.b)


@dataclass(frozen=True)
class ArithmeticProblem:
    """Facts in an order in which they can be worked out, and the quantity that is asked for.

    `spare` are facts that are told for nothing; `order` is that of the sentences.
    """

    facts: tuple[Fact, ...]
    spare: tuple[Fact, ...]
    order: tuple[int, ...]

    @property
    def asked(self) -> str:
        """The quantity that is asked for: the last one."""
        return self.facts[-1].quantity

    @property
    def level(self) -> int:
        """How many operations it needs."""
        return sum(fact.kind != "given" for fact in self.facts)

    @property
    def template(self) -> str:
        """What the facts tell without numbers; the spare ones and the order do not count."""
        return " ".join(f"{f.quantity}={f.kind}({f.a},{f.b})" for f in self.facts)

    @property
    def key(self) -> tuple[str, ...]:
        """The same for two problems that differ in nothing but order, wording and spare facts."""
        return tuple(sorted(f"{f.quantity}={f.kind}({f.k},{f.a},{f.b})" for f in self.facts))

    @property
    def practised(self) -> bool:
        """Whether its template may be practised; the others are for tests."""
        return name_key("template", self.template) % MODULUS < PRACTISED_HASHES

    def values(self) -> dict[str, int]:
        """Every needed quantity, in [0, 23)."""
        found: dict[str, int] = {}
        for fact in self.facts:
            found[fact.quantity] = _result(fact, found) % MODULUS
        return found

    @property
    def answer(self) -> int:
        """The quantity that is asked for, in [0, 23)."""
        return self.values()[self.asked]

    def problem(self, wording: Phrasing) -> str:
        """The text, which ends where the solution begins."""
        facts = [*self.facts, *self.spare]
        sentences = [facts[number].told(wording) for number in self.order]
        return f"{' '.join(sentences)} {wording.question.format(q=self.asked)} Solution:"

    def solution(self) -> str:
        """The steps in their order, and "Answer: n"; it begins with a space."""
        values = self.values()
        steps = [_step(fact, values) for fact in self.facts]
        return f" {' '.join(steps)} Answer: {self.answer}"


def _result(fact: Fact, values: dict[str, int]) -> int:
    """The number before it is reduced."""
    if fact.kind == "given":
        return fact.k
    if fact.kind == "more":
        return fact.k + values[fact.a]
    if fact.kind == "times":
        return fact.k * values[fact.a]
    other = values[fact.b]
    return values[fact.a] + other if fact.kind == "sum" else values[fact.a] - other


def _step(fact: Fact, values: dict[str, int]) -> str:
    """One step in words: the operation on numbers, its result, and that modulo 23."""
    if fact.kind == "given":
        return f"{fact.quantity} = {fact.k}."
    one = fact.k if fact.kind in ("more", "times") else values[fact.a]
    other = values[fact.a if fact.kind in ("more", "times") else fact.b]
    raw = _result(fact, values)
    reduced = "" if 0 <= raw < MODULUS else f" = {raw % MODULUS}"
    return f"{fact.quantity} = {one} {SIGNS[fact.kind]} {other} = {raw}{reduced}."


class InventedWorld:
    """Some places with things in them: the quantities that the problems of one world tell of."""

    def __init__(self, places: Sequence[str]) -> None:
        self.quantities = [f"{thing} of {place}" for place in places for thing in THINGS]

    def problems(
        self, level: int, spare: int, practised: bool, *path: str | int
    ) -> Iterator[ArithmeticProblem]:
        """Yield problems without end, each with another key; number i follows from the path and i.

        Args:
            level: operations.
            spare: facts that are told for nothing.
            practised: of which half of the templates.
            path: names of the draws.
        """
        seen: set[tuple[str, ...]] = set()
        number = 0
        while True:
            drawn = self._draw(Chooser(*path, level, number), level, spare)
            number += 1
            if drawn.practised == practised and drawn.key not in seen:
                seen.add(drawn.key)
                yield drawn

    def _draw(self, choose: Chooser, level: int, spare: int) -> ArithmeticProblem:
        names = choose.sample(self.quantities, 2 * level + 1 + spare)
        facts = [_given(choose, names.pop())]
        for _ in range(level):
            last, kind = facts[-1].quantity, choose.pick(KINDS)
            if kind in ("more", "times"):
                k = 1 + choose.below(22) if kind == "more" else 2 + choose.below(8)
                facts.append(Fact(names.pop(), kind, k, last))
                continue
            others = [fact.quantity for fact in facts[:-1]]
            if not others or choose.below(2):
                facts.append(_given(choose, names.pop()))
                others = [facts[-1].quantity]
            facts.append(Fact(names.pop(), kind, 0, last, choose.pick(others)))
        extra = [_given(choose, names.pop()) for _ in range(spare)]
        order = choose.sample(range(len(facts) + spare), len(facts) + spare)
        return ArithmeticProblem(tuple(facts), tuple(extra), tuple(order))


def _given(choose: Chooser, quantity: str) -> Fact:
    return Fact(quantity, "given", choose.below(MODULUS))
