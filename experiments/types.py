"""What passes between the rooms of an experiment: units and their probe items, item scores, and
what an outcome is called.

Shapes: U units, I probe items (in the order of units, then of each unit's items), S probe steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
SATURATED_SHARE = 0.2
LOWEST_SHARE = 0.2
OF_THE_CLASS = ("null_values", "low", "high")


@dataclass(frozen=True)
class ProbeItem:
    """One measurement: how likely is `target` right after `prompt`, and, with `max_tokens`, what
    the model writes there by greedy decoding: at most so many tokens, to the end of document.

    `id` is unique in its unit. The target may be empty where only what is written counts.
    """

    id: str
    kind: str
    prompt: str
    target: str
    max_tokens: int = 0


@dataclass(frozen=True)
class Unit:
    """The smallest thing that is randomized.

    `texts` are what exposures show (the first one is the original, the others are its variants);
    `items` are what probes measure. Units with one `cluster` move together; units are randomized
    within their `block`.
    """

    id: str
    texts: tuple[str, ...]
    items: tuple[ProbeItem, ...]
    attributes: dict[str, str | int | float] = field(default_factory=dict)
    cluster: str = ""
    block: str = ""


@dataclass(frozen=True)
class OutcomeSpec:
    """One number per unit, what it is called and how it is judged.

    `chance` is the value of a guess (binary outcomes). `contrast` names the (treated, control) arms
    that are compared; None compares every arm with a dose to every arm without. `baseline` names
    the series whose value before any exposure is adjusted for; None means the outcome's own series,
    "" none. `null_sd` is the standard deviation between units when there is no effect, if it is
    known; `null_values` are equally likely values of a unit then. `low` and `high` are the ends of
    the possible range (a share's are 0 and 1); None is no end.
    """

    name: str
    label: str
    unit: str
    higher_is: str
    binary: bool = False
    chance: float | None = None
    primary: bool = False
    secondary: bool = True
    contrast: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    baseline: str | None = None
    null_sd: float | None = None
    null_values: tuple[float, ...] | None = None
    low: float | None = None
    high: float | None = None

    def frozen(self) -> dict[str, Any]:
        """What a frozen definition says of it: how it is judged, not where its values can lie:
        that is the class's own.
        """
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_CLASS}

    @property
    def range(self) -> tuple[float | None, float | None]:
        """The ends of the possible range."""
        return (0.0, 1.0) if self.binary else (self.low, self.high)

    @property
    def guess(self) -> float | None:
        """The mean of units of which nothing was learned; None where it is not known."""
        if self.chance is None and self.null_values is not None:
            return sum(self.null_values) / len(self.null_values)
        return self.chance

    @property
    def reach(self) -> float:
        """The largest difference that two values can have; infinite without an end."""
        low, high = self.range
        return math.inf if low is None or high is None else high - low

    def room(self, level: float | None) -> float | None:
        """How far a mean at `level` can rise, where that is less than a fifth of the possible
        range, so that an effect cannot show; else None.
        """
        low, high = self.range
        if level is None or low is None or high is None:
            return None
        return high - level if high - level < SATURATED_SHARE * (high - low) else None


@dataclass(frozen=True)
class Generated:
    """What the model wrote after each prompt, without the end of document.

    texts: [I], "" for an item that asked for nothing; tokens: per item, int64. ended: bool [I],
    whether the end of document came before the item's `max_tokens` were used up.
    """

    texts: tuple[str, ...]
    tokens: tuple[I64, ...]
    ended: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ItemScores:
    """What the model said about every item at one probe step.

    logprob: float64 [I], sum over the target's tokens, nats. n_tokens, n_bytes: int64 [I], length
    of the target. greedy: bool [I], whether greedy decoding from the prompt reproduces the target.
    generated: what was written, None where no item asks for it. alignment: float64 [I], cosine of
    the unit's noise with minus the loss gradient; None where there is no noise.
    lowest: float64 [I], mean of the least likely fifth (`LOWEST_SHARE`, at least one) of the
    target's token log-probabilities, nats (Min-K%, Shi et al., arXiv 2310.16789); None in files
    of before.
    """

    logprob: F64
    n_tokens: I64
    n_bytes: I64
    greedy: npt.NDArray[np.bool_]
    generated: Generated | None = None
    alignment: F64 | None = None
    lowest: F64 | None = None


class ItemTable:
    """The items of a list of units as columns, to aggregate scores per unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.n_units = len(units)
        self.unit_I = np.repeat(np.arange(len(units)), [len(unit.items) for unit in units])
        self.kind_I = np.array([item.kind for unit in units for item in unit.items], dtype=object)

    def of_kind(self, kind: str) -> npt.NDArray[np.bool_]:
        """Which items are of this kind, bool [I]."""
        return np.asarray(self.kind_I == kind, dtype=bool)

    def mean(self, values_I: npt.NDArray[Any], kind: str) -> F64:
        """Mean over each unit's items of one kind, float64 [U]; NaN for a unit without any."""
        chosen = self.of_kind(kind)
        units = self.unit_I[chosen]
        count = np.bincount(units, minlength=self.n_units)
        total = np.bincount(
            units, weights=np.asarray(values_I, np.float64)[chosen], minlength=self.n_units
        )
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def only(self, values_I: npt.NDArray[Any], kind: str) -> list[F64]:
        """The values of one kind, one array per unit."""
        chosen = self.of_kind(kind)
        counts = np.bincount(self.unit_I[chosen], minlength=self.n_units)
        return np.split(np.asarray(values_I, np.float64)[chosen], np.cumsum(counts)[:-1])


def generated_texts(scores: ItemScores) -> tuple[str, ...]:
    """What was written after each item's prompt, [I]; "" where nothing was asked for."""
    found = scores.generated
    return ("",) * len(scores.logprob) if found is None else found.texts


def per_token(scores: ItemScores) -> F64:
    """Log-probability per target token, nats, float64 [I]; NaN for an empty target."""
    return np.where(scores.n_tokens > 0, scores.logprob / np.maximum(scores.n_tokens, 1), np.nan)
