"""The DeepSpeed engine: ZeRO 1, 2 and 3 (arXiv:1910.02054), with optimizer state and weights in
host memory if asked (arXiv:2101.06840).

DeepSpeed divides gradients, optimizer state and weights over all ranks and moves them; what a step
means stays Motet's. Weights are fp32 and bf16 is autocast, as in the native engine. The update is
`GuardedAdamW`'s, which DeepSpeed calls once per flat partition after it has computed the global
gradient norm.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initial_value
from motet.models.growth.state import WeightState
from motet.parallel.engines.data_parallel import DataParallelEngine, Trained
from motet.parallel.engines.deepspeed_config import choose_accelerator, deepspeed_config
from motet.parallel.engines.protocol import EngineOptions, Guard
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.dtensors import whole
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.step_totals import expert_state

STATES = ("exp_avg", "exp_avg_sq")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that asks before it changes anything."""

    may_step: Callable[[], bool]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of `param_groups` as they are now, or leave weights and state
        alone.
        """
        self.make_state()
        if self.may_step():
            super().step(closure)

    def make_state(self) -> None:
        """Let the state exist of all that `param_groups` hold now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    device = parameter.device if group["fused"] else "cpu"
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=device),
                        **{key: torch.zeros_like(parameter) for key in STATES},
                    }


