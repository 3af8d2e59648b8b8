"""Attention within documents without a [T, T] mask: PyTorch's FlexAttention (arXiv:2412.05496).

B batch, T tokens, H heads, G key-value heads, K channels per head, N = ceil(T / 128) blocks of a
sequence.

A bool mask costs B x T x T bytes and takes the flash kernels away. A `BlockMask` says per tile of
128 queries and 128 keys whether
the tile is empty, whole, or to be masked element by element: B x N x N small numbers, and empty
tiles are never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK_TOKENS = 128  # the tile that the kernels are tuned for
MIN_LENGTH = 256  # below, a bool mask is small, and there is no tile to leave out
HEAD_WIDTHS = range(16, 257)  # what the Triton kernels take
DEVICES = {
    "cuda"
}  # where documents are masked this way; on a CPU FlexAttention has no backward pass


def takes(device: torch.device, length: int, head_width: int) -> bool:
    """Tell whether documents of sequences like these are masked by a `BlockMask` rather than by a
    bool mask.
    """
    return device.type in DEVICES and length >= MIN_LENGTH and head_width in HEAD_WIDTHS


def block_mask(first_BT: Tensor) -> BlockMask:
    """Return the mask under which a token sees itself and what came before it, from the start of
    its own document or of its window on.

    Made from the starts of documents by arithmetic on blocks: `create_block_mask` would first fill
    the [B, T, T] square. Nothing waits for the device.

    Args:
        first_BT: int64, the index of the first token that each token sees; never falls along T.
    """
    length, device = first_BT.shape[1], first_BT.device
    n_blocks = -(-length // BLOCK_TOKENS)
    block_N = torch.arange(n_blocks, device=device)
    ends_N = (block_N + 1) * BLOCK_TOKENS
    # Starts never fall, so a block's first query reaches back furthest and its last one
    # least.
    furthest_BN = first_BT[:, ::BLOCK_TOKENS]
    nearest_BN = first_BT[:, (ends_N - 1).clamp(max=length - 1)]
    before_NN = block_N[:, None] > block_N
    seen_BNN = (furthest_BN[:, :, None] < ends_N) & before_NN
    whole_BNN = (nearest_BN[:, :, None] <= block_N * BLOCK_TOKENS) & before_NN
    whole_BNN &= (ends_N <= length)[:, None]  # a last, shorter block of queries is masked
    partial_BNN = (seen_BNN & ~whole_BNN) | torch.eye(n_blocks, dtype=torch.bool, device=device)

    first_BT = first_BT.int()  # read by the kernel for every query

    def within_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= first_BT[b, q]) & (kv <= q)

    return BlockMask.from_kv_blocks(
        *_listed(partial_BNN),
        *_listed(whole_BNN),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=within_document,
        seq_lengths=(length, length),
    )


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, int32 [B, 1, N], and their numbers
    first in [B, 1, N, N].
    """
    counts_BN = chosen_BNN.sum(-1, dtype=torch.int32)
    order_BNN = chosen_BNN.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts_BN[:, None], order_BNN[:, None].contiguous()


def attend_within(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: BlockMask, softcap: float = 0.0
) -> Tensor:
    """Return [B, T, H, K]: attention where `mask` allows it; scores as in `attention.attend`.

    All of one type; query head h reads key-value head h // (H / G).
    """
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled()

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mixed_BHTK: Tensor = kernel(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        score_mod=capped if softcap else None,
        block_mask=mask,
        enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    """Compile FlexAttention, once; without compilation it fills the whole square of scores."""
    return torch.compile(flex_attention)
