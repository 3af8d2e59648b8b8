"""What ranks of every group cost under a schedule, as arrays over groups: what `plan_grid` bounds
steps with. Pure; no torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from motet.parallel.planner.linear import Lines, RankLines, load, skeleton
from motet.parallel.planner.space import InnerDegrees, ScheduleChoice

Once = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_PLENTY = 1 << 40  # micro-batches: too many for a V to run short of them


class Cost(NamedTuple):
    """Seconds of one micro-batch under a schedule, on ranks of every group. "Wait" is what they add
    to filling and draining.
    """

    fixed: np.ndarray  # [group]
    each: np.ndarray  # of a layer of the kind that most are of
    other: np.ndarray  # of a layer of the other kind
    cheaper: np.ndarray  # what that takes less, or 0
    wait_fixed: np.ndarray
    wait_each: np.ndarray
    wait_other: np.ndarray
    wait_cheaper: float
    head: np.ndarray
    wait_head: np.ndarray
    cross: (
        np.ndarray
    )  # [group, group that is sent to]: longer than inside the group, which is the last column
    wait_cross: np.ndarray
    ratio: float  # of a rank's time, what it adds to the wait, at most


class Ranks:
    """Reads ranks off the predictor as lines, and remembers them."""

    def __init__(self, lines: Lines, most: int) -> None:
        """`most`: the kind of layers that most are of, 0 dense or 1 with experts."""
        self.lines, self.most = lines, most
        self._ranks: dict[tuple[InnerDegrees, str, str], list[RankLines]] = {}
        self._once: dict[tuple[object, ...], Once] = {}
        self._parts_of: dict[tuple[object, ...], tuple[np.ndarray, ...]] = {}

    def ranks(self, core: InnerDegrees, recompute: str, at: str) -> list[RankLines]:
        """Return a rank of every group, with layers only, with the head, or with both ends of the
        model.
        """
        key = core, recompute, at
        found = self._ranks.get(key)
        if found is None:
            layout = skeleton(
                core, (1, core.ep * core.etp), 2, recompute, ScheduleChoice("1f1b", 1)
            )
            ends = {"inner": (False, False), "head": (False, True), "both": (True, True)}[at]
            predictor, named = self.lines.predictor, ("grid", core, recompute)
            found = self._ranks[key] = [
                self.lines.rank(named, layout, self.lines.stub(layout, g), g, *ends)
                for g in range(len(predictor.cluster.groups))
            ]
        return found

    def cost(
        self, core: InnerDegrees, recompute: str, way: ScheduleChoice, sends: np.ndarray
    ) -> Cost:
        """Return the lines of all groups.

        Args:
            sends: seconds that one virtual stage sends, [group, group that is sent to]; the last
                column is inside the group.
        """
        plain, slope, head = self._parts(core, recompute, way)
        inside = sends[:, -1]
        own = plain + slope * inside
        most, other = self.most, 1 - self.most
        cheaper = np.zeros((2, len(sends)))
        if all(self.lines.kinds):
            cheaper = np.maximum(
                (own[1 + most] - own[1 + other], own[4 + most] - own[4 + other]), 0
            )
        busy, waits = (
            np.vstack((own[:3], own[:1] + head[:1])),
            np.vstack((own[3:], own[3:4] + head[3:4])),
        )
        ratio = float(np.max(waits[busy > 0] / busy[busy > 0]))
        longer = sends - inside[:, None]
        return Cost(
            own[0],
            own[1 + most],
            own[1 + other],
            cheaper[0],
            own[3],
            own[4 + most],
            own[4 + other],
            float(cheaper[1].max()),
            head[0],
            head[3],
            longer * slope[0][:, None],
            longer * slope[3][:, None],
            max(0.0, ratio),
        )

    def _parts(
        self, core: InnerDegrees, recompute: str, way: ScheduleChoice
    ) -> tuple[np.ndarray, ...]:
        """Return (rows of `_row` without sending, what a second of sending adds to them, what the
        head adds), [number, group] each.
        """
        key = core, recompute, way
        if key not in self._parts_of:
            both = way.schedule == "zbv_zero_bubble"
            inner = self.ranks(core, recompute, "inner")
            heads = self.ranks(core, recompute, "both" if both else "head")
            plain = np.array([_row(one, way, 0.0) for one in inner]).T
            slope = np.array([_row(one, way, 1.0) for one in inner]).T - plain
            head = np.array([_row(one, way, 0.0) for one in heads]).T - plain
            self._parts_of[key] = plain, slope, head
        return self._parts_of[key]

    def once(
        self,
        core: InnerDegrees,
        readers: int,
        open_: list[tuple[int, int]],
        layers: int,
        others: int,
    ) -> Once:
        """Return the least seconds of gradients' transfer, and of the update, of a step, [group,
        layers of a rank].

        First both for layers of either kind, then for layers of the common kind.

        Args:
            open_: (dp_replicate, dp_shard) that may be chosen.
            others: layers of the rarer kind.
        """
        key = core._replace(micro_sequences=1), readers
        if key not in self._once:
            groups = range(len(self.lines.predictor.cluster.groups))
            count = np.arange(layers + 1.0)
            few = np.minimum(count, others)
            found = np.full((4, len(groups), layers + 1), np.inf)
            for split in open_:
                layout = skeleton(key[0], split, 2, "none", ScheduleChoice("1f1b", 1))
                for g in groups:
                    stage = self.lines.stub(layout, g)
                    named = "once", key, split
                    one = self.lines.rank(named, layout, stage, g, False, False)
                    for at, line in enumerate((one.sync, one.update)):
                        each, other = line[1 + self.most], line[2 - self.most]
                        least = line[0] + each * count - max(0.0, each - other) * few
                        found[at, g] = np.minimum(found[at, g], least)
                        common = line[0] + each * count
                        found[2 + at, g] = np.minimum(found[2 + at, g], common)
            self._once[key] = found[0], found[1], found[2], found[3]
        return self._once[key]


def _row(rank: RankLines, way: ScheduleChoice, send_s: float) -> tuple[float, ...]:
    """Return (busy, waits) of a rank, each fixed, of a dense layer, of a layer with experts."""
    one = load(rank._replace(send=send_s), way, 2, _PLENTY, 0)
    return (one.fixed, *one.each, one.wait_fixed, *one.wait_each)
