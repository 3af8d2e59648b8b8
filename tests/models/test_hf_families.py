"""Every family that can be continued: from transformers, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import some_tokens, tiny
from hf_folders import FOLDERS, made_folder
from hf_folders import loaded as loaded_again
from hypothesis import given
from hypothesis import strategies as st

from motet.models.config import ModelError
from motet.models.decoder import Decoder
from motet.models.hf import from_hf, hf_names, to_hf
from motet.models.hf_config import config_from_hf, hf_config
from motet.models.hf_fused import stored
from motet.models.hf_kinds import KINDS, MOE_KINDS, NOT_HELD
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import problems

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_family_goes_through_a_decoder_and_back_with_equal_logits(
    name: str, tmp_path: Path
) -> None:
    theirs = made_folder(name, tmp_path / "in")
    config, state = from_hf(tmp_path / "in")
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    tokens = some_tokens(config, 2, 40)
    wanted = theirs(tokens).logits
    torch.testing.assert_close(decoder(tokens), wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.05

    to_hf(decoder.state_dict(), config, None, tmp_path / "out", sequence_length=64)
    back = loaded_again(tmp_path / "out")
    assert type(back) is type(theirs)
    torch.testing.assert_close(back(tokens).logits, wanted, rtol=0, atol=1e-4)
    again, same = from_hf(tmp_path / "out")
    assert again == config
    for key, value in state.items():
        torch.testing.assert_close(same[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3 window", "granite", "phi3 window"])
def test_the_loss_and_its_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = made_folder(name, tmp_path)
    config, state = from_hf(tmp_path)
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    tokens = some_tokens(config, 2, 20)
    sums = decoder(tokens[:, :-1], tokens[:, 1:], mode="loss")
    (sums.cross_entropy / sums.n_labels).backward()
    loss = theirs(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert (sums.cross_entropy / sums.n_labels).item() == pytest.approx(loss.item(), rel=1e-5)
    kind = KINDS[json.loads((tmp_path / "config.json").read_text())["model_type"]]
    names = hf_names(config)
    ours = {names[n]: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    for key, gradient in stored(ours, kind._replace(unit_norms=False)).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=2e-5)
    scores = decoder(tokens[:, :-1], tokens[:, 1:], mode="score")
    logprobs = theirs(tokens).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprob, chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "smollm3 window"])
def test_a_window_ends_where_its_document_begins(name: str, tmp_path: Path) -> None:
    made_folder(name, tmp_path)
    config, state = from_hf(tmp_path)
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    tokens, cuts = some_tokens(config, 2, 40), (3, 20)
    ids = torch.zeros_like(tokens)
    ids[:, cuts[0] :] = 1
    ids[:, cuts[1] :] = 0
    together = decoder(tokens, document_ids_BT=ids)
    apart = [decoder(part) for part in tokens.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=0, atol=1e-5)


def test_dynamic_positions_are_refused_beyond_the_length_they_were_made_for(
    tmp_path: Path,
) -> None:
    made_folder("dynamic", tmp_path)
    config, state = from_hf(tmp_path)
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    with pytest.raises(ModelError, match="65 tokens are more than the 64"):
        decoder(some_tokens(config, 1, 65))
    ((setting, why),) = problems(Layout(), config, 128, [1], 1)
    assert setting == "data.sequence_length"
    assert "at most 64" in why


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("", {"attention_softcap": 3.0}, "attention_softcap=3.0, there 0.0"),
        ("mistral", {"window": 4, "layer_windows": (True, False)}, "layer_windows=.*, there None"),
        ("", {"o_bias": True}, "qkv_bias=False with o_bias=True"),
    ],
)
def test_a_decoder_that_no_class_holds_is_not_exported(kind: str, change: dict, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        hf_config(tiny(model_type=kind, **change), torch.float32, 8)


KIND_FIELDS = {
    "qkv_bias": st.booleans(),
    "window": st.sampled_from([0, 3, 64]),
    "window_rope_theta": st.sampled_from([None, 100.0]),
    "mlp_bias": st.booleans(),
    "layer_rope": st.none() | st.tuples(*[st.booleans()] * 3),
    "layer_windows": st.none() | st.tuples(*[st.booleans()] * 3),
    "activation": st.sampled_from(["silu", "gelu_tanh"]),
    "attention_scale": st.none() | st.floats(0.05, 1.0),
    "attention_softcap": st.sampled_from([0.0, 4.0]),
    "logit_softcap": st.sampled_from([0.0, 30.0]),
    "residual_scale": st.floats(0.1, 2.0),
    "logits_divisor": st.floats(0.1, 9.0),
    "rope_scaling": st.none()
    | st.fixed_dictionaries(
        {"rope_type": st.just("linear"), "factor": st.floats(1.0, 8.0)},
    )
    | st.fixed_dictionaries(
        {
            "rope_type": st.sampled_from(["yarn", "dynamic"]),
            "factor": st.floats(1.0, 8.0),
            "original_max_position_embeddings": st.integers(8, 4096),
        }
    ),
}


@given(st.data())
def test_any_decoder_that_a_class_holds_comes_back_from_its_config(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    drawn = {
        key: data.draw(values, label=key)
        for key, values in KIND_FIELDS.items()
        if key in kind.able or (key == "qkv_bias" and name != "phi3")
    }
    if "o_bias" in kind.able:
        drawn["o_bias"] = drawn["qkv_bias"]
    else:
        drawn["qkv_bias"] = name == "qwen2"
    marks = drawn.get("layer_windows")
    if not drawn.get("window"):
        drawn |= {"layer_windows": None, "window_rope_theta": None}
    elif marks is not None and (all(marks) or not any(marks)):
        drawn["layer_windows"] = None
    if drawn.get("layer_rope") is not None and all(drawn["layer_rope"]):
        drawn["layer_rope"] = None
    norms: dict = {"norm_position": kind.norm_position, "qk_norm": kind.qk_norm}
    if kind.unit_norms:
        drawn["embedding_scale"] = 32**0.5
    config = tiny(n_layers=3, model_type=name, **norms, **drawn)
    found = config_from_hf(hf_config(config, torch.float32, 64))
    scale = found.query_scale
    assert scale == pytest.approx(config.query_scale, rel=1e-5)
    same = replace(found, model_type=name, attention_scale=config.attention_scale)
    assert same == config


def test_every_class_named_is_one_of_transformers() -> None:
    for name, kind in {**KINDS, **MOE_KINDS}.items():
        made = transformers.AutoConfig.for_model(name)
        assert transformers.AutoModelForCausalLM._model_mapping[type(made)].__name__ == kind.name
        assert name not in NOT_HELD