class DeepSpeedEngine(DataParallelEngine):
    """A Decoder under ZeRO; every rank reads its own sequences."""

    needs_all_layers = True

    def __init__(
        self, config: ModelConfig, options: EngineOptions, layout: Layout, world: World
    ) -> None:
        super().__init__(config, options, layout, world)
        self.deepspeed = _import_deepspeed(world.device.type)
        # Joins the process group that there is; `zero.Init` needs it before `initialize` would.
        self.deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
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
        autocast = world.device.type if options.precision == "bf16" else None
        self.trained = Trained(self.decoder, autocast, options.z_loss)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.trained,
            optimizer=self.adamw,
            config=self.settings,
            dist_init_required=False,
        )
        # On the CPU: what `tensors` returns goes to a checkpoint, into which each rank writes its
        # own slice.
        self.mesh = DeviceMesh("cpu", torch.arange(world.size))
        self._make_state()

    def _construction(self) -> AbstractContextManager[object]:
        """Under ZeRO-3 a module's weights are divided as soon as it is made: no rank ever holds the
        whole model.
        """
        if self.options.zero_stage < 3:
            return contextlib.nullcontext()
        return self.deepspeed.zero.Init(config_dict_or_path=self.settings)

    def _prepare_decoder(self) -> None:
        decoder, config = self.decoder, self.config
        if self.options.zero_stage < 3:
            decoder.to(self.world.device)
        else:
            # The decoder itself multiplies by the head's weight, outside of the head's own forward
            # pass.
            holder = decoder.embedding if decoder.head is None else decoder.head
            assert holder is not None
            self.deepspeed.zero.register_external_parameter(decoder, holder.weight)
        decoder.recompute = self.layout.recompute
        if self.options.compile:
            for block in decoder.blocks.values():
                block.compile()
        for name, shape in self.shapes.items():
            self._set_weight(name, initial_value(name, shape, config, self.options.seed))

    def _set_weight(self, name: str, value: Tensor) -> None:
        """Set the copy of a weight that the forward pass uses (a collective); `value` is whole on
        every rank.
        """
        parameter = self.parameters[name]
        with torch.no_grad(), self._gathered(parameter, write=True):
            parameter.copy_(value)

    def _gathered(self, parameter: nn.Parameter, write: bool) -> AbstractContextManager[object]:
        if self.options.zero_stage < 3:
            return contextlib.nullcontext()
        return self.deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if write else None
        )

    def _adamw(self) -> GuardedAdamW:
        """Return the optimizer; matrices outside the embedding decay."""
        groups: dict[bool, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            # Not the parameter's own shape: ZeRO-3 has left it empty.
            decays = len(self.shapes[name]) >= 2 and "embed" not in name
            groups.setdefault(decays, []).append(parameter)
        options = self.options
        return GuardedAdamW(
            [
                {"params": members, "weight_decay": options.weight_decay if decays else 0.0}
                for decays, members in groups.items()
            ],
            lr=0.0,
            betas=options.betas,
            eps=options.eps,
            fused=options.fused,
        )

    def _make_state(self) -> None:
        """Let optimizer state exist, and be known to DeepSpeed, before the first step: a step on a
        few tokens that is refused.

        ZeRO 1 and 2 take note of all state when the first partition is updated, ZeRO 3 brings its
        partitions one by one.
        """
        self.adamw.make_state()
        tokens_BT = torch.zeros(1, 8, dtype=torch.int64, device=self.world.device)
        with self._micro_batch(last=True):
            objective, _ = self._run(tokens_BT, tokens_BT, None, train=True)
            self._backward(objective)
        self._update(0.0, 0.0, lambda loss, grad_norm: False)

    def _run(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.engine(tokens_BT, labels_BT, document_ids_BT, train)
        return result

    def _micro_batch(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr: float, loss: float, guard: Guard) -> tuple[float, bool]:
        """See `DataParallelEngine._update`.

        The guard is asked in the first of DeepSpeed's calls of the optimizer. DeepSpeed makes none
        when it finds that the norm is not finite; then the guard is told so afterwards.
        """
        verdict = _Verdict(lambda norm: guard(loss, norm), self._norm)
        self.adamw.may_step = verdict.ask
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.engine.step()
        if verdict.applied is None:
            verdict.ask()
            return verdict.grad_norm, False
        return verdict.grad_norm, verdict.applied

    def _norm(self) -> float:
        """Return the norm of the gradients that are about to be applied, nan where DeepSpeed found
        it not finite.

        The optimizer's own attribute, because `get_global_grad_norm` still shows that of the step
        before. Set so since 0.18.
        """
        norm = float(self.engine.optimizer._global_grad_norm)
        return norm if norm >= 0 and math.isfinite(norm) else math.nan

    def finish_scoring(self) -> None:
        """See `Engine.finish_scoring`: DeepSpeed gives weights back after every pass."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine.tensors`; copies on the CPU, cut along the first dimension over all ranks.

        Gathered one at a time, so that no rank holds more than one whole tensor.
        """
        step = self._steps()[0].detach().cpu()
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"model.{name}"] = self._slice(self._master(parameter), name)
            for key in STATES:
                value = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                found[f"{key}.{name}"] = self._slice(value, name)
            found[f"step.{name}"] = step.clone()
        return found | expert_state(self.experts)

    def _steps(self) -> list[Tensor]:
        """Return the step counters of all partitions, which are equal."""
        return [state["step"] for state in self.adamw.state.values() if "step" in state]

    def _master(self, parameter: nn.Parameter) -> Tensor:
        value: Tensor = self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        return value

    def _slice(self, value: Tensor, name: str) -> Tensor:
        """Return this rank's rows of a whole tensor, as part of a distributed one."""
        shape = torch.Size(self.shapes[name])
        pieces = value.detach().view(shape).chunk(self.world.size)
        held = self.world.rank < len(pieces)
        mine = pieces[self.world.rank] if held else value.view(shape).narrow(0, 0, 0)
        return DTensor.from_local(
            mine.cpu().clone(),
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`; whole tensors pass through one at a time."""
        for name in self.parameters:
            self._set_trained(name, whole(tensors[f"model.{name}"]))
            for key in STATES:
                self._set_state(name, whole(tensors[f"{key}.{name}"]), key)
        first = next(iter(self.parameters))
        for step in self._steps():
            step.copy_(tensors[f"step.{first}"])

    def _set_trained(self, name: str, value: Tensor) -> None:
        """Set a weight: the copy that the forward pass uses, and the one that is updated."""
        self._set_weight(name, value)
        self._set_state(name, value, None)

    def _set_state(self, name: str, value: Tensor, key: str | None) -> None:
        """Set this rank's partition of the trained weight (key None) or of its optimizer state."""
        parameter, utils = self.parameters[name], self.deepspeed.utils
        if self.options.zero_stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        size = -(-value.numel() // self.world.size)  # as ZeRO-3 cuts every weight
        mine = _padded_part(value, size, self.world.rank)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, key)

    def export_state(self) -> Iterator[tuple[str, WeightState]]:
        """See `Engine.export_state`; DeepSpeed gathers one weight at a time."""
        utils, step = self.deepspeed.utils, self._steps()[0].detach().cpu()
        for name, parameter in self.parameters.items():
            parts = {"weight": self._master(parameter)}
            parts |= {key: utils.safe_get_full_optimizer_state(parameter, key) for key in STATES}
            shaped = {
                key: value.detach().view(self.shapes[name]).cpu().clone()
                for key, value in parts.items()
            }
            yield name, shaped | {"step": step.clone()}
        for name, value in expert_state(self.experts).items():
            yield name, {"value": value.cpu().clone()}

    def import_state(self, state: Iterable[tuple[str, WeightState]]) -> None:
        """See `Engine.import_state`; all weights share one count of steps."""
        experts = expert_state(self.experts)
        missing = {*self.parameters, *experts}
        for name, parts in state:
            missing.discard(name)
            if name in experts:
                experts[name].copy_(parts["value"])
            elif name in self.parameters:
                self._set_trained(name, parts["weight"].to(self.world.device))
                for key in STATES:
                    self._set_state(name, parts[key].to(self.world.device), key)
                for step in self._steps():
                    step.copy_(parts["step"])
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")

    def full_model(self) -> dict[str, Tensor]:
        """See `Engine.full_model`."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = self._master(parameter)
            if self.world.rank == 0:
                state[name] = value.detach().view(self.shapes[name]).cpu().clone()
        return state

    def load_model(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_model`."""
        for name in self.parameters:
            self._set_trained(name, state[name].float())


class _Verdict:
    """The guard's answer about one update, asked for once."""

    def __init__(self, guard: Callable[[float], bool], norm: Callable[[], float]) -> None:
        self._guard, self._norm = guard, norm
        self.applied: bool | None = None
        self.grad_norm = math.nan

    def ask(self) -> bool:
        if self.applied is None:
            self.grad_norm = self._norm()
            self.applied = self._guard(self.grad_norm)
        return self.applied


def _padded_part(value: Tensor, size: int, rank: int) -> Tensor:
    """Return the elements of a flat tensor that ZeRO-3 keeps on a rank: `size` each, zeros past the
    end.
    """
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def _import_deepspeed(device: str) -> Any:
    """Return the library, imported for a device, without warnings that no user of Motet can act
    on.
    """
    choose_accelerator(device)
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.addFilter(
        lambda record: "untested optimizer" not in record.getMessage()  # `GuardedAdamW` is AdamW
    )
    return deepspeed
