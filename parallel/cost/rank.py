"""What one pipeline rank costs under a layout: seconds of its passes and transfers, bytes that it
holds. Pure; no torch.

What layouts share (places, stages, blocks, ranks) is computed once and remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from motet.models import counts
from motet.models.config import ModelConfig
from motet.parallel.cluster.calibration import calibrated, constants_of
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost import memory
from motet.parallel.cost.block import PHASES, Block, BlockCost, Split, Times, add, scaled, selective
from motet.parallel.cost.links import Domain
from motet.parallel.cost.parts import (
    Activations,
    Held,
    Kept,
    Passes,
    Rank,
    Spot,
    Step,
    Words,
    exposed,
)
from motet.parallel.cost.terms import NATIVE, Constants, Training, Traits
from motet.parallel.cost.topology import Places, Stage, places
from motet.parallel.layout.layout import Layout

GIB = memory.GIB
STAGE_HOST = 1.3
"""Host time that a micro-batch takes in a stage of a pipeline besides its blocks, over that of a
block's forward pass.
"""


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
        self._places: dict[tuple[object, ...], Places] = {}
        self._blocks: dict[tuple[object, ...], Block] = {}
        self._edges: dict[tuple[object, ...], tuple[tuple[Times, Times], tuple[Times, Times]]] = {}
        self._kept: dict[tuple[object, ...], tuple[Kept, ...]] = {}
        self._same_kept: dict[tuple[Kept, ...], tuple[Kept, ...]] = {}
        self._spots: dict[tuple[object, ...], Spot] = {}
        self._tables: dict[tuple[object, ...], dict[object, Any]] = {}
        self._numbered: dict[int, tuple[Stage, tuple[int, int, int]]] = {}
        self._numbers: dict[tuple[Domain, ...], int] = {}

    # --- what layouts share

    def places(self, layout: Layout) -> Places:
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
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = places(self.cluster, layout)
        return found

    def kept(self, layout: Layout) -> tuple[Kept, ...]:
        """Return what every pipeline rank holds."""
        key = (layout.pp, layout.virtual_stages, layout.stage_layers, layout.schedule)
        found = self._kept.get(key)
        if found is None:
            stages = layout.layers_of_stages(self.model)
            ranks: list[Kept] = []
            for rank in range(layout.pp):
                mine = layout.stages_of(rank) if layout.pp > 1 else list(range(layout.stages))
                layers = [layer for stage in mine for layer in stages[stage]]
                routed = sum(self.model.has_experts(layer) for layer in layers)
                last = layout.stages - 1 in mine
                own = Kept(len(layers) - routed, routed, 0 in mine, last)
                # Equal ones are the same object, which is what `predict` compares.
                ranks.append(next((known for known in ranks if known == own), own))
            whole = tuple(ranks)  # equal ones are the same object, too
            found = self._kept[key] = self._same_kept.setdefault(whole, whole)
        return found

    def weights(self, layout: Layout, kept: Kept) -> memory.Weights:
        """Return the weights of one device of a pipeline rank before data parallelism."""
        table = float(self.model.vocabulary_size * self.model.d_model)
        if self._vocabulary_split(layout) > 1:
            table /= layout.tp
        tied = self.model.tied_embeddings and kept.first and kept.last
        tables = 1 if tied else int(kept.first) + int(kept.last)
        tp = layout.tp
        dense = kept.dense_layers * self.dense_weights + kept.expert_layers * self.routed_weights
        routed = self.expert_weights / (layout.ep * layout.etp)
        unit = max(self.dense_weights / tp, self.routed_weights / tp + routed)
        return memory.Weights(
            dense / tp + tables * table, kept.expert_layers * routed, max(unit, tables * table / 2)
        )

    def _vocabulary_split(self, layout: Layout) -> int:
        return layout.tp if layout.vocabulary_parallel else 1

    def _split(self, layout: Layout, stage: Stage) -> Split:
        tokens = layout.micro_sequences * self.training.sequence_length // layout.cp
        return Split(
            tokens,
            self.training.sequence_length,
            stage.tp,
            stage.cp,
            stage.ep,
            stage.etp,
            layout.sequence_parallel and layout.tp > 1,
            layout.stage_ranks == 1,
        )

    def numbers(self, stage: Stage) -> tuple[int, int, int]:
        """Return numbers that stand for a stage's groups within a replica, for those of its data,
        and for its hop, in keys.
        """
        found = self._numbered.get(id(stage))
        if found is None:
            experts = (stage.expert_data, stage.expert_replicas)
            keys: tuple[tuple[Domain, ...], ...] = (
                (stage.tp, stage.cp, stage.ep, stage.etp),
                (stage.shard, stage.data, stage.replicate, *experts),
                (stage.hop,),
            )
            known = self._numbers
            one, two, three = (known.setdefault(key, len(known)) for key in keys)
            found = self._numbered[id(stage)] = stage, (one, two, three)  # kept alive for its id
        return found[1]

    def block(self, layout: Layout, stage: Stage, group: int, has_experts: bool) -> Block:
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
        self, layout: Layout, stage: Stage, group: int
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

    def spot(self, stage: Stage, kept: Kept, group: int) -> Spot:
        """Return where costs of a pipeline rank on devices of one of the cluster's groups are
        remembered.
        """
        inner, outer, hop = self.numbers(stage)
        key = (group, kept, inner, outer, hop)
        found = self._spots.get(key)
        if found is None:
            tables = [
                self._tables.setdefault((name, *on), {})
                for name, on in (
                    ("passes", (group, kept, inner)),
                    ("sends", (group, inner, hop)),
                    ("steps", (group, kept, inner, outer)),
                    ("states", (kept, inner, outer)),
                    ("activations", (group, kept, inner)),
                )
            ]
            found = self._spots[key] = Spot(stage, kept, group, *tables)
        return found

    def words(self, layout: Layout, several: bool = True) -> Words:
        """Return what the tables of a spot ask for; `several` micro-batches add to the same
        gradients, or one does.
        """
        parallel, piped = layout.sequence_parallel and layout.tp > 1, layout.pp > 1
        tables = layout.vocabulary_parallel
        alone = layout.tp * layout.cp * layout.dp_shard * layout.dp_replicate == 1
        blocks = (layout.micro_sequences, layout.recompute, parallel, tables, alone)
        return Words(blocks, (piped, tables, layout.shares), several or piped, piped)

    def rank(self, layout: Layout, stage: Stage, kept: Kept, group: int) -> Rank:
        """Return the seconds of a pipeline rank on devices of one of the cluster's groups."""
        return self.rank_at(layout, self.words(layout), self.spot(stage, kept, group))

    def rank_at(self, layout: Layout, words: Words, spot: Spot) -> Rank:
        """Return the same where the spot is known."""
        blocks = words.blocks
        passes = spot.passes.get(blocks)
        if passes is None:
            passes = self._blocks_of(layout, spot.stage, spot.kept, spot.group)
            spot.passes[blocks] = passes
        step = spot.steps.get(words.data)
        if step is None:
            step = self._data(layout, spot.stage, spot.kept, spot.group)
            spot.steps[words.data] = step
        send_s = spot.sends_s.get(blocks) if words.piped else 0.0
        if send_s is None:
            send_s = spot.sends_s[blocks] = self._send_s(layout, spot.stage, spot.group)
        send_s *= layout.virtual_stages
        forward, backward, head_s, weight_s, forward_s, backward_s = passes
        (gather_s, scatter_s), sync_s, optimizer_s = step
        overlap = self.traits.data_overlap
        return Rank(
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

    def _blocks_of(self, layout: Layout, stage: Stage, kept: Kept, group: int) -> Passes:
        """Return the passes of all blocks of a rank, recomputation included, and of embedding and
        head.
        """
        forward = backward = (0.0,) * len(PHASES)
        weight_s = head_s = 0.0
        for number, has_experts in ((kept.dense_layers, False), (kept.expert_layers, True)):
            if not number:
                continue
            block = self.block(layout, stage, group, has_experts)
            back = block.backward
            if layout.recompute == "full":
                back = add(back, block.forward)
            elif layout.recompute == "selective":
                back = add(back, selective(block, self.traits))
            forward = add(forward, scaled(block.forward, number))
            backward = add(backward, scaled(back, number))
            weight_s += number * block.forward[0]
        if kept.first or kept.last:
            embedding, head = self.edges(layout, stage, group)
            for here, (ahead, back) in ((kept.first, embedding), (kept.last, head)):
                if here:
                    forward, backward = add(forward, ahead), add(backward, back)
                    head_s += sum(ahead) + sum(back)
        return Passes(forward, backward, head_s, weight_s, sum(forward), sum(backward))

    def _send_s(self, layout: Layout, stage: Stage, group: int) -> float:
        tokens = layout.micro_sequences * self.training.sequence_length / layout.cp
        size = tokens * self.model.d_model * self.costs[group].value
        if layout.sequence_parallel or self.traits.sends_parts:
            size /= layout.tp
        send_s = stage.hop.send_s(size, self.constants[group]) * (1.0 - self.traits.send_overlap)
        # Two passes of a stage: graphs are cut, transfers posted.
        host_s = 0.0 if self.traits.ahead else STAGE_HOST * self.constants[group].host_us * 1e-6
        return 2 * send_s + host_s

    def _data(self, layout: Layout, stage: Stage, kept: Kept, group: int) -> Step:
        """Return seconds of data-parallel transfers, in each pass and once a step, and of the
        update.
        """
        own, traits = self.constants[group], self.traits
        weights = self.weights(layout, kept)
        shared = memory.division(layout, self.training, weights)
        layers = max(1, kept.dense_layers + kept.expert_layers)
        parts = (
            (weights.dense, stage.shard, stage.data, stage.replicate),
            (weights.experts, stage.expert_data, stage.expert_replicas, stage.replicate),
        )
        gather = scatter = once = 0.0
        for values, shard, everyone, replicas in parts:
            if not values:
                continue
            if shared.gathers_again or shared.stage == 3:
                gather += layers * shard.gather_s(values / layers * traits.compute_bytes, own)
                scatter += layers * shard.gather_s(values / layers * traits.reduce_bytes, own)
                once += replicas.reduce_s(values / shard.ranks * traits.reduce_bytes, own)
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
        if self.training.offload:
            rate = self.cluster.groups[group].intra_node.gb_s * 1e9
            return mine * (4.0 / min(rate, 26e9) * 2 + self.traits.optimizer_traffic / 20e9)
        return mine * self.traits.optimizer_traffic / self.costs[group].rates.bandwidth

    # --- memory of one pipeline rank

    def forget_memory(self) -> None:
        """Forget bytes, after constants that only they depend on have changed."""
        for (name, *_), table in self._tables.items():
            if name == "activations":
                table.clear()

    def held_at(self, layout: Layout, words: Words, spot: Spot) -> Held:
        """Return what a pipeline rank's devices hold."""
        saved = spot.activations.get((words.blocks, words.piped))
        if saved is None:
            saved = self._activations_of(layout, spot.stage, spot.kept, spot.group)
            spot.activations[words.blocks, words.piped] = saved
        asked = (words.data, words.several)
        state = spot.states.get(asked)
        if state is None:
            state = spot.states[asked] = self._state(layout, spot.kept, words.several)
        rest, rest_gib, per_micro_batch_gib, once_gib = saved
        capacity_gib = self.cluster.groups[spot.group].device.memory_gib
        fixed_gib = state[1] + rest_gib
        return Held(state[0], rest, fixed_gib, per_micro_batch_gib, once_gib, capacity_gib)

    def _state(self, layout: Layout, kept: Kept, several: bool) -> tuple[dict[str, float], float]:
        """Return GiB of weights, gradients, optimizer state and buffers, and their sum."""
        weights = self.weights(layout, kept)
        shared = memory.division(layout, self.training, weights)
        state = memory.state_parts(
            weights, shared, self.training, self.traits, several, layout.dp_replicate
        )
        found = {name: value / GIB for name, value in state.items()}
        return found, sum(found.values())

    def _activations_of(self, layout: Layout, stage: Stage, kept: Kept, group: int) -> Activations:
        own, traits = self.constants[group], self.traits
        saved_bytes = beside = around = 0.0
        for count, has_experts in ((kept.dense_layers, False), (kept.expert_layers, True)):
            if count:
                block = self.block(layout, stage, group, has_experts)
                saved, once = memory.block_bytes(block, layout.recompute, traits)
                saved_bytes += count * saved
                beside, around = max(beside, once), max(around, block.ring_bytes)
        tokens = layout.micro_sequences * self.training.sequence_length // layout.cp
        stream = tokens * self.model.d_model * self.costs[group].value
        logits = 0.0
        if kept.last:
            beside += 2 * stream
            split = self._vocabulary_split(layout)
            logits = memory.logits_bytes(self.model.vocabulary_size, tokens, split, traits)
            logits *= own.logits
        collectives = max(0.0, around - logits)  # no attention runs while logits exist
        collectives += 2 * stream if layout.tp > 1 or layout.pp > 1 else 0.0
        collectives += memory.communicators(layout) * own.communicator_gib * GIB
        rest = {"logits": logits / GIB, "collectives": collectives / GIB}
        rest["reserved"] = own.reserved_gib
        factor = own.activation / GIB
        return Activations(rest, sum(rest.values()), saved_bytes * factor, beside * factor)

    def rank_memory(
        self, layout: Layout, stage: Stage, kept: Kept, rank: int, number: float, group: int
    ) -> tuple[float, float, dict[str, float]]:
        """Return (bytes, capacity, GiB by what holds them) of a device of a pipeline rank that runs
        `number` micro-batches.
        """
        words = self.words(layout, number > 1)
        found = self.held_at(layout, words, self.spot(stage, kept, group))
        micro_batches = memory.micro_batches_held(layout, rank, math.ceil(number))
        activations = found.per_micro_batch_gib * micro_batches + found.once_gib
        total = (found.fixed_gib + activations) * GIB
        return (
            total,
            found.capacity_gib * GIB,
            {**found.state, **found.rest, "activations": activations},
        )
