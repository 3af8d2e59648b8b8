"""What the cost model is asked and what it answers: what is trained, how a backend behaves, what a
layout would do. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Training:
    """What a step is, besides the layout.

    Attributes:
        sequences: of one optimizer step, over all devices.
        sequence_length: tokens of one.
        dtype: of matrix products: "bf16", "fp16", "fp32" or "fp8" (master copies and reductions
            stay as `Traits` says).
        optimizer_bytes: of state per weight, e.g. 8 for two fp32 moments, 12 with an fp32 copy of
            16-bit weights.
        zero_stage: 0 to 3 (arXiv:1910.02054): what dp_shard divides; None: as Motet's engine does
            (weights are divided, and kept gathered during a step where `weights.gathers_again`
            says no).
        offload: the optimizer's state lives in the host's memory.
        probe_tokens: tokens per step, on average, that probes send through the model without a
            backward pass.
        data_s: time per step that waiting for data takes.
        teacher: a second set of the weights is kept, without gradients and optimizer, laid out as
            the first.
    """

    sequences: int
    sequence_length: int
    dtype: str = "bf16"
    optimizer_bytes: float = 8.0
    zero_stage: int | None = None
    offload: bool = False
    probe_tokens: float = 0.0
    data_s: float = 0.0
    teacher: bool = False


@dataclass(frozen=True)
class Traits:
    """What a backend does where backends differ.

    Attributes:
        gated: the feed-forward is SwiGLU with three matrices; False: two matrices and GELU, of 1.5
            times the width.
        rotary: positions turn queries and keys.
        dropout: masks are made and kept.
        attention: "flash1", "flash2", "flash3"; "fused" (scores exist, one kernel masks them and
            makes the softmax); "math" (many kernels).
        fused_norms: a norm is one kernel; else many that keep fp32 copies.
        fused_elementwise: activations, rotary positions and residual sums are fused by a compiler.
        context_gathers: context ranks gather the keys and values of all, as torch's own context
            parallelism does; they go around else.
        repeats_keys: keys and values are repeated to as many heads as queries have before context
            ranks pass them on.
        gathers_logits: products of the head are divided as the layout says, but every tensor rank
            gathers all logits for the loss.
        logits_rows: rows of logits that exist at a time; None: all.
        logits_bytes: of one logit while the loss is computed, copies and gradient included.
        weight_bytes, gradient_bytes: of what a device holds.
        compute_bytes: of weights as they are gathered, and of activations.
        reduce_bytes: of gradients on their way.
        data_overlap: share of the data-parallel transfers that can hide behind computation.
        tensor_overlap: the same of tensor-parallel transfers.
        send_overlap: share of the sends between stages that hides behind computation.
        sends_parts: a stage sends 1 / tp of the hidden states from each tensor rank also without
            sequence parallelism.
        selective: what selective recomputation makes again: "attention" (its core:
            arXiv:2205.05198), "pointwise" (all but products and attention), or "alternate" (every
            second product too: torchtitan's choice per operation).
        selective_layers: share of layers that selective recomputation acts on.
        fp8_gathers: with fp8 products, tensor-parallel gathers carry 8 bits.
        fp8_scaling: share of fp8's rate that is left by the way its scales are kept (1 = one scale
            per tensor).
        optimizer_traffic: bytes read and written per weight in an update.
        shared_host: host time to start a block of a stage that several ranks hold, over that of a
            rank alone (FSDP2's hooks).
        tensor_host: the same of a block that tensor parallelism divides (DTensors that change
        hands). Measured on a CPU with torch 2.13:
            forward and backward pass 1.2 ms alone, 3.0 under FSDP2, 7.3 with tp=2.
        ahead: the host starts kernels while others run; False: its time adds to theirs, as on CPUs.
    """

    gated: bool = True
    rotary: bool = True
    dropout: bool = False
    attention: str = "flash2"
    fused_norms: bool = True
    fused_elementwise: bool = False
    context_gathers: bool = False
    repeats_keys: bool = False
    gathers_logits: bool = False
    logits_rows: int | None = 512
    logits_bytes: float = 10.0
    weight_bytes: float = 4.0
    gradient_bytes: float = 4.0
    compute_bytes: float = 2.0
    reduce_bytes: float = 4.0
    data_overlap: float = 0.9
    tensor_overlap: float = 0.0
    send_overlap: float = 0.0
    sends_parts: bool = False
    selective: str = "pointwise"
    selective_layers: float = 1.0
    fp8_gathers: bool = False
    fp8_scaling: float = 1.0
    optimizer_traffic: float = 34.0
    shared_host: float = 2.5
    tensor_host: float = 6.0
    ahead: bool = True


NATIVE = Traits()
"""Motet's own engine: FSDP2 with fp32 weights, bf16 products, loss by blocks of 512 rows."""

ATTENTION_EFFICIENCY = {"flash1": 0.42, "flash2": 0.70, "flash3": 0.85}
"""Rate of the causal half of the scores over that of large products on the same device: on an A100,
forward and backward together, head width 128 (arXiv:2205.14135; arXiv:2307.08691, figures 4 and 5);
`flash3` on an H100 (arXiv:2407.08608). Both slow down with the clock.
"""

OLD_KERNELS = 0.62
"""What "flash1" and "flash2" keep of that on devices with 8-bit units, whose new instructions they
do not use (arXiv:2407.08608: 35 % of an H100's peak forward)."""

FP8_EFFICIENCY = 0.80
"""Rate of fp8 products over twice that of bf16 ones: they are shorter, and more often wait for
memory and power.
"""


class Prediction(NamedTuple):
    """What a layout would do. A tuple: a search makes very many.

    Attributes:
        step_time_s: of one optimizer step.
        interval_s: about 90 % of measured steps should lie in it.
        memory_gib: of the fullest device; `capacity_gib` is what the device has.
        fits: whether memory suffices everywhere.
        parts: seconds of the step by phase, along the slowest pipeline rank; they add up to
            `step_time_s`.
        memory_parts: GiB on the fullest device by what holds them.
        stage_time_s, stage_memory_gib: per pipeline rank: busy time of a step, and its fullest
            device.
        tokens_per_s: of the whole cluster.
        mfu: model FLOPs utilization by `counts.training_flops_per_token`, of the peaks of all
            devices used.
        price: of 10^9 tokens, on the devices used; 0 where no price is known.
        trust: reasons to doubt the numbers; empty: within what the constants were fitted to.
    """

    step_time_s: float
    interval_s: tuple[float, float]
    memory_gib: float
    capacity_gib: float
    fits: bool
    parts: Mapping[str, float]
    memory_parts: Mapping[str, float]
    stage_time_s: tuple[float, ...]
    stage_memory_gib: tuple[float, ...]
    tokens_per_s: float
    mfu: float
    price: float
    trust: tuple[str, ...] = ()
