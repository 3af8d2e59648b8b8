"""Which slices of the whole model there are: members by what they keep, and by their size.

Torch-free. A member is a choice on each axis of `AXES`; its depth takes layers spread evenly, so
that of two depths the smaller one's layers are among the larger one's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from motet.core import format
from motet.core.schema import is_number, is_whole
from motet.models.config import ModelConfig, llama_heads
from motet.models.counts import parameters_non_embedding
from motet.models.member import Member, block_cuts

AXES = ("n_layers", "d_model", "n_kv_heads", "d_ffn", "n_experts", "d_expert", "d_shared")
KEYS = (*AXES, "layers")
EIGHTHS = 8
"""Widths that a search by size tries, in parts of the whole one."""
NEAR = 0.1
"""A size that no slice comes so near to is refused."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class SliceRule(NamedTuple):
    """How every member of a family lies in the whole model.

    Attributes:
        groups: of heads, hidden channels and experts (`Member.groups`).
        layer_groups, first: of its layers (`depth_layers`).
    """

    groups: int = 1
    layer_groups: int = 1
    first: bool = False


class SliceError(ValueError):
    """A member that cannot be: which setting of it, and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


def layer_order(n_layers: int) -> list[int]:
    """Return the layers by how long they stay as depth shrinks: the last, the first, then always
    the middle of the widest gap, the earliest of equals.

    POA takes `floor(linspace(0, L - 1, d))` (arXiv:2408.01031): spread as evenly, but the layers of
    a smaller depth are not among those of a larger one.
    """
    order = [n_layers - 1, 0][: n_layers or 1] if n_layers > 1 else [0]
    while len(order) < n_layers:
        held = sorted(order)
        gap, start = max((b - a, -a) for a, b in itertools.pairwise(held))
        order.append(-start + gap // 2)
    return order


def part_order(part: range, n_layers: int) -> list[int]:
    """Return the layers of a part of the model by how long they stay as it shrinks, so that parts
    next to each other keep layers that are spread evenly over both.
    """
    before, after = int(part.start > 0), int(part.stop < n_layers)
    order = layer_order(before + len(part) + after)  # as if the layers beside it stayed
    if after and not before:
        order = [len(part) - at for at in order]  # the first stays longest
    return [part[at - before] for at in order if 0 <= at - before < len(part)]


def depth_layers(
    n_layers: int, depth: int, layer_groups: int = 1, first: bool = False
) -> tuple[int, ...]:
    """Return the layers of a member of some depth, in order; of each of so many equal groups of
    consecutive layers equally many, spread evenly, or the first ones.
    """
    size, each = n_layers // layer_groups, depth // layer_groups
    parts = [range(at, at + size) for at in range(0, size * layer_groups, size)]
    orders = [part if first else part_order(part, n_layers) for part in parts]
    return tuple(sorted(n for order in orders for n in order[:each]))


def whole_of(whole: ModelConfig) -> dict[str, int]:
    """Return the size of every axis that the whole model has."""
    found = {
        "n_layers": whole.n_layers,
        "d_model": whole.d_model,
        "n_kv_heads": whole.n_kv_heads,
    }
    if whole.n_moe_layers < whole.n_layers:
        found["d_ffn"] = whole.d_ffn
    if whole.n_experts:
        found |= {"n_experts": whole.n_experts, "d_expert": whole.expert_width}
    if whole.shared_width:
        found["d_shared"] = whole.shared_width
    return found


def member_of(
    whole: ModelConfig,
    name: str,
    asked: Mapping[str, Any],
    groups: int = 1,
    layer_groups: int = 1,
    first: bool = False,
) -> Member:
    """Return the slice that a mapping of axes asks for: numbers, or shares below 1 of the whole.

    Args:
        layer_groups: see `depth_layers`; where the mapping names no layers.
        asked: `KEYS` -> size; `d_ffn` may be a list with one width for each layer kept; `layers`
            names layers instead of `n_layers`.
        first: a depth takes the first layers, instead of layers spread evenly.

    Raises:
        SliceError: an axis that this model lacks, or a size that is none.
    """
    sizes = whole_of(whole)
    for key in asked:
        if key != "layers" and key not in sizes:
            raise SliceError(key, f"is no axis of this model; it has {', '.join(sizes)}, layers")
    if "layers" in asked and "n_layers" in asked:
        raise SliceError("layers", "says what n_layers says; leave one out")
    layers = _layers(whole, asked, sizes, layer_groups, first)
    chosen = {key: _size(key, asked.get(key, size), size) for key, size in sizes.items()}
    widths = asked.get("d_ffn")
    if isinstance(widths, Sequence) and not isinstance(widths, str):
        chosen["d_ffn"] = max(_size("d_ffn", width, sizes["d_ffn"]) for width in widths)
    heads = chosen["n_kv_heads"]
    config = replace(
        whole,
        n_layers=len(layers),
        d_model=chosen["d_model"],
        n_heads=heads * (whole.n_heads // whole.n_kv_heads),
        n_kv_heads=heads,
        head_dim=whole.head_width,
        d_ffn=chosen.get("d_ffn", whole.d_ffn),
        layer_ffn=_layer_ffn(whole, layers, widths, chosen.get("d_ffn")),
        n_experts=chosen.get("n_experts", 0),
        d_expert=chosen.get("d_expert"),
        d_shared=chosen.get("d_shared"),
        **whole.marks_of(layers),
    )
    return Member(name, _with_experts_where(whole, layers, config), layers, groups)


def _with_experts_where(
    whole: ModelConfig, layers: tuple[int, ...], config: ModelConfig
) -> ModelConfig:
    """Return the config with experts in the layers that have them in the whole model.

    Raises:
        SliceError: no rule of `ModelConfig` says which of these layers have experts.
    """
    if not whole.n_experts:
        return config
    routed = [whole.has_experts(layer) for layer in layers]
    for dense, every in itertools.product(range(len(layers) + 1), range(1, len(layers) + 1)):
        found = replace(config, n_dense_layers=dense, moe_every=every)
        if [found.has_experts(at) for at in range(len(layers))] == routed and any(routed):
            return found
    marks = ", ".join(
        f"{at}{' (experts)' if has else ''}" for at, has in zip(layers, routed, strict=True)
    )
    raise SliceError(
        "layers", f"are {marks}: a plain model has experts in every n-th layer from some layer on"
    )


def _layers(
    whole: ModelConfig,
    asked: Mapping[str, Any],
    sizes: Mapping[str, int],
    layer_groups: int,
    first: bool,
) -> tuple[int, ...]:
    if "layers" not in asked:
        size = sizes["n_layers"]
        depth = _size("n_layers", asked.get("n_layers", size), size)
        if depth % layer_groups:
            near = [n for n in (depth // layer_groups * layer_groups,) if n]
            fits = " or ".join(str(n) for n in (*near, (depth // layer_groups + 1) * layer_groups))
            raise SliceError(
                "n_layers",
                f"{depth} cannot be taken equally from layer_groups={layer_groups}; "
                f"use {fits}, or name layers",
            )
        return depth_layers(size, depth, layer_groups, first)
    layers = asked["layers"]
    good = isinstance(layers, list | tuple) and layers and all(is_whole(n) for n in layers)
    if (
        not good
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < whole.n_layers
    ):
        raise SliceError(
            "layers", f"{layers!r} is not a rising list of layers from 0 to {whole.n_layers - 1}"
        )
    return tuple(layers)


def _layer_ffn(
    whole: ModelConfig, layers: tuple[int, ...], widths: Any, uniform: int | None
) -> tuple[int, ...] | None:
    if isinstance(widths, list | tuple):
        if len(widths) != len(layers):
            why = f"has {len(widths)} widths for {len(layers)} layers; give one for each layer"
            raise SliceError("d_ffn", why)
        return tuple(
            _size("d_ffn", w, whole.ffn_width(at)) for w, at in zip(widths, layers, strict=True)
        )
    if whole.layer_ffn is None:
        return None
    if widths is None:
        return tuple(whole.ffn_width(layer) for layer in layers)
    return tuple(min(uniform or whole.d_ffn, whole.ffn_width(layer)) for layer in layers)


def _size(key: str, asked: Any, whole: int) -> int:
    """Return a size: a number, or a share below 1 of the whole one."""
    if isinstance(asked, list | tuple):
        return whole
    if is_number(asked) and 0 < asked < 1:
        asked = asked * whole
        if asked != int(asked):
            raise SliceError(key, f"is {asked:g} of {whole}, no whole number; give a number")
        asked = int(asked)
    if not is_whole(asked) or not 1 <= asked <= whole:
        raise SliceError(
            key,
            f"{asked!r} is not a number from 1 to the whole model's {whole:,}, or a share below 1",
        )
    return int(asked)


def size_of(text: Any) -> int:
    """Return the parameters that `125m`, `1.3b`, `300k` or a number says.

    Raises:
        ValueError: it says none.
    """
    match = SIZE.fullmatch(str(text).strip())
    number = 0 if match is None else round(float(match[1]) * UNITS[match[2].lower()])
    if number < 1 or isinstance(text, bool):
        raise ValueError(f"{text!r} is no size; write 125m, 1.3b or 300k")
    return number


def members_by_size(
    whole: ModelConfig,
    sizes: Sequence[Any],
    axes: Sequence[str],
    groups: int = 1,
    layer_groups: int = 1,
    first: bool = False,
) -> list[Member]:
    """Return the slice nearest to each number of parameters outside embedding and head, each inside
    the next larger one.

    Of slices within 1 % of the nearest the one of the most even shape: the axes keep like shares.

    Args:
        sizes: as `size_of` takes them; they name the members.
        axes: those that may shrink.
        groups, layer_groups, first: see `SliceRule`.

    Raises:
        SliceError: a size that no slice is near.
    """
    wanted = sorted(((size_of(size), str(size).strip().lower()) for size in sizes), reverse=True)
    inside, found, how = whole_of(whole), [], SliceRule(groups, layer_groups, first)
    for target, name in wanted:
        member = _nearest(whole, name, target, inside, tuple(axes), how)
        found.append(member)
        inside = {key: getattr(member.config, key) for key in inside}
    return found[::-1]


def _nearest(
    whole: ModelConfig,
    name: str,
    target: int,
    inside: Mapping[str, int],
    axes: tuple[str, ...],
    how: SliceRule,
) -> Member:
    rows = [(size, sizes) for size, sizes in grid(whole, axes, how) if _within(sizes, inside)]
    gap = min((abs(size - target) / target for size, _ in rows), default=math.inf)
    if gap > NEAR:
        known = sorted({size for size, _ in rows}, key=lambda size: abs(size - target))[:3]
        near = ", ".join(format.parameters(size) for size in sorted(known))
        raise SliceError(
            "", f"{name}: no slice of {', '.join(axes)} is near; the nearest have {near} parameters"
        )
    close = [row for row in rows if abs(row[0] - target) / target <= max(gap, 0.0) + 0.01]
    sizes = whole_of(whole)

    def uneven(row: tuple[int, dict[str, int]]) -> tuple[float, float]:
        shares = [math.log(row[1][axis] / sizes[axis]) for axis in axes]
        return round(max(shares) - min(shares), 9), abs(row[0] - target)

    return member_of(whole, name, min(close, key=uneven)[1], *how)


def _within(sizes: Mapping[str, int], inside: Mapping[str, int]) -> bool:
    return all(sizes[key] <= inside[key] for key in sizes)


@lru_cache(maxsize=8)
def grid(
    whole: ModelConfig, axes: tuple[str, ...], how: SliceRule
) -> list[tuple[int, dict[str, int]]]:
    """Return (parameters, sizes) of every slice that a search by size tries."""
    rows = []
    for values in itertools.product(*(list(_steps(whole, axis, how)) for axis in axes)):
        sizes = dict(zip(axes, values, strict=True))
        with contextlib.suppress(SliceError):  # depths whose layers with experts fit no rule
            config = member_of(whole, "x", sizes, *how).config
            if not llama_heads(config) or llama_heads(whole):
                rows.append((parameters_non_embedding(config), sizes))
    return rows


def _steps(whole: ModelConfig, axis: str, how: SliceRule) -> Iterator[int]:
    """Yield the sizes of an axis that are tried."""
    size, groups = whole_of(whole)[axis], how.groups
    if axis in ("n_layers", "n_kv_heads", "n_experts"):
        least = whole.experts_per_token if axis == "n_experts" else 1
        unit = how.layer_groups if axis == "n_layers" else groups
        yield from (n for n in range(unit, size + 1, unit) if n >= least)
        return
    unit = math.lcm(1 if axis in ("d_model", "d_shared") else groups, 2)
    parts = {size * part // EIGHTHS // unit * unit for part in range(1, EIGHTHS + 1)}
    yield from sorted(n for n in parts | {size} if n)


def unnested(whole: ModelConfig, members: Sequence[Member]) -> list[str]:
    """Return where a smaller member is no part of a larger one, in words: nesting is monotone when
    of every two the smaller one's layers, and its part of every axis, lie in the larger one.
    """
    ordered = sorted(members, key=lambda member: parameters_non_embedding(member.config))
    found = []
    for small, large in itertools.combinations(ordered, 2):
        wrong = _outside(whole, small, large)
        if wrong:
            found.append(
                f"member {small.name!r} is smaller than {large.name!r}, but no part of it: "
                f"{', '.join(wrong)}; make it smaller there, or set monotone: false"
            )
    return found


def lies_in(whole: ModelConfig, small: Member, large: Member) -> bool:
    """Return whether all weights of a member are weights of another one."""
    return not _outside(whole, small, large)


def _outside(whole: ModelConfig, small: Member, large: Member) -> list[str]:
    wrong = []
    if not set(small.layers) <= set(large.layers):
        missing = sorted(set(small.layers) - set(large.layers))
        wrong.append(f"layers {', '.join(map(str, missing))}")
    theirs = dict(zip(large.layers, block_cuts(whole, large), strict=True))
    for layer, cuts in zip(small.layers, block_cuts(whole, small), strict=True):
        for axis, cut, other in zip(cuts._fields, cuts, theirs.get(layer, cuts), strict=True):
            if other is not None and (cut is None or cut.kept > other.kept):
                wrong.append(f"{axis} of layer {layer}")
    return wrong
