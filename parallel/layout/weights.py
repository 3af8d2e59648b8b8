"""Which weights a rank holds, and the bytes of weights, gradients and optimizer state that follow.

Pure; needs no torch.

V vocabulary, D model width, F hidden width, E experts. Weights are fp32, AdamW keeps two fp32
moments of each; ZeRO's arithmetic (arXiv:1910.02054, section 3.1), with the degrees of a layout
instead of one number of ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from motet.models.architecture import (
    Split,
    WeightSpec,
    block_weights,
    first_weights,
    last_weights,
)
from motet.models.config import ModelConfig
from motet.parallel.layout.layout import Layout

FP32_BYTES = 4
KEPT_GATHERED_BYTES = 2 * 2**30
"""Above this, weights are gathered again in the backward pass instead of being kept from the
forward pass.
"""


class Weight(NamedTuple):
    """One weight of a decoder under a layout.

    Attributes:
        name: its name in `Decoder`.
        shape: of the part that tensor or expert parallelism leaves to a rank.
        unit: what FSDP2 gathers together: "root", "block N" or "experts N".
        fsdp_dimension: the one that FSDP2 splits.
        over_tp: its gradients are parts of a sum over the tensor-parallel ranks.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    fsdp_dimension: int = 0
    over_tp: bool = False

    @property
    def numel(self) -> int:
        """Values in `shape`."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether the ranks that divide it are those of its experts (edp), and not of all data."""
        return self.unit.startswith("experts")

    def divided(self, ranks: int) -> int:
        """Return the values of the largest of `ranks` parts: FSDP2 pads the others to it."""
        length = self.shape[self.fsdp_dimension]
        return -(-length // ranks) * (self.numel // length)

    def part(self, ranks: int, rank: int) -> int:
        """Return the values of one of `ranks` parts, cut as `torch.chunk`: the last ones may be
        smaller, or empty.
        """
        length = self.shape[self.fsdp_dimension]
        each = -(-length // ranks)
        return max(0, min(each, length - each * rank)) * (self.numel // length)


def weights(model: ModelConfig, layout: Layout, stage: int = 0) -> list[Weight]:
    """Return the weights of all pipeline stages that one pipeline rank holds, in the decoder's
    order.

    Args:
        model, layout: sound, by `models.config.problems` and `rules.problems`.
        stage: pipeline rank.
    """
    layers = layout.layers_of_stages(model)
    held: list[Weight] = []
    for number in layout.stages_of(stage):
        # Each stage is wrapped by itself.
        root = "root" if layout.virtual_stages == 1 else f"root {number}"
        if number == 0:
            held += [_held(spec, layout, root) for spec in first_weights(model)]
        for layer in layers[number]:
            for spec in block_weights(model, layer):
                unit = f"experts {layer}" if spec.is_expert else f"block {layer}"
                held.append(_held(spec, layout, unit, f"blocks.{layer}."))
        if number == layout.stages - 1:
            held += [_held(spec, layout, root) for spec in last_weights(model)]
    return held


def _held(spec: WeightSpec, layout: Layout, unit: str, prefix: str = "") -> Weight:
    """Return the part of a weight that tensor and expert parallelism leave to a rank."""
    shape, split, over_tp = list(spec.shape), spec.split, False
    if spec.is_expert:
        shape[0] //= layout.ep
        shape[split.expert_dimension or 0] //= layout.etp
    elif split.tensor_dimension is None:
        # Ranks that meet different tokens, or different heads, each have a part of the gradient.
        over_tp = layout.tp > 1 and (layout.sequence_parallel or split is Split.HEADS)
    elif split is not Split.VOCABULARY or layout.vocabulary_parallel:
        shape[split.tensor_dimension] //= layout.tp
    return Weight(prefix + spec.name, tuple(shape), unit, spec.data_dimension, over_tp)


def held_bytes(
    model: ModelConfig, layout: Layout, stage: int = 0, position: int = 0
) -> dict[str, int]:
    """Return the bytes of "parameters", "gradients" and "optimizer" that one rank holds when it
    updates its weights.

    Exact for every rank, uneven parts included; FSDP2's padding (`Weight.divided`) is not. The
    optimizer's are two moments, and one step number per weight, also of a weight of which the rank
    has nothing. Left out: the state of a mixture's router, 8 bytes per expert.

    Args:
        stage: pipeline rank.
        position: of the rank among `Layout.stage_ranks`; the first holds most.
    """
    fsdp = position // layout.tp % layout.fsdp
    edp = position % (layout.fsdp * layout.tp) // (layout.ep * layout.etp)
    mine = weights(model, layout, stage)
    values = sum(
        w.part(layout.edp, edp) if w.is_expert else w.part(layout.fsdp, fsdp) for w in mine
    )
    held = values * FP32_BYTES
    return {
        "parameters": held,
        "gradients": held,
        "optimizer": 2 * held + len(mine) * FP32_BYTES,
    }


def kept_bytes(
    model: ModelConfig, layout: Layout, micro_batches: int, stage: int = 0, weight_bytes: int = 4
) -> dict[str, int]:
    """Return what a rank keeps during a step: gathered "weights" besides its share, and "gradients"
    until they are reduced to its share.

    Between micro-batches it has these, and of `held_bytes` parameters and optimizer. Whole weights
    with FSDP2's padding, also where there is one rank to gather from (FSDP2 makes a copy); whole
    fp32 gradients where several micro-batches add to them. Nothing on a rank that has its stage
    alone, where no FSDP2 is, and nothing lasting where weights are gathered again
    (`gathers_again`): one or two units at a time.

    Args:
        micro_batches: that the rank runs in a step.
        stage: pipeline rank.
        weight_bytes: of one value of gathered weights.
    """
    if layout.stage_ranks == 1 or gathers_again(model, layout):
        return {"weights": 0, "gradients": 0}
    mine = weights(model, layout, stage)
    padded = 0
    for weight in mine:
        ranks = layout.edp if weight.is_expert else layout.fsdp
        padded += ranks * weight.divided(ranks)
    whole = gathered_values(model, layout, stage) * FP32_BYTES
    together = micro_batches > 1 or layout.pp > 1
    return {"weights": padded * weight_bytes, "gradients": whole if together else 0}


def gathered_values(model: ModelConfig, layout: Layout, stage: int = 0) -> int:
    """Return the values of all weights that a rank has while they are gathered: those of its whole
    stage, its share over tp, ep, etp.
    """
    return sum(weight.numel for weight in weights(model, layout, stage))


def gathers_again(model: ModelConfig, layout: Layout) -> bool:
    """Return whether weights are dropped between forward and backward pass and gathered again.

    Not under a pipeline or unequal replicas: every micro-batch would gather them, and replicas take
    different numbers.
    """
    if layout.pp > 1 or len(set(layout.shares)) > 1:
        return False
    return gathered_values(model, layout) * FP32_BYTES > KEPT_GATHERED_BYTES
