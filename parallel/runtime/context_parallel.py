"""Context parallel attention: each rank holds a part of every sequence, keys and values go around a
ring.

B batch, T tokens (of this rank, where no full sequence is meant), H heads, G key-value heads, K
channels per head, R = H / G, Q rows of one tile of queries, S tokens of keys.

Source: Ring Attention (arXiv:2310.01889); the split that gives all ranks equal causal work follows
Striped Attention (arXiv:2311.09431), with two chunks per rank, one from the head and one from the
tail. PyTorch's own ring (`torch.distributed.tensor.experimental`) dispatches CUDA kernels only and
knows no documents; this one is written for gloo and CPU as for NCCL and CUDA. Of the CUDA kernels
only signatures, shapes and types are tested; none has run yet.

Documents need no mask: they are contiguous, so what a block of queries may see of a block of keys
is a few full rectangles (`Piece`), each a plain kernel call, and what no document needs is not
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from motet.models.precision import CPU_MULTIPLIES_BF16

TILE_ROWS = 128
ALL = slice(None)


def chunk_order(cp: int) -> list[tuple[int, int]]:
    """Return for each rank the two of 2 x `cp` equal chunks of a sequence that it holds, in order."""
    return [(rank, 2 * cp - 1 - rank) for rank in range(cp)]


def context_slice(x_BT: Tensor, rank: int, cp: int) -> Tensor:
    """Return [B, T / cp, ...]: the positions that `rank` of `cp` holds of [B, T, ...].

    Raises:
        ValueError: T is not a multiple of 2 x `cp`.
    """
    length, chunks = x_BT.shape[1], 2 * cp
    if length == 0 or length % chunks:
        raise ValueError(
            f"a sequence of {length:,} tokens does not split into {chunks} equal chunks (2 x the "
            "context"
            f" parallel degree {cp}); nearest is {max(chunks, round(length / chunks) * chunks):,}"
        )
    parts = x_BT.split(length // chunks, dim=1)
    first, second = chunk_order(cp)[rank]
    return torch.cat((parts[first], parts[second]), dim=1)


def context_join(parts: Sequence[Tensor], cp: int) -> Tensor:
    """Return [B, T, ...] from what `context_slice` gave to ranks 0 .. `cp` - 1."""
    chunks: dict[int, Tensor] = {}
    for order, part in zip(chunk_order(cp), parts, strict=True):
        chunks |= zip(order, part.chunk(2, dim=1), strict=True)
    return torch.cat([chunks[place] for place in range(2 * cp)], dim=1)


def ring_bytes(
    tokens_local: int, kv_width: int, bytes_per_value: int, cp: int, segments: bool
) -> dict[str, int]:
    """Return the bytes that one rank sends in one layer, "forward" and "backward".

    forward = (cp - 1) x tokens x (2 x kv_width x bytes_per_value + (8 if segments)): keys and
    values, and int64 segments once. backward = (cp - 1) x tokens x 2 x kv_width x (bytes_per_value
    + max(4, bytes_per_value)): keys and values once more, and their gradients, which travel in fp32
    or wider. A rank's gradient of its own keys waits at home, so gradients move cp - 1 times and
    not cp times. Recomputation in backward sends the forward bytes again.

    Args:
        tokens_local: tokens that a rank holds, all sequences of the micro-batch together.
        kv_width: key-value heads of this rank x channels per head.
        bytes_per_value: of the values' type.
        cp: ranks in the ring.
        segments: whether `RingAttention` gets a tensor of segments (not a `Plan`, which was paid
            for before).
    """
    moved, values = (cp - 1) * tokens_local, 2 * kv_width
    return {
        "forward": moved * (values * bytes_per_value + 8 * segments),
        "backward": moved * values * (bytes_per_value + max(4, bytes_per_value)),
    }


@dataclass(frozen=True)
class Piece:
    """Queries that see keys, as slices of what two ranks hold.

    Attributes:
        rows: sequences of the batch.
        queries, keys: tokens.
        causal: query i sees keys 0 .. i (there are as many of both); else every query sees every
            key.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Plan:
    """What one rank computes for sequences of `tokens` local tokens: `steps[s]` with the keys of
    rank - s.
    """

    tokens: int
    steps: tuple[tuple[Piece, ...], ...]


