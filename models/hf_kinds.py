"""Which decoders have a class in transformers: what each class holds, and what none here does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

from motet.models.config import ModelConfig, llama_heads

OPTIONAL = (
    *("rope_scaling", "window", "layer_windows", "window_rope_theta", "layer_rope", "activation"),
    *("qkv_bias", "o_bias", "mlp_bias", "attention_scale", "attention_softcap", "logit_softcap"),
    *("embedding_scale", "residual_scale", "logits_divisor"),
)
"""Settings that only some classes hold; their defaults mean "without"."""
ALL_BIASES = ("qkv_bias", "o_bias")


class HfKind(NamedTuple):
    """One class of transformers.

    Attributes:
        name: of the class.
        norm_position, qk_norm: as `ModelConfig` has them.
        able: those of `OPTIONAL` that it holds.
        eps, theta, local_theta: where config.json says nothing; `local_theta` of layers with a
            window, where it has one of its own.
        head_dim, kv_heads, window, tied: the same.
        unit_norms: its norms multiply by 1 + weight.
        fused: its projections of one input are one tensor.
    """

    name: str
    norm_position: str
    qk_norm: str
    able: tuple[str, ...] = ("rope_scaling", "activation")
    eps: float = 1e-6
    theta: float = 1e4
    local_theta: float | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    window: int | None = None
    tied: bool = False
    unit_norms: bool = False
    fused: bool = False


_ROPE = ("rope_scaling", "activation")
_PATTERN = ("window", "layer_windows")
_GEMMA = ("activation", "embedding_scale", "rope_scaling", *ALL_BIASES)
KINDS: dict[str, HfKind] = {
    "llama": HfKind("LlamaForCausalLM", "pre", "none", (*_ROPE, *ALL_BIASES, "mlp_bias")),
    "olmo2": HfKind("Olmo2ForCausalLM", "post", "full", (*_ROPE, *ALL_BIASES), eps=1e-5),
    "qwen2": HfKind(
        "Qwen2ForCausalLM", "pre", "none", (*_ROPE, "qkv_bias", *_PATTERN), window=4096, kv_heads=32
    ),
    "qwen3": HfKind(
        "Qwen3ForCausalLM",
        "pre",
        "head",
        (*_ROPE, *ALL_BIASES, *_PATTERN),
        head_dim=128,
        window=4096,
        kv_heads=32,
    ),
    "mistral": HfKind(
        "MistralForCausalLM", "pre", "none", (*_ROPE, "window"), window=4096, kv_heads=8
    ),
    "olmo3": HfKind(
        "Olmo3ForCausalLM",
        "post",
        "full",
        (*_ROPE, *ALL_BIASES, *_PATTERN, "window_rope_theta"),
        eps=1e-5,
        theta=5e5,
        local_theta=5e5,
        window=4096,
    ),
    "smollm3": HfKind(
        "SmolLM3ForCausalLM",
        "pre",
        "none",
        (*_ROPE, *ALL_BIASES, "mlp_bias", *_PATTERN, "layer_rope"),
        theta=2e6,
        kv_heads=4,
        tied=True,
    ),
    "granite": HfKind(
        "GraniteForCausalLM",
        "pre",
        "none",
        (
            *(*_ROPE, *ALL_BIASES, "mlp_bias"),
            *("attention_scale", "embedding_scale", "residual_scale", "logits_divisor"),
        ),
    ),
    "phi3": HfKind(
        "Phi3ForCausalLM", "pre", "none", ("activation", "window"), eps=1e-5, fused=True
    ),
    "gemma": HfKind(
        "GemmaForCausalLM",
        "pre",
        "none",
        _GEMMA,
        head_dim=256,
        kv_heads=16,
        tied=True,
        unit_norms=True,
    ),
    "gemma2": HfKind(
        "Gemma2ForCausalLM",
        "both",
        "none",
        (*_GEMMA, *_PATTERN, "attention_scale", "attention_softcap", "logit_softcap"),
        head_dim=256,
        kv_heads=4,
        window=4096,
        tied=True,
        unit_norms=True,
    ),
    "gemma3_text": HfKind(
        "Gemma3ForCausalLM",
        "both",
        "head",
        (*_GEMMA, *_PATTERN, "window_rope_theta", "attention_scale", "logit_softcap"),
        theta=1e6,
        local_theta=1e4,
        head_dim=256,
        kv_heads=4,
        window=4096,
        tied=True,
        unit_norms=True,
    ),
}
"""Classes of decoders without experts by their model_type; the first that fits is written."""
MOE_KINDS: dict[str, HfKind] = {
    "mixtral": HfKind("MixtralForCausalLM", "pre", "none", ("rope_scaling",), eps=1e-5, theta=1e6),
    "qwen2_moe": HfKind("Qwen2MoeForCausalLM", "pre", "none", ("rope_scaling", "qkv_bias")),
    "qwen3_moe": HfKind("Qwen3MoeForCausalLM", "pre", "head", ("rope_scaling",)),
}
_LAYER_NORM = "it has LayerNorm, and decoders here have RMSNorm"
_IMAGES = "it also reads images or sound, and decoders here read text"
_LATENT = "its attention compresses keys and values (MLA), which decoders here do not"
_STATE = "it has layers with a recurrent state, which decoders here do not"
_EXPERTS = "its experts are of a kind that is not held here"
_CHUNKS = "its attention and norms have parts that decoders here do not"
NOT_HELD = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt"), _LAYER_NORM),
    **dict.fromkeys(("phi", "falcon", "stablelm", "starcoder2", "codegen"), _LAYER_NORM),
    **dict.fromkeys(("olmo", "cohere", "cohere2", "nemotron", "dbrx", "persimmon"), _LAYER_NORM),
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4", "llama4", "mllama", "mistral3"), _IMAGES),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "paligemma"), _IMAGES),
    **dict.fromkeys(("phi4_multimodal", "smolvlm", "idefics3", "pixtral", "internvl"), _IMAGES),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2"), _LATENT),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "zamba2", "bamba", "falcon_h1"), _STATE),
    **dict.fromkeys(("recurrent_gemma", "granitemoehybrid", "qwen3_next", "rwkv"), _STATE),
    **dict.fromkeys(("gpt_oss", "phimoe", "granitemoe", "olmoe", "ernie4_5_moe"), _EXPERTS),
    **dict.fromkeys(("glm4_moe", "qwen3_omni_moe", "hunyuan_v1_moe", "minimax"), _EXPERTS),
    **dict.fromkeys(("glm", "glm4", "gemma3n_text", "gemma4_text", "llama4_text"), _CHUNKS),
}
"""model_type -> why it cannot be continued."""


def reasons(config: ModelConfig, model_type: str) -> list[str]:
    """Return why a class cannot hold a decoder without experts, in words."""
    kind = KINDS[model_type]
    found = [
        f"{name}={getattr(config, name)!r}, there {getattr(kind, name)!r}"
        for name in ("norm_position", "qk_norm")
        if getattr(config, name) != getattr(kind, name)
    ]
    off = {field.name: field.default for field in fields(ModelConfig)}
    for name in OPTIONAL:
        value = getattr(config, name)
        if name not in kind.able and value != off[name]:
            found.append(f"{name}={value!r}, there {off[name]!r}")
    return [*found, *_own_rules(config, model_type)]


def _own_rules(config: ModelConfig, model_type: str) -> Iterator[str]:
    """Say what a class demands besides."""
    kind = KINDS[model_type]
    if model_type == "qwen2":
        if not config.qkv_bias:
            yield "qkv_bias=False, there True"
    elif "o_bias" in kind.able and config.qkv_bias != config.o_bias:
        yield f"qkv_bias={config.qkv_bias} with o_bias={config.o_bias}, there both or none"
    if "embedding_scale" in kind.able and kind.unit_norms:
        scale = math.sqrt(config.d_model)
        if not math.isclose(config.embedding_scale, scale, rel_tol=1e-6):
            yield (
                f"embedding_scale={config.embedding_scale:g}, there sqrt(d_model)={scale:g} "
                f"(keep d_model={round(config.embedding_scale**2)})"
            )
    if model_type == "phi3" and config.head_width * config.n_heads != config.d_model:
        yield f"head_dim={config.head_width}, there d_model / n_heads"
    if dict(config.rope_scaling or ()).get("truncate") is False and kind.local_theta is not None:
        yield "rope_scaling with truncate=False, there true"


def kind_of(config: ModelConfig) -> tuple[str, list[str]]:
    """Return the model_type of the class that holds a decoder without experts, or "" and why that
    of `config.model_type`, or every one, does not.
    """
    if config.model_type:
        why = (
            reasons(config, config.model_type) if config.model_type in KINDS else ["no such class"]
        )
        return ("" if why else config.model_type), why
    whys = {name: reasons(config, name) for name in KINDS}
    for name, why in whys.items():
        if not why:
            return name, []
    nearest = min(whys.values(), key=len)
    return "", nearest


def lost_class(config: ModelConfig, origin: ModelConfig) -> str:
    """Return why the class that holds a decoder cannot hold one that was made of it; "" where it
    can, or where no class held the first.
    """
    if (why := llama_heads(config)) and not llama_heads(origin):
        return why
    kind = "" if origin.n_experts or config.n_experts else kind_of(origin)[0]
    why = "; ".join(reasons(config, kind)) if kind else ""
    return f"{KINDS[kind].name} does not hold {why}" if why else ""
