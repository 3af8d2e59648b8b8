"""One slice of a trained run: by what it keeps, or by its number of parameters. Torch-free.

Any slice of the whole model is a model, whether or not a step trained it as such. Between members
that differ in hidden width alone lie MatFormer's mixtures (Mix'n'Match, arXiv:2310.07707, section
3.3): the last layers as wide as in the larger member, the others as in the smaller one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from motet.core import format
from motet.core.errors import Problem, raise_problems
from motet.core.schema import MappingReader
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import member_problems
from motet.models.family.space import (
    KEYS,
    NEAR,
    SliceError,
    SliceRule,
    depth_layers,
    grid,
    member_of,
    size_of,
    whole_of,
)
from motet.models.member import Member

CLOSE = 0.01
"""Slices whose distances from a size differ by less, as shares of it, are equally near: one that
was trained is taken first, then one with the same width in every layer."""


class Nearest(NamedTuple):
    """The slice that is nearest to a size.

    Attributes:
        member: None is the whole model.
        parameters: outside embedding and head.
        gap: of these from the size that was asked for, as a share of it; negative is smaller.
    """

    member: Member | None
    parameters: int
    gap: float


def slice_by_spec(
    whole: ModelConfig, name: str, asked: Any, groups: int, where: str = "--spec"
) -> Member:
    """Return the slice that a mapping of axes asks for, as `family.options.members` takes them.

    Raises:
        UserError: all that is wrong with it.
    """
    problems: list[Problem] = []
    read = MappingReader(asked, where, problems, KEYS)
    raise_problems(problems)
    try:
        member = member_of(whole, name, read.values, groups)
    except SliceError as error:
        raise_problems([Problem(f"{where}.{error.key}", str(error))])
        raise
    raise_problems([Problem(where, why) for why in member_problems(whole, [member])])
    return member


def nearest_slice(whole: ModelConfig, members: Sequence[Member], size: Any, name: str) -> Nearest:
    """Return the slice nearest to a number of parameters outside embedding and head.

    Looked at are the members and the whole model, slices on the axes on which members are smaller
    (never below the smallest member: what is below was trained by no step), and mixtures.

    Args:
        members: those of the family that trained.
        size: as `size_of` takes it.
        name: of a slice that is no member.

    Raises:
        SliceError: nothing is within `NEAR` of it.
        ValueError: it is no size.
    """
    target = size_of(size)
    rows = [
        (abs(n - target) / target, order, n, member)
        for order, member in _candidates(whole, members, name)
        for n in [parameters_non_embedding(whole if member is None else member.config)]
    ]
    gap = min(row[0] for row in rows)
    if gap > NEAR:
        known = sorted({n for _, _, n, _ in rows}, key=lambda n: abs(n - target))[:3]
        near = ", ".join(format.parameters(n) for n in sorted(known))
        raise SliceError("", f"{size}: no slice is near; the nearest have {near} parameters")
    close = (row for row in rows if row[0] <= gap + CLOSE)
    _, _, found, member = min(close, key=lambda row: (row[1], row[0]))
    return Nearest(member, found, found / target - 1)


def _candidates(
    whole: ModelConfig, members: Sequence[Member], name: str
) -> Iterator[tuple[int, Member | None]]:
    """Yield (order among equally near ones, slice)."""
    yield 0, None
    yield from ((0, member) for member in members)
    if not members:
        return
    groups = math.gcd(*(member.groups for member in members))
    layer_groups = _layer_groups(whole, members)
    for sizes in _between(whole, members, groups, layer_groups):
        yield 1, member_of(whole, name, sizes, groups, layer_groups or 1)
    yield from ((2, member) for member in _mixtures(whole, members, name))


def _layer_groups(whole: ModelConfig, members: Sequence[Member]) -> int | None:
    """Return the fewest groups of layers from which the members' layers are what `depth_layers`
    takes; None where they were chosen otherwise.
    """
    n = whole.n_layers
    for groups in (g for g in range(1, n + 1) if n % g == 0):
        depths = [len(member.layers) for member in members]
        taken = [depth_layers(n, d, groups) for d in depths if d % groups == 0]
        if taken == [member.layers for member in members]:
            return groups
    return None


def _between(
    whole: ModelConfig, members: Sequence[Member], groups: int, layer_groups: int | None
) -> Iterator[Mapping[str, int]]:
    """Yield sizes on the axes on which members are smaller, from the smallest member's up."""
    full = whole_of(whole)
    least = {
        axis: min(whole_of(m.config).get(axis, size) for m in members)
        for axis, size in full.items()
    }
    axes = tuple(axis for axis, size in full.items() if least[axis] < size)
    if layer_groups is None:  # other depths would take layers that no member left out
        axes = tuple(axis for axis in axes if axis != "n_layers")
    for _, sizes in grid(whole, axes, SliceRule(groups, layer_groups or 1)) if axes else ():
        if all(sizes[axis] >= least[axis] for axis in axes):
            yield sizes


def _mixtures(whole: ModelConfig, members: Sequence[Member], name: str) -> Iterator[Member]:
    """Yield the mixtures of each two neighbours that differ in hidden width alone."""
    everything = Member(name, whole, tuple(range(whole.n_layers)))
    ordered = sorted(members, key=lambda member: parameters_non_embedding(member.config))
    for small, large in itertools.pairwise([*ordered, everything]):
        alike = _without_widths(small.config) == _without_widths(large.config)
        if small.layers != large.layers or not alike or whole.n_experts:
            continue
        low = [small.config.ffn_width(at) for at in range(len(small.layers))]
        high = [large.config.ffn_width(at) for at in range(len(small.layers))]
        for wide in range(1, len(low)):
            widths = (*low[:-wide], *high[-wide:])
            config = replace(small.config, d_ffn=max(widths), layer_ffn=widths)
            yield Member(name, config, small.layers, small.groups)


def _without_widths(config: ModelConfig) -> ModelConfig:
    return replace(config, d_ffn=1, layer_ffn=None, head_dim=config.head_width)
