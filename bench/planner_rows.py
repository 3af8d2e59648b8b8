"""Public measurements as inputs of the cost model: which model, machines, layout and backend each
row of a table is.

`planner_read.py` picks the reader of a file by its columns. What a table leaves out (vocabulary,
backend's habits) is what the paper or the benchmark's code says, the same for every row of a
source.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from planner_amp import amp
from planner_observation import (
    MEGATRON,
    Observation,
    Row,
    a100_cluster,
    even,
    gpt,
    kind_of,
    known,
    measured_s,
    nodes_of,
    number,
    true,
    whole,
)

from motet.models.config import ModelConfig
from motet.models.counts import training_flops_per_token
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cluster.devices import DEVICES
from motet.parallel.cost.stages import Training, Traits
from motet.parallel.layout.layout import Layout

Reader = Callable[[Row], Observation | None]
RECOMPUTE = {
    "disabled": "none",
    "none": "none",
    "selective": "selective",
    "every_layer": "full",
    "full": "full",
}
SCALING = replace(
    MEGATRON,
    gated=True,
    rotary=True,
    dropout=False,
    gradient_bytes=2.0,
    reduce_bytes=2.0,
    gathers_logits=True,
    logits_bytes=18.0,  # 16-bit logits; in fp32 their copy, log-softmax, and the gradients of both
)
ATTENTION = {
    "torch": "math",
    "fused": "fused",
    "flash_attentionv1.0.8": "flash1",
    "flash_attention2": "flash2",
}


def _scaling(row: Row) -> Observation:
    """arXiv:2311.05610: LLaMA under ZeRO-1 and 1F1B; MFU counts 6 N + 12 L D T per token."""
    hidden, layers, length = (whole(row, key) for key in ("hidden", "layers", "seq_len"))
    gpus, heads = whole(row, "gpus"), whole(row, "heads")
    model = ModelConfig(
        whole(row, "vocab", 128_000), hidden, layers, heads, heads, whole(row, "ffn_hidden")
    )
    tp, pp = whole(row, "tp"), whole(row, "pp")
    layout = Layout(
        tp=tp,
        pp=pp,
        dp_shard=gpus // (tp * pp),
        micro_sequences=whole(row, "micro_batch"),
        recompute=known(RECOMPUTE, row, "act_ckpt"),
        sequence_parallel=true(row, "sequence_parallel"),
        stage_layers=even(layers, pp),
    )
    training = Training(
        whole(row, "global_batch"), length, optimizer_bytes=12.0, zero_stage=whole(row, "zero_stage")
    )  # fmt: skip
    traits = replace(
        SCALING, attention=known(ATTENTION, row, "attn_kernel"), fused_norms=true(row, "rms_kernel")
    )
    tokens = training.sequences * length
    flops = tokens * (6e9 * number(row, "params_b") + 12 * layers * hidden * length)
    group = (f"{row['model']}-{length // 1024}k", f"{gpus} A100")
    label = (
        f"tp{tp} pp{pp} mb{layout.micro_sequences} {row['attn_kernel']} {row['act_ckpt']} "
        f"rms={row['rms_kernel']}"
    )
    cluster = a100_cluster(gpus, whole(row, "gpus_per_node", 8))
    oom = row.get("status") == "oom" or row.get("oom") == "1"
    time_s = measured_s(row)
    return Observation(
        "scaling", group, model, cluster, layout, training, traits, time_s,
        True if oom else (False if time_s else None), None, flops, gpus * 312e12, label,
    )  # fmt: skip


def _vtrain(row: Row) -> Observation:
    """vTrain, arXiv:2312.12391: Megatron-DeepSpeed, GPT, full recomputation."""
    gpus, per_node = whole(row, "gpus"), whole(row, "gpus_per_node", 8)
    model = gpt(row, 51_200)
    tp, pp = whole(row, "tp"), whole(row, "pp")
    layout = Layout(
        tp=tp,
        pp=pp,
        dp_replicate=whole(row, "dp"),
        micro_sequences=whole(row, "micro_batch"),
        recompute=known(RECOMPUTE, {"act_ckpt": row.get("act_ckpt") or "every_layer"}, "act_ckpt"),
        sequence_parallel=true(row, "sequence_parallel"),
        stage_layers=even(model.n_layers, pp),
    )
    training = Training(
        whole(row, "global_batch"), whole(row, "seq_len"), optimizer_bytes=12.0, zero_stage=0
    )
    model = replace(model, tied_embeddings=pp == 1)
    flops = training.sequences * training.sequence_length * training_flops_per_token(
        model, training.sequence_length
    )  # fmt: skip
    group = (f"GPT-h{model.d_model}", f"{gpus} A100 {row.get('set', '')}")
    label = (
        f"L{model.n_layers} tp{tp} pp{pp} dp{layout.dp_replicate} mb{layout.micro_sequences} "
        f"gbs{training.sequences}"
    )
    return Observation(
        # Layouts of 60 GiB per device have run, so that its A100 are those of 80 GB.
        "vtrain", group, model, a100_cluster(gpus, per_node), layout, training,
        replace(MEGATRON, gradient_bytes=2.0, reduce_bytes=2.0), measured_s(row), None, None,
        flops, gpus * 312e12, label,
    )  # fmt: skip


def _korthikanti(row: Row) -> Observation:
    """arXiv:2205.05198, table 5: Megatron on Selene."""
    gpus, virtual = whole(row, "gpus"), whole(row, "vp")
    model = replace(gpt(row, 51_200), tied_embeddings=False)
    recompute = known(RECOMPUTE, row, "act_ckpt")
    pp, tp = whole(row, "pp"), whole(row, "tp")
    layout = Layout(
        tp=tp,
        pp=pp,
        dp_shard=whole(row, "dp"),
        virtual_stages=virtual,
        schedule="interleaved_1f1b" if virtual > 1 else "1f1b",
        micro_sequences=whole(row, "micro_batch"),
        recompute=recompute,
        sequence_parallel=true(row, "sequence_parallel"),
        stage_layers=even(model.n_layers, pp * virtual),
    )
    training = Training(
        whole(row, "global_batch"), whole(row, "seq_len"), optimizer_bytes=12.0, zero_stage=0
    )
    flops = training.sequences * training.sequence_length * training_flops_per_token(
        model, training.sequence_length
    )  # fmt: skip
    label = f"{row['model']} {recompute} sp={layout.sequence_parallel}"
    return Observation(
        "korthikanti", ("table 5", "A100"), model, a100_cluster(gpus), layout, training,
        # Of six all-reduces per layer, two wait behind the weights' gradients.
        replace(MEGATRON, tensor_overlap=1 / 3),
        measured_s(row), False, None, flops, gpus * 312e12, label,
    )  # fmt: skip


MPT = Traits(
    shared_host=1.0,
    tensor_host=1.0,
    gated=False,
    rotary=False,
    attention="flash1",
    fused_norms=True,
    logits_rows=None,
    logits_bytes=4.0,  # the fused loss writes the gradient over 16-bit logits
    data_overlap=0.9,
)


def _mpt(row: Row) -> Observation:
    """llm-foundry: MPT under FSDP; PURE keeps weights and gradients in 16 bits."""
    gpus, kind = whole(row, "gpus"), kind_of(row["gpu_type"], "h100")
    model = gpt(row, 50_368)
    pure = row["mp_mode"] == "PURE"
    layout = Layout(
        dp_shard=gpus,
        micro_sequences=whole(row, "micro_batch"),
        recompute="full" if true(row, "act_ckpt") else "none",
    )
    training = Training(
        whole(row, "global_batch"),
        whole(row, "seq_len"),
        "fp8" if "fp8" in row["precision"] else "bf16",
        zero_stage=3,
    )
    traits = replace(MPT, reduce_bytes=2.0 if pure else 4.0)
    flops = (
        number(row, "mfu") * (measured_s(row) or 0.0) * gpus
    )  # the source's own share of its peak
    cluster = homogeneous(kind, nodes_of(gpus, 8), 8, 400.0 if kind == "h100" else 200.0)
    peak = DEVICES[kind]["peak_tflops"][training.dtype] * 1e12
    label = (
        f"{row['model']} {gpus}x{kind} T{training.sequence_length} mb{layout.micro_sequences} "
        f"{layout.recompute}"
    )
    return Observation(
        "mpt", ("MPT", f"{row['gpu_type']} {training.dtype}"), model, cluster, layout, training,
        traits, measured_s(row), False, None, flops * peak, gpus * peak, label,
    )  # fmt: skip


TITAN = Traits(
    shared_host=1.0,
    tensor_host=1.0,
    attention="flash2",
    logits_rows=None,
    logits_bytes=12.0,  # 16-bit logits, fp32 copy and log-softmax, 16-bit gradient
    selective="alternate",
    fp8_gathers=True,
    context_gathers=True,
    repeats_keys=True,
)
TITAN_COMPILED_LOSS = "2025-02"
"""Since then its `compile` is also of the loss, which keeps 16-bit logits and their gradient."""


def _titan(row: Row) -> Observation:
    """torchtitan's benchmark pages: Llama 3.1 with a vocabulary of 128,256 and 8 groups of keys."""
    gpus, heads, words = whole(row, "gpus"), whole(row, "heads"), row["techniques"]
    model = ModelConfig(
        128_256, whole(row, "hidden"), whole(row, "layers"), heads, 8, whole(row, "ffn_hidden")
    )
    tp, pp, cp, fsdp = (whole(row, key) for key in ("tp", "pp", "cp", "fsdp"))
    local = whole(row, "local_batch")
    interleaved = "Interleaved" in words
    virtual = 2 if interleaved else 1
    # Its pipelines cut the local batch into as many micro-batches as there are stages.
    micro = max(1, local // (pp * virtual)) if pp > 1 else local
    ckpt = row.get("act_ckpt", "none")
    recompute = "selective" if ckpt.startswith("selective") else RECOMPUTE.get(ckpt, "none")
    layout = Layout(
        dp_shard=fsdp,
        tp=tp,
        pp=pp,
        cp=cp,
        virtual_stages=virtual,
        schedule="interleaved_1f1b" if interleaved else "1f1b",
        micro_sequences=micro,
        recompute=recompute,
        stage_layers=even(model.n_layers, pp * virtual) if pp > 1 else (),
    )
    dtype = "fp8" if row["precision"].startswith("fp8") else "bf16"
    # Under a pipeline weights stay gathered during a step, as Motet's own engine has it.
    training = Training(
        local * fsdp, whole(row, "seq_len"), dtype, zero_stage=3 if pp == 1 else None
    )
    month = re.search(r"(20\d\d)-?(\d\d)", row.get("source", ""))
    fused_loss = "compile" in words and month and "-".join(month.groups()) >= TITAN_COMPILED_LOSS
    traits = replace(
        TITAN,
        logits_bytes=4.0 if fused_loss else TITAN.logits_bytes,
        fused_elementwise="compile" in words,
        tensor_overlap=0.5 if "sync" in words.replace("vanilla", "").lower() else 0.0,
        fp8_gathers="rowwise" not in row["precision"],
        fp8_scaling=0.55 if "rowwise" in row["precision"] else 1.0,
    )
    kind = kind_of(row["gpu_type"], "h100-96-500w")
    cluster = homogeneous(kind, nodes_of(gpus, 8), 8, 400.0)
    tokens = training.sequences * training.sequence_length
    rate = number(row, "tokens_per_s_gpu", -1.0)
    flops = tokens * training_flops_per_token(model, training.sequence_length)
    peak_gib = number(row, "peak_mem_gib", -1.0)
    label = f"{row['model']} {gpus} T{training.sequence_length} {words} {row['precision']} {ckpt}"
    return Observation(
        "torchtitan", ("Llama 3.1", dtype), model, cluster, layout, training, traits,
        tokens / (rate * gpus) if rate > 0 else None, False, peak_gib if peak_gib > 0 else None,
        flops, gpus * 989.4e12, label,
    )  # fmt: skip


MCORE = Traits(
    shared_host=1.0,
    tensor_host=1.0,
    attention="flash3",  # cuDNN's kernels through Transformer Engine
    fused_elementwise=True,
    send_overlap=0.8,
    logits_rows=None,
    weight_bytes=2.0,
    gradient_bytes=4.0,
    reduce_bytes=4.0,
    data_overlap=0.9,
    selective="attention",
)


ROUTED = {"mixtral": (32_000, 8, 0), "qwen2": (151_936, 4, 20_480), "llama3": (128_256, 8, 0)}
"""By how a model's name begins: vocabulary, groups of keys, width of the shared expert; from their
published configurations.
"""


def _mixtral(row: Row) -> Observation:
    """arXiv:2504.14960: Mixtral 8x22B (and its relatives); MCore's plain layout gives experts the
    dense tensor degree.
    """
    gpus, method = whole(row, "gpus"), row["method"]
    hidden, heads = whole(row, "hidden"), whole(row, "heads")
    experts = whole(row, "experts")
    width = whole(row, "moe_ffn")
    family = next((name for name in ROUTED if row["model"].lower().startswith(name)), "mixtral")
    vocabulary, groups, shared = ROUTED[family]
    model = ModelConfig(
        vocabulary, hidden, whole(row, "layers"), heads, groups, width, head_dim=128,
        n_experts=experts, experts_per_token=whole(row, "topk"),
        n_shared_experts=int(shared > 0), d_shared=shared or None,
    )  # fmt: skip
    tp, cp, pp, ep = (whole(row, key) for key in ("tp", "cp", "pp", "ep"))
    sharded = method.startswith("FSDP")
    etp = whole(row, "etp", 1 if sharded or ep == 1 else tp)
    if ep == 1 and not row.get("etp"):
        etp = tp
    virtual = model.n_layers // pp if pp > 1 else 1  # interleaved as far as layers allow
    layout = Layout(
        dp_shard=gpus // (tp * cp * pp), tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, virtual_stages=virtual,
        schedule="interleaved_1f1b" if virtual > 1 else "1f1b",
        stage_layers=even(model.n_layers, pp * virtual),
    )  # fmt: skip
    training = Training(
        whole(row, "global_batch"), whole(row, "seq_len"),
        "fp8" if row.get("precision", "").startswith("fp8") else "bf16",
        optimizer_bytes=12.0, zero_stage=3 if sharded else 1,
    )  # fmt: skip
    tokens = training.sequences * training.sequence_length
    # Its MFU falls with longer sequences, so that it counts the causal half of the scores alone.
    flops = tokens * training_flops_per_token(model, training.sequence_length // 2)
    peak = gpus * 989.4e12
    mfu = number(row, "mfu", -1.0)
    ok = row.get("status", "ok") == "ok" and mfu > 0
    label = (
        f"{row['model']} {method} {gpus} T{training.sequence_length} tp{tp} cp{cp} pp{pp} ep{ep} "
        f"etp{etp}"
    )
    cluster = homogeneous("h100", nodes_of(gpus, 8), 8, 400.0)
    return Observation(
        "mixtral", (row["model"], method), model, cluster, layout, training,
        replace(MCORE, reduce_bytes=2.0) if sharded else MCORE,
        flops / (peak * mfu) if ok else None, row.get("status") == "oom", None, flops, peak, label,
    )  # fmt: skip


READERS: list[tuple[set[str], Reader]] = [
    ({"attn_kernel", "rms_kernel", "zero_stage"}, _scaling),
    ({"stage_sizes", "partition"}, amp),
    ({"experts", "topk", "moe_ffn"}, _mixtral),
    ({"techniques", "tokens_per_s_gpu"}, _titan),
    ({"mp_mode", "fsdp"}, _mpt),
    ({"framework", "gpus_per_node", "tp", "pp"}, _vtrain),
    ({"vp", "act_ckpt", "ffn_hidden"}, _korthikanti),
]
