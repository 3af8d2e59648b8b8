"""Many pipelines at once, as rows of arrays: stages of every group, in an order of groups or in
none. Pure; no torch.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import numpy as np

from motet.parallel.planner.linear import GroupCosts


class PipelineRows(NamedTuple):
    """Pipelines: stages of every group, in one order of groups."""

    counts: np.ndarray  # [row, group]
    source: np.ndarray  # which assignment each comes from
    orders: list[tuple[int, ...]]
    first: np.ndarray  # group of the first rank, and of the last
    last: np.ndarray
    # [row, group]: to which group the last rank of a group sends; as many as there are groups: to
    # its own.
    line: np.ndarray
    ring: np.ndarray  # the same where ranks have several stages
    end: np.ndarray  # [row, group]: ranks up to the last of a group
    loose: bool = (
        False  # nothing says which group is last: it sends to no other where ranks have one stage
    )


def rows_of(counts: np.ndarray) -> PipelineRows:
    """Return every order of the groups of [assignment, group] numbers of stages."""
    groups = counts.shape[1]
    masks = (counts > 0) @ (1 << np.arange(groups))
    parts = []
    for mask in np.unique(masks):
        used = [g for g in range(groups) if mask >> g & 1]
        at = np.flatnonzero(masks == mask)
        for order in permutations(used):
            ring = np.full((len(at), groups), groups)
            if len(order) > 1:
                for one, other in zip(order, (*order[1:], order[0]), strict=True):
                    ring[:, one] = other
            # With one stage per rank the last group has nobody to send to; around the ring it sends
            # to the first.
            line = ring.copy()
            line[:, order[-1]] = groups
            if len(order) > 1:  # a last rank alone in its group sends back to the group before
                line[counts[at, order[-1]] == 1, order[-1]] = order[-2]
            end = np.zeros_like(counts[at])
            end[:, order] = np.cumsum(counts[at][:, order], axis=1)
            parts.append((at, [order] * len(at), line, ring, end))
    source = np.concatenate([one[0] for one in parts])
    orders = [order for one in parts for order in one[1]]
    return PipelineRows(
        counts[source],
        source,
        orders,
        np.array([order[0] for order in orders]),
        np.array([order[-1] for order in orders]),
        np.concatenate([one[2] for one in parts]),
        np.concatenate([one[3] for one in parts]),
        np.concatenate([one[4] for one in parts]),
    )


def unordered(found: np.ndarray, cost: GroupCosts) -> PipelineRows:
    """Return rows for assignments in any order: to another group is sent what `unplaced` says, and
    both ends are where a layer waits longest.
    """
    number, groups = found.shape
    several = (found > 0) & ((found > 0).sum(axis=1) > 1)[:, None]
    # "Itself" stands for the nearest other group (`unplaced`); a group alone sends inside.
    after = np.where(several, np.arange(groups), groups)
    # Both ends must hold no layer, so they are put where a layer waits longest: the bound frees the
    # dearest ones.
    some = np.where(found > 0, cost.wait_each, -np.inf).argmax(axis=1)
    end = np.cumsum(found, axis=1)
    return PipelineRows(found, np.arange(number), [], some, some, after, after, end, loose=True)


def unplaced(cost: GroupCosts) -> GroupCosts:
    """Return the costs where there is no order of groups: without a head; what a group sends to
    itself is what it sends to the nearest other.
    """
    crossed = []
    for one in (cost.cross, cost.wait_cross):
        least, groups = one.copy(), len(one)
        itself = np.eye(groups, groups + 1, dtype=bool)
        others = np.where(itself, np.inf, one)[:, :-1]
        least[itself] = others.min(axis=1) if groups > 1 else 0.0
        crossed.append(least)
    return cost._replace(
        head=0 * cost.head,
        wait_head=0 * cost.wait_head,
        cross=crossed[0],
        wait_cross=crossed[1],
    )
