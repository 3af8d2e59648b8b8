"""Experts on several ranks compute what one process computes, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.experts import Experts
from motet.models.moe import MoE
from motet.parallel.runtime.expert_parallel import ExpertExchange, local_experts
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks

CONFIG = ModelConfig(
    vocabulary_size=8,
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    d_ffn=24,
    init_std=0.3,
    n_experts=8,
    experts_per_token=3,
    n_shared_experts=1,
    balance_loss=0.5,
    router_z_loss=0.1,
    bias_rate=0.01,
)
TOKENS = (7, 1, 12, 4)  # of each rank: they need not bring equally many


@dataclass(frozen=True)
class Case:
    ep: int
    etp: int
    lopsided: bool = False  # every token chooses the same experts: most ranks get no row
    recompute: bool = False
    capacity_factor: float = 0.0

    @property
    def world(self) -> int:
        return self.ep * self.etp


def whole_layer(case: Case) -> MoE:
    decoder = Decoder(replace(CONFIG, capacity_factor=case.capacity_factor))
    initialize(decoder, 0)
    (layer,) = (m for m in decoder.modules() if isinstance(m, MoE))
    if case.lopsided:
        with torch.no_grad():
            layer.router.weight.zero_()
    return layer


def local_layer(case: Case, mesh: DeviceMesh) -> MoE:
    """The layer of one rank: its experts, each with its part of the hidden channels."""
    layer = whole_layer(case)
    held = local_experts(CONFIG.n_experts, case.ep, mesh["ep"].get_local_rank())
    width = CONFIG.expert_width // case.etp
    first = mesh["etp"].get_local_rank() * width
    part = Experts(len(held), CONFIG.d_model, width)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = getattr(layer.experts, name)[held.start : held.stop]
            dim = 2 if name == "down_proj" else 1
            getattr(part, name).copy_(full.narrow(dim, first, width))
    layer.experts = part
    layer.exchange = ExpertExchange(
        CONFIG.n_experts,
        mesh.get_group("ep") if case.ep > 1 else None,
        mesh.get_group("etp") if case.etp > 1 else None,
    )
    return layer


def tokens_of(world: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(sum(TOKENS[:world]), CONFIG.d_model, generator=generator)
    return list(x_ND.split(TOKENS[:world]))


def train(layer: MoE, x_ND: Tensor, slopes_ND: Tensor, n_tokens: int, recompute: bool) -> Any:
    x_ND = x_ND.clone().requires_grad_()
    layer.begin_step(n_tokens)
    with torch.no_grad():
        scored = layer(x_ND[None])[0]
    if recompute:
        y_ND = checkpoint(layer, x_ND[None], use_reentrant=False)[0]
    else:
        y_ND = layer(x_ND[None])[0]
    (y_ND * slopes_ND).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    return {
        "y": y_ND.detach().numpy(),
        "scored": scored.numpy(),
        "x": x_ND.grad.numpy(),
        "gradients": gradients,
        "counts": layer.counts().numpy(),
        "sums": layer.sums().numpy(),
    }


def trained_apart(world: World, cases: list[Case]) -> Any:
    found = []
    for case in cases:
        grid = torch.arange(case.world).view(case.ep, case.etp)
        mesh = DeviceMesh("cpu", grid, mesh_dim_names=("ep", "etp"))
        layer = local_layer(case, mesh)
        x_ND, slopes = (tokens_of(case.world, seed)[world.rank] for seed in (0, 1))
        found.append(train(layer, x_ND, slopes, sum(TOKENS[: case.world]), case.recompute))
    return found


def trained_together(case: Case) -> Any:
    layer = whole_layer(case)
    x, slopes = (torch.cat(tokens_of(case.world, seed)) for seed in (0, 1))
    return train(layer, x, slopes, len(x), False)


def joined_gradient(name: str, case: Case, parts: list[Tensor]) -> Tensor:
    """What the whole layer's gradient would be: experts side by side, everything else added up."""
    if "experts." not in name:
        return torch.stack(parts).sum(0)
    dim = 2 if name.endswith("down_proj") else 1
    rows = [torch.cat(parts[row * case.etp : (row + 1) * case.etp], dim) for row in range(case.ep)]
    return torch.cat(rows)


