"""Rows of a mixture of experts on their way to the ranks of their experts, and back.

The expert mesh (ep x etp x edp) is independent of the attention mesh (tp x cp x dp); they share
pipeline stages alone ("MoE Parallel Folding", arXiv:2504.14960, section 3). Here it is two groups:
`ep`, whose rank r holds experts [r E/ep, (r + 1) E/ep), and `etp`, whose ranks hold the same
experts, each F/etp of their hidden channels. Every rank of both brings its own tokens.

M rows of this rank, D model width, E experts, L experts of one rank (E / ep), P ranks of ep, R
ranks of etp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ticket(NamedTuple):
    """How the rows of one `dispatch` find home.

    Attributes:
        inverse: place, among the rows sorted by expert, of each row as it arrived.
        sent, received: rows to and from each rank of ep.
        gathered: rows of each rank of etp.
    """

    inverse: Tensor
    sent: list[int]
    received: list[int]
    gathered: list[int]


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_MD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = (received, sent, group)
        return _all_to_all(rows_MD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], *ctx.way_back), None, None, None


def _all_to_all(
    rows_MD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_MD = rows_MD.new_empty(sum(received), *rows_MD.shape[1:])
    dist.all_to_all_single(out_MD, rows_MD.contiguous(), received, sent, group=group)
    return out_MD


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is gathered by the inverse, where indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return rows_MD[order_M]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return gradients[0][inverse_M], None, None


def local_experts(n_experts: int, ep: int, rank: int) -> range:
    """Return the experts that rank `rank` of `ep` holds.

    Raises:
        ValueError: ep does not divide n_experts.
    """
    if n_experts % ep:
        options = ", ".join(str(n) for n in range(1, n_experts + 1) if n_experts % n == 0)
        raise ValueError(
            f"ep={ep} does not divide model.n_experts={n_experts}; use one of {options}"
        )
    each = n_experts // ep
    return range(rank * each, (rank + 1) * each)


class ExpertExchange:
    """All-to-all over ep, then all-gather and reduce-scatter over etp: an `Exchange` of
    `motet.models.moe`.

    One primitive does all of it, the uneven all-to-all: an all-gather sends every rank the same
    rows, a reduce-scatter adds the pieces that arrive, in rank order. It carries as many bytes as
    the collectives of those names would, takes parts of any size (none at all too), and gives the
    same sum on every backend. The etp gather holds R copies of this rank's rows while it sends
    them.

    The gradient of an expert's weights on its rank is the sum over the tokens of all ranks of ep
    and etp: whoever averages gradients over ranks has to know that. In the forward and in the
    backward pass, all ranks of the mesh must meet here equally often, with or without rows.
    """

    def __init__(
        self,
        n_experts: int,
        ep_group: dist.ProcessGroup | None = None,
        etp_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Join the groups; None is a group of this rank alone.

        Raises:
            ValueError: the size of `ep_group` does not divide n_experts.
        """
        self.n_experts = n_experts
        self.ep_group, self.etp_group = ep_group, etp_group
        self.ep = 1 if ep_group is None else dist.get_world_size(ep_group)
        self.etp = 1 if etp_group is None else dist.get_world_size(etp_group)
        rank = 0 if ep_group is None else dist.get_rank(ep_group)
        self.experts = local_experts(n_experts, self.ep, rank)

    def dispatch(self, rows_MD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Ticket]:
        """See `motet.models.moe.Exchange.dispatch`."""
        counts_PL = counts_E.view(self.ep, -1)
        arrived_PL = self._swap_counts(counts_PL)
        arrived_RPL = self._gather_counts(arrived_PL)
        # The one moment where the host waits: sizes of all that follows.
        sent, received, gathered = (
            x.tolist() for x in (counts_PL.sum(1), arrived_PL.sum(1), arrived_RPL.sum((1, 2)))
        )
        if self.ep > 1:
            rows_MD = _AllToAll.apply(rows_MD, sent, received, self.ep_group)
        if self.etp > 1:
            sizes = [len(rows_MD)] * self.etp
            copies = rows_MD.expand(self.etp, *rows_MD.shape).flatten(0, 1)
            rows_MD = _AllToAll.apply(copies, sizes, gathered, self.etp_group)
        order, inverse = _by_expert(arrived_RPL, sum(gathered))
        rows_MD = _Permute.apply(rows_MD, order, inverse)
        return rows_MD, arrived_RPL.sum((0, 1)), Ticket(inverse, sent, received, gathered)

    def combine(self, rows_MD: Tensor, ticket: Ticket) -> Tensor:
        """See `motet.models.moe.Exchange.combine`; rows over etp are added up."""
        order = torch.empty_like(ticket.inverse)
        order[ticket.inverse] = torch.arange(len(order), device=order.device)
        rows_MD = _Permute.apply(rows_MD, ticket.inverse, order)
        if self.etp > 1:
            mine = sum(ticket.received)
            pieces = _AllToAll.apply(rows_MD, ticket.gathered, [mine] * self.etp, self.etp_group)
            rows_MD = pieces.view(self.etp, mine, rows_MD.shape[1]).sum(0)
        if self.ep > 1:
            rows_MD = _AllToAll.apply(rows_MD, ticket.received, ticket.sent, self.ep_group)
        return rows_MD

    def _swap_counts(self, counts_PL: Tensor) -> Tensor:
        """Return how many rows each rank of ep sends to each expert here."""
        if self.ep == 1:
            return counts_PL
        arrived_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(arrived_PL, counts_PL.contiguous(), group=self.ep_group)
        return arrived_PL

    def _gather_counts(self, arrived_PL: Tensor) -> Tensor:
        """Return [R, P, L]: the arrivals of every rank of etp."""
        if self.etp == 1:
            return arrived_PL[None]
        parts = [torch.empty_like(arrived_PL) for _ in range(self.etp)]
        dist.all_gather(parts, arrived_PL, group=self.etp_group)
        return torch.stack(parts)


def _by_expert(arrived_RPL: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return the order that sorts arrived rows by expert, else as they came, and its inverse."""
    experts_RPL = torch.arange(arrived_RPL.shape[2], device=arrived_RPL.device).expand_as(
        arrived_RPL
    )
    expert_M = torch.repeat_interleave(
        experts_RPL.flatten(), arrived_RPL.flatten(), output_size=n_rows
    )
    order = torch.argsort(expert_M, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(n_rows, device=order.device)
    return order, inverse
