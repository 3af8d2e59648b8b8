"""A growth: how every weight of one model is made of the weights of another, tensor by tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig
from motet.models.growth.state import (
    Read,
    Recipe,
    WeightState,
    states_of,
    weights_of,
)

BALANCE = ("frequencies", "bias")
"""What a mixture keeps beside its weights: `MoE.state`, under the name "frequencies.blocks.N"."""


class Growth(ABC):
    """What makes the weights and the optimizer state of one model of those of another.

    Attributes:
        source, target: the configs of both.
        exact: the new model computes what the old one does: in exact arithmetic the same logits.
        frozen: names of weights that train no further; () where all do.
    """

    source: ModelConfig
    target: ModelConfig
    exact: bool
    frozen: frozenset[str]

    @abstractmethod
    def sources(self, name: str) -> tuple[str, ...]:
        """Return the names of the old weights that a new one is made of."""

    @abstractmethod
    def make(self, name: str, read: Read) -> WeightState:
        """Return a new weight with its optimizer state, sharing no memory with what is read."""

    @abstractmethod
    def new_elements(self, name: str) -> Tensor | None:
        """Return where a weight is new, or a copy of what stands elsewhere in it: bool of its
        shape, None where it is old everywhere. Rules for the learning rate after growth read it.
        """

    @abstractmethod
    def local_source(self, name: str) -> str | None:
        """Return the old weight that a new one equals number for number; None where none.

        Such a weight, with its optimizer state, can be copied shard by shard.
        """

    def names(self) -> list[str]:
        """Return every weight of the new model in the order of its state, then the balance of its
        mixtures.
        """
        layers = [layer for layer in range(self.target.n_layers) if self.target.has_experts(layer)]
        balance = [f"{kind}.blocks.{layer}" for layer in layers for kind in BALANCE]
        return [weight.name for weight in named_weights(self.target)] + balance


@dataclass(frozen=True, eq=False)
class Mapped(Growth):
    """A growth that has a recipe for every weight.

    Attributes:
        recipe: gives that of a weight of the new model.
        layers: of each new layer the old one that it stands for; None where it begins anew.
    """

    source: ModelConfig
    target: ModelConfig
    recipe: Callable[[WeightSpec], Recipe]
    layers: tuple[int | None, ...]
    exact: bool = False
    frozen: frozenset[str] = frozenset()
    _weights: dict[str, WeightSpec] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = {weight.name: weight for weight in named_weights(self.target)}
        object.__setattr__(self, "_weights", weights)

    def sources(self, name: str) -> tuple[str, ...]:
        """See `Growth.sources`."""
        if name in self._weights:
            parts = self.recipe(self._weights[name]).parts
            return tuple(dict.fromkeys(part.source for part in parts))
        kind, _, layer = name.partition(".blocks.")
        old = self.layers[int(layer)]
        same = old is not None and self._balance_stays(old)
        return (f"{kind}.blocks.{old}",) if same else ()

    def make(self, name: str, read: Read) -> WeightState:
        """See `Growth.make`."""
        if name in self._weights:
            return self.recipe(self._weights[name]).make(read)
        if sources := self.sources(name):
            return {"value": read(sources[0])["value"].clone()}
        n_experts = self.target.n_experts
        even = 1.0 / n_experts if name.startswith("frequencies") else 0.0
        return {"value": torch.full((n_experts,), even)}

    def new_elements(self, name: str) -> Tensor | None:
        """See `Growth.new_elements`."""
        return self.recipe(self._weights[name]).new_elements()

    def local_source(self, name: str) -> str | None:
        """See `Growth.local_source`."""
        recipe = self.recipe(self._weights[name])
        return recipe.parts[0].source if recipe.is_copy else None

    def _balance_stays(self, old: int) -> bool:
        return self.source.has_experts(old) and self.source.n_experts == self.target.n_experts


@dataclass(frozen=True, eq=False)
class Chained(Growth):
    """One growth after another: of a weight of the model between them there is one at a time."""

    first: Growth
    second: Growth

    @property
    def source(self) -> ModelConfig:  # type: ignore[override]
        """The config before both."""
        return self.first.source

    @property
    def target(self) -> ModelConfig:  # type: ignore[override]
        """The config after both."""
        return self.second.target

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether both are."""
        return self.first.exact and self.second.exact

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """What the last one freezes."""
        return self.second.frozen

    def sources(self, name: str) -> tuple[str, ...]:
        """See `Growth.sources`."""
        found = [
            old for between in self.second.sources(name) for old in self.first.sources(between)
        ]
        return tuple(dict.fromkeys(found))

    def make(self, name: str, read: Read) -> WeightState:
        """See `Growth.make`."""
        return self.second.make(name, lambda between: self.first.make(between, read))

    def new_elements(self, name: str) -> Tensor | None:
        """See `Growth.new_elements`."""
        between = self.second.local_source(name)
        new = self.second.new_elements(name)
        earlier = None if between is None else self.first.new_elements(between)
        if new is None or earlier is None:
            return earlier if new is None else new
        return new | earlier

    def local_source(self, name: str) -> str | None:
        """See `Growth.local_source`."""
        between = self.second.local_source(name)
        return None if between is None else self.first.local_source(between)


def grow(
    growth: Growth, states: Iterable[tuple[str, WeightState]]
) -> Iterator[tuple[str, WeightState]]:
    """Yield every weight of the new model as soon as what it is made of has come.

    What comes is held until its last use. Where each new weight is made of one old one, that is one
    tensor, with its optimizer state; operators that mix layers hold those layers.

    Args:
        states: the old model's weights in any order, fp32 on the CPU, as `Engine.export_state`
            yields them; `Engine.import_state` takes what comes out.

    Raises:
        ValueError: an old weight is missing.
    """
    waiting = {name: set(growth.sources(name)) for name in growth.names()}
    uses = Counter(old for olds in waiting.values() for old in olds)
    users = defaultdict(list)
    for name, olds in waiting.items():
        for old in olds:
            users[old].append(name)
    held: dict[str, WeightState] = {}
    for name in [name for name, olds in waiting.items() if not olds]:
        del waiting[name]
        yield name, growth.make(name, held.__getitem__)
    for old, state in states:
        if old in users:
            held[old] = state
        for name in users.pop(old, ()):
            waiting[name].discard(old)
            if waiting[name]:
                continue
            del waiting[name]
            yield name, growth.make(name, held.__getitem__)
            uses.subtract(growth.sources(name))
            for used in growth.sources(name):
                if uses[used] == 0:
                    del held[used]
    _refuse_missing(waiting)


def _refuse_missing(waiting: Mapping[str, set[str]]) -> None:
    """Refuse to leave a weight out; weights alone come without the balance of their mixtures."""
    lacking = {old for name, olds in waiting.items() for old in olds if not _is_balance(name)}
    if lacking:
        raise ValueError(f"the state lacks {', '.join(sorted(lacking))}")


def _is_balance(name: str) -> bool:
    return name.partition(".")[0] in BALANCE


def grown(growth: Growth, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the new model's weights from the old one's, without optimizer state."""
    return weights_of(grow(growth, states_of(weights)))
