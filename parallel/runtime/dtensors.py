"""What one rank holds of a weight: its own part, who else holds it, and the optimizer over all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from motet.parallel.runtime.options import EngineOptions

NO_MULTIPLIERS: Mapping[str, float] = MappingProxyType({})


def local(value: Tensor) -> Tensor:
    """Return the memory that this rank holds of a tensor, outside autograd."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def own_part(whole: Tensor, like: Tensor, only: int | None = None) -> Tensor:
    """Return the part of an unsharded value that this rank holds of `like`.

    Cut innermost mesh dimension first: FSDP2 splits what tensor parallelism has left of a weight,
    and both cut as `torch.chunk`.

    Args:
        only: the one dimension that is cut; None = all that are.
    """
    if not isinstance(like, DTensor):
        return whole
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    for index in reversed(range(like.device_mesh.ndim)):
        dimension = getattr(like.placements[index], "dim", None)
        if dimension is not None and only in (None, dimension):
            pieces = whole.chunk(like.device_mesh.size(index), dimension)
            held = coordinate[index]
            whole = pieces[held] if held < len(pieces) else whole.narrow(dimension, 0, 0)
    return whole


def own_indices(like: Tensor) -> list[Tensor]:
    """Return which indices of each dimension this rank's part of a weight has, int64 each."""
    found = []
    for dimension, size in enumerate(like.shape):
        shape = [1] * like.ndim
        shape[dimension] = size
        found.append(own_part(torch.arange(size).view(shape), like, dimension).flatten())
    return found


def whole(value: Tensor) -> Tensor:
    """Return a weight unsharded on every rank that holds a part of it (a collective).

    Outermost mesh dimension first: what FSDP2 split of a tensor-parallel part comes together before
    the parts do.
    """
    if not isinstance(value, DTensor):
        return value
    placements = list(value.placements)
    for index in range(len(placements)):
        placements[index] = Replicate()
        value = value.redistribute(placements=placements)
    return value.to_local()


def holders(parameter: Tensor) -> int:
    """Return how many ranks of a pipeline stage hold the same part of a weight as this one."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, p in enumerate(parameter.placements) if p.is_replicate())


def fill(
    parameters: Mapping[str, Tensor], value_of: Callable[[str, tuple[int, ...]], Tensor]
) -> None:
    """Set every weight from its unsharded value, asked for by name and shape; each rank keeps its
    own part.
    """
    for name, parameter in parameters.items():
        value = value_of(name, tuple(parameter.shape))
        local(parameter).copy_(own_part(value, parameter))


def norm_squared(parameters: Iterable[Tensor]) -> Tensor:
    """Return this rank's share of the squared norm of the gradient, float64 [1]: parts that several
    ranks hold count once.
    """
    parts = [(p, p.grad) for p in parameters if p.grad is not None]
    if not parts:  # a pipeline rank whose blocks nobody ran
        return torch.zeros(1, dtype=torch.float64)
    norms = torch._foreach_norm([local(gradient) for _, gradient in parts])
    weights = torch.tensor([1.0 / holders(p) for p, _ in parts], dtype=torch.float64)
    return (torch.stack(norms).double().cpu().square() * weights).sum().view(1)


def reshard(root: nn.Module) -> None:
    """Give back the weights that FSDP2 keeps gathered after a forward pass, and would show as
    parameters.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return "model.N" and the optimizer's "exp_avg.N", "exp_avg_sq.N" and "step.N" of every weight
    N: the tensors that train.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            found[f"{key}.{name}"] = value
    return found


def clip(parameters: Iterable[Tensor], norm: float, most: float) -> None:
    """Scale every rank's part of the gradient so that its norm, now `norm`, is at most `most`; 0 =
    no clipping.
    """
    if 0 < most < norm:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, most / (norm + 1e-6))


def adamw(
    parameters: Mapping[str, nn.Parameter],
    options: EngineOptions,
    multipliers: Mapping[str, float] = NO_MULTIPLIERS,
) -> torch.optim.AdamW:
    """Return AdamW with its state in place, so that a checkpoint can be loaded before the first
    step.

    Matrices outside the embedding decay. One group holds weights of one mesh: the fused kernel
    takes no mixture.

    Args:
        multipliers: width multipliers by name (`EngineOptions.base_width`), by which the rate of a
            group is divided; it has its own beside it.
    """
    optimizer = torch.optim.AdamW(
        _groups(parameters, options.weight_decay, multipliers),
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


def _groups(
    parameters: Mapping[str, nn.Parameter], decay: float, multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return groups of weights of one decay, one mesh and one width multiplier each."""
    groups: dict[tuple[bool, object, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim >= 2 and "embed" not in name
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((decays, mesh, multipliers.get(name, 1.0)), []).append(parameter)
    return [
        {
            "params": members,
            # AdamW takes rate x decay of a value away: as much at any width.
            "weight_decay": decay * multiplier if decays else 0.0,
            "width_multiplier": multiplier,
        }
        for (decays, _, multiplier), members in groups.items()
    ]
