"""Which module is split how: tensor parallelism over DTensors, FSDP2 over what is left.

`models.architecture` says how each weight may be divided.
Weights are DTensors, so that FSDP2, checkpoints and gradients know how they are split; modules
compute on their own part (`models.precision.own`) and the residual stream changes hands at four
places in a block, by DTensor's own redistribution (Megatron-LM, arXiv:1909.08053, section 3;
sequence parallel: arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

from motet.models.architecture import (
    Split,
    WeightSpec,
    block_weights,
    first_weights,
    last_weights,
)
from motet.models.decoder import Decoder
from motet.models.loss import VocabularyShard
from motet.models.moe import MoE
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import gathers_again
from motet.parallel.runtime.mesh import Meshes
from motet.parallel.runtime.options import EngineOptions

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
    _split_experts(model, layout, meshes)
    _split_data(model, root, layout, meshes, options)


def _split_tensors(model: Decoder, layout: Layout, mesh: DeviceMesh) -> None:
    """Split every weight as its list says; let the stream in and out of what has parts."""
    config, stream = model.config, _Stream(mesh, layout.sequence_parallel)
    if model.embedding is not None:
        _hold(model, first_weights(config), layout, stream)
        if layout.vocabulary_parallel:
            model.embedding.first_row = mesh.get_local_rank() * (
                config.vocabulary_size // layout.tp
            )
            model.embedding.register_forward_hook(stream.leave_hook)
        elif layout.sequence_parallel:
            model.embedding.register_forward_hook(stream.part_hook)
    for layer, block in model.blocks.items():
        weights = block_weights(config, int(layer))
        _hold(block, weights, layout, stream)
        # Where tensor parallelism divides nothing (a mixture), sequence parallelism has given every
        # rank its own tokens: no exchange is needed.
        for region in {w.region: None for w in weights if w.split in (Split.COLUMNS, Split.ROWS)}:
            stream.wrap(getattr(block, region))
    if model.norm is not None:
        _hold(model, last_weights(config), layout, stream)
        model.norm.register_forward_hook(
            stream.enter_hook if layout.vocabulary_parallel else stream.whole_hook
        )
        if layout.vocabulary_parallel:
            model.vocabulary = _vocabulary_shard(config.vocabulary_size, mesh)


def _hold(root: nn.Module, weights: Iterable[WeightSpec], layout: Layout, stream: _Stream) -> None:
    """Make weights below `root` DTensors, but for those of experts, and say how their gradients
    add up.
    """
    mesh = stream.mesh
    for spec in weights:
        if spec.is_expert:
            continue
        owner, _, name = spec.name.rpartition(".")
        module = root.get_submodule(owner)
        dimension = spec.split.tensor_dimension
        if spec.split is Split.VOCABULARY and not layout.vocabulary_parallel:
            dimension = None
        placement: Placement = Replicate() if dimension is None else Shard(dimension)
        _distribute(module, name, mesh, placement)
        # A rank that met other heads or other tokens than the rest has a part of the sum.
        apart = spec.split is Split.HEADS or (
            spec.split is Split.STREAM and stream.sequence_parallel
        )
        module.gradient_placements = [Partial() if apart else placement]  # type: ignore[assignment]
        if spec.is_norm and dimension is not None:  # one norm over the heads of all ranks
            module.mean_of_all = _mean_over(mesh)  # type: ignore[assignment]


def _vocabulary_shard(size: int, mesh: DeviceMesh) -> VocabularyShard:
    group = mesh.get_group()

    def reduce(operation: Any) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            dist.all_reduce(x, op=operation, group=group)
            return x

        return apply

    first = mesh.get_local_rank() * (size // mesh.size())
    return VocabularyShard(first, reduce(dist.ReduceOp.MAX), reduce(dist.ReduceOp.SUM))


def _mean_over(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    def mean(x: Tensor) -> Tensor:
        total = DTensor.from_local(x / mesh.size(), mesh, [Partial()], run_check=False)
        return total.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    return mean


class _Stream:
    """How the residual stream [B, T, D] is held between regions, enters and leaves them."""

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


def _experts_of(model: Decoder) -> Iterator[tuple[MoE, dict[str, WeightSpec]]]:
    """Yield every mixture, and the weights of its experts by the name that they have there."""
    for layer, block in model.blocks.items():
        if isinstance(block.feed_forward, MoE):
            weights = block_weights(model.config, int(layer))
            found = {w.name.rpartition(".")[2]: w for w in weights if w.is_expert}
            yield block.feed_forward, found


def _split_experts(model: Decoder, layout: Layout, meshes: Meshes) -> None:
    """Experts over ep, their hidden channels over etp; rows travel by `ExpertExchange`."""
    if layout.ep * layout.etp == 1:
        return
    from motet.parallel.runtime.expert_parallel import ExpertExchange

    assert meshes.experts is not None
    mesh = meshes.experts["ep", "etp"]
    for moe, weights in _experts_of(model):
        for name, spec in weights.items():
            dimension = spec.split.expert_dimension
            assert dimension is not None
            _distribute(moe.experts, name, mesh, Shard(0), Shard(dimension))
        moe.exchange = ExpertExchange(
            moe.config.n_experts,
            meshes.experts["ep"].get_group(),
            meshes.experts["etp"].get_group(),
        )


def _split_data(
    model: Decoder, root: nn.Module, layout: Layout, meshes: Meshes, options: EngineOptions
) -> None:
    """Apply FSDP2 to every group of experts, every block, and the rest."""
    settings: dict[str, Any] = {
        "mp_policy": _policy(options),
        "reshard_after_forward": gathers_again(model.config, layout),
    }
    for moe, weights in _experts_of(model):
        dimensions = {getattr(moe.experts, n): w.data_dimension for n, w in weights.items()}

        def placement(weight: nn.Parameter, known: dict[Any, int] = dimensions) -> Shard:
            return Shard(known[weight])

        fully_shard(
            moe.experts, mesh=meshes.expert_data(), shard_placement_fn=placement, **settings
        )
    for block in model.blocks.values():
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
