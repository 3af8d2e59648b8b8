"""Stages of a progressive family that train slices of their model, and what of an earlier stage's
space joins that of a later one. Torch-free, but for an operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from motet.core.errors import Problem, UserError, raise_problems, suggest
from motet.core.schema import is_sequence
from motet.models.config import ModelConfig
from motet.models.family.base import Member, WhoTrains
from motet.models.family.growing_stages import GrowingStage
from motet.models.family.nested import NestedFamily
from motet.models.family.space import SliceError, member_of, whole_of
from motet.models.family.staged import WHERE, StagedFamily
from motet.models.member import Choice, Term

if TYPE_CHECKING:
    from motet.models.growth.growth import Growth
    from motet.models.growth.standing import StandingModel

BEFORE = "before"
"""The option of a nested stage that says what of the stage before joins its space."""
ALIKE = ("draws", "by_replica")
"""Options that say who reads which share of a step: one rule for the whole run."""


class Carried(NamedTuple):
    """A slice of a stage's model that stands for a model of the stage before.

    Attributes:
        member: the slice.
        source: of the stage before; None is the model of that stage itself.
        source_name: its name.
        exact: the slice computes what that model does, as soon as the stage begins.
    """

    member: Member
    source: Member | None
    source_name: str
    exact: bool


class NestingFamily(StagedFamily):
    """A family with stages, of which any may train slices of its model.

    Attributes:
        nests: who trains in a stage, by its number, where slices of its model do; steps of each are
            counted from where it begins.
        carried: the slices that joined the space of a stage from the one before, by its number.
    """

    def __init__(self, whole: ModelConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(whole, options, seed)
        self._members: list[Member] = []
        self.nests: dict[int, NestedFamily] = {}
        self.carried: dict[int, list[Carried]] = {}

    def nest(self) -> None:
        """Make the models of the stages, and the families of slices that stages train.

        Raises:
            UserError: slices cannot be, two have one name, or stages differ in `ALIKE`.
        """
        self._members = [
            Member(stage.name, stage.config, tuple(range(stage.config.n_layers)))
            for stage in self.stages
            if stage.name is not None
        ]
        for number, stage in enumerate(self.stages):
            if stage.nested is not None:
                self._nest(number, stage)
        problems = _twice(self.stages, self.nests)
        first = next(iter(self.nests), 0)
        for number, nested in self.nests.items():
            where, label = _where(number), self.stages[first].label
            problems += [
                Problem(
                    f"{where}.{key}",
                    f"is {getattr(nested, key)!r}, and of stage {label} it is "
                    f"{getattr(self.nests[first], key)!r}: who reads which share of a step is one "
                    "rule for the whole run; give both the same",
                )
                for key in ALIKE
                if getattr(nested, key) != getattr(self.nests[first], key)
            ]
        raise_problems(problems)
        for nested in self.nests.values():
            self.draws, self.by_replica = nested.draws, nested.by_replica

    def _nest(self, number: int, stage: GrowingStage) -> None:
        assert stage.nested is not None
        options = {key: value for key, value in stage.nested.items() if key != BEFORE}
        groups = options.get("groups", 1)
        if BEFORE in stage.nested:
            # What is no number is told where the options are read.
            groups = groups if isinstance(groups, int) and groups > 0 else 1
            self.carried[number] = self._carry(number, stage.nested[BEFORE], groups)
            if options.get("order_at_step") is not None:
                why = "puts other channels first than those of the stage before; leave one out"
                raise_problems([Problem(f"{_where(number)}.{BEFORE}", f"order_at_step {why}")])
        joined = [one.member for one in self.carried.get(number, ())]
        self.nests[number] = NestedFamily(stage.config, options, self.seed, _where(number), joined)

    def _carry(self, number: int, asked: Any, groups: int) -> list[Carried]:
        """Return the slices of a stage's model that stand for the models of the stage before.

        Raises:
            UserError: nothing of that name was there, or the operator leaves it nowhere.
        """
        where, stage = f"{_where(number)}.{BEFORE}", self.stages[number]
        names = _names(where, asked, self._held_in(number - 1)) if number else []
        if not names:
            why = "is empty" if number else "nothing comes before the first stage"
            raise_problems([Problem(where, f"{why}; leave it out")])
        stands = self._standing(number, groups)
        earlier = self.stages[number - 1].label
        found, problems = [], []
        for name in names:
            source = self._held_in(number - 1)[name]
            model = source or self._members[number - 1]
            if source is not None and source.groups != groups:
                why = f"{name} of stage {earlier} lies in {source.groups} groups, and this stage"
                problems.append(Problem(where, f"{why} has {groups}; set groups={source.groups}"))
                continue
            layers = [stands.layers[layer] for layer in model.layers]
            try:
                slice_ = _slice(stage, f"{name}.{stage.label}", model.config, layers, groups)
            except SliceError as error:
                told = f"{name} of stage {earlier} is no slice: {error.key} {error}"
                problems.append(Problem(where, told))
            else:
                found.append(Carried(slice_, source, name, stands.exact and stage.blend is None))
        raise_problems(problems)
        return found

    def _standing(self, number: int, groups: int) -> StandingModel:
        """Return where the model of the stage before stands in that of a stage.

        Raises:
            UserError: nowhere, or it cannot grow so.
        """
        from motet.models.growth.standing import standing  # brings torch

        stage, earlier = self.stages[number], self.stages[number - 1].label
        try:
            growth = self.growth(number)
        except UserError as error:
            raise UserError(f"{WHERE}.stages[{number}].operator: {error}") from None
        if stands := standing(growth, groups):
            return stands
        raise UserError(
            f"{_where(number)}.{BEFORE}: {stage.operator} leaves the model of stage {earlier} in "
            f"no part of what it makes{f' in {groups} groups' if groups > 1 else ''}; name slices "
            "of the new model under members"
        )

    def growth(self, number: int) -> Growth:
        """Return how the model of a stage is made of the one before (`ProgressiveFamily`)."""
        raise NotImplementedError

    def _held_in(self, number: int) -> dict[str, Member | None]:
        """Return the models of a stage by name: its slices, then itself (None)."""
        nested = self.nests.get(number)
        slices = {} if nested is None else {one.name: one for one in nested.members()}
        return {**slices, self.stages[number].label: None}

    def members(self) -> Sequence[Member]:
        """See `Family.members`: the models of all stages but the last, in their order, then the
        slices of each stage.
        """
        slices = [one for nested in self.nests.values() for one in nested.members()]
        return [*self._members, *slices]

    def number_of(self, held: Member | None) -> int:
        """Return the stage whose model one is; None is the whole one."""
        return len(self._members) if held is None else self._members.index(held)

    def member_at(self, step: int) -> Member | None:
        """Return the model that trains in a step; None is the whole one."""
        return self._model(self.number_at(step))

    def _model(self, number: int) -> Member | None:
        return self._members[number] if number < len(self._members) else None

    def slices(self, held: Member | None) -> Sequence[Member]:
        """Return the members that are slices of the model that trains, the smallest first."""
        nested = self.nests.get(self.number_of(held))
        return () if nested is None else nested.members()

    def trains_slices(self, step: int) -> bool:
        """Return whether slices of the model train in a step."""
        return self.number_at(step) in self.nests

    def ordering(self, step: int) -> tuple[int, int] | None:
        """See `Family.ordering`: within the stage of the step."""
        number = self.number_at(step)
        own = self.nests[number].ordering(step) if number in self.nests else None
        return None if own is None else (self.starts[number] + own[0], own[1])

    def update_rule(self, held: Member | None) -> tuple[bool, bool]:
        """See `Family.update_rule`: of the stage whose model trains."""
        nested = self.nests.get(self.number_of(held))
        return (False, False) if nested is None else nested.update_rule(None)

    def needs(self) -> tuple[str, ...]:
        """See `Family.needs`: of any stage."""
        every = (need for number in self.nests for need in self.needs_of(number))
        return tuple(dict.fromkeys(every))

    def needs_of(self, number: int) -> tuple[str, ...]:
        """Return what a stage asks of an engine beside members."""
        return self.nests[number].needs() if number in self.nests else ()

    def model_at(self, step: int) -> ModelConfig:
        """See `Family.model_at`."""
        return self.stages[self.number_at(step)].config

    def chosen_slices(self, step: int, draws: int) -> Sequence[Sequence[WhoTrains]]:
        """Return who trains on each share of a step of a stage that trains slices; the model of a
        stage before the last by its name.
        """
        number = self.number_at(step)
        model = self._model(number)
        chosen = self.nests[number].choose(step - self.starts[number], draws)
        return chosen if model is None else [_named(terms, model) for terms in chosen]

    def engine_choices(self, step: int, chosen: list[Choice]) -> list[Choice] | None:
        """Return what an engine is told of who trains in a step: its model is the whole one to it;
        None: nobody else does.
        """
        if not self.trains_slices(step):
            return None
        model = self._model(self.number_at(step))
        return chosen if model is None else [_unnamed(choice, model) for choice in chosen]

    def slice_problems(self) -> list[str]:
        """Return why slices cannot train for as long as their stages are, in words."""
        found = [
            f"stages[{number}].nested.{why}"
            for number, nested in self.nests.items()
            for why in nested.problems(self.least_steps(number))
        ]
        return found or [
            f"stages[{number}].nested.by_replica: member {one.name!r} leaves out layers, which "
            "replicas would wait for; members must have all layers, or set by_replica: false"
            for number, nested in self.nests.items()
            for one in nested.members()
            if nested.by_replica and len(one.layers) < self.stages[number].config.n_layers
        ]

    def slice_facts(self, number: int) -> dict[str, Any]:
        """Return what a run's manifest says of the slices of a stage."""
        nested, carried = self.nests.get(number), self.carried.get(number, ())
        if nested is None:
            return {}
        facts: dict[str, Any] = {"members": [one.name for one in nested.members()]}
        facts |= {"needs": list(needs)} if (needs := nested.needs()) else {}
        same = {one.member.name: one.source_name for one in carried}
        return facts | ({"carried": same} if same else {})


