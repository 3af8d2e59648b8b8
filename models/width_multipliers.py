"""Width multipliers of muP: what lets models of several widths train with one learning rate.

Tensor Programs V, arXiv:2203.03466, table 8, for Adam: of a matrix inside blocks that reads r times
as many channels as that of the base, the learning rate is divided by r, and first values by
sqrt(r); logits are multiplied by 1 / r; embedding, head, norms and biases stay. Attention's 1 / K
is what it is already where heads keep their channels, as all that grows here does. Torch-free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from motet.models.architecture import WeightSpec, named_weights
from motet.models.config import ModelConfig

INSTEAD = {
    "hidden": ("expert", "shared"),
    "expert": ("hidden", "shared"),
    "shared": ("hidden", "expert"),
}
"""With which channels those of a feed-forward are compared where the base has none of their own
kind, as a dense base of a mixture.
"""
FINITE = ("experts", "one")
"""Axes that do not grow with the width: what writes them is a readout, as the head is."""


def fan_in_ratio(source: ModelConfig | None, target: ModelConfig) -> dict[str, float]:
    """Return of every matrix of a block how many times as many channels it reads as one of another
    model: its width multiplier, where that model is the base; {} where there is none.

    A step of Adam moves what it writes as many times as far, so that its learning rate is divided
    by this. Layers are compared with the first that reads such channels: widths of layers grow
    alike.
    """
    if source is None:
        return {}
    before: dict[str, int] = {}
    for weight in _matrices(source):
        before.setdefault(weight.axes[-1], weight.shape[-1])

    def there(axis: str) -> int:
        return next(before[name] for name in (axis, *INSTEAD.get(axis, ())) if name in before)

    return {weight.name: weight.shape[-1] / there(weight.axes[-1]) for weight in _matrices(target)}


def initial_scales(base: ModelConfig, config: ModelConfig) -> dict[str, float]:
    """Return what first values of a block's matrices are multiplied by, by name: 1 / sqrt(r), and
    1 / r of routers and gates, whose outputs are as many at any width.
    """
    readouts = {weight.name for weight in _matrices(config) if weight.axes[-2] in FINITE}
    ratios = fan_in_ratio(base, config)
    return {name: r ** (-1.0 if name in readouts else -0.5) for name, r in ratios.items()}


def multiplied(base: ModelConfig, config: ModelConfig) -> ModelConfig:
    """Return a config with the multiplier of its logits: 1 / r of the residual stream."""
    return replace(config, output_multiplier=base.d_model / config.d_model)


def multiplier_facts(base: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """Return the multipliers of a model as a manifest has them: of logits, of attention's scores,
    and of the learning rates of block matrices by their names within a block, where they are not 1.
    """
    rates: dict[str, list[float]] = {}
    for name, ratio in fan_in_ratio(base, config).items():
        found = rates.setdefault(name.split(".", 2)[-1], [])
        if 1 / ratio not in found:
            found.append(1 / ratio)
    scale = config.attention_scale
    return {
        "output": config.output_multiplier,
        "attention": config.head_width**-0.5 if scale is None else scale,
        "learning_rate": {name: found for name, found in rates.items() if found != [1.0]},
    }


def uneven(base: ModelConfig) -> bool:
    """Return whether layers of a base read different numbers of hidden channels: there is no one
    number to compare others with.
    """
    return any(ratio != 1.0 for ratio in fan_in_ratio(base, base).values())


def _matrices(config: ModelConfig) -> list[WeightSpec]:
    """Return the matrices of all blocks, under their full names."""
    return [
        weight
        for weight in named_weights(config)
        if weight.name.startswith("blocks.") and len(weight.shape) > 1
    ]
