"""Which rows go to which experts, how their results come back, and what keeps experts equally busy.

N tokens of this rank's micro-batch, E experts, K experts per token, D model width, M rows that
experts compute: one row per (token, chosen expert), sorted by expert and then by token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motet.models.config import ModelConfig


class Routing(NamedTuple):
    """Which rows go where, and how their results are weighed.

    Attributes:
        token_M: the token of each row.
        choice_M: the row's place in the flattened [N, K] choices.
        row_NK: the row of each choice; M, one past the last, for a choice that was dropped.
        weights_NK: fp32 weight of each choice; differentiable.
        kept_E: int64 rows per expert after dropping.
    """

    token_M: Tensor
    choice_M: Tensor
    row_NK: Tensor
    weights_NK: Tensor
    kept_E: Tensor


def choose(scores_NE: Tensor, k: int) -> Tensor:
    """Return int64 [N, k]: the k best of each row, best first; among equals the lowest index.

    `torch.topk` promises no order among equals, and its choice depends on shapes, hence on the
    layout. Rounds of argmax, which promises the first, took 0.6 to 1.3 times its time on a CPU
    (8,192 tokens, 8 to 128 experts).
    """
    left_NE = scores_NE.detach().clone()
    chosen = []
    for _ in range(k):
        best_N1 = left_NE.argmax(-1, keepdim=True)
        chosen.append(best_N1)
        left_NE.scatter_(1, best_N1, -math.inf)
    return torch.cat(chosen, 1)


def count_choices(chosen_NK: Tensor, n_experts: int) -> Tensor:
    """Return int64 [E]: how often each expert was chosen."""
    ones = torch.ones_like(chosen_NK.flatten())
    return ones.new_zeros(n_experts).scatter_add_(0, chosen_NK.flatten(), ones)


def capacity(n_tokens: int, k: int, n_experts: int, factor: float) -> int:
    """Return the most rows of one expert: ceil(factor * n_tokens * k / n_experts)
    (arXiv:2101.03961, section 2.2).
    """
    # The small slack undoes binary rounding: 1.1 x 10 / 1 is 11, not 12.
    return math.ceil(factor * n_tokens * k / n_experts - 1e-9)


def arrange(chosen_NK: Tensor, weights_NK: Tensor, counts_E: Tensor, most_rows: int) -> Routing:
    """Sort choices by expert, then by token; keep at most `most_rows` per expert, the earliest (0 =
    keep all).
    """
    n_choices, k = chosen_NK.numel(), chosen_NK.shape[1]
    choice_M = torch.argsort(chosen_NK.flatten(), stable=True)
    if most_rows:
        starts_E = counts_E.cumsum(0) - counts_E
        place_M = torch.arange(n_choices, device=choice_M.device)
        place_M -= torch.repeat_interleave(starts_E, counts_E, output_size=n_choices)
        choice_M = choice_M[place_M < most_rows]
        counts_E = counts_E.clamp(max=most_rows)
    n_rows = len(choice_M)
    row_NK = torch.full_like(chosen_NK.flatten(), n_rows)
    row_NK[choice_M] = torch.arange(n_rows, device=choice_M.device)
    return Routing(choice_M // k, choice_M, row_NK.view_as(chosen_NK), weights_NK, counts_E)


class GatherRows(torch.autograd.Function):
    """Rows for the experts: x[token].

    Backward adds the K rows of a token in one fixed order, with no atomics.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND[token_M]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_NK,) = ctx.saved_tensors
        return _rows(gradients[0], row_NK).sum(1), None, None


class WeighRows(torch.autograd.Function):
    """Results for the tokens: sum over K of weight x y[row].

    Keeps y [M, D] for the backward pass, nothing wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_MD: Tensor,
        weights_NK: Tensor,
        token_M: Tensor,
        choice_M: Tensor,
        row_NK: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, token_M, choice_M, row_NK)
        y_NKD = _rows(y_MD, row_NK)
        return (y_NKD * weights_NK[..., None]).sum(1).to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_MD, weights_NK, token_M, choice_M, row_NK = ctx.saved_tensors
        (gradient_ND,) = gradients
        weights_M1 = weights_NK.flatten()[choice_M, None]
        y_gradient = (gradient_ND[token_M] * weights_M1).to(y_MD.dtype)
        products_NKD = _rows(y_MD, row_NK) * gradient_ND[:, None].to(weights_NK.dtype)
        return y_gradient, products_NKD.sum(-1), None, None, None


def _rows(y_MD: Tensor, row_NK: Tensor) -> Tensor:
    """Return y[row] [N, K, D]; zeros where the choice was dropped."""
    if row_NK.numel() != len(y_MD):
        y_MD = torch.cat([y_MD, y_MD.new_zeros(1, y_MD.shape[1])])
    return y_MD[row_NK]


def auxiliary(
    logits_NE: Tensor, frequencies_E: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Return float64 [balance loss, router z-loss] summed over tokens, and the gradient [N, E] of
    their sum.

    See `MoE` for the losses; both are zero where their coefficient is.
    """
    softmax_NE, log_sum_N1 = logits_NE.softmax(-1), logits_NE.logsumexp(-1, keepdim=True)
    slope_E = config.balance_loss * len(frequencies_E) * frequencies_E
    if config.router_score == "softmax":
        probability_NE = softmax_NE
        spread_NE = softmax_NE
    else:
        scores_NE = logits_NE.sigmoid()
        probability_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        spread_NE = probability_NE * (1 - scores_NE)
    balance_N1 = (probability_NE * slope_E).sum(-1, keepdim=True)
    gradient_NE = spread_NE * (slope_E - balance_N1)
    gradient_NE = gradient_NE + 2 * config.router_z_loss * log_sum_N1 * softmax_NE
    z_loss = config.router_z_loss * log_sum_N1.double().square().sum()
    return torch.stack([balance_N1.double().sum(), z_loss]), gradient_NE
