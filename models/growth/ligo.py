"""LiGO: every new weight is a learned mixture of layers, between learned maps of channels.

D' x D: a map from the old channels of an axis to the new ones; heads are mapped whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig
from motet.models.growth.axes import axis_of, copies, reads
from motet.models.growth.learned import LearnedGrowth, LearnedOperator
from motet.models.growth.operator import DEPTH, TIES, WIDTH, OperatorFacts, layer_of
from motet.models.growth.state import Moments, Read

_DOT = "-"
"""Stands for the dot of a weight's name in the name of a parameter."""


class Ligo(LearnedGrowth):
    """W' of layer l' = B_out (sum over layers l of w_l'l W_l) B_in^T.

    One B for each axis, tied along the residual stream: B_embd for all that writes or reads it,
    gains too (gain' = B gain). One vector w for each weight of a block and each new layer.
    """

    def value(self, weight: WeightSpec, read: Read) -> Tensor:
        """See `LearnedGrowth.value`."""
        olds = [read(name)["weight"] for name in self.olds(weight)]
        value = olds[0]
        layer = layer_of(weight.name)
        if layer is not None and len(olds) > 1:
            mix = self._parameter(f"mix.{_rest(weight.name)}")[layer]
            value = torch.einsum("l,l...->...", mix[self._alike(weight)], torch.stack(olds))
        elif layer is not None:
            value = value * self._parameter(f"mix.{_rest(weight.name)}")[layer, self._alike(weight)]
        for dimension in range(len(weight.shape)):
            value = self._mapped(value, weight, dimension)
        if weight.name == "norm.weight" and self.target.tied_embeddings:
            # A tied head reads as many more channels as the embedding writes.
            value = value * (self.source.d_model / self.target.d_model)
        return value

    def olds(self, weight: WeightSpec) -> tuple[str, ...]:
        """See `LearnedGrowth.olds`: those of all layers of the same kind."""
        layer = layer_of(weight.name)
        if layer is None:
            tied = weight.name == "head.weight" and self.source.tied_embeddings
            return ("embedding.weight" if tied else weight.name,)
        return tuple(f"blocks.{old}.{_rest(weight.name)}" for old in self._alike(weight))

    def _alike(self, weight: WeightSpec) -> list[int]:
        """Return the old layers that have such a weight in the same size."""
        layer = layer_of(weight.name)
        assert layer is not None
        return alike(self.source, self.layers[layer])

    def _mapped(self, value: Tensor, weight: WeightSpec, dimension: int) -> Tensor:
        axis = map_of(weight, dimension, value.shape[dimension], self.target)
        if axis is None or value.shape[dimension] == weight.shape[dimension]:
            return value
        matrix = self._parameter(f"map.{axis}")
        side = f"map.{axis}.read"
        if reads(weight, dimension) and side.replace(".", _DOT) in self.maps:
            matrix = self._parameter(side)
        width = value.shape[dimension] // matrix.shape[1]
        x = value.movedim(dimension, 0).unflatten(0, (matrix.shape[1], width))
        y = torch.tensordot(matrix, x, 1).flatten(0, 1)
        return y.movedim(0, dimension)

    def _parameter(self, name: str) -> Tensor:
        return self.maps[name.replace(".", _DOT)]


def map_of(weight: WeightSpec, dimension: int, size: int, target: ModelConfig) -> str | None:
    """Return the name of the map of a dimension: its axis, "values" apart from "keys", and "mixed"
    for what the output projection reads, which holds values in every query head.
    """
    axis = axis_of(weight, dimension)
    if axis in ("vocabulary", "one", "head", "experts"):
        return None
    part = weight.name.split(".")[-2]
    if part == "v_proj" and axis == "keys":
        return "values"
    if part == "o_proj" and axis == "queries":
        # Without groups the published choice: read by the map that the values are written by.
        return "values" if target.n_heads == target.n_kv_heads else "mixed"
    return f"hidden.{size}.{weight.shape[dimension]}" if axis == "hidden" else axis


