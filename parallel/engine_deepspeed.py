"""The DeepSpeed engine: ZeRO 1, 2 and 3 (arXiv:1910.02054), with optimizer state and weights in host memory if asked (arXiv:2101.06840).

DeepSpeed divides gradients, optimizer state and weights over all ranks and moves them; what a step means stays Motet's. Weights
are fp32 and bf16 is autocast, as in the native engine. The update is `JudgedAdamW`'s, which DeepSpeed calls once per
flat partition after it has computed the global gradient norm.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initial_value
from motet.parallel.data_parallel import Trained, DataParallelEngine
from motet.parallel.deepspeed_config import deepspeed_config
from motet.parallel.engine import EngineOptions, Judge
from motet.parallel.layout import Layout
from motet.parallel.mesh import World
from motet.parallel.parts import local, own_part

STATES = ("exp_avg", "exp_avg_sq")


class JudgedAdamW(torch.optim.AdamW):
    """AdamW that asks before it changes anything; its state exists after the first call, whatever the answer."""

    may_step: Callable[[], bool]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of `param_groups` as they are now, or leave weights and state alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    device = parameter.device if group["fused"] else "cpu"
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=device),
                        **{key: torch.zeros_like(parameter) for key in STATES},
                    }
        if self.may_step():
            super().step(closure)


class DeepSpeedEngine(DataParallelEngine):
    """A Decoder under ZeRO; every rank reads its own sequences."""

    def __init__(
        self, config: ModelConfig, options: EngineOptions, layout: Layout, world: World
    ) -> None:
        super().__init__(config, options, layout, world)
        self.deepspeed = _import_deepspeed(world)
        self.settings = deepspeed_config(
            zero_stage=options.zero_stage,
            offload=options.offload,
            clip_norm=options.clip_norm,
            micro_sequences=layout.micro_sequences,
            world_size=world.size,
            extra=options.deepspeed,
        )
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in Decoder(config).named_parameters()}
        self.shapes: dict[str, tuple[int, ...]] = shapes
        with self._construction():
            self.decoder = Decoder(config)
        self.parameters = dict(self.decoder.named_parameters())
        self._prepare_decoder()
        self.adamw = self._adamw()
        self.adamw.may_step = lambda: False
        autocast = world.device.type if options.precision == "bf16" else None
        self.engine, *_ = self.deepspeed.initialize(
            model=Trained(self.decoder, autocast, options.z_loss),
            optimizer=self.adamw,
            config=self.settings,
            dist_init_required=False,
        )
        # DTensors on the CPU: what `tensors` returns goes to a checkpoint, where each rank writes its own slice.
        self.mesh = DeviceMesh("cpu", torch.arange(world.size))
        self._make_state()
