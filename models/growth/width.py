"""Operators that widen: the stream, heads, hidden channels of feed-forwards and of experts.

A channel of a longer axis is a copy of an old one. What writes an axis copies, what reads it weighs
the copies so that they add up. Query heads are copied inside their groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from motet.core.errors import Problem
from motet.models.architecture import WeightSpec
from motet.models.config import ModelConfig
from motet.models.growth.axes import AxisMap, Copies, axis_of, copies, reads
from motet.models.growth.growth import Growth, Mapped
from motet.models.growth.operator import (
    TIES,
    WIDTH,
    GrowthOperator,
    OperatorFacts,
    kind_problems,
    layer_of,
    old_name,
)
from motet.models.growth.state import Contribution, Moments, Recipe
from motet.models.keyed import key_of

Widths = Mapping[str, Copies]
"""Of every axis that grows, which old index each new one is a copy of."""


def axis_sizes(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return the size of every axis that may grow: of heads in heads, of "queries" in query heads
    of each key-value head.
    """
    sizes = {
        "stream": config.d_model,
        "keys": config.n_kv_heads,
        "queries": config.n_heads // config.n_kv_heads,
    }
    if config.has_experts(layer):
        sizes |= {"expert": config.expert_width, "shared": config.shared_width}
    else:
        sizes["hidden"] = config.ffn_width(layer)
    return sizes


def widths_of(
    source: ModelConfig,
    target: ModelConfig,
    layer: int,
    copied: Callable[[str, int, int], Copies],
) -> dict[str, Copies]:
    """Return the copies along every axis of block `layer` that grows, in channels.

    Args:
        copied: gives those of an axis from one size to another.
    """
    old, new = axis_sizes(source, layer), axis_sizes(target, layer)

    def made(axis: str) -> Copies:
        return copied(axis, old[axis], new[axis])

    found = {axis: made(axis) for axis in old if old[axis] != new[axis]}
    keys, inner = made("keys"), made("queries")
    width = source.head_width
    if "keys" in found or "queries" in found:
        found["queries"] = keys.within(inner).channels(width)
    if "keys" in found:
        found["keys"] = keys.channels(width)
    return found


@dataclass(frozen=True)
class WidthOperator(GrowthOperator):
    """An operator that copies channels; layers stay as many."""

    chosen: ClassVar[str] = "cyclic"

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        layers = range(source.n_layers)
        if found := kind_problems(source, target, layers, widths=False):
            return found
        for layer in layers:
            old, new = axis_sizes(source, layer), axis_sizes(target, layer)
            for axis, size in new.items():
                why = self.axis_problem(axis, old[axis], size)
                if why:
                    return [Problem(setting_of(axis, target), why)]
        return []

    def axis_problem(self, axis: str, old: int, new: int) -> str:
        """Say why an axis cannot become that long; "" where it can."""
        if new >= old:
            return ""
        if axis == "queries":
            return (
                f"would leave {new} query heads to a key-value head, which has {old}; keep "
                f"n_heads / n_kv_heads at {old} or more"
            )
        return f"{new} is less than the {old} there are; an operator that widens takes no less"

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        every = [widths_of(source, target, layer, self.copied) for layer in range(source.n_layers)]
        recipe = partial(self.recipe, source, target, every)
        exact = all(self.is_exact(target, widths) for widths in every)
        return Mapped(source, target, recipe, tuple(range(source.n_layers)), exact)

    def copied(self, axis: str, old: int, new: int) -> Copies:
        """Return which old index each one of a longer axis is a copy of."""
        return copies(old, new, self._chosen(), "growth", self.seed, axis)

    def is_exact(self, target: ModelConfig, widths: Widths) -> bool:
        """Return whether a block computes the same: a norm's mean must stay, so that every channel
        of what it normalizes has as many copies.
        """
        normed = ["stream", *(["queries", "keys"] if target.qk_norm == "full" else [])]
        return all(widths[axis].even for axis in normed if axis in widths)

    def fan_in(self, grown: Copies) -> Tensor | None:
        """Return by how much a weight that reads an axis is scaled, fp32 [N]; None = 1 / copies."""
        return None

    def recipe(
        self, source: ModelConfig, target: ModelConfig, every: Sequence[Widths], weight: WeightSpec
    ) -> Recipe:
        """Return how a weight is made."""
        layer = layer_of(weight.name)
        name = old_name(weight.name, range(source.n_layers), source)
        assert name is not None
        maps = self.maps(weight, every[layer or 0], target.tied_embeddings)
        return Recipe(weight, (Contribution(name, maps),), self.rule)

    def maps(self, weight: WeightSpec, widths: Widths, tied: bool) -> tuple[AxisMap | None, ...]:
        """Return how every dimension of a weight grows."""
        found: list[AxisMap | None] = []
        for dimension in range(len(weight.shape)):
            grown = widths.get(axis_of(weight, dimension))
            # A tied head copies what it reads, as the embedding must: the last norm weighs it.
            last = tied and weight.name == "norm.weight"
            if grown is None:
                found.append(None)
            elif last or reads(weight, dimension):
                found.append(grown.inputs(self.fan_in(grown)))
            else:
                found.append(grown.outputs())
        return tuple(found)

    def _chosen(self) -> str:
        return self.chosen


