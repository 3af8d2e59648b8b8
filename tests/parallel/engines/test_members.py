"""The native engine trains members of a family: alone as their own plain model, on two ranks as on
one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch._dynamo.testing import CompileCounterWithBackend

from motet.models.family.base import Choice, Member, StepChoices, Term
from motet.models.layers import Block
from motet.models.slices import member_weights
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.engines.refusals import refusals
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, LENGTH, Curve, assert_same, global_batch, share

HALF = Member("half", replace(DENSE, n_layers=2), (0, 1))
ENDS = Member("ends", replace(DENSE, n_layers=3), (0, 2, 3))
NARROW = Member(
    "narrow",
    replace(DENSE, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ffn=32, n_layers=3),
    (0, 1, 3),
)
TURNS = "turns"
SANDWICH = "sandwich"
KINDS = [TURNS, SANDWICH, "steps", "late"]


def choices(kind: str, step: int, n: int) -> list[Choice]:
    """Who trains; the whole comes first in a step, so that its last layers are not in the last
    pass.
    """
    if kind == SANDWICH:
        return [(Term(None, 1 / 3), Term(ENDS, 1 / 3), Term(HALF, 1 / 3))] * n
    if kind == "steps":
        return [(Term((None, HALF, ENDS)[step % 3]),)] * n
    if kind == "late":
        return [(Term((None, ENDS)[i == n - 1]),) for i in range(n)]
    return [(Term((None, ENDS, HALF)[(i + step) % 3]),) for i in range(n)]


def train(world: World, layout: Layout, kind: str, readers: int) -> tuple[Curve, Any, Any]:
    engine = build_engine(DENSE, EngineOptions(z_loss=1e-3), layout, world)
    curve, losses = Curve(), []
    for step in range(4):
        batches, _ = share(layout, world.rank, step, True)
        per_reader = len(batches) if world.size > 1 else len(batches) // readers
        who = choices(kind, step, per_reader) * (len(batches) // per_reader)
        members = StepChoices(tuple(who), (None, "ends", "half"))
        result = engine.step(batches, 1e-3, lambda *all: True, lambda: False, members)
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        losses.append({str(name): loss for name, loss in result.losses.items()})
    batch = global_batch(9, False)
    tokens, labels = batch.tokens_BT.astype(np.int64), batch.labels_BT
    scores = engine.score(tokens[:4], labels[:4], HALF)
    engine.finish_scoring()
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve, losses, scores


def all_kinds(world: World, layout: Layout, readers: int) -> list[tuple[Curve, Any, Any]]:
    return [train(world, layout, kind, readers) for kind in KINDS]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, micro_sequences=2),
        Layout(dp_replicate=2, micro_sequences=2),
        Layout(tp=2, micro_sequences=4),
        Layout(cp=2, micro_sequences=4),
    ],
    ids=["fsdp", "replicas", "tp", "cp"],
)
def test_members_train_on_two_ranks_as_on_one(layout: Layout) -> None:
    # Alone, the micro-batches of one data-parallel rank come after those of the other.
    one = Layout(micro_sequences=layout.micro_sequences)
    alone = run_ranks(1, all_kinds, one, layout.dp_size)[0]
    found = run_ranks(2, all_kinds, layout, layout.dp_size)[0]
    for (curve, losses, scores), (expected, by_member, reference) in zip(found, alone, strict=True):
        assert_same(curve, expected)
        for mine, theirs in zip(losses, by_member, strict=True):
            assert mine.keys() == theirs.keys()
            for name, loss in theirs.items():
                assert mine[name] == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(scores[0], reference[0], atol=1e-4)


def compiled(world: World, layout: Layout, ahead: bool) -> tuple[Curve, list[int]]:
    """Train with blocks compiled; also return how many graphs there were before each step."""
    counter = CompileCounterWithBackend("aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        plain = Block.compile
        patch.setattr(Block, "compile", lambda block: plain(block, backend=counter))
        engine = build_engine(DENSE, EngineOptions(compile=True), layout, world)
    if ahead:
        batches, _ = share(layout, world.rank, 0, False)
        engine.compile_ahead(batches[0], [HALF, NARROW])
    curve, graphs = Curve(), []
    for step in range(3):
        graphs.append(counter.frame_count)
        batches, _ = share(layout, world.rank, step, False)
        who = tuple((Term((None, NARROW, HALF)[(i + step) % 3]),) for i in range(len(batches)))
        members = StepChoices(who, (None, "narrow", "half"))
        result = engine.step(batches, 1e-3, lambda *all: True, lambda: False, members)
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve, [*graphs, counter.frame_count]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro_sequences=4),
        Layout(dp_shard=2, micro_sequences=2),
        Layout(pp=2, micro_sequences=4),
    ],
    ids=["one", "fsdp", "pp"],
)
def test_members_compile_before_the_first_step_and_train_the_same(layout: Layout) -> None:
    plain, as_met = run_ranks(layout.world_size, compiled, layout, False)[0]
    found, graphs = run_ranks(layout.world_size, compiled, layout, True)[0]
    assert found.steps == plain.steps
    for name, value in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)
    assert graphs[0] == graphs[-1] == as_met[-1] > as_met[0] == 0


def member_alone(world: World) -> tuple[Any, Any, Any, Any]:
    """Train `half` inside the whole model, and the plain model that it is, from the same values."""
    layout = Layout(micro_sequences=4)
    whole = build_engine(DENSE, EngineOptions(), layout, world)
    plain = build_engine(HALF.config, EngineOptions(), layout, world)
    plain.load_model(member_weights(HALF, DENSE, whole.full_model()))
    losses = []
    for step in range(3):
        batches, _ = share(layout, 0, step, False)
        members = StepChoices(((Term(HALF),),) * len(batches), ("half",))
        one = whole.step(batches, 1e-3, lambda *all: True, lambda: False, members)
        other = plain.step(batches, 1e-3, lambda *all: True, lambda: False)
        losses.append((one.loss, other.loss))
    batch = global_batch(7, False)
    tokens, labels = batch.tokens_BT.astype(np.int64), batch.labels_BT
    scores = whole.score(tokens, labels, HALF)[0], plain.score(tokens, labels)[0]
    taken = {n: v.numpy() for n, v in member_weights(HALF, DENSE, whole.full_model()).items()}
    own = {n: v.numpy() for n, v in plain.full_model().items()}
    assert tokens.shape[1] == LENGTH
    return losses, scores, taken, own


def test_a_member_trains_as_the_plain_model_that_it_is() -> None:
    losses, scores, taken, own = run_ranks(1, member_alone)[0]
    assert all(one == other for one, other in losses)
    np.testing.assert_array_equal(*scores)
    assert taken.keys() == own.keys()
    for name, value in own.items():
        np.testing.assert_array_equal(taken[name], value, err_msg=name)


def test_layouts_that_cannot_train_members_say_why() -> None:
    assert not refusals(Layout(dp_shard=2, tp=2, cp=2), DENSE, [HALF])
    assert not refusals(Layout(pp=2), DENSE, [replace(HALF, layers=(0, 3))])
    (why,) = refusals(Layout(pp=2), DENSE, [HALF])
    assert "layout.pp=2: member 'half' leaves out 0, 2 layers of the 2 stages" in why
    assert "layers [0, 3] would fit" in why
    (why,) = refusals(Layout(pp=2, stage_layers=(1, 3)), replace(DENSE, n_layers=4), [ENDS])
    assert "leaves out 0, 1 layers" in why
    assert "layers [1, 3] would fit" in why
    (why,) = refusals(Layout(pp=4), DENSE, [HALF])
    assert "equally many: pp=1 would fit" in why
    (why,) = refusals(Layout(pp=2, stage_layers=(4, 0)), DENSE, [replace(HALF, layers=(0, 3))])
    assert "equally many: layout.stage_layers=[2, 2] would fit" in why
    zero = Layout(engine="deepspeed", dp_shard=2)
    assert not refusals(replace(zero, engine="accelerate"), DENSE, [HALF])
    assert not refusals(zero, DENSE, [Member("thin", replace(DENSE, d_ffn=32), (0, 1, 2, 3))])
    (why,) = refusals(zero, DENSE, [HALF])
    assert "layout.engine=deepspeed: member 'half' leaves out layers" in why
    assert "layout.shares" in refusals(Layout(dp_replicate=2, shares=(1, 2)), DENSE)[0]
    (why,) = refusals(Layout(tp=2), DENSE, [NARROW])
    assert "layout.tp=2 cuts a group of member 'narrow'" in why
    assert "use tp=1, or groups=2" in why
