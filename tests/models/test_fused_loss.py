"""The compiled middle of the loss against the plain one."""

import functools

import pytest
import torch
from torch import Tensor

from motet.models import loss as loss_module
from motet.models.loss import VocabularyShard, loss_sums

WIDTH, VOCABULARY, ROWS = 16, 50, 24


def gradients(
    fused: bool, labels: Tensor, dtype: torch.dtype, softcap: float = 0.0
) -> list[Tensor]:
    """Return cross-entropy, z-loss and the gradients of hidden states and head."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        sums = loss_sums(hidden, head, labels, 1e-2, fused=fused, softcap=softcap)
    grads = torch.autograd.grad(sums.cross_entropy / 7, (hidden, head))
    return [sums.cross_entropy.detach(), sums.z_loss, *(g.float() for g in grads)]


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, VOCABULARY, (2, ROWS), generator=torch.Generator().manual_seed(1))
    labels[0, :5] = labels[1, 9] = -100
    return labels


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_plain_loss_have_the_same_sums_and_gradients(
    monkeypatch: pytest.MonkeyPatch, labels: Tensor, dtype: torch.dtype, softcap: float
) -> None:
    compiled = torch.compile(loss_module._slopes, backend="aot_eager")
    monkeypatch.setattr(loss_module, "_compiled_slopes", functools.cache(lambda: compiled))
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 20)  # the last chunk is shorter
    plain, fused = (gradients(fused, labels, dtype, softcap) for fused in (False, True))
    for found, expected in zip(fused, plain, strict=True):
        bound = (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_a_device_takes_as_many_rows_at_once_as_its_share_of_memory_holds() -> None:
    def rows(vocabulary: int, device: str, shard: VocabularyShard | None = None) -> int:
        return loss_module.rows_at_once(torch.empty(vocabulary, 1, device=device), shard)

    assert rows(50_304, "cpu") == loss_module.CHUNK_ROWS
    assert rows(50_304, "meta") == 2048
    assert 2048 * 50_304 * 4 <= loss_module.DEVICE_CHUNK_BYTES < 4096 * 50_304 * 4
    assert rows(1_000_000, "meta") == loss_module.CHUNK_ROWS


def test_processes_with_unequal_shards_take_equally_many_rows_at_once() -> None:
    shard = VocabularyShard(0, lambda x: x, lambda x: x)
    unequal = (torch.empty(n, 1, device="meta") for n in (65_537, 65_536))
    assert {loss_module.rows_at_once(w, shard) for w in unequal} == {loss_module.CHUNK_ROWS}
