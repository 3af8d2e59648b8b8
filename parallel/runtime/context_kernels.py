"""Attention of one piece with its log-sum-exp, forward and backward: the kernels of the ring.

B batch, T tokens, H heads, G key-value heads, K channels per head, R = H / G, Q rows of one tile of
queries, S tokens of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 128


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums over pieces: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


Slopes = tuple[Tensor, Tensor, Tensor]


class Kernel(NamedTuple):
    """Attention of one piece that also gives its log-sum-exp, and its backward pass, on views [B,
    H, T, K].

    forward(q, k, v, causal) -> out [B, H, T, K], log-sum-exp [B, H, T].
    backward(slope, q, k, v, out, lse, causal=...) -> gradients of q, k, v. With `out` and `lse` of
    *all* keys these are the piece's exact share of the whole (softmax weights are exp(score -
    lse)).
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., Slopes]


# The public `scaled_dot_product_attention` returns no log-sum-exp, without which pieces cannot be
# merged: hence the ATen operators that it calls. Both take fewer key-value heads than heads.


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(slope: Tensor, *saved: Tensor, causal: bool) -> Slopes:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(slope, *saved, 0.0, causal)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _cuda_backward(slope: Tensor, *saved: Tensor, causal: bool) -> Slopes:
    q, k, v, out, lse = saved
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    # No cumulated lengths (None): sequences are equally long. Random numbers are read with dropout
    # only.
    lengths = None, None, q.shape[2], k.shape[2]
    random = torch.empty(2, dtype=torch.uint64, device=q.device)
    return backward(slope, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, random, random)


def _tiles(q_BGRTK: Tensor, k_BGTK: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield which queries, the keys that they may need, their scaled scores [B, G, R x Q, S]."""
    groups, length, width = q_BGRTK.shape[2:]
    for start in range(0, length, TILE_ROWS):
        # Scores of one tile at a time: all of them would be T x S.
        stop = min(start + TILE_ROWS, length)
        seen = slice(0, stop if causal else k_BGTK.shape[2])
        # Heads that share keys stand in one product, below each other.
        part = q_BGRTK[..., start:stop, :].flatten(2, 3)
        scores = (part @ k_BGTK[:, :, seen].mT).mul_(width**-0.5)
        if causal:
            future = scores.new_full((stop - start, stop), float("-inf")).triu(start + 1)
            scores.add_(future.repeat(groups, 1))
        yield slice(start, stop), seen, scores


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, ...] -> [B, G, R, ...], as wide as softmax wants."""
    return x.unflatten(1, (heads, -1)).to(sum_dtype(x.dtype))


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Do the same in plain products, a tile of queries at a time, in fp32 or wider."""
    q_BGRTK = _grouped(q, k.shape[1])
    k, v = (x.to(q_BGRTK.dtype) for x in (k, v))
    out, lse = torch.empty_like(q_BGRTK), q_BGRTK.new_empty(q_BGRTK.shape[:-1])
    for rows, seen, scores in _tiles(q_BGRTK, k, causal):
        total = scores.logsumexp(-1)
        weights = scores.sub_(total[..., None]).exp_()
        out[..., rows, :] = (weights @ v[:, :, seen]).unflatten(2, (q_BGRTK.shape[2], -1))
        lse[..., rows] = total.unflatten(2, (q_BGRTK.shape[2], -1))
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _tiled_backward(slope: Tensor, *saved: Tensor, causal: bool) -> Slopes:
    q, k, v, out, lse = saved
    grouped = (_grouped(x, k.shape[1]) for x in (q, slope, out, lse))
    q_BGRTK, slope_BGRTK, out_BGRTK, lse_BGRT = grouped
    k, v = (x.to(q_BGRTK.dtype) for x in (k, v))
    dq, dk, dv = torch.empty_like(q_BGRTK), torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen, scores in _tiles(q_BGRTK, k, causal):
        part, up, mixed = (x[..., rows, :].flatten(2, 3) for x in (q_BGRTK, slope_BGRTK, out_BGRTK))
        # Softmax weights again, from the log-sum-exp of all keys and not of this piece's alone.
        weights = scores.sub_(lse_BGRT[..., rows].flatten(2)[..., None]).exp_()
        dv[:, :, seen] += weights.mT @ up
        # Softmax's gradient needs the mean of its own; the output knows it (arXiv:2205.14135, B.2).
        mean = (up * mixed).sum(-1, keepdim=True)
        weights.mul_((up @ v[:, :, seen].mT).sub_(mean)).mul_(q.shape[-1] ** -0.5)
        dq[..., rows, :] = (weights @ k[:, :, seen]).unflatten(2, (q_BGRTK.shape[2], -1))
        dk[:, :, seen] += weights.mT @ part
    return dq.flatten(1, 2), dk, dv


KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward),
    "cuda": Kernel(_cuda_forward, _cuda_backward),
    "tiles": Kernel(_tiled_forward, _tiled_backward),
}


def choose_kernel(q_BTHK: Tensor, k_BTGK: Tensor, dtype: torch.dtype) -> str:
    """Return the name in `KERNELS` of the fastest one that takes these shapes in `dtype`."""
    if q_BTHK.device.type == "cpu":
        return "cpu" if dtype in (torch.float32, torch.float64, torch.bfloat16) else "tiles"
    if q_BTHK.device.type != "cuda" or q_BTHK.shape[-1] % 8:  # the operator itself pads nothing
        return "tiles"
    q, k = (torch.empty_like(x, dtype=dtype).transpose(1, 2) for x in (q_BTHK, k_BTGK))
    asked = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, False, q.shape[1] != k.shape[1])
    return "cuda" if torch.backends.cuda.can_use_flash_attention(asked) else "tiles"
