"""Softmax attention, and which kernel computes it.

B batch, T tokens, H heads, G key-value heads, K channels per head, Q rows of one tile of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from motet.models.flex import attend_within, block_mask, takes
from motet.models.precision import CPU_MULTIPLIES_BF16

TILE_ROWS = 128
TILE_HEADS = 8
TILED_LENGTHS = range(257, 1025)  # where tiles measured faster than SDPA: see docs/models.md


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    mask: Tensor | BlockMask | None,
    softcap: float = 0.0,
) -> Tensor:
    """Return [B, T, H, K]: causal attention, or attention where `mask` (bool [B, 1, T, T], or
    blocks of it) is True. With `softcap` a score is softcap x tanh(score / softcap).

    Query head h reads key-value head h // (H / G) (arXiv:2305.13245). The type is that of `v_BTGK`.
    Without bfloat16 products on a CPU the arithmetic is fp32.
    """
    dtype, device = v_BTGK.dtype, q_BTHK.device.type
    inner = torch.float32 if device == "cpu" and not CPU_MULTIPLIES_BF16 else dtype
    q_BTHK, k_BTGK, v_BTGK = (x.to(inner) for x in (q_BTHK, k_BTGK, v_BTGK))
    with torch.autocast(device, enabled=False):
        if isinstance(mask, BlockMask):
            return attend_within(q_BTHK, k_BTGK, v_BTGK, mask, softcap).to(dtype)
        if softcap:
            return _attend_capped(q_BTHK, k_BTGK, v_BTGK, mask, softcap).to(dtype)
        if _tiles_are_faster(q_BTHK, mask):
            groups = q_BTHK.shape[2] // k_BTGK.shape[2]
            k_BTHK, v_BTHK = (_repeat_heads(x, groups) for x in (k_BTGK, v_BTGK))
            tiled_BTHK: Tensor = _TiledCausalAttention.apply(q_BTHK, k_BTHK, v_BTHK)
            return tiled_BTHK.to(dtype)
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BTGK.transpose(1, 2),
            v_BTGK.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
        )
    return mixed_BHTK.transpose(1, 2).to(dtype)


def _attend_capped(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Tensor | None, softcap: float
) -> Tensor:
    """Do so in plain products, which keep all scores: no fused kernel for CPUs caps them."""
    groups, length = q_BTHK.shape[2] // k_BTGK.shape[2], q_BTHK.shape[1]
    k_BHTK, v_BHTK = (_repeat_heads(x, groups).transpose(1, 2) for x in (k_BTGK, v_BTGK))
    scores_BHTT = q_BTHK.transpose(1, 2) @ k_BHTK.mT * q_BTHK.shape[-1] ** -0.5
    scores_BHTT = softcap * torch.tanh(scores_BHTT.float() / softcap)
    if mask is None:
        order_T = torch.arange(length, device=q_BTHK.device)
        mask = order_T[:, None] >= order_T
    weights_BHTT = scores_BHTT.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights_BHTT.to(v_BHTK.dtype) @ v_BHTK).transpose(1, 2)


def document_positions(document_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions that restart at each document, and the number of each token's document, both
    int64 [B, T].

    A document is a run of equal ids: an id that returns after another one is a new document.
    """
    order_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_BT = torch.where(starts_BT, order_T, 0).cummax(1).values
    return order_T - first_BT, starts_BT.cumsum(1)


def document_places(
    document_ids_BT: Tensor, head_width: int = 0
) -> tuple[Tensor, Tensor | BlockMask]:
    """Return positions int64 [B, T] that restart at each document, and the mask between documents.

    The mask is a `BlockMask` where `flex.takes` heads of `head_width` channels, else, and always
    without a width, bool [B, 1, T, T].
    """
    positions_BT, _ = document_positions(document_ids_BT)
    order_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    return positions_BT, visible(order_T - positions_BT, head_width)


