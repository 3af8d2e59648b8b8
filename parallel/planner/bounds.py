"""Lower bounds of a step's time, from the work alone: what lets the search leave out layouts
without predicting them. Pure; no torch.

If a pipeline rank of group g needs t_kg for a layer of kind k, and W_g for all of the model, then
no partition of layers over p_g ranks of every group has a slowest rank faster than (sum over k of
n_k min_g t_kg / W_g) / (sum over g of p_g / W_g): the dual of the fractional partition with weights
1 / W_g. Rows of pipelines have sharper bounds, for fewer candidates, and `whole_layer_bounds` the
sharpest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from motet.parallel.cost.pipeline import half_passes, wait_s
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.shapes import StageShape
from motet.parallel.planner.linear import GroupCosts, Lines, skeleton
from motet.parallel.planner.placement import crossing_of
from motet.parallel.planner.rows import PipelineRows
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
        # What a rank sends is work like any other: it is weighted with 1 / W_g as layers are, so
        # that the dual bound stays one. The cheapest send is left out here, because `any_way_s`
        # adds it for all ranks.
        groups, inside = len(sends), sends[:, -1]
        itself = np.eye(groups, dtype=bool)
        others = np.where(itself, np.inf, sends[:, :-1]).min(axis=1) if groups > 1 else inside
        # What only asks which groups take part: all of these but the last send to another one.
        bits = np.arange(groups)
        used = (np.arange(1 << groups)[:, None] >> bits) & 1  # [set of groups, group]
        several = used * (used.sum(axis=1) > 1)[:, None]
        crossed = several * np.maximum(others - inside, 0.0) / self.whole
        # Which group is last along the pipeline is open, and the last sends to no other group:
        # leaving out the largest term is right for every order.
        crossed_of = crossed.sum(axis=1) - crossed.max(axis=1)
        # All groups but one send across, so the slowest rank sends no less than the second largest
        # of the nearest ways.
        second_of = np.sort(several * others, axis=1)[:, -2] if groups > 1 else 0 * crossed_of
        sets = (ranks > 0) @ (1 << bits)
        rates = np.maximum(ranks @ (1 / self.whole), 1e-30)
        sent = (ranks.sum(axis=1) > 1) * (ranks @ (inside / self.whole)) + crossed_of[sets]
        found = np.maximum((self.share + sent) / rates, second_of[sets]) - self.send
        return np.asarray(np.maximum(self.share / rates, found))

    def step_s(self, way: ScheduleChoice, pp: int, n: float, slowest: float) -> float:
        """Return what a step of n micro-batches takes at least (see `pipeline.pipeline_s`)."""
        if pp == 1:
            return n * slowest
        virtual, passes = way.virtual_stages, 1.0
        top = slowest + virtual * self.send
        busy = self.least + pp * virtual * self.send
        if way.schedule == "zbv_zero_bubble":
            passes = half_passes(pp, n)
            own = passes / 2  # the longer of two half passes is no more than half of a rank's time
        else:
            own = 1 / virtual
        weights = (self.least - self.rest) / 2
        wait = wait_s(way.schedule, virtual, passes, busy, weights, self.inputs / 4)
        found = (n - own) * top + wait
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
        # Infinity times zero is no number: assignments that cannot be are kept finite until they
        # are masked.
        slowest = np.minimum(slowest, 1e30) + self.send * (pp > 1)
        # With v stages per rank every stage but two holds a layer, which limits v. `several` is
        # linear in 1 / v, so that its least is at an end: the most stages, or, where the others
        # take less than the slowest rank, one stage, but there n x is more.
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
    # Two stages stand for any number: with more than one, ranks cost the same lines. The least
    # sharding that experts allow does, because passes do not ask how weights are divided.
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
    # The third column is both ends of the model, of which there is one: a layer like any other for
    # the dual bound.
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
        # Ranks near the end keep the activations of fewest micro-batches and have most room, so
        # that the order of groups decides what fits: the best order counts.
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
    # One rank per node and nothing beside it on the link: the fastest that a crossing can be,
    # whatever the degrees.
    link = replace(crossing_of(predictor.cluster, sorted(chosen), 2, 1), nodes=1, per_node=1)
    routed_weights = predictor.routed_weights + predictor.expert_weights
    weights = predictor.dense_layers * predictor.dense_weights
    weights += predictor.routed_layers * routed_weights
    size = weights * predictor.traits.reduce_bytes
    return min(link.reduce_s(size, predictor.constants[g]) for g in chosen)


# --- pipelines in rows


class Terms(NamedTuple):
    """What does not depend on a schedule."""

    n: float  # micro-batches
    layers: int
    others: int  # of the rarer kind
    sync_s: np.ndarray  # once a step, [group, layers of the common kind on a rank]
    update_s: np.ndarray
    overlap: float
    factor: float  # of the pipeline's time, probes included
    data_s: float


def bounds_s(
    rows: PipelineRows, cost: GroupCosts, terms: Terms, way: ScheduleChoice, least_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the slowest rank needs at least, and a step, [row], without whole layers.

    Args:
        least_s: what the slowest rank is known to need, [row].
    """
    longer = longer_of(rows, terms, way)
    least_s = np.maximum(least_s, _even_s(rows, cost, terms, way))
    waits_s = _any_waits_s(rows, cost, terms, way)[:, None] * longer
    # `ratio` is the largest share of a rank's time that it adds to the wait: what the slowest rank
    # does not wait for itself is no more than that share of x.
    x_s, own = least_s[:, None], cost.ratio * longer
    once = once_any_s(rows.counts, terms)
    step = pipe_and_data_s(terms, own, x_s, waits_s) + exposed_s(terms, own, x_s, *once)
    return least_s, step[:, 0]


