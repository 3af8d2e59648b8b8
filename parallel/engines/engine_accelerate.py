"""The Accelerate engine: FSDP2 or DDP as `accelerate launch` and the user's accelerate
configuration say.

Accelerate reads that configuration from the environment that its launcher sets. Started without it,
the layout decides: FSDP2 over all ranks, or DDP with `layout.dp_shard=1`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initial_value
from motet.parallel.engines.data_parallel import DataParallelEngine, Trained
from motet.parallel.engines.deepspeed_config import choose_accelerator
from motet.parallel.engines.protocol import EngineOptions, Guard
from motet.parallel.engines.tensor_state import TensorState
from motet.parallel.layout.layout import Layout, LayoutError
from motet.parallel.runtime.dtensors import adamw, clip, fill, norm_squared, reshard
from motet.parallel.runtime.mesh import World

WRAPPED = "Block"
"""The class of module that FSDP2 gathers as one."""


def contradictions(environment: Mapping[str, str], precision: str) -> list[str]:
    """Return what a user's accelerate configuration asks for that Motet's settings decide, or that
    this engine does not do.

    Args:
        environment: as `accelerate launch` leaves it.
        precision: "fp32" or "bf16". Accelerate says "no" also when it was not asked, so that is
            never a contradiction.
    """

    def on(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true", "yes")

    out = []
    if on("ACCELERATE_USE_DEEPSPEED"):
        out.append("it uses DeepSpeed; set layout.engine=deepspeed and layout.deepspeed instead")
    if on("ACCELERATE_USE_MEGATRON_LM"):
        out.append(
            "it uses Megatron-LM; set layout.engine=native with layout.tp and layout.pp instead"
        )
    if on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        out.append("it has a parallelism_config; set layout.engine=native with its degrees instead")
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", precision):
        out.append(
            f"mixed_precision is {asked}, and training.precision is {precision}; make them agree"
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        out.append("gradient_accumulation_steps is decided by batch.sequences; set it to 1")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        out.append("dynamo_backend is decided by training.compile; set it to no")
    return out + (fsdp_contradictions(environment) if on("ACCELERATE_USE_FSDP") else [])


def fsdp_contradictions(environment: Mapping[str, str]) -> list[str]:
    """Return what the FSDP section of such a configuration asks for, as `contradictions` does."""

    def on(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true", "yes")

    out = []
    if environment.get("FSDP_VERSION", "1") != "2":
        out.append("fsdp_version is 1, whose weights are not distributed tensors; set it to 2")
    if on("FSDP_ACTIVATION_CHECKPOINTING"):
        out.append("fsdp_activation_checkpointing is decided by layout.recompute; set it to false")
    if on("FSDP_OFFLOAD_PARAMS"):
        out.append(
            "fsdp_offload_params is not supported; set layout.engine=deepspeed with "
            "layout.offload=parameters"
        )
    return out


class AccelerateEngine(TensorState, DataParallelEngine):
    """A Decoder prepared by Accelerate; every rank reads its own sequences."""

    def __init__(
        self, config: ModelConfig, options: EngineOptions, layout: Layout, world: World
    ) -> None:
        super().__init__(config, options, layout, world)
        found = contradictions(os.environ, options.precision)
        if found:
            raise LayoutError("layout.accelerate_config: " + "; ".join(found))
        asked = dict(os.environ)
        self.accelerator = _accelerator(options, layout, world)
        for name in set(os.environ) - set(asked):
            del os.environ[name]  # Accelerate's own marks: another engine would take them for asked
        sharded = self.accelerator.is_fsdp2
        self.decoder = decoder = Decoder(config)
        decoder.recompute = layout.recompute
        if options.compile:
            for block in decoder.blocks.values():
                block.compile()
        rounds = options.precision == "bf16" and not sharded  # FSDP2's policy does it there
        self.trained = Trained(decoder, world.device.type if rounds else None, options.z_loss)
        self.sums_each, self.trained.touches = sharded, not sharded and world.size > 1
        self.model, self.optimizer = self.accelerator.prepare(
            self.trained, adamw(dict(decoder.named_parameters()), options)
        )
        self.parameters = dict(decoder.named_parameters())  # each rank's own part, for good
        fill(self.parameters, lambda name, shape: initial_value(name, shape, config, options.seed))
        self._place_state()

    def _place_state(self) -> None:
        """Give the optimizer its state anew: `prepare` has put other weights in the place of those
        that it was made for.
        """
        state = self.optimizer.optimizer.state
        state.clear()
        state.update(adamw(self.parameters, self.options).state)

    def _run(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.model(tokens_BT, labels_BT, document_ids_BT, train)
        return result

    def _micro_batch(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _update(self, lr: float, loss: float, guard: Guard) -> tuple[float, bool]:
        """See `DataParallelEngine._update`.

        Clipped by hand: Accelerate's `clip_grad_norm_` tells the norm only once it has changed the
        gradients.
        """
        grad_norm = self._norm()
        applied = guard(loss, grad_norm)
        if applied:
            clip(self.parameters.values(), grad_norm, self.options.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, applied

    def _norm(self) -> float:
        """Return the norm of the gradient; under DDP every rank holds all of it."""
        total = norm_squared(self.parameters.values())
        if any(isinstance(p, DTensor) for p in self.parameters.values()):
            dist.all_reduce(total, group=self.world.control)
        return math.sqrt(total.item())

    def finish_scoring(self) -> None:
        """See `Engine.finish_scoring`."""
        reshard(self.model)

    def adam(self) -> torch.optim.Optimizer:
        """See `TensorState.adam`."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer


def _accelerator(options: EngineOptions, layout: Layout, world: World) -> Any:
    """Return an `Accelerator` that joins the process group there is."""
    choose_accelerator(world.device.type)  # Accelerate imports DeepSpeed where it is installed
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    plugin = _fsdp2(options) if _wants_fsdp(os.environ, layout, world) else None
    on_cpu = world.device.type == "cpu"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # `training.precision` is obeyed by FSDP2's policy or by `Trained`
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if on_cpu and plugin is not None:
        # Accelerate 1.15 turns to FSDP on accelerators only. Its FSDP2 code has no need of one:
        # chosen here by hand.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _wants_fsdp(environment: Mapping[str, str], layout: Layout, world: World) -> bool:
    if world.size == 1:
        return False
    if "ACCELERATE_MIXED_PRECISION" in environment:  # set by every `accelerate launch`
        return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return layout.dp_shard > 1


def _fsdp2(options: EngineOptions) -> Any:
    """Return the FSDP2 plugin: the user's where `accelerate launch` left one, with what Motet's
    settings decide.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    settings: dict[str, Any] = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    if "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        settings["auto_wrap_policy"] = "transformer_based_wrap"
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        settings["transformer_cls_names_to_wrap"] = [WRAPPED]
    plugin = FullyShardedDataParallelPlugin(**settings)
    if options.precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return plugin
