"""Mixtral, Qwen2-MoE, Qwen3-MoE (and Qwen2's biases) equal transformers, in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import made, some_tokens, tiny

from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.hf import from_hf, hf_names, to_hf
from motet.models.hf_config import config_from_hf, hf_config

transformers = pytest.importorskip("transformers")

QWEN2 = {"n_shared_experts": 1, "d_shared": 28, "shared_gate": True, "qkv_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-top-1-mha": {"experts_per_token": 1, "n_kv_heads": 4},
    "qwen2_moe": {**QWEN2, "d_expert": 20, "normalize_top_k": False},
    "qwen2_moe-no-bias": {**QWEN2, "qkv_bias": False, "moe_every": 2, "tied_embeddings": True},
    "qwen3_moe": {"qk_norm": "head", "d_expert": 20, "experts_per_token": 3, "head_dim": 12},
    "qwen3_moe-dense-first": {"qk_norm": "head", "d_expert": 20, "n_dense_layers": 1},
    "qwen2": {"n_experts": 0, "qkv_bias": True},
}


def config_of(name: str) -> ModelConfig:
    return tiny(**{"n_experts": 5, "n_layers": 2, **MODELS[name]})


def biased(config: ModelConfig) -> Decoder:
    """A decoder whose biases are not zero."""
    decoder = made(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".bias"):
                parameter += torch.randn(parameter.shape, generator=generator)
    return decoder


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_equal_logits_and_gradients_in_transformers(
    name: str, tmp_path: Path
) -> None:
    config = config_of(name)
    decoder = biased(config)
    to_hf(decoder.state_dict(), config, None, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == name.split("-")[0]
    tokens = some_tokens(config, 2, 23)
    close(decoder(tokens), model(tokens).logits)

    sums = decoder(tokens[:, :-1], tokens[:, 1:], mode="loss")
    (sums.cross_entropy / sums.n_labels).backward()
    model(input_ids=tokens, labels=tokens).loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    names = hf_names(config)
    for ours, parameter in decoder.named_parameters():
        if ".experts." not in ours:
            wanted = theirs[names[ours].replace(".block_sparse_moe.", ".mlp.")]
        else:
            layer, _, projection = ours.partition(".feed_forward.experts.")
            prefix = f"model.layers.{layer.split('.')[1]}.mlp.experts."
            if projection == "down_proj":
                wanted = theirs[f"{prefix}down_proj"]
            else:
                gate, up = theirs[f"{prefix}gate_up_proj"].chunk(2, 1)
                wanted = gate if projection == "gate_proj" else up
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_import_of_a_transformers_folder_has_equal_logits(
    name: str, fused: bool, tmp_path: Path
) -> None:
    config = config_of(name)
    settings = hf_config(config, torch.float32, 64)
    del settings["rope_theta"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings)
    )
    with torch.no_grad():  # transformers starts routers and biases at zero
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith((".gate.weight", ".bias")):
                parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="20KB", save_original_format=not fused)
    found, state = from_hf(tmp_path)
    same = {"head_dim": config.head_width, "d_ffn": 0, "d_expert": config.expert_width}
    if config.n_experts == 0:
        same = {"head_dim": config.head_width}
    assert replace(found, **same) == replace(config, **same)
    assert found.expert_width == config.expert_width
    decoder = Decoder(found)
    decoder.load_state_dict(state)
    tokens = some_tokens(config, 2, 23)
    close(decoder(tokens), model(tokens).logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_in_shards_changes_no_bit(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    decoder = biased(config)
    to_hf(decoder.state_dict(), config, None, tmp_path, max_shard_bytes=20_000)
    found, state = from_hf(tmp_path)
    assert state.keys() == decoder.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in decoder.state_dict().items())
    assert found.expert_width == config.expert_width
    assert found.n_moe_layers == config.n_moe_layers


def test_every_expert_is_a_tensor_of_its_own_on_disk() -> None:
    names = hf_names(config_of("mixtral"))
    ours = "blocks.1.feed_forward.experts.up_proj.3"
    assert names[ours] == "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert names["blocks.1.feed_forward.router.weight"].endswith("block_sparse_moe.gate.weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"router_score": "sigmoid"}, "model.router_score='sigmoid'"),
        ({"bias_rate": 0.01}, "holds the bias that chooses"),
        ({"n_shared_experts": 1}, "Qwen2MoeForCausalLM has .*shared_gate=True"),
        ({"norm_position": "post", "qk_norm": "full"}, "no Hugging Face class has experts"),
        ({"n_experts": 0, "qk_norm": "head", "qkv_bias": True}, "qkv_bias=True has no Hugging"),
    ],
)
def test_a_shape_without_a_transformers_class_is_refused(change: dict, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        hf_config(tiny(**{"n_experts": 4, **change}), torch.float32, 64)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"num_local_experts": None, "num_experts": None}, "lacks num_experts"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_an_unsupported_config_is_refused_with_the_reason(
    name: str, change: dict, match: str
) -> None:
    with pytest.raises(ModelError, match=match):
        config_from_hf({**hf_config(config_of(name), torch.float32, 64), **change})


def test_a_folder_that_lacks_one_expert_is_refused(tmp_path: Path) -> None:
    config = config_of("mixtral")
    to_hf(biased(config).state_dict(), config, None, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, "num_local_experts": 6}))
    with pytest.raises(ModelError, match=r"blocks\.0\.feed_forward\.experts\."):
        from_hf(tmp_path)
