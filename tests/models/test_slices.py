"""A slice of the whole model is the plain model that it is exported as, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.distill import Teacher
from motet.models.family.base import Member, member_problems
from motet.models.family.importance import (
    axis_sizes,
    dealt,
    orders_by,
    reordered,
    weight_orders,
)
from motet.models.member import Cut
from motet.models.moe import MoE
from motet.models.slices import member_parts, member_weights, take
from motet.parallel.engines.channel_order import measured
from motet.parallel.runtime.mesh import World
from tests.models.families import made, some_tokens, tiny

MOE: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 16}
SHARED: dict[str, Any] = {"n_shared_experts": 1, "d_shared": 24, "shared_gate": True, **MOE}
BIASES: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
WINDOWS: dict[str, Any] = {
    **{"window": 3, "layer_windows": (True, False, False), "layer_rope": (True, True, False)},
    **{"attention_softcap": 2.0, "logit_softcap": 3.0, "embedding_scale": 2.0},
    **{"residual_scale": 0.5, "logits_divisor": 2.0, "activation": "gelu_tanh"},
}
KINDS = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("olmo2", {}, id="olmo2"),
    pytest.param("qwen3", {"tied_embeddings": True}, id="qwen3-tied"),
    pytest.param("llama", {"qkv_bias": True}, id="biases"),
    pytest.param("llama", {"layer_ffn": (16, 48, 32)}, id="per-layer"),
    pytest.param("llama", {"norm_position": "both", **BIASES, **WINDOWS}, id="both-norms"),
    pytest.param("llama", MOE, id="experts"),
    pytest.param("llama", SHARED | {"moe_every": 2}, id="shared-experts"),
]


def member_of(whole: ModelConfig, groups: int) -> Member:
    """Every axis at half, and the first and last layer."""
    layers = (0, whole.n_layers - 1) if whole.moe_every == 1 else (0, 1)
    widths = None
    if whole.layer_ffn is not None:
        widths = tuple(whole.ffn_width(layer) // 2 for layer in layers)
    half = replace(
        whole,
        d_model=24,
        n_layers=len(layers),
        n_heads=whole.n_heads // 2,
        n_kv_heads=whole.n_kv_heads // 2,
        head_dim=whole.head_width,
        d_ffn=32,
        layer_ffn=widths,
        **whole.marks_of(layers),
        **(
            {"n_experts": 2, "d_expert": 8, "d_shared": whole.d_shared and 16}
            if whole.n_experts
            else {}
        ),
    )
    return Member("half", half, layers, groups)


def whole_model(family: str, overrides: dict[str, Any]) -> ModelConfig:
    sizes = {"n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ffn": 64}
    return tiny(family, **(sizes | overrides))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("family", "overrides"), KINDS)
def test_a_slice_computes_and_learns_as_the_plain_model_that_it_is(
    family: str, overrides: dict[str, Any], groups: int
) -> None:
    whole = whole_model(family, overrides)
    member = member_of(whole, groups)
    assert member_problems(whole, [member]) == []
    parent = made(whole)
    plain = Decoder(member.config)
    plain.load_state_dict(member_weights(member, whole, parent.state_dict()))
    tokens, labels = some_tokens(whole, 2, 12), some_tokens(whole, 2, 12, seed=1)
    torch.testing.assert_close(parent(tokens, member=member), plain(tokens))
    scores = parent(tokens, labels, mode="score", member=member).logprob
    torch.testing.assert_close(scores, plain(tokens, labels, mode="score").logprob)
    for model, extra in ((parent, {"member": member}), (plain, {})):
        model(tokens, labels, mode="loss", **extra).objective.backward()
    own = dict(plain.named_parameters())
    gradients = {name: p.grad for name, p in parent.named_parameters()}
    for name, theirs, cuts in member_parts(member, whole):
        gradient = inside = gradients[theirs]
        assert gradient is not None
        for dimension, cut in enumerate(cuts):
            inside = take(inside, dimension, cut)
        torch.testing.assert_close(inside, own[name].grad, msg=name)
        # All of the gradient lies inside the slice.
        assert gradient.abs().sum() == pytest.approx(inside.abs().sum().item(), rel=1e-5)
    skipped = [n for n, g in gradients.items() if g is None]
    assert {n.split(".")[1] for n in skipped} == {
        str(layer) for layer in range(whole.n_layers) if layer not in member.layers
    }


def test_the_weights_of_the_whole_model_name_what_every_dimension_counts() -> None:
    for family, overrides in (p.values for p in KINDS):
        config = whole_model(family, overrides)  # type: ignore[arg-type]
        sizes = {
            "vocabulary": {config.vocabulary_size},
            "stream": {config.d_model},
            "heads": {config.query_width, config.kv_width},
            "head": {config.head_width},
            "hidden": {config.ffn_width(layer) for layer in range(config.n_layers)},
            "experts": {config.n_experts},
            "expert": {config.expert_width},
            "shared": {config.shared_width},
            "one": {1},
        }
        for weight in named_weights(config):
            assert len(weight.axes) == len(weight.shape), weight.name
            for axis, size in zip(weight.axes, weight.shape, strict=True):
                assert size in sizes[axis], weight.name


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)
def test_ranks_hold_the_same_share_of_a_slice(
    per_group: int, more: int, unit_power: int, dimensions: int, parts: int
) -> None:
    groups, unit = 4, 2**unit_power
    whole = groups * (per_group + more)
    cut = Cut(whole, groups * per_group, groups)
    x = torch.arange(whole * unit).float().reshape(-1, *(1,) * (dimensions - 1))
    taken = take(x, 0, cut)
    assert len(taken) == cut.kept * unit
    mine = [take(part, 0, cut, parts) for part in x.chunk(parts)]
    assert torch.equal(torch.cat(mine), taken)
    assert len({len(part) for part in mine}) == 1


def test_more_ranks_than_groups_cut_one() -> None:
    with pytest.raises(ValueError, match="cut a group"):
        take(torch.zeros(4), 0, Cut(8, 4, 1), parts=2)


def test_a_member_follows_its_teachers_with_the_gradient_of_the_divergence() -> None:
    whole = whole_model("llama", {})
    member = member_of(whole, 1)
    tokens, labels = some_tokens(whole, 2, 12), some_tokens(whole, 2, 12, seed=1)
    labels[0, :5] = -100
    model = made(whole)
    first = model(tokens, labels, mode="loss", teaches=True)
    assert first.hidden_BTD is not None
    teacher = Teacher(first.hidden_BTD.detach())
    other = made(whole, seed=5)
    kept = other(tokens, mode="states")
    sums = model(
        tokens,
        labels,
        mode="loss",
        z_loss=0.1,
        member=member,
        teachers=[teacher, kept],
        weights=(0.3, 0.7, 0.4),
    )
    sums.objective.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(tokens, member=member)
    valid = labels != -100
    target = model(tokens).detach().log_softmax(-1)[valid]
    mine = logits.log_softmax(-1)[valid]
    entropy = functional.cross_entropy(logits[valid], labels[valid], reduction="sum")
    z_loss = 0.1 * logits[valid].logsumexp(-1).square().sum()
    second = other(tokens).detach().log_softmax(-1)[valid]
    divergence, apart = ((t.exp() * (t - mine)).sum() for t in (target, second))
    (0.3 * (entropy + z_loss) + 0.7 * divergence + 0.4 * apart).backward()
    torch.testing.assert_close(sums.cross_entropy, entropy)
    torch.testing.assert_close(sums.divergence, divergence + apart)
    torch.testing.assert_close(sums.z_loss, z_loss)
    for name, gradient in found.items():
        expected = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("family", "overrides"), KINDS)
def test_channels_in_another_order_compute_the_same(family: str, overrides: dict[str, Any]) -> None:
    whole = whole_model(family, overrides)
    generator = np.random.default_rng(0)
    orders = {axis: generator.permutation(n).tolist() for axis, n in axis_sizes(whole).items()}
    model, tokens = made(whole), some_tokens(whole, 2, 12)
    expected, state, moved = model(tokens), model.state_dict(), 0
    for name, order in weight_orders(whole, orders):
        state[name] = reordered(state[name], order)
        moved += 1
    assert moved == len([w for w in named_weights(whole) if w.axes != ("head",)])
    model.load_state_dict(state)
    torch.testing.assert_close(model(tokens), expected, atol=2e-5, rtol=1e-4)


def test_what_matters_is_measured_and_dealt_to_the_groups() -> None:
    assert dealt([0.1, 0.9, 0.5, 0.7, 0.3, 0.2], 2) == [1, 2, 5, 3, 4, 0]
    assert dealt([1.0, 2.0, 2.0], 1) == [1, 2, 0]
    whole = whole_model("llama", {})
    model, tokens = made(whole), some_tokens(whole, 2, 12)
    with torch.no_grad():  # the last head, a hidden channel and a channel of the stream are loud
        model.blocks["1"].attention.v_proj.weight[-whole.head_width :] *= 30
        model.blocks["0"].feed_forward.up_proj.weight[40] *= 1000
        for block in model.blocks.values():
            block.attention_norm.weight[17] = block.feed_forward_norm.weight[17] = 30
    world = World(0, 1, 0, torch.device("cpu"), 1.0, None, None)  # type: ignore[arg-type]
    scores = measured(model, 0, lambda: model(tokens), world)
    orders = orders_by(scores, 2)
    assert orders["blocks.1.heads"][0] == whole.n_kv_heads - 1
    assert orders["blocks.0.hidden"][0] == 40
    assert orders["stream"][0] == 17
    assert not any(module._forward_hooks for module in model.modules())


def test_who_ran_before_changes_nothing() -> None:
    whole = whole_model("llama", {})
    member, tokens = member_of(whole, 2), some_tokens(whole, 2, 12)
    model = made(whole)
    first = [model(tokens, member=who) for who in (None, member)]
    again = [model(tokens, member=who) for who in (member, None)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_teacher_runs_as_it_scores() -> None:
    whole = whole_model("llama", {**MOE, "capacity_factor": 0.25, "balance_loss": 0.1})
    tokens, model = some_tokens(whole, 2, 12), made(whole)
    moe = model.blocks["0"].feed_forward
    assert isinstance(moe, MoE)
    moe.begin_step(tokens.numel())
    with torch.no_grad():
        teacher = model(tokens, mode="states")
        scores = model(tokens, tokens, mode="score")
    assert moe.counts().sum() == 0  # no token of it counts for the balance
    assert teacher.head_VS is not None
    logprob = (teacher.hidden_BTS @ teacher.head_VS.t()).log_softmax(-1)
    found = logprob.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(found, scores.logprob)  # no token of it was dropped
    in_training = model(tokens, tokens, mode="loss").cross_entropy
    assert abs(in_training + scores.logprob.sum()) > 1e-3


def _unbalanced() -> dict[str, Any]:
    return {"bias_rate": 0.01, "balance_loss": 0.1, **MOE}


def test_a_member_with_fewer_experts_counts_for_those_alone() -> None:
    whole = whole_model("llama", _unbalanced())
    member = member_of(whole, 1)
    model = made(whole)
    tokens, labels = some_tokens(whole, 2, 12), some_tokens(whole, 2, 12, seed=1)
    moe = model.blocks["0"].feed_forward
    moe.begin_step(48)  # type: ignore[operator, union-attr]
    for who in (member, None):
        model(tokens, labels, mode="loss", member=who).objective.backward()
    counts, expected = moe.counts(), moe.expected()  # type: ignore[operator, union-attr]
    assert counts.sum() == 2 * 24 * 2
    np.testing.assert_allclose(expected, [24 + 12, 24 + 12, 12, 12])
    before = moe.state()["bias"].clone()  # type: ignore[operator, union-attr]
    moe.end_step(counts, expected)  # type: ignore[operator, union-attr]
    moved = (moe.state()["bias"] - before).numpy()  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(moved, 0.01 * np.sign(expected.numpy() - counts.numpy()), atol=1e-7)


def test_a_compiled_block_has_one_graph_for_each_slice() -> None:
    from torch._dynamo.testing import CompileCounter

    whole = whole_model("llama", {"n_layers": 1})
    members = [
        Member(f"m{f}", replace(whole, d_ffn=f, d_model=d), (0,), 1)
        for f, d in zip(range(4, 48, 4), [24, 32] * 6, strict=False)
    ]
    model, tokens = made(whole), some_tokens(whole, 2, 12)
    expected = [model(tokens, member=member) for member in members]
    counter = CompileCounter()
    for block in model.blocks.values():
        block.compile(backend=counter)
    for _ in range(2):
        for member, logits in zip(members, expected, strict=True):
            torch.testing.assert_close(model(tokens, member=member), logits)
    # More than the eight after which the compiler would give up; no graph is broken in two.
    assert len(members) == counter.frame_count == 11
