"""To and from Hugging Face folders: config.json, safetensors, tokenizer files.

No pickle, no transformers.

Llama, OLMo-2, Qwen2 and Qwen3 differ in where norms stand, in the names of two of them and in
biases; the tensors are the same, so a checkpoint crosses in either direction without arithmetic.
`hf_moe.py` has what experts add.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from motet.models import hf_moe
from motet.models.config import ModelConfig, ModelError, check
from motet.models.decoder import Decoder

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

# (norm_position, qk_norm, qkv_bias) -> (model_type, class) of decoders without experts
FAMILIES = {
    ("pre", "none", False): ("llama", "LlamaForCausalLM"),
    ("post", "full", False): ("olmo2", "Olmo2ForCausalLM"),
    ("pre", "none", True): ("qwen2", "Qwen2ForCausalLM"),
    ("pre", "head", False): ("qwen3", "Qwen3ForCausalLM"),
}
# model_type -> (norm_position, qk_norm, qkv_bias)
KINDS = {kind: key for key, (kind, _) in FAMILIES.items()} | {
    "mixtral": ("pre", "none", False),
    "qwen2_moe": ("pre", "none", True),
    "qwen3_moe": ("pre", "head", False),
}
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


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Return {name in `Decoder`: name in transformers} for every tensor of a folder.

    Each expert is a tensor of its own there: "`name`.e" is slice e of the `Decoder`'s stack `name`.
    """
    kind = _family(config)[0] if config.n_experts else ""
    post = config.norm_position == "post"
    norms = {
        "attention_norm.": "post_attention_layernorm." if post else "input_layernorm.",
        "feed_forward_norm.": "post_feedforward_layernorm."
        if post
        else "post_attention_layernorm.",
        "attention.": "self_attn.",
        "feed_forward.": "mlp.",
    }
    outer = {"embedding.": "model.embed_tokens.", "norm.": "model.norm.", "head.": "lm_head."}
    names = {}
    parts = [part for item in _shapes(config).items() for part in hf_moe.split_experts(*item)]
    for name in parts:
        if not name.startswith("blocks."):
            part = name.split(".")[0] + "."
            names[name] = name.replace(part, outer[part])
            continue
        _, index, inner = name.split(".", 2)
        part, rest = inner.split(".", 1)
        if part == "feed_forward" and config.has_experts(int(index)):
            names[name] = f"model.layers.{index}.{hf_moe.hf_name(rest, kind)}"
        else:
            names[name] = f"model.layers.{index}.{norms[part + '.']}{rest}"
    return names


