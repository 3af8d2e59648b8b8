"""The V-cycle: a large model is made small, the small one trains, and the large one takes half of
what it learned (arXiv:2404.07999).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from motet.core.errors import Problem
from motet.models.architecture import WeightSpec
from motet.models.config import ModelConfig
from motet.models.growth.axes import AxisMap, Copies, axis_of, copies, reads
from motet.models.growth.depth import first_copies, interpolated
from motet.models.growth.growth import Growth, Mapped
from motet.models.growth.operator import (
    DEPTH,
    WIDTH,
    GrowthOperator,
    OperatorFacts,
    kind_problems,
    layer_of,
    old_name,
)
from motet.models.growth.state import (
    MOMENTS,
    Contribution,
    Moments,
    Read,
    Recipe,
    WeightState,
    fresh,
)
from motet.models.growth.width import (
    Widths,
    axis_sizes,
    setting_of,
    uneven_factor,
    widths_of,
)


@dataclass(frozen=True)
class Levels(GrowthOperator):
    """A move between two levels: every axis, and the depth, a whole factor apart.

    Channels j, j + n, j + 2 n of the large model are channel j of the small one, and so are heads
    and places in groups of query heads; neighbouring layers are one.

    Attributes:
        embedding: "mean": what the embedding writes is copied, and averaged on the way down, as
            everything that is written; a tied head's factor lies in the last norm. "published":
            halved copies and sums, as the published code has it for tied models: it keeps the
            scale of the head and halves what the blocks read, so that the move changes the model.
    """

    embedding: str = "mean"

    def small_and_large(
        self, source: ModelConfig, target: ModelConfig
    ) -> tuple[ModelConfig, ModelConfig]:
        """Return the small model's config and the large one's."""
        return (target, source) if self.facts.shrinks else (source, target)

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if self.embedding not in ("mean", "published"):
            return [Problem("embedding", f"{self.embedding!r} is not one of mean, published")]
        if self.embedding == "published" and not target.tied_embeddings:
            why = "'published' is for a head that is tied to the embedding; use mean"
            return [Problem("embedding", why)]
        small, large = self.small_and_large(source, target)
        if large.n_layers % small.n_layers:
            why = f"{large.n_layers} is not a whole number of times {small.n_layers}"
            return [Problem("n_layers", f"{why}; levels are a whole factor apart, such as 2")]
        layers = interpolated(small.n_layers, large.n_layers, small.moe_every)
        if found := kind_problems(small, large, layers, widths=False):
            return found
        first = [new for new, is_first in enumerate(first_copies(layers)) if is_first]
        uneven = [
            f"layer {new} has {large.ffn_width(new)} hidden channels, its neighbour "
            f"{large.ffn_width(first[old])}; layers that are one must be alike"
            for new, old in enumerate(layers)
            if large.ffn_width(new) != large.ffn_width(first[old])
        ]
        if uneven:
            return [Problem("layer_ffn", uneven[0])]
        return _width_problems(small, _shallow(large, layers, small))

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        small, large = self.small_and_large(source, target)
        layers = interpolated(small.n_layers, large.n_layers, small.moe_every)
        shallow = _shallow(large, layers, small)
        every = [
            widths_of(small, shallow, layer, lambda _, old, new: copies(old, new))
            for layer in range(small.n_layers)
        ]
        recipe = partial(self.recipe, source, layers, every)
        stand_for = [layers.index(old) for old in range(small.n_layers)]
        exact = (
            not self.facts.shrinks and small.n_layers == large.n_layers and self.embedding == "mean"
        )
        return Mapped(source, target, recipe, tuple(self.olds(layers, stand_for)), exact)

    def olds(self, layers: list[int], first: list[int]) -> list[int]:
        """Return the old layer of each new one, of which it has its kind and balance.

        Args:
            layers: the small model's layer of each of the large one's.
            first: the first of the large model's layers of each of the small one's.
        """
        return first if self.facts.shrinks else layers

    def recipe(
        self, source: ModelConfig, layers: list[int], every: Sequence[Widths], weight: WeightSpec
    ) -> Recipe:
        """Return how a weight is made."""
        layer = layer_of(weight.name)
        shrinks = self.facts.shrinks
        small = layer if shrinks or layer is None else layers[layer]
        maps = tuple(
            self._map(weight, dimension, every[small or 0], source.tied_embeddings)
            for dimension in range(len(weight.shape))
        )
        if shrinks and layer is not None:
            olds = [large for large, of in enumerate(layers) if of == layer]
            rest = weight.name.split(".", 2)[2]
            parts = [Contribution(f"blocks.{old}.{rest}", maps, 1 / len(olds)) for old in olds]
            return Recipe(weight, tuple(parts), self.rule)
        name = old_name(weight.name, layers, source)
        assert name is not None
        return Recipe(weight, (Contribution(name, maps),), self.rule)

    def _map(
        self, weight: WeightSpec, dimension: int, widths: Widths, tied: bool
    ) -> AxisMap | None:
        grown = widths.get(axis_of(weight, dimension))
        if grown is None:
            return None
        # What carries the factor of a tied head: the last norm, or as published the table.
        carries = "norm.weight" if self.embedding == "mean" else "embedding.weight"
        reading = reads(weight, dimension) or (tied and weight.name == carries)
        return _merged(grown, reading) if self.facts.shrinks else _copied(grown, reading)


def _width_problems(small: ModelConfig, large: ModelConfig) -> list[Problem]:
    for layer in range(small.n_layers):
        sizes = axis_sizes(large, layer)
        for axis, old in axis_sizes(small, layer).items():
            setting, new = setting_of(axis, large), sizes[axis]
            if why := uneven_factor(axis, old, new):
                return [Problem(setting, why)]
            if new < old:
                why = f"the large model has {new} ({axis}), the small one {old}"
                return [Problem(setting, f"{why}; the small one must have no more")]
    return []


def _merged(grown: Copies, reading: bool) -> AxisMap:
    return grown.merged_inputs() if reading else grown.merged_outputs()


def _copied(grown: Copies, reading: bool) -> AxisMap:
    return grown.inputs() if reading else grown.outputs()


def _shallow(large: ModelConfig, layers: list[int], small: ModelConfig) -> ModelConfig:
    """Return a config as wide as the large one, and as deep as the small one."""
    widths = None
    if large.layer_ffn is not None:
        widths = tuple(large.layer_ffn[layers.index(old)] for old in range(small.n_layers))
    return replace(
        large,
        n_layers=small.n_layers,
        layer_ffn=widths,
        n_dense_layers=small.n_dense_layers,
        moe_every=small.moe_every,
    )


@dataclass(frozen=True)
class Coalesce(Levels):
    """A large model made small: means of what is written, sums of what is read, means of
    neighbouring layers.
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="coalesce",
        source="Multi-Level Training Framework, arXiv:2404.07999, and its public code",
        exact="never, but of a model that was de-coalesced",
        loss_jump_nats=8.0,
        jump_seen="a trained model's channels have nothing in common: the small one begins near "
        "where it knows nothing",
        symmetry="nothing is copied",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published; keep: sums of m over what is written, means "
        "over what is read",
        changes=(*WIDTH, *DEPTH),
        shrinks=True,
    )


