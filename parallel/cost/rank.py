"""What one pipeline rank costs under a layout: seconds of its passes and transfers, bytes that it
holds. Pure; no torch.

What layouts share (places, stages, blocks, ranks) is computed once and remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from motet.models import counts
from motet.models.config import ModelConfig
from motet.parallel.cluster.calibration import calibrated, constants_of
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost import memory
from motet.parallel.cost.block import PHASES, BlockCost, PricedBlock, Times, add, scaled, selective
from motet.parallel.cost.block_shape import BlockSplit
from motet.parallel.cost.links import CommGroup
from motet.parallel.cost.memory import Activations
from motet.parallel.cost.pipeline import exposed
from motet.parallel.cost.shapes import StageShape, shapes_of
from motet.parallel.cost.terms import NATIVE, Training, Traits
from motet.parallel.cost.topology import StageGroups, Topology, topology_of
from motet.parallel.layout.layout import Layout

STAGE_HOST = 1.3
"""Host time that a micro-batch takes in a stage of a pipeline besides its blocks, over that of a
block's forward pass.
"""


class RankTimes(NamedTuple):
    """One pipeline rank's seconds for one micro-batch, and for the step."""

    forward: Times
    backward: Times  # what is made again included
    head_s: float  # part of both: embedding, last norm, head, loss
    gather_s: tuple[
        float, float
    ]  # weights in a forward pass; those and gradients in a backward pass
    send_s: float  # per micro-batch
    sync_s: float  # once a step
    optimizer_s: float
    weight_s: float  # the part of backward for weights' gradients
    forward_s: float  # sums of the first two
    backward_s: float
    ahead_s: float  # the same with what waits for transfers
    behind_s: float


class Passes(NamedTuple):
    """The part of `RankTimes` that blocks and edges make."""

    forward: Times
    backward: Times
    head_s: float
    weight_s: float
    forward_s: float
    backward_s: float


class Step(NamedTuple):
    """The part of `RankTimes` that data parallelism and the update make."""

    gather_s: tuple[float, float]
    sync_s: float
    optimizer_s: float


class CostKey(NamedTuple):
    """What of a layout the tables of a `RankKey` ask for."""

    blocks: tuple[object, ...]  # micro-batch, recomputation, what tensor parallelism divides
    data: tuple[object, ...]  # whether there is a pipeline, divided tables, shares of replicas
    several: bool  # micro-batches add to a gradient
    piped: bool


class RankKey(NamedTuple):
    """What one pipeline rank holds, on one kind of device, in one place: tables of its costs by
    `CostKey`.

    Spots share the tables that do not ask what they differ in.
    """

    stage: StageGroups
    shape: StageShape
    group: int
    passes: dict[object, Passes]
    sends_s: dict[object, float]
    steps: dict[object, Step]
    states: dict[object, tuple[dict[str, float], float]]
    activations: dict[object, Activations]


