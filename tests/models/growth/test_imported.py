"""Growth of models whose parts presets do not have: kept as they are, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.models.config import ModelConfig, ModelError
from motet.models.growth.registry import operator
from tests.models.families import made, tiny
from tests.models.growth.growing import EXACT, apart

KEPT: dict[str, Any] = {
    **{"window": 6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    **{"attention_scale": 0.3, "attention_softcap": 2.0, "logit_softcap": 3.0},
    **{"residual_scale": 0.5, "logits_divisor": 2.0, "embedding_scale": 2.0},
    "activation": "gelu_tanh",
}


def wider(config: ModelConfig) -> ModelConfig:
    heads = {"n_heads": 2 * config.n_heads, "n_kv_heads": 2 * config.n_kv_heads}
    return replace(
        config,
        d_model=2 * config.d_model,
        d_ffn=2 * config.d_ffn,
        head_dim=config.head_width,
        **heads,
    )


@pytest.mark.parametrize("name", ["hypercloning", "identity"])
def test_what_says_nothing_of_weights_is_kept_and_growth_stays_exact(name: str) -> None:
    config = tiny(**KEPT)
    target = wider(config) if name == "hypercloning" else replace(config, n_layers=4)
    growth = operator(name).growth(config, target)
    assert apart(growth, made(config)) < EXACT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norm_position": "both"}, "norm_position='both'.*no operator maps"),
        ({"o_bias": True, "qkv_bias": True}, "o_bias=True.*no operator maps"),
        ({"mlp_bias": True}, "mlp_bias=True.*no operator maps"),
        ({"window": 4, "layer_windows": (True, False)}, "layer_windows"),
        ({"layer_rope": (True, False)}, "layer_rope"),
    ],
)
@pytest.mark.parametrize("name", ["identity", "stack"])
def test_weights_and_patterns_that_no_operator_knows_are_refused_by_name(
    name: str, change: dict[str, Any], match: str
) -> None:
    config = tiny(**change)
    marks = {key: value * 2 for key, value in change.items() if isinstance(value, tuple)}
    with pytest.raises(ModelError, match=match):
        operator(name).growth(config, replace(config, n_layers=4, **marks))


def test_a_growth_that_its_class_could_not_hold_is_refused() -> None:
    config = tiny(embedding_scale=32**0.5, model_type="gemma", tied_embeddings=True)
    with pytest.raises(ModelError, match=r"could not be exported: GemmaForCausalLM.*keep d_model"):
        operator("hypercloning").growth(config, wider(config))
