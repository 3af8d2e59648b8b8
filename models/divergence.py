"""How far two models' distributions over the next token lie apart.

N positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512
"""Rows of logits that are turned into probabilities at a time."""


@torch.no_grad()
def divergence(logits_NV: Tensor, other_NV: Tensor) -> Tensor:
    """Return KL(p || q) of each position, nats, float64 [N]: p is the distribution of the first
    logits, q that of the others.

    Computed in float64: two models that are nearly the same differ by sums that cancel.
    """
    parts = []
    for mine_RV, other_RV in zip(logits_NV.split(ROWS), other_NV.split(ROWS), strict=True):
        p_RV = mine_RV.double().log_softmax(-1)
        q_RV = other_RV.double().log_softmax(-1)
        parts.append((p_RV.exp() * (p_RV - q_RV)).sum(-1))
    return torch.cat(parts)
