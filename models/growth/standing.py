"""Where the model before stands in the one that is made of it: whether a slice of the new model is
what the old one was.

A slice takes layers of the new model, and of every axis the first channels, or the first of each of
equal groups (`models.member`). It computes what the old model did where its weights are the old
ones; where they are the old ones times something, as after function-preserving growth in width,
which divides what reads copies by their number, it stands in their place and computes another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from motet.models.architecture import WeightSpec, named_weights
from motet.models.growth.axes import AxisMap, axis_of
from motet.models.growth.growth import Chained, Growth, Mapped
from motet.models.growth.operator import layer_of
from motet.models.growth.state import Recipe

UNGROUPED = ("stream", "shared")
"""Axes that no group divides."""


class StandingModel(NamedTuple):
    """Where an old model stands.

    Attributes:
        layers: of each old layer the new one that it stands in; they rise.
        exact: the slice of these layers at the old widths is the old model, and so is each slice of
            it a slice of the old model.
    """

    layers: tuple[int, ...]
    exact: bool


class _Firsts(NamedTuple):
    """Which old weight the first channels of a new one are, and whether number for number."""

    source: str
    exact: bool


def standing(growth: Growth, groups: int = 1) -> StandingModel | None:
    """Return where the old model stands in the new one; None where it stands nowhere: its layers
    are mixed, its channels are others, or a new layer stands for an old one that no longer is.

    Args:
        groups: of heads, hidden channels and experts, of which slices take the first each.
    """
    if isinstance(growth, Chained):
        first, second = standing(growth.first, groups), standing(growth.second, groups)
        if first is None or second is None:
            return None
        layers = tuple(second.layers[layer] for layer in first.layers)
        return StandingModel(layers, first.exact and second.exact)
    if not isinstance(growth, Mapped):
        return None
    shapes = {weight.name: weight.shape for weight in named_weights(growth.source)}
    found = {
        weight.name: _firsts(weight, growth.recipe(weight), shapes, groups)
        for weight in named_weights(growth.target)
    }
    kept: list[tuple[int, bool]] = []
    for old in range(growth.source.n_layers):
        wanted = {name for name in shapes if layer_of(name) == old}
        places = [new for new, one in enumerate(growth.layers) if one == old]
        # The first place of those in which it is what it was.
        stands = sorted(
            (not exact, new)
            for new in places
            if (exact := _whole_layer(found, new, wanted)) is not None
        )
        if not stands:
            return None
        kept.append((stands[0][1], not stands[0][0]))
    layers = tuple(new for new, _ in kept)
    around = _around(growth, found)
    if around is None or list(layers) != sorted(set(layers)):
        return None
    return StandingModel(layers, around and all(same for _, same in kept))


def _around(growth: Mapped, found: dict[str, _Firsts | None]) -> bool | None:
    """Return whether the first channels of what lies around the layers are the old ones, number for
    number; None where they do not even stand for them.
    """
    tied = growth.source.tied_embeddings
    around = {name: one for name, one in found.items() if layer_of(name) is None}
    for name, one in around.items():
        old_name = "embedding.weight" if tied and name == "head.weight" else name
        if one is None or one.source != old_name:
            return None
    return all(one.exact for one in around.values() if one)


def _whole_layer(found: dict[str, _Firsts | None], new: int, wanted: set[str]) -> bool | None:
    """Return whether the first channels of a new layer are an old one, number for number; None
    where they do not even stand for it.
    """
    mine = [one for name, one in found.items() if layer_of(name) == new]
    if {one.source if one else "" for one in mine} != wanted:
        return None
    return all(one.exact for one in mine if one)


def _firsts(
    weight: WeightSpec, recipe: Recipe, shapes: dict[str, tuple[int, ...]], groups: int
) -> _Firsts | None:
    """Return which old weight the first channels of a new one are; None where they are none."""
    if len(recipe.parts) != 1 or recipe.shape is not None:
        return None
    (part,) = recipe.parts
    exact = recipe.add is None and part.weight == 1.0
    for dimension, axis in enumerate(part.maps):
        if axis is None:
            continue
        mine = 1 if axis_of(weight, dimension) in UNGROUPED else groups
        places = _places(axis, shapes[part.source][dimension], mine)
        if places is None:
            return None
        exact = exact and bool((axis.value_NS[places] == 1).all())
    return _Firsts(part.source, exact)


def _places(axis: AxisMap, size: int, groups: int) -> Tensor | None:
    """Return where the old indices, `size` of them, are the first of each group of the new ones,
    int64; None where they are not.
    """
    wanted, width = axis.index_NS.shape
    if width != 1 or size > wanted or size % groups or wanted % groups:
        return None
    starts = torch.arange(groups)[:, None] * (wanted // groups)
    places = (starts + torch.arange(size // groups)).flatten()
    return places if bool((axis.index_NS[places, 0] == torch.arange(size)).all()) else None
