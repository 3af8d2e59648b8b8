"""Where the old model stands in the one that grew: slices of the new one against slices of the old,
by their logits and by their gradient's state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from motet.models.config import ModelConfig, problems
from motet.models.family.space import member_of
from motet.models.growth.growth import grow
from motet.models.growth.registry import OPERATORS, operator
from motet.models.growth.standing import StandingModel, standing
from motet.models.growth.upcycling import mixture_of
from motet.models.member import Member
from tests.models.families import some_tokens
from tests.models.growth.growing import EXACT, KINDS, larger, source_of, states

DEEP = {"n_layers": 4}
WIDE = {"d_model": 64, "head_dim": 8, "n_heads": 8, "n_kv_heads": 4, "d_ffn": 96}
ODD = {**WIDE, "n_heads": 6, "n_kv_heads": 3, "d_ffn": 72}
NARROW = {"d_model": 16, "head_dim": 8, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 24, "n_layers": 1}


def targets(name: str, config: ModelConfig) -> ModelConfig:
    sizes: dict[str, Any] = DEEP
    if issubclass(OPERATORS[name], type(operator("prefix")).__mro__[1]):
        sizes = WIDE
    if name in ("decoalesce", "ligo", "mango"):
        sizes = WIDE | DEEP
    if name in ("coalesce", "prune"):
        sizes = NARROW if name == "coalesce" else {"n_layers": 1}
    if name == "upcycling":
        return mixture_of(config, 4, 2)
    return replace(config, **sizes)


def slices(config: ModelConfig, target: ModelConfig, stands: StandingModel, groups: int) -> Any:
    """(the old model, or a part of it, and the slice of the new one that stands for it)."""
    for name, asked in (("all", {}), ("part", {"n_kv_heads": 0.5, "d_ffn": 0.5})):
        old = member_of(config, name, asked, groups)
        sizes = {key: getattr(old.config, key) for key in ("d_model", "n_kv_heads", "d_ffn")}
        layers = [stands.layers[layer] for layer in old.layers]
        yield old, member_of(target, f"{name}.new", {**sizes, "layers": layers}, groups)


def apart(growth: Any, model: Any, old: Member, new: Member) -> float:
    tokens = some_tokens(growth.source, 2, 16)
    with torch.no_grad():
        before, after = model(tokens, member=old), larger(growth, model)(tokens, member=new)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", OPERATORS)
def test_a_slice_of_the_grown_model_is_the_old_one_where_the_operator_says_so_and_else_is_not(
    name: str,
) -> None:
    config, model = source_of("llama", n_layers=2, d_ffn=48, n_heads=4, n_kv_heads=2, head_dim=8)
    target = targets(name, config)
    options = {"scores": {"layers": [1.0, 0.5]}} if name == "prune" else {}
    growth = operator(name, **options).growth(config, target)
    stands = standing(growth)
    nowhere = {"bert2bert-aki", "coalesce", "upcycling", "ligo", "mango", "prune"}
    assert (stands is None) == (name in nowhere)
    if stands is None:
        return
    exact = {"stack", "interpolate", "identity", "frozen-substrate", "incremental", "prefix"}
    assert stands.exact == (name in exact)
    for old, new in slices(config, target, stands, 1):
        assert (apart(growth, model, old, new) <= EXACT) == stands.exact, (name, old.name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [WIDE, ODD], ids=["whole factors", "others"])
def test_copies_that_nothing_reads_leave_every_slice_of_the_old_model(
    kind: str, sizes: dict[str, Any]
) -> None:
    config, model = source_of(kind, head_dim=8, n_heads=4, n_kv_heads=2, d_model=32)
    if config.n_experts:
        sizes = {**sizes, "d_expert": 24}
        sizes |= {"d_shared": 30} if config.shared_width else {}
    target = replace(config, **sizes)
    assert not problems(target)
    growth = operator("prefix").growth(config, target)
    stands = standing(growth)
    assert stands == StandingModel(tuple(range(config.n_layers)), True)
    old = Member("old", config, tuple(range(config.n_layers)))
    widths = {key: getattr(config, key) for key in ("d_model", "n_kv_heads")}
    if config.n_moe_layers < config.n_layers:
        widths["d_ffn"] = config.d_ffn
    if config.n_experts:
        widths |= {"d_expert": config.expert_width}
        widths |= {"d_shared": config.shared_width} if config.shared_width else {}
    assert apart(growth, model, old, member_of(target, "new", widths)) <= EXACT


def test_groups_of_channels_get_copies_of_their_own() -> None:
    config, model = source_of("llama", n_layers=1, d_ffn=48, n_heads=4, n_kv_heads=2, head_dim=8)
    target = replace(config, d_ffn=96, n_heads=8, n_kv_heads=4)
    grouped = operator("prefix", groups=2).growth(config, target)
    assert grouped.exact
    assert standing(grouped, 2) == StandingModel((0,), True)
    assert standing(grouped, 1) is None
    assert standing(operator("prefix").growth(config, target), 2) is None
    old = member_of(config, "old", {"d_ffn": 24}, 2)
    new = member_of(target, "new", {"d_ffn": 24, "n_kv_heads": 2}, 2)
    assert apart(grouped, model, old, new) <= EXACT


def test_old_channels_keep_their_moments_and_copies_have_none() -> None:
    config, model = source_of("llama", n_layers=1, d_ffn=48)
    growth = operator("prefix").growth(config, replace(config, d_ffn=96))
    before = dict(states(model))
    after = dict(grow(growth, before.items()))
    for name, at in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = f"blocks.0.feed_forward.{name}.weight"
        for key in ("exp_avg", "exp_avg_sq"):
            old, copies = after[weight][key].chunk(2, at)
            torch.testing.assert_close(old, before[weight][key], atol=0, rtol=1e-6)
            assert not copies.any()
        assert after[weight]["step"] == 7
    assert not after["blocks.0.feed_forward.down_proj.weight"]["weight"][:, 48:].any()
    assert after["blocks.0.feed_forward.up_proj.weight"]["weight"][48:].any()


def test_a_pair_stands_where_both_do() -> None:
    config, model = source_of("llama", n_layers=2, d_ffn=48, n_heads=4, n_kv_heads=2, head_dim=8)
    target = replace(config, n_layers=4, d_ffn=96)
    for name, exact in (("prefix+interpolate", True), ("hypercloning+stack", False)):
        growth = operator(name).growth(config, target)
        stands = standing(growth)
        assert stands is not None
        assert stands == StandingModel((0, 2) if exact else (0, 1), exact)
        for old, new in slices(config, target, stands, 1):
            assert (apart(growth, model, old, new) <= EXACT) == exact
