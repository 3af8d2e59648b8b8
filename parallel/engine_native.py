"""The native engine: PyTorch's own FSDP2 or DDP around a Decoder, with AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initial_value
from motet.parallel.engine import EngineOptions, Judge, MicroBatch, StepResult
from motet.parallel.mesh import World

RESHARD_ABOVE_BYTES = 2 * 2**30
"""Above this, weights are gathered again in the backward pass instead of being kept from the forward pass."""

_ValueOf = Callable[[str, tuple[int, ...]], Tensor]
_JudgeNorm = Callable[[float], bool]


class NativeEngine:
    """A Decoder on the ranks of a world: FSDP2 when sharded, DDP when replicated, bare on one rank."""

    def __init__(self, config: ModelConfig, options: EngineOptions, world: World) -> None:
        self.config, self.options, self.world = config, options, world
        with torch.device("meta"):
            self.model = Decoder(config)
        self.model.set_recompute(options.recompute)
        if options.compile:
            for block in self.model.blocks:
                block.compile()
        sharded = options.shard and world.size > 1
        if sharded:
            _shard(self.model, options, world)
        self.model.to_empty(device=world.device)
        self.parameters = dict(self.model.named_parameters())  # each rank's own part, for good
        self._fill(lambda name, shape: initial_value(name, shape, config, options.seed))
        self.wrapped: nn.Module = self.model
        if world.size > 1 and not sharded:
            self.wrapped = DistributedDataParallel(self.model, process_group=dist.group.WORLD)
        self.optimizer = _adamw(self.parameters, options)

    def _fill(self, value_of: _ValueOf) -> None:
        """Set every weight from its unsharded value; each rank keeps its own part."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = value_of(name, tuple(parameter.shape)).to(parameter.device, parameter.dtype)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.copy_(value)

    def step(
        self,
        batches: Sequence[MicroBatch],
        expected_labels: int,
        lr: float,
        judge: Judge,
        stop: bool,
    ) -> StepResult:
        """See `Engine.step`."""
        scale = self.world.size / expected_labels
        totals = torch.zeros(4, dtype=torch.float64)
        for number, batch in enumerate(batches):
            with self._synchronise(number == len(batches) - 1):
                totals[:3] += self._forward_backward(batch, scale)
        totals[3] = float(stop)
        if self.world.size > 1:
            dist.all_reduce(totals, group=self.world.control)
        cross_entropy, z_loss, n_labels, stops = totals.tolist()
        correction = expected_labels / max(n_labels, 1.0)
        loss, z_mean = cross_entropy / max(n_labels, 1.0), z_loss / max(n_labels, 1.0)
        grad_norm, applied = self._update(correction, lr, lambda norm: judge(loss, norm))
        return StepResult(loss, z_mean, grad_norm, int(n_labels), applied, stops > 0)

    def _forward_backward(self, batch: MicroBatch, scale: float) -> Tensor:
        """Return [cross-entropy, z-loss, labels] summed over one micro-batch, float64, and add its gradient."""
        tokens_BT, labels_BT, ids_BT = self._to_device(batch)
        with self._autocast():
            sums = self.wrapped(
                tokens_BT, labels_BT, ids_BT, mode="loss", z_loss=self.options.z_loss
            )
        (sums.cross_entropy * scale).backward()  # its gradient holds the z-loss's (see LossSums)
        parts = torch.stack([sums.cross_entropy, sums.z_loss, sums.n_labels.float()])
        return parts.detach().double().cpu()

    def _to_device(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return int64 tokens, labels and document ids on the device."""
        ids = batch.document_ids_BT
        arrays = (batch.tokens_BT, batch.labels_BT, ids)
        tensors = [
            None
            if array is None
            else torch.from_numpy(array).to(self.world.device, torch.int64, non_blocking=True)
            for array in arrays
        ]
        assert tensors[0] is not None
        assert tensors[1] is not None
        return tensors[0], tensors[1], tensors[2]

    def _update(self, correction: float, lr: float, judge: _JudgeNorm) -> tuple[float, bool]:
        """Scale, judge, clip and apply the gradient; return its norm and whether it was applied."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if correction != 1.0:
            torch._foreach_mul_(gradients, correction)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        applied = judge(float(norm))
        if applied:
            if self.options.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(
                    self.parameters.values(), self.options.clip_norm, norm
                )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), applied

    def _synchronise(self, last: bool) -> AbstractContextManager[object]:
        """Reduce gradients over ranks with the last micro-batch only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        """Compute in bf16 where asked; under FSDP2 its mixed-precision policy does that instead."""
        if self.options.precision != "bf16" or isinstance(self.model, FSDPModule):
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    @torch.no_grad()
    def score(
        self, tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """See `Engine.score`."""
        with self._autocast():
            scores = self.model(
                torch.from_numpy(tokens_BT).to(self.world.device),
                torch.from_numpy(labels_BT).to(self.world.device),
                mode="score",
            )
        return scores.logprob.double().cpu().numpy(), scores.greedy.cpu().numpy()

    def finish_scoring(self) -> None:
        """See `Engine.finish_scoring`: FSDP2 would otherwise keep weights gathered, and show them as parameters."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine.tensors`: "model.N", "exp_avg.N", "exp_avg_sq.N" and "step.N" for every weight N."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"{key}.{name}"] = value
        return found

    def full_model(self) -> dict[str, Tensor]:
        """See `Engine.full_model`."""
        full: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.world.rank == 0:
                full[name] = value.cpu().clone()
        return full

    def load_model(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_model`."""
        self._fill(lambda name, _: state[name])


def _shard(model: Decoder, options: EngineOptions, world: World) -> None:
    """Apply FSDP2 to every block, then to the rest."""
    policy = MixedPrecisionPolicy()
    if options.precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    total_bytes = sum(parameter.numel() for parameter in model.parameters()) * 4
    reshard = total_bytes > RESHARD_ABOVE_BYTES
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)


def _adamw(parameters: dict[str, nn.Parameter], options: EngineOptions) -> torch.optim.AdamW:
    """Return AdamW with its state in place, so that a checkpoint can be loaded before the first step."""
    decayed = [p for name, p in parameters.items() if p.ndim >= 2 and "embed" not in name]
    plain = [p for name, p in parameters.items() if p.ndim < 2 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=options.betas,
        eps=options.eps,
        fused=options.fused,
    )
    for parameter in parameters.values():
        device = parameter.device if options.fused else "cpu"
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
        }
    return optimizer
