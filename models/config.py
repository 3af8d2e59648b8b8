"""Sizes and shape of one decoder: a value that needs no torch.

B batch, T tokens, V vocabulary, D model width, H heads, K channels per head, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from motet.core.errors import UserError, suggest
from motet.models.config_fields import (
    BY_LAYER,
    choice_problems,
    expert_size_problems,
    layer_problems,
    size_problems,
    variant_problems,
)
from motet.models.rope_scaling import Scaling, scaling_of

NormPosition = Literal["pre", "post", "both"]
QkNorm = Literal["none", "head", "full"]
RouterScore = Literal["softmax", "sigmoid"]
BalanceScope = Literal["batch", "micro"]
Activation = Literal["silu", "gelu_tanh"]


class ModelError(UserError):
    """A model setting, or a checkpoint folder, that cannot be used; the message says what would
    work.
    """


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

    `norm_position="pre"` normalizes what a sub-layer reads (Llama, arXiv:2302.13971);
    `"post"` normalizes what it adds to the residual stream (OLMo-2, arXiv:2501.00656, section 3.2);
    `"both"` does both (Gemma-2, arXiv:2408.00118, section 2).
    `qk_norm="head"` normalizes queries and keys per head (Qwen3), `"full"` over all heads (OLMo-2).
    `head_dim=None` means `d_model // n_heads`; read `head_width` for the number.
    `qkv_bias` adds a bias to queries, keys and values alone (Qwen2, arXiv:2407.10671).
    `layer_ffn` gives every layer a hidden width of its own instead of `d_ffn`; read `ffn_width`.

    `n_experts > 0` makes the feed-forward of some layers a mixture of experts (`moe.py`): layer i
    has experts where i >= n_dense_layers and (i + 1) is a multiple of `moe_every`, the rule of
    Qwen-MoE.

    What imported models have besides, and presets do not, comes last; its defaults are "off".

    Attributes:
        experts_per_token: routed experts that a token visits.
        d_expert: hidden width of one routed expert; None = d_ffn. Read `expert_width` for the
            number.
        n_shared_experts, d_shared: experts that every token visits, as one block of width
            `d_shared`; None = n_shared_experts x expert width. Read `shared_width`.
        shared_gate: a sigmoid gate scales the shared block (Qwen2-MoE).
        router_score: "softmax" over all experts (Mixtral, Qwen), or "sigmoid" of each
            (DeepSeek-V3).
        normalize_top_k: the chosen experts' weights of a token sum to 1.
        capacity_factor: 0 = dropless; else an expert takes at most ceil(factor x tokens x
            experts_per_token / n_experts) rows of a micro-batch of one rank, and later tokens go
            without it.
        balance_loss, balance_scope, router_z_loss, bias_rate: see `moe.MoE`; 0 = off.
        rope_scaling: scaled rotary positions, as `rope_scaling.Scaling`; a mapping is taken too.
        window: tokens that a query reads, itself included; 0 = all before it.
        layer_windows: which layers have the window; None = all of them.
        window_rope_theta: base of the rotary frequencies in layers with the window, which are then
            not scaled; None = as in all others.
        layer_rope: which layers turn queries and keys by their positions; None = all of them.
        activation: of the gate of dense feed-forwards; "gelu_tanh" makes SwiGLU GeGLU.
        o_bias, mlp_bias: biases of attention's output, and of gate, up and down.
        attention_scale: what scores are multiplied by; None = head_width ** -0.5.
        attention_softcap, logit_softcap: cap x tanh(x / cap) of scores, and of logits; 0 = off.
        embedding_scale, residual_scale: what embeddings, and what a sub-layer adds to the residual
            stream, are multiplied by.
        logits_divisor: what logits are divided by.
        output_multiplier: what they are multiplied by besides, by their model's width
            (`width_multipliers`); no setting, and folded into the last norm at export.
        model_type: the Hugging Face class that it goes back to; "" = the first that fits.
    """

    vocabulary_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ffn: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    norm_position: NormPosition = "pre"
    qk_norm: QkNorm = "none"
    tied_embeddings: bool = False
    init_std: float = 0.02
    qkv_bias: bool = False
    n_experts: int = 0
    experts_per_token: int = 2
    d_expert: int | None = None
    n_shared_experts: int = 0
    d_shared: int | None = None
    shared_gate: bool = False
    router_score: RouterScore = "softmax"
    normalize_top_k: bool = True
    capacity_factor: float = 0.0
    balance_loss: float = 0.0
    balance_scope: BalanceScope = "batch"
    router_z_loss: float = 0.0
    bias_rate: float = 0.0
    n_dense_layers: int = 0
    moe_every: int = 1
    layer_ffn: tuple[int, ...] | None = None
    rope_scaling: Scaling | None = None
    window: int = 0
    layer_windows: tuple[bool, ...] | None = None
    window_rope_theta: float | None = None
    layer_rope: tuple[bool, ...] | None = None
    activation: Activation = "silu"
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    output_multiplier: float = 1.0
    model_type: str = ""

    def __post_init__(self) -> None:
        """Take lists for tuples, as JSON gives them back, and a mapping for `rope_scaling`."""
        for name in ("layer_ffn", *BY_LAYER):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "rope_scaling", scaling_of(self.rope_scaling))

    @property
    def head_width(self) -> int:
        """Channels per head (K)."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Channels of all query heads together (H x K)."""
        return self.n_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Channels of all key (or value) heads together."""
        return self.n_kv_heads * self.head_width

    def ffn_width(self, layer: int) -> int:
        """Hidden channels of the SwiGLU of block `layer` (from 0), where it has no experts."""
        return self.d_ffn if self.layer_ffn is None else self.layer_ffn[layer]

    def window_of(self, layer: int) -> int:
        """Tokens that a query of block `layer` (from 0) reads; 0 = all before it."""
        return self.window if self.layer_windows is None or self.layer_windows[layer] else 0

    def has_rope(self, layer: int) -> bool:
        """Tell whether block `layer` (from 0) turns queries and keys by their positions."""
        return self.layer_rope is None or self.layer_rope[layer]

    def marks_of(self, layers: Iterable[int]) -> dict[str, Any]:
        """What some layers, from 0, have of every setting in `BY_LAYER`."""
        marks = {name: getattr(self, name) for name in BY_LAYER}
        at = tuple(layers)
        return {n: None if has is None else tuple(has[i] for i in at) for n, has in marks.items()}

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by before scores are divided by sqrt(K)."""
        return 1.0 if self.attention_scale is None else self.attention_scale * self.head_width**0.5

    @property
    def expert_width(self) -> int:
        """Hidden channels of one routed expert (F)."""
        return self.d_ffn if self.d_expert is None else self.d_expert

    @property
    def shared_width(self) -> int:
        """Hidden channels of the shared experts together; 0 without them."""
        if self.n_shared_experts == 0:
            return 0
        return self.n_shared_experts * self.expert_width if self.d_shared is None else self.d_shared

    def has_experts(self, layer: int) -> bool:
        """Tell whether the feed-forward of block `layer` (from 0) is a mixture of experts."""
        return (
            self.n_experts > 0
            and layer >= self.n_dense_layers
            and (layer + 1) % self.moe_every == 0
        )

    @property
    def n_moe_layers(self) -> int:
        """Number of blocks with experts."""
        return sum(self.has_experts(layer) for layer in range(self.n_layers))


