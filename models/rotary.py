"""Rotary positions (arXiv:2104.09864): frequencies, scaled or not, and their tables.

K channels per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from motet.models.rope_scaling import ORIGINAL, Scaling


def rotary_tables(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    scaling: Scaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [length, 1, K], for positions 0 .. length - 1 (arXiv:2104.09864).

    Angles are position x theta^(-2 i / K), in fp32, or those of `scaling`; halves of K hold the
    same angles, as Hugging Face lays them out. The first half of sin is negated, which is what
    `layers.rotate` multiplies with.
    """
    # Outside inference mode: a table made while probing must still serve the next training step.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        plain = 1.0 / theta**exponents
        scale, frequencies = 1.0, plain
        if scaling is not None:
            frequencies, scale = _scaled(plain, head_dim, theta, dict(scaling))
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def _scaled(
    plain: Tensor, head_dim: int, theta: float, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    """Return scaled frequencies [K / 2], and what cos and sin are multiplied by.

    Source: transformers, `modeling_rope_utils.py`, whose arithmetic this is. "dynamic" changes
    nothing up to the length that the model was made for, and is refused beyond it.
    """
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, head_dim, theta, scaling), _yarn_scale(scaling)
    return plain, 1.0


def _llama3(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow waves are stretched by `factor`, fast ones not, those between in parts (Llama 3.1)."""
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling[ORIGINAL] / (2 * math.pi / plain)
    part = (turns - low) / (high - low)
    between = (1 - part) * plain / factor + part * plain
    return torch.where(turns < low, plain / factor, torch.where(turns > high, plain, between))


def _yarn(plain: Tensor, head_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Channels that turn rarely are stretched, those that turn often are not (arXiv:2309.00071,
    section 3.2).
    """
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)

    def channel(turns: float) -> float:
        """Return which channel turns so often over the original length."""
        length = scaling[ORIGINAL] / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = channel(fast), channel(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    at = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    stretched = ((at - low) / (high - low)).clamp(0, 1)
    return plain / scaling["factor"] * stretched + plain * (1 - stretched)


def _yarn_scale(scaling: dict[str, Any]) -> float:
    """Return what cos and sin are multiplied by (arXiv:2309.00071, section 3.4)."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)
