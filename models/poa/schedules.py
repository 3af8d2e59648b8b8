"""Learning rate, weight decay, momentum and temperature of a step; groups of weights for AdamW.

Source: DINOv2 (arXiv:2304.07193), whose shapes POA keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from motet.models.poa.config import PoaConfig


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Return a value that goes from `first`, at step 0, to `last`, at step `steps`."""
    done = min(step / steps, 1.0) if steps > 0 else 1.0
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def learning_rate(config: PoaConfig, step: int) -> float:
    """Return the learning rate of the last layer: linear warm-up from 0, then a cosine."""
    peak = config.lr_at_1024 * math.sqrt(config.images_per_step / 1024)
    warmup = config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    return cosine(peak, config.lr_last, step - warmup, config.steps - warmup)


def weight_decay(config: PoaConfig, step: int) -> float:
    return cosine(*config.weight_decay, step, config.steps)


def momentum(config: PoaConfig, step: int) -> float:
    """Return the share of the teacher that stays."""
    return cosine(*config.momentum, step, config.steps)


def teacher_temperature(config: PoaConfig, step: int) -> float:
    """Return the teacher's temperature: linear warm-up, then constant."""
    first, last = config.temperature
    warmup = config.temperature_warmup_steps
    return first + (last - first) * min(step / warmup, 1.0) if warmup else last


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of the network: 0 is what comes before the blocks."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    before = ("patch_embed.", "cls_token", "pos_embed", "mask_token")
    return 0 if name.startswith(before) else depth + 1


def parameter_groups(vit: nn.Module, heads: nn.Module, config: PoaConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups, each with its factors on learning rate and weight decay.

    Blocks learn more slowly the further they are from the output, the patch embedding at a fifth
    of its layer's; biases, norms and LayerScale do not decay.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for key, weight in (*_keyed(vit, config, True), *_keyed(heads, config, False)):
        groups.setdefault(key, []).append(weight)
    return [
        {"params": weights, "lr_factor": lr, "decay_factor": decay, "last_layer": last}
        for (lr, decay, last), weights in groups.items()
    ]


def _keyed(
    module: nn.Module, config: PoaConfig, layered: bool
) -> Iterator[tuple[tuple[float, float, bool], nn.Parameter]]:
    depth = config.vit.depth
    for name, weight in module.named_parameters():
        lr = config.layer_decay ** (depth + 1 - layer_of(name, depth)) if layered else 1.0
        if name.startswith("patch_embed."):
            lr *= config.patch_lr
        rests = name.endswith(".bias") or "norm" in name or "gamma" in name
        yield (lr, 0.0 if rests else 1.0, "last_layer" in name), weight


def set_step(optimizer: torch.optim.Optimizer, config: PoaConfig, step: int) -> None:
    """Give every group its learning rate and weight decay of a step."""
    lr, decay = learning_rate(config, step), weight_decay(config, step)
    for group in optimizer.param_groups:
        frozen = group["last_layer"] and step < config.frozen_steps
        group["lr"] = 0.0 if frozen else lr * group["lr_factor"]
        group["weight_decay"] = decay * group["decay_factor"]
