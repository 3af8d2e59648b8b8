"""How long a pipeline takes, in closed form: what `timeline.timeline` finds pass by pass.

Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from motet.parallel.layout.layout import Layout


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


def chain_s(layout: Layout, micro_batches: float, ranks: Chain) -> float:
    """Return the time from the first pass to the last of one step: see `pipeline_s`."""
    schedule, virtual = layout.schedule, layout.virtual_stages
    if layout.pp == 1:
        wait = 0.0
    elif schedule == "interleaved_1f1b":
        wait = ranks.others_s / virtual
    elif schedule == "interleaved_zero_bubble":
        wait = max(0.0, ranks.others_s - 2.0 * ranks.others_weight_s) / virtual
    elif schedule == "zbv_zero_bubble":
        wait = ranks.others_half_s * half_passes(layout.pp, micro_batches)
    else:
        wait = ranks.others_s
    return micro_batches * ranks.slowest_s + wait


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
