"""The search for the fastest layouts: exhaustive over `plan_space`, with bounds that leave out what cannot win. Pure; no torch.

Degrees are taken in the order of a lower bound of their time (`plan_bounds`). What is left is placed on the groups of the cluster in every
order, its layers are divided exactly (`plan_partition`), and what fits is predicted by the cost model itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from motet.parallel.cluster import Cluster
from motet.parallel.cost_links import Domain
from motet.parallel.cost_places import Stage
from motet.parallel.cost_terms import Prediction
from motet.parallel.layout import RECOMPUTE, Layout
from motet.parallel.plan_bounds import Crossing, Work, crossing_hops, crossing_s, with_room, work
from motet.parallel.plan_lines import Lines, layers_that_fit, skeleton
from motet.parallel.plan_pipeline import Node, Pipeline
from motet.parallel.plan_places import placement, places_of, renumbered, trimmed
from motet.parallel.plan_space import (
    Core,
    Spread,
    Way,
    assignments,
    cores,
    divisors,
    every_way,
    splits,
    ways,
)
from motet.parallel.plan_terms import Answer, Choice, Question, kind_of
from motet.parallel.predict import Predictor

ONE = Way("1f1b", 1)


def plan(question: Question) -> Answer:
    """Return the fastest layouts that fit, one of each kind.

    Raises:
        ClusterError: the devices have no rate for the data type.
    """
    from motet.parallel import plan_flat, plan_replicas

    search = Search(question)
    if "native" in question.engines and question.allows(engine="native"):
        search.pipelines()
        plan_replicas.search(search)
    if "deepspeed" in question.engines and question.allows(engine="deepspeed"):
        plan_flat.search(search)
    return search.answer


class Search:
    """One search; `answer` grows while it runs."""

    def __init__(self, question: Question) -> None:
        self.question, self.answer = question, Answer()
        self.cluster, self.model = question.cluster, question.model
        self.predictor = self.predictor_of(self.cluster)
        self.lines = Lines(self.predictor)
        self.routed = [int(self.model.has_experts(i)) for i in range(self.model.n_layers)]
        self._trimmed: dict[tuple[int, ...], tuple[Cluster, Predictor] | None] = {}
        self._works: dict[tuple[Core, str], Work] = {}
        self._best: dict[tuple[object, ...], Choice] = {}
        self._stages: dict[Stage, int] = {}
        self._assigned: dict[int, np.ndarray] = {}
        self._limit_s = math.inf
        self._hops: dict[int, list[tuple[int, Domain]]] = {}
        self._taken_of: dict[int, np.ndarray] = {}
        self._all_ways = every_way(self.question.limits.virtual_stages)

    # --- what is shared

    def predictor_of(self, cluster: Cluster) -> Predictor:
        """Return a predictor of the question's model on some machines."""
        q = self.question
        return Predictor(q.model, cluster, q.training, q.traits, q.constants)

    def machines(self, used: Sequence[int]) -> tuple[Cluster, Predictor] | None:
        """Return the nodes that hold this many devices of every group, and their predictor."""
        key = tuple(used)
        if key not in self._trimmed:
            cluster = trimmed(self.cluster, key)
            self._trimmed[key] = None if cluster is None else (cluster, self.predictor_of(cluster))
        return self._trimmed[key]

    def work_of(self, core: Core, recompute: str) -> Work:
        """Return the work of a core."""
        key = core, recompute
        if key not in self._works:
            self._works[key] = work(self.predictor, core, recompute)
        return self._works[key]

    def number_of(self, stage: Stage) -> int:
        """Return a number that stands for a stage: cheaper to compare than its links."""
        return self._stages.setdefault(stage, len(self._stages))

    @property
    def limit_s(self) -> float:
        """A layout that takes longer is not ranked."""
        return self._limit_s

    def limit_of(self, kind: tuple[object, ...]) -> float:
        """Return the seconds that a layout of a kind must stay below to be ranked."""
        known = self._best.get(kind)
        return self._limit_s if known is None else min(self._limit_s, known.prediction.step_time_s)

    def record(self, choice: Choice) -> None:
        """Keep a layout that fits, if it is among the best."""
        if choice.prediction.step_time_s >= self.limit_of(choice.kind):
            return
        self._best[choice.kind] = choice
        ranked = sorted(self._best.values(), key=_order)[: self.question.top]
        self._limit_s = ranked[0].prediction.step_time_s * self.question.worth
        if len(ranked) == self.question.top:
            self._limit_s = min(self._limit_s, ranked[-1].prediction.step_time_s)
        ranked = [one for one in ranked if one.prediction.step_time_s <= self._limit_s]
        self.answer.choices, self._best = ranked, {one.kind: one for one in ranked}

    def cores(self) -> Iterator[Core]:
        """Yield the cores that the question allows."""
        q = self.question
        largest = max(group.devices for group in self.cluster.groups)
        node = max(group.devices_per_node for group in self.cluster.groups)
        found = cores(
            self.model, q.training.sequence_length, q.training.sequences, largest, node, q.limits
        )
        for core in found:
            if q.allows(**core._asdict()):
                yield core

    # --- stages cross between groups

    def pipelines(self) -> None:
        """Search layouts whose stages stand inside one group each."""
        sizes = [group.devices for group in self.cluster.groups]
        sequences, most = self.question.training.sequences, self.most_stages()
        rooms_of: dict[int, np.ndarray] = {}
        pairs: list[tuple[float, int, Core, int]] = []
        for core in self.cores():
            done = self.work_of(core, self.recomputes()[0])
            rates = 1 / done.whole
            for readers in divisors(sequences // core.micro_sequences):
                ranks = readers * core.cp * core.tp
                if ranks not in rooms_of:
                    rooms_of[ranks] = np.array([min(size // ranks, most) for size in sizes])
                rate = float(rooms_of[ranks] @ rates)
                if rate:
                    n = sequences // (readers * core.micro_sequences)
                    pairs.append((n * done.share / rate, len(pairs), core, readers))
        self._take(pairs, rooms_of, sizes)

    def _take(
        self,
        pairs: list[tuple[float, int, Core, int]],
        rooms_of: dict[int, np.ndarray],
        sizes: list[int],
    ) -> None:
        """Expand (lower bound, number, core, readers), lowest bound first; a bound is made sharper when its turn comes."""
        sequences = self.question.training.sequences
        sharp: set[int] = set()
        opened: dict[int, tuple[Iterator[Node], Node]] = {}
        heapq.heapify(pairs)
        while pairs:
            bound_s, number, core, readers = heapq.heappop(pairs)
            if bound_s >= self.limit_s:
                self.answer.counts["slower"] += 1 + len(pairs)
                return
            if number not in sharp:
                sharp.add(number)
                done = self.work_of(core, self.recomputes()[0])
                n = sequences // (readers * core.micro_sequences)
                bound_s = self._pair_s(done, rooms_of[readers * core.cp * core.tp], n)
                heapq.heappush(pairs, (bound_s, number, core, readers))
                continue
            if number in opened:
                if self.answer.counts["tried"] == self.question.limits.nodes:
                    self.answer.counts["not tried"] = 1 + len(pairs)
                    self.answer.bound_s = bound_s
                    return
                self.answer.counts["tried"] += 1
                nodes, node = opened.pop(number)
                self._expand(node)
            else:
                nodes = self._nodes(core, readers, sizes)
            following = next(nodes, None)
            if following is not None:
                opened[number] = nodes, following
                heapq.heappush(pairs, (following.bound_s, number, core, readers))

    def _pair_s(self, done: Work, rooms: np.ndarray, n: float) -> float:
        """Return a lower bound of a step over all assignments of stages to groups that have rooms for some."""
        rates = np.repeat(1 / done.whole, rooms)
        rates = np.sort(rates)[::-1][: self.most_stages()]
        pp = np.arange(1, len(rates) + 1)
        return float(self._bound_s(done, pp, n, done.share / np.cumsum(rates)).min())

    def _bound_s(self, done: Work, pp: np.ndarray, n: float, slowest: np.ndarray) -> np.ndarray:
        virtual = self.question.limits.virtual_stages
        return done.any_way_s(pp, n, slowest, self.model.n_layers, virtual)

    def most_stages(self) -> int:
        """Return the most pipeline ranks that a model can have."""
        if self.model.tied_embeddings:
            return 1
        return self.model.n_layers + 2

    def _nodes(self, core: Core, readers: int, sizes: list[int]) -> Iterator[Node]:
        """Yield the assignments of stages to groups that may still win, those with the lowest bound first."""
        ranks = readers * core.cp * core.tp
        if ranks not in self._assigned:
            most = self.most_stages()
            self._assigned[ranks] = assignments(sizes, ranks, most, self.question.limits)
        found = self._assigned[ranks]
        n = self.question.training.sequences // (readers * core.micro_sequences)
        pp, counts = found.sum(axis=1), self.answer.counts
        asked = np.asarray(pp == self.question.fixed.get("pp", pp))
        taken = self._taken(n)
        counts["micro-batches"] += int((asked & ~np.asarray(taken.any(axis=0))[pp]).sum())
        best_s, bounds = np.full(len(found), math.inf), {}
        for recompute in self.recomputes():
            done = self.work_of(core, recompute)
            bound_s = self._bound_s(done, pp, n, np.where(asked, done.slowest(found), 1e30))
            open_ = np.flatnonzero(asked & (bound_s < self.limit_s))
            counts["slower"] += int(asked.sum()) - len(open_)
            if not len(open_):
                continue
            rooms = self._rooms_before(core, readers, n, pp[open_].max(), recompute)
            room = with_room(rooms, found[open_], sum(self.routed) or self.model.n_layers)
            counts["memory"] += int((~room).sum())
            open_ = open_[room]
            table = np.full((len(taken), len(found)), math.inf)
            table[:, open_] = self._ways_s(core, readers, recompute, found[open_], rooms)
            table[~taken[:, pp]] = math.inf
            bounds[recompute] = table
            best_s = np.minimum(best_s, table.min(axis=0))
        yield from self._lowest_first(core, readers, best_s, bounds)

    def _lowest_first(
        self, core: Core, readers: int, best_s: np.ndarray, bounds: dict[str, np.ndarray]
    ) -> Iterator[Node]:
        """Yield what may still win; `bounds`: by recomputation, [schedule, assignment], and `best_s` the least of them."""
        found, counts = self._assigned[readers * core.cp * core.tp], self.answer.counts
        left = np.flatnonzero(best_s < self.limit_s)
        counts["slower"] += int((best_s < math.inf).sum()) - len(left)
        left = left[np.argsort(best_s[left], kind="stable")]
        bounds = {name: table[:, left] for name, table in bounds.items()}
        for at, i in enumerate(left):
            stages = tuple(map(int, found[i]))
            if best_s[i] >= self.limit_of(self.kind_of(core, stages)):
                counts["slower"] += 1
                continue
            open_s = {}
            for name, table in bounds.items():
                pairs = zip(self._all_ways, table[:, at].tolist(), strict=True)
                open_s[name] = {way: bound_s for way, bound_s in pairs if bound_s < math.inf}
            yield Node(core, readers, stages, {name: one for name, one in open_s.items() if one})

    def _ways_s(
        self, core: Core, readers: int, recompute: str, found: np.ndarray, rooms: np.ndarray
    ) -> np.ndarray:
        """Return lower bounds of a step for every schedule and assignment, [schedule, assignment]; arguments as of `with_room`."""
        done, ranks = self.work_of(core, recompute), readers * core.cp * core.tp
        if ranks not in self._hops:
            self._hops[ranks] = crossing_hops(self.cluster, ranks)
        crossing = Crossing(
            (found > 0).sum(axis=1), crossing_s(self.predictor, core, self._hops[ranks])
        )
        n = self.question.training.sequences // (readers * core.micro_sequences)
        pp = found.sum(axis=1)
        # From the end of the pipeline, where ranks keep least; other schedules keep more (`cost_memory.micro_batches_held`).
        groups = np.arange(found.shape[1])
        most = rooms[groups, found]
        each = np.diff(rooms, axis=1)[:, pp - 1].T
        few = self._room_of(core, readers, np.minimum(n, (pp + 1) / 2), recompute).T
        most_of = {
            "interleaved_1f1b": np.minimum(most, found * few),
            "interleaved_zero_bubble": found * each,
        }
        slowest = {}
        for name, held in {"1f1b": most, **most_of}.items():
            held[pp == 1] = self.model.n_layers
            slowest[name] = done.slowest_whole(found, held)
        slowest["zbv_zero_bubble"] = slowest["interleaved_zero_bubble"]
        slowest["gpipe"] = slowest["1f1b"]
        each_s = [(way, slowest[way.schedule]) for way in self._all_ways]
        return np.stack([done.crossed_s(way, pp, n, found, s, crossing) for way, s in each_s])

    def _taken(self, n: int) -> np.ndarray:
        """Return which schedules run with n micro-batches, [schedule, pipeline ranks]."""
        if n not in self._taken_of:
            found = np.zeros((len(self._all_ways), self.most_stages() + 1), dtype=bool)
            for pp in range(1, self.most_stages() + 1):
                for way in self.ways(pp, (n,)):
                    found[self._all_ways.index(way), pp] = True
            self._taken_of[n] = found
        return self._taken_of[n]

    def kind_of(self, core: Core, stages: tuple[int, ...]) -> tuple[object, ...]:
        """Return the kind of layouts whose stages stand in groups."""
        blocks = tuple((g, count) for g, count in enumerate(stages) if count)
        names = tuple(self.cluster.groups[g].name for g, _ in blocks)
        layout = skeleton(core, (1, 1), sum(stages), "none", ONE)
        return (*kind_of(layout, Spread("pipeline", blocks), names), None, "none")

    def _rooms_before(
        self, core: Core, readers: int, n: int, pp: int, recompute: str
    ) -> np.ndarray:
        """Return the most layers on the last 0, 1, ... pp ranks of a pipeline, [group, ranks].

        Rank r of p keeps at least min(n, p - r) micro-batches. Where layers differ, those with experts are looked at.
        """
        rooms = self._room_of(core, readers, np.minimum(n, np.arange(1, pp + 1)), recompute)
        return np.concatenate((np.zeros((len(rooms), 1)), np.cumsum(rooms, axis=1)), axis=1)

    def _room_of(self, core: Core, readers: int, held: np.ndarray, recompute: str) -> np.ndarray:
        """Return the most layers on a rank of every [group, number of micro-batches held], weights divided most."""
        found = splits(self.model, core, readers)
        if not found:
            return np.zeros((len(self.cluster.groups), len(held)))
        rooms = layers_that_fit(self.lines, core, found[0], held, recompute)
        return np.minimum(rooms, self.model.n_layers)

    def _expand(self, node: Node) -> None:
        """Try every placement, schedule, recomputation and sharding of some degrees and machines."""
        core, pp = node.core, sum(node.stages)
        ranks = node.readers * core.cp * core.tp
        machines = self.machines([count * ranks for count in node.stages])
        found = [
            split
            for split in splits(self.model, core, node.readers)
            if self.question.allows(dp_replicate=split[0], dp_shard=split[1])
        ]
        if machines is None or not found:
            self.answer.counts["uneven"] += 1
            return
        n = self.question.training.sequences // (node.readers * core.micro_sequences)
        blocks = [(g, count) for g, count in enumerate(node.stages) if count]
        if pp == 1:
            self._single(node, found, Spread("pipeline", tuple(blocks)))
            return
        for order in permutations(blocks):
            Pipeline(self, node, Spread("pipeline", order), n).search(found, node.bounds_s)

    def ways(self, pp: int, micro_batches: Sequence[int]) -> list[Way]:
        """Return the schedules that the question allows."""
        q = self.question
        return [
            way
            for way in ways(pp, self.model.n_layers, micro_batches, q.limits)
            if q.allows(**way._asdict()) and not (q.compiled and "zero_bubble" in way.schedule)
        ]

    def recomputes(self) -> list[str]:
        """Return what may be recomputed, least time first."""
        return [name for name in RECOMPUTE if self.question.allows(recompute=name)]

    def _single(self, node: Node, found: list[tuple[int, int]], spread: Spread) -> None:
        """One stage: nothing to divide."""
        fits = False
        for split in found:
            for recompute in node.bounds_s:
                layout = skeleton(node.core, split, 1, recompute, ONE)
                if self.judge(layout, spread).fits:
                    fits = True
                    break
        self.answer.counts["memory"] += int(not fits)

    def judge(
        self, layout: Layout, spread: Spread, used: Sequence[int] | None = None
    ) -> Prediction:
        """Predict a layout, and keep it if it fits and is good."""
        if used is None:
            used = [0] * len(self.cluster.groups)
            for g, count in spread.blocks:
                used[g] = count * layout.stage_ranks
        machines = self.machines(used)
        assert machines is not None, "checked before"
        cluster, predictor = machines
        spread = renumbered(spread)
        where = places_of(cluster, layout, spread)
        self.answer.counts["predicted"] += 1
        prediction = predictor.predict(layout, where)
        choice = Choice(layout, cluster, spread, prediction)
        if prediction.fits and prediction.step_time_s < self.limit_of(choice.kind):
            placed = replace(layout, placement=placement(cluster, layout, spread))
            self.record(replace(choice, layout=placed))
        return prediction


def _order(choice: Choice) -> tuple[float, int]:
    return choice.prediction.step_time_s, choice.layout.world_size
