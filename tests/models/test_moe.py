"""Routing, experts, balance: against naive references, and against what must not change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import made, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from motet.models import counts
from motet.models import experts as experts_module
from motet.models.config import ModelConfig, ModelError, check, preset, problems
from motet.models.decoder import Decoder, initial_value, initialize
from motet.models.experts import Experts
from motet.models.moe import MoE
from motet.models.routing import arrange, auxiliary, capacity, choose, count_choices

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "one-each": {"experts_per_token": 1, "normalize_top_k": False},
    "shared": {"n_shared_experts": 2, "d_expert": 20},
    "gated": {"n_shared_experts": 1, "shared_gate": True, "d_shared": 28, "normalize_top_k": False},
    "sigmoid": {"router_score": "sigmoid", "experts_per_token": 3, "bias_rate": 0.01},
}


def tiny_moe(**overrides: Any) -> ModelConfig:
    return tiny(**{"n_experts": 6, "n_layers": 2, **overrides})


def layers(decoder: Decoder) -> list[MoE]:
    return [module for module in decoder.modules() if isinstance(module, MoE)]


def one_layer(config: ModelConfig, seed: int = 0) -> MoE:
    return layers(made(config, seed))[0]


def naive(layer: MoE, x_ND: Tensor) -> Tensor:
    """Token by token, choice by choice, in plain PyTorch."""
    config, experts = layer.config, layer.experts
    out = []
    for x_D in x_ND:
        logits_E = layer.router.weight @ x_D
        softmax = config.router_score == "softmax"
        scores_E = logits_E.softmax(0) if softmax else logits_E.sigmoid()
        biased_E = (scores_E + layer.state()["bias"]).tolist()
        chosen = sorted(range(config.n_experts), key=lambda e: (-biased_E[e], e))
        chosen = chosen[: config.experts_per_token]
        total = sum(scores_E[e] for e in chosen) if config.normalize_top_k else 1.0
        y_D = torch.zeros_like(x_D)
        for e in chosen:
            hidden_F = F.silu(experts.gate_proj[e] @ x_D) * (experts.up_proj[e] @ x_D)
            y_D = y_D + scores_E[e] / total * (experts.down_proj[e] @ hidden_F)
        if layer.shared is not None:
            gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_D[None])[0].sigmoid()
            y_D = y_D + gate * layer.shared(x_D)
        out.append(y_D)
    return torch.stack(out)


def hidden(n_tokens: int, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, width, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_and_its_gradients_equal_a_loop_over_tokens(variant: str) -> None:
    layer = one_layer(tiny_moe(**VARIANTS[variant]))
    layer.state()["bias"].copy_(0.3 * hidden(1, 6, seed=3)[0] if variant == "sigmoid" else 0)
    found, slopes = [], hidden(23, seed=1)
    for run in (lambda x: layer(x[None])[0], lambda x: naive(layer, x)):
        x_ND = hidden(23).requires_grad_()
        layer.zero_grad()
        y_ND = run(x_ND)
        (y_ND * slopes).sum().backward()
        found.append([y_ND, x_ND.grad, *[p.grad.clone() for p in layer.parameters()]])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5)


scores = st.integers(1, 9).flatmap(
    lambda n_experts: st.tuples(
        st.integers(1, n_experts),
        st.lists(
            st.lists(st.integers(0, 3), min_size=n_experts, max_size=n_experts),
            min_size=1,
            max_size=12,
        ),
    )
)


@settings(max_examples=100, deadline=None)
@given(scores)
def test_the_best_are_chosen_and_ties_go_to_the_lowest_index(case: tuple) -> None:
    k, rows = case
    chosen = choose(torch.tensor(rows, dtype=torch.float32), k)
    for row, found in zip(rows, chosen.tolist(), strict=True):
        assert found == sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
    counted = count_choices(chosen, len(rows[0]))
    flat = chosen.flatten().tolist()
    assert counted.tolist() == [flat.count(expert) for expert in range(len(rows[0]))]


@settings(max_examples=100, deadline=None)
@given(scores, st.integers(0, 5))
def test_rows_are_sorted_and_capacity_keeps_the_earliest_tokens(case: tuple, most: int) -> None:
    k, rows = case
    n_experts = len(rows[0])
    chosen = choose(torch.tensor(rows, dtype=torch.float32), k)
    counted = count_choices(chosen, n_experts)
    routing = arrange(chosen, torch.ones(chosen.shape), counted, most)
    wanted = []
    for expert in range(n_experts):
        tokens = [t for t, found in enumerate(chosen.tolist()) if expert in found]
        wanted += [(expert, token) for token in (tokens[:most] if most else tokens)]
    expert_M = torch.repeat_interleave(torch.arange(n_experts), routing.kept_E)
    assert list(zip(expert_M.tolist(), routing.token_M.tolist(), strict=True)) == wanted
    for token, (experts, places) in enumerate(
        zip(chosen.tolist(), routing.row_NK.tolist(), strict=True)
    ):
        for expert, place in zip(experts, places, strict=True):
            kept = (expert, token) in wanted
            assert place == (wanted.index((expert, token)) if kept else len(wanted))


def test_capacity_is_a_share_rounded_up() -> None:
    assert capacity(10, 2, 4, 1.0) == 5
    assert capacity(10, 1, 4, 1.0) == 3
    assert capacity(10, 1, 1, 1.1) == 11  # 1.1 x 10 is a little more than 11 in binary
    assert capacity(1, 1, 64, 0.5) == 1


def test_a_full_expert_drops_later_tokens_in_training_and_none_when_scoring() -> None:
    layer = one_layer(tiny_moe(n_experts=2, experts_per_token=1, capacity_factor=1.0))
    with torch.no_grad():
        layer.router.weight.zero_()  # a tie everywhere: all 8 tokens choose expert 0, which takes 4
        dropless = layer(hidden(8)[None])[0]
    x_ND = hidden(8).requires_grad_()
    y_ND = layer(x_ND[None])[0]
    torch.testing.assert_close(y_ND[:4], dropless[:4])
    assert (y_ND[4:] == 0).all()
    assert (dropless[4:].abs().sum(-1) > 0).all()
    y_ND.sum().backward()
    assert (x_ND.grad[:4].abs().sum(-1) > 0).all()
    assert (x_ND.grad[4:] == 0).all()


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_padding_and_batch_size_change_no_score(capacity_factor: float) -> None:
    config = tiny_moe(capacity_factor=capacity_factor, experts_per_token=2)
    decoder, tokens = made(config), some_tokens(config, 3, 20)
    with torch.no_grad():
        alone = decoder(tokens[:1, :-1], tokens[:1, 1:], mode="score")
        padded = F.pad(tokens[:, :-1], (0, 9))
        labels = F.pad(tokens[:, 1:], (0, 9), value=-100)
        together = decoder(padded, labels, mode="score")
    torch.testing.assert_close(together.logprob[:1, :19], alone.logprob, rtol=0, atol=2e-5)


def test_an_expert_without_rows_has_a_gradient_of_zeros() -> None:
    layer = one_layer(tiny_moe())
    for sizes in ([0, 0, 7, 0, 0, 0], [0] * 6):
        layer.zero_grad()
        rows = hidden(sum(sizes)).requires_grad_()
        layer.experts(rows, torch.tensor(sizes)).sum().backward()
        for weight in layer.experts.parameters():
            assert weight.grad is not None
            busy = [e for e in range(6) if weight.grad[e].abs().sum() > 0]
            assert busy == ([2] if sum(sizes) else [])
        assert rows.grad is not None


def test_a_shard_of_the_experts_computes_its_share() -> None:
    layer = one_layer(tiny_moe())
    rows, sizes = hidden(12), [1, 4, 0, 2, 5, 0]
    whole = layer.experts(rows, torch.tensor(sizes))
    part = Experts(3, 32, 48)
    part.load_state_dict({name: w[3:] for name, w in layer.experts.state_dict().items()})
    torch.testing.assert_close(part(rows[5:], torch.tensor(sizes[3:])), whole[5:])
    halves = []
    for half in (slice(0, 24), slice(24, 48)):
        part = Experts(6, 32, 24)
        state = {name: w[:, half] for name, w in layer.experts.state_dict().items()}
        part.load_state_dict({**state, "down_proj": layer.experts.down_proj[:, :, half]})
        halves.append(part(rows, torch.tensor(sizes)))
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-5, atol=1e-5)


def test_grouped_products_equal_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for CUDA in bfloat16, run here on the CPU in fp32."""
    layer = one_layer(tiny_moe())
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(experts_module, "_grouped_products_work", lambda *_, g=grouped: g)
        layer.zero_grad()
        x_ND = hidden(16).requires_grad_()
        (layer(x_ND[None])[0] * hidden(16, seed=1)).sum().backward()
        results.append([x_ND.grad, *[p.grad.clone() for p in layer.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_grouped_products_are_for_bfloat16_on_cuda_alone() -> None:
    rows, gate = torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(2, 8, 16)
    assert not experts_module._grouped_products_work(rows, gate)


def test_under_autocast_experts_round_and_the_router_does_not() -> None:
    layer = one_layer(tiny_moe())
    x_ND = hidden(40)
    plain, wide = layer.route(x_ND), layer(x_ND[None])
    with torch.autocast("cpu", torch.bfloat16):
        low, low_out = layer.route(x_ND), layer(x_ND[None].bfloat16())
    assert torch.equal(plain.token_M, low.token_M)
    assert torch.equal(plain.weights_NK, low.weights_NK)
    assert low_out.dtype == torch.bfloat16
    assert F.cosine_similarity(low_out.float().flatten(), wide.flatten(), 0) > 0.99


# --- balance ---


def formula(logits_NE: Tensor, frequencies_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The two losses as the docstring of MoE has them, summed over tokens."""
    if config.router_score == "softmax":
        p_NE = logits_NE.softmax(-1)
    else:
        p_NE = logits_NE.sigmoid() / logits_NE.sigmoid().sum(-1, keepdim=True)
    balance = config.balance_loss * config.n_experts * (frequencies_E * p_NE).sum()
    return balance, config.router_z_loss * logits_NE.logsumexp(-1).square().sum()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_auxiliary_gradient_is_that_of_its_formula(score: Any) -> None:
    config = tiny_moe(router_score=score, balance_loss=0.7, router_z_loss=0.3)
    logits_NE = (2 * hidden(11, 6).double()).requires_grad_()
    frequencies_E = hidden(1, 6, seed=2)[0].double().softmax(0)
    losses = formula(logits_NE, frequencies_E, config)
    (wanted,) = torch.autograd.grad(losses[0] + losses[1], logits_NE)
    sums, found = auxiliary(logits_NE.detach(), frequencies_E, config)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(sums, torch.stack(losses).detach())


def test_the_balance_loss_of_uniform_routing_is_its_coefficient() -> None:
    config = tiny_moe(balance_loss=0.01)
    sums, _ = auxiliary(torch.zeros(5, 6), torch.full((6,), 1 / 6), config)
    assert sums[0].item() / 5 == pytest.approx(0.01)


def step(decoder: Decoder, batches: list[Tensor], loss_scale: float = 1.0) -> dict[str, Any]:
    """One step as an engine drives it; returns gradients, counts and sums."""
    decoder.zero_grad()
    n_tokens = sum(batch[:, :-1].numel() for batch in batches)
    for layer in layers(decoder):
        layer.begin_step(n_tokens)
    for batch in batches:
        sums = decoder(batch[:, :-1], batch[:, 1:], mode="loss")
        (sums.cross_entropy * (loss_scale / n_tokens)).backward()
    found = {
        "gradients": {
            n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None
        },
        "counts": [layer.counts().clone() for layer in layers(decoder)],
        "sums": torch.stack([layer.sums() for layer in layers(decoder)]),
    }
    for layer in layers(decoder):
        layer.end_step(layer.counts())
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert [c.tolist() for c in a["counts"]] == [c.tolist() for c in b["counts"]]
    torch.testing.assert_close(a["sums"], b["sums"])
    torch.testing.assert_close(a["gradients"], b["gradients"], rtol=1e-4, atol=1e-6)


AUXILIARY = {"balance_loss": 0.5, "router_z_loss": 0.1, "bias_rate": 0.01}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_micro_batches_of_any_size_give_the_same_step_twice_in_a_row(score: Any) -> None:
    config = tiny_moe(router_score=score, **AUXILIARY)
    tokens = some_tokens(config, 6, 15)
    whole, split = made(config), made(config)
    for _ in range(2):  # the second step uses the frequencies of the first
        same(step(whole, [tokens]), step(split, [tokens[:1], tokens[1:3], tokens[3:]]))
    for a, b in zip(layers(whole), layers(split), strict=True):
        assert torch.equal(a.state()["frequencies"], b.state()["frequencies"])
        assert torch.equal(a.state()["bias"], b.state()["bias"])


def test_micro_scope_balances_every_micro_batch_by_itself() -> None:
    config = tiny_moe(balance_loss=0.5, balance_scope="micro", n_layers=1)
    layer = one_layer(config)
    x_ND = hidden(30)
    frequencies = []
    layer.begin_step(30)
    for part in (x_ND[:10], x_ND[10:]):
        layer(part[None]).sum().mul(0).backward()
        frequencies.append(layer.counts().clone())
    with torch.no_grad():
        logits = layer.router(x_ND)
    late = frequencies[1] - frequencies[0]
    wanted = formula(logits[:10], frequencies[0] / 20, config)[0]
    wanted = wanted + formula(logits[10:], late / 40, config)[0]
    assert layer.sums()[0].item() == pytest.approx(wanted.item() / 30, rel=1e-5)


def test_the_auxiliary_gradient_does_not_scale_with_the_loss() -> None:
    config = tiny_moe(**AUXILIARY)
    tokens = some_tokens(config, 3, 15)
    aux_only = step(made(config), [tokens], loss_scale=0.0)["gradients"]
    assert max(g.abs().max() for g in aux_only.values()) > 1e-4
    plain = replace(config, balance_loss=0.0, router_z_loss=0.0)
    ce_only = step(made(plain), [tokens])["gradients"]
    both = step(made(config), [tokens], loss_scale=3.0)["gradients"]
    for name, gradient in both.items():
        wanted = aux_only[name] + 3 * ce_only[name]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_the_gradient_scale_multiplies_the_auxiliary_gradient_alone() -> None:
    layer = one_layer(tiny_moe(**AUXILIARY))
    found = []
    for scale in (1.0, 4.0):
        layer.zero_grad()
        layer.begin_step(9, scale)
        (layer(hidden(9)[None]).sum() * 0).backward()
        found.append((layer.router.weight.grad.clone(), layer.sums().clone()))
    torch.testing.assert_close(found[1][0], 4 * found[0][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_counts_every_token_once_and_scoring_none(recompute: str) -> None:
    config = tiny_moe(**AUXILIARY)
    tokens = some_tokens(config, 3, 15)
    plain, again = made(config), made(config)
    again.recompute = recompute
    wanted = step(plain, [tokens])
    assert [c.sum().item() for c in wanted["counts"]] == [3 * 14 * 2] * 2
    for layer in layers(again):
        layer.begin_step(1)
    with torch.no_grad():
        again(tokens[:, :-1], tokens[:, 1:], mode="score")
    assert all(layer.counts().sum() == 0 for layer in layers(again))
    same(step(again, [tokens]), wanted)


def test_outside_of_a_step_nothing_is_counted_or_added() -> None:
    layer, quiet = one_layer(tiny_moe(**AUXILIARY)), one_layer(tiny_moe())
    for each in (layer, quiet):
        each(hidden(9)[None]).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, quiet.router.weight.grad)


def test_a_step_sets_frequencies_and_moves_the_bias_against_the_load() -> None:
    layer = one_layer(tiny_moe(n_experts=4, bias_rate=0.125))
    layer.begin_step(10)
    layer.end_step(torch.tensor([8, 4, 5, 3]))
    state = layer.state()
    torch.testing.assert_close(state["frequencies"], torch.tensor([0.4, 0.2, 0.25, 0.15]))
    assert state["bias"].tolist() == [-0.125, 0.125, 0.0, 0.125]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    layer = one_layer(tiny_moe(bias_rate=0.1, normalize_top_k=False))
    x_ND = hidden(7)
    layer.state()["bias"].copy_(torch.tensor([0.0, 0, 9, 0, 5, 0]))
    routing = layer.route(x_ND)
    probability = layer.router(x_ND).softmax(-1)
    torch.testing.assert_close(routing.weights_NK, probability[:, [2, 4]])
    assert routing.kept_E.tolist() == [0, 0, 7, 0, 7, 0]


def test_the_bias_evens_out_a_lopsided_router() -> None:
    layer = one_layer(tiny_moe(n_experts=4, experts_per_token=1, bias_rate=0.005, n_layers=1))
    x_ND = hidden(400)
    x_ND[:, 0] = 1.0
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([3.0, 0, 0, 0])
    shares = []
    for _ in range(200):
        with torch.no_grad():
            counted = layer.route(x_ND).kept_E
        layer.begin_step(400)
        layer.end_step(counted)
        shares.append(counted.max().item() / 400)
    assert shares[0] > 0.6
    assert max(shares[-20:]) < 0.3


# --- state, initial values, configuration, counts ---


def test_state_is_neither_parameter_nor_buffer_and_survives_the_meta_device() -> None:
    config = tiny_moe(bias_rate=0.1)
    with torch.device("meta"):
        decoder = Decoder(config)
    names = [n for n, _ in decoder.named_parameters()]
    assert list(decoder.state_dict()) == names
    assert not list(decoder.buffers())
    initialize(decoder, 0)
    layer = layers(decoder)[0]
    assert layer.state()["frequencies"].tolist() == pytest.approx([1 / 6] * 6)
    layer.state()["bias"].copy_(torch.arange(6.0))  # as a checkpoint does
    assert layer.state()["bias"].tolist() == [0, 1, 2, 3, 4, 5]
    layer.reset_state(torch.device("cpu"))
    assert layer.state()["bias"].tolist() == [0] * 6
    assert "blocks.1.feed_forward.experts.gate_proj" in names
    assert "blocks.1.feed_forward.router.weight" in names


def test_an_expert_starts_the_same_whoever_asks_for_it() -> None:
    config = tiny_moe(init_std=0.02)
    name = "blocks.0.feed_forward.experts.down_proj"
    all_six = initial_value(name, (6, 100, 100), config, 0)
    assert torch.equal(all_six[4], initial_value(f"{name}.4", (100, 100), config, 0))
    assert not torch.equal(all_six[4], all_six[5])
    assert all_six.std() == pytest.approx(0.02 / (2 * config.n_layers) ** 0.5, rel=0.02)
    gate = initial_value(name.replace("down", "gate"), (6, 100, 100), config, 0)
    assert gate.std() == pytest.approx(0.02, rel=0.02)


def test_biases_of_queries_keys_and_values_start_at_zero_and_act() -> None:
    config = tiny(qkv_bias=True, n_layers=1)
    decoder, tokens = made(config), some_tokens(config, 1, 9)
    names = [n for n, _ in decoder.named_parameters() if n.endswith(".bias")]
    assert names == [f"blocks.0.attention.{x}_proj.bias" for x in "qkv"]
    before = decoder(tokens)
    torch.testing.assert_close(before, made(tiny(n_layers=1))(tokens))
    with torch.no_grad():
        decoder.blocks["0"].attention.v_proj.bias += 1
    assert (decoder(tokens) - before).abs().max() > 0.1


def test_compiled_blocks_with_experts_give_the_same_step() -> None:
    config = tiny_moe(**AUXILIARY, init_std=0.05)
    tokens = some_tokens(config, 2, 15)
    wanted, decoder = step(made(config), [tokens]), made(config)
    for block in decoder.blocks.values():
        block.compile(backend="aot_eager")
    same(step(decoder, [tokens]), wanted)


SHAPES: list[dict[str, Any]] = [
    {},
    {"n_dense_layers": 1, "moe_every": 2},
    {"n_shared_experts": 2, "d_expert": 20, "shared_gate": True, "qkv_bias": True},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_counts_are_exact(shape: dict) -> None:
    config = tiny_moe(n_layers=4, **shape)
    with torch.device("meta"):
        decoder = Decoder(config)
    sizes = {n: p.numel() for n, p in decoder.named_parameters()}
    assert counts.parameters(config) == sum(sizes.values())
    routed = sum(size for n, size in sizes.items() if ".experts." in n)
    assert routed == config.n_moe_layers * counts.expert_parameters_per_layer(config)
    idle = routed * (config.n_experts - config.experts_per_token) // config.n_experts
    active = sum(sizes.values()) - idle
    not_multiplying = sum(
        size for n, size in sizes.items() if "norm" in n or n.endswith("bias") or "embed" in n
    )
    assert counts.matmul_parameters(config) == active - not_multiplying
    moe_layers = [n for n in range(4) if f"blocks.{n}.feed_forward.router.weight" in sizes]
    assert moe_layers == [n for n in range(4) if config.has_experts(n)]


def test_dense_and_expert_layers_alternate_as_in_qwen_moe() -> None:
    config = tiny_moe(n_layers=6, n_dense_layers=2, moe_every=2)
    assert [layer for layer in range(6) if config.has_experts(layer)] == [3, 5]
    assert config.n_moe_layers == 2


@pytest.mark.parametrize(
    "shape",
    [
        {"n_experts": 8, "d_expert": 256},
        {
            "n_experts": 16,
            "experts_per_token": 4,
            "d_expert": 128,
            "n_shared_experts": 2,
            "shared_gate": True,
        },
    ],
)
def test_the_activation_estimate_is_near_what_autograd_keeps(shape: dict) -> None:
    config = preset("1m", 512, n_layers=4, **shape)
    decoder = Decoder(config)
    initialize(decoder, 0)
    kept: dict[int, int] = {}
    mine = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in mine:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = some_tokens(config, 2, 200)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = decoder(tokens, tokens, mode="loss").cross_entropy
    per_layer = counts.activation_bytes_per_layer(config, 200, 2, bytes_per_value=4, layer=3)
    assert sum(kept.values()) / 4 == pytest.approx(per_layer, rel=0.15)
    del loss


@pytest.mark.parametrize(
    ("change", "setting", "hint"),
    [
        ({"experts_per_token": 7}, "experts_per_token", "at most"),
        ({"moe_every": 3}, "moe_every", "n_layers=2"),
        ({"n_dense_layers": 2}, "n_dense_layers", "at most 1"),
        ({"n_dense_layers": 2, "n_layers": 3, "moe_every": 2}, "n_dense_layers", "at most 1"),
        ({"shared_gate": True}, "shared_gate", "n_shared_experts"),
        ({"d_shared": 8}, "d_shared", "n_shared_experts"),
        ({"d_expert": 0}, "d_expert", "at least 1"),
        ({"bias_rate": -1.0}, "bias_rate", "at least 0"),
        ({"router_score": "softmin"}, "router_score", "did you mean 'softmax'"),
        ({"n_experts": 0, "balance_loss": 0.1}, "balance_loss", "n_experts"),
    ],
)
def test_an_unsound_setting_of_experts_says_what_would_work(
    change: dict, setting: str, hint: str
) -> None:
    ((found, message),) = problems(tiny_moe(**change))
    assert found == setting
    assert hint in message
    with pytest.raises(ModelError, match=rf"model\.{setting}"):
        check(tiny_moe(**change))
