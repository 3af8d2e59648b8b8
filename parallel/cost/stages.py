"""What a layout asks of each rank: weights that it holds, arithmetic of its stages; and what it
would cost on a cluster. No torch.

`predict` is the front door of the cost model: see `predictor.py` for how it is put together,
`docs/planning.md` for what it is good for.

V vocabulary, D model width, T tokens of a sequence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from motet.models import counts
from motet.models.architecture import (
    Split,
    WeightSpec,
    block_weights,
    first_weights,
    head_product,
    last_weights,
    mixing,
)
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
    weights = [weight for layer in layers for weight in block_weights(model, layer)]
    weights += first_weights(model) if first else ()
    weights += last_weights(model) if last else ()
    # A lookup multiplies nothing: the embedding counts only where it is the head, at the end.
    products = sum(counts.matmul_parameters_per_layer(model, layer) for layer in layers)
    products += head_product(model).multiplies if last else 0
    scores = sum(mixing(model, layer).operations(sequence_length) for layer in layers)
    # By number of ranks, so that few divisions round.
    over: Counter[int] = Counter()
    for weight in weights:
        over[_ranks_of(weight, layout)] += weight.numel
    total, held = over.total(), sum(values / ranks for ranks, values in over.items())
    return StageCost(layers, first, last, total, held, 2.0 * products + scores, 2.0 * products)


def _ranks_of(weight: WeightSpec, layout: Layout) -> int:
    """Return among how many ranks of its stage and replica a weight is divided."""
    # Experts are divided among all ranks of a replica's stage, whatever ep and etp are.
    if weight.is_expert:
        return layout.ep * layout.etp * layout.edp
    divided = weight.split.tensor_dimension is not None
    if weight.split is Split.VOCABULARY:
        divided = layout.vocabulary_parallel
    return layout.fsdp * (layout.tp if divided else 1)


def pass_times(costs: list[StageCost], layout: Layout) -> tuple[list[float], ...]:
    """Return (forward, backward, weight part of backward) of one micro-batch per stage, as shares
    of one whole forward pass.

    By arithmetic alone: a backward pass makes two products for each of the forward pass, and with
    full recomputation that one again.
    """
    # Scores have no weights: their backward pass is all of the input's part.
    whole = sum(cost.forward_flops for cost in costs)
    # Selective recomputation makes no product again.
    again = 1.0 if layout.recompute == "full" else 0.0
    forward = [cost.forward_flops / whole for cost in costs]
    weight = [cost.weight_flops / whole for cost in costs]
    return forward, [(2.0 + again) * share for share in forward], weight
