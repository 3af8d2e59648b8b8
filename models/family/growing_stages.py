"""The stages of a progressive family as they are written: sizes, lengths and operators. Torch-free.

The last stage is the run's `model`; a stage before it says what it has less of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from motet.core.errors import suggest
from motet.core.schema import MappingReader, is_number, is_whole
from motet.models.config import ModelConfig, ModelError, problems
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import NAME, WHOLE
from motet.models.family.space import size_of
from motet.models.family.stage_lengths import LENGTHS, StageLength, amount, read_length
from motet.models.family.stage_rules import (
    Distillation,
    distillation_of,
    layout_of,
    nested_of,
    virtual_of,
)

SIZES = ("parameters", "depth", "width", "model")
KEYS = (
    "name",
    *SIZES,
    *LENGTHS,
    "operator",
    "lr",
    "warmup_steps",
    "frozen_steps",
    "loss_jump_nats",
    "blend",
    "rewarm_steps",
    "distill",
    "nested",
    "virtual_depth",
    "layout",
)
AFTER_ANOTHER = ("frozen_steps", "loss_jump_nats", "blend", "rewarm_steps", "distill")
"""What no first stage has."""
WIDTHS = ("d_model", "n_heads", "d_ffn", "d_expert", "d_shared")
SIZED = (
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "tied_embeddings"),
    *("n_experts", "experts_per_token", "d_expert", "n_shared_experts", "d_shared"),
    *("n_dense_layers", "moe_every"),
)
"""Fields of a model that a stage may give itself."""
NEAR = 0.25
"""A number of parameters that no stage comes so near to is refused, as a share of it."""
MOST_PARTS = 16


@dataclass(frozen=True)
class GrowingStage:
    """One stage: the model that trains in it, and how it came to be.

    Attributes:
        name: of the member; None for the last, which is the whole model.
        length: None where a preset says it once the run's length is known.
        operator, options: that makes it of the model before; "" for the first.
        lr: peak learning rate; None = by the run's rule for a model of its size.
        warmup_steps: None = as the run's schedule.
        frozen_steps: steps of the stage for which what the operator freezes does not train; None =
            all of them.
        loss_jump_nats: the most that the loss may rise by at the transition; None = what the
            operator states.
        blend: share of what the operator made; the rest is the latest model before of the very same
            sizes (the V-cycle's interpolation). None = all of it.
        rewarm_steps: within so many steps the learning rate of new values alone rises from 0 to 1.3
            times that of the rest (SPARKLING); None = all train alike.
        distill: it follows an earlier model, frozen, of any sizes (Minitron); None = it learns from
            labels alone.
        nested: options of `family: {kind: nested}`, and what of the stage before joins
            (`nested_stages.BEFORE`): slices of its model train too, and are members; None = its
            model trains alone.
        virtual: its layers run several times, as many as are drawn every step (`virtual_depth`).
        layout: settings of the section `layout` that it has otherwise than the run; which there are
            and what they may be is not known here.
    """

    name: str | None
    config: ModelConfig
    length: StageLength | None
    operator: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    warmup_steps: int | None = None
    frozen_steps: int | None = None
    loss_jump_nats: float | None = None
    blend: float | None = None
    rewarm_steps: int | None = None
    distill: Distillation | None = None
    nested: Mapping[str, Any] | None = None
    virtual: bool = False
    layout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in messages and rows."""
        return self.name or WHOLE


def read_stage(
    read: MappingReader, whole: ModelConfig, after: GrowingStage | None, first: bool
) -> GrowingStage:
    """Return one stage, with its problems gathered.

    Args:
        after: the stage that follows; None where this is the last.
        first: no stage comes before it.
    """
    name = _name(read, last=after is None)
    operator, options = _operator(read, first)
    return GrowingStage(
        name=name,
        config=_config(read, whole, after),
        length=read_length(read, last=after is None),
        operator=operator,
        options=options,
        lr=_positive(read, "lr"),
        warmup_steps=read.whole("warmup_steps", None, 0),
        frozen_steps=read.whole("frozen_steps", None, 0),
        loss_jump_nats=_positive(read, "loss_jump_nats"),
        blend=read.number("blend", None, 0.0, 1.0),
        rewarm_steps=read.whole("rewarm_steps", None, 1),
        distill=distillation_of(read),
        nested=nested_of(read),
        virtual=virtual_of(read, last=after is None),
        layout=layout_of(read, last=after is None),
    )


def _name(read: MappingReader, last: bool) -> str | None:
    name = read.values.get("name")
    if last:
        if name not in (None, WHOLE):
            read.problem(
                "name", f"{name!r}: the last stage is the run's model, {WHOLE}; leave it out"
            )
        return None
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == WHOLE:
        what = f"a name that matches {NAME.pattern} and is not {WHOLE!r}, such as small"
        read.refuse("name", name, what)
        return "?"
    return name


def _operator(read: MappingReader, first: bool) -> tuple[str, dict[str, Any]]:
    """Return name and options of `operator: stack` or `{name: hypercloning, noise: 0.1}`."""
    asked = read.values.get("operator")
    if first:
        for key in ("operator", *AFTER_ANOTHER):
            if key in read.values:
                read.problem(key, "nothing comes before the first stage; leave it out")
        return "", {}
    options = dict(asked) if isinstance(asked, Mapping) else {}
    name = options.pop("name", None) if isinstance(asked, Mapping) else asked
    if not isinstance(name, str) or not name:
        said = "is not set" if asked is None else f"{asked!r} names no operator"
        read.problem(
            "operator", f"{said}; write one such as stack, or {{name: hypercloning, noise: 0.1}}"
        )
        return "", {}
    return name, {str(key): value for key, value in options.items()}


def _positive(read: MappingReader, key: str) -> float | None:
    found = read.checked(key, None, lambda v: amount(v) is not None, "a number above 0")
    return None if found is None else amount(found)


def _config(read: MappingReader, whole: ModelConfig, after: GrowingStage | None) -> ModelConfig:
    given = [key for key in SIZES if key in read.values]
    if after is None:
        for key in given:
            read.problem(key, "the last stage has the sizes of the run's model; leave it out")
        return whole
    if not given:
        read.problem("", f"has no size; give one of {', '.join(SIZES)}")
        return whole
    if "parameters" in given:
        if len(given) > 1:
            read.problem(given[1], "parameters says the size already; leave one out")
        return _by_parameters(read, after)
    config = _shared(read, whole)
    asked = read.mapping("model")
    for key, value in asked.items():
        if key not in SIZED:
            hint = suggest(key, SIZED)
            read.problem(
                f"model.{key}", f"is no size of a stage{hint}; there are {', '.join(SIZED)}"
            )
        elif key == "tied_embeddings" and not isinstance(value, bool):
            read.problem(f"model.{key}", f"{value!r} is not true or false")
        elif key != "tied_embeddings" and not is_whole(value):
            read.problem(f"model.{key}", f"{value!r} is not a whole number")
    known = {key: value for key, value in asked.items() if key in SIZED and is_whole_or_flag(value)}
    config = replace(dense(config) if known.get("n_experts") == 0 else config, **known)
    for setting, why in problems(config):
        read.problem(f"model.{setting}", why)
    return whole if problems(config) else config


def dense(config: ModelConfig) -> ModelConfig:
    """Return a model without experts, and without what only experts are told."""
    names = [one.name for one in fields(ModelConfig)]
    theirs = names[names.index("n_experts") : names.index("layer_ffn")]
    defaults = {one.name: one.default for one in fields(ModelConfig) if one.name in theirs}
    return replace(config, **defaults)  # type: ignore[arg-type]


def is_whole_or_flag(value: Any) -> bool:
    """A whole number, true or false."""
    return is_whole(value) or isinstance(value, bool)


def _shared(read: MappingReader, whole: ModelConfig) -> ModelConfig:
    """Return the whole model with `depth` of its layers and `width` of its channels."""
    depth = _share(read, "depth", [whole.n_layers])
    width = _share(read, "width", list(_widths(whole).values()))
    return scaled(whole, depth, width)


def _share(read: MappingReader, key: str, sizes: list[int]) -> float:
    """Return a share of sizes; 1 where none is asked for or it leaves no whole numbers."""
    asked = read.values.get(key, 1.0)
    share = _fraction(asked)
    if share is None:
        read.refuse(key, asked, "a share of the whole model's, such as 0.5 or 1/3")
        return 1.0
    if all(_is_whole_part(size, share) for size in sizes):
        return share
    fits = [
        f"{n}/{parts}"
        for parts in range(2, MOST_PARTS + 1)
        for n in range(1, parts)
        if math.gcd(n, parts) == 1 and all(size * n % parts == 0 for size in sizes)
    ]
    what = " and ".join(f"{size:,}" for size in dict.fromkeys(sizes))
    told = ", ".join(fits[:8]) or "none; give sizes under model"
    read.problem(key, f"{asked} of {what} is no whole number; shares that fit: {told}")
    return 1.0


def _fraction(asked: Any) -> float | None:
    """Return a number above 0 and up to 1, or one that is written as 1/3; None for all else."""
    try:
        share = float(Fraction(asked)) if isinstance(asked, str) else asked
    except (ValueError, ZeroDivisionError):
        return None
    return float(share) if is_number(share) and 0 < share <= 1 else None


def _is_whole_part(size: int, share: float) -> bool:
    return size * share >= 1 and abs(size * share - round(size * share)) < 1e-6 * size


def _widths(whole: ModelConfig) -> dict[str, int]:
    """Return the widths that a share of the width applies to."""
    found = {name: getattr(whole, name) for name in WIDTHS[:3]}
    if whole.n_experts:
        found["d_expert"] = whole.expert_width
    if whole.shared_width:
        found["d_shared"] = whole.shared_width
    return found


def scaled(whole: ModelConfig, depth: float, width: float) -> ModelConfig:
    """Return a model of a share of the layers, and of the width of every block; heads keep their
    channels, and key-value heads stay as many where the share leaves no whole number of them.
    """
    if depth == width == 1.0:
        return whole
    sizes: dict[str, Any] = {key: round(size * width) for key, size in _widths(whole).items()}
    kv_heads = whole.n_kv_heads * width
    fits = _is_whole_part(whole.n_kv_heads, width)
    return replace(
        whole,
        **sizes,
        n_layers=round(whole.n_layers * depth),
        n_kv_heads=round(kv_heads) if fits else math.gcd(whole.n_kv_heads, sizes["n_heads"]),
        head_dim=whole.head_width,
        layer_ffn=None
        if whole.layer_ffn is None
        else _shared_widths(whole.layer_ffn, depth, width),
    )


def _shared_widths(widths: tuple[int, ...], depth: float, width: float) -> tuple[int, ...]:
    kept = round(len(widths) * depth)
    return tuple(round(widths[at * len(widths) // kept] * width) for at in range(kept))


def _by_parameters(read: MappingReader, after: GrowingStage) -> ModelConfig:
    """Return the model nearest to a size of those that the next stage's operator can grow."""
    try:
        asked = size_of(read.values["parameters"])
    except ValueError as error:
        read.problem("parameters", str(error))
        return after.config
    able = [config for config in smaller(after.config) if grows_into(config, after)]
    found = sorted(able, key=lambda c: abs(math.log(parameters_non_embedding(c) / asked)))
    if not found:
        why = f"from no smaller model does {after.operator} make stage {after.label}"
        read.problem("parameters", f"{why}; give depth, width or model")
        return after.config
    nearest = parameters_non_embedding(found[0])
    if abs(nearest / asked - 1) > NEAR:
        sizes = sorted({parameters_non_embedding(config) for config in able})
        told = ", ".join(f"{size:,}" for size in sizes)
        why = f"{asked:,}: no model from which {after.operator} makes stage {after.label} comes "
        read.problem("parameters", f"{why}within {NEAR:.0%}; there are {told}")
    return found[0]


def grows_into(config: ModelConfig, after: GrowingStage) -> bool:
    """Return whether the operator of a stage makes its model of this one."""
    from motet.models.growth.registry import operator  # brings torch

    try:
        return not operator(after.operator, **after.options).problems(config, after.config)
    except ModelError:
        return False  # what is wrong with the operator is told of its own stage


def smaller(whole: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the models that have whole parts of the depth and of the width; of those with as many
    parameters the ones that keep both in balance come first.
    """
    parts = range(1, MOST_PARTS + 1)
    depths = [n for n in parts if whole.n_layers % n == 0]
    widths = [n for n in parts if all(size % n == 0 for size in _widths(whole).values())]
    pairs = sorted(itertools.product(depths, widths), key=lambda pair: abs(pair[0] - pair[1]))
    for depth, width in pairs:
        config = scaled(whole, 1 / depth, 1 / width)
        if (depth, width) != (1, 1) and not problems(config):
            yield config
