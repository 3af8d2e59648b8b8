"""What the loss of a stage is and who trains in it, beside its one model: a model that is followed,
slices, layers that run several times; and which options do not go together. Read from the options
of a progressive family. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from motet.core.errors import suggest
from motet.core.schema import MappingReader, is_number
from motet.models.config import ModelConfig
from motet.models.width_multipliers import fan_in_ratio, uneven

NOT_NESTED = {
    "distill": "its slices learn from labels, or follow the largest (nested.loss: distill)",
    "rewarm_steps": "a rate of their own for new values would be shared by slices that have "
    "none; set warmup_steps",
    "virtual_depth": "a slice of layers that run several times is no member",
    "until": "its loss is that of other members every step, and has no slope; give steps or tokens",
}
"""What no nested stage has beside it, and why."""
NOT_VIRTUAL = {
    "until": "its loss is that of another depth every step, and has no slope",
    "distill": "a step of another depth would follow the teacher as another model",
}
NO_TEACHER = ("teacher", "teacher_step", "ema_momentum", "ema_steps", "deploy")
LEARNED = ("ligo", "mango")
ALONE = {
    **dict.fromkeys(LEARNED, "learns width and depth at once"),
    "prune": "measures the model that stands before it",
}
"""Operators that go with no other in a pair, and why."""
DISTILLED = ("labels", "divergence", "of")


class Distillation(NamedTuple):
    """What the loss of a stage is, beside or instead of the labels.

    Attributes:
        labels, divergence: weights of the cross-entropy, and of KL(teacher || model).
        of: name of the stage whose last model is the teacher; None = the one before.
    """

    labels: float = 0.0
    divergence: float = 1.0
    of: str | None = None


def layout_of(read: MappingReader, last: bool) -> Mapping[str, Any]:
    """Return what a stage has otherwise than the section `layout`."""
    if last and "layout" in read.values:
        read.problem("layout", "the last stage has the layout of the run; set it there")
    return read.mapping("layout")


def virtual_of(read: MappingReader, last: bool) -> bool:
    """Return whether `virtual_depth: lvps` is asked for."""
    if "virtual_depth" not in read.values:
        return False
    read.choice("virtual_depth", ("lvps",), "lvps")
    if last:
        read.problem("virtual_depth", "the last stage has all layers itself; leave it out")
    for key, why in NOT_VIRTUAL.items():
        if key in read.values:
            read.problem("virtual_depth", f"does not go with {key} of the same stage: {why}")
    return True


def nested_of(read: MappingReader) -> Mapping[str, Any] | None:
    """Return `nested: {members: {half: {d_ffn: 0.5}}}` of a stage."""
    asked = read.values.get("nested")
    if asked is None:
        return None
    if not isinstance(asked, Mapping):
        read.refuse("nested", asked, "options of a nested family, as {members: [30m, 60m]}")
        return None
    for key in NOT_NESTED:
        if key in read.values:
            read.problem("nested", f"does not go with {key} of the same stage: {NOT_NESTED[key]}")
    for key in NO_TEACHER:
        if key in asked:
            read.problem(
                f"nested.{key}",
                "a stage of a family that grows keeps no second set of weights; leave it out "
                "(loss distill follows the largest of the same weights)",
            )
    return asked


def distillation_of(read: MappingReader) -> Distillation | None:
    """Return what `distill: {}` or `{labels: 0.5, divergence: 0.5, of: large}` asks for."""
    asked = read.values.get("distill")
    if asked is None:
        return None
    if not isinstance(asked, Mapping):
        read.refuse("distill", asked, "{}, or weights such as {labels: 0.5, divergence: 0.5}")
        return None
    for key in asked:
        if key not in DISTILLED:
            why = (
                f"is no part of it{suggest(str(key), DISTILLED)}; there are {', '.join(DISTILLED)}"
            )
            read.problem(f"distill.{key}", why)
    found = {key: asked[key] for key in DISTILLED if key in asked}
    for key in ("labels", "divergence"):
        value = found.get(key, 1.0)
        if not is_number(value) or value < 0 or (key == "divergence" and value == 0):
            least = "above 0" if key == "divergence" else "of at least 0"
            read.problem(f"distill.{key}", f"{value!r:.60} is not a number {least}")
            return None
    if not isinstance(found.get("of", ""), str):
        read.problem("distill.of", f"{found['of']!r:.60} is not the name of a stage")
        return None
    return Distillation(**found)


def virtual_faults(virtual: bool, config: ModelConfig, where: str) -> list[str]:
    """Say why layers of a stage cannot run several times."""
    if not virtual or not config.n_experts:
        return []
    why = "a token that visits a layer several times is counted by its experts as several"
    return [f"{where}.virtual_depth: {why}; leave it out, or the experts"]


def alone(operator: str, where: str) -> list[str]:
    """Say that an operator goes with no other, where it is one of a pair."""
    parts = [part.strip() for part in operator.split("+")]
    return [
        f"{where}.operator: {part} {ALONE[part]}, and goes with no other operator; write {part} "
        "alone"
        for part in parts
        if part in ALONE and len(parts) > 1
    ][:1]


def multiplies(read: MappingReader) -> bool:
    """Return whether `width_multipliers: mup` is asked for."""
    accepts = lambda value: value in (None, "mup")  # noqa: E731
    return read.checked("width_multipliers", None, accepts, "mup, or left out") is not None


def multiplier_faults(configs: Sequence[ModelConfig], nested: object | None) -> list[str]:
    """Say why learning rates of the models of all stages, in order, cannot follow their widths.

    Args:
        nested: who trains slices; None = nobody.
    """
    base, why = configs[0], ""
    if nested is not None:
        why = (
            "slices of a nested stage share weights, and each would ask for rates of its own "
            "width; leave it out, or nested"
        )
    elif uneven(base):
        why = (
            f"layers of the first stage have hidden widths of {list(base.layer_ffn or ())}, and "
            "none is the one to compare others with; give it one width, or leave it out"
        )
    elif all(set(fan_in_ratio(base, config).values()) == {1.0} for config in configs):
        why = "all stages are as wide as the first, so that it would do nothing; leave it out"
    return [f"width_multipliers: mup: {why}"] if why else []
