"""Context parallel attention: each rank holds a part of every sequence, keys and values go around a
ring.

B batch, T tokens (of this rank, where no full sequence is meant), H heads, G key-value heads, K
channels per head.

Source: Ring Attention (arXiv:2310.01889). `context_pieces.py` has what each rank holds and sees,
`context_kernels.py` the products. PyTorch's own ring (`torch.distributed.tensor.experimental`)
dispatches CUDA kernels only and knows no documents; this one is written for gloo and CPU as for
NCCL and CUDA. Of the CUDA kernels only signatures, shapes and types are tested; none has run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from motet.models.precision import CPU_MULTIPLIES_BF16
from motet.parallel.runtime.context_kernels import KERNELS, Kernel, choose_kernel, sum_dtype
from motet.parallel.runtime.context_pieces import (
    ALL,
    RingPlan,
    causal_piece,
    context_join,
    document_pieces,
)


class _Transfer:
    """A tensor on its way to the next rank while another comes from the one before."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        # Send and receive as one batch: alone, each would wait for its peer to call the other.
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
        # Posted before the products that it hides behind; none after the last visitor.
        coming = _Transfer(kv, group) if step < group.size() - 1 else None
        yield kv
        if coming is not None:
            kv = coming.wait()


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Let `out` [B, H, T, K] and `lse` [B, H, T] also stand for the keys of `part`, in place."""
    # Each part was normalized by its own sum: bring both to the common one.
    both = torch.logaddexp(lse, part_lse)
    out.mul_((lse - both).exp_()[..., None])
    out.addcmul_(part.to(out.dtype), (part_lse - both).exp_()[..., None])
    lse.copy_(both)


class _Ring(NamedTuple):
    group: dist.ProcessGroup
    plan: RingPlan
    kernel: Kernel
    dtype: torch.dtype  # of products


def _attend(q: Tensor, kv: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """Return the attention and log-sum-exp of `q` [B, H, T, K] over the keys of all ranks; `kv` is
    [2, B, T, G, K].
    """
    out = torch.empty_like(q, dtype=sum_dtype(q.dtype))
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
    sums = sum_dtype(q.dtype)
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
            home = d_visitor  # own keys' gradient: what others found is added when it comes home
            continue
        # What came along has the shares of the ranks that this visitor met before: add ours, pass
        # it on. It travels while the next visitor's products run.
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
        # Visitors are not kept: they go around again, which costs sends and spares cp times memory.
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

    def plan(self, segments_BT: Tensor | None, tokens: int) -> RingPlan:
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
        # Keys move to the next rank: those of the rank before come first.
        order = [(rank - step) % cp for step in range(cp)]
        wholes = [causal_piece(rank, source, tokens) for source in order]
        if segments_BT is None:
            return RingPlan(tokens, tuple((whole,) for whole in wholes))
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
        return RingPlan(tokens, tuple(steps))

    @torch.compiler.disable  # Dynamo traces no point-to-point transfers
    def __call__(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Tensor | RingPlan | None
    ) -> Tensor:
        """Return [B, T, H, K] in the type of `v_BTGK`; differentiable once.

        Query head h reads key-value head h // (H / G). All operands are rounded to the type of
        `v_BTGK`; where that is bfloat16 and the CPU lacks it, products are in fp32. Sums over
        pieces, and gradients on their way, are in fp32 or wider.

        Args:
            q_BTHK, k_BTGK: rotated by the true positions of this rank's slice, which is in the
                order of `context_slice`.
            v_BTGK: values.
            segments: see `plan`; a `RingPlan` spares each layer the exchange of segments.

        Raises:
            ValueError: shapes that do not fit together, or segments that `plan` refuses.
        """
        tokens = _checked_tokens(q_BTHK, k_BTGK, v_BTGK)
        # One plan serves all layers; made here, every layer would gather the segments again.
        plan = segments if isinstance(segments, RingPlan) else self.plan(segments, tokens)
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
