from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, made, some_tokens, tiny
from safetensors.torch import load_file, save_file

from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.hf import from_hf, hf_names, to_hf
from motet.models.hf_config import hf_config
from motet.models.hf_files import check_finite, stored_tensors

transformers = pytest.importorskip("transformers")

VARIANTS = [
    pytest.param(family, tied, extra, id=f"{family}-{'tied' if tied else 'untied'}-{label}")
    for family in FAMILIES
    for tied, extra, label in (
        (False, {}, "gqa"),
        (True, {"n_kv_heads": 4}, "mha"),
        (False, {"head_dim": 12, "rope_theta": 500_000.0}, "wide-heads"),
    )
]


def twin(config: ModelConfig, folder: Path) -> tuple[Decoder, torch.nn.Module]:
    """Return a decoder and the transformers model loaded from its export."""
    decoder = made(config)
    to_hf(decoder.state_dict(), config, None, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return decoder, model


@pytest.mark.parametrize(("family", "tied", "extra"), VARIANTS)
def test_an_export_has_equal_logits_and_gradients_in_transformers(
    family: str, tied: bool, extra: dict, tmp_path: Path
) -> None:
    config = tiny(family, tied_embeddings=tied, **extra)
    decoder, model = twin(config, tmp_path)
    assert type(model).__name__ == hf_config(config, torch.float32, 1)["architectures"][0]
    tokens = some_tokens(config, 2, 23)
    torch.testing.assert_close(decoder(tokens), model(tokens).logits, rtol=0, atol=1e-4)

    sums = decoder(tokens[:, :-1], tokens[:, 1:], mode="loss")
    (sums.cross_entropy / sums.n_labels).backward()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    mean = sums.cross_entropy / sums.n_labels
    assert mean.item() == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        wanted = theirs[hf_names(config)[name]].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("family", "tied", "extra"), VARIANTS)
