"""Lower bounds of a step's time, from the work alone: what lets the search leave out layouts without predicting them. Pure; no torch.

If a pipeline rank of group g needs t_kg for a layer of kind k, and W_g for all of the model, then no partition of layers over p_g ranks of
every group has a slowest rank faster than (sum over k of n_k min_g t_kg / W_g) / (sum over g of p_g / W_g): the dual of the fractional
partition with weights 1 / W_g. Layers are whole: no rank is faster than the first of the times k t_kg, k = 1, 2, ... until which the ranks of
all groups, within their memory, find room for all layers of the kind that most are of. And what a pipeline sends between groups takes time on
the ranks that send it.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import numpy as np

from motet.parallel.cluster import Cluster
from motet.parallel.cost_links import Domain
from motet.parallel.plan_lines import skeleton, stub
from motet.parallel.plan_places import crossing_of
from motet.parallel.plan_space import Core, Way
from motet.parallel.predict import Kept, Predictor


class Crossing(NamedTuple):
    """What a pipeline over several groups sends between them, for an array of assignments of stages to groups."""

    blocks: np.ndarray  # groups that take part
    send_s: float  # of one virtual stage between the groups that are nearest to each other


class Work(NamedTuple):
    """Seconds of one micro-batch of the whole model on one pipeline rank of every group, nothing sent."""

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

    def slowest_whole(self, ranks: np.ndarray, rooms: np.ndarray) -> np.ndarray:
        """Return what the slowest rank needs at least for whole layers; infinite where memory has no room for all.

        Args:
            ranks: [assignment, group].
            rooms: layers for which all ranks of a group have memory, [assignment, group].
        """
        times = np.unique(np.outer(self.layer, np.arange(1, self.layers + 1)))
        counts = np.floor(times[:, None] / self.layer * (1 + 1e-9)).astype(int)
        ones = np.ones(len(self.layer))
        low, high = np.zeros(len(ranks), dtype=int), np.full(len(ranks), len(times))
        while (low < high).any():
            middle = (low + high) // 2
            held = np.minimum(ranks * counts[np.minimum(middle, len(times) - 1)], rooms)
            enough = held @ ones >= self.layers
            high = np.where((low < high) & enough, middle, high)
            low = np.where((low < high) & ~enough, middle + 1, low)
        return np.append(times, np.inf)[low]

    def crossed_s(
        self,
        way: Way,
        pp: np.ndarray,
        n: float,
        ranks: np.ndarray,
        slowest: np.ndarray,
        crossing: Crossing,
    ) -> np.ndarray:
        """Return what a step takes at least where stages of several groups send to each other.

        Args:
            pp, slowest: pipeline ranks and their slowest, [assignment].
            ranks: [assignment, group].
        """
        virtual = way.virtual_stages
        several = crossing.blocks > 1
        # The last group sends back to the first where ranks have several stages.
        senders = np.where(several, crossing.blocks - (virtual == 1), 0)
        more_s = senders * virtual * max(0.0, crossing.send_s - self.send)
        spread = more_s / self.whole.max() / (ranks @ (1 / self.whole))
        slowest = np.maximum(slowest, self.slowest(ranks) + spread)
        own_s = virtual * max(0.0, crossing.send_s - self.send)
        slowest = np.maximum(slowest, np.where(several, own_s, 0.0))
        return self._step_s(way, pp, n, slowest, more_s)

    def step_s(self, way: Way, pp: int, n: float, slowest: float) -> float:
        """Return what a step of n micro-batches takes at least (see `cost_pipeline.pipeline_s`)."""
        one = np.array([pp]), n, np.array([slowest]), np.zeros(1)
        return float(self._step_s(way, *one)[0])

    def _step_s(
        self, way: Way, pp: np.ndarray, n: float, slowest: np.ndarray, more_s: np.ndarray
    ) -> np.ndarray:
        """Return the same for arrays; `more_s`: what all ranks together send longer than inside the best group."""
        virtual = way.virtual_stages
        sends = pp * virtual * self.send + more_s
        top = slowest + virtual * self.send
        if way.schedule == "zbv_zero_bubble":
            factor = 1.0 + np.clip((2 * pp - 1 - n) / np.maximum(pp - 1, 1), 0.0, 1.0)
            found = (n - factor / 2) * top + factor * self.inputs / 4
        elif way.schedule == "interleaved_zero_bubble":
            found = (n - 1 / virtual) * top + (self.rest + sends) / virtual
        else:
            found = (n - 1 / virtual) * top + (self.least + sends) / virtual
        return np.where(pp == 1, n * slowest, np.maximum(found, n * top))

    def any_way_s(
        self, pp: np.ndarray, n: float, slowest: np.ndarray, layers: int, virtual: int
    ) -> np.ndarray:
        """Return what a step takes at least under any schedule, for arrays of pipeline ranks and `slowest`.

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


def work(predictor: Predictor, core: Core, recompute: str) -> Work:
    """Return the work of a model divided as `core` says."""
    model, cluster = predictor.model, predictor.cluster
    layout = skeleton(core, (1, core.ep * core.etp), 2, recompute, Way("1f1b", 1))
    routed = sum(model.has_experts(layer) for layer in range(model.n_layers))
    numbers = np.array([model.n_layers - routed, routed, 1])
    times = np.zeros((len(cluster.groups), 3))
    weights = np.zeros_like(times)
    sends = []
    for g in range(len(cluster.groups)):
        stage = stub(predictor, layout, g)
        for kind in (0, 1):
            if numbers[kind]:
                layer = Kept(1 - kind, kind, False, False)
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
    return Work(whole, share, least, rest, inputs, min(sends), times[:, kind], int(numbers[kind]))


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


def crossing_hops(cluster: Cluster, stage_ranks: int) -> list[tuple[int, Domain]]:
    """Return (group that sends, the way to another group) for stages of a size (see `plan_places`)."""
    groups = range(len(cluster.groups))
    return [
        (one, crossing_of(cluster, sorted((one, other)), 2, stage_ranks))
        for one in groups
        for other in groups
        if one != other
    ]


def crossing_s(predictor: Predictor, core: Core, hops: list[tuple[int, Domain]]) -> float:
    """Return what sending to another group takes at least, of one virtual stage and micro-batch (see `cost_rank`)."""
    tokens = core.micro_sequences * predictor.training.sequence_length / core.cp
    parts = core.tp if core.sequence_parallel or predictor.traits.sends_parts else 1
    found = []
    for g, hop in hops:
        size = tokens * predictor.model.d_model * predictor.costs[g].value / parts
        found.append(hop.send_s(size, predictor.constants[g]))
    return 2 * min(found, default=0.0) * (1.0 - predictor.traits.send_overlap)
