"""Distillation between members of a family: one follows the other's distribution over tokens.

N rows (tokens), D model width of the member, S of its teacher, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from motet.models.loss import (
    IGNORED,
    LossSums,
    VocabularyShard,
    add_product,
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
        head_VS: its head, where it is another model.
    """

    hidden_BTS: Tensor
    member: Member | None = None
    head_VS: Tensor | None = None


class _Divergence(torch.autograd.Function):
    """labels x (cross-entropy + z-loss) + distill x KL(teacher || student), summed over the labels;
    gradients of the student are made in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher: tuple[Tensor, Tensor],
        labels_N: Tensor,
        weights: tuple[float, float, float],
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rounded, dtype = compute_dtype(hidden_ND), product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            student = tuple(round_to(x, rounded, dtype) for x in (hidden_ND, head_VD))
            other = tuple(round_to(x, rounded, dtype) for x in teacher)
            sums_3, h_gradient, w_gradient = _chunks(student, other, labels_N, weights, shard)
        ctx.save_for_backward(h_gradient.to(hidden_ND.dtype), w_gradient.to(head_VD.dtype))
        cross_entropy, z_sum, divergence = sums_3.unbind()
        labels, distill, _ = weights
        objective = labels * (cross_entropy + z_sum) + distill * divergence
        ctx.mark_non_differentiable(cross_entropy, z_sum, divergence)
        return objective, cross_entropy, z_sum, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h_gradient, w_gradient = ctx.saved_tensors
        return h_gradient * gradients[0], w_gradient * gradients[0], None, None, None, None


def _chunks(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels_N: Tensor,
    weights: tuple[float, float, float],
    shard: VocabularyShard | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (h_ND, w_VD), (h_NS, w_VS) = student, teacher
    labels_weight, distill, z_loss = weights
    sums_3 = torch.zeros(3, device=h_ND.device)
    h_gradient = torch.empty_like(h_ND)
    w_gradient = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device)
    step = rows_at_once(w_VD, shard)
    for start in range(0, len(h_ND), step):
        rows = slice(start, start + step)
        valid_C1 = labels_N[rows, None] != IGNORED
        columns_C1, held_C1 = held(labels_N[rows, None].clamp(min=0), len(w_VD), shard)
        logits_CV = (h_ND[rows] @ w_VD.t()).float()
        target_CV = (h_NS[rows] @ w_VS.t()).float()
        cross_CV = target_CV - logits_CV  # of the teacher's and the student's logits
        chosen_C1, total_C1, log_sum_C1 = exponentials(logits_CV, columns_C1, held_C1, shard)
        _, other_C1, log_other_C1 = exponentials(target_CV, columns_C1, held_C1, shard)
        target_CV.div_(other_C1)
        # KL = sum_v p_v (t_v - s_v) + logsumexp(s) - logsumexp(t)
        apart_C1 = (target_CV * cross_CV).sum(-1, keepdim=True)
        if shard is not None:
            apart_C1 = shard.total(apart_C1)
        apart_C1 = apart_C1 + log_sum_C1 - log_other_C1
        terms = (log_sum_C1 - chosen_C1, z_loss * log_sum_C1.square(), apart_C1)
        sums_3 += torch.stack([x.masked_fill(~valid_C1, 0.0).sum() for x in terms])
        # softmax x (labels (1 + 2 z logsumexp) + distill) - labels x onehot - distill x teacher
        scale_C1 = (labels_weight * (1.0 + 2.0 * z_loss * log_sum_C1) + distill) / total_C1
        slope_CV = logits_CV.mul_(scale_C1).sub_(target_CV.mul_(distill))
        slope_CV.masked_fill_(~valid_C1, 0.0)
        ones_C1 = (valid_C1 & held_C1).float() * labels_weight
        slope_CV.scatter_(1, columns_C1, slope_CV.gather(1, columns_C1) - ones_C1)
        low_CV = slope_CV.to(h_ND.dtype)
        torch.mm(low_CV, w_VD, out=h_gradient[rows])
        add_product(w_gradient, low_CV, h_ND[rows])
    return sums_3, h_gradient, w_gradient


def distilled_sums(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    teacher: tuple[Tensor, Tensor],
    weights: tuple[float, float],
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> LossSums:
    """Return the sums of a member's losses; backward goes through `objective`.

    Logits of both exist for as many rows at a time as in `loss_sums`. The divergence is
    KL(teacher || member) at temperature 1 (arXiv:1503.02531), over positions that have a label.

    Args:
        teacher: its states [B, T, S] and head [V, S]; they get no gradient.
        weights: of the cross-entropy (and z-loss), and of the divergence.
        shard: as in `loss_sums`; of both heads.
    """
    hidden_BTS, head_VS = (x.detach() for x in teacher)
    labels_N = labels_BT.flatten()
    objective, cross_entropy, z_sum, divergence = _Divergence.apply(
        hidden_BTD.flatten(0, 1),
        head_VD,
        (hidden_BTS.flatten(0, 1), head_VS),
        labels_N,
        (*weights, z_loss),
        shard,
    )
    n_labels = (labels_N != IGNORED).sum().float()
    return LossSums(cross_entropy, z_sum, n_labels, objective, divergence)