@dataclass(frozen=True)
class Decoalesce(Levels):
    """A small model made large again: tiles of its channels, each of its layers twice.

    Coalescing what it gives returns the small model.
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="decoalesce",
        source="Multi-Level Training Framework, arXiv:2404.07999, and its public code",
        exact="in width; layers that stand twice are not",
        loss_jump_nats=1.0,
        jump_seen="that of interpolate where layers are doubled; exact in width",
        symmetry="by `blended`: a share of the large model, whose channels differ",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published; keep: as hypercloning",
        changes=(*WIDTH, *DEPTH),
    )


def digests(states: Iterable[tuple[str, WeightState]]) -> dict[str, str]:
    """Return the SHA-256 of every weight: what `blended` knows the large model by."""
    return {name: _digest(state["weight"]) for name, state in states if "weight" in state}


def blended(
    large: Read,
    known: Mapping[str, str],
    states: Iterable[tuple[str, WeightState]],
    alpha: float = 0.25,
) -> Iterator[tuple[str, WeightState]]:
    """Yield (1 - alpha) x the large model + alpha x what the small one was de-coalesced into.

    The optimizer begins anew, as published. alpha below 1 breaks the symmetry of copies.

    Args:
        large: gives the weights of the model that was coalesced, as it was then.
        known: their `digests`, taken then. (The published script blends with a finished baseline
            of 100,000 steps instead.)
        states: what `grow` yields of the de-coalesced model.
        alpha: from 0 to 1; published: .25, and .5 for GPT-2.

    Raises:
        ValueError: another model than the one that was coalesced, or another alpha.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} is not a share from 0 to 1; published are .25 and .5")
    for name, state in states:
        if "weight" not in state:  # the balance of a mixture
            yield name, state
            continue
        before = large(name)["weight"]
        if known.get(name) != _digest(before):
            raise ValueError(
                f"{name} is not that of the model that was coalesced; blend with the checkpoint "
                "that the cycle began from"
            )
        value = before * (1 - alpha) + state["weight"] * alpha
        yield name, fresh(value) if MOMENTS[0] in state else {"weight": value}


def _digest(weight: Tensor) -> str:
    content = weight.detach().cpu().contiguous().numpy()
    return hashlib.sha256(content.view("uint8").data).hexdigest()
