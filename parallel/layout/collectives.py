"""What one rank says and moves in an optimizer step of the native engine, collective by collective.
Pure; needs no torch.

A test counts the collectives of real steps against it, another holds the bytes that the cost model
prices to it.

B sequences of a micro-batch, T tokens of one on this rank, D model width, K experts per token, M
rows of a micro-batch (B T K).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from motet.models.architecture import Product, Split, block_products, block_weights, mixing
from motet.models.config import ModelConfig
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import gathers_again, weights

FP32_BYTES, INT64_BYTES, FLOAT64_BYTES = 4, 8, 8


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind and size.

    Attributes:
        group: "fsdp", "dp_replicate", "tp", "cp", "pp", "edp", "ep", "etp" or "control" (all ranks,
            on the CPU).
        kind: "all_gather", "reduce_scatter", "all_reduce", "all_to_all" or "send".
        count: how many in one optimizer step.
        bytes: of each. all_gather: the whole output; reduce_scatter: the whole input; all_reduce:
            the tensor; all_to_all: all that a rank brings, its own part included; send: what is
            sent.
        routed: rows decide: `bytes` is what balanced routing would give, and the true number is
            another in every step.
    """

    group: str
    kind: str
    count: int
    bytes: int
    routed: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return self.count * self.bytes


def group_ranks(layout: Layout) -> dict[str, int]:
    """Return the ranks in every group of `Transfer`."""
    names = ("fsdp", "dp_replicate", "tp", "cp", "pp", "edp", "ep", "etp")
    return {**{name: getattr(layout, name) for name in names}, "control": layout.world_size}


class ValueBytes(NamedTuple):
    """Bytes of one value on its way.

    Attributes:
        activation: of the residual stream, keys and values.
        weight: of gathered weights.
        reduce: of gradients.
    """

    activation: int = 4
    weight: int = 4
    reduce: int = 4

    @staticmethod
    def of(precision: str, layout: Layout) -> ValueBytes:
        """Return those of the native engine under a precision of `EngineOptions`.

        A rank that has its stage alone computes under autocast, whose residual stream is fp32.
        """
        low = precision == "bf16"
        return ValueBytes(2 if low and layout.stage_ranks > 1 else 4, 2 if low else 4, 4)


FP32 = ValueBytes()


def step_collectives(
    model: ModelConfig,
    layout: Layout,
    sequence_length: int,
    micro_batches: int,
    *,
    stage: int = 0,
    sizes: ValueBytes = FP32,
    documents: bool = False,
    loss_rows: int = 512,
) -> list[Transfer]:
    """Return all that one rank of a pipeline rank takes part in during one optimizer step; groups
    of one rank are silent.

    Rows that visit experts elsewhere depend on routing: see `Transfer.routed`. With a capacity,
    dropped rows make even the numbers of rows that leave smaller than they are here.

    Args:
        model, layout: sound, by `models.config.problems` and `rules.problems`.
        sequence_length: tokens of a whole sequence.
        micro_batches: that this rank's replica runs in the step.
        stage: pipeline rank.
        sizes: bytes of what moves.
        documents: whether the stream gives document ids.
        loss_rows: rows of logits that exist at a time (`models.loss.CHUNK_ROWS`).
    """
    tokens = layout.micro_sequences * sequence_length // layout.cp
    step = _Step(model, layout, tokens, micro_batches, stage, sizes, documents, loss_rows)
    ranks = group_ranks(layout)
    counts: Counter[tuple[str, str, int, bool]] = Counter()
    for t in step.transfers():
        counts[t.group, t.kind, t.bytes, t.routed] += t.count
    return [
        Transfer(group, kind, count, size, routed)
        for (group, kind, size, routed), count in sorted(counts.items())
        if count and ranks[group] > 1
    ]


