"""What a layout asks of each rank: weights that it holds, arithmetic of its stages; and what it
would cost on a cluster. No torch.

`predict` is the front door of the cost model: see `predictor.py` for how it is put together,
`docs/planning.md` for what it is good for.

V vocabulary, D model width, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from motet.models import counts
from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cost.predictor import Predictor, predict
from motet.parallel.cost.terms import NATIVE, Prediction, Training, Traits
from motet.parallel.layout.layout import Layout

__all__ = [
    "NATIVE",
    "Constants",
    "Prediction",
    "Predictor",
    "StageCost",
    "Training",
    "Traits",
    "pass_times",
    "predict",
    "stage_costs",
]


@dataclass(frozen=True)
class StageCost:
    """One pipeline stage.

    Attributes:
        layers: the blocks that it holds.
        parameters: of the whole stage.
        held_parameters: of one of its ranks; where a size does not divide among the ranks, of an
            average one.
        forward_flops: floating-point operations of one token's forward pass through the stage, over
            all its ranks.
        weight_flops: those of the weights' gradients, a part of the backward pass.
    """

    layers: range
    first: bool
    last: bool
    parameters: int
    held_parameters: float
    forward_flops: float
    weight_flops: float


def stage_costs(layout: Layout, model: ModelConfig, sequence_length: int) -> list[StageCost]:
    """Return what every stage of a layout is: a layout that `rules.problems` finds no fault
    with.
    """
    layers = layout.layers_of_stages(model)
    return [
        _stage_cost(layout, model, sequence_length, held, i == 0, i == len(layers) - 1)
        for i, held in enumerate(layers)
    ]


def _stage_cost(
    layout: Layout, model: ModelConfig, sequence_length: int, layers: range, first: bool, last: bool
) -> StageCost:
    table = model.vocabulary_size * model.d_model
    tables = 1 if first and last and model.tied_embeddings else int(first) + int(last)
    norm = model.d_model if last else 0
    experts = sum(
        counts.expert_parameters_per_layer(model) for layer in layers if model.has_experts(layer)
    )
    total = sum(counts.parameters_per_layer(model, layer) for layer in layers)
    total += tables * table + norm
    split = sum(_split_by_tp(model, layer) for layer in layers)
    split += tables * table if layout.vocabulary_parallel else 0
    whole = total - experts - split
    held = (split / layout.tp + whole) / layout.fsdp + experts / (layout.fsdp * layout.tp)
    products = sum(counts.matmul_parameters_per_layer(model, layer) for layer in layers) + (
        table if last else 0
    )
    scores = len(layers) * 2 * 2 * model.query_width * sequence_length
    return StageCost(layers, first, last, total, held, 2.0 * products + scores, 2.0 * products)


def _split_by_tp(model: ModelConfig, layer: int) -> int:
    """Weights that tensor parallelism divides: projections with their biases, norms over all heads,
    a dense feed-forward.
    """
    out = 2 * model.d_model * (model.query_width + model.kv_width)
    if model.qkv_bias:
        out += model.query_width + 2 * model.kv_width
    if model.qk_norm == "full":
        out += model.query_width + model.kv_width
    return out + (0 if model.has_experts(layer) else 3 * model.d_model * model.d_ffn)


def pass_times(costs: list[StageCost], layout: Layout) -> tuple[list[float], ...]:
    """Return (forward, backward, weight part of backward) of one micro-batch per stage, as shares
    of one whole forward pass.

    By arithmetic alone: a backward pass makes two products for each of the forward pass, and with
    full recomputation that one again.
    """
    whole = sum(cost.forward_flops for cost in costs)
    again = 1.0 if layout.recompute == "full" else 0.0
    forward = [cost.forward_flops / whole for cost in costs]
    weight = [cost.weight_flops / whole for cost in costs]
    return forward, [(2.0 + again) * share for share in forward], weight
