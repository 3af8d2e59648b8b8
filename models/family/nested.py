"""`family: {kind: nested}`: one set of weights whose slices are models of their own. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.errors import Problem, raise_problems
from motet.core.schema import MappingReader, is_sequence
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import Family, Member, WhoTrains, member_problems
from motet.models.family.layerskip import LayerSkip, read_layerskip
from motet.models.family.samplers import SAMPLERS, DrawKey, phase_at
from motet.models.family.space import (
    KEYS,
    SliceError,
    SliceRule,
    member_of,
    members_by_size,
    unnested,
    whole_of,
)
from motet.models.family.teachers import FrozenTeacher, read_teacher
from motet.models.family.two_stage import TwoStage, read_two_stage
from motet.models.member import TeacherUpdate, Term

WHERE = "family.options"
LOSSES = ("labels", "distill", "poa", "tsjt", "layerskip")
OPTIONS = (
    *(
        "members",
        "axes",
        "depth",
        "groups",
        "layer_groups",
        "monotone",
        "sampler",
        "draws",
        "by_replica",
        "phases",
    ),
    *("loss", "distill_weight", "distill_from_step", "poa_weight", "mask_update", "normalize"),
    *("teacher", "teacher_step", "ema_momentum", "ema_steps", "deploy", "tsjt", "layerskip"),
    *("order_at_step", "order_sequences"),
)
POA_WEIGHT = 0.8
"""lambda of POA (its `vit_ssl_default_config.yaml`)."""


class NestedFamily(Family):
    """Members that are slices of the whole model, and a rule who trains on what.

    Options:
        members: name -> {axis: size or share} (`space.member_of`), or sizes as `[125m, 250m]`.
        axes: that members by size may shrink.
        depth: "spread": a depth takes layers spread evenly; "first": the first ones.
        groups: equal groups of heads, hidden channels and experts of which a member takes the
            first each; tensor- and expert-parallel degrees must divide it.
        layer_groups: equal groups of consecutive layers of which a member keeps equally many each,
            so that the stages of a pipeline, whole groups, keep in step.
        monotone: refuse members of which the smaller is no part of the larger.
        sampler: one of `samplers.SAMPLERS`.
        draws, by_replica: see `Family`.
        phases: of `shrinking` (Once-for-All, arXiv:1908.09791): {until_step, smallest} each.
        loss: "labels"; "distill": members beside the largest follow it, from
            `distill_from_step` on with the weight `distill_weight`; "poa": as POA adapted to
            language models, `poa_weight` for the largest. "tsjt" (`two_stage.py`) and "layerskip"
            (`layerskip.py`) say who trains as well: they take no sampler.
        teacher: whom members follow with "distill", and with "poa" as well: the "largest" of the
            same weights, or a second set of the whole model's (`teachers.py`): "frozen" or "ema".
        deploy: which weights are exported and evaluated: "student", or those of the "ema".
        mask_update, normalize, order_at_step, order_sequences: see `Family`.

    Args:
        where: of the options, in messages.
        joined: members beside those that the options ask for.
    """

    def __init__(
        self,
        whole: ModelConfig,
        options: Mapping[str, Any],
        seed: int,
        where: str = WHERE,
        joined: Sequence[Member] = (),
    ) -> None:
        super().__init__(whole, options, seed)
        self.where = where
        problems: list[Problem] = []
        read = MappingReader(options, where, problems, OPTIONS)
        self._read(read)
        monotone = read.checked("monotone", True, _is_bool, "true or false")
        first = read.choice("depth", ("spread", "first"), "spread") == "first"
        how = SliceRule(self.groups, self.layer_groups, first)
        asked = not joined or "members" in options
        sliced = [*joined, *(_members(whole, read, how, where) if asked else [])]
        raise_problems(problems)
        self._members = sorted(sliced, key=lambda m: (_size(m), m.name))
        self._refuse(monotone, read)
        self.phases = self._phases(read)
        self.teacher = read_teacher(read, self.phases[0][0] if self.phases else None)
        self.has_teacher = self.teacher is not None
        self._refuse_teacher(read)
        self.rule = self._rule(read)
        raise_problems(problems)

    def _read(self, read: MappingReader) -> None:
        """Take the plain options."""
        self.groups = read.whole("groups", 1, 1)
        self.layer_groups = read.whole("layer_groups", 1, 1)
        n_layers = self.whole.n_layers
        if n_layers % self.layer_groups:
            near = math.gcd(n_layers, self.layer_groups)
            why = f"{self.layer_groups} does not divide {n_layers} layers; {near} would"
            read.problem("layer_groups", why)
            self.layer_groups = near
        self.draws = read.whole("draws", None, 1)
        self.by_replica = read.checked("by_replica", False, _is_bool, "true or false")
        self.order_at_step = read.whole("order_at_step", None, 0)
        self.order_sequences = read.whole("order_sequences", 1024, 1)
        self.mask_update = read.checked("mask_update", False, _is_bool, "true or false")
        self.normalize = read.choice("normalize", ("world", "users"), "world")
        self.sampler = read.choice("sampler", list(SAMPLERS), "uniform")
        self.loss = read.choice("loss", LOSSES, "poa" if self.sampler == "poa" else "labels")
        self.distill_weight = read.number("distill_weight", 0.5, 0.0, 1.0)
        self.distill_from_step = read.whole("distill_from_step", None, 0)
        self.poa_weight = read.number("poa_weight", POA_WEIGHT, 0.0, 1.0)

    def members(self) -> Sequence[Member]:
        """See `Family.members`: the smallest first."""
        return self._members

    def _refuse(self, monotone: bool, read: MappingReader) -> None:
        """Gather what is wrong with members and rules together."""
        for why in member_problems(self.whole, self._members):
            read.problem("members", why)
        if read.problems:
            return
        for member in self._members:
            if _size(member) >= _size(None, self.whole):
                read.problem("members", f"member {member.name!r} is the whole model; leave it out")
        for one, other in itertools.combinations(self._members, 2):
            if (one.config, one.layers) == (other.config, other.layers):
                why = f"members {one.name!r} and {other.name!r} are the same slice; leave one out"
                read.problem("members", why)
        for why in unnested(self.whole, self._members) if monotone else ():
            read.problem("members", why)
        if self.loss == "poa" and self.sampler not in ("poa", "sandwich", "joint"):
            why = f"poa trains the largest on every share; sampler {self.sampler} does not"
            read.problem("loss", f"{why}; use poa, sandwich or joint")
        if self.sampler == "balanced" and (self.draws is None or self.draws % 2):
            read.problem("draws", f"{self.draws!r} is not even; sampler balanced draws in pairs")

    def _refuse_teacher(self, read: MappingReader) -> None:
        """Gather what is wrong with who is followed from when on; a frozen teacher is, once it is
        there.
        """
        frozen = self.teacher.step if isinstance(self.teacher, FrozenTeacher) else None
        if self.teacher is not None and self.loss not in ("distill", "poa"):
            why = f"is followed by nobody with loss {self.loss}; use distill or poa"
            read.problem("teacher", why)
        elif self.distill_from_step is None:
            self.distill_from_step = frozen
        elif frozen is not None and self.distill_from_step < frozen:
            why = f"{self.distill_from_step} is before the teacher is frozen, after step {frozen}"
            read.problem("distill_from_step", why)
        follows = self.loss == "distill" or self.teacher is not None
        if follows and self.distill_from_step is None:
            read.problem(
                "distill_from_step",
                "must say when distillation begins: from step 0 a teacher that knows nothing yet "
                "costs quality; the end of the warm-up is a good choice",
            )

    def teacher_update(self, step: int) -> TeacherUpdate | None:
        """See `Family.teacher_update`."""
        return None if self.teacher is None else self.teacher.update(step)

    def needs(self) -> tuple[str, ...]:
        """See `Family.needs`."""
        return (*super().needs(), *(["loss=layerskip"] if self.loss == "layerskip" else []))

    def _rule(self, read: MappingReader) -> TwoStage | LayerSkip | None:
        """Return the rule that says both who trains and with which loss, if there is one."""
        for name in ("tsjt", "layerskip"):
            if name in read.values and self.loss != name:
                read.problem(name, f"belongs to loss {name}, not to {self.loss}")
        if self.loss not in ("tsjt", "layerskip"):
            return None
        if "sampler" in read.values:
            read.problem("sampler", f"leave it out: loss {self.loss} says who trains on what")
        if self.loss == "tsjt":
            return read_two_stage(read, self._members)
        return read_layerskip(read, self.seed, self.whole, self._members)

    def _phases(self, read: MappingReader) -> list[tuple[int | None, int]]:
        """Return (end, smallest member) of every phase; the space only grows."""
        asked = read.sequence("phases")
        if self.sampler != "shrinking":
            if asked:
                read.problem("phases", f"belong to sampler shrinking, not to {self.sampler}")
            return []
        numbers = {member.name: at for at, member in enumerate(self._members)}
        numbers["whole"] = len(self._members)
        found: list[tuple[int | None, int]] = []
        for number, values in enumerate(asked):
            where = f"phases[{number}]"
            one = MappingReader(
                values, f"{self.where}.{where}", read.problems, ("until_step", "smallest")
            )
            until = one.whole("until_step", None, 1)
            smallest = one.choice("smallest", list(numbers), "whole")
            found.append((until, numbers[smallest]))
        ends = [until for until, _ in found[:-1] if until is not None]
        if not found or len(ends) < len(found) - 1 or found[-1][0] is not None:
            why = "do not cover the run: every phase but the last needs until_step, the last none"
            read.problem("phases", why)
        elif ends != sorted(set(ends)):
            read.problem("phases", f"end at {ends}; each must end after the one before")
        smallest_of = [smallest for _, smallest in found]
        if smallest_of != sorted(smallest_of, reverse=True):
            read.problem("phases", "take members away again; each may only add smaller ones")
        return found

    def problems(self, steps: int) -> list[str]:
        """See `Family.problems`."""
        ends = [until for until, _ in self.phases if until is not None]
        if ends and ends[-1] >= steps:
            return [f"phases: the last begins at step {ends[-1]}, but the run has {steps} steps"]
        if (self.order_at_step or 0) >= steps:
            return [f"order_at_step={self.order_at_step}: the run has {steps} steps"]
        if (self.distill_from_step or 0) >= steps:
            return [f"distill_from_step={self.distill_from_step}: the run has {steps} steps"]
        return self.rule.problems(steps) if self.rule else []

    def choose(self, step: int, draws: int) -> Sequence[Sequence[WhoTrains]]:
        """See `Family.choose`."""
        if self.rule is not None:
            return [self.rule.terms(step, share, draws) for share in range(draws)]
        first = phase_at(self.phases, step) if self.phases else 0
        known: list[Member | None] = [*self._members, None][first:]
        sampler, found = SAMPLERS[self.sampler], []
        for share in range(draws):
            drawn = sampler(DrawKey(self.seed, step, share, draws, len(known)))
            found.append(self._terms([known[number] for number in drawn], step))
        return found

    def _terms(self, drawn: Sequence[Member | None], step: int) -> list[Term]:
        """Return the passes of a draw, with their losses."""
        each, weight = 1.0 / len(drawn), self.distill_weight
        follows = step >= (self.distill_from_step or 0)
        kept = weight if follows and self.teacher is not None else 0.0
        if self.loss == "poa" and len(drawn) > 1:
            largest, rest = self.poa_weight, (1.0 - self.poa_weight) / (len(drawn) - 1)
            return [
                Term(None, largest, kept=largest * kept)
                if member is None
                else Term(member, rest, rest, kept=rest * kept)
                for member in drawn
            ]
        if kept:
            return [Term(member, each * (1.0 - kept), kept=each * kept) for member in drawn]
        if self.loss != "distill" or not follows or drawn == [None]:
            return [Term(member, each) for member in drawn]
        terms = [
            Term(None, each)
            if member is None
            else Term(member, each * (1.0 - weight), each * weight)
            for member in drawn
        ]
        # A teacher that does not train on this share runs forward alone.
        return terms if drawn[0] is None else [Term(None, 0.0), *terms]


def _members(whole: ModelConfig, read: MappingReader, how: SliceRule, where: str) -> list[Member]:
    """Return the members that the options ask for, by name or by size."""
    asked = read.values.get("members")
    axes = read.sequence("axes") or [
        a for a in whole_of(whole) if a not in ("d_expert", "d_shared")
    ]
    if unknown := [axis for axis in axes if axis not in whole_of(whole)]:
        read.problem(
            "axes", f"{unknown[0]!r} is no axis of this model: {', '.join(whole_of(whole))}"
        )
        return []
    if is_sequence(asked) and asked:
        try:
            return members_by_size(whole, asked, axes, *how)
        except ValueError as error:
            read.problem("members", str(error))
            return []
    if not isinstance(asked, Mapping) or not asked:
        what = "name: {axis: size}, or a list of sizes as [125m, 250m]"
        said = "is not set" if asked is None else f"{asked!r} names no member"
        read.problem("members", f"{said}; write {what}")
        return []
    found = []
    for name, values in asked.items():
        one = MappingReader(values, f"{where}.members.{name}", read.problems, KEYS)
        try:
            found.append(member_of(whole, str(name), one.values, *how))
        except SliceError as error:
            one.problem(error.key, str(error))
    return found


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _size(member: Member | None, whole: ModelConfig | None = None) -> float:
    config = whole if member is None else member.config
    return math.inf if config is None else parameters_non_embedding(config)
