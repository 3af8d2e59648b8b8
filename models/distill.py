"""Distillation between members of a family: one follows the other's distribution over tokens.

N rows (tokens), D model width of the member, S of its teacher, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motet.models.loss import (
    IGNORED,
    LossSums,
    VocabularyShard,
    add_product,
    cap_logits,
    cap_slope,
    exponentials,
    held,
    round_to,
    rows_at_once,
)
from motet.models.member import Member
from motet.models.precision import compute_dtype, product_dtype


class Teacher(NamedTuple):
    """Whose distribution a member follows.

    Attributes:
        hidden_BTS: its states before the head, over the same tokens; no gradient flows back.
        member: who it is: its head is that part of the student's.
        head_VS: its head, where it is another model: this process's part, plain.
    """

    hidden_BTS: Tensor
    member: Member | None = None
    head_VS: Tensor | None = None


class _Divergence(torch.autograd.Function):
    """labels x (cross-entropy + z-loss) + for each teacher distill x KL(teacher || student), summed
    over the labels; gradients of the student are made in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teachers: tuple[tuple[Tensor, Tensor], ...],
        labels_N: Tensor,
        weights: tuple[float, ...],
        shard: VocabularyShard | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rounded, dtype = compute_dtype(hidden_ND), product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            student = tuple(round_to(x, rounded, dtype) for x in (hidden_ND, head_VD))
            others = [tuple(round_to(x, rounded, dtype) for x in teacher) for teacher in teachers]
            sums_4, h_gradient, w_gradient = _chunks(
                student, others, labels_N, weights, shard, softcap
            )
        ctx.save_for_backward(h_gradient.to(hidden_ND.dtype), w_gradient.to(head_VD.dtype))
        cross_entropy, z_sum, divergence, weighed = sums_4.unbind()
        objective = weights[1] * (cross_entropy + z_sum) + weighed
        ctx.mark_non_differentiable(cross_entropy, z_sum, divergence)
        return objective, cross_entropy, z_sum, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h_gradient, w_gradient = ctx.saved_tensors
        slopes = (gradient * gradients[0] for gradient in (h_gradient, w_gradient))
        return *slopes, None, None, None, None, None


def _chunks(
    student: tuple[Tensor, ...],
    teachers: Sequence[tuple[Tensor, ...]],
    labels_N: Tensor,
    weights: tuple[float, ...],
    shard: VocabularyShard | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h_ND, w_VD = student
    z_loss, labels_weight, *distills = weights
    sums_4 = torch.zeros(4, device=h_ND.device)
    h_gradient = torch.empty_like(h_ND)
    w_gradient = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device)
    step = rows_at_once(w_VD, shard)
    for start in range(0, len(h_ND), step):
        rows = slice(start, start + step)
        valid_C1 = labels_N[rows, None] != IGNORED
        place = held(labels_N[rows, None].clamp(min=0), len(w_VD), shard)
        logits_CV = cap_logits((h_ND[rows] @ w_VD.t()).float(), softcap)
        cap_CV = cap_slope(logits_CV, softcap) if softcap else None
        others = [cap_logits((h[rows] @ w.t()).float(), softcap) for h, w in teachers]
        followed = [_follow(other_CV, logits_CV, place, shard) for other_CV in others]
        chosen_C1, total_C1, log_sum_C1 = exponentials(logits_CV, *place, shard)
        # KL = sum_v p_v (t_v - s_v) + logsumexp(s) - logsumexp(t)
        aparts = [apart_C1 + log_sum_C1 for _, apart_C1 in followed]
        weighed = [apart_C1 * part for apart_C1, part in zip(aparts, distills, strict=True)]
        squares_C1 = z_loss * log_sum_C1.square()
        both = [torch.stack(x).sum(0) for x in (aparts, weighed)]
        terms = (log_sum_C1 - chosen_C1, squares_C1, *both)
        sums_4 += torch.stack([x.masked_fill(~valid_C1, 0.0).sum() for x in terms])
        # softmax x (labels (1 + 2 z logsumexp) + distills) - labels x onehot - distill x teacher
        scale_C1 = labels_weight * (1.0 + 2.0 * z_loss * log_sum_C1) + sum(distills)
        slope_CV = logits_CV.mul_(scale_C1 / total_C1)
        for (target_CV, _), part in zip(followed, distills, strict=True):
            slope_CV.sub_(target_CV.mul_(part))
        slope_CV.masked_fill_(~valid_C1, 0.0)
        columns_C1, held_C1 = place
        ones_C1 = (valid_C1 & held_C1).float() * labels_weight
        slope_CV.scatter_(1, columns_C1, slope_CV.gather(1, columns_C1) - ones_C1)
        if cap_CV is not None:
            slope_CV.mul_(cap_CV)
        low_CV = slope_CV.to(h_ND.dtype)
        torch.mm(low_CV, w_VD, out=h_gradient[rows])
        add_product(w_gradient, low_CV, h_ND[rows])
    return sums_4, h_gradient, w_gradient


def _follow(
    target_CV: Tensor,
    logits_CV: Tensor,
    place: tuple[Tensor, Tensor],
    shard: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """Return a teacher's probabilities [C, V], and [C, 1] sum_v p_v (t_v - s_v) - logsumexp(t) of
    its logits t, fp32, and the student's s.
    """
    cross_CV = target_CV - logits_CV
    _, other_C1, log_other_C1 = exponentials(target_CV, *place, shard)
    target_CV.div_(other_C1)
    apart_C1 = (target_CV * cross_CV).sum(-1, keepdim=True)
    if shard is not None:
        apart_C1 = shard.total(apart_C1)
    return target_CV, apart_C1 - log_other_C1


def distilled_sums(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    softcap: float = 0.0,
) -> LossSums:
    """Return the sums of a member's losses; backward goes through `objective`.

    Logits of all exist for as many rows at a time as in `loss_sums`. A divergence is
    KL(teacher || member) at temperature 1 (arXiv:1503.02531), over positions that have a label.

    Args:
        teachers: states [B, T, S] and head [V, S] of each; they get no gradient.
        weights: of the cross-entropy (and z-loss), and of the divergence from each teacher.
        shard, softcap: as in `loss_sums`; of all heads.
    """
    followed = tuple((h.detach().flatten(0, 1), w.detach()) for h, w in teachers)
    labels_N = labels_BT.flatten()
    objective, cross_entropy, z_sum, divergence = _Divergence.apply(
        hidden_BTD.flatten(0, 1), head_VD, followed, labels_N, (z_loss, *weights), shard, softcap
    )
    n_labels = (labels_N != IGNORED).sum().float()
    return LossSums(cross_entropy, z_sum, n_labels, objective, divergence)
