"""Slices of weights: the part of each that a member of a family multiplies with.

A slice is taken in the forward pass, of the plain tensor that a module computes with: a weight that
FSDP2 has gathered, or a tensor-parallel rank's own part. (Slicing a distributed tensor would gather
it.) Its gradient has the size of that tensor, with zeros outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig
from motet.models.member import BlockCuts, Cut, Member, block_cuts
from motet.models.precision import own


def own_slice(weight: Tensor, gradient_placements: Any, *cuts: Cut | None) -> Tensor:
    """Return what a member takes of this process's part of a weight (see `own`).

    Args:
        cuts: of each dimension, from the first; None = all of it.
    """
    mine = own(weight, gradient_placements)
    for dimension, cut in enumerate(cuts):
        # A distributed tensor knows the size of the whole.
        parts = weight.shape[dimension] // mine.shape[dimension] if cut else 1
        mine = take(mine, dimension, cut, parts)
    return mine


def take(x: Tensor, dimension: int, cut: Cut | None, parts: int = 1) -> Tensor:
    """Return what a member takes of one dimension of a tensor; without groups a view, with them a
    copy.

    Args:
        parts: processes that hold equal parts of the dimension, of which `x` is one.
    """
    if cut is None:
        return x
    size = x.shape[dimension]
    kept, groups = cut.of(size, parts)
    if groups == 1:
        return x.narrow(dimension, 0, kept)
    dimension %= x.ndim
    grouped = x.unflatten(dimension, (groups, size // groups))
    return grouped.narrow(dimension + 1, 0, kept // groups).flatten(dimension, dimension + 1)


def inside(index_N: Tensor, size: int, cut: Cut | None) -> Tensor:
    """Return which of some indices of a dimension a member takes, bool [N].

    Args:
        size: of the whole dimension, counted in channels where the axis may count heads.
    """
    if cut is None:
        return torch.ones_like(index_N, dtype=torch.bool)
    kept, groups = cut.of(size)
    return index_N % (size // groups) < kept // groups


def weight_cuts(weight: WeightSpec, cuts: BlockCuts) -> tuple[Cut | None, ...]:
    """Return what a member takes of each dimension of a weight, of a block or outside of them."""
    return tuple(getattr(cuts, axis, None) for axis in weight.axes)


def member_parts(
    member: Member, whole: ModelConfig
) -> Iterator[tuple[str, str, tuple[Cut | None, ...]]]:
    """Yield (name in the member's own plain model, name in the whole model, what it takes of each
    dimension) of every weight of a member.
    """
    cuts = block_cuts(whole, member)
    for weight in named_weights(member.config):
        own_name = weight.name
        if not own_name.startswith("blocks."):
            yield own_name, own_name, weight_cuts(weight, BlockCuts(stream=cuts[0].stream))
            continue
        number, _, rest = own_name.removeprefix("blocks.").partition(".")
        at = int(number)
        yield own_name, f"blocks.{member.layers[at]}.{rest}", weight_cuts(weight, cuts[at])


def member_weights(
    member: Member | None, whole: ModelConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a member's weights under the names of its own plain model, from the unsharded ones of
    the whole model; views where channels are not grouped.
    """
    if member is None:
        return dict(state)
    found = {}
    for own_name, name, cuts in member_parts(member, whole):
        value = state[name]
        for dimension, cut in enumerate(cuts):
            value = take(value, dimension, cut)
        found[own_name] = value
    return found
