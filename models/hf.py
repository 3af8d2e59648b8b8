"""To and from Hugging Face folders: config.json, safetensors, tokenizer files.

No pickle, no transformers.

The tensors of most families are the same, so a checkpoint crosses in either direction without
arithmetic; `hf_fused.py` has the others. `hf_config.py` has config.json, `hf_moe.py` what experts
add.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from motet.models import hf_fused, hf_moe
from motet.models.architecture import named_weights
from motet.models.config import ModelConfig, ModelError
from motet.models.hf_config import family, hf_config, one_width
from motet.models.hf_files import (
    INDEX,
    check_plain,
    config_of_folder,
    read_json,
    stored_tensors,
    weight_files,
)
from motet.models.hf_kinds import KINDS

MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors of tokenizer.json that add special tokens around a text."""


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Return {name in `Decoder`: name in transformers} for every tensor of a folder.

    Each expert is a tensor of its own there: "`name`.e" is slice e of the `Decoder`'s stack `name`.
    """
    kind = family(config)[0] if config.n_experts else ""
    second = {"pre": "post_attention_layernorm.", "post": "post_feedforward_layernorm."}
    norms = {
        "attention_norm.": "input_layernorm.",
        "feed_forward_norm.": second.get(config.norm_position, "pre_feedforward_layernorm."),
        "attention_out_norm.": "post_attention_layernorm.",
        "feed_forward_out_norm.": "post_feedforward_layernorm.",
        "attention.": "self_attn.",
        "feed_forward.": "mlp.",
        "attention_bias.": "self_attn.o_proj.",
        "feed_forward_bias.": "mlp.down_proj.",
    }
    if config.norm_position == "post":
        norms["attention_norm."] = "post_attention_layernorm."
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
    end_id: int | None = None,
    begins: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `folder` so that `AutoModelForCausalLM` and `AutoTokenizer` load it.

    `decoder_state` holds full (unsharded) tensors. `tokenizer_path` is a tokenizer.json or a folder
    that has one. `end_id`, which ended documents in training, becomes the end-of-sequence token;
    where it is not known, `end_token`, if it is in there. `generation_config.json` pads with it.
    `sequence_length` is recorded as the longest trained context, in tokens. Without `begins`, texts
    began with no special token in training, and the tokenizer is written so that it adds none.
    Where hidden widths differ by layer, zeros fill the narrow layers up (see `one_width`).
    A multiplier of logits goes into the last norm (`folded`).
    Raises `ModelError` where transformers has no such model, a tensor is missing or misshapen, or
    the folder already holds weights.
    """
    text = hf_config(config, dtype, sequence_length)
    _check_state(decoder_state, config)
    decoder_state, config = folded(decoder_state, config)
    folder = Path(folder)
    if folder.exists() and any(folder.glob("*.safetensors*")):
        raise ModelError(f"{folder} already holds weights; export to a new or empty folder")
    tokenizer = None if tokenizer_path is None else _tokenizer_file(Path(tokenizer_path))
    folder.mkdir(parents=True, exist_ok=True)
    text["eos_token_id"] = end_id
    if tokenizer is not None:
        text["eos_token_id"] = _copy_tokenizer(
            tokenizer, folder, end_token, end_id, sequence_length
        )
        if not begins:
            add_no_special_tokens(folder)
    names, state = hf_names(config), widened(decoder_state, config)
    tensors = {names[name]: hf_moe.part_of(state, name) for name in names}
    if text["model_type"] in KINDS:
        tensors = hf_fused.stored(tensors, KINDS[text["model_type"]])
    _write_shards(tensors, folder, dtype, max_shard_bytes)
    _write_json(folder / "config.json", text)
    _write_json(folder / "generation_config.json", _generation(text["eos_token_id"]))


def _generation(end: int | None) -> dict[str, Any]:
    """Return generation_config.json: when to stop, and what fills shorter rows of a batch.

    The padding is named here alone. In config.json it would make the embedding of that token get no
    gradient when the model is trained further, and here it is the end of a document.
    """
    return {"do_sample": False, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}


def folded(
    state: Mapping[str, Tensor], config: ModelConfig
) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """Return a state and a config that compute the same without the multiplier of logits that a
    width rule gave the model: the last norm has it, whether the head is tied or not.
    """
    if config.output_multiplier == 1.0:
        return state, config
    norm = state["norm.weight"] * config.output_multiplier
    return {**state, "norm.weight": norm}, replace(config, output_multiplier=1.0)


def widened(state: Mapping[str, Tensor], config: ModelConfig) -> Mapping[str, Tensor]:
    """Return a state with as many hidden channels in every dense layer as in the widest: added ones
    have zero weights, so that they are silu(0) x 0 = 0 and nothing reads them.
    """
    return state if config.layer_ffn is None else _at_width(state, one_width(config))


