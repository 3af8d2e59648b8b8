"""config.json of Hugging Face: what its keys say of a decoder, and back.

`hf_kinds.py` has the classes, `hf_attention.py` rotary positions and windows, `hf_moe.py` what
experts add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from motet.models import hf_attention, hf_moe
from motet.models.config import ModelConfig, ModelError, check, llama_heads
from motet.models.hf_kinds import KINDS, MOE_KINDS, NOT_HELD, HfKind, kind_of

LAYER_WIDTHS = "layer_intermediate_sizes"
"""Key of config.json: the hidden width of every layer where they differ and zeros fill the rest.
transformers keeps it and does not read it; Motet reads the narrow layers back."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What an imported config.json may not ask for: key -> the values that mean "off".
MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), (None, 0, 0.0)),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_bidirectional_attention": (None, False),
}
# Keys of Granite -> settings of `ModelConfig`.
MULTIPLIERS = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logits_divisor",
}
# Keys of Gemma -> settings, and what Gemma-2 has where they are left out.
SOFTCAPS = {
    "attn_logit_softcapping": ("attention_softcap", 50.0),
    "final_logit_softcapping": ("logit_softcap", 30.0),
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
        "hidden_act": _activation_name(config),
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.o_bias,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **hf_attention.rope_text(config, KINDS.get(kind) or MOE_KINDS[kind], sequence_length),
    }
    if widths is not None:
        text[LAYER_WIDTHS] = list(widths)
    if config.n_experts:
        return text | hf_moe.config_text(config, kind)
    return text | hf_attention.window_text(config, kind) | _own_text(config, kind)


