from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import FAMILIES, made, some_tokens, tiny
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from motet.models import attention
from motet.models.attention import attend, document_places
from motet.models.decoder import Decoder, initial_value, initialize

# The first draws of seed 0; another number here means that old runs no longer start the same.
GOLDEN_EMBEDDING = [
    [-0.033619821071624756, 0.004859772976487875],
    [-0.023208608850836754, 0.009204165078699589],
]


def gradients_of(decoder: Decoder, tokens: torch.Tensor, **arguments: object) -> list[torch.Tensor]:
    decoder.zero_grad()
    sums = decoder(tokens[:, :-1], tokens[:, 1:], mode="loss", **arguments)
    (sums.cross_entropy / sums.n_labels).backward()
    return [p.grad.clone() for p in decoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_and_batch_size_change_no_score(family: str) -> None:
    config = tiny(family)
    decoder, tokens = made(config), some_tokens(config, 3, 30)
    alone = decoder(tokens[:1, :-1], tokens[:1, 1:], mode="score")
    padded = torch.zeros(3, 45, dtype=torch.int64)
    labels = torch.full((3, 45), -100)
    padded[:, :29], labels[:, :29] = tokens[:, :-1], tokens[:, 1:]
    together = decoder(padded, labels, mode="score")
    torch.testing.assert_close(together.logprob[:1, :29], alone.logprob, rtol=0, atol=2e-5)
    assert torch.equal(together.greedy[:1, :29], alone.greedy)
    assert (together.logprob[:, 29:] == 0).all()
    assert together.greedy[:, 29:].all()


def test_scores_agree_with_logits_and_need_no_gradient() -> None:
    config = tiny()
    decoder, tokens = made(config), some_tokens(config, 2, 12)
    scores = decoder(tokens[:, :-1], tokens[:, 1:], mode="score")
    logits = decoder(tokens[:, :-1])
    wanted = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprob, wanted)
    assert torch.equal(scores.greedy, logits.argmax(-1) == tokens[:, 1:])
    assert not scores.logprob.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_mask_equals_one_forward_pass_per_document(family: str) -> None:
    config = tiny(family)
    decoder, tokens = made(config), some_tokens(config, 2, 20)
    ids = torch.tensor([[5] * 7 + [9] * 1 + [5] * 12, [2] * 20], dtype=torch.int32)
    logits = decoder(tokens, document_ids_BT=ids)
    for row, start, stop in ((0, 0, 7), (0, 7, 8), (0, 8, 20), (1, 0, 20)):
        alone = decoder(tokens[row : row + 1, start:stop])
        torch.testing.assert_close(logits[row, start:stop], alone[0], rtol=1e-4, atol=1e-4)


