"""Which layouts cannot train members of a family; torch-free, to be asked before a rank starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from motet.models.config import ModelConfig
from motet.models.member import Member, block_cuts
from motet.parallel.layout.layout import Layout


def refusals(layout: Layout, config: ModelConfig, members: Sequence[Member] = ()) -> list[str]:
    """Return why a layout cannot train members of a family beside the whole model, in words."""
    reasons = []
    if layout.engine != "native":
        reasons.append(f"layout.engine={layout.engine} trains whole models only; use native")
    if layout.pp > 1:
        reasons.append(
            f"layout.pp={layout.pp}: a member leaves out layers, and stages of a pipeline would "
            "wait for each other; use pp=1"
        )
    if len(set(layout.shares)) > 1:
        reasons.append("layout.shares: replicas must take equally many micro-batches")
    return reasons + list(dict.fromkeys(_cut_groups(layout, config, members)))


def _cut_groups(layout: Layout, config: ModelConfig, members: Sequence[Member]) -> Iterator[str]:
    """Say where ranks would hold different shares of a member."""
    for member in members:
        for cuts in block_cuts(config, member):
            degrees = {
                "tp": layout.tp if cuts.heads or cuts.hidden else 1,
                "ep": layout.ep if cuts.experts else 1,
                "etp": layout.etp if cuts.expert else 1,
            }
            for name, degree in degrees.items():
                if member.groups % degree:
                    fits = [n for n in range(1, degree + 1) if member.groups % n == 0]
                    yield (
                        f"layout.{name}={degree} cuts a group of member {member.name!r}, whose "
                        f"heads, channels and experts lie in {member.groups}; use "
                        f"{name}={fits[-1]}, or groups={math.lcm(member.groups, degree)} in a new "
                        "run"
                    )
