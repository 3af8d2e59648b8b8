"""What the cost of a pipeline rank is made of. Pure; no torch."""

from __future__ import annotations

from typing import NamedTuple

from motet.parallel.cost.block import Times
from motet.parallel.cost.topology import Stage


class Kept(NamedTuple):
    """One pipeline rank: what it holds of the model."""

    dense_layers: int
    expert_layers: int
    first: bool
    last: bool


class Rank(NamedTuple):
    """One pipeline rank's seconds for one micro-batch, and for the step."""

    forward: Times
    backward: Times  # what is made again included
    head_s: float  # part of both: embedding, last norm, head, loss
    gather_s: tuple[
        float, float
    ]  # weights in a forward pass; those and gradients in a backward pass
    send_s: float  # per micro-batch
    sync_s: float  # once a step
    optimizer_s: float
    weight_s: float  # the part of backward for weights' gradients
    forward_s: float  # sums of the first two
    backward_s: float
    ahead_s: float  # the same with what waits for transfers
    behind_s: float


class Passes(NamedTuple):
    """The part of `Rank` that blocks and edges make."""

    forward: Times
    backward: Times
    head_s: float
    weight_s: float
    forward_s: float
    backward_s: float


class Step(NamedTuple):
    """The part of `Rank` that data parallelism and the update make."""

    gather_s: tuple[float, float]
    sync_s: float
    optimizer_s: float


class Held(NamedTuple):
    """GiB of one pipeline rank, apart from how many micro-batches it keeps activations of."""

    state: dict[str, float]  # weights, gradients, optimizer state and buffers
    rest: dict[str, float]  # logits, collectives, reserved
    fixed_gib: float  # all of these
    per_micro_batch_gib: float  # activations of one micro-batch
    once_gib: float  # activations besides, however many micro-batches there are
    capacity_gib: float


class Activations(NamedTuple):
    """The part of `Held` that does not ask how data parallelism divides weights."""

    rest: dict[str, float]
    rest_gib: float
    per_micro_batch_gib: float
    once_gib: float


class Words(NamedTuple):
    """What of a layout the tables of a `Spot` ask for."""

    blocks: tuple[object, ...]  # micro-batch, recomputation, what tensor parallelism divides
    data: tuple[object, ...]  # whether there is a pipeline, divided tables, shares of replicas
    several: bool  # micro-batches add to a gradient
    piped: bool


class Spot(NamedTuple):
    """What one pipeline rank holds, on one kind of device, in one place: tables of its costs by
    `Words`.

    Spots share the tables that do not ask what they differ in.
    """

    stage: Stage
    kept: Kept
    group: int
    passes: dict[object, Passes]
    sends_s: dict[object, float]
    steps: dict[object, Step]
    states: dict[object, tuple[dict[str, float], float]]
    activations: dict[object, Activations]


class Run(NamedTuple):
    """Neighbouring pipeline ranks, from `start` to before `stop`, that are alike."""

    start: int
    stop: int
    spots: list[Spot]  # one for each of the cluster's groups that their devices belong to


def exposed(transfer_s: float, compute_s: float, overlap: float) -> float:
    """Return what a transfer adds to computation of which a share can hide it; what is hidden still
    costs the rest.
    """
    return transfer_s - overlap * (transfer_s if transfer_s < compute_s else compute_s)
