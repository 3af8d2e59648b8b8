"""What one transformer block costs on one device for one micro-batch: seconds by phase, bytes of
activations. Pure; no torch.

T tokens of the micro-batch on this device, D model width, F feed-forward width, H heads, V
vocabulary. Products take operations / rate plus the time to move their operands (an additive
roofline, so that small products are slow); pointwise kernels take bytes / bandwidth.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from motet.models.architecture import Split, block_kinds, head_product
from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Device
from motet.parallel.cost.block_shape import (
    BlockShape,
    BlockSplit,
    ProductShape,
    alternate_bytes,
    kept_bytes,
)
from motet.parallel.cost.context import HOST_SHARE, Ring, ring
from motet.parallel.cost.terms import ATTENTION_EFFICIENCY, FP8_EFFICIENCY, OLD_KERNELS, Traits

PHASES = ("products", "attention", "pointwise", "tensor", "context", "experts", "host")
Times = tuple[float, ...]  # seconds per phase, in this order
NOTHING: Times = (0.0,) * len(PHASES)


def add(one: Times, other: Times) -> Times:
    """Return the sum of times, phase by phase."""
    return tuple(map(operator.add, one, other))


def scaled(times: Times, factor: float) -> Times:
    """Return times multiplied by a number."""
    return tuple([value * factor for value in times])


@dataclass(frozen=True)
class Rates:
    """What a device does per second."""

    products: float  # operations of large matrix products
    head: float  # the same of the head, which stays in 16 bits
    attention: float  # operations of attention kernels
    bandwidth: float  # bytes
    operand_bandwidth: float  # bytes that products move

    @staticmethod
    def of(device: Device, dtype: str, traits: Traits, constants: Constants) -> Rates:
        """Return the rates of a device for a data type under a backend."""
        wide = "bf16" if dtype == "fp8" else dtype
        share = device.matmul_efficiency if constants.matmul is None else constants.matmul
        if constants.matmul is None and wide in device.measured_tflops:
            share = device.measured_tflops[wide] / device.peak(wide)
        head = products = device.peak(wide) * 1e12 * share
        if dtype == "fp8":
            products = device.peak(dtype) * 1e12 * share * FP8_EFFICIENCY * traits.fp8_scaling
        # Attention's products stay in 16 bits under fp8, as the head's.
        kernels = ATTENTION_EFFICIENCY.get(traits.attention, 1.0) / constants.attention
        if traits.attention != "flash3" and "fp8" in device.peak_tflops:
            kernels *= OLD_KERNELS
        memory = device.memory_gb_s * 1e9
        return Rates(products, head, head * kernels, memory * constants.bandwidth, memory)


@dataclass(frozen=True)
class PricedBlock:
    """Seconds of one block for one micro-batch, and bytes that it keeps for the backward pass."""

    forward: Times
    backward: Times  # without anything made again
    attention_core: float  # seconds of the forward pass that selective recomputation repeats
    pointwise: float  # the same of its other kind
    kept_bytes: float  # without recomputation
    core_bytes: float  # the part of them that attention's core keeps
    pointwise_bytes: float  # the part that pointwise kernels alone keep
    alternate_bytes: float  # the part that remains where every second product is made again
    input_bytes: float  # what full recomputation keeps
    ring_bytes: float  # buffers of context parallelism, while a block runs


def selective(block: PricedBlock, traits: Traits) -> Times:
    """Return what selective recomputation does again in a block's backward pass."""
    share = traits.selective_layers
    if traits.selective == "attention":
        return (0.0, block.attention_core * share, *NOTHING[2:])
    # Products are kept, or half of them; the rest is made again, collectives too.
    products = 0.5 * block.forward[0] if traits.selective == "alternate" else 0.0
    return scaled((products, 0.0, *block.forward[2:]), share)


