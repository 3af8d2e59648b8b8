"""What can be wrong with one field of a `ModelConfig` by itself; `config.py` has what does not fit
together.
"""

from __future__ import annotations

from typing import Any

from motet.core.errors import suggest
from motet.models.rope_scaling import scaling_problem

BY_LAYER = ("layer_windows", "layer_rope")
"""Settings that say yes or no of every layer."""
SCALES = ("embedding_scale", "residual_scale", "logits_divisor", "output_multiplier")


def size_problems(config: Any) -> list[tuple[str, str]]:
    """Return sizes that are no sizes."""
    found = []
    for setting in ("vocabulary_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn"):
        value = getattr(config, setting)
        if not is_whole(value) or value < 1:
            found.append((setting, f"{value!r} is not a whole number of at least 1"))
    if config.head_dim is not None and (not is_whole(config.head_dim) or config.head_dim < 2):
        found.append(
            ("head_dim", f"{config.head_dim!r} is not a whole number of at least 2, or null")
        )
    for setting in ("rope_theta", "norm_eps", "init_std"):
        value = getattr(config, setting)
        if not is_finite(value, above=True):
            found.append((setting, f"{value!r} is not a finite number above 0"))
    return found


def layer_problems(config: Any) -> list[tuple[str, str]]:
    """Return widths of layers that are none."""
    widths = config.layer_ffn
    if widths is None:
        return []
    if not isinstance(widths, tuple) or not all(is_whole(w) and w >= 1 for w in widths):
        return [("layer_ffn", f"{widths!r} is not a list of whole numbers of at least 1")]
    if len(widths) != config.n_layers:
        why = f"has {len(widths)} widths; it must have one for each of n_layers={config.n_layers}"
        return [("layer_ffn", why)]
    return []


def variant_problems(config: Any) -> list[tuple[str, str]]:
    """Return what is wrong with the parts that imported models alone have."""
    found = []
    for setting in BY_LAYER:
        marks = getattr(config, setting)
        if marks is None:
            continue
        if not isinstance(marks, tuple) or not all(isinstance(mark, bool) for mark in marks):
            found.append((setting, f"{marks!r} is not a list of true and false"))
        elif len(marks) != config.n_layers:
            why = f"has {len(marks)} marks; it must have one for each of n_layers={config.n_layers}"
            found.append((setting, why))
    if not is_whole(config.window) or config.window < 0:
        found.append(("window", f"{config.window!r} is not a whole number of at least 0"))
    found += [
        (setting, "needs a window; set window, or leave it out")
        for setting in ("layer_windows", "window_rope_theta")
        if getattr(config, setting) is not None and not config.window
    ]
    for setting in ("window_rope_theta", "attention_scale"):
        value = getattr(config, setting)
        if value is not None and not is_finite(value, above=True):
            found.append((setting, f"{value!r} is not a finite number above 0, or null"))
    for setting in ("attention_softcap", "logit_softcap"):
        if not is_finite(getattr(config, setting)):
            why = f"{getattr(config, setting)!r} is not a finite number of at least 0"
            found.append((setting, why))
    found += [
        (setting, f"{getattr(config, setting)!r} is not a finite number above 0")
        for setting in SCALES
        if not is_finite(getattr(config, setting), above=True)
    ]
    if config.rope_scaling is not None and (why := scaling_problem(config.rope_scaling)):
        found.append(("rope_scaling", why))
    if config.n_experts:
        found += [
            (setting, "cannot be had beside experts; leave it out")
            for setting in ("activation", "mlp_bias")
            if getattr(config, setting) not in ("silu", False)
        ]
    return found


def choice_problems(config: Any) -> list[tuple[str, str]]:
    """Return choices that there are not."""
    found = []
    choices = {
        "norm_position": ["pre", "post", "both"],
        "qk_norm": ["none", "head", "full"],
        "router_score": ["softmax", "sigmoid"],
        "balance_scope": ["batch", "micro"],
        "activation": ["silu", "gelu_tanh"],
    }
    for setting, options in choices.items():
        value = getattr(config, setting)
        if value not in options:
            hint = suggest(str(value), options)
            found.append((setting, f"{value!r} is not one of {', '.join(options)}{hint}"))
    flags = ("tied_embeddings", "qkv_bias", "shared_gate", "normalize_top_k", "o_bias", "mlp_bias")
    for setting in flags:
        value = getattr(config, setting)
        if not isinstance(value, bool):
            found.append((setting, f"{value!r} is not true or false"))
    return found


def expert_size_problems(config: Any) -> list[tuple[str, str]]:
    """Return sizes of experts that are none."""
    found = []
    least = {"n_experts": 0, "n_shared_experts": 0, "n_dense_layers": 0}
    least |= {"experts_per_token": 1, "moe_every": 1}
    for setting, bound in least.items():
        value = getattr(config, setting)
        if not is_whole(value) or value < bound:
            found.append((setting, f"{value!r} is not a whole number of at least {bound}"))
    for setting in ("d_expert", "d_shared"):
        value = getattr(config, setting)
        if value is not None and (not is_whole(value) or value < 1):
            found.append((setting, f"{value!r} is not a whole number of at least 1, or null"))
    for setting in ("capacity_factor", "balance_loss", "router_z_loss", "bias_rate"):
        value = getattr(config, setting)
        if not is_finite(value):
            found.append((setting, f"{value!r} is not a finite number of at least 0"))
    return found


def is_finite(value: object, above: bool = False) -> bool:
    """Tell whether a value is a number of at least 0, or above it."""
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    return sound and (value > 0 if above else value >= 0) and value < float("inf")  # type: ignore[operator]


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
