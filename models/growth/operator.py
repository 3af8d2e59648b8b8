"""What an operator is: what it says of itself, which pairs of configs it takes, its `Growth`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from motet.core.errors import Problem
from motet.models.config import TRAINING_FIELDS, ModelConfig, ModelError, llama_heads, problems
from motet.models.growth.growth import Growth
from motet.models.growth.state import Moments
from motet.models.hf_kinds import lost_class

DEPTH = ("n_layers", "layer_ffn", "n_dense_layers", "moe_every")
WIDTH = (
    "d_model",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ffn",
    "layer_ffn",
    "d_expert",
    "d_shared",
)
TIES = ("tied_embeddings",)
FREE = (*TRAINING_FIELDS, "init_std")
"""Settings that say nothing of what the weights compute."""


@dataclass(frozen=True)
class OperatorFacts:
    """What an operator says of itself.

    Attributes:
        name: that it is asked for by.
        source: paper or code, and section.
        exact: when the new model computes what the old one does; `Growth.exact` says it of a pair.
        loss_jump_nats: the most that the loss of a trained model is expected to rise by, right
            after; 0 where exact. A larger rise means that something went wrong.
        jump_seen: where that bound comes from.
        symmetry: what makes copies go ways of their own.
        moments: what becomes of m, v and step unless the user says otherwise.
        state: the same in words.
        changes: settings of the config that may differ.
        rewarm: after it new elements have their learning rate warmed up again:
            (peak over the current rate, steps); None = as the schedule says.
        shrinks: the new model is the smaller one.
        negative: published, or measured here, as worse than training from scratch.
    """

    name: str
    source: str
    exact: str
    loss_jump_nats: float
    jump_seen: str
    symmetry: str
    moments: Moments
    state: str
    changes: tuple[str, ...]
    rewarm: tuple[float, int] | None = None
    shrinks: bool = False
    negative: bool = False


@dataclass(frozen=True)
class GrowthOperator(ABC):
    """A way to make one model of another; its fields are its options.

    Attributes:
        moments: what becomes of m, v and step ("keep", "tile", "drop", "asymmetric"); None = what
            its facts say.
        seed: of what it draws.
    """

    facts: ClassVar[OperatorFacts]
    moments: str | None = None
    seed: int = 0

    @abstractmethod
    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """Return why two sound configs, which differ where they may, cannot be a pair."""

    @abstractmethod
    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """Return the growth of a pair that has no problems."""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.facts.name

    @property
    def rule(self) -> Moments:
        """What becomes of m, v and step."""
        return self.facts.moments if self.moments is None else Moments(self.moments)

    def problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """Return why this operator cannot make `target` of `source`."""
        for name, config in (("the old model", source), ("the new model", target)):
            if wrong := problems(config):
                return [Problem(f"{name}: {setting}", why) for setting, why in wrong]
            if unknown := foreign(config):
                return [
                    Problem(f"{name}: {setting}", "is of a kind whose weights no operator maps")
                    for setting in unknown
                ]
        if self.moments is not None and self.moments not in {rule.value for rule in Moments}:
            known = ", ".join(rule.value for rule in Moments)
            return [Problem("moments", f"{self.moments!r} is not one of {known}")]
        found = [*self._pair_problems(source, target)]
        # Heads that do not divide the stream are growth's to take: a later one may mend them.
        if not found and not llama_heads(target) and (why := lost_class(target, source)):
            found = [Problem("the new model", f"could not be exported: {why}")]
        return found or self.own_problems(source, target)

    def growth(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """Return how `target` is made of `source`.

        Raises:
            ModelError: it cannot be; the message says which setting, why, and what would work.
        """
        if found := self.problems(source, target):
            told = "; ".join(map(str, found))
            raise ModelError(f"operator {self.name!r} cannot make this model: {told}")
        return self.mapped(source, target)

    def _pair_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        allowed = {*self.facts.changes, *FREE}
        found = []
        for setting in fields(ModelConfig):
            old, new = sized(source, setting.name), sized(target, setting.name)
            if old != new and setting.name not in allowed:
                why = f"{old!r} cannot become {new!r}: {self._why(setting.name)}"
                found.append(Problem(setting.name, why))
        if source.head_width != target.head_width:
            found.append(
                Problem(
                    "head_dim",
                    f"heads of {source.head_width} channels cannot get {target.head_width}: rotary "
                    f"positions turn channels in pairs; set head_dim={source.head_width} and "
                    "change the number of heads",
                )
            )
        if target.tied_embeddings and not source.tied_embeddings:
            why = "an embedding and a head that differ cannot be one; leave it false"
            found.append(Problem("tied_embeddings", why))
        return found or self._same_problems(source, target)

    def _same_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        keys = [setting.name for setting in fields(ModelConfig) if setting.name not in FREE]
        if any(sized(source, key) != sized(target, key) for key in keys):
            return []
        able = ", ".join(self.facts.changes)
        return [Problem("model", f"both configs are the same; change one of {able}")]

    def _why(self, setting: str) -> str:
        able = ", ".join(self.facts.changes)
        return f"this operator changes {able}; keep it, or take an operator that changes {setting}"


def foreign(config: ModelConfig) -> list[str]:
    """Return the settings of weights that no operator knows: those of some imported models."""
    names = ["norm_position"] if config.norm_position == "both" else []
    names += [name for name in ("o_bias", "mlp_bias") if getattr(config, name)]
    return [f"{name}={getattr(config, name)!r}" for name in names]


def sized(config: ModelConfig, setting: str) -> Any:
    """Return a setting, or the number that stands for it where it is left out."""
    resolved = {
        "head_dim": config.head_width,
        "d_expert": config.expert_width if config.n_experts else 0,
        "d_shared": config.shared_width if config.n_experts else 0,
        # With a width for each layer, or experts in all of them, nothing has this one.
        "d_ffn": _dense_widths(config),
        "layer_ffn": None,
    }
    return resolved.get(setting, getattr(config, setting))


def _dense_widths(config: ModelConfig) -> tuple[int, ...]:
    """Return the hidden widths that layers without experts have."""
    layers = [layer for layer in range(config.n_layers) if not config.has_experts(layer)]
    return tuple(sorted({config.ffn_width(layer) for layer in layers}))


def kind_problems(
    source: ModelConfig, target: ModelConfig, layers: Sequence[int], widths: bool = True
) -> list[Problem]:
    """Return where a layer stands for one of another kind: with experts for without, or of another
    hidden width.

    Args:
        layers: of each new layer the old one that it stands for.
        widths: hidden widths must be equal too.
    """
    wanted = [source.has_experts(old) for old in layers]
    there = [target.has_experts(new) for new in range(len(layers))]
    if wanted != there:
        at = next(i for i, pair in enumerate(zip(wanted, there, strict=True)) if pair[0] != pair[1])
        words = {True: "has experts", False: "has none"}
        why = (
            f"layer {at} {words[there[at]]}, and layer {layers[at]}, which it would stand for, "
            f"{words[wanted[at]]}; {_would_fit(target, wanted)}"
        )
        return [Problem("moe_every", why)]
    if not widths:
        return []
    dense = [(new, old) for new, old in enumerate(layers) if not target.has_experts(new)]
    asked = [source.ffn_width(old) for _, old in dense]
    for (new, old), width in zip(dense, asked, strict=True):
        if target.ffn_width(new) != width:
            should = [source.ffn_width(old) for old in layers]
            fits = f"d_ffn={width}" if len(set(asked)) == 1 else f"layer_ffn={should}"
            why = (
                f"layer {new} has {target.ffn_width(new)} hidden channels, and layer {old}, which "
                f"it would stand for, {width}; set {fits}"
            )
            return [Problem("d_ffn", why)]
    return []


def _would_fit(target: ModelConfig, wanted: list[bool]) -> str:
    """Return the settings that put experts where they are wanted, in words."""
    depth = len(wanted)
    for dense, every in itertools.product(range(depth), range(1, depth + 1)):
        config = replace(target, n_dense_layers=dense, moe_every=every)
        if [config.has_experts(layer) for layer in range(depth)] == wanted:
            return f"set n_dense_layers={dense} and moe_every={every}"
    marks = "".join("E" if has else "d" for has in wanted)
    return f"no n_dense_layers and moe_every give {marks} (E = experts); take another operator"


def old_name(weight_name: str, layers: Sequence[int | None], source: ModelConfig) -> str | None:
    """Return the name in the old model of what a weight stands for; None where it begins anew.

    Args:
        layers: of each new layer the old one.
    """
    if weight_name == "head.weight" and source.tied_embeddings:
        return "embedding.weight"
    if not weight_name.startswith("blocks."):
        return weight_name
    number, _, rest = weight_name.removeprefix("blocks.").partition(".")
    old = layers[int(number)]
    return None if old is None else f"blocks.{old}.{rest}"


def layer_of(weight_name: str) -> int | None:
    """Return the layer of a weight; None outside the blocks."""
    if not weight_name.startswith("blocks."):
        return None
    return int(weight_name.split(".")[1])