def _at_width(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a state with tensors of the shapes of a config: cut, or filled up with zeros."""
    found = {}
    for name, shape in _shapes(config).items():
        value = state[name]
        for dimension, size in enumerate(shape):
            value = value.narrow(dimension, 0, min(size, value.shape[dimension]))
        if value.shape != shape:
            value, part = value.new_zeros(shape), value
            value[tuple(slice(0, n) for n in part.shape)] = part
        found[name] = value
    return found


def from_hf(
    folder: Path | str, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a folder of a family in `hf_kinds`: its `ModelConfig`, and a state for `Decoder` in
    `dtype`.

    Reads safetensors only. Raises `ModelError` for another family, a feature that `Decoder` lacks
    (longrope, quantization, dropout), missing tensors, a file that is cut short, or weights that
    are not finite numbers.
    """
    folder = Path(folder)
    kind = read_json(folder / "config.json").get("model_type", "")
    config = config_of_folder(folder)
    check_plain(stored_tensors(folder))  # names a file that is cut short, too
    stored_as = one_width(config)
    ours = {theirs: name for name, theirs in hf_names(config).items()}
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a mapping
                for name, value in _parts(stored, tensors.get_tensor(stored), kind, stored_as):
                    if value.is_floating_point() and not torch.isfinite(value).all():
                        raise ModelError(f"{file}: tensor {name} holds NaN or infinite values")
                    if name in ours:
                        state[ours[name]] = value.to(dtype)
                    elif not _is_redundant(name, config):
                        unknown.append(name)
    if unknown:
        raise ModelError(f"{folder} has tensors that this model lacks: {_some(unknown)}")
    state = hf_moe.stacked(state, _shapes(stored_as))
    _check_state(state, stored_as)
    return config, state if stored_as == config else _at_width(state, config)


def _parts(
    name: str, tensor: Tensor, kind: str, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that one of a folder holds, under the names of `hf_names`."""
    if kind in KINDS:
        return hf_fused.read_back(name, tensor, KINDS[kind], config)
    return hf_moe.unfused(name, tensor, kind)


def _is_redundant(name: str, config: ModelConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (
        config.tied_embeddings and name == "lm_head.weight"
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {weight.name: weight.shape for weight in named_weights(config)}


def _check_state(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    shapes = _shapes(config)
    for kind, names in (("lacks", shapes.keys() - state), ("has unknown", state.keys() - shapes)):
        if names:
            biases = kind == "lacks" and all(name.endswith(".bias") for name in names)
            why = " (attention_bias=True or mlp_bias=True of config.json asks for them)"
            told = f"the state {kind} tensors: {_some(sorted(names))}"
            raise ModelError(told + (why if biases else ""))
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
        # safetensors makes a file for its owner only, whatever the umask
        (folder / file).chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the tokenizer is a tokenizer.json or its folder")
    return file


def _copy_tokenizer(
    file: Path, folder: Path, end_token: str, end_id: int | None, sequence_length: int
) -> int | None:
    """Copy the tokenizer's files; return the id of its end token, None if it has none."""
    tokenizer = read_json(file)
    shutil.copyfile(file, folder / "tokenizer.json")
    settings_file = file.parent / "tokenizer_config.json"
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    if settings_file.is_file():
        settings = read_json(settings_file)
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    ids = dict(tokenizer.get("model", {}).get("vocab") or {})
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
    chosen = settings.get("eos_token")
    name = chosen["content"] if isinstance(chosen, dict) else chosen or end_token
    if end_id is not None:  # what the model was taught, whatever the tokenizer was made for
        name = next((text for text, number in ids.items() if number == end_id), name)
    if name in ids:
        settings["eos_token"] = (
            chosen if isinstance(chosen, dict) and chosen["content"] == name else name
        )
        settings.setdefault("pad_token", name)
    _write_json(folder / "tokenizer_config.json", settings)
    return ids.get(name) if end_id is None else end_id


def add_no_special_tokens(folder: Path) -> None:
    """Rewrite a folder's tokenizer so that a text's tokens are those of the text alone."""
    content, settings = (read_json(folder / name) for name in TOKENIZER_FILES)
    kept = _without_special(content.get("post_processor"))
    if kept != content.get("post_processor"):
        _write_json(folder / TOKENIZER_FILES[0], content | {"post_processor": kept})
    # Some classes make their own post-processor of these.
    adds = {key: False for key in ("add_bos_token", "add_eos_token") if settings.get(key, True)}
    _write_json(folder / TOKENIZER_FILES[1], settings | adds)


def _without_special(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a post-processor without the steps that add tokens."""
    kind = (processor or {}).get("type")
    if processor is None or kind in ADDS_TOKENS:
        return None
    if kind != "Sequence":
        return processor
    parts = [part for one in processor["processors"] if (part := _without_special(one))]
    return {**processor, "processors": parts} if parts else None


def special_before(processor: dict[str, Any] | None) -> str | None:
    """Return the special token that a post-processor of tokenizer.json puts before a text."""
    kind = (processor or {}).get("type")
    if processor is None or kind not in (*ADDS_TOKENS, "Sequence"):
        return None
    if kind == "Sequence":
        return next(filter(None, map(special_before, processor["processors"])), None)
    if kind != "TemplateProcessing":
        return str(processor["cls"][0])
    first = (processor.get("single") or [{}])[0].get("SpecialToken")
    return None if first is None else str(first["id"])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