class RankCosts:
    """Costs pipeline ranks of one model, cluster and training."""

    def __init__(
        self,
        model: ModelConfig,
        cluster: Cluster,
        training: Training,
        traits: Traits = NATIVE,
        constants: Mapping[str, Constants] | None = None,
    ) -> None:
        self.model, self.cluster, self.training, self.traits = model, cluster, training, traits
        self.known = calibrated(cluster.groups, constants)
        self.constants = constants_of(cluster.groups, constants)
        self.costs = [
            BlockCost(model, group.device, training.dtype, traits, own)
            for group, own in zip(cluster.groups, self.constants, strict=True)
        ]
        dense = [i for i in range(model.n_layers) if not model.has_experts(i)]
        routed = [i for i in range(model.n_layers) if model.has_experts(i)]
        self.dense_layers, self.routed_layers = len(dense), len(routed)
        self.dense_weights = counts.parameters_per_layer(model, dense[0]) if dense else 0
        self.expert_weights = counts.expert_parameters_per_layer(model) if routed else 0
        self.routed_weights = (
            counts.parameters_per_layer(model, routed[0]) - self.expert_weights if routed else 0
        )
        self.flops = counts.training_flops_per_token(model, training.sequence_length)
        self.tokens = training.sequences * training.sequence_length
        self.peaks = [group.device.peak(training.dtype) * 1e12 for group in cluster.groups]
        self._topologies: dict[tuple[object, ...], Topology] = {}
        self._blocks: dict[tuple[object, ...], PricedBlock] = {}
        self._edges: dict[tuple[object, ...], tuple[tuple[Times, Times], tuple[Times, Times]]] = {}
        self._shapes: dict[tuple[object, ...], tuple[StageShape, ...]] = {}
        self._same_shapes: dict[tuple[StageShape, ...], tuple[StageShape, ...]] = {}
        self._rank_keys: dict[tuple[object, ...], RankKey] = {}
        self._tables: dict[tuple[object, ...], dict[object, Any]] = {}
        self._numbered: dict[int, tuple[StageGroups, tuple[int, int, int]]] = {}
        self._numbers: dict[tuple[CommGroup, ...], int] = {}

    # --- what layouts share

    def topology(self, layout: Layout) -> Topology:
        """Return where the groups of a layout stand."""
        key = (
            layout.dp_replicate,
            layout.dp_shard,
            layout.tp,
            layout.pp,
            layout.cp,
            layout.ep,
            layout.etp,
            layout.placement,
            layout.shares,
            layout.virtual_stages == 1,  # then the last stage sends to no other
        )
        found = self._topologies.get(key)
        if found is None:
            found = self._topologies[key] = topology_of(self.cluster, layout)
        return found

    def shapes(self, layout: Layout) -> tuple[StageShape, ...]:
        """Return what every pipeline rank holds."""
        key = (layout.pp, layout.virtual_stages, layout.stage_layers, layout.schedule)
        found = self._shapes.get(key)
        if found is None:
            whole = shapes_of(layout, self.model)
            # Equal ones are the same object, too.
            found = self._shapes[key] = self._same_shapes.setdefault(whole, whole)
        return found

    def weights(self, layout: Layout, shape: StageShape) -> memory.Weights:
        """Return the weights of one device of a pipeline rank before data parallelism."""
        # Tied tables count once on a rank that has both.
        table = float(self.model.vocabulary_size * self.model.d_model)
        if self._vocabulary_split(layout) > 1:
            table /= layout.tp
        tied = self.model.tied_embeddings and shape.first and shape.last
        tables = 1 if tied else int(shape.first) + int(shape.last)
        tp = layout.tp
        dense = shape.dense_layers * self.dense_weights + shape.expert_layers * self.routed_weights
        routed = self.expert_weights / (layout.ep * layout.etp)
        unit = max(self.dense_weights / tp, self.routed_weights / tp + routed)
        return memory.Weights(
            dense / tp + tables * table, shape.expert_layers * routed, max(unit, tables * table / 2)
        )

    def _vocabulary_split(self, layout: Layout) -> int:
        return layout.tp if layout.vocabulary_parallel else 1

    def _split(self, layout: Layout, stage: StageGroups) -> BlockSplit:
        tokens = layout.micro_sequences * self.training.sequence_length // layout.cp
        return BlockSplit(
            tokens,
            self.training.sequence_length,
            stage.tp,
            stage.cp,
            stage.ep,
            stage.etp,
            layout.sequence_parallel and layout.tp > 1,
            layout.stage_ranks == 1,
        )

    def numbers(self, stage: StageGroups) -> tuple[int, int, int]:
        """Return numbers that stand for a stage's groups within a replica, for those of its data,
        and for its hop, in keys.
        """
        numbered = self._numbered.get(id(stage))
        if numbered is None:
            experts = (stage.expert_data, stage.expert_replicas)
            keys: tuple[tuple[CommGroup, ...], ...] = (
                (stage.tp, stage.cp, stage.ep, stage.etp),
                (stage.shard, stage.data, stage.replicate, *experts),
                (stage.hop,),
            )
            known = self._numbers
            one, two, three = (known.setdefault(key, len(known)) for key in keys)
            numbered = self._numbered[id(stage)] = stage, (one, two, three)  # kept alive for its id
        return numbered[1]

    def block(
        self, layout: Layout, stage: StageGroups, group: int, has_experts: bool
    ) -> PricedBlock:
        """Return the costs of one block on a device of one of the cluster's groups."""
        inner = self.numbers(stage)[0]
        parallel = layout.sequence_parallel and layout.tp > 1
        key = (group, has_experts, layout.micro_sequences, parallel, layout.stage_ranks == 1, inner)
        found = self._blocks.get(key)
        if found is None:
            found = self.costs[group].block(self._split(layout, stage), has_experts)
            self._blocks[key] = found
        return found

    def edges(
        self, layout: Layout, stage: StageGroups, group: int
    ) -> tuple[tuple[Times, Times], tuple[Times, Times]]:
        """Return (forward, backward) of the embedding, and of the head."""
        vocabulary = self._vocabulary_split(layout)
        key = (group, layout.micro_sequences, vocabulary, self.numbers(stage)[0])
        found = self._edges.get(key)
        if found is None:
            cost, split = self.costs[group], self._split(layout, stage)
            found = cost.embedding(split), cost.head(split, vocabulary)
            self._edges[key] = found
        return found

    # --- time of one pipeline rank

    def rank_key(self, stage: StageGroups, shape: StageShape, group: int) -> RankKey:
        """Return where costs of a pipeline rank on devices of one of the cluster's groups are
        remembered.
        """
        inner, outer, hop = self.numbers(stage)
        key = (group, shape, inner, outer, hop)
        found = self._rank_keys.get(key)
        if found is None:
            tables = [
                self._tables.setdefault((name, *on), {})
                for name, on in (
                    ("passes", (group, shape, inner)),
                    ("sends", (group, inner, hop)),
                    ("steps", (group, shape, inner, outer)),
                    ("states", (shape, inner, outer)),
                    ("activations", (group, shape, inner)),
                )
            ]
            found = self._rank_keys[key] = RankKey(stage, shape, group, *tables)
        return found

    def cost_key(self, layout: Layout, several: bool = True) -> CostKey:
        """Return what the tables of a rank_key ask for; `several` micro-batches add to the same
        gradients, or one does.
        """
        parallel, piped = layout.sequence_parallel and layout.tp > 1, layout.pp > 1
        tables = layout.vocabulary_parallel
        # One rank alone has no hooks of sharding, whose host time counts on small models.
        alone = layout.tp * layout.cp * layout.dp_shard * layout.dp_replicate == 1
        blocks = (layout.micro_sequences, layout.recompute, parallel, tables, alone)
        return CostKey(blocks, (piped, tables, layout.shares), several or piped, piped)

    def rank(self, layout: Layout, stage: StageGroups, shape: StageShape, group: int) -> RankTimes:
        """Return the seconds of a pipeline rank on devices of one of the cluster's groups."""
        return self.rank_at(layout, self.cost_key(layout), self.rank_key(stage, shape, group))

    def rank_at(self, layout: Layout, cost_key: CostKey, rank_key: RankKey) -> RankTimes:
        """Return the same where the rank_key is known."""
        blocks = cost_key.blocks
        passes = rank_key.passes.get(blocks)
        if passes is None:
            passes = self._blocks_of(layout, rank_key.stage, rank_key.shape, rank_key.group)
            rank_key.passes[blocks] = passes
        step = rank_key.steps.get(cost_key.data)
        if step is None:
            step = self._data(layout, rank_key.stage, rank_key.shape, rank_key.group)
            rank_key.steps[cost_key.data] = step
        send_s = rank_key.sends_s.get(blocks) if cost_key.piped else 0.0
        if send_s is None:
            send_s = rank_key.sends_s[blocks] = self._send_s(layout, rank_key.stage, rank_key.group)
        send_s *= layout.virtual_stages
        forward, backward, head_s, weight_s, forward_s, backward_s = passes
        (gather_s, scatter_s), sync_s, optimizer_s = step
        overlap = self.traits.data_overlap
        return RankTimes(
            forward,
            backward,
            head_s,
            (gather_s, scatter_s),
            send_s,
            sync_s,
            optimizer_s,
            weight_s,
            forward_s,
            backward_s,
            forward_s + (exposed(gather_s, forward_s, overlap) if gather_s else 0.0),
            backward_s + (exposed(scatter_s, backward_s, overlap) if scatter_s else 0.0) + send_s,
        )

    def _blocks_of(
        self, layout: Layout, stage: StageGroups, shape: StageShape, group: int
    ) -> Passes:
        """Return the passes of all blocks of a rank, recomputation included, and of embedding and
        head.
        """
        forward = backward = (0.0,) * len(PHASES)
        weight_s = head_s = 0.0
        for number, has_experts in ((shape.dense_layers, False), (shape.expert_layers, True)):
            if not number:
                continue
            block = self.block(layout, stage, group, has_experts)
            back = block.backward
            # What is made again runs before the backward pass of the block, and takes what it took
            # the first time.
            if layout.recompute == "full":
                back = add(back, block.forward)
            elif layout.recompute == "selective":
                back = add(back, selective(block, self.traits))
            forward = add(forward, scaled(block.forward, number))
            backward = add(backward, scaled(back, number))
            # A product's weight gradient is as many operations as its forward pass.
            weight_s += number * block.forward[0]
        if shape.first or shape.last:
            embedding, head = self.edges(layout, stage, group)
            for here, (ahead, back) in ((shape.first, embedding), (shape.last, head)):
                if here:
                    forward, backward = add(forward, ahead), add(backward, back)
                    head_s += sum(ahead) + sum(back)
        return Passes(forward, backward, head_s, weight_s, sum(forward), sum(backward))

    def _send_s(self, layout: Layout, stage: StageGroups, group: int) -> float:
        tokens = layout.micro_sequences * self.training.sequence_length / layout.cp
        size = tokens * self.model.d_model * self.costs[group].value
        if layout.sequence_parallel or self.traits.sends_parts:
            size /= layout.tp
        send_s = stage.hop.send_s(size, self.constants[group]) * (1.0 - self.traits.send_overlap)
        # Two passes of a stage: graphs are cut, transfers posted.
        host_s = 0.0 if self.traits.ahead else STAGE_HOST * self.constants[group].host_us * 1e-6
        return 2 * send_s + host_s

    def _data(self, layout: Layout, stage: StageGroups, shape: StageShape, group: int) -> Step:
        """Return seconds of data-parallel transfers, in each pass and once a step, and of the
        update.
        """
        own, traits = self.constants[group], self.traits
        weights = self.weights(layout, shape)
        shared = memory.division(layout, self.training, weights)
        # Gathers go block by block: as many latencies as blocks.
        layers = max(1, shape.dense_layers + shape.expert_layers)
        parts = (
            (weights.dense, stage.shard, stage.data, stage.replicate),
            (weights.experts, stage.expert_data, stage.expert_replicas, stage.replicate),
        )
        gather = scatter = once = 0.0
        for values, shard, everyone, replicas in parts:
            if not values:
                continue
            # Weights that are divided are gathered for every pass, gradients scattered; replicas
            # add theirs once a step.
            if shared.gathers_again or shared.stage == 3:
                gather += layers * shard.gather_s(values / layers * traits.compute_bytes, own)
                scatter += layers * shard.gather_s(values / layers * traits.reduce_bytes, own)
                once += replicas.reduce_s(values / shard.ranks * traits.reduce_bytes, own)
            # Nothing is divided: one all-reduce of all gradients over everybody.
            elif shared.stage == 0:
                once += everyone.reduce_s(values * traits.reduce_bytes, own)
            else:
                once += shard.gather_s(values * traits.compute_bytes, own)
                once += shard.gather_s(values * traits.reduce_bytes, own)
                once += replicas.reduce_s(values / shard.ranks * traits.reduce_bytes, own)
        update_s = self._optimizer_s(weights, shared, group)
        if shared.gathers_again:
            return Step((gather, gather + scatter), once, update_s)
        return Step((0.0, 0.0), once + gather + scatter, update_s)

    def _optimizer_s(self, weights: memory.Weights, shared: memory.Division, group: int) -> float:
        mine = weights.all
        if shared.stage >= 1:
            mine = weights.dense / shared.dense + weights.experts / shared.experts
        # Gradients go to the host and weights come back, over PCIe at best 26 GB/s (16 lanes of the
        # fourth generation); the update runs at the host's memory, about 20 GB/s of its optimizer.
        if self.training.offload:
            rate = self.cluster.groups[group].intra_node.gb_s * 1e9
            return mine * (4.0 / min(rate, 26e9) * 2 + self.traits.optimizer_traffic / 20e9)
        return mine * self.traits.optimizer_traffic / self.costs[group].rates.bandwidth