def causal_piece(rank: int, source: int, tokens: int) -> Piece:
    """Return what the queries of `rank` see of the keys of `source`: half of the square, for every
    pair of ranks.

    Own keys: the local order is the true order, so plain causal attention. Keys of an earlier rank:
    its first chunk lies before both of ours, its second after both. Keys of a later rank: only our
    second chunk sees any, and it sees both.
    """
    every, half = slice(0, tokens), tokens // 2
    if source == rank:
        return Piece(ALL, every, every, causal=True)
    if source < rank:
        return Piece(ALL, every, slice(0, half), causal=False)
    return Piece(ALL, slice(half, tokens), every, causal=False)


def document_pieces(whole: Piece, queries_BT: Tensor, keys_BT: Tensor) -> tuple[Piece, ...]:
    """Return the parts of `whole` in which queries and keys share a document.

    Args:
        whole: what is seen without documents.
        queries_BT, keys_BT: int64 CPU tensors, the segments of both ranks; a segment is contiguous.
    """
    rows = []
    for ids_T, key_ids_T in zip(queries_BT.unbind(), keys_BT.unbind(), strict=True):
        queries = _runs(ids_T[whole.queries], whole.queries.start)
        keys = _runs(key_ids_T[whole.keys], whole.keys.start)
        shared = [segment for segment in queries if segment in keys]
        rows.append([replace(whole, queries=queries[s], keys=keys[s]) for s in shared])
    if all(row == rows[0] for row in rows):
        return tuple(rows[0])
    return tuple(replace(x, rows=slice(b, b + 1)) for b, row in enumerate(rows) for x in row)


def _runs(ids_T: Tensor, offset: int) -> dict[int, slice]:
    """Return where each segment stands; `offset` is the place of the first token."""
    ids, counts = torch.unique_consecutive(ids_T, return_counts=True)
    stops = (counts.cumsum(0) + offset).tolist()
    starts = [offset, *stops[:-1]]
    return {s: slice(a, b) for s, a, b in zip(ids.tolist(), starts, stops, strict=True)}


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
    """Yield which queries, the keys that they may need, and their scaled scores [B, G, R x Q, S]."""
    groups, length, width = q_BGRTK.shape[2:]
    for start in range(0, length, TILE_ROWS):
        stop = min(start + TILE_ROWS, length)
        seen = slice(0, stop if causal else k_BGTK.shape[2])
        part = q_BGRTK[..., start:stop, :].flatten(2, 3)
        scores = (part @ k_BGTK[:, :, seen].mT).mul_(width**-0.5)
        if causal:
            future = scores.new_full((stop - start, stop), float("-inf")).triu(start + 1)
            scores.add_(future.repeat(groups, 1))
        yield slice(start, stop), seen, scores


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, ...] -> [B, G, R, ...], as wide as softmax wants."""
    return x.unflatten(1, (heads, -1)).to(_sum_dtype(x.dtype))


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
        weights = scores.sub_(lse_BGRT[..., rows].flatten(2)[..., None]).exp_()
        dv[:, :, seen] += weights.mT @ up
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


class _Transfer:
    """A tensor on its way to the next rank while another comes from the one before."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        after, before = (dist.get_global_rank(group, (rank + by) % size) for by in (1, -1))
        self.sent, self.got = sent, torch.empty_like(sent)  # `sent` must live until it is gone
        out = dist.P2POp(dist.isend, sent, after, group)
        self.works = dist.batch_isend_irecv([out, dist.P2POp(dist.irecv, self.got, before, group)])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.got