@dataclass(frozen=True)
class _Step:
    """The arguments of `step_collectives`; `tokens` is B T, of one micro-batch on one context
    rank.
    """

    model: ModelConfig
    layout: Layout
    tokens: int
    micro_batches: int
    stage: int
    sizes: ValueBytes
    documents: bool
    loss_rows: int

    def transfers(self) -> Iterator[Transfer]:
        """Everything, in no order."""
        yield from self.data()
        yield from self.tensor()
        yield from self.context()
        yield from self.experts()
        yield from self.pipeline()
        yield Transfer("control", "all_reduce", 1, 2 * INT64_BYTES)  # labels, tokens
        # Losses, norm, stop, choices of experts.
        sums = 5 + self.model.n_layers * self.model.n_experts
        yield Transfer("control", "all_reduce", 1, sums * FLOAT64_BYTES)

    @property
    def again(self) -> int:
        """Passes of a block in the backward pass."""
        return int(self.layout.recompute != "none")

    @property
    def layers(self) -> list[int]:
        """The blocks of this pipeline rank."""
        layers = self.layout.layers_of_stages(self.model)
        return [layer for number in self.layout.stages_of(self.stage) for layer in layers[number]]

    @property
    def stream_bytes(self) -> int:
        """The residual stream of a micro-batch, whole sequences of this context rank."""
        return self.tokens * self.model.d_model * self.sizes.activation

    def holds(self, number: int) -> bool:
        """Whether this pipeline rank holds a stage."""
        return number % self.layout.stages in self.layout.stages_of(self.stage)

    def data(self) -> Iterator[Transfer]:
        """FSDP2: gather every unit and reduce its gradient once a step, or in every micro-batch
        (`gathers_again`).
        """
        again = gathers_again(self.model, self.layout)
        rounds = self.micro_batches if again else 1
        mine = sorted(weights(self.model, self.layout, self.stage), key=lambda w: w.unit)
        for unit, members in groupby(mine, key=lambda w: w.unit):
            group = "edp" if unit.startswith("experts") else "fsdp"
            ranks = getattr(self.layout, group)
            part = sum(weight.divided(ranks) for weight in members)
            # The root stays gathered from the forward to the backward pass, which begins with it.
            gathers = rounds * (2 if again and unit != "root" else 1)
            yield Transfer(group, "all_gather", gathers, ranks * part * self.sizes.weight)
            yield Transfer(group, "reduce_scatter", rounds, ranks * part * self.sizes.reduce)
            yield Transfer("dp_replicate", "all_reduce", 1, part * self.sizes.reduce)

    def tensor(self) -> Iterator[Transfer]:
        """The residual stream on its way between regions, the loss, and gradients of weights that
        all ranks hold.
        """
        for layer in self.layers:
            yield from self._regions(layer)
        yield from self._ends()
        # FSDP2 adds up micro-batches in the type of reductions; the gradient of one has the type of
        # the weight.
        again = gathers_again(self.model, self.layout)
        together = not again and (self.micro_batches > 1 or self.layout.pp > 1)
        size = self.sizes.reduce if together else self.sizes.weight
        rounds = self.micro_batches if again else 1
        for weight in weights(self.model, self.layout, self.stage):
            if weight.over_tp:
                yield Transfer("tp", "all_reduce", rounds, weight.numel * size)

    def _stream(
        self, enters: int, leaves: int, back_enters: int, back_leaves: int
    ) -> Iterator[Transfer]:
        """Return the transfers of regions: passes forward (recomputation included) and backward,
        per micro-batch.
        """
        n = self.micro_batches
        if self.layout.sequence_parallel:
            gathers, scatters = enters + back_leaves, leaves + back_enters
            yield Transfer("tp", "all_gather", n * gathers, self.stream_bytes)
            yield Transfer("tp", "reduce_scatter", n * scatters, self.stream_bytes)
        else:
            yield Transfer("tp", "all_reduce", n * (leaves + back_enters), self.stream_bytes)

    def _regions(self, layer: int) -> Iterator[Transfer]:
        """Attention, and a dense feed-forward: what tensor parallelism divides is entered and left
        once in every pass.
        """
        weights = block_weights(self.model, layer)
        divided = [w for w in weights if w.split in (Split.COLUMNS, Split.ROWS)]
        names = {weight.region for weight in divided}
        regions = len(names)
        leaves = regions * (1 + self.again)
        if self.again and "feed_forward" in names and self.model.norm_position == "pre":
            leaves -= 1  # nothing after the last one is kept, so that recomputation stops before it
        yield from self._stream(regions * (1 + self.again), leaves, regions, regions)
        norms = sum(weight.is_norm for weight in divided)  # means of squares over all ranks' heads
        passes = norms * (2 + self.again) * self.micro_batches
        yield Transfer("tp", "all_reduce", passes, self.tokens * FP32_BYTES)

    def _ends(self) -> Iterator[Transfer]:
        """Embedding, final norm and loss."""
        layout, n = self.layout, self.micro_batches
        split = layout.vocabulary_parallel
        if self.holds(0):
            if split:
                yield from self._stream(0, 1, 0, 1)
            elif layout.sequence_parallel:
                yield Transfer("tp", "all_gather", n, self.stream_bytes)
        if self.holds(-1):
            if split:
                yield from self._stream(1, 0, 1, 0)
                for start in range(0, self.tokens, self.loss_rows):
                    rows = min(self.loss_rows, self.tokens - start)
                    # The largest logit of each row; then its sum of exponentials, and the label's
                    # logit.
                    yield Transfer("tp", "all_reduce", n, rows * FP32_BYTES)
                    yield Transfer("tp", "all_reduce", n, 2 * rows * FP32_BYTES)
            elif layout.sequence_parallel:
                yield Transfer("tp", "all_gather", n, self.stream_bytes)

    def context(self) -> Iterator[Transfer]:
        """Keys and values around the ring, and their gradients (`context_pieces.ring_bytes`);
        segments once per stage.
        """
        layout, n = self.layout, self.micro_batches
        moves, wide = (layout.cp - 1) * n, max(FP32_BYTES, self.sizes.activation)
        for layer in self.layers:
            mixed = mixing(self.model, layer)
            values = self.tokens * (mixed.keys + mixed.values) // layout.tp
            yield Transfer("cp", "send", (2 + self.again) * moves, values * self.sizes.activation)
            yield Transfer("cp", "send", moves, values * wide)
        if self.documents:
            stages = len(layout.stages_of(self.stage))
            segments = layout.cp * self.tokens * INT64_BYTES
            yield Transfer("cp", "all_gather", stages * n, segments)

    def experts(self) -> Iterator[Transfer]:
        """Counts and rows to the ranks of their experts, results back, gradients of both."""
        for layer in self.layers:
            for product in block_products(self.model, layer):
                if product.split is Split.EXPERT_COLUMNS:
                    yield from self._visits(product)

    def _visits(self, product: Product) -> Iterator[Transfer]:
        """One mixture: rows come to the first product of its experts, results go home."""
        layout, back = self.layout, self.micro_batches
        passes = back * (1 + self.again)
        counts = product.matrices * INT64_BYTES
        yield Transfer("ep", "all_to_all", passes, counts)
        yield Transfer("etp", "all_gather", passes, layout.etp * counts)
        tokens = self.tokens // layout.tp  # sequence parallelism has given each rank its own
        rows = tokens * product.visits * product.inner * self.sizes.activation
        # Own rows leave when they are sent, and when the gradients of their results are; what comes
        # back was routed here.
        yield Transfer("ep", "all_to_all", passes + back, rows)
        yield Transfer("ep", "all_to_all", passes + back, rows, routed=True)
        routed = layout.ep > 1
        yield Transfer("etp", "all_to_all", 2 * (passes + back), layout.etp * rows, routed)

    def pipeline(self) -> Iterator[Transfer]:
        """Hidden states to the next stage, their gradients to the one before, where another rank
        holds it.
        """
        size = self.stream_bytes
        if self.layout.sequence_parallel:
            size //= self.layout.tp
        for number in self.layout.stages_of(self.stage):
            neighbours = [n for n in (number - 1, number + 1) if 0 <= n < self.layout.stages]
            away = sum(not self.holds(n) for n in neighbours)
            yield Transfer("pp", "send", away * self.micro_batches, size)