class BlockCost:
    """Costs blocks of one model on one kind of device."""

    def __init__(
        self,
        model: ModelConfig,
        device: Device,
        dtype: str,
        traits: Traits,
        constants: Constants,
    ) -> None:
        self.model, self.traits, self.constants = model, traits, constants
        self.rates = Rates.of(device, dtype, traits, constants)
        self.fp8 = dtype == "fp8"
        self.value = 4.0 if dtype == "fp32" else traits.compute_bytes
        self.shapes = {
            model.has_experts(layer): BlockShape.of(model, layer, traits.gated)
            for layer, _ in block_kinds(model)
        }

    def product_s(self, rows: float, inner: float, columns: float, times: float = 1.0) -> float:
        """Return the time of [rows, inner] x [inner, columns]."""
        operations = 2.0 * rows * inner * columns
        moved = self.value * (rows * inner + inner * columns + rows * columns)
        if self.fp8:
            moved += 3.0 * rows * inner  # inputs are scaled and cast
        return times * (operations / self.rates.products + moved / self.rates.operand_bandwidth)

    def block(self, split: BlockSplit, has_experts: bool) -> PricedBlock:
        """Return the costs of one block."""
        shape = self.shapes[has_experts]
        products, core = self.products_s(split, shape), self._core(split, shape)
        inside, stream = self._pointwise_bytes(split, shape)
        pointwise, back = (
            sum(both) / self.rates.bandwidth for both in zip(inside, stream, strict=True)
        )
        tensor, around = self._tensor_s(split, shape), self._ring(split, shape, core)
        routed = self._exchange_s(split, shape)
        accumulated = 2.0 * products + self._accumulate_s(split, shape)
        forward = (products, core[0], pointwise, tensor, around.forward_s, routed)
        backward = (accumulated, core[1], back, tensor, around.backward_s, routed)
        ahead, behind = self._host_passes(split)
        residual = split.tokens * self.model.d_model * self.value / split.over_stream
        return PricedBlock(
            self._with_host(forward, ahead),
            self._with_host(backward, behind),
            core[0] + around.forward_s,
            pointwise,
            *kept_bytes(shape, split, self.value, self.traits),
            residual + alternate_bytes(shape, split, self.value),
            residual,
            around.buffer_bytes,
        )

    def _host_passes(self, split: BlockSplit) -> tuple[float, float]:
        """Return how much longer than one plain forward pass the host takes to start each pass."""
        started = 1.0 if split.alone else self.traits.shared_host
        if split.tp.ranks > 1:
            started = self.traits.tensor_host
        steps = HOST_SHARE * (split.cp.ranks - 1)
        return started + steps, 1.6 * started + 2.0 * steps

    def _with_host(self, times: tuple[float, ...], passes: float) -> Times:
        """Add what the device waits for the host."""
        # A host that runs ahead is waited for only where the device's work is shorter than its own.
        host_s = self.constants.host_us * 1e-6 * passes
        return (*times, max(0.0, host_s - sum(times)) if self.traits.ahead else host_s)

    def products_s(self, split: BlockSplit, shape: BlockShape) -> float:
        """Return the time of a block's products in a forward pass."""
        attention = sum(self._product_s(split, product) for product in shape.attention)
        feed = self._experts_s(split, shape) if shape.experts else 0.0
        return attention + (feed + sum(self._product_s(split, product) for product in shape.feed))

    def _product_s(self, split: BlockSplit, product: ProductShape) -> float:
        """Return the time of this rank's part of a product: of its columns, of what it sums over,
        or of its rows.
        """
        tp, rows, inner, columns = split.tp.ranks, split.tokens, product.inner, product.columns
        if product.split is Split.COLUMNS:
            return self.product_s(rows, inner, columns / tp)
        if product.split is Split.ROWS:
            return self.product_s(rows, inner / tp, columns)
        return self.product_s(rows / tp, inner, columns)

    def _experts_s(self, split: BlockSplit, shape: BlockShape) -> float:
        """Return the time of the products of the experts that a rank holds, rows spread evenly."""
        total, etp = 0.0, split.etp.ranks
        for product in shape.experts:
            held = product.matrices / split.ep.ranks
            # The etp ranks of one expert all compute on the rows that any of them brought.
            rows = split.tokens / split.tp.ranks * product.visits * etp / held
            outputs = product.split is Split.EXPERT_COLUMNS
            inner = product.inner if outputs else product.inner / etp
            columns = product.columns / etp if outputs else product.columns
            total += held * self.product_s(rows, inner, columns)
        # Small, unequal and read through an index: slower than dense products.
        return total / self.constants.grouped

    def _exchange_s(self, split: BlockSplit, shape: BlockShape) -> float:
        """Return the time in which rows reach the ranks of their experts, and results come back."""
        if not shape.experts:
            return 0.0
        first = shape.experts[0]
        size = split.tokens / split.tp.ranks * first.visits * first.inner * self.value
        # There and back, in either pass: the backward pass sends the gradients of both.
        move_s = 2 * split.ep.exchange_s(size, self.constants)
        return move_s + 2 * split.etp.gather_s(split.etp.ranks * size, self.constants)

    def _accumulate_s(self, split: BlockSplit, shape: BlockShape) -> float:
        """Gradients of weights are read, added to and written in their own precision."""
        divided = sum(
            p.inner * p.columns for p in shape.whole if p.split in (Split.COLUMNS, Split.ROWS)
        )
        # Routers and shared blocks are left out: they are small beside the experts.
        values = divided / split.tp.ranks
        for product in shape.experts:
            held = product.matrices / split.ep.ranks
            values += held * product.inner * product.columns / split.etp.ranks
        return values * 2 * self.traits.gradient_bytes / self.rates.operand_bandwidth

    def _core(self, split: BlockSplit, shape: BlockShape) -> tuple[float, float]:
        """Scores, softmax and weighted sum, forward and backward."""
        model, traits, tp = self.model, self.traits, split.tp.ranks
        square = float(split.tokens) * shape.mixed.operations(split.sequence_length) / tp
        if traits.attention in ATTENTION_EFFICIENCY:
            narrow = 1.0 if model.head_width >= 96 else 1.2  # softmax weighs more per channel
            # The causal half, and five products backward for two forward, which make scores again.
            # The rate is that of both passes together: the forward pass runs above it, the backward
            # pass below, 0.85 + 2.5 x 1.06 = 1 + 2.5.
            forward = 0.5 * square * narrow / self.rates.attention
            return 0.85 * forward, 2.5 * 1.06 * forward
        # Scores exist: every kernel that masks, scales or drops them reads and writes all of them.
        scores = split.tokens * split.sequence_length * shape.mixed.heads / tp
        passes = (10.0, 14.0) if traits.attention == "fused" else (20.0, 24.0)
        if traits.dropout:
            passes = (passes[0] + 5.0, passes[1] + 5.0)
        products = square / self.rates.products
        return (
            products + scores * passes[0] / self.rates.bandwidth,
            2 * products + scores * passes[1] / self.rates.bandwidth,
        )

    def _pointwise_bytes(
        self, split: BlockSplit, shape: BlockShape
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (forward, backward) bytes of what tensor parallelism divides, and of the residual
        stream.
        """
        traits, half, mixed = self.traits, self.value / 2.0, shape.mixed
        fused = traits.fused_elementwise
        inside_f = (4.0 if fused else 8.0) * (mixed.queries + mixed.keys + mixed.values)
        inside_b = inside_f
        if traits.rotary:
            turned = (4.0 if fused else 16.0) * (mixed.queries + mixed.keys)
            inside_f += turned
            inside_b += turned
        feed_f, feed_b = self._feed_bytes(shape)
        norm = (4.0, 10.0) if traits.fused_norms or fused else (26.0, 52.0)
        residual = (2.0, 4.0) if fused else (6.0, 6.0)
        if traits.dropout:
            residual = (residual[0] + 4.0, residual[1] + 5.0)
        stream = split.tokens * self.model.d_model / split.over_stream * half
        inner = split.tokens / split.tp.ranks * half
        return (
            ((inside_f + feed_f) * inner, (inside_b + feed_b) * inner),
            (
                (shape.norms * norm[0] + 2 * residual[0]) * stream,
                (shape.norms * norm[1] + 2 * residual[1]) * stream,
            ),
        )

    def _feed_bytes(self, shape: BlockShape) -> tuple[float, float]:
        """Return bytes per token, forward and backward, between the products of a feed-forward:
        gate, up and their product, or GELU of 1.5 times the channels.
        """
        fused, hidden, forward, backward = self.traits.fused_elementwise, shape.hidden, 0.0, 0.0
        if not shape.experts and not self.traits.gated:
            return (4.0 if fused else 8.0) * hidden, (6.0 if fused else 12.0) * hidden
        if shape.experts:  # rows are gathered, and their results weighed and added
            moved = shape.experts[0].visits * self.model.d_model
            forward, backward = (8.0 if fused else 16.0) * moved, (10.0 if fused else 20.0) * moved
        wide = (6.0, 10.0) if fused else (10.0, 16.0)
        return forward + wide[0] * hidden, backward + wide[1] * hidden

    def _tensor_s(self, split: BlockSplit, shape: BlockShape) -> float:
        """Two all-reduces of the residual stream per pass, or the same as gathers and scatters;
        experts bring their own.
        """
        # A region is entered and left once. In the backward pass what entered is summed, and what
        # left is gathered: as many bytes.
        size = split.tokens * self.model.d_model * self.value
        each = split.tp.reduce_s(size, self.constants)
        if split.sequence_parallel and split.tp.ranks > 1:
            light = 0.5 if self.fp8 and self.traits.fp8_gathers else 1.0
            each = split.tp.gather_s(light * size, self.constants)
            each += split.tp.gather_s(size, self.constants)
        return shape.entered * each * (1.0 - self.traits.tensor_overlap)

    def _ring(self, split: BlockSplit, shape: BlockShape, core_s: tuple[float, float]) -> Ring:
        mixed, tp = shape.mixed, split.tp.ranks
        moving = 2 * mixed.queries if self.traits.repeats_keys else mixed.keys + mixed.values
        widths = mixed.queries / tp, moving / tp
        bandwidth = self.rates.bandwidth
        return ring(
            split.cp,
            split.tokens,
            widths,
            self.value,
            core_s,
            bandwidth,
            self.traits,
            self.constants,
        )

    def head(self, split: BlockSplit, vocabulary_split: int) -> tuple[Times, Times]:
        """Return forward and backward of the last norm, head and loss."""
        tokens, bandwidth, logits = split.tokens, self.rates.bandwidth, head_product(self.model)
        columns = logits.columns / vocabulary_split
        # Logits and weight move; what the head reads is small beside them.
        product = 2.0 * tokens * logits.inner * columns / self.rates.head
        product += self.value * (tokens + logits.inner) * columns / self.rates.operand_bandwidth
        gather_s = 0.0
        if self.traits.gathers_logits:
            columns = logits.columns
            gather_s = split.tp.gather_s(tokens * columns * self.value, self.constants)
        size = tokens * logits.inner * self.value
        reduce_s = split.tp.reduce_s(size, self.constants) if vocabulary_split > 1 else 0.0
        forward, backward = (tokens * columns * each / bandwidth for each in (12.0, 10.0))
        return (
            (product, 0.0, forward, gather_s, 0.0, 0.0, 0.0),
            (2 * product, 0.0, backward, reduce_s, 0.0, 0.0, 0.0),
        )

    def embedding(self, split: BlockSplit) -> tuple[Times, Times]:
        """Return forward and backward of the lookups."""
        size = split.tokens * self.model.d_model * self.value
        reduce_s = split.tp.reduce_s(size, self.constants)
        moved = 2 * size / self.rates.bandwidth
        return (
            (0.0, 0.0, moved, reduce_s, 0.0, 0.0, 0.0),
            (0.0, 0.0, 3 * moved, 0.0, 0.0, 0.0, 0.0),
        )