def alike(config: ModelConfig, layer: int) -> list[int]:
    """Return the layers with the same kind of feed-forward in the same width."""

    def kind(of: int) -> tuple[bool, int]:
        has = config.has_experts(of)
        return has, config.expert_width if has else config.ffn_width(of)

    return [old for old in range(config.n_layers) if kind(old) == kind(layer)]


def _rest(name: str) -> str:
    return name.split(".", 2)[2]


@dataclass(frozen=True)
class LigoOperator(LearnedOperator):
    """Learned linear growth (LiGO).

    Attributes:
        begin: "noise": new channels are noise, and one map writes and reads an axis, as published;
            "copies": new channels are copies, read by a map of its own that begins with 1 / copies,
            so that learning starts at bert2bert-fpi.
    """

    begin: str = "copies"

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="ligo",
        source="LiGO, arXiv:2303.00980, and VITA-Group/LiGO; heads are mapped whole, so that "
        "rotary pairs stay pairs",
        exact="never",
        loss_jump_nats=2.0,
        jump_seen="that of its beginning (bert2bert-fpi and stack or interpolate), less what is "
        "learned",
        symmetry="by learning, and noise in the maps",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published",
        changes=(*DEPTH, *WIDTH, *TIES),
    )

    def learned(self, source: ModelConfig, target: ModelConfig, layers: list[int]) -> Ligo:
        """See `LearnedOperator.learned`."""
        maps = nn.ParameterDict()
        growth = Ligo(source, target, layers, maps)
        for weight in growth._weights.values():
            olds = growth.olds(weight)
            self._mixture(growth, weight, maps)
            shape = _old_shape(olds[0], source)
            for dimension, size in enumerate(shape):
                self._matrix(growth, weight, dimension, size, maps)
        return growth

    def _mixture(self, growth: Ligo, weight: WeightSpec, maps: nn.ParameterDict) -> None:
        """Begin with one layer each, and noise in the weights of the others."""
        layer = layer_of(weight.name)
        if layer is None:
            return
        name = f"mix.{_rest(weight.name)}".replace(".", _DOT)
        if name not in maps:
            shape = growth.target.n_layers, growth.source.n_layers
            grows = shape[0] != shape[1]
            maps[name] = nn.Parameter(self.draw(name, *shape) * grows)
        with torch.no_grad():
            maps[name][layer, growth.layers[layer]] += 1.0

    def _matrix(
        self, growth: Ligo, weight: WeightSpec, dimension: int, size: int, maps: nn.ParameterDict
    ) -> None:
        wanted = weight.shape[dimension]
        axis = map_of(weight, dimension, size, growth.target)
        if axis is None or wanted == size:
            return
        unit = growth.source.head_width if axis in ("queries", "keys", "values", "mixed") else 1
        reading = reads(weight, dimension) and self.begin == "copies"
        whole = f"map.{axis}".replace(".", _DOT)
        name = f"{whole}{_DOT}read" if reading else whole
        # Even where only its reading twin is asked for, an axis has the map that it is known by.
        for key, is_reading in {(name, reading), (whole, False)}:
            if key not in maps:
                matrix = self._begin(growth, axis, size // unit, wanted // unit, is_reading)
                maps[key] = nn.Parameter(matrix + self.draw(key, *matrix.shape))

    def _begin(self, growth: Ligo, axis: str, size: int, wanted: int, reading: bool) -> Tensor:
        if self.begin == "noise":
            return torch.eye(wanted, size)
        grown = copies(size, wanted)
        if axis in ("queries", "mixed"):
            old, new = growth.source, growth.target
            inner = copies(old.n_heads // old.n_kv_heads, new.n_heads // new.n_kv_heads)
            grown = copies(old.n_kv_heads, new.n_kv_heads).within(inner)
        matrix = torch.zeros(wanted, size)
        matrix[torch.arange(wanted), grown.index_N] = 1.0 if not reading else 1 / grown.counts_N
        return matrix


def _old_shape(name: str, source: ModelConfig) -> tuple[int, ...]:
    return next(weight.shape for weight in named_weights(source) if weight.name == name)