def longer_of(rows: PipelineRows, terms: Terms, way: ScheduleChoice) -> np.ndarray:
    """Return by what the wait is longer where micro-batches are too few to fill a V, [row, 1] (see
    `pipeline.half_passes`).
    """
    pp = rows.counts.sum(axis=1)[:, None]
    if way.schedule != "zbv_zero_bubble":
        return np.ones((len(pp), 1))
    return np.asarray(1.0 + np.clip((2 * pp - 1 - terms.n) / np.maximum(pp - 1, 1), 0.0, 1.0))


def pipe_and_data_s(
    terms: Terms, own: np.ndarray, x_s: np.ndarray, waits_s: np.ndarray
) -> np.ndarray:
    """Return what a step takes at least without what is paid once; `own`: of x, what the slowest
    rank does not wait for.
    """
    # The wait of the slowest rank itself is counted in W; taking off the most that it can be keeps
    # this a bound. Without any wait n x remains.
    pipe_s = np.maximum((terms.n - own) * x_s + waits_s, terms.n * x_s)
    return np.asarray(pipe_s * terms.factor + terms.data_s)


def exposed_s(
    terms: Terms, own: np.ndarray, x_s: np.ndarray, sync_s: np.ndarray, update_s: np.ndarray
) -> np.ndarray:
    """Return what is paid once a step and hidden by nothing; `own` as of `pipe_and_data_s`: a
    longer x hides no more than it costs.
    """
    # A longer x hides more transfers: `overlap` seconds per second. Where n - own is at least
    # `overlap`, the longer x costs more than it hides, so that the bound taken at the least x holds
    # for all; else all is taken as hidden.
    window_s = np.where(terms.n - own >= terms.overlap, x_s, np.inf)
    return np.asarray(sync_s - terms.overlap * np.minimum(sync_s, window_s) + update_s)