def test_an_import_of_a_transformers_folder_has_equal_logits(
    family: str, tied: bool, extra: dict, tmp_path: Path
) -> None:
    config = tiny(family, tied_embeddings=tied, **extra)
    settings = hf_config(config, torch.float32, 64)
    del settings["rope_theta"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings)
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found, state = from_hf(tmp_path)
    assert replace(found, head_dim=found.head_width) == replace(config, head_dim=config.head_width)
    decoder = Decoder(found)
    decoder.load_state_dict(state)
    tokens = some_tokens(config, 2, 23)
    torch.testing.assert_close(decoder(tokens), model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_in_shards_changes_no_bit(family: str, tmp_path: Path) -> None:
    config = tiny(family)
    decoder = made(config)
    to_hf(decoder.state_dict(), config, None, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert {path.name for path in tmp_path.glob("*.safetensors")} == files
    found, state = from_hf(tmp_path)
    assert found == config
    assert all(torch.equal(state[name], value) for name, value in decoder.state_dict().items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = some_tokens(config, 1, 9)
    torch.testing.assert_close(decoder(tokens), model(tokens).logits, rtol=0, atol=1e-4)


def test_an_export_in_bf16_loads_in_bf16(tmp_path: Path) -> None:
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    _, state = from_hf(tmp_path)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_the_tokenizer_goes_along_and_loads(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endofdoc|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tiny(vocabulary_size=320)
    to_hf(made(config).state_dict(), config, tmp_path / "tokenizer.json", tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "two one — é three"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(tokenizer.encode(text).ids) == text
    assert loaded.eos_token == "<|endofdoc|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == loaded.eos_token_id == 0
    again = tmp_path / "again"
    to_hf(made(config).state_dict(), config, tmp_path / "out", again)
    assert transformers.AutoTokenizer.from_pretrained(again).eos_token_id == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.*longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling .*'linear' lacks factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
            "'axial' is not supported",
        ),
        ({"rope_parameters": 3}, "rope_parameters=3 is no object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "gemma3"}, "model_type='gemma3' is not one of .* images"),
        ({"model_type": "deepseek_v3"}, "MLA"),
        ({"model_type": "phi"}, "LayerNorm"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention'"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias=True is not supported in Mistral"),
        ({"model_type": "olmo3", "layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "layer_types has 1 layers"),
        ({"model_type": "olmo3"}, "does not say which layers it is for"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 layers"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "'su' is not supported in Phi3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5}, "d_model"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks tensors: blocks.2"),
        ({"num_hidden_layers": 1}, "tensors that this model lacks: model.layers.1"),
    ],
)
def test_an_unsupported_folder_is_refused_with_the_reason(
    change: dict, match: str, tmp_path: Path
) -> None:
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ModelError, match=match):
        from_hf(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        from_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        from_hf(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "gone.safetensors"])
def test_an_index_cannot_point_outside_or_at_nothing(name: str, tmp_path: Path) -> None:
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=name):
        from_hf(tmp_path)


def test_a_head_that_was_trained_by_itself_stays_apart_though_the_configuration_ties_it(
    tmp_path: Path,
) -> None:
    config = tiny(tied_embeddings=False)
    to_hf(made(config).state_dict(), config, None, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": True}))
    found, state = from_hf(tmp_path)
    assert found == config
    decoder = Decoder(found)
    decoder.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = some_tokens(config, 1, 9)
    torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    found, state = from_hf(tmp_path)
    assert found == replace(config, tied_embeddings=True)
    assert "head.weight" not in state


def test_a_file_that_is_cut_short_or_holds_no_numbers_is_named(tmp_path: Path) -> None:
    config = tiny()
    state = dict(made(config).state_dict())
    to_hf(state, config, None, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content, what in (
        (whole[:-1], "is cut short: .* bytes, its header promises"),
        (whole[:100], "is cut short: 100 bytes do not hold its header"),
        (whole[:5], "is cut short"),
        (b"", "is cut short"),
        (whole + b"1", "is damaged"),
        (whole[:8] + b"?" + whole[9:], "is not a safetensors file"),
    ):
        file.write_bytes(content)
        for read in (stored_tensors, from_hf):
            with pytest.raises(ModelError, match=f"model.safetensors {what}"):
                read(tmp_path)
    file.write_bytes(whole)
    check_finite(stored_tensors(tmp_path))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = load_file(file)
        weights = {name: value.to(dtype) for name, value in weights.items()}
        weights["model.norm.weight"][3] = torch.nan if dtype != torch.float16 else torch.inf
        save_file(weights, file)
        for read in (lambda folder: check_finite(stored_tensors(folder)), from_hf):
            with pytest.raises(ModelError, match=r"tensor model.norm.weight holds NaN or infinite"):
                read(tmp_path)


def test_a_single_file_goes_before_an_index_that_was_left_over(tmp_path: Path) -> None:
    config = tiny()
    state = made(config).state_dict()
    to_hf(state, config, None, tmp_path)
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(from_hf(tmp_path)[1]["norm.weight"], state["norm.weight"])


def test_a_shape_without_a_transformers_class_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        hf_config(tiny("llama", norm_position="post"), torch.float32, 64)


def test_an_export_refuses_incomplete_states_and_used_folders(tmp_path: Path) -> None:
    config = tiny()
    state = made(config).state_dict()
    with pytest.raises(ModelError, match=r"lacks tensors: head\.weight"):
        to_hf({n: v for n, v in state.items() if n != "head.weight"}, config, None, tmp_path)
    to_hf(state, config, None, tmp_path)
    with pytest.raises(ModelError, match="already holds weights"):
        to_hf(state, config, None, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_that_differ_by_layer_are_filled_up_with_zeros_that_change_nothing(
    family: str, tmp_path: Path
) -> None:
    config = tiny(family, layer_ffn=(16, 48), tied_embeddings=True)
    decoder, model = twin(config, tmp_path)
    assert model.config.intermediate_size == 48
    tokens = some_tokens(config, 2, 23)
    torch.testing.assert_close(decoder(tokens), model(tokens).logits, rtol=0, atol=1e-5)
    found, state = from_hf(tmp_path)
    assert found.layer_ffn == (16, 48)
    assert state.keys() == decoder.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in decoder.state_dict().items())
    same = tiny(layer_ffn=(16, 16))
    assert hf_config(same, torch.float32, 128)["intermediate_size"] == 16


def test_the_end_of_documents_in_training_is_the_end_of_generation(tmp_path: Path) -> None:
    """Whatever the tokenizer was made for: a model never writes an end that it was not taught."""
    vocabulary = {"<|endofdoc|>": 0, "</s>": 1, "one": 2}
    text = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "one"}}
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], **text})
    )
    theirs = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(theirs))
    config = tiny()
    to_hf(made(config).state_dict(), config, source, tmp_path / "out", end_id=0)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.eos_token, loaded.pad_token) == ("<|endofdoc|>", "<|endofdoc|>")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == (0, 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantized_weights_are_refused_before_anything_starts(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Without their scales they are other numbers."""
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, file)
    for read in (lambda: check_finite(stored_tensors(tmp_path)), lambda: from_hf(tmp_path)):
        with pytest.raises(ModelError, match=f"tensor {name} is quantized"):
            read()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"rms_norm_eps": "small"}),
        ("config.json", {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}}),
        ("config.json", {"initializer_range": [1]}),
        ("config.json", {"hidden_size": "32"}),
        ("model.safetensors.index.json", {"weight_map": {"model.norm.weight": 5}}),
        ("model.safetensors.index.json", {"weight_map": ["model.safetensors"]}),
        ("model.safetensors.index.json", {"weight_map": {}}),
    ],
)
def test_a_value_of_another_type_is_one_error_that_names_the_file(
    tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    config = tiny()
    to_hf(made(config).state_dict(), config, None, tmp_path)
    path = tmp_path / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | change))
    if "index" in file:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        from_hf(tmp_path)
