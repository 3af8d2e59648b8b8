"""The sections `model` and `family` of a run.yaml: what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motet.launcher.config.field import setting


@dataclass(frozen=True)
class ModelSettings:
    """What is trained: a preset or a Hugging Face folder, and any size that should differ."""

    preset: str = setting(
        "1m", "named size; its name is the approximate number of non-embedding parameters"
    )
    from_hf: str | None = setting(
        None,
        "folder of a Hugging Face checkpoint to start from, instead of a preset",
        kind="path",
    )
    another_tokenizer: bool = setting(
        False,
        "train the model of from_hf on a corpus that another tokenizer than its own made",
        omit_default=True,
    )
    vocabulary_size: int | None = setting(
        None,
        "rows of the embedding; null = the tokenizer's size rounded up to a multiple of 64",
        unit="tokens",
        least=2,
        most=1 << 27,
    )
    d_model: int | None = setting(
        None, "width of the residual stream", unit="channels", least=1, most=1 << 20
    )
    n_layers: int | None = setting(None, "number of blocks", unit="layers", least=1, most=10_000)
    n_heads: int | None = setting(
        None, "attention heads of the queries", unit="heads", least=1, most=1 << 16
    )
    n_kv_heads: int | None = setting(
        None,
        "attention heads of keys and values; must divide n_heads",
        unit="heads",
        least=1,
        most=1 << 16,
    )
    d_ffn: int | None = setting(
        None, "hidden width of the SwiGLU", unit="channels", least=1, most=1 << 22
    )
    head_dim: int | None = setting(
        None,
        "channels of one head; null = d_model / n_heads",
        unit="channels",
        least=2,
        most=1 << 16,
    )
    rope_theta: float | None = setting(None, "base of the rotary frequencies", above=0)
    norm_eps: float | None = setting(None, "epsilon of RMSNorm", above=0)
    norm_position: str | None = setting(
        None,
        "norm of a sub-layer's input (pre, Llama) or of its output (post, OLMo-2)",
        choices=("pre", "post"),
    )
    qk_norm: str | None = setting(
        None,
        "RMSNorm of queries and keys: none, per head (Qwen3) or over all heads (OLMo-2)",
        choices=("none", "head", "full"),
    )
    tied_embeddings: bool | None = setting(None, "input embedding and output head share one matrix")
    init_std: float | None = setting(
        None, "standard deviation of the initial weights", above=0, most=1
    )
    qkv_bias: bool | None = setting(None, "queries, keys and values have a bias (Qwen2)")
    n_experts: int | None = setting(
        None,
        "routed experts of a layer that has them; 0 = a dense model",
        unit="experts",
        least=0,
        most=1 << 16,
    )
    experts_per_token: int | None = setting(
        None, "routed experts that a token visits", unit="experts", least=1
    )
    d_expert: int | None = setting(
        None, "hidden width of one routed expert; null = d_ffn", unit="channels", least=1
    )
    n_shared_experts: int | None = setting(
        None, "experts that every token visits, as one block", unit="experts", least=0
    )
    d_shared: int | None = setting(
        None,
        "hidden width of the shared block; null = n_shared_experts x d_expert",
        unit="channels",
        least=1,
    )
    shared_gate: bool | None = setting(None, "a sigmoid gate scales the shared block (Qwen2-MoE)")
    router_score: str | None = setting(
        None,
        "scores of the router: over all experts (softmax, Mixtral) or of each (sigmoid, "
        "DeepSeek-V3)",
        choices=("softmax", "sigmoid"),
    )
    normalize_top_k: bool | None = setting(None, "the weights of a token's chosen experts sum to 1")
    capacity_factor: float | None = setting(
        None,
        "most rows of an expert, as a multiple of its even share of a micro-batch; 0 = no token "
        "is dropped",
        least=0,
    )
    balance_loss: float | None = setting(
        None, "coefficient of the load-balancing loss; its value at even routing", least=0
    )
    balance_scope: str | None = setting(
        None,
        "frequencies in the balance loss: of the previous global batch, or of this micro-batch",
        choices=("batch", "micro"),
    )
    router_z_loss: float | None = setting(
        None, "coefficient of the router's squared log-partition", least=0
    )
    bias_rate: float | None = setting(
        None, "step of the bias that balances experts without a loss; 0 = no bias", least=0
    )
    n_dense_layers: int | None = setting(
        None, "first layers without experts", unit="layers", least=0
    )
    moe_every: int | None = setting(
        None, "layer i (from 1) has experts where i is a multiple of this", unit="layers", least=1
    )

    def overrides(self) -> dict[str, Any]:
        """The sizes that differ from the preset, as keyword arguments of `models.config.preset`."""
        skipped = ("preset", "from_hf", "another_tokenizer")
        return {k: v for k, v in vars(self).items() if k not in skipped and v is not None}


@dataclass(frozen=True)
class FamilySettings:
    """The models that one run delivers; without it, one."""

    kind: str = setting(
        "whole",
        "whole (one model), nested (slices of it that are models of their own), progressive (a "
        "small model that grows into it), or a class of your own that makes members of it: "
        "my_family.py:Class (a file next to run.yaml) or package.module:Class",
    )
    options: Mapping[str, Any] = setting(
        dict,
        "settings of that kind: docs/models.md (nested), docs/families.md (progressive)",
        kind="free",
    )
