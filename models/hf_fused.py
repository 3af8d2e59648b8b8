"""Tensors that some Hugging Face folders keep otherwise than one matrix for each projection, and
norms that multiply by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from motet.models.config import ModelConfig
from motet.models.hf_kinds import HfKind

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def is_norm(name: str) -> bool:
    """Tell whether a tensor of a folder is the weight of a norm."""
    return name.endswith("norm.weight")


def stored(tensors: Mapping[str, Tensor], kind: HfKind) -> dict[str, Tensor]:
    """Return tensors under the names, and with the values, that a class keeps them with."""
    found = dict(tensors)
    if kind.unit_norms:
        found |= {name: value - 1 for name, value in tensors.items() if is_norm(name)}
    if not kind.fused:
        return found
    for name in tensors:
        for fused, parts in FUSED.items():
            if f".{parts[0]}." in name:
                names = [name.replace(parts[0], part) for part in parts]
                found[name.replace(parts[0], fused)] = torch.cat([found.pop(n) for n in names])
    return found


def read_back(
    name: str, tensor: Tensor, kind: HfKind, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a tensor of a folder holds, under the names of one matrix per projection.

    A norm becomes fp32: 1 + weight has more digits than the weight's own type may hold.
    """
    if kind.unit_norms and is_norm(name):
        yield name, tensor.float() + 1
        return
    for fused, parts in FUSED.items():
        if kind.fused and f".{fused}." in name:
            widths = [config.query_width, config.kv_width, config.kv_width]
            if len(parts) == 2:
                widths = [len(tensor) // 2] * 2
            if sum(widths) != len(tensor):
                break  # its shape is refused under its own name
            for part, value in zip(parts, tensor.split(widths), strict=True):
                yield name.replace(fused, part), value
            return
    yield name, tensor
