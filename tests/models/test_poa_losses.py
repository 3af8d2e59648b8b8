"""The terms of POA's loss, each against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from motet.models.poa.config import LEAST_TEMPERATURE
from motet.models.poa.losses import (
    StudentOutputs,
    Targets,
    centred,
    cross_view,
    koleo,
    masked_patches,
    same_view,
    sinkhorn,
    student_terms,
)


def alone(_: Tensor) -> None:
    """The sum over one process."""


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def published_sinkhorn(cosines_RO: Tensor, temperature: float) -> Tensor:
    """SwAV's loop as written, in double precision."""
    q = (cosines_RO.double() / temperature).exp().T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= rows
    return (q * rows).T


def test_sinkhorn_is_the_published_loop() -> None:
    for temperature in (0.04, 0.07):
        x = cosines(12, 5)
        ours = sinkhorn(x, temperature, 3, alone)
        torch.testing.assert_close(
            ours.double(), published_sinkhorn(x, temperature), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(ours.sum(1), torch.ones(12))


def test_sinkhorn_uses_every_prototype_alike_where_all_rows_want_one() -> None:
    x = 0.01 * cosines(8, 4)
    x[:, 0] += 0.9
    assert sinkhorn(x, 0.04, 50, alone).sum(0).tolist() == pytest.approx([2.0] * 4, abs=0.02)


def test_sinkhorn_of_no_rows_is_empty_and_of_equal_rows_no_nan() -> None:
    assert sinkhorn(torch.zeros(0, 4), 0.04, 3, alone).shape == (0, 4)
    assert torch.isfinite(sinkhorn(torch.full((3, 4), -1.0), LEAST_TEMPERATURE, 3, alone)).all()


def test_every_head_is_centred_and_each_by_itself() -> None:
    """The public code returned the first head alone in one branch; a head that is left out shows as
    prototypes that are not used alike.
    """
    heads = [cosines(24, prototypes, seed=prototypes) for prototypes in (3, 4, 6, 8)]
    found = centred(heads, 0.07, 30, alone)
    assert [assigned.shape for assigned in found] == [head.shape for head in heads]
    for assigned in found:
        prototypes = assigned.shape[1]
        assert assigned.sum(0).tolist() == pytest.approx([24 / prototypes] * prototypes, abs=0.05)
    for changed in range(4):
        others = [head if at != changed else -head for at, head in enumerate(heads)]
        again = centred(others, 0.07, 30, alone)
        same = [torch.equal(a, b) for a, b in zip(found, again, strict=True)]
        assert same == [at != changed for at in range(4)]


def outputs(seed: int, heads: int = 4) -> StudentOutputs:
    return StudentOutputs(
        [cosines(2, 3, 5, seed=seed + at) for at in range(heads)],
        [cosines(4, 3, 5, seed=seed + 10 + at) for at in range(heads)],
        [cosines(6, 5, seed=seed + 20 + at) for at in range(heads)],
        cosines(2, 3, 7, seed=seed + 30),
    )


def targets(heads: int = 4) -> Targets:
    return Targets(
        [cosines(2, 3, 5, seed=50 + at).softmax(-1) for at in range(heads)],
        [cosines(6, 5, seed=60 + at).softmax(-1) for at in range(heads)],
        # crops with 1, 2, 3 and no patches of 6 crops in all
        torch.tensor([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]) / 6,
    )


def entropy(student: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(student / 0.1, -1)).sum(-1).mean()


def test_a_crop_learns_from_the_teachers_other_crops_only() -> None:
    student, target = outputs(0), targets()
    for head in range(4):
        crops = [*student.global_VBO[head], *student.local_VBO[head]]
        pairs = [
            entropy(crop, view)
            for at, crop in enumerate(crops)
            for other, view in enumerate(target.cls_VBO[head])
            if at != other
        ]
        assert len(pairs) == 2 + 8
        expected = torch.stack(pairs).mean()
        torch.testing.assert_close(cross_view(student, target, head, 0.1), expected)


def test_the_elastic_student_learns_from_the_same_crops_and_the_intact_one_does_not() -> None:
    elastic, intact = outputs(0), outputs(100)
    for part in (elastic, intact):
        part.global_VBO[1].requires_grad_()
        part.local_VBO[1].requires_grad_()
    found = same_view(elastic, intact, 1, 0.1)
    expected = entropy(elastic.global_VBO[1], (intact.global_VBO[1] / 0.1).softmax(-1)) + entropy(
        elastic.local_VBO[1], (intact.local_VBO[1] / 0.1).softmax(-1)
    )
    torch.testing.assert_close(found, expected)
    found.backward()
    assert elastic.global_VBO[1].grad is not None
    assert intact.global_VBO[1].grad is None
    assert intact.local_VBO[1].grad is None


def test_masked_patches_weigh_alike_within_a_crop_and_crops_alike() -> None:
    student, target = outputs(0), targets()
    each = -(target.patches_NO[0] * torch.log_softmax(student.patches_NO[0] / 0.1, -1)).sum(-1)
    crops = [each[0], each[1:3].mean(), each[3:].mean(), 0, 0, 0]
    torch.testing.assert_close(masked_patches(student, target, 0, 0.1), sum(crops) / 6)


def test_heads_are_averaged() -> None:
    student, target = outputs(0), targets()
    heads = [cross_view(student, target, at, 0.1) for at in range(4)]
    patches = [masked_patches(student, target, at, 0.1) for at in range(4)]
    expected = torch.stack(heads).mean() + 0.5 * torch.stack(patches).mean()
    torch.testing.assert_close(student_terms(student, target, 0.1, 0.5), expected)
    without = student._replace(patches_NO=[])
    torch.testing.assert_close(student_terms(without, target, 0.1, 0.5), torch.stack(heads).mean())


def test_koleo_is_the_log_distance_to_the_nearest_other_image() -> None:
    x = cosines(2, 5, 3)
    unit = F.normalize(x, dim=-1)
    expected = 0.0
    for view in range(2):
        for at in range(5):
            others = [unit[view, other] for other in range(5) if other != at]
            nearest = min(float((unit[view, at] - other).norm()) for other in others)
            expected -= math.log(nearest) / 5
    assert float(koleo(x)) == pytest.approx(expected, abs=1e-4)
    assert float(koleo(x[:, :1])) == 0  # nobody to be near to
