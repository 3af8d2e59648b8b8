"""The list of weights and products is the decoder's own: names, shapes and arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from motet.models import counts
from motet.models.architecture import (
    block_kinds,
    block_products,
    block_weights,
    head_product,
    mixing,
    named_weights,
)
from motet.models.config import PRESETS, ModelConfig, preset
from motet.models.decoder import Decoder, initialize

DENSE = ModelConfig(96, 32, 4, 4, 4, 48)
MOE = replace(DENSE, n_experts=8, d_expert=24, n_dense_layers=1)
MODELS = {
    **{name: preset(name, 50_304) for name in PRESETS},
    "dense": DENSE,
    "grouped queries": replace(DENSE, n_kv_heads=2, head_dim=12),
    "tied": replace(DENSE, tied_embeddings=True),
    "Qwen2": replace(DENSE, qkv_bias=True, n_kv_heads=2),
    "Qwen3": replace(DENSE, qk_norm="head", head_dim=16),
    "OLMo-2": replace(DENSE, qk_norm="full", norm_position="post"),
    "Gemma-3": replace(DENSE, norm_position="both", qk_norm="head", activation="gelu_tanh"),
    "biases": replace(DENSE, qkv_bias=True, o_bias=True, mlp_bias=True, layer_ffn=(16, 48, 16, 48)),
    "window": replace(DENSE, window=8, layer_windows=(True, False, True, True)),
    "experts": MOE,
    "experts alone": replace(MOE, n_dense_layers=0),
    "one expert": replace(MOE, n_experts=1, experts_per_token=1),
    "shared": replace(MOE, n_shared_experts=2, shared_gate=True, moe_every=2, qkv_bias=True),
}


def on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("name", MODELS)
def test_the_list_names_every_weight_of_the_decoder_with_its_shape_in_its_order(name: str) -> None:
    found = [(weight.name, weight.shape) for weight in named_weights(MODELS[name])]
    decoder = on_meta(MODELS[name])
    assert found == [(n, tuple(p.shape)) for n, p in decoder.state_dict().items()]
    assert sorted(found) == sorted((n, tuple(p.shape)) for n, p in decoder.named_parameters())


def attended(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    batch, heads, tokens, width = query
    return 2 * 2 * batch * heads * tokens * key[2] * width


@pytest.mark.parametrize("name", [name for name in MODELS if name not in PRESETS])
def test_the_products_are_those_that_a_forward_pass_makes(name: str) -> None:
    """PyTorch's own counter sees every product; its table lacks attention's kernel for CPUs."""
    config, tokens = MODELS[name], torch.zeros(2, 8, dtype=torch.int64)
    decoder = Decoder(config)
    initialize(decoder, seed=1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attended}) as counter:
        decoder(tokens)
    total = counter.get_flop_counts()["Global"]
    seen = sum(n for operator, n in total.items() if "attention" not in str(operator))
    assert seen == 2 * counts.matmul_parameters(config) * tokens.numel()
    attention = sum(n for operator, n in total.items() if "attention" in str(operator))
    scores = sum(mixing(config, layer).operations(8) for layer in range(config.n_layers))
    assert attention == scores * tokens.numel()


def test_a_window_costs_what_its_band_holds() -> None:
    config = replace(DENSE, window=5, layer_windows=(True, False, False, True))
    length = 12
    band = sum(min(at + 1, 5) for at in range(length)) / length  # keys that a query reads
    for layer, keys in ((0, band), (1, (length + 1) / 2)):
        operations = mixing(config, layer).operations(length)
        assert operations == pytest.approx(4 * config.query_width * 2 * keys, rel=0.12)
    plain = replace(config, window=0, layer_windows=None)
    wide = replace(config, window=length)
    flops = [counts.training_flops_per_token(c, length) for c in (config, wide, plain)]
    assert flops[0] < flops[1] == flops[2]
    assert counts.parameters(config) == counts.parameters(plain)


def test_kinds_of_blocks_stand_for_every_block() -> None:
    for config in MODELS.values():
        if config.window:
            continue  # such blocks differ in what they cost, not in their weights
        kinds = {block_weights(config, layer): number for layer, number in block_kinds(config)}
        each = [block_weights(config, layer) for layer in range(config.n_layers)]
        assert {kind: each.count(kind) for kind in each} == kinds


def test_every_product_has_weights_of_one_kind_and_every_matrix_a_product() -> None:
    for config in MODELS.values():
        for layer, _ in block_kinds(config):
            specs = block_weights(config, layer)
            names = {product.name for product in block_products(config, layer)}
            assert {spec.product for spec in specs if spec.product} == names
            assert all(bool(spec.product) == (len(spec.shape) > 1) for spec in specs)
        assert head_product(config).columns == config.vocabulary_size
