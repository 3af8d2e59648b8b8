"""Other estimators on the same rows: llm-analysis (PyPI, 0.2), and model operations with a pipeline
bubble. Each gets one fitted scale.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from planner_fit import Answer
from planner_rows import Observation

Estimator = Callable[[Observation], "tuple[float, float] | None"]


def flops_and_bubble(row: Observation) -> tuple[float, float] | None:
    """Return (seconds, GiB): operations over peak, a third more with recomputation, times 1 + (p -
    1) / (v m); 16 bytes per weight.
    """
    from motet.models.counts import parameters

    layout, training = row.layout, row.training
    micro_batches = training.sequences / (layout.micro_sequences * layout.dp_size)
    again = 4 / 3 if layout.recompute == "full" else 1.0
    bubble = 1 + (layout.pp - 1) / (layout.virtual_stages * micro_batches)
    weights = parameters(row.model) / (layout.tp * layout.pp)
    shard = layout.fsdp if training.zero_stage in (1, 2, 3) else 1
    held = weights * (4.0 + 12.0 / shard if training.zero_stage != 3 else 16.0 / shard)
    tokens = layout.micro_sequences * training.sequence_length
    kept = 2 if layout.recompute == "full" else 34
    held += kept * tokens * row.model.d_model * row.model.n_layers / layout.tp
    return row.mfu_flops / row.peak_flops * again * bubble, held / 2**30


def llm_analysis(row: Observation) -> tuple[float, float] | None:
    """Return (seconds, GiB) of llm-analysis; None where it cannot express the run.

    It takes whole ratios of feed-forward to model width.
    """
    from llm_analysis import analysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig

    analysis.logger.setLevel(logging.CRITICAL)
    layout, training, model = row.layout, row.training, row.model
    if len(row.cluster.groups) > 1 or model.n_experts or layout.cp > 1:
        return None
    group = row.cluster.groups[0]
    gpu = GPUConfig(
        name="gpu",
        mem_per_GPU_in_GB=group.device.memory_gib * 2**30 / 1e9,
        hbm_bandwidth_in_GB_per_sec=group.device.memory_gb_s,
        intra_node_bandwidth_in_GB_per_sec=group.intra_node.gb_s,
        intra_node_min_message_latency=8e-6,
        peak_fp16_TFLOPS=row.peak_flops / layout.world_size / 1e12,
        inter_node_bandwidth_in_GB_per_sec=group.inter_node.gb_s * group.devices_per_node,
    )
    feed = max(1, round((1.0 if row.traits.gated else 1.5) * model.d_ffn / model.d_model))
    shape = ModelConfig(
        name="model", num_layers=model.n_layers, n_head=model.n_heads, hidden_dim=model.d_model,
        vocab_size=model.vocabulary_size, max_seq_len=training.sequence_length,
        num_key_value_heads=model.n_kv_heads,
ffn_embed_dim=feed * model.d_model,
    )  # fmt: skip
    split = ParallelismConfig(
        tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp_size,
        sp_size=layout.tp if layout.sequence_parallel else 1,
    )  # fmt: skip
    recompute = {"none": 0, "selective": 1, "full": 2}[layout.recompute]
    micro_batches = max(1, training.sequences // (layout.micro_sequences * layout.dp_size))
    try:
        with redirect_stdout(io.StringIO()):
            told: dict[str, Any] = analysis.LLMAnalysis(
                shape, gpu, DtypeConfig(), split, flops_efficiency=0.5, hbm_memory_efficiency=0.8
            ).training(
                batch_size_per_gpu=layout.micro_sequences,
                gradient_accumulation_steps=micro_batches,
                global_batch_size=training.sequences,
                seq_len=training.sequence_length,
                activation_recomputation=analysis.ActivationRecomputation(recompute),
                ds_zero=analysis.DSZeRO(training.zero_stage or 0),
                flash_attn=row.traits.attention.startswith("flash"),
                mlp_gated_linear_units=row.traits.gated,
            )
    except (AssertionError, ZeroDivisionError):
        return None
    held = told.get("weight_memory_per_gpu", 0) + told.get("gradient_memory_per_gpu", 0)
    held += told.get("optimizer_state_memory_per_gpu", 0)
    held += told.get("activation_memory_bs", told.get("activation_memory_per_gpu", 0))
    return told["latency_per_iter"], held / 2**30


ESTIMATORS: dict[str, Estimator] = {
    "llm-analysis": llm_analysis,
    "operations and bubble": flops_and_bubble,
}


def missing() -> str | None:
    """Return how to install what is not there."""
    try:
        import llm_analysis as _  # noqa: F401
    except ImportError:
        return (
            "llm-analysis is not installed (pip install llm-analysis fire); its column is left out"
        )
    return None


def peer_answers(
    name: str, fit_rows: Sequence[Observation], rows: Sequence[Observation]
) -> list[Answer]:
    """Return what an estimator says, its times scaled by the median ratio on the rows to fit."""
    estimate = ESTIMATORS[name]
    ratios = [
        row.step_time_s / told[0]
        for row in fit_rows
        if row.step_time_s and (told := estimate(row)) is not None and told[0] > 0
    ]
    scale = float(np.median(ratios)) if ratios else 1.0
    found = []
    for row in rows:
        told = estimate(row)
        if told is None:
            found.append(Answer(None, None))
            continue
        capacity = min(group.device.memory_gib for group in row.cluster.groups)
        found.append(Answer(scale * told[0], told[1] <= capacity, memory_gib=told[1]))
    return found


if missing() and "--peers" in sys.argv:
    print(f"bench/planner.py: {missing()}", file=sys.stderr)
