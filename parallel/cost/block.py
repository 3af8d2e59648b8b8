"""What one transformer block costs on one device for one micro-batch: seconds by phase, bytes of
activations. Pure; no torch.

T tokens of the micro-batch on this device, D model width, F feed-forward width, H heads, V
vocabulary. Products take operations / rate plus the time to move their operands (an additive
roofline, so that small products are slow); pointwise kernels take bytes / bandwidth.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Device
from motet.parallel.cost.context import HOST_SHARE, Ring, ring
from motet.parallel.cost.links import CommGroup
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
        kernels = ATTENTION_EFFICIENCY.get(traits.attention, 1.0) / constants.attention
        if traits.attention != "flash3" and "fp8" in device.peak_tflops:
            kernels *= OLD_KERNELS
        memory = device.memory_gb_s * 1e9
        return Rates(products, head, head * kernels, memory * constants.bandwidth, memory)


@dataclass(frozen=True)
class Split:
    """How a block is divided: degrees, and where their groups stand."""

    tokens: int
    sequence_length: int
    tp: CommGroup
    cp: CommGroup
    ep: CommGroup
    etp: CommGroup
    sequence_parallel: bool
    alone: bool  # no other rank holds a part of the stage


@dataclass(frozen=True)
class Block:
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


def selective(block: Block, traits: Traits) -> Times:
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

    def product_s(self, rows: float, inner: float, columns: float, times: float = 1.0) -> float:
        """Return the time of [rows, inner] x [inner, columns]."""
        operations = 2.0 * rows * inner * columns
        moved = self.value * (rows * inner + inner * columns + rows * columns)
        if self.fp8:
            moved += 3.0 * rows * inner  # inputs are scaled and cast
        return times * (operations / self.rates.products + moved / self.rates.operand_bandwidth)

    def block(self, split: Split, has_experts: bool) -> Block:
        """Return the costs of one block."""
        products = self._projections(split)
        forward_core, backward_core = self._core(split)
        inner, outer = self._pointwise_bytes(split, has_experts)
        bandwidth = self.rates.bandwidth
        pointwise = (inner[0] + outer[0]) / bandwidth
        pointwise_back = (inner[1] + outer[1]) / bandwidth
        tensor = self._tensor_s(split, has_experts)
        context = self._ring(split, (forward_core, backward_core))
        if has_experts:
            routed, feed = self._experts(split)
        else:
            routed, feed = 0.0, self._dense(split)
        forward = (products + feed, forward_core, pointwise, tensor, context.forward_s, routed)
        backward = (
            2.0 * (products + feed) + self._accumulate_s(split, has_experts),
            backward_core,
            pointwise_back,
            tensor,
            context.backward_s,
            routed,
        )
        kept, core_bytes, pointwise_bytes = self._kept(split, has_experts)
        started = 1.0 if split.alone else self.traits.shared_host
        if split.tp.ranks > 1:
            started = self.traits.tensor_host
        steps = HOST_SHARE * (split.cp.ranks - 1)
        residual = split.tokens * self.model.d_model * self.value
        residual /= split.tp.ranks if split.sequence_parallel else 1
        return Block(
            self._with_host(forward, started + steps),
            self._with_host(backward, 1.6 * started + 2.0 * steps),
            forward_core + context.forward_s,
            pointwise,
            kept,
            core_bytes,
            pointwise_bytes,
            residual + self._alternate(split, has_experts),
            residual,
            context.buffer_bytes,
        )

    def _alternate(self, split: Split, has_experts: bool) -> float:
        """Return bytes of attention's output and of every second product's."""
        model = self.model
        visits = model.experts_per_token if has_experts else 1
        width = model.expert_width if has_experts else model.d_ffn
        feed = visits * width * (2.0 if self.traits.gated else 1.5)
        feed += model.shared_width * 2.0 if has_experts else 0.0
        inside = model.query_width + 0.5 * (model.query_width + 2 * model.kv_width + feed)
        over = split.tp.ranks if split.sequence_parallel else 1
        return split.tokens * self.value * (inside / split.tp.ranks + model.d_model / over)

    def _with_host(self, times: tuple[float, ...], passes: float) -> Times:
        """Add what the device waits for the host."""
        host_s = self.constants.host_us * 1e-6 * passes
        return (*times, max(0.0, host_s - sum(times)) if self.traits.ahead else host_s)

    def _projections(self, split: Split) -> float:
        model, tp, rows = self.model, split.tp.ranks, split.tokens
        wide = (model.query_width + 2 * model.kv_width) / tp
        return self.product_s(rows, model.d_model, wide) + self.product_s(
            rows, model.query_width / tp, model.d_model
        )

    def _dense(self, split: Split, width: float | None = None) -> float:
        model, tp, rows = self.model, split.tp.ranks, split.tokens
        width = (model.d_ffn if width is None else width) / tp
        if self.traits.gated:
            up = self.product_s(rows, model.d_model, 2 * width)
        else:
            width *= 1.5
            up = self.product_s(rows, model.d_model, width)
        return up + self.product_s(rows, width, model.d_model)

    def _accumulate_s(self, split: Split, has_experts: bool) -> float:
        """Gradients of weights are read, added to and written in their own precision."""
        model = self.model
        weights = 2 * model.d_model * (model.query_width + model.kv_width) / split.tp.ranks
        if has_experts:
            held = model.n_experts / split.ep.ranks
            weights += held * 3 * model.d_model * model.expert_width / split.etp.ranks
        else:
            weights += 3 * model.d_model * model.d_ffn / split.tp.ranks
        return weights * 2 * self.traits.gradient_bytes / self.rates.operand_bandwidth

    def _core(self, split: Split) -> tuple[float, float]:
        """Scores, softmax and weighted sum, forward and backward."""
        model, traits = self.model, self.traits
        square = 4.0 * split.tokens * split.sequence_length * model.query_width / split.tp.ranks
        if traits.attention in ATTENTION_EFFICIENCY:
            narrow = 1.0 if model.head_width >= 96 else 1.2  # softmax weighs more per channel
            forward = 0.5 * square * narrow / self.rates.attention
            return 0.85 * forward, 2.5 * 1.06 * forward
        scores = split.tokens * split.sequence_length * model.n_heads / split.tp.ranks
        passes = (10.0, 14.0) if traits.attention == "fused" else (20.0, 24.0)
        if traits.dropout:
            passes = (passes[0] + 5.0, passes[1] + 5.0)
        products = square / self.rates.products
        return (
            products + scores * passes[0] / self.rates.bandwidth,
            2 * products + scores * passes[1] / self.rates.bandwidth,
        )

    def _pointwise_bytes(
        self, split: Split, has_experts: bool
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (forward, backward) bytes of what tensor parallelism divides, and of the residual
        stream.
        """
        model, traits, half = self.model, self.traits, self.value / 2.0
        tp = split.tp.ranks
        fused = traits.fused_elementwise
        inside_f = (4.0 if fused else 8.0) * (model.query_width + 2 * model.kv_width)
        inside_b = inside_f
        if traits.rotary:
            turned = model.query_width + model.kv_width
            inside_f += (4.0 if fused else 16.0) * turned
            inside_b += (4.0 if fused else 16.0) * turned
        if has_experts:
            rows = model.experts_per_token
            moved = rows * model.d_model
            wide = rows * model.expert_width + model.shared_width
            inside_f += (8.0 if fused else 16.0) * moved + (6.0 if fused else 10.0) * wide
            inside_b += (10.0 if fused else 20.0) * moved + (10.0 if fused else 16.0) * wide
        elif traits.gated:
            inside_f += (6.0 if fused else 10.0) * model.d_ffn
            inside_b += (10.0 if fused else 16.0) * model.d_ffn
        else:
            inside_f += (4.0 if fused else 8.0) * 1.5 * model.d_ffn
            inside_b += (6.0 if fused else 12.0) * 1.5 * model.d_ffn
        norm = (4.0, 10.0) if traits.fused_norms or fused else (26.0, 52.0)
        residual = (2.0, 4.0) if fused else (6.0, 6.0)
        if traits.dropout:
            residual = (residual[0] + 4.0, residual[1] + 5.0)
        split_stream = tp if split.sequence_parallel else 1
        stream = split.tokens * model.d_model / split_stream * half
        inner = split.tokens / tp * half
        return (
            (inside_f * inner, inside_b * inner),
            (2 * (norm[0] + residual[0]) * stream, 2 * (norm[1] + residual[1]) * stream),
        )

    def _tensor_s(self, split: Split, has_experts: bool) -> float:
        """Two all-reduces of the residual stream per pass, or the same as gathers and scatters;
        experts bring their own.
        """
        size = split.tokens * self.model.d_model * self.value
        each = split.tp.reduce_s(size, self.constants)
        if split.sequence_parallel and split.tp.ranks > 1:
            light = 0.5 if self.fp8 and self.traits.fp8_gathers else 1.0
            each = split.tp.gather_s(light * size, self.constants)
            each += split.tp.gather_s(size, self.constants)
        count = 1 if has_experts and not self.model.shared_width else 2
        return count * each * (1.0 - self.traits.tensor_overlap)

    def _ring(self, split: Split, core_s: tuple[float, float]) -> Ring:
        model, tp, traits = self.model, split.tp.ranks, self.traits
        keys = model.query_width if traits.repeats_keys else model.kv_width
        widths = model.query_width / tp, 2 * keys / tp
        bandwidth = self.rates.bandwidth
        return ring(
            split.cp, split.tokens, widths, self.value, core_s, bandwidth, traits, self.constants
        )

    def _experts(self, split: Split) -> tuple[float, float]:
        """Return seconds of (moving rows to their experts and back, products)."""
        model, constants = self.model, self.constants
        rows = split.tokens / split.tp.ranks * model.experts_per_token
        size = rows * model.d_model * self.value
        move_s = 2 * split.ep.exchange_s(size, constants)
        etp = split.etp.ranks
        move_s += 2 * split.etp.gather_s(etp * size, constants)
        held = model.n_experts / split.ep.ranks
        each = rows * etp / held
        width = model.expert_width / etp
        products = held * (
            self.product_s(each, model.d_model, 2 * width)
            + self.product_s(each, width, model.d_model)
        )
        router = self.product_s(split.tokens / split.tp.ranks, model.d_model, model.n_experts)
        shared = self._dense(split, model.shared_width) if model.shared_width else 0.0
        return move_s, products / constants.grouped + router + shared

    def _kept(self, split: Split, has_experts: bool) -> tuple[float, float, float]:
        """Return bytes of activations of a block, of its attention's core, of its pointwise
        kernels.

        The count of arXiv:2205.05198, section 4.1, redone for each trait (see
        `counts.activation_bytes_per_layer`).
        """
        model, traits, tp = self.model, self.traits, split.tp.ranks
        value = self.value
        queries, keys = model.query_width, model.kv_width
        core, inside = 4.0 * model.n_heads, value * (2 * queries + 2 * keys)
        pointwise = (
            value * (queries + keys) if traits.rotary and not traits.fused_elementwise else 0.0
        )
        if traits.attention not in ATTENTION_EFFICIENCY:
            each = 2 * value + (1.0 if traits.dropout else 0.0)
            each += 0.0 if traits.attention == "fused" else value
            core += each * model.n_heads * split.sequence_length
        wide = 0.0
        if has_experts:
            rows = model.experts_per_token
            inside += rows * value * (2 * model.d_model + 3 * model.expert_width)
            pointwise += 0.0 if traits.fused_elementwise else rows * value * model.expert_width
            inside += 3 * value * model.shared_width
            wide += 4.0 * (model.d_model + 5 * model.n_experts)
        elif traits.gated:
            inside += 3 * value * model.d_ffn
            pointwise += 0.0 if traits.fused_elementwise else value * model.d_ffn
        else:
            inside += value * 2 * 1.5 * model.d_ffn
        stream = 4 * value * model.d_model + wide
        # Of each of two norms, in fp32: its input, and its rows before they are scaled.
        pointwise_stream = 0.0 if traits.fused_norms or traits.fused_elementwise else 16.0
        if traits.dropout:
            pointwise_stream += 2.0
        pointwise_stream *= model.d_model
        over = tp if split.sequence_parallel else 1
        tokens = split.tokens
        kept = tokens * ((inside + pointwise + core) / tp + (stream + pointwise_stream) / over)
        light = tokens * (pointwise / tp + (pointwise_stream + 2 * value * model.d_model) / over)
        return kept, tokens * core / tp, light

    def head(self, split: Split, vocabulary_split: int) -> tuple[Times, Times]:
        """Return forward and backward of the last norm, head and loss."""
        model, tokens, bandwidth = self.model, split.tokens, self.rates.bandwidth
        columns = model.vocabulary_size / vocabulary_split
        product = 2.0 * tokens * model.d_model * columns / self.rates.head
        product += self.value * (tokens + model.d_model) * columns / self.rates.operand_bandwidth
        gather_s = 0.0
        if self.traits.gathers_logits:
            columns = model.vocabulary_size
            gather_s = split.tp.gather_s(tokens * columns * self.value, self.constants)
        size = tokens * model.d_model * self.value
        reduce_s = split.tp.reduce_s(size, self.constants) if vocabulary_split > 1 else 0.0
        forward, backward = (tokens * columns * each / bandwidth for each in (12.0, 10.0))
        return (
            (product, 0.0, forward, gather_s, 0.0, 0.0, 0.0),
            (2 * product, 0.0, backward, reduce_s, 0.0, 0.0, 0.0),
        )

    def embedding(self, split: Split) -> tuple[Times, Times]:
        """Return forward and backward of the lookups."""
        size = split.tokens * self.model.d_model * self.value
        reduce_s = split.tp.reduce_s(size, self.constants)
        moved = 2 * size / self.rates.bandwidth
        return (
            (0.0, 0.0, moved, reduce_s, 0.0, 0.0, 0.0),
            (0.0, 0.0, 3 * moved, 0.0, 0.0, 0.0, 0.0),
        )
