"""What a family of models is: members, which of them a step trains, and the stages of a run.

Torch-free. The whole model is the member None; every other member is a plain model of its own that
takes part of the whole model's weights. A kind of family is a class that extends `Family`; ours
stand in `FAMILIES`, and a user's own is named in run.yaml as `family.kind: my_family.py:Class`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from motet.core.errors import UserError
from motet.core.plugins import MISTAKES, place
from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.member import Choice as Choice
from motet.models.member import Member as Member

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
WHOLE = "whole"
MemberNames = tuple[str | None, ...]
"""The members that train on one micro-batch, by name; None is the whole model."""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TrainingStage:
    """A stretch of the run with a learning-rate schedule of its own.

    Attributes:
        start_step, steps: where it begins, and how long it is.
        lr_scale: its peak learning rate over the run's.
        warmup_steps: None = as the run's schedule.
    """

    start_step: int
    steps: int
    lr_scale: float = 1.0
    warmup_steps: int | None = None


class Family(ABC):
    """The models that one run delivers.

    Every method is a pure function of its arguments and of what the family was made from: ranks and
    restarts decide alike without talking.

    Args:
        whole: the model that holds all weights.
        options: `family.options` of run.yaml.
        seed: of the run.
    """

    def __init__(self, whole: ModelConfig, options: Mapping[str, Any], seed: int) -> None:
        self.whole, self.options, self.seed = whole, options, seed

    @abstractmethod
    def members(self) -> Sequence[Member]:
        """Return every member but the whole model, the same ones for the whole run."""

    def choose(self, step: int, micro_batches: int) -> Sequence[MemberNames]:
        """Return who trains on each micro-batch of a step; the loss is the mean over them.

        Micro-batch i of every rank trains the same members: they gather the same weights.
        """
        return [(None,)] * micro_batches

    def stage(self, step: int) -> TrainingStage | None:
        """Return the stage that a step belongs to; None where the whole run has one schedule."""
        return None


class WholeModel(Family):
    """One model: no members beside it."""

    def members(self) -> Sequence[Member]:
        return ()


FAMILIES: dict[str, type[Family]] = {WHOLE: WholeModel}


def member_problems(whole: ModelConfig, members: Sequence[Member]) -> list[str]:
    """Return what is wrong with the members of a family, in words."""
    if strange := [why for member in members if (why := _strange(member))]:
        return strange
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"member {name!r} is there twice" for name in twice]
    for member in members:
        problems += [f"member {member.name!r}: {why}" for why in _faults(whole, member)]
    return problems


def _strange(member: Any) -> str | None:
    """Say where a member is of other types than a `Member`: a frozen one is read back from JSON and
    must be equal.
    """
    if not isinstance(member, Member):
        return f"has {member!r:.60} among its members; each must be a Member"
    if not isinstance(member.name, str):
        return f"member {member.name!r:.60}: its name must be text"
    if not isinstance(member.config, ModelConfig):
        return f"member {member.name!r}: config is {member.config!r:.60}; it must be a ModelConfig"
    layers = member.layers
    if not isinstance(layers, tuple) or any(type(layer) is not int for layer in layers):
        return f"member {member.name!r}: layers are {layers!r:.60}; they must be a tuple of numbers"
    return None


def _faults(whole: ModelConfig, member: Member) -> Iterator[str]:
    if not NAME.fullmatch(member.name) or member.name == WHOLE:
        yield f"is no name; a name matches {NAME.pattern} and is not {WHOLE!r}"
    layers, depth = member.layers, whole.n_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        yield f"layers {list(layers)} are not a rising choice of 0 to {depth - 1}"
    wanted = replace(whole, n_layers=len(layers))
    different = [key for key, value in vars(wanted).items() if vars(member.config)[key] != value]
    if different:
        yield (
            f"its config differs from the whole model's in {', '.join(different)}; members are "
            "chosen by their layers, every other size is the whole model's"
        )


def member_weights(member: Member | None, whole: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return a member's weights under the names of its own plain model, from those of the whole
    model.

    Values are handed on as they are: tensors, shapes or anything else by weight.
    """
    if member is None:
        return dict(whole)
    number = {layer: at for at, layer in enumerate(member.layers)}
    found = {}
    for name, value in whole.items():
        if not name.startswith("blocks."):
            found[name] = value
            continue
        layer, _, rest = name.removeprefix("blocks.").partition(".")
        if int(layer) in number:
            found[f"blocks.{number[int(layer)]}.{rest}"] = value
    return found


def chosen(
    family: Family, members: Mapping[str, Member], step: int, micro_batches: int
) -> list[Choice] | None:
    """Return who trains on each micro-batch of a step; None where it is the whole model alone.

    Raises:
        UserError: the family chooses for another number of micro-batches, nobody for one of them,
            or a member that it does not have.
    """
    with _mistakes(family, f"choose({step}, {micro_batches})"):
        names = [tuple(choice) for choice in family.choose(step, micro_batches)]
        known = {None, *members}
        good = all(choice and known >= set(choice) for choice in names)
    if len(names) != micro_batches or not good:
        raise UserError(
            f"family.kind: {type(family).__name__}.choose({step}, {micro_batches}) gave {names}; "
            "it "
            f"must give {micro_batches} tuples of {', '.join(members)} or None (the whole model)"
        )
    if all(choice == (None,) for choice in names):
        return None
    return [tuple(None if name is None else members[name] for name in choice) for choice in names]


def stage_of(family: Family, step: int) -> TrainingStage | None:
    """Return the stage that a step belongs to.

    Raises:
        UserError: the family fails, or gives no stage that can be.
    """
    with _mistakes(family, f"stage({step})"):
        stage = family.stage(step)
        good = stage is None or (
            isinstance(stage, TrainingStage)
            and stage.start_step <= step < stage.start_step + stage.steps
            and 0 <= stage.lr_scale < math.inf
        )
    if not good:
        raise UserError(
            f"family.kind: {type(family).__name__}.stage({step}) gave {stage!r:.120}; it must give "
            "None or a TrainingStage that holds the step, with a finite lr_scale"
        )
    return stage


@contextmanager
def _mistakes(family: Family, call: str) -> Iterator[None]:
    """Turn what a user's own family raises into one error with file and line."""
    try:
        yield
    except UserError:
        raise
    except MISTAKES as error:
        why = place(error, type(family))
        raise UserError(f"family.kind: {type(family).__name__}.{call} failed: {why}") from None


def member_facts(members: Iterable[Member], sequence_length: int) -> list[dict[str, Any]]:
    """Return what a run's manifest says of its members."""
    return [
        {
            "name": member.name,
            "model": vars(member.config),
            "layers": list(member.layers),
            "parameters": counts.parameters(member.config),
            "parameters_non_embedding": counts.parameters_non_embedding(member.config),
            "flops_per_token": counts.training_flops_per_token(member.config, sequence_length),
        }
        for member in members
    ]


def members_of(manifest: Mapping[str, Any]) -> list[Member]:
    """Return the members that a manifest names; none where it was written without."""
    return [
        Member(entry["name"], ModelConfig(**entry["model"]), tuple(entry["layers"]))
        for entry in manifest.get("members", ())
    ]
