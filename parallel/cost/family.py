"""What a family of models costs: each member of a nested one, each stage of a progressive one.

Pure; no torch.

A nested family trains one member per step, a slice of the shared weights: passes are those of the
member, but gradients are reduced and weights updated as those of the whole model, which is also
what memory holds. A progressive family trains one model after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from motet.models.config import ModelConfig
from motet.models.counts import parameters, training_flops_per_token
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.terms import NATIVE, Prediction, Training, Traits
from motet.parallel.layout.layout import Layout

WHOLE = ("data_parallel", "optimizer")
"""Phases that a member's step has in the size of the whole model."""


@dataclass(frozen=True)
class MemberShare:
    """One model of a nested family, and the share of steps that train it."""

    name: str
    model: ModelConfig
    share: float


@dataclass(frozen=True)
class GrowthStage:
    """One model of a progressive family: how it is trained, and for how many tokens.

    Attributes:
        teacher: a frozen model that it follows.
    """

    name: str
    model: ModelConfig
    layout: Layout
    training: Training
    tokens: float
    teacher: ModelConfig | None = None


@dataclass(frozen=True)
class FamilyCost:
    """What a family costs.

    Attributes:
        step_time_s: nested: of each member; progressive: of each stage.
        time_s: nested: of an average step; progressive: of the whole training.
        alone_s: the same if every member were trained by itself, for as many steps as it gets here.
        memory_gib, fits: of the fullest device at any time.
        predictions: by member or stage.
    """

    step_time_s: Mapping[str, float]
    time_s: float
    alone_s: float
    memory_gib: float
    fits: bool
    predictions: Mapping[str, Prediction] = field(default_factory=dict)


def nested_cost(
    whole: ModelConfig,
    members: Sequence[MemberShare],
    cluster: Cluster,
    layout: Layout,
    training: Training,
    traits: Traits = NATIVE,
    constants: Mapping[str, Constants] | None = None,
) -> FamilyCost:
    """Return what a nested family costs per step.

    Args:
        whole: the model whose weights the members are slices of.
        members: their shares sum to 1; a member of fewer layers has them divided anew among the
            stages.

    Raises:
        ValueError: shares that do not sum to 1.
    """
    total = sum(member.share for member in members)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the members' shares of steps sum to {total:g}, not 1")
    # Memory is always that of the whole: its weights and state stay where they are, whichever
    # member trains.
    base = Predictor(whole, cluster, training, traits, constants).predict(layout)
    predictions: dict[str, Prediction] = {}
    steps: dict[str, float] = {}
    for member in members:
        own = layout
        # Layers per stage that fit the whole model are not those of a shallower member.
        if member.model.n_layers != whole.n_layers and layout.stage_layers:
            own = Layout(**{**layout.__dict__, "stage_layers": ()})
        found = Predictor(member.model, cluster, training, traits, constants).predict(own)
        predictions[member.name] = found
        # Gradients and update are those of all shared weights, whichever member was trained.
        more = sum(max(0.0, base.parts[name] - found.parts[name]) for name in WHOLE)
        steps[member.name] = found.step_time_s + more
    time_s = sum(member.share * steps[member.name] for member in members)
    alone_s = sum(member.share * predictions[member.name].step_time_s for member in members)
    return FamilyCost(steps, time_s, alone_s, base.memory_gib, base.fits, predictions)


def progressive_cost(
    stages: Sequence[GrowthStage],
    cluster: Cluster,
    traits: Traits = NATIVE,
    constants: Mapping[str, Constants] | None = None,
) -> FamilyCost:
    """Return what a progressive family costs: `alone_s` trains every stage's model from scratch on
    all tokens up to its end.
    """
    predictions: dict[str, Prediction] = {}
    steps: dict[str, float] = {}
    time_s = alone_s = before = 0.0
    for stage in stages:
        alone = Predictor(stage.model, cluster, stage.training, traits, constants).predict(
            stage.layout
        )
        found = _with_teacher(alone, stage, cluster, traits, constants)
        predictions[stage.name] = found
        steps[stage.name] = found.step_time_s
        before += stage.tokens
        time_s += stage.tokens / found.tokens_per_s
        alone_s += before / alone.tokens_per_s
    memory_gib = max(found.memory_gib for found in predictions.values())
    fits = all(found.fits for found in predictions.values())
    return FamilyCost(steps, time_s, alone_s, memory_gib, fits, predictions)


