"""Lower bounds of a step's time, from the work alone: what lets the search leave out layouts
without predicting them. Pure; no torch.

If a pipeline rank of group g needs t_kg for a layer of kind k, and W_g for all of the model, then
no partition of layers over p_g ranks of every group has a slowest rank faster than (sum over k of
n_k min_g t_kg / W_g) / (sum over g of p_g / W_g): the dual of the fractional partition with weights
1 / W_g. `plan_grid` has sharper bounds, for fewer candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from motet.parallel.cost.pipeline import half_passes
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.shapes import StageShape
from motet.parallel.planner.linear import Lines, skeleton
from motet.parallel.planner.placement import crossing_of
from motet.parallel.planner.space import InnerDegrees, ScheduleChoice


class WorkBound(NamedTuple):
    """Seconds of one micro-batch of the whole model on one pipeline rank of every group, nothing
    sent.
    """

    whole: np.ndarray  # [group]
    share: float  # what of 1 / (sum of p_g / W_g) no partition can beat
    least: float  # sum over layers of the fastest group's time
    rest: float  # the same without twice the weights' part
    inputs: float  # the same of forward and backward without the weights' part
    send: float  # of one virtual stage between neighbours inside the best group
    layer: np.ndarray  # [group], of a layer of the kind that most layers are of
    layers: int  # of that kind

    def slowest(self, ranks: np.ndarray) -> np.ndarray:
        """Return what the slowest rank needs at least, for [assignment, group] numbers of ranks."""
        return np.asarray(self.share / (ranks / self.whole).sum(axis=-1))

    def slowest_sending(self, ranks: np.ndarray, sends: np.ndarray) -> np.ndarray:
        """Return the same with what ranks send, but for what `any_way_s` adds of that.

        Args:
            sends: seconds of one virtual stage, [group, group that is sent to]; the last column is
                inside the group.
        """
        groups, inside = len(sends), sends[:, -1]
        itself = np.eye(groups, dtype=bool)
        others = np.where(itself, np.inf, sends[:, :-1]).min(axis=1) if groups > 1 else inside
        # What only asks which groups take part: all of these but the last send to another one.
        bits = np.arange(groups)
        used = (np.arange(1 << groups)[:, None] >> bits) & 1  # [set of groups, group]
        several = used * (used.sum(axis=1) > 1)[:, None]
        crossed = several * np.maximum(others - inside, 0.0) / self.whole
        crossed_of = crossed.sum(axis=1) - crossed.max(axis=1)
        second_of = np.sort(several * others, axis=1)[:, -2] if groups > 1 else 0 * crossed_of
        sets = (ranks > 0) @ (1 << bits)
        rates = np.maximum(ranks @ (1 / self.whole), 1e-30)
        sent = (ranks.sum(axis=1) > 1) * (ranks @ (inside / self.whole)) + crossed_of[sets]
        found = np.maximum((self.share + sent) / rates, second_of[sets]) - self.send
        return np.asarray(np.maximum(self.share / rates, found))

    def step_s(self, way: ScheduleChoice, pp: int, n: float, slowest: float) -> float:
        """Return what a step of n micro-batches takes at least (see `cost_pipeline.pipeline_s`)."""
        if pp == 1:
            return n * slowest
        virtual = way.virtual_stages
        sends = pp * virtual * self.send
        top = slowest + virtual * self.send
        if way.schedule == "zbv_zero_bubble":
            factor = half_passes(pp, n)
            found = (n - factor / 2) * top + factor * self.inputs / 4
        elif way.schedule == "interleaved_zero_bubble":
            found = (n - 1 / virtual) * top + (self.rest + sends) / virtual
        else:
            found = (n - 1 / virtual) * top + (self.least + sends) / virtual
        return max(found, n * top)

    def any_way_s(
        self, pp: np.ndarray, n: float, slowest: np.ndarray, layers: int, virtual: int
    ) -> np.ndarray:
        """Return what a step takes at least under any schedule, for arrays of pipeline ranks and
        `slowest`.

        Args:
            layers: of the model; every stage but two holds one.
            virtual: most stages of a rank.
        """
        slowest = np.minimum(slowest, 1e30) + self.send * (pp > 1)
        most = np.clip((layers + 2) // pp, 1, virtual)
        several = (n - 1 / most) * slowest + self.rest / most
        v_s = (n - 1.0) * slowest + self.inputs / 4
        alone = (n - 1.0) * slowest + self.least
        found = np.where(most > 1, np.minimum(several, v_s), alone)
        return np.where(pp == 1, n * slowest, np.maximum(found, n * slowest))


def work_bound(lines: Lines, core: InnerDegrees, recompute: str) -> WorkBound:
    """Return the work of a model divided as `core` says."""
    predictor = lines.predictor
    cluster = predictor.cluster
    layout = skeleton(core, (1, core.ep * core.etp), 2, recompute, ScheduleChoice("1f1b", 1))
    routed = predictor.routed_layers
    numbers = np.array([predictor.dense_layers, routed, 1])
    times = np.zeros((len(cluster.groups), 3))
    weights = np.zeros_like(times)
    sends = []
    for g in range(len(cluster.groups)):
        stage = lines.stub(layout, g, max(core.tp * core.cp, core.ep * core.etp))
        for kind in (0, 1):
            if numbers[kind]:
                layer = StageShape(1 - kind, kind, False, False)
                found = predictor.rank(layout, stage, layer, g)
                times[g, kind] = sum(found.forward) + sum(found.backward)
                weights[g, kind] = found.weight_s
                sends.append(found.send_s)
        ends = predictor.edges(layout, stage, g)
        times[g, 2] = sum(sum(part) for end in ends for part in end)
    whole = times @ numbers
    kind = 1 if routed else 0
    share = float(numbers @ (times / whole[:, None]).min(axis=0))
    least = float(numbers @ times.min(axis=0))
    rest = float(numbers @ np.maximum(times - 2 * weights, 0.0).min(axis=0))
    inputs = float(numbers @ (times - weights).min(axis=0))
    # A head's passes for weights are not told apart: they may all be such.
    rest -= float(times[:, 2].min()) if rest > 0 else 0.0
    inputs -= float(times[:, 2].min())
    return WorkBound(
        whole, share, least, rest, inputs, min(sends), times[:, kind], int(numbers[kind])
    )


def with_room(rooms: np.ndarray, found: np.ndarray, layers: int) -> np.ndarray:
    """Return which assignments of [assignment, group] may have the memory for all layers.

    With one stage what a rank holds is no straight line: these stay open.

    Args:
        rooms: the most layers on the last 0, 1, ... ranks of a pipeline, [group, ranks].
    """
    most = np.zeros(len(found))
    for order in permutations(range(len(rooms))):
        end, total = np.zeros(len(found), dtype=int), np.zeros(len(found))
        for g in order:  # from the last rank of the pipeline to the first
            total += rooms[g, end + found[:, g]] - rooms[g, end]
            end = end + found[:, g]
        most = np.maximum(most, total)
    return np.asarray((most >= layers) | (found.sum(axis=1) == 1))


def gradients_crossing_s(predictor: Predictor, chosen: Sequence[int]) -> float:
    """Return in what time the gradients of all weights cross between groups that hold whole
    replicas, at least.

    Every rank adds its part to those of its peers in the other groups, and all ranks of a replica
    share the link: together they send all weights' gradients once. No partition and no degree
    changes that; of several stages the fullest has no less than its share.
    """
    link = replace(crossing_of(predictor.cluster, sorted(chosen), 2, 1), nodes=1, per_node=1)
    routed_weights = predictor.routed_weights + predictor.expert_weights
    weights = predictor.dense_layers * predictor.dense_weights
    weights += predictor.routed_layers * routed_weights
    size = weights * predictor.traits.reduce_bytes
    return min(link.reduce_s(size, predictor.constants[g]) for g in chosen)
