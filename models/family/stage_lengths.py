"""How long a stage of a progressive family is: known before the run begins, or decided by the loss
as it trains, within bounds. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from motet.core.schema import MappingReader, is_number
from motet.models.config import ModelConfig
from motet.models.counts import training_flops_per_token
from motet.models.family.space import size_of

LENGTHS = ("steps", "tokens", "flops", "until")
UNTIL = ("loss_fall", "least_tokens", "most_tokens")
LEAST_STEPS = 16
"""Of a stage that its loss ends: a line through fewer losses says nothing."""


@dataclass(frozen=True)
class RunShape:
    """What a run says of its length and learning rate to a family that has stages.

    Attributes:
        steps, sequence_length: of the run.
        sequences_before: sequences consumed before a step.
        peak_lr: the peak learning rate of a model of so many parameters outside embedding and head.
        warmup_steps: of the run's schedule.
    """

    steps: int
    sequence_length: int
    sequences_before: Callable[[int], int]
    peak_lr: Callable[[int], float]
    warmup_steps: int

    def tokens(self, start: int, stop: int) -> int:
        """Return the tokens that steps [start, stop) consume."""
        return (self.sequences_before(stop) - self.sequences_before(start)) * self.sequence_length


class LossEnd(NamedTuple):
    """The rule by which the loss ends a stage (`loss_trend`).

    Attributes:
        loss_fall: nats for each unit of the natural logarithm of the stage's tokens; a stage whose
            loss falls by less ends.
        least_tokens: that it trains on first.
    """

    loss_fall: float
    least_tokens: float


class StageLength(NamedTuple):
    """How long a stage is: `value` of "steps", "tokens" or "flops"; "rest" of the run.

    Attributes:
        until: the stage may end before, by its loss; None: it does not.
    """

    kind: str
    value: float = 0.0
    until: LossEnd | None = None

    def stop(self, start: int, config: ModelConfig, run: RunShape) -> int:
        """Return the step that the stage ends before, at the latest; rounded up to a whole step."""
        if self.kind == "rest":
            return run.steps
        if self.kind == "steps":
            return start + round(self.value)
        tokens = self.value
        if self.kind == "flops":
            tokens /= training_flops_per_token(config, run.sequence_length)
        low, high = start + 1, start + 1
        while run.tokens(start, high) < tokens and high < 2 * run.steps:
            low, high = high, start + 2 * (high - start)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if run.tokens(start, middle) >= tokens else (middle + 1, high)
        return low

    @property
    def least(self) -> StageLength:
        """The shortest that the stage may be."""
        return self if self.until is None else StageLength("tokens", self.until.least_tokens)


def read_length(read: MappingReader, last: bool) -> StageLength | None:
    """Return how long a stage is; None where it does not say. Problems are gathered."""
    given = [key for key in LENGTHS if key in read.values]
    if last:
        for key in given:
            read.problem(key, "the last stage takes the rest of the run; leave it out")
        return StageLength("rest")
    if len(given) > 1:
        read.problem(given[1], f"{given[0]} says how long the stage is already; leave one out")
    if not given:
        return None
    if given[0] == "until":
        return _read_until(read)
    value = amount(read.values[given[0]])
    if value is None or (given[0] == "steps" and value != round(value)):
        whole = "a whole number of steps" if given[0] == "steps" else "a number such as 2m or 1.5b"
        read.refuse(given[0], read.values[given[0]], whole)
        return StageLength("steps", 1)
    return StageLength(given[0], value)


def _read_until(read: MappingReader) -> StageLength:
    """Return a length that the loss decides within bounds."""
    nothing = StageLength("steps", 1)
    asked = read.values["until"]
    example = "{loss_fall: 0.1, least_tokens: 2m, most_tokens: 20m}"
    if not isinstance(asked, Mapping):
        read.refuse("until", asked, f"rules such as {example}")
        return nothing
    for key in asked:
        if key not in UNTIL:
            read.problem(f"until.{key}", f"is no part of it; there are {', '.join(UNTIL)}")
    found: dict[str, float] = {}
    for key in UNTIL:
        if key not in asked:
            read.problem(f"until.{key}", f"is not set; write it as in {example}")
        elif (value := amount(asked[key])) is None:
            read.problem(f"until.{key}", f"{asked[key]!r:.60} is not a number above 0")
        else:
            found[key] = value
    if len(found) < len(UNTIL):
        return nothing
    fall, least, most = (found[key] for key in UNTIL)
    if least >= most:
        why = f"{most:,.0f} is no more than least_tokens, {least:,.0f}; make it larger"
        read.problem("until.most_tokens", why)
        return nothing
    return StageLength("tokens", most, LossEnd(fall, least))


def amount(value: Any) -> float | None:
    """Return a positive number, also one written as 2m, 1.5b or 3e15; None where it is none."""
    if is_number(value):
        return float(value) if value > 0 else None
    try:
        return float(size_of(value))
    except ValueError:
        pass
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if 0 < found < math.inf and not isinstance(value, bool) else None