def test_positions_restart_at_every_change_of_document() -> None:
    positions, mask = document_places(torch.tensor([[1, 1, 4, 1, 1]]))
    assert positions.tolist() == [[0, 1, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_no_token_sees_a_later_one() -> None:
    config = tiny()
    decoder, tokens = made(config), some_tokens(config, 1, 300)
    other = tokens.clone()
    other[0, 200:] = 0
    before, after = decoder(tokens), decoder(other)
    assert torch.equal(before[0, :200], after[0, :200])
    assert not torch.equal(before[0, 200:], after[0, 200:])


@pytest.mark.parametrize("length", [257, 300, 384])
@pytest.mark.parametrize("groups", [1, 2])
def test_tiled_attention_equals_sdpa_with_gradients(
    length: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, 2, 8, generator=generator, requires_grad=True)
    keys, values, slope = (
        torch.randn(2, length, heads, 8, generator=generator, requires_grad=True)
        for heads in (2 // groups, 2 // groups, 2)
    )
    assert attention._tiles_are_faster(query, None)
    tiled = attend(query, keys, values, None)
    found = torch.autograd.grad(tiled, (query, keys, values), slope)
    monkeypatch.setattr(attention, "TILED_LENGTHS", ())
    plain = attend(query, keys, values, None)
    wanted = torch.autograd.grad(plain, (query, keys, values), slope)
    torch.testing.assert_close(tiled, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("documents", [False, True])
def test_recomputation_gives_the_same_gradients(family: str, documents: bool) -> None:
    config = tiny(family)
    decoder, tokens = made(config), some_tokens(config, 2, 17)
    ids = (torch.arange(16) // 6).expand(2, 16) if documents else None
    plain = gradients_of(decoder, tokens, document_ids_BT=ids)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    decoder.blocks["0"].register_forward_pre_hook(count)
    decoder.recompute = "full"
    again = gradients_of(decoder, tokens, document_ids_BT=ids)
    assert calls == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_probe_between_steps_changes_no_bit_of_the_next_step() -> None:
    config = tiny()
    decoder, tokens = made(config), some_tokens(config, 2, 33)
    plain = gradients_of(decoder, tokens)
    fresh = made(config)
    long = some_tokens(config, 1, 3000)
    with torch.inference_mode():
        fresh(long, long, mode="score")
    probed = gradients_of(fresh, tokens)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = tiny()
    first = initial_value("blocks.0.attention.q_proj.weight", (32, 32), config, 1)
    torch.randn(7)
    wrapped = initial_value("blocks.0._orig_mod.attention.q_proj.weight", (32, 32), config, 1)
    assert torch.equal(first, wrapped)
    assert not torch.equal(
        first, initial_value("blocks.1.attention.q_proj.weight", (32, 32), config, 1)
    )
    assert not torch.equal(
        first, initial_value("blocks.0.attention.q_proj.weight", (32, 32), config, 2)
    )


def test_initial_values_never_change_between_releases() -> None:
    value = initial_value("embedding.weight", (2, 2), tiny(init_std=0.02), 0)
    wanted = torch.tensor(GOLDEN_EMBEDDING)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)


def test_initial_scales_are_as_documented() -> None:
    config = tiny(init_std=0.02, n_layers=8)
    large = initial_value("blocks.3.feed_forward.up_proj.weight", (400, 400), config, 0)
    small = initial_value("blocks.3.feed_forward.down_proj.weight", (400, 400), config, 0)
    assert large.std() == pytest.approx(0.02, rel=0.02)
    assert small.std() == pytest.approx(0.02 / 4, rel=0.02)
    for name in (
        "norm.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.q_norm.weight",
    ):
        assert (initial_value(name, (3,), config, 0) == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_decoder_initializes_to_the_same_model(family: str) -> None:
    config = tiny(family)
    plain = Decoder(config)
    initialize(plain, 3)
    with torch.device("meta"):
        empty = Decoder(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not list(empty.buffers())
    initialize(empty, 3)
    tokens = some_tokens(config, 1, 9)
    assert torch.equal(plain(tokens), empty(tokens))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_gradients() -> None:
    config = tiny("qwen3", n_layers=1)
    decoder, tokens = made(config), some_tokens(config, 2, 17)
    plain = gradients_of(decoder, tokens)
    decoder.blocks["0"].compile(fullgraph=True)
    compiled = gradients_of(decoder, tokens)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_is_one_graph_with_documents_autocast_and_recomputation(
    family: str, bf16: bool
) -> None:
    config = tiny(family, n_layers=2, init_std=0.05)
    decoder, tokens = made(config), some_tokens(config, 2, 17)
    ids = (torch.arange(16) // 6).expand(2, 16)
    decoder.recompute = "full"
    results = []
    for compiled in (False, True):
        if compiled:
            for block in decoder.blocks.values():
                block.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            results.append(gradients_of(decoder, tokens, document_ids_BT=ids))
    for a, b in zip(*results, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > (0.995 if bf16 else 0.99999)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_fully_sharded_gradients_are_those_of_the_plain_model(tied: bool, bf16: bool) -> None:
    config = tiny("qwen3", tied_embeddings=tied, init_std=0.05)
    tokens = some_tokens(config, 2, 300)
    plain = gradients_of(made(config), tokens)
    with torch.device("meta"):
        sharded = Decoder(config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None)
    for block in sharded.blocks.values():
        fully_shard(block, mp_policy=policy)
    fully_shard(sharded, mp_policy=policy)
    sharded.to_empty(device="cpu")
    source = made(config).state_dict()
    for name, parameter in sharded.named_parameters():
        with torch.no_grad():
            parameter.to_local().copy_(source[name])
    sharded.recompute = "full"
    for a, b in zip(plain, gradients_of(sharded, tokens), strict=True):
        found = b.full_tensor()
        assert found.dtype == torch.float32
        if bf16:
            assert F.cosine_similarity(a.flatten(), found.flatten(), 0) > 0.99
        else:
            torch.testing.assert_close(found, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["loss", "score", "other"])
def test_a_forward_without_labels_or_of_unknown_mode_says_so(mode: str) -> None:
    config = tiny()
    with pytest.raises(ValueError, match=f"mode='{mode}'"):
        made(config)(some_tokens(config, 1, 4), mode=mode)
