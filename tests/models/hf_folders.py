"""Small Hugging Face folders of every family that can be continued, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FULL, SLIDING = "full_attention", "sliding_attention"
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama default": ("llama", {"rope_scaling": {"rope_type": "default"}}),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama3 old": ("llama", {"rope_scaling": {**LLAMA3, "type": "llama3"}}),
    "llama3 new": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "linear old": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("llama", {"rope_scaling": YARN}),
    "yarn set": (
        "llama",
        {
            "rope_scaling": {
                **YARN,
                **{"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "truncate": False},
            }
        },
    ),
    "yarn mscale": ("qwen3", {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral whole": ("mistral", {"sliding_window": None}),
    "mistral wide": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "olmo2": ("olmo2", {"rope_theta": 5e5}),
    "olmo3": ("olmo3", {"sliding_window": 5}),
    "olmo3 yarn": ("olmo3", {"sliding_window": 5, "rope_scaling": YARN, "rope_theta": 5e5}),
    "gemma": ("gemma", {"tie_word_embeddings": True, "head_dim": 12}),
    "gemma2": (
        "gemma2",
        {
            **{"sliding_window": 5, "query_pre_attn_scalar": 3, "tie_word_embeddings": True},
            **{"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
        },
    ),
    "gemma2 plain": (
        "gemma2",
        {"query_pre_attn_scalar": 8, "layer_types": [FULL] * 4, "attention_bias": True}
        | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING],
            "tie_word_embeddings": True,
        },
    ),
    "gemma3 linear": (
        "gemma3_text",
        {
            **{"sliding_window": 5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            **{"layer_types": [SLIDING, FULL] * 2, "final_logit_softcapping": 3.0},
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 window": ("phi3", {"sliding_window": 6, "num_key_value_heads": 4}),
    "smollm3": ("smollm3", {}),
    "smollm3 window": (
        "smollm3",
        {
            **{"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0, 1, 1]},
            **{"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN},
        },
    ),
    "granite": (
        "granite",
        {
            **{"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "mlp_bias": True},
            **{"residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_bias": True},
        },
    ),
    "granite ones": ("granite", {}),
    "mixtral yarn": (
        "mixtral",
        {"rope_scaling": YARN, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": None},
    ),
}
"""Name -> (model_type, keys of config.json besides `SIZES`)."""


def made_folder(name: str, folder: Path, **extra: Any) -> torch.nn.Module:
    """Save a model with random weights, norms and biases too, and return it as loaded."""
    import transformers

    kind, keys = FOLDERS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **keys, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # a misplaced norm or bias shows
                value += 0.3 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return loaded(folder)


def loaded(folder: Path) -> torch.nn.Module:
    """Return the model of a folder, as transformers has it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model  # type: ignore[no-any-return]
