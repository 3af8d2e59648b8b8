"""Small models that grow, with optimizer states that are told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.growth.growth import Growth, grow, grown
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState
from tests.models.families import made, some_tokens

MOE: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 16}
SHARED: dict[str, Any] = {"n_shared_experts": 1, "d_shared": 24, "shared_gate": True, **MOE}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "olmo2": ("olmo2", {"n_kv_heads": 4}),
    "qwen3-tied": ("qwen3", {"tied_embeddings": True}),
    "qwen2": ("llama", {"qkv_bias": True}),
    "experts": ("llama", MOE),
    "shared-tied": ("qwen3", SHARED | {"moe_every": 2, "tied_embeddings": True}),
}
"""Families, grouped queries, norms of queries and keys, biases, experts, ties."""


EXACT = 1e-5
"""Most that logits of a growth that is called exact may move, over the largest of them."""


def states(model: Decoder, seed: int = 0) -> list[tuple[str, WeightState]]:
    """The weights with moments of random numbers, and a step of 7."""
    generator = torch.Generator().manual_seed(seed)

    def state(weight: Tensor) -> WeightState:
        m, v = (torch.randn(weight.shape, generator=generator) for _ in range(2))
        return {
            "weight": weight.clone(),
            "exp_avg": m,
            "exp_avg_sq": v.square(),
            "step": torch.tensor(7.0),
        }

    return [(name, state(weight)) for name, weight in model.state_dict().items()]


def all_grown(growth: Growth, model: Decoder) -> dict[str, WeightState]:
    return dict(grow(growth, states(model)))


def loaded(config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    model = Decoder(config)
    model.load_state_dict(weights)
    return model


def larger(growth: Growth, model: Decoder) -> Decoder:
    return loaded(growth.target, grown(growth, model.state_dict()))


def apart(growth: Growth, model: Decoder) -> float:
    """How far the grown model's logits are from the old one's, over their size."""
    tokens = some_tokens(growth.source, 2, 16)
    with torch.no_grad():
        old, new = model(tokens), larger(growth, model)(tokens)
    return float((old - new).abs().max() / old.abs().max())


def source_of(kind: str, **overrides: Any) -> tuple[ModelConfig, Decoder]:
    from tests.models.families import tiny

    family, sizes = KINDS[kind]
    config = tiny(family, **{**sizes, **overrides})
    return config, made(config)


def adamw(states: dict[str, WeightState], model: Decoder, lr: float) -> torch.optim.AdamW:
    """An optimizer of the model's weights that goes on from states."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for name, parameter in model.named_parameters():
        keys = ("exp_avg", "exp_avg_sq", "step")
        optimizer.state[parameter] = {key: states[name][key].clone() for key in keys}
    return optimizer


def train(
    model: Decoder, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0
) -> list[float]:
    """Train on the words of a little language; return the losses."""
    losses = []
    for step in range(steps):
        tokens = language(model.config.vocabulary_size, 8, 17, seed + step)
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def language(words: int, sequences: int, length: int, seed: int) -> Tensor:
    """Sequences where each token follows from the one before it, but for one in eight."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, words, (sequences, length), generator=generator)
    odd = torch.rand(sequences, length, generator=generator) < 0.125
    for at in range(1, length):
        follows = (tokens[:, at - 1] * 5 + 3) % words
        tokens[:, at] = torch.where(odd[:, at], tokens[:, at], follows)
    return tokens


def refusal(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """What an operator says of two sizes of a Llama between which it cannot grow."""
    config, _ = source_of("llama", **old)
    with pytest.raises(ModelError) as caught:
        operator(name).growth(config, replace(config, **new))
    return str(caught.value)