def _visits(kv: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """Yield the keys and values of rank, rank - 1, ...; the next are on their way before each is
    yielded.
    """
    for step in range(group.size()):
        coming = _Transfer(kv, group) if step < group.size() - 1 else None
        yield kv
        if coming is not None:
            kv = coming.wait()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Let `out` [B, H, T, K] and `lse` [B, H, T] also stand for the keys of `part`, in place."""
    both = torch.logaddexp(lse, part_lse)
    out.mul_((lse - both).exp_()[..., None])
    out.addcmul_(part.to(out.dtype), (part_lse - both).exp_()[..., None])
    lse.copy_(both)


class _Ring(NamedTuple):
    group: dist.ProcessGroup
    plan: Plan
    kernel: Kernel
    dtype: torch.dtype  # of products


def _attend(q: Tensor, kv: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """Return the attention and log-sum-exp of `q` [B, H, T, K] over the keys of all ranks; `kv` is
    [2, B, T, G, K].
    """
    out = torch.empty_like(q, dtype=_sum_dtype(q.dtype))
    lse = out.new_empty(out.shape[:-1])
    for step, visitor in enumerate(_visits(kv, ring.group)):
        k, v = visitor.to(ring.dtype).transpose(2, 3)
        for piece in ring.plan.steps[step]:
            mine, theirs = (piece.rows, ALL, piece.queries), (piece.rows, ALL, piece.keys)
            part, part_lse = ring.kernel.forward(q[mine], k[theirs], v[theirs], piece.causal)
            if step == 0:  # own keys: every query is in one piece and sees itself
                out[mine], lse[mine] = part, part_lse
            else:
                _merge(out[mine], lse[mine], part, part_lse)
    return out, lse


def _slopes(
    slope: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, ring: _Ring
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `q` [B, H, T, K] and of own `kv` [2, B, T, G, K], in fp32 or wider.

    The gradient of a visitor's keys and values follows them, one step behind, and comes home after
    cp - 1 moves.
    """
    sums = _sum_dtype(q.dtype)
    dq, home, moving = torch.zeros_like(q, dtype=sums), torch.empty(0), None
    for step, visitor in enumerate(_visits(kv, ring.group)):
        k, v = visitor.to(ring.dtype).transpose(2, 3)
        d_visitor = torch.zeros_like(visitor, dtype=sums)
        dk, dv = d_visitor.transpose(2, 3)
        for piece in ring.plan.steps[step]:
            mine, theirs = (piece.rows, ALL, piece.queries), (piece.rows, ALL, piece.keys)
            saved = q[mine], k[theirs], v[theirs], out[mine], lse[mine]
            parts = ring.kernel.backward(slope[mine], *saved, causal=piece.causal)
            for total, part in zip((dq[mine], dk[theirs], dv[theirs]), parts, strict=True):
                total.add_(part)
        if step == 0:
            home = d_visitor
            continue
        if moving is not None:
            d_visitor.add_(moving.wait())
        moving = _Transfer(d_visitor, ring.group)
    return dq, home if moving is None else home.add_(moving.wait())


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, ring: _Ring) -> Tensor:
        dtype = v_BTGK.dtype
        ctx.ring, ctx.dtypes = ring, (q_BTHK.dtype, k_BTGK.dtype, dtype)
        # Contiguous, all that kernels read: they take another stride of the channels for 1, without
        # a word.
        q_BTHK = q_BTHK.to(dtype).contiguous()
        kv = torch.stack((k_BTGK.to(dtype), v_BTGK)).contiguous()
        with torch.autocast(v_BTGK.device.type, enabled=False):
            out, lse = _attend(q_BTHK.to(ring.dtype).transpose(1, 2), kv, ring)
        out_BTHK = out.transpose(1, 2).to(dtype)
        ctx.save_for_backward(q_BTHK, kv, out_BTHK, lse)
        return out_BTHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, kv, out_BTHK, lse = ctx.saved_tensors
        given = (slope_BTHK.contiguous(), q_BTHK, out_BTHK)
        slope, q, out = (x.to(ctx.ring.dtype).transpose(1, 2) for x in given)
        with torch.autocast(q.device.type, enabled=False):
            dq, (dk, dv) = _slopes(slope, q, kv, out, lse, ctx.ring)
        gradients = zip((dq.transpose(1, 2), dk, dv), ctx.dtypes, strict=True)
        return *(x.to(dtype) for x, dtype in gradients), None