def visible(first_BT: Tensor, head_width: int = 0) -> Tensor | BlockMask:
    """Return the mask under which a token sees itself and what came before, from a first token on.

    Args:
        first_BT: int64, the index of the first token that each one sees; never falls along T.
        head_width: as in `document_places`.
    """
    if takes(first_BT.device, first_BT.shape[1], head_width):
        return block_mask(first_BT)
    order_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    causal_TT = order_T[:, None] >= order_T
    return ((order_T >= first_BT[:, :, None]) & causal_TT)[:, None]


def _tiles_are_faster(q_BTHK: Tensor, mask: Tensor | None) -> bool:
    return (
        mask is None
        and not torch.compiler.is_compiling()
        and type(q_BTHK) is Tensor
        and q_BTHK.device.type == "cpu"
        and q_BTHK.dtype == torch.float32
        and q_BTHK.shape[1] in TILED_LENGTHS
        and torch.is_grad_enabled()
        and q_BTHK.requires_grad
    )


def _repeat_heads(x_BTGK: Tensor, groups: int) -> Tensor:
    return x_BTGK if groups == 1 else x_BTGK.repeat_interleave(groups, dim=2)


class _TiledCausalAttention(torch.autograd.Function):
    """Causal attention in tiles of queries, each against the keys before it; softmax is redone in
    backward.

    `TILE_HEADS` heads at a time, so that a tile's scores [H, Q, T] stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        q_BHTK = (q_BTHK * q_BTHK.shape[-1] ** -0.5).transpose(1, 2).contiguous()
        k_BHTK, v_BHTK = (x.transpose(1, 2).contiguous() for x in (k_BTHK, v_BTHK))
        mixed_BHTK = torch.empty_like(q_BHTK)
        for mixed, q, k, v in _groups(mixed_BHTK, q_BHTK, k_BHTK, v_BHTK):
            for start, stop in _tiles(q.shape[1]):
                weights_HQT = _tile_weights(q, k, start, stop)
                torch.bmm(weights_HQT, v[:, :stop], out=mixed[:, start:stop])
        ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTK)
        return mixed_BHTK.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        slope_BHTK = gradients[0].transpose(1, 2).contiguous()
        q_slope, k_slope, v_slope = (torch.zeros_like(x) for x in saved)
        with torch.autocast("cpu", enabled=False):
            for group in _groups(*saved, slope_BHTK, q_slope, k_slope, v_slope):
                _add_slopes(*group)
        q_slope.mul_(q_slope.shape[-1] ** -0.5)
        return q_slope.transpose(1, 2), k_slope.transpose(1, 2), v_slope.transpose(1, 2)


def _groups(*tensors_BHTK: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views [`TILE_HEADS` or fewer, T, K] over the heads of all sequences, in step."""
    return zip(*(x.flatten(0, 1).split(TILE_HEADS) for x in tensors_BHTK), strict=True)


def _add_slopes(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add the gradients of one group of heads to `dq`, `dk`, `dv`; all tensors [H, T, K], `slope`
    that of the output.
    """
    for start, stop in _tiles(q.shape[1]):
        rows, seen = slice(start, stop), slice(0, stop)
        weights_HQT = _tile_weights(q, k, start, stop)
        dv[:, seen].baddbmm_(weights_HQT.mT, slope[:, rows])
        scores_HQT = torch.ops.aten._softmax_backward_data(
            torch.bmm(slope[:, rows], v[:, seen].mT), weights_HQT, -1, q.dtype
        )
        torch.bmm(scores_HQT, k[:, seen], out=dq[:, rows])
        dk[:, seen].baddbmm_(scores_HQT.mT, q[:, rows])


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE_ROWS, length)) for start in range(0, length, TILE_ROWS)]


def _tile_weights(q_HTK: Tensor, k_HTK: Tensor, start: int, stop: int) -> Tensor:
    scores_HQT = torch.bmm(q_HTK[:, start:stop], k_HTK[:, :stop].mT)
    future_QQ = scores_HQT.new_full((stop - start, stop - start), float("-inf")).triu(1)
    scores_HQT[:, :, start:].add_(future_QQ)
    return torch.softmax(scores_HQT, -1)
