"""What the fullest device of every pipeline rank holds. Pure; no torch.

The arithmetic of ZeRO (arXiv:1910.02054, section 3) with the degrees of a layout, and of
activations in a pipeline (arXiv:2205.05198, section 4.2.3). For Motet's own engine
`weights.held_bytes` is exact for every rank; a test holds this against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from motet.parallel.cost.block import PricedBlock
from motet.parallel.cost.terms import Training, Traits
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import KEPT_GATHERED_BYTES

GIB = 2.0**30
BUCKET_BYTES = 200e6
"""Gradients on their way at a time where they leave in buckets."""


class RankMemory(NamedTuple):
    """GiB of one pipeline rank, apart from how many micro-batches it keeps activations of."""

    state: dict[str, float]  # weights, gradients, optimizer state and buffers
    rest: dict[str, float]  # logits, collectives, reserved
    fixed_gib: float  # all of these
    per_micro_batch_gib: float  # activations of one micro-batch
    once_gib: float  # activations besides, however many micro-batches there are
    capacity_gib: float


class Activations(NamedTuple):
    """The part of `RankMemory` that does not ask how data parallelism divides weights."""

    rest: dict[str, float]
    rest_gib: float
    per_micro_batch_gib: float
    once_gib: float


@dataclass(frozen=True)
class Weights:
    """Values of weights that one device of a pipeline rank would hold if data parallelism divided
    nothing.
    """

    dense: float
    experts: float
    largest_unit: float  # dense and expert weights of one block

    @property
    def all(self) -> float:
        """Both."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Division:
    """Among how many ranks weights, gradients and optimizer state are divided, and what is gathered
    when.

    Attributes:
        dense, experts: ranks of the dividing groups.
        stage: of ZeRO: 1 divides the optimizer's state, 2 gradients too, 3 weights too.
        gathers_again: weights are gathered in every pass, not once a step.
    """

    dense: int
    experts: int
    stage: int
    gathers_again: bool


def division(layout: Layout, training: Training, weights: Weights) -> Division:
    """Return what dp_shard divides under a ZeRO stage; without one, as Motet's engine does it."""
    stage = 3 if training.zero_stage is None else training.zero_stage
    again = stage == 3
    if training.zero_stage is None:  # `weights.gathers_again`
        alike = layout.pp == 1 and len(set(layout.shares)) <= 1
        # Motet's engine gathers once a step where the gathered weights are small, or where passes
        # of a pipeline would gather too often.
        again = alike and weights.all * 4 > KEPT_GATHERED_BYTES
    return Division(layout.fsdp, layout.edp, stage, again)


def state_parts(
    weights: Weights,
    shared: Division,
    training: Training,
    traits: Traits,
    several: bool,
    replicas: int = 1,
) -> dict[str, float]:
    """Return bytes of weights, gradients, optimizer state and buffers of one device, and of a
    teacher where one is kept.

    Args:
        several: more than one micro-batch adds to the same gradients.
        replicas: that hold the same weights and add their gradients.
    """
    # Experts are divided among fewer ranks than dense weights, as expert parallelism has divided
    # them already.
    mine = weights.dense / shared.dense + weights.experts / shared.experts
    # One rank has nothing to gather and needs no buffer for it.
    ranks = max(shared.dense, shared.experts)
    # ZeRO's stages by name: 1 the optimizer's state, 2 gradients too, 3 weights too.
    held = mine if shared.stage >= 3 else weights.all
    graded = mine if shared.stage >= 2 else weights.all
    state = mine if shared.stage >= 1 else weights.all
    buffers = 0.0
    if training.zero_stage is None and not shared.gathers_again and ranks > 1:
        buffers = weights.all * (traits.compute_bytes + (4.0 if several else 0.0))
    elif shared.stage == 3 and ranks > 1:
        # One unit in use, one on its way, and the gradient of one.
        buffers = weights.largest_unit * (2 * traits.compute_bytes + traits.reduce_bytes)
    elif ranks > 1:
        buffers = min(2 * BUCKET_BYTES, weights.all * traits.reduce_bytes)
    elif replicas > 1 and shared.stage == 0:
        buffers = weights.all * traits.reduce_bytes  # buckets that the gradients are copied to
    parts = {
        "parameters": held * traits.weight_bytes,
        "gradients": graded * traits.gradient_bytes,
        "optimizer": 0.0 if training.offload else state * training.optimizer_bytes,
        "buffers": buffers,
    }
    if training.teacher:
        # It is gathered with the model's own weights, and given back with them.
        gathered = weights.all if ranks > 1 and not shared.gathers_again else 0.0
        parts["teacher"] = held * traits.weight_bytes + gathered * traits.compute_bytes
    return parts


def block_bytes(block: PricedBlock, recompute: str, traits: Traits) -> tuple[float, float]:
    """Return bytes that one block keeps for one micro-batch, and those that it has besides while
    its backward pass runs.
    """
    # Only the input stays; the rest of the block comes back while its backward pass runs.
    if recompute == "full":
        return block.input_bytes, block.kept_bytes
    if recompute == "selective" and traits.selective == "alternate":
        share = traits.selective_layers
        kept = share * block.alternate_bytes + (1.0 - share) * block.kept_bytes
        return kept, max(0.0, block.kept_bytes - block.alternate_bytes)
    if recompute == "selective":
        saved = block.core_bytes if traits.selective == "attention" else block.pointwise_bytes
        kept = block.kept_bytes - saved * traits.selective_layers
        return kept, saved
    return block.kept_bytes, 0.0


def micro_batches_held(layout: Layout, rank: int, micro_batches: int) -> float:
    """Return for how many micro-batches a pipeline rank keeps the activations of all its blocks at
    once.

    As `timeline.most_held`, in micro-batches of all stages of a rank instead of (stage,
    micro-batch) pairs.
    """
    pp, virtual = layout.pp, layout.virtual_stages
    if pp == 1:
        return 1.0
    # All forward passes come first.
    if layout.schedule == "gpipe":
        return float(micro_batches)
    # A rank keeps what is on its way to the end and back.
    if layout.schedule == "1f1b":
        return float(min(micro_batches, pp - rank))
    if layout.schedule == "zbv_zero_bubble":
        return float(min(micro_batches, pp))
    apart = layout.schedule == "interleaved_zero_bubble"
    # Interleaved ranks run ahead by the warm-up of all their stages; where weights' passes are
    # apart, earlier ranks run ahead less but keep what waits for them.
    hops = (pp - 1 - rank) * (1 if apart else 2)
    warm = (virtual - 1) * pp + hops + 1 + (rank if apart else 0)
    return min(float(micro_batches), warm / virtual)


def logits_bytes(vocabulary_size: int, tokens: int, split: int, traits: Traits) -> float:
    """Return bytes of logits that exist at a time, on one of `split` ranks."""
    # Loss by blocks of rows: only a block's logits exist at a time.
    alive = tokens if traits.logits_rows is None else min(traits.logits_rows, tokens)
    # Divided logits never meet on one device, if the loss is made of parts.
    if not traits.gathers_logits:
        return alive * vocabulary_size / split * traits.logits_bytes
    # A rank's own columns, those of all ranks before they are joined, and their gradient: sizes
    # that the allocator does not use twice.
    copies = traits.compute_bytes * (2.0 + 1.0 / split) if split > 1 else 0.0
    return alive * vocabulary_size * (traits.logits_bytes + copies)


def communicators(layout: Layout) -> int:
    """Return how many kinds of groups a rank is in besides that of data parallelism; the buffers of
    each take memory.
    """
    return sum(degree > 1 for degree in (layout.tp, layout.pp, layout.cp, layout.ep))
