"""Small models of each family, and their twins in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"norm_position": "pre", "qk_norm": "none"},
    "olmo2": {"norm_position": "post", "qk_norm": "full"},
    "qwen3": {"norm_position": "pre", "qk_norm": "head"},
}


def tiny(family: str = "llama", **overrides: Any) -> ModelConfig:
    """Return a config with steps of a millisecond; init_std is large so that layers matter."""
    sizes: dict[str, Any] = {
        "vocabulary_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ffn": 48,
        "init_std": 0.2,
    }
    return ModelConfig(**{**sizes, **FAMILIES[family], **overrides})


def made(config: ModelConfig, seed: int = 0) -> Decoder:
    """Return an initialized decoder with norms that are not all ones: a misplaced one shows."""
    decoder = Decoder(config)
    initialize(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def some_tokens(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Return seeded random tokens int64 [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocabulary_size, (sequences, length), generator=generator)
