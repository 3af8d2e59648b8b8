"""Channels in the order of their importance: measured on a model as it lies over ranks, then moved.

T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.family.importance import STREAM, Orders, axis_sizes, reordered, weight_orders
from motet.models.layers import Block, FeedForward
from motet.models.moe import MoE
from motet.parallel.runtime.dtensors import local, own_part, whole
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.options import MicroBatch

_Score = dict[str, Tensor]


def measured(
    decoder: Decoder, tp_rank: int, run: Callable[[], None], world: World
) -> dict[str, list[float]]:
    """Return how large the activations of every axis are, summed over what `run` feeds to the
    decoder on all ranks (a collective).

    Args:
        tp_rank: which of the equal parts of heads and hidden channels lies here.
        run: calls the decoder some times.
    """
    sums: _Score = {
        axis: torch.zeros(size, dtype=torch.float64)
        for axis, size in axis_sizes(decoder.config).items()
    }
    with _watched(decoder, sums, tp_rank), torch.no_grad():
        run()
    for value in sums.values():
        if world.size > 1:
            dist.all_reduce(value, group=world.control)
    return {axis: value.tolist() for axis, value in sums.items()}


def read_through(score: Callable[..., Any], batches: Sequence[MicroBatch]) -> None:
    """Let a model read some sequences, without labels: no row meets the head."""
    for batch in batches:
        tokens_BT = batch.tokens_BT.astype(np.int64)
        score(tokens_BT, np.full_like(tokens_BT, -100))


@contextmanager
def _watched(decoder: Decoder, sums: _Score, tp_rank: int) -> Iterator[None]:
    """Add up what passes through a decoder's modules; compiled blocks run uncompiled meanwhile."""
    hooks, compiled = [], {}
    for layer, block in decoder.blocks.items():
        assert isinstance(block, Block)
        compiled[block], block._compiled_call_impl = block._compiled_call_impl, None
        norms = (block.attention_norm, block.feed_forward_norm)
        add_stream = partial(_add_stream, sums[STREAM])
        hooks += [norm.register_forward_hook(add_stream) for norm in norms]
        add = partial(_add_heads, sums[f"blocks.{layer}.heads"], tp_rank, decoder.config)
        hooks.append(block.attention.o_proj.register_forward_pre_hook(add))
        feed: nn.Module | None = block.feed_forward
        axis = f"blocks.{layer}.hidden"
        if isinstance(feed, MoE):
            feed, axis = feed.shared, f"blocks.{layer}.shared"
        if isinstance(feed, FeedForward):
            add = partial(_add_hidden, sums[axis], tp_rank)
            hooks.append(feed.down_proj.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _add_stream(sum_C: Tensor, _: nn.Module, __: Any, output: Tensor) -> None:
    sum_C += output.abs().flatten(0, -2).sum(0, dtype=torch.float64).cpu()


def _add_hidden(sum_C: Tensor, part: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    mine_C = args[0].abs().flatten(0, -2).sum(0, dtype=torch.float64).cpu()
    first = 0 if len(mine_C) == len(sum_C) else part * len(mine_C)
    sum_C[first : first + len(mine_C)] += mine_C


def _add_heads(
    sum_C: Tensor, part: int, config: ModelConfig, _: nn.Module, args: tuple[Any, ...]
) -> None:
    """Add the norms of what key-value heads give, with all their queries."""
    channels = config.query_width // config.n_kv_heads
    mine_TC = args[0].unflatten(-1, (-1, channels)).float().norm(dim=-1).flatten(0, -2)
    first = 0 if mine_TC.shape[1] == len(sum_C) else part * mine_TC.shape[1]
    sum_C[first : first + mine_TC.shape[1]] += mine_TC.sum(0, dtype=torch.float64).cpu()


@torch.no_grad()
def move(tensors: Mapping[str, Tensor], config: ModelConfig, orders: Orders) -> None:
    """Put the channels of this rank's parts of tensors into other orders (a collective).

    One tensor at a time is whole on a rank.

    Args:
        tensors: "KIND.N" for weights N, as `Engine.tensors` gives them: a weight's moments move
            with it, and a teacher that is kept.
    """
    moved = dict(weight_orders(config, orders))
    for key, value in tensors.items():
        order = moved.get(key.partition(".")[2])
        if order is not None and value.ndim == len(order):
            local(value).copy_(own_part(reordered(whole(value), order), value))
