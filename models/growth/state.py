"""A weight with its optimizer state, and what a new weight's is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from motet.models.architecture import WeightSpec
from motet.models.growth.axes import AxisMap, Scale

WeightState = dict[str, Tensor]
"""A weight and its optimizer state: "weight", "exp_avg", "exp_avg_sq" and "step"; the last three
may be missing.
"""
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str], WeightState]
"""Gives a weight of the old model, by name."""


class Moments(Enum):
    """What becomes of AdamW's state (`m`, `v`, `step`) when a weight is made anew."""

    KEEP = "keep"
    """Mapped as the gradient is: a weight that is copied r times has m / r and v / r^2. Step
    stays."""
    TILE = "tile"
    """Copied as they are, to each copy. Step stays."""
    DROP = "drop"
    """Zeros; the step begins again, and with it the correction for it."""
    ASYMMETRIC = "asymmetric"
    """The old part as it was, zeros in what is new; step stays where some of it is old. What
    breaks the symmetry of copies (arXiv:2602.02472)."""


class Contribution(NamedTuple):
    """A weight of the old model that a new one is made of.

    Attributes:
        source: its name.
        maps: of each dimension; None = as it is, () = all of them.
        weight: that it is multiplied with, moments too.
    """

    source: str
    maps: tuple[AxisMap | None, ...] = ()
    weight: float = 1.0

    def mapped(self, x: Tensor, scale: Scale) -> Tensor:
        """Return what it contributes; a view where nothing is mapped."""
        for dimension, axis in enumerate(self.maps):
            x = x if axis is None else axis.apply(x, dimension, scale)
        return x if self.weight == 1.0 else x * self.weight

    @property
    def is_whole(self) -> bool:
        """Whether it contributes all of the old weight, number for number."""
        return self.weight == 1.0 and all(axis is None for axis in self.maps)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one weight of the new model is made.

    Attributes:
        weight: what it is.
        parts: the sum of them is its value; () where it begins anew.
        moments: what becomes of its optimizer state.
        begin: gives the first value of a weight without parts.
        add: what is added to the value, given it.
        shape: puts value and moments into the weight's shape, where parts have another.
    """

    weight: WeightSpec
    parts: tuple[Contribution, ...]
    moments: Moments
    begin: Callable[[], Tensor] | None = None
    add: Callable[[Tensor], Tensor] | None = None
    shape: Callable[[Tensor], Tensor] | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the value is that of one old weight, number for number."""
        plain = len(self.parts) == 1 and self.add is None and self.shape is None
        return plain and self.parts[0].is_whole

    def make(self, read: Read) -> WeightState:
        """Return the new weight, and its optimizer state where the old ones have theirs."""
        if not self.parts:
            assert self.begin is not None
            return fresh(self.begin())
        states = [read(part.source) for part in self.parts]
        value = self._sum(states, "weight", "value")
        if self.add is not None:
            value.add_(self.add(value))
        state = {"weight": value}
        if all("step" in old for old in states):
            state |= self._moments(states, value)
        return state

    def new_elements(self) -> Tensor | None:
        """Return where the values are new or copies, bool of the weight's shape; None where all
        are old.
        """
        if not self.parts:
            return torch.ones(self.weight.shape, dtype=torch.bool)
        old = self._old()
        return None if old is None else ~old

    def _sum(self, states: Iterable[WeightState], key: str, scale: Scale) -> Tensor:
        total: Tensor | None = None
        # A copy stays what it is, to the last bit.
        rooted = key == "exp_avg_sq" and not self.is_copy
        for part, state in zip(self.parts, states, strict=True):
            x = state[key].sqrt() if rooted else state[key]
            y = part.mapped(x, scale)
            # A new weight shares no memory with an old one, nor with another that is made of it.
            y = y.clone() if y.data_ptr() == state[key].data_ptr() else y
            total = y if total is None else total.add_(y)
        assert total is not None
        total = total if self.shape is None else self.shape(total)
        return total.square_() if rooted else total

    def _moments(self, states: list[WeightState], value: Tensor) -> WeightState:
        if self.moments is Moments.DROP:
            return fresh(value) | {"weight": value}
        scale: Scale = "moment" if self.moments is Moments.KEEP else "mean"
        found = {key: self._sum(states, key, scale) for key in MOMENTS}
        old = self._old() if self.moments is Moments.ASYMMETRIC else None
        if old is not None:
            found = {key: moment.mul_(old) for key, moment in found.items()}
        step = torch.stack([state["step"] for state in states]).amax(0)
        return found | {"step": step}

    def _old(self) -> Tensor | None:
        """Return where all indices of an element are old ones; None where they are everywhere."""
        masks: list[tuple[int, Tensor]] = [
            (dimension, axis.old_N)
            for dimension, axis in enumerate(self.parts[0].maps)
            if axis is not None and not bool(axis.old_N.all())
        ]
        if self.shape is not None:  # made of other parts: new all over
            return torch.zeros(self.weight.shape, dtype=torch.bool)
        if not masks:
            return None
        old = torch.ones((1,) * len(self.parts[0].maps), dtype=torch.bool)
        for dimension, mask_N in masks:
            old = old & mask_N.view([-1 if i == dimension else 1 for i in range(old.ndim)])
        return old.expand(self.weight.shape)


def fresh(value: Tensor) -> WeightState:
    """Return a weight with the state of an optimizer that has seen nothing."""
    zeros = {key: torch.zeros_like(value) for key in MOMENTS}
    return {"weight": value, **zeros, "step": torch.zeros((), dtype=torch.float32)}


def weights_of(states: Iterable[tuple[str, WeightState]]) -> dict[str, Tensor]:
    """Return the weights alone, as `Decoder.load_state_dict` takes them."""
    return {name: state["weight"] for name, state in states if "weight" in state}


def states_of(weights: Mapping[str, Tensor]) -> list[tuple[str, WeightState]]:
    """Return weights as states without an optimizer."""
    return [(name, {"weight": weight}) for name, weight in weights.items()]