def _activation_name(config: ModelConfig) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def _own_text(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Return the keys that one class has for what others lack."""
    text: dict[str, Any] = {}
    able = KINDS[kind].able
    if "mlp_bias" in able:
        text["mlp_bias"] = config.mlp_bias
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    if kind == "granite":
        text |= {key: getattr(config, name) for key, name in MULTIPLIERS.items()}
        text["attention_multiplier"] = scale
    if KINDS[kind].unit_norms:
        text["hidden_activation"] = _activation_name(config)
    if KINDS[kind].norm_position == "both":
        scalar = 1 / scale**2
        text["query_pre_attn_scalar"] = (
            round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-6) else scalar
        )
        for key, (name, _) in SOFTCAPS.items():
            text[key] = getattr(config, name) or None
    return text


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
    kind, why = kind_of(config)
    if not kind:
        wanted = f"of model_type {config.model_type!r} " if config.model_type else ""
        shapes = {(k.norm_position, k.qk_norm): k.name for k in reversed(KINDS.values())}
        options = ", ".join(f"{a}/{b} ({name})" for (a, b), name in shapes.items())
        raise ModelError(
            f"model.norm_position={config.norm_position!r} with model.qk_norm={config.qk_norm!r} "
            f"and model.qkv_bias={config.qkv_bias} has no Hugging Face class {wanted}"
            f"(nearest: model.{', model.'.join(why)}); norm_position/qk_norm can be {options}"
        )
    return kind, KINDS[kind].name


def config_from_hf(text: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` that a config.json describes.

    Raises:
        ModelError: a family that is not in `hf_kinds`, a feature that `Decoder` lacks, a missing
            key, or sizes that do not fit together.
    """
    name = text.get("model_type", "")
    kind = KINDS.get(name) or MOE_KINDS.get(name)
    if kind is None:
        why = f" ({NOT_HELD[name]})" if name in NOT_HELD else ""
        held = ", ".join([*KINDS, *MOE_KINDS])
        raise ModelError(f"config.json: model_type={name!r} is not one of {held}{why}")
    _check_supported(text)
    heads, width = text["num_attention_heads"], _head_dim(text, kind)
    window, layer_windows = hf_attention.windows_of(text, name, kind)
    theta, scaling, window_theta = hf_attention.rope_of(text, kind)
    fields = hf_moe.config_fields(text, name) if name in MOE_KINDS else {}
    config = ModelConfig(
        vocabulary_size=text["vocab_size"],
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=text.get("num_key_value_heads", kind.kv_heads) or heads,
        d_ffn=text["intermediate_size"],
        layer_ffn=text.get(LAYER_WIDTHS),
        head_dim=width,
        rope_theta=theta,
        rope_scaling=scaling,
        window=window,
        layer_windows=layer_windows,
        window_rope_theta=window_theta if window else None,
        layer_rope=hf_attention.turned_layers(text, name),
        norm_eps=float(text.get("rms_norm_eps", kind.eps)),
        norm_position=kind.norm_position,  # type: ignore[arg-type]
        qk_norm=kind.qk_norm,  # type: ignore[arg-type]
        tied_embeddings=bool(text.get("tie_word_embeddings", kind.tied)),
        init_std=float(text.get("initializer_range") or 0.02),
        **{**_own_fields(text, name, kind), **fields},
    )
    check(config)
    if scale := config.attention_scale:  # a class that says so says the usual in other words
        usual = math.isclose(scale, config.head_width**-0.5, rel_tol=1e-9)
        config = replace(config, attention_scale=None) if usual else config
    if name in KINDS and kind_of(config)[0] != name:
        config = replace(config, model_type=name)
    return config


def _own_fields(text: Mapping[str, Any], name: str, kind: HfKind) -> dict[str, Any]:
    """Return settings of biases, activation, scales and caps."""
    found: dict[str, Any] = {"activation": _activation(text, name, kind)}
    found |= dict.fromkeys(("qkv_bias", "o_bias"), _flag(text, "attention_bias", "o_bias", kind))
    found["mlp_bias"] = _flag(text, "mlp_bias", "mlp_bias", kind)
    if name == "qwen2":
        found["qkv_bias"] = True
    if name == "granite":
        found |= {ours: float(text.get(key, 1.0)) for key, ours in MULTIPLIERS.items()}
    if kind.unit_norms:
        found["embedding_scale"] = text["hidden_size"] ** 0.5
    if kind.norm_position == "both":
        found["attention_scale"] = float(text.get("query_pre_attn_scalar", 256)) ** -0.5
        for key, (ours, usual) in SOFTCAPS.items():
            cap = text.get(key, usual if name == "gemma2" else None)
            if cap and ours not in kind.able:
                raise ModelError(
                    f"config.json: {key}={cap!r} is not supported: {kind.name} of transformers "
                    "does not read it; only null is"
                )
            found[ours] = float(cap or 0.0)
    return found


def _flag(text: Mapping[str, Any], key: str, setting: str, kind: HfKind) -> bool:
    if text.get(key) and setting not in kind.able:
        raise ModelError(
            f"config.json: {key}={text[key]!r} is not supported in {kind.name}; only False is"
        )
    return bool(text.get(key))


def _activation(text: Mapping[str, Any], name: str, kind: HfKind) -> str:
    usual = "gelu_pytorch_tanh" if kind.unit_norms else "silu"
    key = "hidden_activation" if kind.unit_norms and name != "gemma" else "hidden_act"
    asked = text.get(key, usual) or usual
    if name == "gemma" and asked == "gelu":  # as transformers reads the first releases
        asked = usual
    able = [theirs for theirs, ours in ACTIVATIONS.items() if _held(ours, kind)]
    if asked not in able:
        raise ModelError(
            f"config.json: {key}={asked!r} is not supported; only {' or '.join(able)} is"
        )
    return ACTIVATIONS[asked]


def _held(activation: str, kind: HfKind) -> bool:
    return activation == "silu" or "activation" in kind.able


def _check_supported(text: Mapping[str, Any]) -> None:
    """Refuse what `Decoder` cannot do, and a config.json without the sizes of a model."""
    for key, off in MUST_BE_OFF.items():
        if text.get(key) not in off:
            raise ModelError(
                f"config.json: {key}={text[key]!r} is not supported; only {off[-1]!r} is"
            )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [key for key in (*needed, "num_attention_heads") if key not in text]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}")


def _head_dim(text: Mapping[str, Any], kind: HfKind) -> int | None:
    """Return the width only where it is not d_model / heads."""
    width = text.get("head_dim") or kind.head_dim
    return (
        None
        if width is None or width * text["num_attention_heads"] == text["hidden_size"]
        else width
    )
