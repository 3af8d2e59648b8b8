"""Cross-entropy and token scores from hidden states, without ever holding all the logits.

N rows (tokens), D model width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motet.models.precision import compute_dtype, product_dtype

IGNORED = -100  # the label of a position that has none
CHUNK_ROWS = 512
TIE = 2.0**-14
"""Logits that differ by less are equal: the order of sums, which changes with the size of a batch,
must not choose between two tokens whose weights are the same.
"""
# A device holds more rows: the gradient of the head, fp32 [V, D], is read and written once per
# chunk.
DEVICE_CHUNK_BYTES = 1 << 29


class LossSums(NamedTuple):
    """Sums over the labels of one batch, 0-d fp32 tensors; divide by `n_labels` of the whole step.

    `z_loss` is already times its coefficient. Backward through `objective` carries the gradient of
    cross_entropy + z_loss: both enter a loss with the same weight, so one gradient is kept. Of a
    member that follows a teacher it carries that of its whole loss (`distill.py`).

    Attributes:
        objective: what to go backward through; without a teacher `cross_entropy` itself.
        divergence: from its teachers, without their weights; 0 without one.
        hidden_BTD: the states before the head, for a member that follows this one.
        exits: [cross-entropy, z-loss] of every exit on the way, without its weight.
    """

    cross_entropy: Tensor
    z_loss: Tensor
    n_labels: Tensor
    objective: Tensor
    divergence: Tensor
    hidden_BTD: Tensor | None = None
    exits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head that this process holds, and how it reaches the others (Megatron-LM,
    arXiv:1909.08053, section 3).

    Attributes:
        first: number of its first row.
        maximum, total: elementwise maximum and sum over the processes, in place, of a tensor
            without gradient.
    """

    first: int
    maximum: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """Per label: log-probability in nats (fp32 [B, T]), whether it is the likeliest token (bool
    [B, T]), and which one is (int64 [B, T]).
    """

    logprob: Tensor
    greedy: Tensor
    likeliest: Tensor


def round_to(x: Tensor, rounded: torch.dtype, dtype: torch.dtype) -> Tensor:
    return x.to(rounded).to(dtype)


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """Return softcap x tanh(logits / softcap) (Gemma-2, arXiv:2408.00118, section 2); 0 = off."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cap_slope(capped_CV: Tensor, softcap: float) -> Tensor:
    """Return the derivative of `cap_logits`, from what it returned."""
    return 1 - (capped_CV / softcap).square()


class _ChunkedLoss(torch.autograd.Function):
    """Sums of cross-entropy and of z_loss x logsumexp^2; the gradients are made in the forward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        train: bool,
        shard: VocabularyShard | None,
        fused: bool,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        rounded, dtype = compute_dtype(hidden_ND), product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            h_ND, w_VD = round_to(hidden_ND, rounded, dtype), round_to(head_VD, rounded, dtype)
            chunks = _fused_chunks if fused and train and shard is None else _loss_chunks
            sums, h_gradient, w_gradient = chunks(
                h_ND, w_VD, labels_N, z_loss, train, shard, softcap
            )
        if train:
            ctx.save_for_backward(h_gradient.to(hidden_ND.dtype), w_gradient.to(head_VD.dtype))
        ctx.mark_non_differentiable(sums[1])
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h_gradient, w_gradient = ctx.saved_tensors
        weight = gradients[0]
        return h_gradient * weight, w_gradient * weight, None, None, None, None, None, None


