"""What a family of models costs: each member of a nested one, each stage of a progressive one.

Pure; no torch.

A nested family trains one member per step, a slice of the shared weights: passes are those of the
member, but gradients are reduced and weights updated as those of the whole model, which is also
what memory holds. A progressive family trains one model after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from motet.models.config import ModelConfig
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
    """One model of a progressive family: how it is trained, and for how many tokens."""

    name: str
    model: ModelConfig
    layout: Layout
    training: Training
    tokens: float


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
        found = Predictor(stage.model, cluster, stage.training, traits, constants).predict(
            stage.layout
        )
        predictions[stage.name] = found
        steps[stage.name] = found.step_time_s
        before += stage.tokens
        time_s += stage.tokens / found.tokens_per_s
        alone_s += before / found.tokens_per_s
    memory_gib = max(found.memory_gib for found in predictions.values())
    fits = all(found.fits for found in predictions.values())
    return FamilyCost(steps, time_s, alone_s, memory_gib, fits, predictions)
