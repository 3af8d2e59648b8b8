"""Speculative decoding: how often a large model accepts what a small one drafts.

A draft model proposes tokens one by one, the target model checks all of them in one pass; what
comes out is distributed as the target's own text (Leviathan et al., arXiv:2211.17192, algorithm 1).

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 512
"""Rows of logits that are turned into probabilities at a time."""
MOST_AHEAD = 16
"""Tokens drafted per pass at most, when the best number is sought."""


class Acceptance(NamedTuple):
    """Of each position, float32 [B, T].

    Attributes:
        greedy: 1 where both find the same token likeliest: decoding without sampling accepts it.
        sampled: sum over tokens of min(p, q), the chance that a token sampled from the draft's q is
            accepted by the target's p (corollary 3.6).
    """

    greedy: Tensor
    sampled: Tensor


@torch.no_grad()
def acceptance(target_BTV: Tensor, draft_BTV: Tensor) -> Acceptance:
    """Return how likely each position's draft is accepted, from the logits of both models."""
    agree_BT = (target_BTV.argmax(-1) == draft_BTV.argmax(-1)).float()
    target, draft = target_BTV.flatten(0, 1), draft_BTV.flatten(0, 1)
    parts = [
        torch.minimum(p.float().softmax(-1), q.float().softmax(-1)).sum(-1)
        for p, q in zip(target.split(ROWS), draft.split(ROWS), strict=True)
    ]
    return Acceptance(agree_BT, torch.cat(parts).view_as(agree_BT))


def tokens_per_pass(rate: float, ahead: int) -> float:
    """Return the tokens that one pass of the target yields on average: equation 1.

    Args:
        rate: of acceptance, taken to be the same and independent at each position.
        ahead: tokens drafted before the target checks them (gamma).
    """
    if rate >= 1.0:
        return ahead + 1.0
    return (1.0 - rate ** (ahead + 1)) / (1.0 - rate)


def speed_up(rate: float, ahead: int, cost: float) -> float:
    """Return how much faster than the target alone decoding is: theorem 3.8.

    Args:
        cost: time of one pass of the draft over one of the target.
    """
    return tokens_per_pass(rate, ahead) / (cost * ahead + 1.0)


def best_ahead(rate: float, cost: float) -> int:
    """Return how many tokens to draft for the largest `speed_up`; 0: the target alone is
    fastest.
    """
    return max(range(MOST_AHEAD + 1), key=lambda ahead: speed_up(rate, ahead, cost))
