"""How long a step takes: the formula, once. Pure; no torch.

Pipeline rank r is busy for x_r seconds of one micro-batch: its passes (f_r forward, b_r backward,
of which w_r make weights' gradients), waits for weights and gradients, and sends. A step of n
micro-batches takes

    T = (1 + probes) (n max_r x_r  +  max(0, sum over the other ranks of wait_r))
        + max_r exposed_r  +  max_r update_r  +  data

where `wait_r` is `wait_s` below (what `timeline.timeline` finds pass by pass), `exposed_r` what
nothing hides of the gradients' transfer (`exposed`), and update_r the optimizer's. A replica has n
of its own; the slowest replica counts.

**The contract that the planner's proof needs.** With more than one pipeline rank, x_r, w_r, sync_r
and update_r of a rank are straight lines in its dense layers and its layers with experts, on one
kind of device, in one place, under one set of degrees; its bytes are, too. (One exception: without
a layer with experts, sync_r lacks the latency of the experts' group, some tens of microseconds.)
What is sent and reduced takes no less for more bytes, and no less over a slower or more distant
group. Layers of a kind cost the same wherever they lie. Costs that break this belong into the fixed
part of a line, or the bounds of the search no longer hold (`tests/parallel/planner/test_bounds.py`
fails).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from motet.parallel.cost.terms import Training
from motet.parallel.layout.layout import Layout

if TYPE_CHECKING:
    import numpy as np

Number = TypeVar("Number", float, "np.ndarray")


class Chain(NamedTuple):
    """What the pipeline ranks' times for one micro-batch come to."""

    slowest_s: float
    others_s: float  # the other ranks together
    others_weight_s: float  # their passes for weights
    others_half_s: float  # the longer of forward and input passes, of one of two stages


def chain(ranks: Iterable[tuple[int, float, float, float]]) -> Chain:
    """Return sums over pipeline ranks.

    Args:
        ranks: (how many are alike, then for each of them `forward_s`, `backward_s` and `weight_s`
            of `pipeline_s`).
    """
    slowest = slowest_weight = slowest_half = -1.0
    total = weights = halves = 0.0
    for count, forward, backward, weight in ranks:
        busy, rest = forward + backward, backward - weight
        # In a V a rank has two stages; what others wait for is the longer of its forward and its
        # input pass through one of them.
        half = (forward if forward > rest else rest) / 2.0
        total += count * busy
        weights += count * weight
        halves += count * half
        if busy > slowest:
            slowest, slowest_weight, slowest_half = busy, weight, half
    return Chain(slowest, total - slowest, weights - slowest_weight, halves - slowest_half)


def half_passes(pp: int, micro_batches: float) -> float:
    """Return how often every other rank of a V costs its longer half pass: once, twice where
    micro-batches are too few (found with `timeline`).
    """
    return 1.0 + min(1.0, max(0.0, (2 * pp - 1 - micro_batches) / (pp - 1)))


def wait_s(
    schedule: str,
    virtual: int,
    passes: Number,
    busy_s: Number,
    weight_s: Number,
    half_s: Number,
) -> Number:
    """Return what ranks that are busy for `busy_s` add to the filling and draining of a pipeline.

    Linear in all three: what holds for a rank holds for sums over ranks, and for what one layer
    more adds.

    Args:
        passes: `half_passes`; only a V asks for it.
        weight_s, half_s: as in `Chain`, of the same ranks.
    """
    if schedule == "interleaved_1f1b":
        return busy_s / virtual  # a rank waits for one stage of each other rank
    if schedule == "interleaved_zero_bubble":
        # While it waits to fill and to drain, it makes up for weights' passes left behind.
        return (busy_s - 2.0 * weight_s) / virtual
    if schedule == "zbv_zero_bubble":
        return half_s * passes
    return busy_s


def own_share(schedule: str, virtual: int) -> float:
    """Return which share of its own time for one micro-batch the slowest rank does not wait, at
    most: by how much less than n times that a step takes besides the others' waits.
    """
    return 1 / virtual if schedule.startswith("interleaved") else 1.0


def chain_s(layout: Layout, micro_batches: float, ranks: Chain) -> float:
    """Return the time from the first pass to the last of one step: see `pipeline_s`."""
    # One rank waits for nobody.
    if layout.pp == 1:
        return micro_batches * ranks.slowest_s
    schedule, passes = layout.schedule, 0.0
    if schedule == "zbv_zero_bubble":
        passes = half_passes(layout.pp, micro_batches)
    others = ranks.others_s, ranks.others_weight_s, ranks.others_half_s
    more_s = wait_s(schedule, layout.virtual_stages, passes, *others)
    # Weights' passes can fill no more than the whole wait.
    return micro_batches * ranks.slowest_s + max(0.0, more_s)


def step_s(pipe_s: float, sync_s: float, update_s: float, training: Training) -> float:
    """Return the seconds of a step, from its pipeline's and what is paid once."""
    return pipe_s + sync_s + update_s + probe_s(pipe_s, training) + training.data_s


def probe_s(pipe_s: float, training: Training) -> float:
    """Return what probes take in a step: forward passes, a third of a step's work per token."""
    tokens = training.sequences * training.sequence_length
    return pipe_s * training.probe_tokens / (3.0 * tokens)


def pipeline_s(
    layout: Layout,
    micro_batches: float,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_s: Sequence[float],
) -> float:
    """Return the time from the first pass to the last of one step.

    The slowest rank is always busy; it waits while the first micro-batch comes to it and the last
    one leaves: the passes of the others, once (1F1B: arXiv:2104.04473, section 2.2; a rank with v
    stages waits for one of them: section 2.2.2; passes for weights fill a
    part of the wait: arXiv:2401.10241, section 2).

    Args:
        forward_s, backward_s: of one micro-batch on every pipeline rank, all its stages together.
        weight_s: the part of `backward_s` that makes the weights' gradients.
    """
    each = zip([1] * len(forward_s), forward_s, backward_s, weight_s, strict=True)
    return chain_s(layout, micro_batches, chain(each))


def exposed(transfer_s: float, compute_s: float, overlap: float) -> float:
    """Return what a transfer adds to computation of which a share can hide it; what is hidden still
    costs the rest.
    """
    return transfer_s - overlap * (transfer_s if transfer_s < compute_s else compute_s)
