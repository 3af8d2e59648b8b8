"""Which module is split how: tensor parallelism over DTensors, FSDP2 over what is left.

Weights are DTensors, so that FSDP2, checkpoints and gradients know how they are split; modules
compute on their own part (`models.precision.own`) and the residual stream changes hands at four
places in a block, by DTensor's own redistribution (Megatron-LM, arXiv:1909.08053, section 3;
sequence parallel: arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from motet.models.decoder import Decoder
from motet.models.layers import Attention, Block, FeedForward
from motet.models.loss import VocabularyShard
from motet.models.moe import Experts, MoE
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import gathers_again
from motet.parallel.runtime.mesh import Meshes

SEQUENCE = 1  # the dimension of [B, T, D] that sequence parallelism splits


def split(
    model: Decoder, root: nn.Module, layout: Layout, meshes: Meshes, options: EngineOptions
) -> None:
    """Split a decoder, or a stage of one, over the ranks of its stage.

    Args:
        model: on the meta device.
        root: the module whose forward pass the engine calls: `model`, or what wraps it.
    """
    if layout.tp > 1:
        _split_tensors(model, layout, meshes.dense["tp"])
    for block in model.blocks.values():
        if isinstance(block.feed_forward, MoE):
            _split_experts(block.feed_forward, layout, meshes)
    _split_data(model, root, layout, meshes, options)


def _split_tensors(model: Decoder, layout: Layout, mesh: DeviceMesh) -> None:
    """Column-parallel into heads and hidden channels, row-parallel out of them; embedding and head
    by vocabulary.
    """
    stream = _Stream(mesh, layout.sequence_parallel)
    if model.embedding is not None:
        _split_vocabulary(model.embedding, layout, mesh)
        if layout.vocabulary_parallel:
            model.embedding.first_row = mesh.get_local_rank() * (
                model.config.vocabulary_size // layout.tp
            )
            model.embedding.register_forward_hook(stream.leave_hook)
        elif layout.sequence_parallel:
            model.embedding.register_forward_hook(stream.part_hook)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        _split_block(block, stream)
    if model.norm is not None:
        stream.replicate(model.norm)
        model.norm.register_forward_hook(
            stream.enter_hook if layout.vocabulary_parallel else stream.whole_hook
        )
        if model.head is not None:
            _split_vocabulary(model.head, layout, mesh)
        if layout.vocabulary_parallel:
            model.vocabulary = _vocabulary_shard(model.config.vocabulary_size, mesh)


def _split_vocabulary(module: nn.Module, layout: Layout, mesh: DeviceMesh) -> None:
    _distribute(module, "weight", mesh, Shard(0) if layout.vocabulary_parallel else Replicate())


def _vocabulary_shard(size: int, mesh: DeviceMesh) -> VocabularyShard:
    group = mesh.get_group()

    def reduce(operation: Any) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            dist.all_reduce(x, op=operation, group=group)
            return x

        return apply

    first = mesh.get_local_rank() * (size // mesh.size())
    return VocabularyShard(first, reduce(dist.ReduceOp.MAX), reduce(dist.ReduceOp.SUM))


def _split_block(block: Block, stream: _Stream) -> None:
    attention, feed_forward = block.attention, block.feed_forward
    mesh = stream.mesh
    for norm in (block.attention_norm, block.feed_forward_norm):
        stream.replicate(norm)
    for name in ("q_proj", "k_proj", "v_proj"):
        _distribute_all(getattr(attention, name), mesh, Shard(0))
    _distribute(attention.o_proj, "weight", mesh, Shard(1))
    _split_head_norms(attention, mesh)
    stream.wrap(attention)
    if isinstance(feed_forward, FeedForward):
        for name in ("gate_proj", "up_proj"):
            _distribute(getattr(feed_forward, name), "weight", mesh, Shard(0))
        _distribute(feed_forward.down_proj, "weight", mesh, Shard(1))
        stream.wrap(feed_forward)
    else:
        # Sequence parallelism has given every rank its own tokens: the router and the shared expert
        # need no exchange.
        for module in feed_forward.modules():
            if (
                any(True for _ in module.parameters(recurse=False))
                and module is not feed_forward.experts
            ):
                stream.replicate(module)


def _split_head_norms(attention: Attention, mesh: DeviceMesh) -> None:
    """Norms of queries and keys see this rank's heads only."""
    for norm in (attention.q_norm, attention.k_norm):
        if norm is None:
            continue
        if attention.norm_each_head:
            _distribute(norm, "weight", mesh, Replicate())
            norm.gradient_placements = [Partial()]
        else:
            _distribute(norm, "weight", mesh, Shard(0))
            norm.mean_of_all = _mean_over(mesh)


