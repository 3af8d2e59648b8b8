"""What context parallelism adds to a block: keys, values and their gradients on their way, and
parts of scores that are put together. Pure; no torch.

As `context_parallel.py` and Ring Attention (arXiv:2310.01889) do it: in each of cp steps a rank's
queries meet the keys of one rank. With the two chunks of `chunk_order` every step has the same
products, half of the square. What comes for the next step travels behind them.
"""

from __future__ import annotations

from typing import NamedTuple

from motet.parallel.cluster.constants import Constants
from motet.parallel.cost.links import CommGroup
from motet.parallel.cost.terms import Traits

MERGE_BYTES = 24.0
"""Moved per value of the queries and step, besides reading the part: the sum is scaled, and the
part added, in fp32 (`context_parallel._merge`).
"""
QUERY_SUM_BYTES = 8.0
"""The same of the queries' gradient in the backward pass: fp32, read and written."""
KEY_SUM_BYTES = 24.0
"""The same of the gradients of keys and values: set to zero, the part added, what comes along
added, all in fp32 (`context_parallel._slopes`).
"""
HOST_SHARE = 0.7
"""Host time of a step over that of a block's forward pass: about 8 kernels over 25, and transfers,
which take longer to start.
"""


class Ring(NamedTuple):
    """Seconds that one block waits, and bytes that it has while it runs."""

    forward_s: float
    backward_s: float
    buffer_bytes: float


def ring(
    group: CommGroup,
    tokens: int,
    widths: tuple[float, float],
    value: float,
    core_s: tuple[float, float],
    bandwidth: float,
    traits: Traits,
    constants: Constants,
) -> Ring:
    """Return what a ring adds to one block's forward and backward pass.

    Args:
        tokens: of this rank.
        widths: of its queries, and of keys and values together.
        value: bytes of one.
        core_s: of the scores, forward and backward: what transfers hide behind.
        bandwidth: bytes per second of pointwise kernels.
    """
    if group.ranks == 1:
        return Ring(0.0, 0.0, 0.0)
    queries, keys = (tokens * width for width in widths)
    steps, wide = group.ranks - 1, max(4.0, value)
    merge_s = queries * (MERGE_BYTES + value) / bandwidth
    sum_s = (queries * (QUERY_SUM_BYTES + value) + keys * (KEY_SUM_BYTES + value)) / bandwidth
    behind = core_s[0] / group.ranks + merge_s, core_s[1] / group.ranks + sum_s
    slope_s = group.send_s(keys * wide, constants)
    # Gradients of keys follow them one step behind: the last of them come home behind nothing.
    follow_s = slope_s * (steps - 1) / steps
    wait = _gathered if traits.context_gathers else _around
    waits = wait(group, keys * value, behind, follow_s, constants)
    # Gathered, the keys of all ranks are here; around the ring, a visitor's and the next one's.
    visitors = group.ranks if traits.context_gathers else 2
    # A sum over queries; keys and values here and on their way, and three of their gradients: here,
    # coming and going.
    held = wide * queries + keys * (visitors * value + 3 * wide)
    return Ring(steps * merge_s + waits[0], steps * sum_s + waits[1] + slope_s, held)


def _gathered(
    group: CommGroup,
    size: float,
    behind: tuple[float, float],
    follow_s: float,
    constants: Constants,
) -> tuple[float, float]:
    """Return what the passes wait where one gather brings the keys of all: it hides behind one
    step.
    """
    gather_s = group.gather_s(group.ranks * size, constants)
    slopes_s = (group.ranks - 1) * max(0.0, follow_s - behind[1])
    return max(0.0, gather_s - behind[0]), max(0.0, gather_s - behind[1]) + slopes_s


def _around(
    group: CommGroup,
    size: float,
    behind: tuple[float, float],
    follow_s: float,
    constants: Constants,
) -> tuple[float, float]:
    """Return what they wait where keys come in steps, each behind the step before it."""
    send_s, steps = group.send_s(size, constants), group.ranks - 1
    # On one link, in one direction: gradients and keys share it.
    back_s = steps * max(0.0, send_s + follow_s - behind[1])
    return steps * max(0.0, send_s - behind[0]), back_s
