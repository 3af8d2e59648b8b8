"""Document masks as blocks. T is 300: two whole blocks of 128 tokens and a shorter one.

On a CPU FlexAttention refuses gradients at its door, though the arithmetic behind it has a backward
pass; the check is taken off here.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from motet.models import flex
from motet.models.attention import attend, document_places
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize

LENGTH = 300
CONFIG = ModelConfig(
    vocabulary_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64, qk_norm="head"
)


class Compiler:
    """Compiles without generating code, and counts how often."""

    graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    torch.compiler.reset()
    made = Compiler()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(
        flex,
        "_compiled",
        functools.cache(lambda: torch.compile(torch_flex.flex_attention, backend=made)),
    )
    return made


def document_ids(seed: int, density: float = 0.02) -> Tensor:
    """[3, LENGTH]: one document, then several per sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(3, LENGTH, generator=generator) < density).cumsum(1)
    ids[0] = 7
    return ids


def loss_and_gradients(model: Decoder, seed: int) -> tuple[float, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, 64, (2, 3, LENGTH), generator=generator)
    model.zero_grad()
    loss = model(tokens, labels, document_ids(seed), mode="loss").cross_entropy
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_same(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> None:
    """Loss within 1e-5 relative; each gradient within 1e-5 of its largest entry."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        bound = 1e-5 * value.abs().max().item()
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("length", [256, 300, 1000])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.2])
def test_blocks_are_those_of_pytorchs_own_construction(length: int, density: float) -> None:
    ids = (torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < density).cumsum(1)
    positions, _ = document_places(ids)
    first = torch.arange(length) - positions

    def rule(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (ids[b, q] == ids[b, kv]) & (q >= kv)

    made = flex.block_mask(first)
    expected = create_block_mask(rule, 3, None, length, length, device="cpu")
    assert made.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            found = getattr(made, f"{name}_{part}")
            assert torch.equal(found, getattr(expected, f"{name}_{part}")), f"{name}_{part}"


@pytest.mark.parametrize("documents", [True, False])
def test_blocks_hold_windows_and_caps_of_scores(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, documents: bool
) -> None:
    """A window of 150 tokens in the second layer, scores capped in both."""
    parts = {"window": 150, "layer_windows": (False, True), "attention_softcap": 1.5}
    model = Decoder(replace(CONFIG, **parts, init_std=0.2))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, 64, (2, 3, LENGTH), generator=generator)
    ids = document_ids(3) if documents else None
    found = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(flex, "DEVICES", devices)
        model.zero_grad()
        loss = model(tokens, labels, ids, mode="loss").cross_entropy
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    assert_same(found[1], found[0])
    assert compiler.graphs >= 1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_give_the_loss_and_gradients_of_the_bool_mask(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    model = Decoder(CONFIG)
    initialize(model, 0)
    expected = loss_and_gradients(model, 5)
    monkeypatch.setattr(flex, "DEVICES", {"cpu"})
    model.recompute = recompute
    assert_same(loss_and_gradients(model, 5), expected)
    assert compiler.graphs == 1


def test_compiled_blocks_take_new_documents_without_compiling_again(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Decoder(CONFIG)
    initialize(model, 0)
    expected = [loss_and_gradients(model, seed) for seed in (1, 2, 3)]
    monkeypatch.setattr(flex, "DEVICES", {"cpu"})
    for block in model.blocks.values():
        block.compile(backend=compiler, fullgraph=True)
    for seed in (1, 2, 3):
        assert_same(loss_and_gradients(model, seed), expected[seed - 1])
    assert compiler.graphs == 1  # both blocks, all documents


def test_the_generated_kernel_gives_what_the_bool_mask_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(3, LENGTH, heads, 16, generator=generator) for heads in (4, 2, 2)
    )
    positions, mask = document_places(document_ids(2))
    blocks = flex.block_mask(torch.arange(LENGTH) - positions)
    assert int(blocks.full_kv_num_blocks.sum()) > 0  # type: ignore[union-attr]
    expected = attend(query, keys, values, mask)
    torch.testing.assert_close(attend(query, keys, values, blocks), expected, rtol=1e-5, atol=1e-5)


def test_short_sequences_narrow_heads_and_cpus_keep_the_bool_mask() -> None:
    assert flex.takes(torch.device("cuda"), 4096, 128)
    assert not flex.takes(torch.device("cuda"), 4096, 8)
    assert not flex.takes(torch.device("cuda"), 255, 128)
    assert not flex.takes(torch.device("cpu"), 4096, 128)
    _, mask = document_places(document_ids(0), CONFIG.head_width)
    assert isinstance(mask, Tensor)
    assert isinstance(flex.block_mask(torch.zeros(1, 256, dtype=torch.int64)), BlockMask)
