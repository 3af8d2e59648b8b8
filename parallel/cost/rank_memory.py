"""What one pipeline rank holds under a layout, in bytes, beside what it costs. Pure; no torch."""

from __future__ import annotations

import math

from motet.parallel.cost import memory
from motet.parallel.cost.memory import GIB, Activations, RankMemory
from motet.parallel.cost.rank import CostKey, RankCosts, RankKey
from motet.parallel.cost.shapes import StageShape
from motet.parallel.cost.topology import StageGroups
from motet.parallel.layout.layout import Layout


class RankMemoryCosts(RankCosts):
    """Costs pipeline ranks, and tells what they hold."""

    def forget_memory(self) -> None:
        """Forget bytes, after constants that only they depend on have changed."""
        for (name, *_), table in self._tables.items():
            if name == "activations":
                table.clear()

    def held_at(self, layout: Layout, cost_key: CostKey, rank_key: RankKey) -> RankMemory:
        """Return what a pipeline rank's devices hold."""
        saved = rank_key.activations.get((cost_key.blocks, cost_key.piped))
        if saved is None:
            saved = self._activations_of(layout, rank_key.stage, rank_key.shape, rank_key.group)
            rank_key.activations[cost_key.blocks, cost_key.piped] = saved
        asked = (cost_key.data, cost_key.several)
        state = rank_key.states.get(asked)
        if state is None:
            state = rank_key.states[asked] = self._state(layout, rank_key.shape, cost_key.several)
        rest, rest_gib, per_micro_batch_gib, once_gib = saved
        capacity_gib = self.cluster.groups[rank_key.group].device.memory_gib
        fixed_gib = state[1] + rest_gib
        return RankMemory(state[0], rest, fixed_gib, per_micro_batch_gib, once_gib, capacity_gib)

    def _state(
        self, layout: Layout, shape: StageShape, several: bool
    ) -> tuple[dict[str, float], float]:
        """Return GiB of weights, gradients, optimizer state and buffers, and their sum."""
        weights = self.weights(layout, shape)
        shared = memory.division(layout, self.training, weights)
        state = memory.state_parts(
            weights, shared, self.training, self.traits, several, layout.dp_replicate
        )
        found = {name: value / GIB for name, value in state.items()}
        return found, sum(found.values())

    def _activations_of(
        self, layout: Layout, stage: StageGroups, shape: StageShape, group: int
    ) -> Activations:
        own, traits = self.constants[group], self.traits
        saved_bytes = beside = around = 0.0
        for count, has_experts in ((shape.dense_layers, False), (shape.expert_layers, True)):
            if count:
                block = self.block(layout, stage, group, has_experts)
                # What a block keeps until its backward pass adds up over blocks; what it has
                # besides while it runs exists once.
                saved, once = memory.block_bytes(block, layout.recompute, traits)
                saved_bytes += count * saved
                beside, around = max(beside, once), max(around, block.ring_bytes)
        tokens = layout.micro_sequences * self.training.sequence_length // layout.cp
        stream = tokens * self.model.d_model * self.costs[group].value
        logits = 0.0
        if shape.last:
            # The head's input and its gradient live beside the logits.
            beside += 2 * stream
            split = self._vocabulary_split(layout)
            logits = memory.logits_bytes(self.model.vocabulary_size, tokens, split, traits)
            logits *= own.logits
        # Buffers of attention and logits never exist together: the larger counts.
        collectives = max(0.0, around - logits)  # no attention runs while logits exist
        collectives += 2 * stream if layout.tp > 1 or layout.pp > 1 else 0.0
        collectives += memory.communicators(layout) * own.communicator_gib * GIB
        rest = {"logits": logits / GIB, "collectives": collectives / GIB}
        rest["reserved"] = own.reserved_gib
        # An allocator rounds and leaves gaps: found by runs that just fit and that just did not.
        factor = own.activation / GIB
        return Activations(rest, sum(rest.values()), saved_bytes * factor, beside * factor)

    def rank_memory(
        self,
        layout: Layout,
        stage: StageGroups,
        shape: StageShape,
        rank: int,
        number: float,
        group: int,
    ) -> tuple[float, float, dict[str, float]]:
        """Return (bytes, capacity, GiB by what holds them) of a device of a pipeline rank that runs
        `number` micro-batches.
        """
        cost_key = self.cost_key(layout, number > 1)
        found = self.held_at(layout, cost_key, self.rank_key(stage, shape, group))
        micro_batches = memory.micro_batches_held(layout, rank, math.ceil(number))
        activations = found.per_micro_batch_gib * micro_batches + found.once_gib
        total = (found.fixed_gib + activations) * GIB
        return (
            total,
            found.capacity_gib * GIB,
            {**found.state, **found.rest, "activations": activations},
        )
