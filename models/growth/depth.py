"""Operators that add layers: each new layer is a copy of an old one, or begins anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from motet.core.errors import Problem
from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig
from motet.models.decoder import initial_value
from motet.models.growth.growth import Growth, Mapped
from motet.models.growth.operator import (
    DEPTH,
    TIES,
    GrowthOperator,
    OperatorFacts,
    kind_problems,
    layer_of,
    old_name,
)
from motet.models.growth.state import Contribution, Moments, Recipe


def stacked(depth: int, wanted: int) -> list[int]:
    """Return the old layer of each new one: the whole stack again and again (G_stack)."""
    return [layer % depth for layer in range(wanted)]


def interpolated(depth: int, wanted: int, period: int = 1) -> list[int]:
    """Return the old layer of each new one: each old layer stays in its place, and its copies
    follow it (Apollo).

    Args:
        period: layers that stay together, where every period-th has experts; both depths must be
            multiples of it, else it is 1.
    """
    if depth % period or wanted % period:
        period = 1
    groups, more = depth // period, wanted // period
    return [group * groups // more * period + at for group in range(more) for at in range(period)]


def appended(depth: int, wanted: int) -> list[int]:
    """Return the old layer of each new one: the old ones first, then as the last ones again."""
    added = wanted - depth
    return [*range(depth), *(depth - 1 - (added - 1 - i) % depth for i in range(added))]


def first_copies(layers: Sequence[int]) -> list[bool]:
    """Return of each new layer whether its old one lives on in it: the first of its copies."""
    return [old not in layers[:new] for new, old in enumerate(layers)]


@dataclass(frozen=True)
class DepthOperator(GrowthOperator):
    """An operator that gives every new layer an old one to stand for."""

    @abstractmethod
    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """Return the old layer that each new one stands for."""

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if target.n_layers <= source.n_layers:
            why = (
                f"{target.n_layers} is not more than the {source.n_layers} there are; "
                f"take {source.n_layers + 1} or more, such as {2 * source.n_layers}"
            )
            return [Problem("n_layers", why)]
        return kind_problems(source, target, self.layers(source, target))

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        layers = self.layers(source, target)
        recipe = partial(self._recipe, source, target, layers, first_copies(layers))
        exact, frozen = self.is_exact(), self.frozen(source, target)
        return Mapped(source, target, recipe, tuple(layers), exact, frozen)

    def is_exact(self) -> bool:
        """Return whether new layers change nothing."""
        return False

    def frozen(self, source: ModelConfig, target: ModelConfig) -> frozenset[str]:
        """Return the weights that train no further."""
        return frozenset()

    def begins(self, weight: WeightSpec, target: ModelConfig) -> Callable[[], Tensor] | None:
        """Return what gives a weight of an added layer its value; None = the old one's."""
        return None

    def _recipe(
        self,
        source: ModelConfig,
        target: ModelConfig,
        layers: list[int],
        first: list[bool],
        weight: WeightSpec,
    ) -> Recipe:
        layer = layer_of(weight.name)
        added = layer is not None and not first[layer]
        begin = self.begins(weight, target) if added else None
        if begin is not None:
            return Recipe(weight, (), Moments.DROP, begin)
        name = old_name(weight.name, layers, source)
        assert name is not None
        rule = Moments.DROP if added and self.rule is Moments.ASYMMETRIC else self.rule
        return Recipe(weight, (Contribution(name),), rule)


@dataclass(frozen=True)
class Stack(DepthOperator):
    """New layer i is layer i mod L: the whole stack again, in order (G_stack, growth factor 4)."""

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="stack",
        source="G_stack, arXiv:2405.15319, and tongxuluo/prts",
        exact="never",
        loss_jump_nats=2.0,
        jump_seen="1.33 published (bert2BERT width and stack, 1.3B to 7B); 0.25 at 1M parameters. "
        "The rise does not predict the final loss",
        symmetry="copies stand in other places, so their gradients differ from the first step",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published; keep: each copy takes its layer's",
        changes=(*DEPTH, *TIES),
    )

    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """See `DepthOperator.layers`."""
        return stacked(source.n_layers, target.n_layers)


