"""How Mixtral, Qwen2-MoE and Qwen3-MoE write experts in their folders: config.json keys and tensor
names.

On disk an expert is three matrices of its own; transformers 5 can also save its fused form, and
both are read. E experts, F hidden width of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from motet.models.config import ModelConfig, ModelError
from motet.models.hf_kinds import MOE_KINDS, OPTIONAL

CLASSES = {model_type: kind.name for model_type, kind in MOE_KINDS.items()}
# What an imported config.json may not ask for: key -> the values that mean "off".
MUST_BE_OFF: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": {"router_jitter_noise": (None, 0, 0.0), "sliding_window": (None,)},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of Mixtral


def family(config: ModelConfig) -> tuple[str, str]:
    """Return (model_type, class) of a config with experts; `ModelError` if there is none."""
    wanted = {
        "mixtral": {
            "norm_position": "pre",
            "qk_norm": "none",
            "qkv_bias": False,
            "n_shared_experts": 0,
            "normalize_top_k": True,
            "n_dense_layers": 0,
            "moe_every": 1,
        },
        "qwen2_moe": {"norm_position": "pre", "qk_norm": "none", "shared_gate": True},
        "qwen3_moe": {
            "norm_position": "pre",
            "qk_norm": "head",
            "qkv_bias": False,
            "n_shared_experts": 0,
        },
    }
    for name, value, why in (
        ("router_score", "softmax", "no class that Motet writes scores experts otherwise"),
        ("bias_rate", 0, "no class that Motet writes holds the bias that chooses experts"),
    ):
        if getattr(config, name) != value:
            raise ModelError(f"model.{name}={getattr(config, name)!r} cannot be exported: {why}")
    off = {field.name: field.default for field in fields(ModelConfig)}
    for name in OPTIONAL:
        if name not in ("rope_scaling", "qkv_bias") and getattr(config, name) != off[name]:
            raise ModelError(
                f"model.{name}={getattr(config, name)!r} cannot be exported: no class with experts "
                "that Motet writes has it"
            )
    for kind, needed in wanted.items():
        if all(getattr(config, name) == value for name, value in needed.items()):
            return kind, CLASSES[kind]
    options = "; ".join(
        f"{CLASSES[kind]} has {', '.join(f'{n}={v!r}' for n, v in needed.items())}"
        for kind, needed in wanted.items()
    )
    raise ModelError(f"no Hugging Face class has experts in a decoder like this one. {options}")


def config_text(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Return the keys of config.json that speak of experts."""
    text: dict[str, Any] = {
        "num_experts_per_tok": config.experts_per_token,
        "output_router_logits": False,
    }
    if kind == "mixtral":
        return {
            **text,
            "num_local_experts": config.n_experts,
            "intermediate_size": config.expert_width,
            "sliding_window": None,
        }
    text |= {
        "num_experts": config.n_experts,
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": config.normalize_top_k,
        "decoder_sparse_step": config.moe_every,
        "mlp_only_layers": list(range(config.n_dense_layers)),
        "use_sliding_window": False,
    }
    if kind == "qwen2_moe":
        text |= {
            "shared_expert_intermediate_size": config.shared_width,
            "qkv_bias": config.qkv_bias,
        }
    return text


def config_fields(text: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that config.json says of experts; training coefficients
    stay off.
    """
    for key, off in MUST_BE_OFF[kind].items():
        if text.get(key) not in off:
            raise ModelError(
                f"config.json: {key}={text[key]!r} is not supported; only {off[-1]!r} is"
            )
    experts = text.get("num_local_experts", text.get("num_experts"))
    needed = {"num_experts_per_tok": text.get("num_experts_per_tok"), "num_experts": experts}
    if kind != "mixtral":
        needed["moe_intermediate_size"] = text.get("moe_intermediate_size")
    missing = [key for key, value in needed.items() if value is None]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}")
    found: dict[str, Any] = {
        "n_experts": experts,
        "experts_per_token": text["num_experts_per_tok"],
    }
    if kind == "mixtral":
        return found
    dense = sorted(text.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise ModelError(f"config.json: mlp_only_layers={dense} are not the first layers")
    found |= {
        "d_expert": text["moe_intermediate_size"],
        "normalize_top_k": bool(text.get("norm_topk_prob", False)),
        "n_dense_layers": len(dense),
        "moe_every": text.get("decoder_sparse_step", 1),
    }
    if kind == "qwen2_moe":
        found |= {
            "qkv_bias": bool(text.get("qkv_bias", True)),
            "n_shared_experts": 1,
            "d_shared": text.get("shared_expert_intermediate_size", 5632),
            "shared_gate": True,
        }
    return found


def hf_name(inner: str, kind: str) -> str:
    """Return the name in a layer of transformers of `inner`, a name in a `MoE` (an expert's is
    `experts.NAME.e`).
    """
    parts = inner.split(".")
    mixtral = kind == "mixtral"
    head = "block_sparse_moe" if mixtral else "mlp"
    if parts[0] == "experts":
        projection = _PROJECTIONS[parts[1]] if mixtral else parts[1]
        return f"{head}.experts.{parts[2]}.{projection}.weight"
    if parts[0] == "router":
        return f"{head}.gate.weight"
    return f"{head}." + inner.replace("shared_gate.", "shared_expert_gate.").replace(
        "shared.", "shared_expert."
    )


def split_experts(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return `name`, or where it is a stack of experts the names `name.e` of its slices."""
    if ".experts." in name and len(shape) == 3:
        return [f"{name}.{expert}" for expert in range(shape[0])]
    return [name]


def part_of(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return tensor `name` of a state; `name.e` is slice e of a stack of experts."""
    if name in state:
        return state[name]
    stack, _, expert = name.rpartition(".")
    return state[stack][int(expert)]


def unfused(name: str, tensor: Tensor, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names of one matrix per expert, whichever way they were saved."""
    if kind not in CLASSES or ".mlp." not in name:
        yield name, tensor
        return
    prefix, _, inner = name.partition(".mlp.")
    fused = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}
    if inner in fused:
        names = fused[inner]
        for projection, part_EXX in zip(names, tensor.chunk(len(names), 1), strict=True):
            for expert, matrix in enumerate(part_EXX):
                theirs = hf_name(f"experts.{projection}.{expert}", kind)
                yield f"{prefix}.{theirs}", matrix
    elif kind == "mixtral" and inner == "gate.weight":
        yield f"{prefix}.{hf_name('router.weight', kind)}", tensor
    else:
        yield name, tensor


def stacked(
    parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the state in which the slices `name.e` of experts are stacks again; incomplete stacks
    stay apart.
    """
    state = dict(parts)
    for name, shape in shapes.items():
        names = split_experts(name, shape)
        if names != [name] and all(part in state for part in names):
            state[name] = torch.stack([state.pop(part) for part in names])
    return state
