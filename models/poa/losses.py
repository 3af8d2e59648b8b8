"""The terms of POA's loss: who learns from whom, and how the teacher's outputs are centred.

Source: POA (arXiv:2408.01031), section 3.3 and `ssl_meta_arch.py`; DINOv2 (arXiv:2304.07193) for
Sinkhorn-Knopp, masked patches and KoLeo.
"""

# V views, B images, N masked patches, R rows (images or patches), O prototypes, W active width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Sum = Callable[[Tensor], Any]
"""Adds a tensor up over all processes, in place: `torch.distributed.all_reduce`, or nothing."""


class StudentOutputs(NamedTuple):
    """What one student makes of a group's crops.

    Attributes:
        global_VBO, local_VBO: cosines of every head for whole crops.
        patches_NO: cosines of every head for masked patches; none before they begin.
        cls_VBW: features of the global crops, before the heads.
    """

    global_VBO: list[Tensor]
    local_VBO: list[Tensor]
    patches_NO: list[Tensor]
    cls_VBW: Tensor


class Targets(NamedTuple):
    """What the teacher makes of the same global crops, one tensor per head.

    Attributes:
        cls_VBO: of each whole crop.
        patches_NO: of each masked patch.
        weights_N: 1 / (masked patches of the patch's crop x crops).
    """

    cls_VBO: list[Tensor]
    patches_NO: list[Tensor]
    weights_N: Tensor


@torch.no_grad()
def sinkhorn(cosines_RO: Tensor, temperature: float, iterations: int, add: Sum) -> Tensor:
    """Return soft assignments [R, O] of rows to prototypes that use every prototype alike.

    Sinkhorn-Knopp over the rows of all processes; each of them may bring another number of rows,
    also none. Rows sum to 1 (SwAV, arXiv:2006.09882, section 3.3).
    """
    rows = torch.tensor(float(len(cosines_RO)), device=cosines_RO.device)
    add(rows)
    # cosines are at most 1: subtracting that changes no share and keeps exp within fp32
    shares_RO = ((cosines_RO.float() - 1) / temperature).exp()
    for _ in range(iterations):
        column_O = shares_RO.sum(0)
        add(column_O)
        shares_RO = shares_RO / (column_O * shares_RO.shape[1]).clamp_min(1e-30)
        shares_RO = shares_RO / (shares_RO.sum(1, keepdim=True) * rows)
    return shares_RO * rows


def centred(
    heads_RO: Sequence[Tensor], temperature: float, iterations: int, add: Sum
) -> list[Tensor]:
    """Return the teacher's assignments for every head, each balanced by itself."""
    return [sinkhorn(cosines_RO, temperature, iterations, add) for cosines_RO in heads_RO]


def cross_entropy(cosines: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return -sum over prototypes of target x log softmax(cosines / temperature), [...]."""
    return -(targets * F.log_softmax(cosines / temperature, dim=-1)).sum(-1)


def cross_view(student: StudentOutputs, targets: Targets, head: int, temperature: float) -> Tensor:
    """Return the mean over pairs of a student's crop and another crop that the teacher saw.

    2 pairs of global crops, 2 for each local one.
    """
    first, second = targets.cls_VBO[head]
    total = cross_entropy(student.global_VBO[head][0], second, temperature).mean()
    total = total + cross_entropy(student.global_VBO[head][1], first, temperature).mean()
    for local_BO in student.local_VBO[head]:
        for target_BO in (first, second):
            total = total + cross_entropy(local_BO, target_BO, temperature).mean()
    return total / (2 + 2 * len(student.local_VBO[head]))


def same_view(
    elastic: StudentOutputs, intact: StudentOutputs, head: int, temperature: float
) -> Tensor:
    """Return how far the elastic student is from what the intact one makes of the same crops.

    The mean over global crops and the mean over local ones are added, as published.
    """
    pairs = [(elastic.global_VBO[head], intact.global_VBO[head])]
    if len(elastic.local_VBO[head]):
        pairs.append((elastic.local_VBO[head], intact.local_VBO[head]))
    terms = [
        cross_entropy(ours, (theirs.detach() / temperature).softmax(-1), temperature).mean()
        for ours, theirs in pairs
    ]
    return torch.stack(terms).sum()


def masked_patches(
    student: StudentOutputs, targets: Targets, head: int, temperature: float
) -> Tensor:
    """Return iBOT's loss: mean over crops of the mean over a crop's masked patches."""
    losses_N = cross_entropy(student.patches_NO[head], targets.patches_NO[head], temperature)
    return (losses_N * targets.weights_N).sum()


def koleo(cls_VBW: Tensor) -> Tensor:
    """Return minus the mean log distance to the nearest other image, added up over views.

    KoLeo of arXiv:1806.03198, on features of unit length, within a view and a group of images.
    """
    if cls_VBW.shape[1] < 2:
        return cls_VBW.sum() * 0
    unit_VBW = F.normalize(cls_VBW.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        near_VBB = unit_VBW @ unit_VBW.mT
        near_VBB.diagonal(dim1=1, dim2=2).fill_(-1)
        nearest_VB = near_VBB.argmax(-1)
    other_VBW = unit_VBW.gather(1, nearest_VB[..., None].expand_as(unit_VBW))
    distance_VB = F.pairwise_distance(unit_VBW, other_VBW, eps=1e-8)
    return -(distance_VB + 1e-8).log().mean(-1).sum()


def student_terms(
    student: StudentOutputs, targets: Targets, temperature: float, ibot: float
) -> Tensor:
    """Return what one student pays against the teacher: crops and masked patches, mean of heads."""
    heads = range(len(targets.cls_VBO))
    terms = [cross_view(student, targets, head, temperature) for head in heads]
    if student.patches_NO and ibot:
        terms += [ibot * masked_patches(student, targets, head, temperature) for head in heads]
    return torch.stack(terms).sum() / len(heads)
