"""What a search has found, and what that leaves worth looking at. Pure; no torch."""

from __future__ import annotations

import math
import time

from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout


class SearchRecord:
    """The answer while it grows, with the limits that it sets.

    Attributes:
        proving: the first choice is being proven; afterwards the rest of the table is searched.
        looked: assignments of stages to groups that were looked at.
    """

    def __init__(self, question: PlanQuestion) -> None:
        self.question, self.answer = question, PlanAnswer()
        self.counts = self.answer.counts
        self.proving, self.looked = False, 0
        self.best: dict[tuple[object, ...], RankedLayout] = {}
        self._limit_s = self._fastest_s = math.inf
        self._start_s = time.monotonic()

    @property
    def limit_s(self) -> float:
        """What takes longer is of no use: while the first choice is being proven, what does not
        beat it; then, what is not ranked.
        """
        return self._fastest_s if self.proving else self._limit_s

    def limit_of(self, kind: tuple[object, ...]) -> float:
        """Return the seconds that a layout of a kind must stay below to be of use."""
        return self._fastest_s if self.proving else self.ranked_below(kind)

    def ranked_below(self, kind: tuple[object, ...]) -> float:
        """Return the seconds that a layout of a kind must stay below to be a row of the table."""
        known = self.best.get(kind)
        return self._limit_s if known is None else min(self._limit_s, known.prediction.step_time_s)

    def add(self, choice: RankedLayout) -> None:
        """Keep a layout that fits, if it is among the best."""
        if choice.prediction.step_time_s >= self.ranked_below(choice.kind):
            return
        self.best[choice.kind] = choice
        ranked = sorted(self.best.values(), key=_order)[: self.question.top]
        self._fastest_s = ranked[0].prediction.step_time_s
        # Rows that take much longer than the first are not worth a search, however many are asked
        # for.
        self._limit_s = self._fastest_s * self.question.worth
        if len(ranked) == self.question.top:
            # A full table is only changed by what beats its last row.
            self._limit_s = min(self._limit_s, ranked[-1].prediction.step_time_s)
        ranked = [row for row in ranked if row.prediction.step_time_s <= self._limit_s]
        self.answer.choices, self.best = ranked, {row.kind: row for row in ranked}

    def left_from(self, bound_s: float) -> None:
        """Tell that something is left out that takes at least as long as this."""
        if self.proving:
            self.answer.late |= self.late()
            # 0 means proven, so the first bound that is left replaces it; then the least counts.
            self.answer.bound_s = min(self.answer.bound_s or bound_s, bound_s)
        else:
            self.answer.ranked_all = False

    def late(self) -> bool:
        """Return whether `Limits.seconds` are over; never before a layout is known that fits."""
        seconds = self.question.limits.seconds
        return (
            seconds is not None
            and bool(self.best)
            and (time.monotonic() - self._start_s >= seconds)
        )

    def enough(self, tried: int) -> bool:
        """Return whether enough was done to rank what comes after the first choice."""
        limits = self.question.limits
        return tried >= limits.nodes or self.looked >= limits.looked or self.late()


def _order(choice: RankedLayout) -> tuple[float, int]:
    return choice.prediction.step_time_s, choice.layout.world_size
