"""Schedules and groups of weights are as published."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motet.models.poa import schedules
from motet.models.poa.config import HeadConfig, PoaConfig
from motet.models.poa.heads import ProjectionHeads
from motet.models.vit import ViT, ViTConfig

PUBLISHED = PoaConfig(
    vit=ViTConfig(224, 16, 1024, 24),
    widths=tuple(range(384, 1025, 64)),
    depths=tuple(range(12, 25)),
    steps=276_800,
    images_per_step=1600,
    groups=32,
)
SMALL = replace(
    PUBLISHED,
    vit=ViTConfig(224, 32, 64, 2),
    widths=(64,),
    depths=(2,),
    heads=HeadConfig((4, 8), 8, 4),
)


def test_the_defaults_are_the_published_schedules() -> None:
    end = PUBLISHED.steps
    assert schedules.learning_rate(PUBLISHED, 0) == 0
    assert schedules.learning_rate(PUBLISHED, 8000) == pytest.approx(4e-3 * (1600 / 1024) ** 0.5)
    assert schedules.learning_rate(PUBLISHED, end) == pytest.approx(2e-5)
    assert schedules.weight_decay(PUBLISHED, 0) == pytest.approx(0.04)
    assert schedules.weight_decay(PUBLISHED, end // 2) == pytest.approx(0.22)
    assert schedules.weight_decay(PUBLISHED, end) == pytest.approx(0.4)
    assert schedules.momentum(PUBLISHED, 0) == pytest.approx(0.992)
    assert schedules.momentum(PUBLISHED, end) == pytest.approx(0.9999)
    assert schedules.teacher_temperature(PUBLISHED, 0) == pytest.approx(0.04)
    assert schedules.teacher_temperature(PUBLISHED, 12_000) == pytest.approx(0.055)
    assert schedules.teacher_temperature(PUBLISHED, 24_000) == pytest.approx(0.07)
    assert len(PUBLISHED.sizes) == 143


def test_early_blocks_learn_more_slowly_and_norms_do_not_decay() -> None:
    vit, heads = ViT(SMALL.vit), ProjectionHeads(64, SMALL.heads, 0)
    groups = schedules.parameter_groups(vit, heads, SMALL)
    found = {
        id(weight): (group["lr_factor"], group["decay_factor"], group["last_layer"])
        for group in groups
        for weight in group["params"]
    }
    expected = {
        "patch_embed.proj.weight": (0.2 * 0.9**3, 1.0, False),
        "patch_embed.proj.bias": (0.2 * 0.9**3, 0.0, False),
        "cls_token": (0.9**3, 1.0, False),
        "pos_embed": (0.9**3, 1.0, False),
        "mask_token": (0.9**3, 1.0, False),
        "blocks.0.attn.qkv.weight": (0.9**2, 1.0, False),
        "blocks.1.mlp.fc1.weight": (0.9, 1.0, False),
        "blocks.1.mlp.fc1.bias": (0.9, 0.0, False),
        "blocks.1.ls1.gamma": (0.9, 0.0, False),
        "norm.weight": (1.0, 0.0, False),
    }
    for name, factors in expected.items():
        assert found[id(vit.get_parameter(name))] == pytest.approx(factors)
    assert found[id(heads.get_parameter("heads.1.mlp0.weight"))] == (1.0, 1.0, False)
    assert found[id(heads.get_parameter("heads.1.last_layer.weight"))] == (1.0, 1.0, True)
    assert len(found) == len(list(vit.parameters())) + len(list(heads.parameters()))


def test_a_groups_rate_and_decay_are_those_of_the_step() -> None:
    vit, heads = ViT(SMALL.vit), ProjectionHeads(64, SMALL.heads, 0)
    optimizer = torch.optim.AdamW(schedules.parameter_groups(vit, heads, SMALL))
    for step in (0, 799, 800, 100_000):
        schedules.set_step(optimizer, SMALL, step)
        rate, decay = schedules.learning_rate(SMALL, step), schedules.weight_decay(SMALL, step)
        for group in optimizer.param_groups:
            rests = group["last_layer"] and step < 800
            assert group["lr"] == (0.0 if rests else rate * group["lr_factor"])
            assert group["weight_decay"] == decay * group["decay_factor"]