def _with_teacher(
    alone: Prediction,
    stage: GrowthStage,
    cluster: Cluster,
    traits: Traits,
    constants: Mapping[str, Constants] | None,
) -> Prediction:
    """Return what a stage costs beside a frozen model that it follows.

    Its forward pass counts as a third of a training step of it, and its weights are held in fp32,
    divided as the model's are; the second product with the head is not counted.
    """
    if stage.teacher is None:
        return alone
    other = Predictor(stage.teacher, cluster, stage.training, traits, constants).predict(
        replace(stage.layout, stage_layers=())
    )
    step_time_s = alone.step_time_s + other.step_time_s / 3
    parts = stage.layout.dp_shard * stage.layout.tp
    memory_gib = alone.memory_gib + 4 * parameters(stage.teacher) / parts / (1 << 30)
    return alone._replace(
        step_time_s=step_time_s,
        tokens_per_s=alone.tokens_per_s * alone.step_time_s / step_time_s,
        memory_gib=memory_gib,
        fits=alone.fits and memory_gib <= alone.capacity_gib,
    )


@dataclass(frozen=True)
class StepCost:
    """What a step of a family costs, whoever its sampler draws.

    Attributes:
        step_time_s, flops, memory_gib, fits: of an average step; memory of the fullest device.
        alone_s: of the same passes, each member in a run of its own.
    """

    step_time_s: float
    flops: float
    memory_gib: float
    fits: bool
    alone_s: float


class StepPrices:
    """Prices steps of a nested family by how often each member passes over a token.

    A pass of a member costs what one more batch of its sequences costs it, and at least the waits
    for weights of its layers in the size of the whole model: FSDP2 gathers whole blocks. Reducing
    gradients, the update and the pipeline's filling are paid once a step, as the whole model pays
    them. Passes follow one another, so activations are those of one; the second product with the
    head of a member that follows a teacher is not counted.

    Args:
        whole: the model whose weights the members are slices of.
        members: models by name, the whole one among them.
    """

    def __init__(
        self,
        whole: ModelConfig,
        members: Mapping[str, ModelConfig],
        cluster: Cluster,
        layout: Layout,
        training: Training,
        traits: Traits = NATIVE,
        constants: Mapping[str, Constants] | None = None,
    ) -> None:
        self._members, self._layout = members, layout
        self._tokens = training.sequences * training.sequence_length
        self._length = training.sequence_length
        twice = replace(training, sequences=2 * training.sequences)

        def priced(model: ModelConfig) -> tuple[Prediction, Prediction]:
            own = layout
            if model.n_layers != whole.n_layers and layout.stage_layers:
                own = replace(layout, stage_layers=())
            once, more = (
                Predictor(model, cluster, each, traits, constants).predict(own)
                for each in (training, twice)
            )
            return once, more

        self._whole, self._more = priced(whole)
        self.alone = {name: priced(model) for name, model in members.items()}
        self._fixed_s = self._whole.step_time_s - _marginal(self._whole, self._more)
        held = layout.micro_sequences * training.sequence_length * whole.d_model
        self._taught_gib = held * traits.compute_bytes / layout.cp / (1 << 30)
        self._depth = {name: model.n_layers / whole.n_layers for name, model in members.items()}

    def pass_s(self, name: str) -> float:
        """Return the seconds that one pass of a member over all sequences of a step takes."""
        once, more = self.alone[name]
        phase = "data_parallel"
        waits_s = more.parts[phase] - once.parts[phase]
        of_whole_s = self._more.parts[phase] - self._whole.parts[phase]
        return _marginal(once, more) + max(0.0, self._depth[name] * of_whole_s - waits_s)

    def of(self, passes: Mapping[str, float], taught: bool = False) -> StepCost:
        """Return what a step costs.

        Args:
            passes: of each member over a token, on average; one without gradient is a third.
            taught: hidden states of a teacher are kept for those that follow it.
        """
        each = {
            name: training_flops_per_token(model, self._length) * self._tokens
            for name, model in self._members.items()
        }
        flops = sum(number * each[name] for name, number in passes.items())
        time_s = self._fixed_s + sum(number * self.pass_s(name) for name, number in passes.items())
        # Several passes over one micro-batch hold what several micro-batches do.
        most = self._more if sum(passes.values()) > 1.0 + 1e-6 else self._whole
        memory_gib = most.memory_gib + self._taught_gib * taught
        alone_s = sum(number * self.alone[name][0].step_time_s for name, number in passes.items())
        fits = most.fits and memory_gib <= most.capacity_gib
        return StepCost(time_s, flops, memory_gib, fits, alone_s)


def _marginal(once: Prediction, twice: Prediction) -> float:
    """Return the seconds that as many sequences again add to a step."""
    return twice.step_time_s - once.step_time_s