def _where(number: int) -> str:
    return f"{WHERE}.stages[{number}].nested"


def _twice(stages: Sequence[GrowingStage], nests: Mapping[int, NestedFamily]) -> list[Problem]:
    """Say which slices have the name of a stage, or of a slice of another one."""
    known = {stage.label: "of a stage" for stage in stages}
    found = []
    for number, nested in nests.items():
        for member in nested.members():
            if member.name in known:
                told = f"{member.name!r} is the name {known[member.name]}; take another"
                found.append(Problem(f"{_where(number)}.members", told))
            known.setdefault(member.name, f"of a slice of stage {stages[number].label}")
    return found


def _names(where: str, asked: Any, held: Mapping[str, Any]) -> list[str]:
    """Return the names that `before` asks for."""
    if asked == "all":
        return list(held)
    if not is_sequence(asked):
        what = f"all, or a list of {', '.join(held)}"
        raise_problems([Problem(where, f"{asked!r:.60} is not {what}")])
    problems = [
        Problem(
            where,
            f"{name!r:.60} is neither the model of the stage before nor a slice of it"
            f"{suggest(str(name), held)}; there are {', '.join(held)}",
        )
        for name in asked
        if not isinstance(name, str) or name not in held
    ]
    raise_problems(problems)
    return list(dict.fromkeys(asked))


