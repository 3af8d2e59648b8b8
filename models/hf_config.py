"""config.json of Hugging Face: which decoders have a class there, and what its keys say.

Llama, OLMo-2, Qwen2 and Qwen3 differ in where norms stand, in the names of two of them and in
biases. `hf_moe.py` has what experts add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from motet.models import hf_moe
from motet.models.config import ModelConfig, ModelError, check, llama_heads

# (norm_position, qk_norm, qkv_bias) -> (model_type, class) of decoders without experts
DENSE_CLASSES = {
    ("pre", "none", False): ("llama", "LlamaForCausalLM"),
    ("post", "full", False): ("olmo2", "Olmo2ForCausalLM"),
    ("pre", "none", True): ("qwen2", "Qwen2ForCausalLM"),
    ("pre", "head", False): ("qwen3", "Qwen3ForCausalLM"),
}
# model_type -> (norm_position, qk_norm, qkv_bias)
KINDS = {kind: key for key, (kind, _) in DENSE_CLASSES.items()} | {
    "mixtral": ("pre", "none", False),
    "qwen2_moe": ("pre", "none", True),
    "qwen3_moe": ("pre", "head", False),
}
LAYER_WIDTHS = "layer_intermediate_sizes"
"""Key of config.json: the hidden width of every layer where they differ and zeros fill the rest.
transformers keeps it and does not read it; Motet reads the narrow layers back."""
# What an imported config.json may not ask for: key -> the values that mean "off".
MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "use_sliding_window": (None, False),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "hidden_act": (None, "silu"),
}


def hf_config(config: ModelConfig, dtype: torch.dtype, sequence_length: int) -> dict[str, Any]:
    """Return the config.json of `config`; `ModelError` if no transformers class has this shape."""
    check(config)
    kind, name = family(config)
    if why := llama_heads(config):
        raise ModelError(f"model.{why}")
    widths = config.layer_ffn
    config = one_width(config)
    text = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if widths is not None:
        text[LAYER_WIDTHS] = list(widths)
    return text | (hf_moe.config_text(config, kind) if config.n_experts else {})


def one_width(config: ModelConfig) -> ModelConfig:
    """Return a config whose dense layers all have the width of the widest: transformers' decoders
    have one. Channels of zero weights fill the others, and add nothing.
    """
    if config.layer_ffn is None:
        return config
    dense = [n for layer, n in enumerate(config.layer_ffn) if not config.has_experts(layer)]
    expert = config.expert_width if config.n_experts else None
    widest = max(dense, default=config.d_ffn)
    return replace(config, d_ffn=widest, d_expert=expert, layer_ffn=None)


def family(config: ModelConfig) -> tuple[str, str]:
    """Return (model_type, class); `ModelError` if no transformers class has this shape."""
    if config.n_experts:
        return hf_moe.family(config)
    key = (config.norm_position, config.qk_norm, config.qkv_bias)
    if key not in DENSE_CLASSES:
        options = ", ".join(f"{a}/{b}/{c} ({k[1]})" for (a, b, c), k in DENSE_CLASSES.items())
        raise ModelError(
            f"model.norm_position={config.norm_position!r} with model.qk_norm={config.qk_norm!r} "
            "and "
            f"model.qkv_bias={config.qkv_bias} has no Hugging Face class; "
            f"norm_position/qk_norm/qkv_bias can be {options}"
        )
    return DENSE_CLASSES[key]


def config_from_hf(text: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` that a config.json describes.

    Raises:
        ModelError: a family that is not in `KINDS`, a feature that `Decoder` lacks, a missing key,
            or sizes that do not fit together.
    """
    kind = text.get("model_type")
    if kind not in KINDS:
        raise ModelError(f"config.json: model_type={kind!r} is not one of {', '.join(KINDS)}")
    rope = text.get("rope_parameters") or {}
    _check_supported(text, rope)
    norm_position, qk_norm, qkv_bias = KINDS[kind]
    heads = text["num_attention_heads"]
    fields: dict[str, Any] = {"qkv_bias": qkv_bias}
    if kind in hf_moe.CLASSES:
        fields |= hf_moe.config_fields(text, kind)
    config = ModelConfig(
        vocabulary_size=text["vocab_size"],
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=text.get("num_key_value_heads") or heads,
        d_ffn=text["intermediate_size"],
        layer_ffn=text.get(LAYER_WIDTHS),
        head_dim=_head_dim(text, kind),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or _THETA.get(kind, 1e4)),
        norm_eps=float(text.get("rms_norm_eps", _EPS.get(kind, 1e-6))),
        norm_position=norm_position,  # type: ignore[arg-type]
        qk_norm=qk_norm,  # type: ignore[arg-type]
        tied_embeddings=bool(text.get("tie_word_embeddings", False)),
        init_std=float(text.get("initializer_range") or 0.02),
        **fields,
    )
    check(config)
    return config


def _check_supported(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuse what `Decoder` cannot do, and a config.json without the sizes of a model."""
    for key, off in MUST_BE_OFF.items():
        if text.get(key) not in off:
            raise ModelError(
                f"config.json: {key}={text[key]!r} is not supported; only {off[-1]!r} is"
            )
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"config.json: rope_parameters.rope_type={rope['rope_type']!r} is not supported; "
            "only 'default' is"
        )
    if set(text.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError("config.json: layer_types has layers other than 'full_attention'")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [key for key in (*needed, "num_attention_heads") if key not in text]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}")


# Where a config.json says nothing, by model_type.
_THETA = {"mixtral": 1e6}
_EPS = {"olmo2": 1e-5, "mixtral": 1e-5}


def _head_dim(text: Mapping[str, Any], kind: str) -> int | None:
    """Return the width only where it is not d_model / heads; Qwen3's own default is 128."""
    width = text.get("head_dim") or (128 if kind == "qwen3" else None)
    return (
        None
        if width is None or width * text["num_attention_heads"] == text["hidden_size"]
        else width
    )
