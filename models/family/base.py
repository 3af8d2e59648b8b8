"""What a family of models is: members, which of them a step trains, and the stages of a run.

Torch-free. The whole model is the member None; every other member is a plain model of its own that
takes part of the whole model's weights. A kind of family is a class that extends `Family`; ours
stand in `FAMILIES`, and a user's own is named in run.yaml as `family.kind: my_family.py:Class`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from motet.core.errors import UserError
from motet.core.plugins import MISTAKES, place
from motet.models.config import ModelConfig, problems
from motet.models.family.frozen_members import member_facts as member_facts
from motet.models.family.frozen_members import members_of as members_of
from motet.models.hf_kinds import lost_class
from motet.models.member import Choice as Choice
from motet.models.member import Exit as Exit
from motet.models.member import Member as Member
from motet.models.member import StepChoices as StepChoices
from motet.models.member import TeacherUpdate as TeacherUpdate
from motet.models.member import Term as Term
from motet.models.member import block_cuts, name_of

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
WHOLE = "whole"
WhoTrains = str | None | Member | Term
"""Who trains: a member by name or as a value, None for the whole model; or with its loss."""
AXES = (
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "layer_ffn"),
    *("n_experts", "d_expert", "d_shared", "n_dense_layers", "moe_every"),
)
"""What a member's config may have other than the whole model's."""


@dataclass(frozen=True)
class TrainingStage:
    """A stretch of the run with a learning-rate schedule of its own.

    Attributes:
        start_step, steps: where it begins, and how long it is.
        lr_scale: its peak learning rate over the run's.
        warmup_steps: None = as the run's schedule.
        held: where it ends is not known: after the warm-up the learning rate stays.
    """

    start_step: int
    steps: int
    lr_scale: float = 1.0
    warmup_steps: int | None = None
    held: bool = False


class Family(ABC):
    """The models that one run delivers.

    Every method is a pure function of its arguments and of what the family was made from: ranks and
    restarts decide alike without talking.

    Args:
        whole: the model that holds all weights.
        options: `family.options` of run.yaml.
        seed: of the run.

    Attributes:
        draws: equal, consecutive shares of a step's sequences, for each of which `choose` says who
            trains on it; None: as many as a rank has micro-batches when the run begins. Ranks share
            each of them, so that who trains on a sequence depends on no layout.
        by_replica: ranks may train different members at the same time: a rank's micro-batch lies in
            one share, and replicas work on different ones. Members must have all layers then.
        mask_update: values outside all slices of a step stay as they are: no momentum, no decay.
        normalize: "world": a value's gradient is a mean over all shares of a step; "users": over
            those whose members used it.
        has_teacher: a second set of the weights is kept, which terms may follow (`Term.kept`) and
            `teacher_update` fills.
        order_at_step: before it, channels are put in the order of their importance, once
            (`importance.py`), as the next `order_sequences` sequences show it.
    """

    draws: int | None = None
    by_replica: bool = False
    mask_update: bool = False
    normalize: str = "world"
    has_teacher: bool = False
    order_at_step: int | None = None
    order_sequences: int = 1024

    def __init__(self, whole: ModelConfig, options: Mapping[str, Any], seed: int) -> None:
        self.whole, self.options, self.seed = whole, options, seed

    @abstractmethod
    def members(self) -> Sequence[Member]:
        """Return every member but the whole model, the same ones for the whole run."""

    def problems(self, steps: int) -> list[str]:
        """Return why this family cannot train for so many steps, in words."""
        return []

    def needs(self) -> tuple[str, ...]:
        """Return what it asks of an engine beside members: options by name (`refusals.NEEDS`)."""
        asked = {
            "mask_update": self.mask_update,
            "normalize": self.normalize != "world",
            "teacher": self.has_teacher,
            "order_at_step": self.order_at_step is not None,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    def choose(self, step: int, draws: int) -> Sequence[Sequence[WhoTrains]]:
        """Return who trains on each of `draws` equal shares of a step's sequences.

        The loss of a share is the mean over its members, or the sum of what its `Term`s say. A
        member need not be one of `members()`: any part of the whole model can train.
        """
        return [(None,)] * draws

    def teacher_update(self, step: int) -> TeacherUpdate | None:
        """Return what happens to the kept teacher before a step; None: nothing."""
        return None

    def stage(self, step: int) -> TrainingStage | None:
        """Return the stage that a step belongs to; None where the whole run has one schedule."""
        return None

    def model_at(self, step: int) -> ModelConfig:
        """Return the model whose parts train in a step."""
        return self.whole

    def ordering(self, step: int) -> tuple[int, int] | None:
        """Return before which step channels are put in order, and on how many sequences, of the
        model that trains in a step; None: they are not.
        """
        return None if self.order_at_step is None else (self.order_at_step, self.order_sequences)

    def update_rule(self, held: Member | None) -> tuple[bool, bool]:
        """Return (`mask_update`, gradients are means over users) of a model that trains."""
        return self.mask_update, self.normalize == "users"


class WholeModel(Family):
    """One model: no members beside it."""

    def members(self) -> Sequence[Member]:
        return ()


def member_problems(whole: ModelConfig, members: Sequence[Member]) -> list[str]:
    """Return what is wrong with the members of a family, in words."""
    if strange := [why for member in members if (why := _strange(member))]:
        return strange
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    found = [f"member {name!r} is there twice" for name in twice]
    for member in members:
        found += [f"member {member.name!r}: {why}" for why in _faults(whole, member)]
    return found


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
    layers, groups = member.layers, member.groups
    if type(groups) is not int or groups < 1:
        return f"member {member.name!r}: groups are {groups!r:.60}; at least 1"
    if not isinstance(layers, tuple) or any(type(layer) is not int for layer in layers):
        return f"member {member.name!r}: layers are {layers!r:.60}; they must be a tuple of numbers"
    return None


def _faults(whole: ModelConfig, member: Member) -> Iterator[str]:
    if not NAME.fullmatch(member.name) or member.name == WHOLE:
        yield f"is no name; a name matches {NAME.pattern} and is not {WHOLE!r}"
    layers, depth = member.layers, whole.n_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        yield f"layers {list(layers)} are not a rising choice of 0 to {depth - 1}"
        return
    config = member.config
    if faults := [f"{setting} {why}" for setting, why in problems(config)]:
        yield from faults
        return
    if config.n_layers != len(layers):
        yield f"n_layers={config.n_layers} is not the number of its layers, {len(layers)}"
        return
    wanted = {**vars(whole), **whole.marks_of(layers)}
    different = [key for key in wanted if key not in AXES and vars(config)[key] != wanted[key]]
    if different:
        yield (
            f"its config differs from the whole model's in {', '.join(different)}; a member is a "
            f"part of the whole model: {', '.join(AXES)} alone may differ"
        )
    yield from _slice_faults(whole, member)


def _slice_faults(whole: ModelConfig, member: Member) -> Iterator[str]:
    """Say where a member is no slice of the whole model."""
    config, layers = member.config, member.layers
    if config.head_width != whole.head_width:
        yield (
            f"its heads have {config.head_width} channels, the whole model's {whole.head_width}; "
            f"set head_dim={whole.head_width}"
        )
    ratio = whole.n_heads // whole.n_kv_heads
    if config.n_heads != ratio * config.n_kv_heads:
        yield (
            f"n_heads={config.n_heads} with n_kv_heads={config.n_kv_heads}: a key-value head takes "
            f"its {ratio} queries with it; use n_heads={ratio * config.n_kv_heads}"
        )
    if why := lost_class(config, whole):
        yield f"{why}; it could not be exported"
    routed = [whole.has_experts(layer) for layer in layers]
    if routed != [config.has_experts(at) for at in range(len(layers))]:
        yield "its layers with experts are not those of the layers that it takes"
        return
    names = ("d_model", "n_kv_heads", "a layer's d_ffn", "n_experts", "d_expert", "d_shared")
    told = set()
    for cuts in block_cuts(whole, member):
        for name, cut in zip(names, cuts, strict=True):
            if cut is None:
                continue
            if cut.kept > cut.whole:
                told.add(f"{name}={cut.kept} is more than the whole model's {cut.whole}")
            elif cut.kept % cut.groups or cut.whole % cut.groups:
                told.add(
                    f"{name}={cut.kept} of {cut.whole} cannot be cut in {cut.groups} equal "
                    f"groups; groups={math.gcd(cut.kept, cut.whole)} would fit it"
                )
    yield from sorted(told)


def choices(
    family: Family, members: Mapping[str, Member], step: int, draws: int
) -> list[Choice] | None:
    """Return who trains on each share of a step; None where it is the whole model alone.

    Raises:
        UserError: the family chooses for another number of shares, nobody for one of them, or
            something that is no part of the whole model.
    """
    call = f"choose({step}, {draws})"
    with _mistakes(family, call):
        given = [tuple(choice) for choice in family.choose(step, draws)]
        whole = family.model_at(step)
        found = [_choice(family, whole, members, choice) for choice in given]
    if len(found) != draws or not all(found):
        raise UserError(
            f"family.kind: {type(family).__name__}.{call} gave {given}; it must give {draws} "
            f"tuples of {', '.join(members)}, None (the whole model), a Member or a Term"
        )
    chosen = [choice for choice in found if choice]
    if family.by_replica and (why := _uneven(whole, chosen)):
        raise UserError(f"family.kind: {type(family).__name__}.{call} {why}")
    alone = all(choice == (Term(None),) for choice in chosen) and not family.has_teacher
    return None if alone else chosen


def _uneven(whole: ModelConfig, chosen: Sequence[Choice]) -> str:
    """Say why replicas cannot work on different shares of a step; "" where they can.

    FSDP2 gathers a block on all ranks or on none: another number of layers on one rank hangs.
    """
    for term in (term for choice in chosen for term in choice):
        if len(term.layers(whole.n_layers)) < whole.n_layers:
            return (
                f"trains {name_of(term.member) or WHOLE!r}, which leaves out layers, on some "
                "replicas alone; members must have all layers, or set by_replica = False"
            )
    kinds = {
        (any(term.kept for term in choice), *(term.trains for term in choice)) for choice in chosen
    }
    if len(kinds) > 1:
        return "gives shares with other numbers of passes, which replicas would wait for"
    return ""


def _choice(
    family: Family, whole: ModelConfig, members: Mapping[str, Member], asked: Sequence[WhoTrains]
) -> Choice | None:
    """Return the passes that one tuple asks for; None where it cannot be."""
    terms: list[Term] = []
    for one in asked:
        term = one if isinstance(one, Term) else Term(one, 1.0 / len(asked))  # type: ignore[arg-type]
        known, member = _known(whole, members, term.member)
        also, teacher = _known(whole, members, term.teacher)
        weights = (term.labels, term.distill, term.kept, *(out.labels for out in term.exits))
        sound = min(weights) >= 0 and sum(weights) < math.inf
        follows = not term.distill or teacher in [earlier.member for earlier in terms]
        follows = follows and (family.has_teacher or not term.kept)
        if not (known and also and sound and follows and _on_the_way(whole, member, term)):
            return None
        terms.append(term._replace(member=member, teacher=teacher))
    return tuple(terms) or None


def _on_the_way(whole: ModelConfig, member: Member | None, term: Term) -> bool:
    """Return whether a pass has the blocks that it skips, and its exits lie in it: a member of the
    first of its blocks, at its widths.
    """
    runs = member or Member(WHOLE, whole, tuple(range(whole.n_layers)))
    return set(term.skips) <= set(runs.layers) and all(
        _known(whole, {}, out.member)[0]
        and out.member.layers == runs.layers[: len(out.member.layers)]
        and block_cuts(whole, out.member) == block_cuts(whole, runs)[: len(out.member.layers)]
        for out in term.exits
    )


def _known(
    whole: ModelConfig, members: Mapping[str, Member], who: object
) -> tuple[bool, Member | None]:
    """Return whether somebody can train, and as which member."""
    if isinstance(who, str):
        return who in members, members.get(who)
    if isinstance(who, Member):
        return not _faults_of(whole, who), who
    return who is None, None


@lru_cache(maxsize=4096)
def _faults_of(whole: ModelConfig, member: Member) -> tuple[str, ...]:
    return (*filter(None, [_strange(member)]),) or tuple(_faults(whole, member))


def teacher_update_of(family: Family, step: int) -> TeacherUpdate | None:
    """Return what happens to the kept teacher before a step.

    Raises:
        UserError: the family fails, or gives no update that can be.
    """
    with _mistakes(family, f"teacher_update({step})"):
        update = family.teacher_update(step) if family.has_teacher else None
        good = update is None or (0 <= update.keep <= 1 and 0 <= update.at <= step)
    if not good:
        raise UserError(
            f"family.kind: {type(family).__name__}.teacher_update({step}) gave {update!r:.120}; it "
            "must give None or a TeacherUpdate of a step until then, with keep from 0 to 1"
        )
    return update


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