def to_hf(
    decoder_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_path: Path | str | None,
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    sequence_length: int = 2048,
    end_token: str = "<|endofdoc|>",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `folder` so that `AutoModelForCausalLM` and `AutoTokenizer` load it.

    `decoder_state` holds full (unsharded) tensors. `tokenizer_path` is a tokenizer.json or a folder
    that has one; `end_token`, if it is in there, becomes the end-of-sequence token.
    `sequence_length` is recorded as the longest trained context, in tokens.
    Raises `ModelError` where transformers has no such model, a tensor is missing or misshapen, or
    the folder already holds weights.
    """
    text = hf_config(config, dtype, sequence_length)
    _check_state(decoder_state, config)
    folder = Path(folder)
    if folder.exists() and any(folder.glob("*.safetensors*")):
        raise ModelError(f"{folder} already holds weights; export to a new or empty folder")
    tokenizer = None if tokenizer_path is None else _tokenizer_file(Path(tokenizer_path))
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        text["eos_token_id"] = _copy_tokenizer(tokenizer, folder, end_token, sequence_length)
    names = hf_names(config)
    tensors = {names[name]: hf_moe.part_of(decoder_state, name) for name in names}
    _write_shards(tensors, folder, dtype, max_shard_bytes)
    _write_json(folder / "config.json", text)


def hf_config(config: ModelConfig, dtype: torch.dtype, sequence_length: int) -> dict[str, Any]:
    """Return the config.json of `config`; `ModelError` if no transformers class has this shape."""
    check(config)
    family = _family(config)
    if family[0] == "llama" and config.d_model % config.n_heads:
        raise ModelError(
            f"model.d_model={config.d_model} is not a multiple of n_heads={config.n_heads}, "
            "which LlamaForCausalLM requires even with head_dim set"
        )
    text = {
        "architectures": [family[1]],
        "model_type": family[0],
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
    return text | (hf_moe.config_text(config, family[0]) if config.n_experts else {})


def _family(config: ModelConfig) -> tuple[str, str]:
    """Return (model_type, class); `ModelError` if no transformers class has this shape."""
    if config.n_experts:
        return hf_moe.family(config)
    key = (config.norm_position, config.qk_norm, config.qkv_bias)
    if key not in FAMILIES:
        options = ", ".join(f"{a}/{b}/{c} ({k[1]})" for (a, b, c), k in FAMILIES.items())
        raise ModelError(
            f"model.norm_position={config.norm_position!r} with model.qk_norm={config.qk_norm!r} "
            "and "
            f"model.qkv_bias={config.qkv_bias} has no Hugging Face class; "
            f"norm_position/qk_norm/qkv_bias can be {options}"
        )
    return FAMILIES[key]


def from_hf(
    folder: Path | str, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a folder of a family in `KINDS`: its `ModelConfig`, and a state for `Decoder` in
    `dtype`.

    Reads safetensors only. Raises `ModelError` for another family, a feature that `Decoder` lacks
    (scaled rotary positions, other biases, sliding windows, quantization), or missing tensors.
    """
    folder = Path(folder)
    text = _read_json(folder / "config.json")
    config, kind = config_from_hf(text), text["model_type"]
    ours = {theirs: name for name, theirs in hf_names(config).items()}
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for file in _weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a mapping
                for name, value in hf_moe.unfused(stored, tensors.get_tensor(stored), kind):
                    if name in ours:
                        state[ours[name]] = value.to(dtype)
                    elif not _is_redundant(name, config):
                        unknown.append(name)
    if unknown:
        raise ModelError(f"{folder} has tensors that this model lacks: {_some(unknown)}")
    state = hf_moe.stacked(state, _shapes(config))
    _check_state(state, config)
    return config, state


def config_from_hf(text: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` that a config.json describes."""
    kind = text.get("model_type")
    if kind not in KINDS:
        raise ModelError(f"config.json: model_type={kind!r} is not one of {', '.join(KINDS)}")
    for key, off in MUST_BE_OFF.items():
        if text.get(key) not in off:
            raise ModelError(
                f"config.json: {key}={text[key]!r} is not supported; only {off[-1]!r} is"
            )
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"config.json: rope_parameters.rope_type={rope['rope_type']!r} is not supported; "
            "only 'default' is"
        )
    if set(text.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError("config.json: layer_types has layers other than 'full_attention'")
    norm_position, qk_norm, qkv_bias = KINDS[kind]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [key for key in (*needed, "num_attention_heads") if key not in text]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}")
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


def _is_redundant(name: str, config: ModelConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (
        config.tied_embeddings and name == "lm_head.weight"
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        decoder = Decoder(config)
    return {name: tuple(value.shape) for name, value in decoder.state_dict().items()}


def _check_state(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    shapes = _shapes(config)
    for kind, names in (("lacks", shapes.keys() - state), ("has unknown", state.keys() - shapes)):
        if names:
            raise ModelError(f"the state {kind} tensors: {_some(sorted(names))}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"tensor {name} has shape {tuple(state[name].shape)}; the configuration says "
                f"{shape}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shards(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, most_bytes: int
) -> Iterator[list[str]]:
    """Yield lists of names; each list is at most `most_bytes`, or a single larger tensor."""
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if names and filled + size > most_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _write_shards(
    tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, most_bytes: int
) -> None:
    shards = list(_shards(tensors, dtype, most_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        part = {n: tensors[n].detach().to("cpu", dtype).contiguous() for n in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{folder / INDEX} names {name!r}, not a safetensors file beside it"
                )
            if not (folder / name).exists():
                raise ModelError(f"{folder / name} is missing; {INDEX} names it")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code and are not read; save the "
            "model "
            "as safetensors first (transformers: model.save_pretrained)"
        )
    raise ModelError(f"{folder} has no model.safetensors and no {INDEX}")


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the tokenizer is a tokenizer.json or its folder")
    return file


def _copy_tokenizer(file: Path, folder: Path, end_token: str, sequence_length: int) -> int | None:
    """Copy the tokenizer's files; return the id of its end token, None if it has none."""
    tokenizer = _read_json(file)
    shutil.copyfile(file, folder / "tokenizer.json")
    settings_file = file.parent / "tokenizer_config.json"
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    if settings_file.is_file():
        settings = _read_json(settings_file)
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    ids = dict(tokenizer.get("model", {}).get("vocab") or {})
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
    chosen = settings.get("eos_token")
    name = chosen["content"] if isinstance(chosen, dict) else chosen or end_token
    if name in ids:
        settings.setdefault("eos_token", name)
    _write_json(folder / "tokenizer_config.json", settings)
    return ids.get(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