@dataclass(frozen=True)
class Interpolate(DepthOperator):
    """New layer i is layer floor(i L / L'): copies stand beside their originals (Apollo).

    Where experts are in every n-th layer, n layers stay together.
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="interpolate",
        source="Apollo, arXiv:2401.09192, algorithm of its public trainer",
        exact="never",
        loss_jump_nats=1.0,
        jump_seen="0.34 published (bert2BERT width and interpolation); 0.32 at 1M parameters",
        symmetry="copies stand in other places, so their gradients differ from the first step",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published; keep: each copy takes its layer's",
        changes=(*DEPTH, *TIES),
    )

    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """See `DepthOperator.layers`."""
        return interpolated(source.n_layers, target.n_layers, source.moe_every)


@dataclass(frozen=True)
class IdentityBlocks(DepthOperator):
    """Added layers are copies of the one before them that write nothing yet: what writes to the
    residual stream begins at zero.

    With the norm before a sub-layer that is its last projection; with the norm after it, the norm's
    gain (the gradient through the norm of a zero would be 1 / sqrt(eps) times too large).
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="identity",
        source="zero-initialized blocks: G_zero of arXiv:2405.15319; LLaMA Pro, arXiv:2401.02415",
        exact="always",
        loss_jump_nats=0.0,
        jump_seen="exact",
        symmetry="none is there: an added layer writes nothing, its original does",
        moments=Moments.ASYMMETRIC,
        state="old layers keep m, v and step; added ones begin with zeros and step 0",
        changes=(*DEPTH, *TIES),
    )

    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """See `DepthOperator.layers`."""
        return interpolated(source.n_layers, target.n_layers, source.moe_every)

    def is_exact(self) -> bool:
        """See `DepthOperator.is_exact`."""
        return True

    def begins(self, weight: WeightSpec, target: ModelConfig) -> Callable[[], Tensor] | None:
        """See `DepthOperator.begins`."""
        return partial(torch.zeros, weight.shape) if _writes(weight, target) else None


@dataclass(frozen=True)
class FrozenSubstrate(DepthOperator):
    """New layers on top of old ones that train no further, nor does the embedding.

    Attributes:
        begin: of added layers: "random", as published; "zero": they write nothing at first.
    """

    begin: str = "random"

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="frozen-substrate",
        source="Growing Transformers, arXiv:2507.07129",
        exact="with begin: zero",
        loss_jump_nats=1.0,
        jump_seen="0.00 at 1M parameters, where added layers begin near zero",
        symmetry="none is there: added layers are no copies",
        moments=Moments.ASYMMETRIC,
        state="final norm and head keep m, v and step; added layers begin with zeros and step 0; "
        "what is frozen keeps its own for a later thaw",
        changes=(*DEPTH, *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if self.begin not in ("random", "zero"):
            return [Problem("begin", f"{self.begin!r} is not one of random, zero")]
        if target.tied_embeddings:
            why = (
                "is true: the embedding would freeze the head with it; set it to false, which "
                "gives the head its own copy"
            )
            return [Problem("tied_embeddings", why)]
        return super().own_problems(source, target)

    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """See `DepthOperator.layers`."""
        return appended(source.n_layers, target.n_layers)

    def is_exact(self) -> bool:
        """See `DepthOperator.is_exact`."""
        return self.begin == "zero"

    def begins(self, weight: WeightSpec, target: ModelConfig) -> Callable[[], Tensor] | None:
        """See `DepthOperator.begins`."""
        if self.begin == "zero" and _writes(weight, target):
            return partial(torch.zeros, weight.shape)
        return partial(initial_value, weight.name, weight.shape, target, self.seed)

    def frozen(self, source: ModelConfig, target: ModelConfig) -> frozenset[str]:
        """See `DepthOperator.frozen`."""
        old = ("embedding.", *(f"blocks.{layer}." for layer in range(source.n_layers)))
        return frozenset(w.name for w in named_weights(target) if w.name.startswith(old))


@dataclass(frozen=True)
class Incremental(FrozenSubstrate):
    """Layer by layer: added layers train alone while all others are frozen, then all train.

    A negative baseline: it needs more compute than training the whole model from the start
    (arXiv:2411.18700). `Growth.frozen` holds for the first half of each of its stages.
    """

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="incremental",
        source="incremental layer-wise training, arXiv:2411.18700",
        exact="with begin: zero",
        loss_jump_nats=1.0,
        jump_seen="0.00 at 1M parameters, where added layers begin near zero",
        symmetry="none is there: added layers are no copies",
        moments=Moments.ASYMMETRIC,
        state="as frozen-substrate; all weights train in the second half of a stage",
        changes=(*DEPTH, *TIES),
        negative=True,
    )


def _writes(weight: WeightSpec, target: ModelConfig) -> bool:
    """Tell whether a weight writes what its sub-layer adds to the residual stream."""
    name = weight.name
    if target.norm_position == "post":
        return name.endswith(("attention_norm.weight", "feed_forward_norm.weight"))
    return "o_proj" in name or "down_proj" in name