def rows_at_once(w_VD: Tensor, shard: VocabularyShard | None) -> int:
    """Return the rows of one chunk: few on a CPU, for its cache; elsewhere as many, a power of two,
    as `DEVICE_CHUNK_BYTES` of fp32 logits.

    Always `CHUNK_ROWS` with a shard: processes may hold unequal shards, and must meet in equally
    many collectives.
    """
    if w_VD.device.type == "cpu" or shard is not None:
        return CHUNK_ROWS
    return max(CHUNK_ROWS, 1 << (DEVICE_CHUNK_BYTES // (4 * len(w_VD))).bit_length() - 1)


def _loss_chunks(
    h_ND: Tensor,
    w_VD: Tensor,
    labels_N: Tensor,
    z_loss: float,
    train: bool,
    shard: VocabularyShard | None,
    softcap: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    cross_entropy, z_sum = (torch.zeros((), device=h_ND.device) for _ in range(2))
    h_gradient = torch.empty_like(h_ND) if train else h_ND
    w_gradient = torch.zeros_like(w_VD, dtype=torch.float32) if train else w_VD
    step = rows_at_once(w_VD, shard)
    for start in range(0, len(h_ND), step):
        rows = slice(start, start + step)
        valid_C1 = labels_N[rows, None] != IGNORED
        columns_C1, held_C1 = held(labels_N[rows, None].clamp(min=0), len(w_VD), shard)
        work_CV = cap_logits((h_ND[rows] @ w_VD.t()).float(), softcap)
        slope_CV = cap_slope(work_CV, softcap) if softcap and train else None
        chosen_C1, total_C1, log_sum_C1 = exponentials(work_CV, columns_C1, held_C1, shard)
        cross_entropy += (log_sum_C1 - chosen_C1).masked_fill_(~valid_C1, 0.0).sum()
        z_sum += log_sum_C1.square().masked_fill_(~valid_C1, 0.0).sum() * z_loss
        if not train:
            continue
        # d(loss)/d(logits) = softmax x (1 + 2 z logsumexp) - onehot, where there is a label.
        scale_C1 = (1.0 + 2.0 * z_loss * log_sum_C1) / total_C1
        work_CV.mul_(scale_C1.masked_fill_(~valid_C1, 0.0))
        # Not scatter_add_: one write per row stays deterministic on every device.
        ones_C1 = (valid_C1 & held_C1).float()
        work_CV.scatter_(1, columns_C1, work_CV.gather(1, columns_C1) - ones_C1)
        if slope_CV is not None:
            work_CV.mul_(slope_CV)
        low_CV = work_CV.to(h_ND.dtype)
        torch.mm(low_CV, w_VD, out=h_gradient[rows])
        add_product(w_gradient, low_CV, h_ND[rows])
    return (cross_entropy, z_sum), h_gradient, w_gradient


def add_product(w_gradient: Tensor, slope_CV: Tensor, h_CD: Tensor) -> None:
    if slope_CV.dtype == torch.float32:
        w_gradient.addmm_(slope_CV.t(), h_CD)
    else:
        w_gradient += slope_CV.t() @ h_CD


def _fused_chunks(
    h_ND: Tensor,
    w_VD: Tensor,
    labels_N: Tensor,
    z_loss: float,
    train: bool,
    shard: VocabularyShard | None,
    softcap: float = 0.0,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Do what `_loss_chunks` does when it trains without a shard; what lies between the products of
    a chunk is one compiled function.
    """
    cross_entropy, z_sum = (torch.zeros((), device=h_ND.device) for _ in range(2))
    h_gradient = torch.empty_like(h_ND)
    w_gradient = torch.zeros_like(w_VD, dtype=torch.float32)
    step = rows_at_once(w_VD, shard)
    for start in range(0, len(h_ND), step):
        rows = slice(start, start + step)
        entropy, squares, slope_CV = _compiled_slopes()(
            h_ND[rows] @ w_VD.t(), labels_N[rows], z_loss, softcap
        )
        cross_entropy += entropy
        z_sum += squares
        torch.mm(slope_CV, w_VD, out=h_gradient[rows])
        add_product(w_gradient, slope_CV, h_ND[rows])
    return (cross_entropy, z_sum), h_gradient, w_gradient


@cache
def _compiled_slopes() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Compile `_slopes`, once: a few passes over the logits in their own type instead of ten over
    an fp32 copy.
    """
    return torch.compile(_slopes)


def _slopes(
    logits_CV: Tensor, labels_C: Tensor, z_loss: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of cross-entropy and of z_loss x logsumexp^2 (0-d fp32), and the gradient of
    their sum, [C, V] as `logits_CV`.
    """
    valid_C1 = (labels_C != IGNORED)[:, None]
    wide_CV, labels_C1 = cap_logits(logits_CV.float(), softcap), labels_C.clamp(min=0)[:, None]
    log_sum_C1 = wide_CV.logsumexp(-1, keepdim=True)
    entropy_C1 = log_sum_C1 - wide_CV.gather(1, labels_C1)
    scale_C1 = (1.0 + 2.0 * z_loss * log_sum_C1).where(valid_C1, 0.0)
    hit_CV = torch.arange(wide_CV.shape[1], device=labels_C.device) == labels_C1
    slope_CV = (wide_CV - log_sum_C1).exp() * scale_C1 - (hit_CV & valid_C1).float()
    if softcap:
        slope_CV = slope_CV * cap_slope(wide_CV, softcap)
    entropy, squares = (
        x.where(valid_C1, 0.0).sum() for x in (entropy_C1, z_loss * log_sum_C1.square())
    )
    return entropy, squares, slope_CV.to(logits_CV.dtype)


def held(labels_C1: Tensor, width: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """Return the column of each label among the `width` held here, and whether it is here."""
    if shard is None:
        return labels_C1, torch.ones_like(labels_C1, dtype=torch.bool)
    columns_C1 = labels_C1 - shard.first
    held_C1 = (columns_C1 >= 0) & (columns_C1 < width)
    return columns_C1.where(held_C1, 0), held_C1


def exponentials(
    logits_CV: Tensor, columns_C1: Tensor, held_C1: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits by exp(logit - largest); return the labels' logits, the sums of exponentials
    and logsumexp, each [C, 1].
    """
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    if shard is not None:
        largest_C1 = shard.maximum(largest_C1)
    chosen_C1 = logits_CV.gather(1, columns_C1)
    logits_CV.sub_(largest_C1).exp_()
    total_C1 = logits_CV.sum(-1, keepdim=True)
    if shard is not None:
        both_C2 = shard.total(torch.cat((total_C1, chosen_C1.masked_fill(~held_C1, 0.0)), 1))
        total_C1, chosen_C1 = both_C2.split(1, dim=1)
    return chosen_C1, total_C1, largest_C1 + total_C1.log()


def loss_sums(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    fused: bool = False,
    softcap: float = 0.0,
) -> LossSums:
    """Return the summed losses of predicting `labels_BT` (int64, -100 = none) from `hidden_BTD`.

    Logits exist for `CHUNK_ROWS` rows at a time, or more on a device. `fused` compiles what lies
    between the matrix products, where the vocabulary is whole. The z-loss is z_loss x
    logsumexp(logits)^2 (PaLM, arXiv:2204.02311, section 5). With a `shard` of the vocabulary each
    process holds some columns of the logits only; all get the same sums, and the gradient of
    `hidden_BTD` is this process's part, to be summed over them. `softcap`: see `cap_logits`.
    """
    train = torch.is_grad_enabled() and (hidden_BTD.requires_grad or head_VD.requires_grad)
    labels_N = labels_BT.flatten()
    cross_entropy, z_sum = _ChunkedLoss.apply(
        hidden_BTD.flatten(0, 1), head_VD, labels_N, z_loss, train, shard, fused, softcap
    )
    n_labels = (labels_N != IGNORED).sum().float()
    return LossSums(cross_entropy, z_sum, n_labels, cross_entropy, torch.zeros_like(z_sum))


@torch.no_grad()
def label_scores(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    shard: VocabularyShard | None = None,
    softcap: float = 0.0,
) -> Scores:
    """Return log-probability and greediness of each label, and the likeliest token in its place; 0,
    True and -100 where the label is -100.

    Only rows with a label meet the head, `CHUNK_ROWS` at a time. No gradient.
    """
    logprob_BT = torch.zeros(labels_BT.shape, device=hidden_BTD.device)
    likeliest_BT = torch.full_like(labels_BT, IGNORED)
    wanted_BT = labels_BT != IGNORED
    rounded, dtype = compute_dtype(hidden_BTD), product_dtype(hidden_BTD)
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        h_ND, labels_N1 = hidden_BTD[wanted_BT], labels_BT[wanted_BT][:, None]
        h_ND, w_VD = round_to(h_ND, rounded, dtype), round_to(head_VD, rounded, dtype)
        logprobs, likeliest = [], []
        for h_CD, labels_C1 in zip(
            h_ND.split(CHUNK_ROWS), labels_N1.split(CHUNK_ROWS), strict=True
        ):
            logits_CV = cap_logits((h_CD @ w_VD.t()).float(), softcap)
            columns_C1, held_C1 = held(labels_C1, len(w_VD), shard)
            likeliest.append(_likeliest(logits_CV, shard))
            chosen_C1, _, log_sum_C1 = exponentials(logits_CV, columns_C1, held_C1, shard)
            logprobs.append((chosen_C1 - log_sum_C1)[:, 0])
    logprob_BT[wanted_BT] = torch.cat(logprobs)
    likeliest_BT[wanted_BT] = torch.cat(likeliest)
    return Scores(logprob_BT, likeliest_BT == labels_BT, likeliest_BT)


def _likeliest(logits_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Return the token with the largest logit, int64 [C]; the first of those within `TIE` of it."""
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    if shard is not None:
        largest_C1 = shard.maximum(largest_C1)
    near_CV = logits_CV >= largest_C1 - TIE
    column_C = near_CV.to(torch.uint8).argmax(-1)
    if shard is None:
        return column_C
    # The smallest token among the processes that hold one: a maximum of negatives.
    candidate_C = -(column_C + shard.first).where(near_CV.any(-1), 1 << 62)
    return -shard.maximum(candidate_C)