def once_any_s(counts: np.ndarray, terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds of gradients' transfer, and of the update, of a rank with no fewer layers than
    the mean, [row, 1]; `counts`: [row, group].
    """
    groups = np.arange(counts.shape[1])
    # Some rank has no fewer layers of the common kind than the mean, rounded up. Which group it
    # stands in is open: the least of all groups counts.
    mean = -(-(terms.layers - terms.others) // np.maximum(counts.sum(axis=1), 1))[:, None]
    found = []
    for table in (terms.sync_s, terms.update_s):
        least = np.where(counts > 0, table[groups, mean], np.inf).min(axis=1, keepdims=True)
        found.append(np.where(np.isfinite(least), least, 0.0))
    return found[0], found[1]


def _crossed(values: np.ndarray, rows: PipelineRows, way: ScheduleChoice) -> np.ndarray:
    """Return the sum of what groups add that send to others, [row]; `values`: [row, group]."""
    total = values.sum(axis=1)
    # With one stage per rank the last group of the pipeline sends to no other; in no order of
    # groups, that is the one that sends longest.
    if rows.loose and way.virtual_stages == 1:
        total = total - values.max(axis=1)
    return np.asarray(total)


def _even_s(rows: PipelineRows, cost: GroupCosts, terms: Terms, way: ScheduleChoice) -> np.ndarray:
    """Return what the slowest rank needs at least if layers could be cut, [row]."""
    groups = np.arange(rows.counts.shape[1])
    after = rows.line if way.virtual_stages == 1 else rows.ring
    at = rows.first if way.schedule == "zbv_zero_bubble" else rows.last
    # What ranks do besides layers is as good as so many layers of their group: the even share of
    # all of it is the least that the slowest can have.
    taken = rows.counts @ (cost.fixed / cost.each) + (cost.head / cost.each)[at]
    crossed = cost.cross[groups, after] * (rows.counts > 0)
    # A layer of the rarer kind that takes less is a part of a layer, in that group where it takes
    # least.
    layers = terms.layers - terms.others * (cost.cheaper / cost.each).max()
    taken = taken + _crossed(crossed / cost.each, rows, way)
    even_s = (layers + taken) / (rows.counts @ (1 / cost.each))
    # Every rank but those at the ends holds a layer in each of its stages.
    # With more ranks between the ends than layers of the rarer kind some rank has none of these,
    # and its stages hold full layers of the common kind.
    few = rows.counts <= terms.others + 2  # else some rank has none of the rarer kind
    stages_s = cost.fixed + way.virtual_stages * cost.each - few * terms.others * cost.cheaper
    return np.maximum(even_s, np.where(rows.counts > 2, stages_s, 0.0).max(axis=1))


def _least(rows: PipelineRows, way: ScheduleChoice) -> np.ndarray:
    """Return how many layers the ranks of a group must hold together, [row, group]."""
    each_row, both = np.arange(len(rows.counts)), way.schedule == "zbv_zero_bubble"
    least = rows.counts * way.virtual_stages
    least[each_row, rows.first] -= 1 + both
    least[each_row, rows.last] -= 1 - both
    return np.maximum(least, 0)


def fixed_waits_s(rows: PipelineRows, cost: GroupCosts, way: ScheduleChoice) -> np.ndarray:
    """Return what ranks without layers add to filling and draining, [row]."""
    groups, both = np.arange(rows.counts.shape[1]), way.schedule == "zbv_zero_bubble"
    after = rows.line if way.virtual_stages == 1 else rows.ring
    crossed = cost.wait_cross[groups, after] * (rows.counts > 0)
    own = rows.counts @ cost.wait_fixed + cost.wait_head[rows.first if both else rows.last]
    return np.asarray(own + _crossed(crossed, rows, way))


def _any_waits_s(
    rows: PipelineRows, cost: GroupCosts, terms: Terms, way: ScheduleChoice
) -> np.ndarray:
    """Return what all ranks together add to filling and draining at least, however layers are
    divided, [row].
    """
    least = _least(rows, way)
    # First what every stage must hold, on its own group; what is left goes where it adds least. No
    # division adds less.
    rest = terms.layers - least.sum(axis=1)
    cheapest = np.where(rows.counts > 0, cost.wait_each, np.inf).min(axis=1)
    found = fixed_waits_s(rows, cost, way) + least @ cost.wait_each + rest * cheapest
    return np.maximum(found - terms.others * cost.wait_cheaper, 0.0)
