from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny

from motet.models import counts
from motet.models.config import PRESETS, ModelError, check, preset, problems
from motet.models.decoder import Decoder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_and_as_large_as_its_name_says(name: str) -> None:
    config = preset(name, 32_000)
    assert problems(config) == []
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert counts.parameters_non_embedding(config) == pytest.approx(said, rel=0.12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_exact(name: str, tied: bool, family: str) -> None:
    config = preset(name, 4096, tied_embeddings=tied, **FAMILIES[family])
    with torch.device("meta"):
        decoder = Decoder(config)
    sizes = {n: p.numel() for n, p in decoder.named_parameters()}
    assert counts.parameters(config) == sum(sizes.values())
    outside = [size for n, size in sizes.items() if not n.startswith(("embedding", "head"))]
    assert counts.parameters_non_embedding(config) == sum(outside)


def test_flops_are_six_per_multiplying_weight_and_a_square_of_attention() -> None:
    config = tiny(tied_embeddings=True)
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 97 * 32
    assert counts.training_flops_per_token(config, 10) == 6 * weights + 12 * 2 * 32 * 10


def test_the_activation_estimate_is_near_what_autograd_keeps() -> None:
    config = preset("1m", 512, n_layers=4)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    kept: dict[int, int] = {}
    mine = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in mine:
            kept[pointer] = x.untyped_storage().nbytes()
        return x

    tokens = torch.zeros(2, 200, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = decoder(tokens, tokens, mode="loss").cross_entropy
    per_layer = counts.activation_bytes_per_layer(config, 200, 2, bytes_per_value=4)
    assert sum(kept.values()) / 4 == pytest.approx(per_layer, rel=0.35)
    del loss


def test_recomputation_keeps_less() -> None:
    config = preset("190m", 32_000)
    assert counts.activation_bytes(config, 2048, 4, recompute=True) < 0.4 * counts.activation_bytes(
        config, 2048, 4
    )


def test_all_problems_are_reported_at_once_with_what_would_work() -> None:
    config = replace(tiny(), d_model=0, rope_theta=-1.0, qk_norm="heads")
    found = dict(problems(config))
    assert set(found) == {"d_model", "rope_theta", "qk_norm"}
    assert "did you mean 'head'?" in found["qk_norm"]
    with pytest.raises(ModelError, match=r"model\.d_model.*model\.rope_theta.*model\.qk_norm"):
        check(config)


@pytest.mark.parametrize(
    ("change", "setting", "hint"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads", "1, 2, 4"),
        ({"d_model": 34}, "d_model", "32 or 36"),
        ({"head_dim": 5}, "head_dim", "6"),
        ({"vocabulary_size": True}, "vocabulary_size", "whole number"),
    ],
)
def test_an_unsound_ratio_names_the_nearest_sound_one(
    change: dict, setting: str, hint: str
) -> None:
    ((found, message),) = problems(replace(tiny(), **change))
    assert found == setting
    assert hint in message


def test_unknown_presets_and_settings_are_errors_with_a_suggestion() -> None:
    with pytest.raises(ModelError, match="did you mean '15m'"):
        preset("15mm", 100)
    with pytest.raises(ModelError, match="did you mean 'n_layers'"):
        preset("15m", 100, n_layer=3)


def test_sizes_and_counts_load_without_torch() -> None:
    code = (
        "import sys, motet.models.config, motet.models.counts;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