def _shape(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ffn: int, rope_theta: float
) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_ffn": d_ffn,
        "rope_theta": rope_theta,
    }


# The name is the approximate number of parameters outside the embedding and the head.
PRESETS: dict[str, dict[str, Any]] = {
    "1m": _shape(128, 4, 2, 2, 512, 10_000.0),
    "4m": _shape(256, 4, 4, 4, 1024, 10_000.0),
    "15m": _shape(384, 8, 6, 6, 1024, 10_000.0),
    "60m": _shape(640, 12, 10, 10, 1728, 10_000.0),
    "190m": _shape(1024, 16, 16, 16, 2560, 500_000.0),
    "370m": _shape(1280, 18, 20, 20, 3584, 500_000.0),
    "1b": _shape(2048, 16, 16, 16, 8192, 500_000.0),
    "3b": _shape(3072, 28, 24, 8, 8192, 500_000.0),
    "7b": _shape(4096, 32, 32, 8, 14336, 500_000.0),
}


TRAINING_FIELDS = ("capacity_factor", "balance_loss", "balance_scope", "router_z_loss", "bias_rate")
"""How experts are balanced in training: fields that may be set for imported weights too."""


def preset(name: str, vocabulary_size: int, **overrides: Any) -> ModelConfig:
    """Return the preset `name` for a vocabulary, with any field of `ModelConfig` replaced.

    Raises `ModelError` for an unknown preset or field, with the nearest known name.
    """
    if name not in PRESETS:
        raise ModelError(
            f"model.preset={name!r} is not a preset{suggest(name, PRESETS)}; "
            f"known presets are {', '.join(PRESETS)}"
        )
    known = [field.name for field in fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise ModelError(
                f"model.{key} is not a setting{suggest(key, known)}; "
                f"settings are {', '.join(known)}"
            )
    return ModelConfig(**{"vocabulary_size": vocabulary_size, **PRESETS[name], **overrides})


def llama_heads(config: ModelConfig) -> str:
    """Say why `LlamaForCausalLM`, or those of Gemma, cannot hold the heads of a config, and what
    would fit; "" where they can, or where another class would hold it.

    That class demands that heads divide the stream also where `head_dim` is set.
    """
    llama = (config.norm_position, config.qk_norm) == ("pre", "none")
    llama &= config.qkv_bias == config.o_bias and config.model_type in ("", "llama")
    gemma = config.norm_position == "both"
    width, heads = config.d_model, config.n_heads
    if not (llama or gemma) or config.n_experts or width % heads == 0:
        return ""
    ratio = heads // config.n_kv_heads
    near = [n for n in (width // heads * heads, (width // heads + 1) * heads) if n]
    kept = [str(n) for n in range(1, config.n_kv_heads) if width % (ratio * n) == 0]
    instead = f", or n_kv_heads={' or '.join(kept)}" if kept else ""
    return (
        f"d_model={width} is not a multiple of n_heads={heads}, which "
        f"{'Gemma' if gemma else 'Llama'}ForCausalLM requires "
        f"even with head_dim set; use d_model={' or '.join(map(str, near))}{instead}"
    )


def problems(config: ModelConfig) -> list[tuple[str, str]]:
    """Return every (setting, message) that makes `config` unusable; an empty list means it is
    sound.
    """
    found = [*size_problems(config), *choice_problems(config), *expert_size_problems(config)]
    found += [*layer_problems(config), *variant_problems(config)]
    return found if found else [*_ratio_problems(config), *_expert_problems(config)]


def check(config: ModelConfig) -> None:
    """Raise one `ModelError` that lists all problems of `config`."""
    found = problems(config)
    if found:
        raise ModelError("; ".join(f"model.{setting}: {message}" for setting, message in found))


def _expert_problems(config: ModelConfig) -> list[tuple[str, str]]:
    """Return settings of experts that do not fit each other, or that have no experts to act on."""
    if config.n_experts == 0:
        return _idle_problems(config)
    found = []
    if config.experts_per_token > config.n_experts:
        why = f"{config.experts_per_token} is more than n_experts={config.n_experts}; at most that"
        found.append(("experts_per_token", why))
    if config.n_shared_experts == 0:
        for setting in ("d_shared", "shared_gate"):
            if getattr(config, setting):
                why = "has no shared expert to act on; set n_shared_experts to at least 1"
                found.append((setting, why))
    if config.moe_every > config.n_layers:
        why = (
            f"{config.moe_every} is more than n_layers={config.n_layers}, so that no layer has "
            "experts; at most that"
        )
        found.append(("moe_every", why))
    elif config.n_moe_layers == 0:
        most = config.n_layers // config.moe_every * config.moe_every - 1
        why = f"{config.n_dense_layers} leaves no layer with experts; at most {most}"
        found.append(("n_dense_layers", why))
    return found


def _idle_problems(config: ModelConfig) -> list[tuple[str, str]]:
    names = [field.name for field in fields(config)]
    return [
        (
            field.name,
            f"{getattr(config, field.name)!r} needs experts; set n_experts, or leave it out",
        )
        for field in fields(config)[names.index("n_experts") + 1 : names.index("layer_ffn")]
        if getattr(config, field.name) != field.default
    ]


def _ratio_problems(config: ModelConfig) -> list[tuple[str, str]]:
    found = []
    if config.n_heads % config.n_kv_heads:
        options = [n for n in range(1, config.n_heads + 1) if config.n_heads % n == 0]
        found.append(
            (
                "n_kv_heads",
                f"{config.n_kv_heads} does not divide n_heads={config.n_heads}; "
                f"use one of {', '.join(map(str, options))}",
            )
        )
    if config.head_dim is None and config.d_model % config.n_heads:
        below = config.d_model // config.n_heads * config.n_heads
        near = [str(n) for n in (below, below + config.n_heads) if n]
        found.append(
            (
                "d_model",
                f"{config.d_model} is not a multiple of n_heads={config.n_heads}; "
                f"nearest is {' or '.join(near)}, or set head_dim",
            )
        )
    elif config.head_width % 2:
        found.append(
            (
                "head_dim",
                f"{config.head_width} channels per head is odd, rotary positions need pairs; "
                f"nearest is {config.head_width + 1}",
            )
        )
    return found
