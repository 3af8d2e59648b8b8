"""Upcycling: a mixture of experts made of a dense model (arXiv:2410.07524).

E experts, G shards that the feed-forward is cut into, F hidden width of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from motet.core.errors import Problem
from motet.models.architecture import WeightSpec
from motet.models.config import ModelConfig
from motet.models.growth.axes import AxisMap
from motet.models.growth.growth import Growth, Mapped
from motet.models.growth.operator import TIES, GrowthOperator, OperatorFacts, layer_of, old_name
from motet.models.growth.state import Contribution, Moments, Recipe
from motet.models.keyed import key_of

EXPERTS = (
    *("n_experts", "experts_per_token", "d_expert", "n_dense_layers", "moe_every"),
    *("router_score", "normalize_top_k"),
)


@dataclass(frozen=True)
class Upcycling(GrowthOperator):
    """Every expert is a copy of the feed-forward, or of a shard of it; the router is drawn.

    With G shards expert e holds shard e mod G, and the G experts of a virtual group have the same
    router row: the `experts_per_token` that a token visits, a multiple of G, are whole groups, and
    so hold all of the feed-forward.

    Attributes:
        granularity: G.
        scale: "down": what a token's experts add up to is made whole in their last projection,
            which is exact where the weights of a token sum to 1; "published": in all three
            projections alike, each by the cube root (Megatron-LM), which the curve of SwiGLU makes
            inexact.
        router_std: of the router's first values.
    """

    granularity: int = 1
    scale: str = "down"
    router_std: float = 0.02

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="upcycling",
        source="arXiv:2410.07524 and Megatron-LM, core/transformer/moe/upcycling_utils.py",
        exact="with normalize_top_k (top-k, then softmax) and scale: down, without capacity",
        loss_jump_nats=2.0,
        jump_seen="9e-8 where exact (1M parameters); else the experts' shares do not add up to the "
        "feed-forward's output",
        symmetry="the router sends other tokens to each expert",
        moments=Moments.ASYMMETRIC,
        state="experts and router begin with zeros and step 0, all else keeps; keep: experts get "
        "the share of the gradient that even routing would give them",
        changes=(*EXPERTS, "d_ffn", *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if source.n_experts:
            why = f"the old model has {source.n_experts} already; it must be dense"
            return [Problem("n_experts", why)]
        if not target.n_experts:
            return [Problem("n_experts", "0 makes no mixture; set it to 4 or 8, say")]
        if self.scale not in ("down", "published"):
            return [Problem("scale", f"{self.scale!r} is not one of down, published")]
        if not 0 < self.router_std < float("inf"):
            return [Problem("router_std", f"{self.router_std!r} is not above 0; try 0.02")]
        shards = self.granularity
        found = [
            Problem(setting, f"{value} is not a multiple of granularity={shards}, the shards")
            for setting in ("n_experts", "experts_per_token")
            if shards < 1 or (value := getattr(target, setting)) % shards
        ]
        if target.router_score == "sigmoid" and not target.normalize_top_k:
            why = "is false: sigmoid scores of a new router add up to nothing known; set it to true"
            found.append(Problem("normalize_top_k", why))
        return found or self._width_problems(source, target)

    def _width_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        for layer in range(source.n_layers):
            width = source.ffn_width(layer)
            if not target.has_experts(layer) and target.ffn_width(layer) != width:
                why = f"layer {layer} stays dense and keeps its {width} hidden channels"
                return [Problem("d_ffn", why)]
            if target.has_experts(layer) and target.expert_width * self.granularity != width:
                why = (
                    f"{self.granularity} shards of {target.expert_width} are not the {width} "
                    f"hidden channels of layer {layer}; set d_expert={width // self.granularity}"
                )
                return [Problem("d_expert", why)]
        return []

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        exact = target.normalize_top_k and (self.scale == "down" or self.granularity == 1)
        recipe = partial(self.recipe, source, target)
        return Mapped(source, target, recipe, tuple(range(source.n_layers)), exact)

    def recipe(self, source: ModelConfig, target: ModelConfig, weight: WeightSpec) -> Recipe:
        """Return how a weight is made."""
        layer = layer_of(weight.name)
        if layer is None or not target.has_experts(layer) or ".feed_forward." not in weight.name:
            name = old_name(weight.name, range(source.n_layers), source)
            assert name is not None
            rule = Moments.KEEP if self.rule is Moments.ASYMMETRIC else self.rule
            return Recipe(weight, (Contribution(name),), rule)
        if ".router." in weight.name:
            begin = partial(self._router, weight.name, target)
            return Recipe(weight, (), Moments.DROP, begin)
        return self._expert(target, weight)

    def factor(self, target: ModelConfig) -> float:
        """Return what the sum over a token's experts must be multiplied with.

        A token visits k / G copies of the whole, in G shards each. Weights that sum to 1 give each
        expert 1 / k, so the sum is 1 / G of the feed-forward's output. Softmax over all E experts
        of a new router gives each 1 / E.
        """
        shards, k, n_experts = self.granularity, target.experts_per_token, target.n_experts
        return shards * (1.0 if target.normalize_top_k else n_experts / k)

    def _expert(self, target: ModelConfig, weight: WeightSpec) -> Recipe:
        name = weight.name.replace("experts.", "") + ".weight"
        is_down = weight.name.endswith("down_proj")
        scale, factor = 1.0, self.factor(target)
        if self.scale == "published":
            scale = factor ** (1 / 3)
        elif is_down:
            scale = factor
        # Each shard's gradient is shared out among the E / G experts that hold it; what is scaled
        # up has less of it.
        axis = self._shards(target, scale, self.granularity / target.n_experts / scale)
        maps: tuple[AxisMap | None, ...] = (None, axis) if is_down else (axis, None)
        rule = Moments.DROP if self.rule is Moments.ASYMMETRIC else self.rule
        shape = _shape_of(weight, is_down)
        return Recipe(weight, (Contribution(name, maps),), rule, shape=shape)

    def _shards(self, target: ModelConfig, value: float, moment: float) -> AxisMap:
        """Return the hidden channels of all experts side by side, from those of the whole."""
        width = target.expert_width
        shard_E = torch.arange(target.n_experts) % self.granularity
        index_N1 = (shard_E[:, None] * width + torch.arange(width)).flatten()[:, None]
        like = torch.ones(index_N1.shape)
        return AxisMap(index_N1, like * value, like * moment, torch.zeros(len(like)).bool())

    def _router(self, name: str, target: ModelConfig) -> Tensor:
        """Return [E, D], the same row for the experts of a virtual group."""
        groups = target.n_experts // self.granularity
        generator = torch.Generator().manual_seed(key_of("growth router", self.seed, name) >> 1)
        rows = torch.empty(groups, target.d_model).normal_(0, self.router_std, generator=generator)
        return rows.repeat_interleave(self.granularity, 0)


def _shape_of(weight: WeightSpec, is_down: bool) -> Callable[[Tensor], Tensor]:
    """Return what cuts experts that stand side by side apart: [E F, D] or [D, E F]."""
    n_experts = weight.shape[0]
    if is_down:
        return lambda x: x.unflatten(1, (n_experts, -1)).transpose(0, 1).contiguous()
    return lambda x: x.unflatten(0, (n_experts, -1))


def mixture_of(dense: ModelConfig, n_experts: int, k: int, granularity: int = 1) -> ModelConfig:
    """Return the config of a mixture that a dense model can be upcycled into.

    Args:
        n_experts, k: whole copies of the feed-forward, and those that a token visits.
    """
    return replace(
        dense,
        n_experts=n_experts * granularity,
        experts_per_token=k * granularity,
        d_expert=dense.d_ffn // granularity,
    )
