"""A model that follows a frozen one of other sizes: by hand, and on several ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.models.decoder import Decoder, initial_value
from motet.models.divergence import divergence
from motet.models.member import StepChoices, Term
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.dtensors import local, own_part
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, global_batch, share

STUDENT = replace(DENSE, d_ffn=32, n_layers=2)
TEACHER = replace(DENSE, d_model=64, n_heads=8, head_dim=8, n_kv_heads=4)
LABELS, DIVERGENCE = 0.25, 0.75


def teacher_weights() -> dict[str, Tensor]:
    names = Decoder(TEACHER).state_dict()
    return {n: initial_value(n, tuple(x.shape), TEACHER, 7) * 3 for n, x in names.items()}


def taught(layout: Layout, world: World) -> Engine:
    """An engine whose teacher was read, as of a checkpoint."""
    engine = build_engine(STUDENT, EngineOptions(taught_by=TEACHER), layout, world)
    assert not any(name.startswith("teacher") for name in engine.tensors())
    for name, value in engine.teacher_source().items():
        assert local(value).isnan().all()  # no loss is a number before it is read
        local(value).copy_(own_part(teacher_weights()[name.removeprefix("model.")], value))
    return engine


def train(world: World, layout: Layout) -> Any:
    engine = taught(layout, world)
    before = {name: local(value).clone() for name, value in engine.teacher_source().items()}
    curve = []
    for step in range(3):
        batches, _ = share(layout, world.rank, step, True)
        who = StepChoices(((Term(None, LABELS, kept=DIVERGENCE),),) * len(batches), (None,))
        result = engine.step(batches, 1e-3, lambda *all: True, lambda: False, who)
        curve.append((result.loss, result.grad_norm))
    for name, value in engine.teacher_source().items():
        assert torch.equal(local(value), before[name]), name
    return curve, {name: value.numpy() for name, value in engine.full_model().items()}


@cache
def one_process() -> Any:
    return run_ranks(1, train, Layout(micro_sequences=2))[0]


def test_the_gradient_is_that_of_labels_and_divergence_by_hand() -> None:
    student, teacher = Decoder(STUDENT), Decoder(TEACHER)
    student.load_state_dict(
        {n: initial_value(n, tuple(x.shape), STUDENT, 0) for n, x in student.state_dict().items()}
    )
    teacher.load_state_dict(teacher_weights())
    batch = global_batch(0, True)
    tokens, labels = (torch.from_numpy(x).long() for x in (batch.tokens_BT, batch.labels_BT))
    ids = torch.from_numpy(batch.document_ids_BT)
    counted = labels != -100
    logits_NV = student(tokens, document_ids_BT=ids)[counted]
    with torch.no_grad():
        followed_NV = teacher(tokens, document_ids_BT=ids)[counted]
    cross = torch.nn.functional.cross_entropy(logits_NV, labels[counted])
    p_NV = followed_NV.softmax(-1)
    apart = (p_NV * (followed_NV.log_softmax(-1) - logits_NV.log_softmax(-1))).sum(-1).mean()
    same = float(divergence(followed_NV, logits_NV.detach()).mean())
    assert apart.item() == pytest.approx(same, rel=1e-5)
    assert same > 0.1
    (LABELS * cross + DIVERGENCE * apart).backward()
    squares = sum(float(p.grad.square().sum()) for p in student.parameters() if p.grad is not None)
    (loss, grad_norm), *_ = one_process()[0]
    assert loss == pytest.approx(cross.item(), rel=1e-5)  # what is reported is that of the labels
    assert grad_norm == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(dp_shard=2, micro_sequences=2), id="fsdp-2"),
        pytest.param(Layout(tp=2, micro_sequences=2), id="tp-2"),
        pytest.param(Layout(cp=2, micro_sequences=2), id="cp-2"),
    ],
)
def test_several_ranks_follow_as_one(layout: Layout) -> None:
    curve, weights = run_ranks(2, train, layout)[0]
    expected, others = one_process()
    for found, wanted in zip(curve, expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)
    for name, value in weights.items():
        np.testing.assert_allclose(value, others[name], atol=2e-4, rtol=0)
