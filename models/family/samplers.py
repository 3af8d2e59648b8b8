"""Who trains on which share of a step: pure functions of seed, step and share.

Torch-free, and no state: a resumed run draws what it would have drawn, on any number of ranks.
Members are numbered by size, 0 the smallest; the last is the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from motet.models.family.poa_list import draw as list_draw
from motet.models.family.poa_list import poa_weights
from motet.models.keyed import bits, key_of


class DrawKey(NamedTuple):
    """Which draw is asked for.

    Attributes:
        seed: of the run.
        step, share: the share of the step's sequences, of `draws`.
        members: how many there are, the whole model among them.
    """

    seed: int
    step: int
    share: int
    draws: int
    members: int

    @property
    def number(self) -> int:
        """Draws of the run before this one."""
        return self.step * self.draws + self.share


def below(n: int, *path: str | int) -> int:
    """Return a number from 0 to n - 1, a function of its path (Lemire's multiply and shift)."""
    return int(bits(key_of("nested", *path), 0, 1)[0]) * n >> 64


def uniform(at: DrawKey) -> list[int]:
    """One member for each share, all equally likely.

    With one share per micro-batch this is SortedNet's rule (arXiv:2309.00255): gradients of several
    members accumulate in one step, at the cost of their mean.
    """
    return [below(at.members, at.seed, at.step, at.share)]


def matformer(at: DrawKey) -> list[int]:
    """One member for the whole step, all equally likely (MatFormer's sampled rule,
    arXiv:2310.07707).
    """
    return [below(at.members, at.seed, at.step)]


def joint(at: DrawKey) -> list[int]:
    """Every member on every share, the largest first (MatFormer's joint rule)."""
    return list(reversed(range(at.members)))


def sandwich(at: DrawKey) -> list[int]:
    """The largest, a random one between, and the smallest (arXiv:1903.05134, section 3.2)."""
    between = at.members - 2
    middle = [1 + below(between, at.seed, at.step, at.share)] if between > 0 else []
    return list(dict.fromkeys([at.members - 1, *middle, 0]))


def poa(at: DrawKey) -> list[int]:
    """The largest, and the next of a shuffled list in which small members stand more often
    (arXiv:2408.01031, section 3.3).
    """
    if at.members == 1:
        return [0]
    weights = [round(3 * w) for w in poa_weights(range(1, at.members))]
    return [at.members - 1, list_draw(weights, at.seed, at.number)]


def balanced(at: DrawKey) -> list[int]:
    """Pairs of shares whose members mirror each other in size, so that pairs cost alike: the first
    is drawn, the second is as far from the other end.
    """
    first = below(at.members, at.seed, at.step, at.share // 2)
    return [first if at.share % 2 == 0 else at.members - 1 - first]


SAMPLERS: dict[str, Callable[[DrawKey], list[int]]] = {
    "uniform": uniform,
    "sortednet": uniform,
    "matformer": matformer,
    "joint": joint,
    "sandwich": sandwich,
    "poa": poa,
    "shrinking": uniform,
    "balanced": balanced,
}
"""By the name that `family.options.sampler` gives; "shrinking" draws among those of its phase."""


def phase_at(phases: Sequence[tuple[int | None, int]], step: int) -> int:
    """Return the smallest member that a step may draw.

    Args:
        phases: (step at which it ends, None for the last; its smallest member).
    """
    return next(smallest for until, smallest in phases if until is None or step < until)