def check_equal(case: Case, parts: list[Any]) -> None:
    wanted = trained_together(case)
    as_tensors = [
        {key: torch.as_tensor(part[key]) for key in ("y", "scored", "x", "counts", "sums")}
        for part in parts
    ]
    close = {"rtol": 1e-5, "atol": 2e-6}
    for key in ("y", "scored", "x"):
        found = torch.cat([part[key] for part in as_tensors])
        torch.testing.assert_close(found, torch.as_tensor(wanted[key]), **close)
    for key in ("counts", "sums"):
        found = torch.stack([part[key] for part in as_tensors]).sum(0)
        torch.testing.assert_close(found, torch.as_tensor(wanted[key]))
    for name, gradient in wanted["gradients"].items():
        pieces = [torch.as_tensor(part["gradients"][name]) for part in parts]
        found = joined_gradient(name, case, pieces)
        torch.testing.assert_close(found, torch.as_tensor(gradient), **close, msg=f"{case} {name}")


CASES = {
    1: [Case(1, 1)],
    2: [Case(2, 1), Case(1, 2), Case(2, 1, lopsided=True), Case(1, 2, recompute=True)],
    4: [
        Case(4, 1),
        Case(2, 2),
        Case(1, 4),
        Case(4, 1, lopsided=True),
        Case(2, 2, lopsided=True, recompute=True),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_experts_on_several_ranks_equal_one_process(world: int) -> None:
    found = run_ranks(world, trained_apart, CASES[world])
    for number, case in enumerate(CASES[world]):
        check_equal(case, [rank[number] for rank in found])


def sharded(world: World) -> Any:
    """Experts as DTensors over ep, sharded again by FSDP2 over edp: each pair of ep brings a
    quarter of the tokens.
    """
    case = Case(2, 1, capacity_factor=1.0)
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("edp", "ep"))
    layer = whole_layer(case)
    for name, weight in list(layer.experts.named_parameters()):
        over_ep = distribute_tensor(weight.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
        setattr(layer.experts, name, torch.nn.Parameter(over_ep))
    fully_shard(layer.experts, mesh=mesh["edp"])
    layer.exchange = ExpertExchange(CONFIG.n_experts, mesh.get_group("ep"))
    x_ND, slopes = (tokens_of(4, seed)[world.rank] for seed in (0, 1))
    layer.begin_step(sum(TOKENS))
    y_ND = layer(x_ND[None])[0]
    (y_ND * slopes).sum().backward()
    gradient = layer.experts.down_proj.grad
    assert isinstance(gradient, DTensor)
    assert gradient.placements == layer.experts.down_proj.placements
    return y_ND.detach().numpy(), gradient.full_tensor().numpy()


def test_experts_shard_over_ep_and_again_over_their_replicas() -> None:
    found = run_ranks(4, sharded)
    layer = whole_layer(Case(1, 1, capacity_factor=1.0))
    for rank, (x_ND, slopes) in enumerate(zip(tokens_of(4, 0), tokens_of(4, 1), strict=True)):
        y_ND = layer(x_ND[None])[0]  # capacity is per rank, so that each rank's tokens go alone
        (y_ND * slopes).sum().backward()
        torch.testing.assert_close(torch.as_tensor(found[rank][0]), y_ND, rtol=1e-5, atol=2e-6)
    mean = layer.experts.down_proj.grad / 2  # FSDP2 averages over edp
    for _, gradient in found:
        torch.testing.assert_close(torch.as_tensor(gradient), mean, rtol=1e-5, atol=2e-6)


def test_experts_are_held_in_order_and_only_in_equal_parts() -> None:
    assert [list(local_experts(6, 3, rank)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"ep=4 does not divide model\.n_experts=6.*1, 2, 3, 6"):
        local_experts(6, 4, 0)
