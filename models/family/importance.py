"""Which channels matter most, and weights with those first: members take the first of each group.

Minitron's rule (arXiv:2407.14679, section 2.2): how large activations are over some sequences,
once, then prefixes. A hidden channel is weighed by what goes into the projection out, key-value
heads with their queries by the norm of what attention gives, a channel of the residual stream by
what the norms of all blocks give. Layers, experts and channels inside routed experts stay.

Torch is needed by `reordered` alone. An order is a permutation of one axis: place -> index before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Orders = Mapping[str, Sequence[int]]
"""By axis: "stream", and "heads" (key-value heads), "hidden" and "shared" behind "blocks.N."."""
STREAM = "stream"
OF_BLOCKS = ("heads", "hidden", "shared")


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of every axis that has an order."""
    found = {STREAM: config.d_model}
    for layer in range(config.n_layers):
        found[f"blocks.{layer}.heads"] = config.n_kv_heads
        if not config.has_experts(layer):
            found[f"blocks.{layer}.hidden"] = config.ffn_width(layer)
        elif config.shared_width:
            found[f"blocks.{layer}.shared"] = config.shared_width
    return found


def dealt(scores: Sequence[float], groups: int) -> list[int]:
    """Return the order that deals indices to equal groups, the most important first in each: the
    first of every group together are the most important of all.

    Of equals the one that stood first goes first.
    """
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [index for group in range(groups) for index in ranked[group::groups]]


def orders_by(scores: Mapping[str, Sequence[float]], groups: int) -> dict[str, list[int]]:
    """Return the orders of axes by what their channels are worth.

    Args:
        groups: of the members; the residual stream and the shared block have one
            (`member.block_cuts`).
    """
    grouped = ("heads", "hidden")
    return {
        axis: dealt(values, groups if axis.rpartition(".")[2] in grouped else 1)
        for axis, values in scores.items()
    }


def weight_orders(
    config: ModelConfig, orders: Orders
) -> Iterator[tuple[str, list[list[int] | None]]]:
    """Yield the name of every weight that moves, and the order of each of its dimensions (None:
    as it was).
    """
    for weight in named_weights(config):
        found = [
            _order(weight, axis, size, orders)
            for axis, size in zip(weight.axes, weight.shape, strict=True)
        ]
        if any(found):
            yield weight.name, found


def _order(weight: WeightSpec, axis: str, size: int, orders: Orders) -> list[int] | None:
    """Return the order of one dimension; a head is all its channels, with those of its queries."""
    block = weight.name.split(".")[1] if weight.name.startswith("blocks.") else ""
    order = orders.get(axis if axis == STREAM else f"blocks.{block}.{axis}")
    if order is None:
        return None
    unit = size // len(order)
    return [index * unit + channel for index in order for channel in range(unit)]


def reordered(value: Tensor, orders: Sequence[list[int] | None]) -> Tensor:
    """Return an unsharded tensor with its dimensions in other orders."""
    import torch

    for dimension, order in enumerate(orders):
        if order is not None:
            value = value.index_select(dimension, torch.tensor(order, device=value.device))
    return value