class RingAttention:
    """Causal attention over sequences of which each rank of `group` holds `context_slice`.

    Collective, forward and backward: all ranks of the group call it for the same layers in the same
    order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def plan(self, segments_BT: Tensor | None, tokens: int) -> Plan:
        """Return what this rank computes; one plan serves all layers of a micro-batch (a collective
        with segments).

        Args:
            segments_BT: int64 [B, T], this rank's slice of segment numbers that never fall along
                the full sequence, equal within a document and different between documents; None:
                each sequence is one document.
            tokens: T, positions of a sequence that this rank holds.

        Raises:
            ValueError: segments of another type or length, or (on all ranks) numbers that fall.
        """
        cp, rank = self.group.size(), self.group.rank()
        order = [(rank - step) % cp for step in range(cp)]
        wholes = [causal_piece(rank, source, tokens) for source in order]
        if segments_BT is None:
            return Plan(tokens, tuple((whole,) for whole in wholes))
        if segments_BT.dtype != torch.int64 or segments_BT.shape[1:] != (tokens,):
            found = f"{segments_BT.dtype} {tuple(segments_BT.shape)}"
            raise ValueError(f"segments are {found}, not int64 [B, {tokens}]")
        gathered = segments_BT.new_empty((cp, *segments_BT.shape))
        dist.all_gather(list(gathered.unbind()), segments_BT.contiguous(), self.group)
        parts = gathered.cpu().unbind()
        if (context_join(parts, cp).diff(dim=1) < 0).any():
            raise ValueError("segment numbers fall along a sequence; want 0, 0, 1, 2, 2, ...")
        theirs = (parts[source] for source in order)
        steps = map(document_pieces, wholes, [parts[rank]] * cp, theirs)
        return Plan(tokens, tuple(steps))

    @torch.compiler.disable  # Dynamo traces no point-to-point transfers
    def __call__(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Tensor | Plan | None
    ) -> Tensor:
        """Return [B, T, H, K] in the type of `v_BTGK`; differentiable once.

        Query head h reads key-value head h // (H / G). All operands are rounded to the type of
        `v_BTGK`; where that is bfloat16 and the CPU lacks it, products are in fp32. Sums over
        pieces, and gradients on their way, are in fp32 or wider.

        Args:
            q_BTHK, k_BTGK: rotated by the true positions of this rank's slice, which is in the
                order of `context_slice`.
            v_BTGK: values.
            segments: see `plan`; a `Plan` spares each layer the exchange of segments.

        Raises:
            ValueError: shapes that do not fit together, or segments that `plan` refuses.
        """
        tokens = _checked_tokens(q_BTHK, k_BTGK, v_BTGK)
        plan = segments if isinstance(segments, Plan) else self.plan(segments, tokens)
        if plan.tokens != tokens:
            raise ValueError(f"a plan for {plan.tokens} tokens met {tokens} of each sequence")
        emulate = v_BTGK.dtype == torch.bfloat16 and v_BTGK.device.type == "cpu"
        dtype = torch.float32 if emulate and not CPU_MULTIPLIES_BF16 else v_BTGK.dtype
        kernel = KERNELS[choose_kernel(q_BTHK, k_BTGK, dtype)]
        return _RingFunction.apply(q_BTHK, k_BTGK, v_BTGK, _Ring(self.group, plan, kernel, dtype))


def _checked_tokens(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> int:
    batch, tokens, heads, width = q_BTHK.shape
    fits = k_BTGK.shape == v_BTGK.shape == (batch, tokens, k_BTGK.shape[2], width)
    if not fits or heads % k_BTGK.shape[2] or tokens % 2:
        raise ValueError(
            f"queries {tuple(q_BTHK.shape)}, keys {tuple(k_BTGK.shape)}, values "
            f"{tuple(v_BTGK.shape)}: want [B, T, H, K],"
            " [B, T, G, K], [B, T, G, K] with an even T and H a multiple of G"
        )
    return int(tokens)
