"""Operators whose maps are learned: a hundred steps on the maps, the old weights fixed.

Shared by LiGO and Mango: what is learned is a module, and weights are made of it and of the old
ones, differentiably. Learned, it is a `Growth` like the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from motet.core.errors import Problem
from motet.core.schema import is_number, is_whole
from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.growth.depth import interpolated, stacked
from motet.models.growth.growth import BALANCE, Growth
from motet.models.growth.operator import GrowthOperator, kind_problems
from motet.models.growth.state import Read, WeightState, fresh
from motet.models.growth.width import axis_sizes
from motet.models.keyed import key_of

LAYER_RULES: dict[str, Callable[[int, int], list[int]]] = {
    "stack": stacked,
    "interpolate": interpolated,
}


class LearnedGrowth(Growth):
    """A growth with parameters.

    Attributes:
        maps: what is learned; its state dict is all there is to keep of it.
        layers: the old layer that each new one has its kind of.
    """

    exact = False
    frozen: frozenset[str] = frozenset()

    def __init__(
        self, source: ModelConfig, target: ModelConfig, layers: list[int], maps: nn.ParameterDict
    ) -> None:
        self.source, self.target = source, target
        self.layers, self.maps = layers, maps
        self._weights = {weight.name: weight for weight in named_weights(target)}

    @abstractmethod
    def value(self, weight: WeightSpec, read: Read) -> Tensor:
        """Return a new weight, differentiable in `maps`."""

    @abstractmethod
    def olds(self, weight: WeightSpec) -> tuple[str, ...]:
        """Return the names of the old weights that a new one is made of."""

    def values(self, read: Read) -> dict[str, Tensor]:
        """Return every new weight, differentiable in `maps`."""
        return {name: self.value(weight, read) for name, weight in self._weights.items()}

    def sources(self, name: str) -> tuple[str, ...]:
        """See `Growth.sources`."""
        if name in self._weights:
            return self.olds(self._weights[name])
        kind, _, layer = name.partition(".blocks.")
        assert kind in BALANCE
        return (f"{kind}.blocks.{self.layers[int(layer)]}",)

    @torch.no_grad()
    def make(self, name: str, read: Read) -> WeightState:
        """See `Growth.make`: the optimizer begins anew, as published."""
        if name in self._weights:
            return fresh(self.value(self._weights[name], read).detach().contiguous().clone())
        return {"value": read(self.sources(name)[0])["value"].clone()}

    def new_elements(self, name: str) -> Tensor | None:
        """See `Growth.new_elements`: all are mixed anew."""
        return torch.ones(self._weights[name].shape, dtype=torch.bool)

    def local_source(self, name: str) -> str | None:
        """See `Growth.local_source`: none is a copy."""
        return None


@dataclass(frozen=True)
class LearnedOperator(GrowthOperator):
    """An operator that learns its maps.

    Attributes:
        layers: which old layer each new one begins with, "stack" or "interpolate".
        noise: root mean square of what is added to maps at the beginning.
        steps, lr: of `learn`, as published; Adam (without decay).
        sequences: that each step of `learn` has in a run.
    """

    layers: str = "stack"
    noise: float = 0.03
    steps: int = 100
    lr: float = 1e-3
    sequences: int = 8

    @abstractmethod
    def learned(self, source: ModelConfig, target: ModelConfig, layers: list[int]) -> LearnedGrowth:
        """Return the growth with its maps as they begin."""

    def mapped(self, source: ModelConfig, target: ModelConfig) -> LearnedGrowth:
        """See `GrowthOperator.mapped`: not learned yet."""
        return self.learned(source, target, self.old_layers(source, target))

    def old_layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """Return the old layer that each new one begins with."""
        if self.layers == "interpolate":
            return interpolated(source.n_layers, target.n_layers, source.moe_every)
        return stacked(source.n_layers, target.n_layers)

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if self.layers not in LAYER_RULES:
            return [Problem("layers", f"{self.layers!r} is not one of {', '.join(LAYER_RULES)}")]
        for key in ("steps", "sequences"):
            if not is_whole(value := getattr(self, key)) or value < 1:
                return [Problem(key, f"{value!r} is not a whole number >= 1")]
        if not is_number(self.lr) or self.lr <= 0:
            return [Problem("lr", f"{self.lr!r} is not a number above 0; published: 1e-3")]
        if self.moments not in (None, "drop"):
            why = f"{self.moments!r}: mixed weights have no moments of their own; leave it out"
            return [Problem("moments", why)]
        if target.n_layers < source.n_layers:
            why = f"{target.n_layers} is less than the {source.n_layers} there are"
            return [Problem("n_layers", f"{why}; an operator that grows takes no less")]
        layers = self.old_layers(source, target)
        found = kind_problems(source, target, layers, widths=False)
        return found or _narrower(source, target, layers)

    def draw(self, name: str, *shape: int) -> Tensor:
        """Return noise, a function of seed and name."""
        generator = torch.Generator().manual_seed(key_of("growth maps", self.seed, name) >> 1)
        return torch.empty(*shape).normal_(0, 1, generator=generator) * self.noise


def _narrower(source: ModelConfig, target: ModelConfig, layers: list[int]) -> list[Problem]:
    for new, old in enumerate(layers):
        sizes = axis_sizes(target, new)
        for axis, size in axis_sizes(source, old).items():
            if sizes[axis] < size:
                why = f"{axis} of layer {new} would shrink from {size} to {sizes[axis]}"
                return [Problem("width", f"{why}; an operator that grows takes no less")]
    return []


def learn(
    growth: LearnedGrowth,
    weights: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float,
    warmup: int = 10,
) -> list[float]:
    """Train a growth's maps on batches (tokens, labels [B, T]), one step each; return the losses
    (mean cross-entropy, nats).

    Gradients reach the maps alone: the old weights are constants, and the new ones are made anew in
    every step. Memory: old weights, new ones, and a gradient of the new.

    Raises:
        ModelError: a loss that is no number.
    """
    frozen = {name: {"weight": weight.detach()} for name, weight in weights.items()}
    with torch.device("meta"):
        model = Decoder(growth.target)
    optimizer = torch.optim.Adam(growth.maps.parameters(), lr=lr)
    losses = []
    for step, (tokens_BT, labels_BT) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(warmup, 1))
        values = growth.values(frozen.__getitem__)
        sums = functional_call(model, values, (tokens_BT, labels_BT), {"mode": "loss"})
        loss = sums.cross_entropy / sums.n_labels
        if not bool(torch.isfinite(loss)):
            why = f"loss {float(loss)} in step {step + 1} of learning the maps"
            raise ModelError(f"{why}; lower lr, which is {lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