@dataclass(frozen=True)
class HyperCloning(WidthOperator):
    """Every axis whole times as long: tiles that compute the same (HyperCloning).

    Attributes:
        noise: root mean square of what is added to the copies that a weight reads, over that of
            their values. It adds up to zero over the copies of a channel, so nothing changes, and
            copies learn different things. 0: copies stay alike for ever under `keep`, `tile` and
            `drop`.
    """

    noise: float = 0.0

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="hypercloning",
        source="HyperCloning, arXiv:2409.12903, section 3, and apple/ml-hypercloning",
        exact="always; every axis must grow a whole number of times",
        loss_jump_nats=0.0,
        jump_seen="exact",
        symmetry="with noise > 0: opposite noise on copies of what is read; else never, unless "
        "moments: asymmetric",
        moments=Moments.KEEP,
        state="m / r and v / r^2 where what is written is copied r times, which is the gradient's "
        "own law; step stays",
        changes=(*WIDTH, *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if not 0 <= self.noise <= 10:
            return [Problem("noise", f"{self.noise!r} is not a number from 0 to 10; try 0.1")]
        return super().own_problems(source, target)

    def axis_problem(self, axis: str, old: int, new: int) -> str:
        """See `WidthOperator.axis_problem`."""
        why = uneven_factor(axis, old, new)
        if why:
            return f"{why}, or take bert2bert-fpi"
        return super().axis_problem(axis, old, new)

    def recipe(
        self, source: ModelConfig, target: ModelConfig, every: Sequence[Widths], weight: WeightSpec
    ) -> Recipe:
        """See `WidthOperator.recipe`."""
        made = super().recipe(source, target, every, weight)
        last = len(weight.shape) - 1
        grown = every[layer_of(weight.name) or 0].get(axis_of(weight, last))
        if not self.noise or grown is None or not reads(weight, last):
            return made
        return replace(
            made, add=partial(_opposite_noise, weight.name, grown, self.noise, self.seed)
        )


def uneven_factor(axis: str, old: int, new: int) -> str:
    """Say why an axis is not a whole number of times as long as the other; "" where it is."""
    if new < old or new % max(old, 1) == 0:
        return ""
    below = new // old * old
    what = "query heads of a key-value head" if axis == "queries" else axis
    why = f"{new} ({what}) is not a whole number of times {old}"
    return f"{why}; nearest are {below} and {below + old}"


def _opposite_noise(name: str, grown: Copies, ratio: float, seed: int, value: Tensor) -> Tensor:
    """Return noise of a weight's shape that adds up to zero over the copies of each old channel of
    its last dimension, a function of seed and name.
    """
    generator = torch.Generator().manual_seed(key_of("growth noise", seed, name) >> 1)
    noise = torch.empty_like(value).normal_(generator=generator)
    sums = noise.new_zeros(*noise.shape[:-1], grown.size).index_add_(-1, grown.index_N, noise)
    counts_N = grown.counts_N
    noise -= sums.index_select(-1, grown.index_N) / counts_N
    rms = value.square().mean().sqrt()
    # Taking the mean of r numbers away leaves (r - 1) / r of their variance.
    return noise.mul_(ratio * rms * (counts_N / (counts_N - 1).clamp(min=1)).sqrt())


@dataclass(frozen=True)
class Bert2Bert(WidthOperator):
    """Copies of channels for any width; what reads them is divided by their number (bert2BERT,
    function-preserving initialization).

    Attributes:
        choose: of the copies beyond the old channels: "cyclic" or "random".
    """

    choose: str = "cyclic"

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="bert2bert-fpi",
        source="bert2BERT FPI, arXiv:2110.07143, section 3.2; grouped queries as in AquilaMoE",
        exact="where every channel of the stream (and of heads that are normed together) has as "
        "many copies: whole factors, cyclic",
        loss_jump_nats=0.3,
        jump_seen="0.11 published (7B to 16B, not a whole factor)",
        symmetry="never, unless moments: asymmetric",
        moments=Moments.KEEP,
        state="m / c and v / c^2 where what is written has c copies; step stays",
        changes=(*WIDTH, *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if self.choose not in ("cyclic", "random"):
            return [Problem("choose", f"{self.choose!r} is not one of cyclic, random")]
        return super().own_problems(source, target)

    def _chosen(self) -> str:
        return self.choose


@dataclass(frozen=True)
class AdvancedKnowledge(Bert2Bert):
    """As function-preserving initialization, but copies of what a layer writes come from the next
    layer (bert2BERT, advanced knowledge initialization).

    What is copied inside a group of query heads comes from the same places of the next layer's
    group (AKI-Pro). The last layer, and one whose next layer is of another kind, takes its own.
    Gains of the stream's norms and the embedding belong to no layer's rows and stay with theirs.
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="bert2bert-aki",
        source="bert2BERT AKI, arXiv:2110.07143, section 3.3; grouped queries as in AquilaMoE",
        exact="never",
        loss_jump_nats=8.0,
        jump_seen="6.6 published with stack, 4.8 with interpolation (1.3B to 7B); overtakes FPI "
        "later in training",
        symmetry="copies come from the next layer",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published",
        changes=(*WIDTH, *TIES),
    )

    def is_exact(self, target: ModelConfig, widths: Widths) -> bool:
        """See `WidthOperator.is_exact`."""
        return False

    def recipe(
        self, source: ModelConfig, target: ModelConfig, every: Sequence[Widths], weight: WeightSpec
    ) -> Recipe:
        """See `WidthOperator.recipe`."""
        made = super().recipe(source, target, every, weight)
        (part,) = made.parts
        layer = layer_of(weight.name)
        after = None if layer is None else next_layer(source, layer)
        if after is None or weight.name.endswith(("attention_norm.weight", "forward_norm.weight")):
            return made
        written = [
            dimension
            for dimension, axis in enumerate(part.maps)
            if axis is not None and not reads(weight, dimension)
        ]
        if not written:
            return made
        rest = weight.name.split(".", 2)[2]
        parts = []
        for name, mine in ((part.source, True), (f"blocks.{after}.{rest}", False)):
            maps = list(part.maps)
            axis = maps[written[0]]
            assert axis is not None
            maps[written[0]] = axis.masked(axis.old_N if mine else ~axis.old_N)
            parts.append(Contribution(name, tuple(maps)))
        return replace(made, parts=tuple(parts))


def next_layer(source: ModelConfig, layer: int) -> int | None:
    """Return the layer after, where it is there and of the same kind and width."""
    after = layer + 1
    if after == source.n_layers or axis_sizes(source, layer) != axis_sizes(source, after):
        return None
    return after


@dataclass(frozen=True)
class Sparkling(WidthOperator):
    """Copies whose activations keep their root mean square, for any width, with an asymmetric
    reset of the optimizer (SPARKLING).
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="sparkling",
        source="SPARKLING, arXiv:2602.02472",
        exact="where all axes grow a whole number of times",
        loss_jump_nats=0.5,
        jump_seen="0 for whole factors; between them activations keep their size, not their values",
        symmetry="asymmetric reset: the old part keeps m and v, copies begin with zeros, and their "
        "learning rate is warmed up again (1.3 times the current rate, 250 steps)",
        moments=Moments.ASYMMETRIC,
        state="m and v as they were in the old part, zeros in copies; step stays",
        changes=(*WIDTH, *TIES),
        rewarm=(1.3, 250),
    )

    def is_exact(self, target: ModelConfig, widths: Widths) -> bool:
        """See `WidthOperator.is_exact`."""
        return all(grown.even for grown in widths.values())

    def fan_in(self, grown: Copies) -> Tensor:
        """Return 1 / (1 + c) for c >= 1, 1 / sqrt(1 + 3 c) below, where c is the share that was
        added.

        Of d inputs c d stand twice: the variance of a sum is (1 - c) + 4 c times as large.
        """
        c = len(grown.index_N) / grown.size - 1
        scale = 1 / (1 + c) if c >= 1 else (1 + 3 * c) ** -0.5
        return torch.full((len(grown.index_N),), scale)


def setting_of(axis: str, target: ModelConfig) -> str:
    """Return the setting that an axis has its size from."""
    settings = {
        "stream": "d_model",
        "keys": "n_kv_heads",
        "queries": "n_heads",
        "expert": "d_expert",
        "shared": "d_shared",
        "hidden": "d_ffn" if target.layer_ffn is None else "layer_ffn",
    }
    return settings[axis]
