from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import made, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.models import loss as loss_module
from motet.models.loss import label_scores, loss_sums


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(1, 3),
    length=st.integers(1, 9),
    width=st.integers(1, 8),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 30),
    masked=st.floats(0, 1),
    z_loss=st.sampled_from([0.0, 1e-2, 0.5]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_chunked_loss_equals_plain_cross_entropy_and_z_loss(
    sequences: int,
    length: int,
    width: int,
    vocabulary: int,
    chunk: int,
    masked: float,
    z_loss: float,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, length, width, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator) * scale
    labels = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    labels[torch.rand(sequences, length, generator=generator) < masked] = -100
    hidden.requires_grad_()
    head.requires_grad_()

    logits = (hidden @ head.t()).double().flatten(0, 1)
    flat = labels.flatten()
    plain = F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum")
    plain_z = z_loss * (logits.logsumexp(-1) ** 2)[flat != -100].sum()
    expected = torch.autograd.grad((plain + plain_z) / 7, (hidden, head))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ROWS", chunk)
        sums = loss_sums(hidden, head, labels, z_loss)
        gradients = torch.autograd.grad((sums.cross_entropy + sums.z_loss) / 7, (hidden, head))
    assert sums.n_labels == (flat != -100).sum()
    for found, wanted in zip(
        (sums.cross_entropy, sums.z_loss, *gradients), (plain, plain_z, *expected), strict=True
    ):
        torch.testing.assert_close(found, wanted.float(), rtol=2e-4, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 12),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_scores_equal_log_softmax_and_argmax(
    length: int, vocabulary: int, chunk: int, masked: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, length, 5, generator=generator)
    head = torch.randn(vocabulary, 5, generator=generator)
    labels = torch.randint(0, vocabulary, (2, length), generator=generator)
    labels[torch.rand(2, length, generator=generator) < masked] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ROWS", chunk)
        scores = label_scores(hidden, head, labels)
    logits = hidden @ head.t()
    there = labels != -100
    wanted = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(scores.logprob, wanted.masked_fill(~there, 0.0))
    assert torch.equal(scores.greedy, (logits.argmax(-1) == labels) | ~there)


def test_a_huge_logit_gives_a_finite_loss_and_gradient() -> None:
    hidden = torch.tensor([[[1000.0]]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    sums = loss_sums(hidden, head, torch.tensor([[1]]))
    sums.cross_entropy.backward()
    assert sums.cross_entropy == 2000.0
    assert head.grad is not None
    assert torch.isfinite(head.grad).all()


def test_losses_and_scores_never_hold_all_the_logits() -> None:
    config = tiny(vocabulary_size=5000)
    decoder, tokens = made(config), some_tokens(config, 4, 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        decoder(tokens, tokens, mode="loss").cross_entropy.backward()
        decoder(tokens, tokens, mode="score")
    assert largest <= loss_module.CHUNK_ROWS * config.vocabulary_size


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_autocast_stays_near_fp32(tied: bool) -> None:
    config = tiny(tied_embeddings=tied, init_std=0.05)
    decoder, tokens = made(config), some_tokens(config, 2, 40)

    def run(bf16: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            sums = decoder(tokens, tokens, mode="loss", z_loss=1e-4)
        loss = (sums.cross_entropy + sums.z_loss) / sums.n_labels
        loss.backward()
        return loss, [p.grad.clone() for p in decoder.parameters() if p.grad is not None]

    loss, gradients = run(False)
    rough_loss, rough_gradients = run(True)
    assert rough_loss.dtype == torch.float32
    assert rough_loss.item() == pytest.approx(loss.item(), rel=5e-3)
    assert not torch.equal(rough_loss, loss)
    for rough, exact in zip(rough_gradients, gradients, strict=True):
        assert rough.dtype == torch.float32
        assert F.cosine_similarity(rough.flatten(), exact.flatten(), 0) > 0.995