def _slice(
    stage: GrowingStage, name: str, model: ModelConfig, layers: Sequence[int], groups: int
) -> Member:
    """Return the slice of a stage's model that has the sizes of another one.

    Raises:
        SliceError: it has no such slice.
    """
    ratio, own = model.n_heads // model.n_kv_heads, stage.config.n_heads // stage.config.n_kv_heads
    if ratio != own:
        why = f"has {ratio} queries to each, and of the new model {own}: a head takes all of its"
        raise SliceError("n_kv_heads", why)
    sizes = {axis: getattr(model, axis) for axis in whole_of(stage.config) if axis != "n_layers"}
    if model.n_experts:
        sizes |= {"d_expert": model.expert_width}
        sizes |= {"d_shared": model.shared_width} if "d_shared" in sizes else {}
    if model.layer_ffn is not None:
        sizes["d_ffn"] = [model.ffn_width(layer) for layer in range(model.n_layers)]
    return member_of(stage.config, name, {**sizes, "layers": list(layers)}, groups)


def _named(terms: Sequence[WhoTrains], model: Member) -> list[WhoTrains]:
    """Return passes in which the model itself has its name."""
    return [
        term._replace(
            member=term.member or model,
            teacher=term.teacher or (model if term.distill else None),
        )
        if isinstance(term, Term)
        else term or model
        for term in terms
    ]


def _unnamed(choice: Choice, model: Member) -> Choice:
    """Return passes in which a model is the whole one."""
    return tuple(
        term._replace(
            member=None if term.member == model else term.member,
            teacher=None if term.teacher == model else term.teacher,
        )
        for term in choice
    )
