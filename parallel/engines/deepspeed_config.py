"""Motet's settings as a DeepSpeed configuration, and what a user may add to it.

No torch; DeepSpeed itself only where a function says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from motet.core.errors import suggest
from motet.parallel.layout.nearest import BrokenRule

# What Motet's own settings decide -> the setting, or the reason that there is none.
_PLANNED = "data and experiments: every rank must see the tokens that the plan names"
_MAY_REFUSE = "training.bad_steps, which must be able to refuse an update"
_DECIDED = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "layout.micro_sequences",
    "gradient_accumulation_steps": "batch.sequences and layout.micro_sequences",
    "managed_gradient_accumulation": "batch.sequences and layout.micro_sequences",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "zero_allow_untested_optimizer": "training.optimizer",
    "zero_force_ds_cpu_optimizer": "training.optimizer",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "activation_checkpointing": "layout.recompute",
    "compile": "training.compile",
    "zero_optimization.stage": "layout.zero_stage",
    "zero_optimization.offload_optimizer.device": "layout.offload",
    "zero_optimization.offload_param.device": "layout.offload",
    "zero_optimization.cpu_offload": "layout.offload",
    "zero_optimization.cpu_offload_param": "layout.offload",
    "pipeline": "layout.engine=native with layout.pp",
    "tensor_parallel": "layout.engine=native with layout.tp",
    "sequence_parallel_size": "layout.engine=native with layout.cp",
    "expert_parallel": "layout.engine=native with layout.ep",
    "data_efficiency": _PLANNED,
    "curriculum_learning": _PLANNED,
    "progressive_layer_drop": "model: it would train another model than the one that is saved",
    "compression_training": "model: it would train another model than the one that is saved",
    "weight_quantization": "model: it would train another model than the one that is saved",
    "hybrid_engine": "the step loop, which drives training and scoring itself",
    "autotuning": "the run, which must not stop to try other settings",
    "elasticity": "the layout of each attempt",
    "gradient_allreduce_op": "the loss, which is the mean over all labels of the global batch",
    # Each of these updates weights past the optimizer that asks `Engine.step`'s guard, or hides the
    # norm that it asks about.
    "zero_optimization.compute_grad_norm": "training.bad_steps, which needs the gradient norm",
    "zero_optimization.zenflow": _MAY_REFUSE,
    "zero_optimization.offload_optimizer.super_offload": _MAY_REFUSE,
    "zero_optimization.offload_optimizer.ratio": _MAY_REFUSE,
    "zero_optimization.mics_shard_size": "layout.zero_stage; MiCS is not supported",
    "zero_optimization.mics_hierarchical_params_gather": "layout.zero_stage; MiCS is not supported",
}

# Other sections and values that DeepSpeed reads at the top of its configuration; it ignores a name
# that it does not know.
KNOWN = frozenset(
    {
        "aio",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "comet",
        "csv_monitor",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "flops_profiler",
        "gradient_predivide_factor",
        "graph_harvesting",
        "log_level",
        "memory_breakdown",
        "nebula",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "timers",
        "use_data_before_expert_parallelism",
        "use_node_local_storage",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)
_TOP = KNOWN | {path for path in _DECIDED if "." not in path}


def deepspeed_config(
    *,
    zero_stage: int,
    offload: str,
    clip_norm: float,
    micro_sequences: int,
    world_size: int,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the configuration that DeepSpeed gets.

    Motet counts micro-batches itself, because their number changes along a batch ramp: DeepSpeed
    sees a step of one and is told which is the last.

    Args:
        zero_stage: 1, 2 or 3.
        offload: "none", "optimizer" or "parameters" (which takes the optimizer along).
        extra: settings of the user, added key by key; `problems` says which cannot be.
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        zero["memory_efficient_linear"] = (
            False  # it would replace torch's `linear` in the whole process
        )
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    made = {
        "train_batch_size": micro_sequences * world_size,
        "train_micro_batch_size_per_gpu": micro_sequences,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        # The optimizer is a subclass of torch's AdamW that can refuse an update, also where its
        # state lies in host memory.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return _merged(made, extra)


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in extra.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return out


def problems(
    zero_stage: int, offload: str, extra: Mapping[str, Any], compiled: bool = False
) -> list[BrokenRule]:
    """Return every contradiction between the user's DeepSpeed settings and Motet's, and names that
    DeepSpeed does not read.

    Args:
        compiled: `training.compile`.
    """
    out: list[BrokenRule] = []
    if offload == "parameters" and zero_stage < 3:
        why = (
            "parameters needs weights that are divided: set layout.zero_stage=3 (it is "
            f"{zero_stage}), or layout.offload=optimizer"
        )
        out.append(("layout.offload", why))
    if compiled and zero_stage == 3:
        why = (
            "3 gathers weights in hooks inside the blocks, which training.compile=true forbids; "
            "set it to 2, or training.compile=false"
        )
        out.append(("layout.zero_stage", why))
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        why = (
            f"is {zero!r}; it must be a mapping of ZeRO settings, such as {{reduce_bucket_size: "
            f"100000000}}"
        )
        return [*out, ("layout.deepspeed.zero_optimization", why)]
    for path in _paths(extra):
        decided = _DECIDED.get(path)
        if decided is not None:
            out.append((f"layout.deepspeed.{path}", f"is decided by {decided}; leave it out"))
    for key in extra:
        if key not in _TOP:
            why = f"is not read by DeepSpeed{suggest(key, sorted(_TOP))}"
            out.append((f"layout.deepspeed.{key}", why))
    for name, needed in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        if name in zero and offload not in (needed, "parameters"):
            why = f"has no effect with layout.offload={offload}; set layout.offload={needed}"
            out.append((f"layout.deepspeed.zero_optimization.{name}", why))
    return out


def _paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Return every dotted path, sections before what they hold."""
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def library_problems(config: Mapping[str, Any]) -> list[BrokenRule]:
    """Return what DeepSpeed itself finds wrong with the ZeRO section: names that it does not know,
    values out of range.

    Imports DeepSpeed, which takes seconds.
    """
    known = os.environ.get("DS_ACCELERATOR")
    choose_accelerator(
        "cpu"
    )  # so that the import here looks for no GPU; what is started from here may use one
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    finally:
        if known is None:
            os.environ.pop("DS_ACCELERATOR", None)
    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        return [
            (
                ".".join(("layout.deepspeed.zero_optimization", *map(str, found["loc"]))),
                "is not read by DeepSpeed"
                if found["type"] == "extra_forbidden"
                else f"is refused by DeepSpeed: {found['msg']}",
            )
            for found in error.errors()
        ]
    return []


def choose_accelerator(device: str) -> None:
    """Tell DeepSpeed to compute on the CPU ("cpu"); it reads the variable when it is imported, and
    would ask for a GPU.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
