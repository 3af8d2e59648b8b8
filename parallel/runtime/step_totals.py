"""What all ranks must know of a global batch: its labels and tokens, and how its tokens chose
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.moe import MoE
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.options import MicroBatch


def count_step(batches: Sequence[MicroBatch], counted: bool, world: World) -> tuple[int, int]:
    """Return labels and tokens of the global batch (a collective).

    Args:
        batches: this rank's micro-batches.
        counted: its micro-batches count: no other rank brings the same.
    """
    mine = batches if counted else ()
    counts = torch.tensor(
        [
            sum(int((batch.labels_BT >= 0).sum()) for batch in mine),
            sum(batch.labels_BT.size for batch in mine),
        ]
    )
    if world.size > 1:
        dist.all_reduce(counts, group=world.control)
    n_labels, n_tokens = counts.tolist()
    return n_labels, n_tokens


def asked(stop: Callable[[], bool]) -> Tensor:
    """Return whether this rank was asked to stop, float64 [1], to be summed over ranks."""
    return torch.tensor([float(stop())], dtype=torch.float64)


def mixtures(decoders: Iterable[Decoder]) -> dict[int, MoE]:
    """Return the mixtures of experts by layer."""
    return {
        int(layer): block.feed_forward
        for decoder in decoders
        for layer, block in decoder.blocks.items()
        if isinstance(block.feed_forward, MoE)
    }


def balance(config: ModelConfig, experts: Mapping[int, MoE], members: bool = False) -> Tensor:
    """Return this rank's share of the balance and router losses, then how often its tokens chose
    each expert.

    Float64 [1 + layers x experts], to be summed over ranks; zeros for layers held elsewhere. Where
    `members` of a family trained, as many again: what even use would have been.
    """
    loss = torch.zeros(1, dtype=torch.float64)
    choices = torch.zeros(1 + members, config.n_layers, config.n_experts, dtype=torch.float64)
    for layer, moe in experts.items():
        loss += moe.sums().double().cpu().sum()
        choices[0, layer] = moe.counts().double().cpu()
        if members:
            choices[1, layer] = moe.expected().cpu()
    return torch.cat([loss, choices.flatten()])


def settle(config: ModelConfig, experts: Mapping[int, MoE], choices: Tensor) -> None:
    """Tell every mixture how often the global batch chose each of its experts; `choices` as
    `balance` has them.
    """
    if not experts:
        return
    counts, *expected = choices.view(-1, config.n_layers, config.n_experts)
    for layer, moe in experts.items():
        moe.end_step(counts[layer], *(even[layer] for even in expected))


def expert_state(experts: Mapping[int, MoE]) -> dict[str, Tensor]:
    """Return "frequencies.blocks.N" and "bias.blocks.N" of the mixtures; a checkpoint loads into
    them.
    """
    return {
        f"{key}.blocks.{layer}": value
        for layer, moe in experts.items()
        for key, value in moe.state().items()
    }