def _mean_over(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    def mean(x: Tensor) -> Tensor:
        total = DTensor.from_local(x / mesh.size(), mesh, [Partial()], run_check=False)
        return total.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    return mean


class _Stream:
    """How the residual stream [B, T, D] is held between regions, and how it enters and leaves them."""

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh = mesh
        self.sequence_parallel = sequence_parallel
        self.held: Placement = Shard(SEQUENCE) if sequence_parallel else Replicate()

    def enter(self, x_BTD: Tensor, gradient: Placement) -> Tensor:
        """Return the whole stream on every rank; each rank's gradient is a part of the sum, or the
        whole.
        """
        held = DTensor.from_local(x_BTD, self.mesh, [self.held], run_check=False)
        return held.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])

    def leave(self, y_BTD: Tensor) -> Tensor:
        """Add up what the ranks computed, and hold the sum as the stream is held."""
        part = DTensor.from_local(y_BTD, self.mesh, [Partial()], run_check=False)
        return part.redistribute(placements=[self.held]).to_local()

    def part(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's tokens of a stream that every rank has."""
        whole = DTensor.from_local(x_BTD, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[self.held]).to_local()

    def wrap(self, region: nn.Module) -> None:
        """Let the stream enter before a module and leave after it."""
        region.register_forward_pre_hook(
            lambda _, args: (self.enter(args[0], Partial()), *args[1:])
        )
        region.register_forward_hook(self.leave_hook)

    def replicate(self, module: nn.Module) -> None:
        """Hold a module's weights whole; with sequence parallelism each rank's gradient is a part
        of the sum.
        """
        _distribute_all(module, self.mesh, Replicate())
        if self.sequence_parallel:
            module.gradient_placements = [Partial()]  # type: ignore[assignment]

    def enter_hook(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.enter(output, Partial())

    def whole_hook(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.enter(output, Replicate())

    def leave_hook(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.leave(output)

    def part_hook(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.part(output)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Placement) -> None:
    """Make one weight, still without value, a DTensor."""
    weight = getattr(module, name)
    value = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(value))
    if not isinstance(module, Experts):  # whose weights are split differently from each other
        module.gradient_placements = list(placements)  # type: ignore[assignment]


def _distribute_all(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        _distribute(module, name, mesh, placement)


def _split_experts(moe: MoE, layout: Layout, meshes: Meshes) -> None:
    """Experts over ep, their hidden channels over etp; rows travel by `ExpertExchange`."""
    if layout.ep * layout.etp == 1:
        return
    from motet.parallel.runtime.expert_parallel import ExpertExchange

    assert meshes.experts is not None
    mesh = meshes.experts["ep", "etp"]
    for name in ("gate_proj", "up_proj"):
        _distribute(moe.experts, name, mesh, Shard(0), Shard(1))
    _distribute(moe.experts, "down_proj", mesh, Shard(0), Shard(2))
    moe.exchange = ExpertExchange(
        moe.config.n_experts, meshes.experts["ep"].get_group(), meshes.experts["etp"].get_group()
    )


def _split_data(
    model: Decoder, root: nn.Module, layout: Layout, meshes: Meshes, options: EngineOptions
) -> None:
    """Apply FSDP2 to every group of experts, every block, and the rest."""
    settings: dict[str, Any] = {
        "mp_policy": _policy(options),
        "reshard_after_forward": gathers_again(model.config, layout),
    }
    for block in model.blocks.values():
        if isinstance(block.feed_forward, MoE):
            experts = block.feed_forward.experts
            down = experts.down_proj

            # [E, F, D] and [E, D, F]: FSDP2 splits D, which ep and etp leave whole.
            def width(weight: nn.Parameter, down: nn.Parameter = down) -> Shard:
                return Shard(1 if weight is down else 2)

            fully_shard(experts, mesh=meshes.expert_data(), shard_placement_fn=width, **settings)
        fully_shard(block, mesh=meshes.data(), **settings)
    # The backward pass begins where the root's forward pass ends: what it gathered is needed again
    # at once.
    fully_shard(root, mesh=meshes.data(), **(settings | {"reshard_after_forward": False}))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Gradients are sums over the labels of the step: nothing is averaged over ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _policy(options: EngineOptions) -> MixedPrecisionPolicy:
    if options.precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
