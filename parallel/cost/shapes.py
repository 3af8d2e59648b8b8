"""What pipeline ranks hold of a model, as far as costs ask. Pure; no torch."""

from __future__ import annotations

from typing import NamedTuple

from motet.models.config import ModelConfig
from motet.parallel.layout.layout import Layout


class StageShape(NamedTuple):
    """One pipeline rank: what it holds of the model."""

    dense_layers: int
    expert_layers: int
    first: bool
    last: bool


def shapes_of(layout: Layout, model: ModelConfig) -> tuple[StageShape, ...]:
    """Return what every pipeline rank holds; equal ones are the same object, so that they can be
    compared by `is`.
    """
    stages = layout.layers_of_stages(model)
    ranks: list[StageShape] = []
    for rank in range(layout.pp):
        mine = layout.stages_of(rank) if layout.pp > 1 else list(range(layout.stages))
        layers = [layer for stage in mine for layer in stages[stage]]
        routed = sum(model.has_experts(layer) for layer in layers)
        last = layout.stages - 1 in mine
        own = StageShape(len(layers) - routed, routed, 0 in mine, last)
        ranks.append(next((shape for shape in ranks if shape == own), own))
    return tuple(ranks)
