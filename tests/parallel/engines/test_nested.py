"""Slices in every axis train under every layout as in one process, each micro-batch another."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.family.base import Choice, Exit, Member, StepChoices, Term, member_problems
from motet.models.member import TeacherUpdate, names_in
from motet.parallel.engines.kept_teacher import KeptTeacher, state_of
from motet.parallel.engines.members import MemberTally
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.engines.refusals import refusals
from motet.parallel.engines.usage import Usage, step_within
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.dtensors import adamw, local
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import BATCH, Curve, Micro, assert_same, global_batch, part

DENSE = ModelConfig(
    vocabulary_size=96, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, d_ffn=64, head_dim=8
)
MIXED = replace(DENSE, n_experts=4, d_expert=32, balance_loss=0.01, bias_rate=0.001)
DRAWS = 4
WIDTHS = ["turns", "sandwich", "follow"]
SHORT = ["users", "kept", "ordered", "exits", "shared"]
"""What has state of its own, in two steps, of which the second is trained by a resumed engine too."""
LOSSES = [*WIDTHS, "depths", *SHORT]
OPTIONS = {"users": {"mask_update": True, "by_users": True}, "kept": {"teacher": True}}


def members(whole: ModelConfig) -> dict[str, Member]:
    """A narrow one of all layers, and one that is short as well."""
    fewer = {"n_experts": 2, "d_expert": 16} if whole.n_experts else {}
    half = replace(whole, d_model=16, n_heads=4, n_kv_heads=2, d_ffn=32, **fewer)
    widths = (32, 64, 64, 32) if not whole.n_experts else None
    wide = replace(whole, d_model=24, layer_ffn=widths)
    short = replace(half, n_layers=2)
    return {
        "half": Member("half", half, (0, 1, 2, 3), groups=2),
        "wide": Member("wide", wide, (0, 1, 2, 3), groups=2),
        "short": Member("short", short, (0, 3), groups=2),
    }


def choices(kind: str, whole: ModelConfig, step: int) -> list[Choice]:
    """Who trains on each quarter of a step."""
    known = members(whole)
    half, wide, short = known["half"], known["wide"], known["short"]
    if kind == "sandwich":
        return [(Term(None, 0.5), Term(half, 0.3), Term(wide, 0.2))] * DRAWS
    if kind == "follow":
        # Then a teacher that was not drawn runs forward alone.
        teacher = Term(None, 1.0 if step == 0 else 0.0)
        return [(teacher, Term((half, wide)[draw % 2], 0.2, 0.8)) for draw in range(DRAWS)]
    if kind == "kept":
        return [
            (Term(None, 0.5, kept=0.3), Term((half, wide)[draw % 2], 0.2, 0.3, kept=0.4))
            for draw in range(DRAWS)
        ]
    if kind == "exits":
        early = Member("early", replace(whole, n_layers=2), (0, 1))
        exits = ((Exit(early, 0.3),), (), (Exit(early, 0.25),), (Exit(early, 0.1),))
        skips = ((), (2,), (3,), (1, 3))[step:] + ((1,),) * step
        return [(Term(None, 0.7, skips=s, exits=e),) for s, e in zip(skips, exits, strict=True)]
    if kind == "shared":  # layers run several times, others in every step; experts count tokens
        times = () if whole.n_experts else ((2, 1, 3, 1), (1, 2, 1, 2))[step]
        return [(Term(None, times=times),)] * DRAWS
    if kind == "users":
        return [(Term((half, wide)[(draw == 1) != (step == 1)]),) for draw in range(DRAWS)]
    order: list[Choice] = [(Term(None),), (Term(half),), (Term(wide),), (Term(half),)]
    if kind == "depths":  # and a teacher that does not train there: one pass more
        rest = short if step == 1 else None  # in that step nobody runs the layers between
        silent = (Term(None, 0.0), Term(short if step == 1 else half, 0.2, 0.8))
        order = [(Term(rest),), (Term(short),), silent, (Term(short),)]
    return [order[(draw + step) % DRAWS] for draw in range(DRAWS)]


def train(
    world: World, layout: Layout, whole: ModelConfig, kind: str, alone: bool, zero_stage: int = 2
) -> Any:
    """Train as the feed shares a step: each rank has its part of every quarter, or with `alone`
    of one quarter after the other.
    """
    options = EngineOptions(z_loss=1e-3, zero_stage=zero_stage, **OPTIONS.get(kind, {}))
    engine = build_engine(whole, options, layout, world)
    curve, losses, orders = Curve(), [], {}
    micro, size = layout.micro_sequences, BATCH // DRAWS
    last = 1 if kind in SHORT else 2
    for step in range(last + 1):
        batch, chosen = global_batch(step, True), choices(kind, whole, step)
        starts = []
        for draw in range(1 if alone else DRAWS):
            offset, count = layout.dp_sequences(
                BATCH if alone else size, layout.dp_rank(world.rank)
            )
            first = draw * size + offset
            starts += list(range(first, first + count, micro))
        mine = tuple(chosen[start // size] for start in starts)
        names = names_in(tuple(term for choice in chosen for term in choice))
        batches = [part(batch, start, micro) for start in starts]
        if kind == "ordered" and step == last:
            orders = engine.order_channels(batches, groups=2)
        who = StepChoices(mine, names, tuple(chosen), TeacherUpdate(step, 0.9))
        again = kind in SHORT and step == last
        twin = resumed(engine, world, layout, whole, options) if again else None
        result = engine.step(batches, 1e-3, lambda *all: True, lambda: False, who)
        if twin is not None:
            other = twin.step(batches, 1e-3, lambda *all: True, lambda: False, who)
            assert other == result
            for name, value in twin.tensors().items():
                assert torch.equal(local(value), local(engine.tensors()[name])), name
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        losses.append([result.losses[name] for name in names] + [result.balance_loss])
    batch = global_batch(9, False)
    tokens, labels = batch.tokens_BT[:2].astype(np.int64), batch.labels_BT[:2]
    losses.append(engine.score(tokens, labels, members(whole)["short"])[0].ravel().tolist())
    engine.finish_scoring()
    state = {name: parts for name, parts in engine.export_state() if "weight" in parts}
    curve.weights = {name: parts["weight"].numpy() for name, parts in state.items()}
    means = {name: parts["exp_avg"].numpy() for name, parts in state.items()}
    return curve, losses, means, orders


def resumed(
    engine: Engine, world: World, layout: Layout, whole: ModelConfig, options: EngineOptions
) -> Engine:
    """Return another engine that goes on from what a checkpoint of one holds."""
    twin, held = build_engine(whole, options, layout, world), engine.tensors()
    for name, value in twin.tensors().items():
        local(value).copy_(local(held[name]))
    return twin


def all_losses(
    world: World,
    layout: Layout,
    whole: ModelConfig,
    alone: bool,
    kinds: list[str],
    zero_stage: int = 2,
) -> dict[str, Any]:
    return {kind: train(world, layout, whole, kind, alone, zero_stage) for kind in kinds}


LAYOUTS = [
    pytest.param(Layout(dp_shard=2, micro_sequences=2), DENSE, False, id="fsdp-2"),
    pytest.param(Layout(dp_shard=2, dp_replicate=2), DENSE, False, id="hsdp-4"),
    pytest.param(Layout(tp=2, micro_sequences=2), DENSE, False, id="tp-2"),
    pytest.param(Layout(tp=2, dp_shard=2, micro_sequences=2), DENSE, False, id="tp-fsdp-4"),
    pytest.param(Layout(cp=2, micro_sequences=2), DENSE, False, id="cp-2"),
    pytest.param(Layout(dp_shard=2, ep=2, micro_sequences=2), MIXED, False, id="ep-2"),
    pytest.param(
        Layout(dp_shard=2, micro_sequences=2, recompute="full"), DENSE, False, id="recompute"
    ),
    pytest.param(Layout(pp=2, micro_sequences=2), DENSE, False, id="pp-2"),
    pytest.param(Layout(pp=2, dp_shard=2, micro_sequences=2), DENSE, False, id="pp-fsdp-4"),
    pytest.param(
        Layout(pp=2, tp=2, schedule="gpipe", micro_sequences=2), DENSE, False, id="pp-tp-4"
    ),
    pytest.param(
        Layout(pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_sequences=4),
        DENSE,
        False,
        id="pp-interleaved",
    ),
    pytest.param(
        Layout(pp=2, virtual_stages=2, schedule="zbv_zero_bubble", micro_sequences=4),
        DENSE,
        False,
        id="pp-zero-bubble",
    ),
    pytest.param(Layout(dp_shard=2, micro_sequences=2), DENSE, True, id="by-replica-2"),
    pytest.param(Layout(dp_shard=4, micro_sequences=2), DENSE, True, id="by-replica-4"),
]


def kinds_for(layout: Layout, alone: bool) -> list[str]:
    """Beside other pipelines the dear ones need show only what is their own."""
    if layout.pp > 1 and (layout.tp > 1 or layout.virtual_stages > 1):
        return ["depths"]
    if layout.pp > 1:
        return [*WIDTHS, "depths", "users"]
    if alone:
        return [*WIDTHS, "users", "kept"] if layout.dp_shard == 2 else WIDTHS
    # Of tensor ranks the four that are sharded as well show all of it.
    small = layout.tp > 1 and layout.world_size == 2
    plain = layout.dp_replicate * layout.cp == 1 and layout.recompute == "none" and not small
    return LOSSES if plain else [*WIDTHS, "depths", "shared"]


@cache
def one_process(micro_sequences: int, whole: ModelConfig) -> dict[str, Any]:
    layout = Layout(micro_sequences=micro_sequences)
    found: dict[str, Any] = run_ranks(1, all_losses, layout, whole, False, LOSSES)[0]
    return found


@pytest.mark.parametrize(("layout", "whole", "alone"), LAYOUTS)
def test_slices_train_on_several_ranks_as_on_one(
    layout: Layout, whole: ModelConfig, alone: bool
) -> None:
    known = list(members(whole).values())
    assert member_problems(whole, known) == []
    assert layout.pp > 1 or refusals(layout, whole, known) == []
    expected, kinds = one_process(layout.micro_sequences, whole), kinds_for(layout, alone)
    found = run_ranks(layout.world_size, all_losses, layout, whole, alone, kinds)[0]
    assert_as_one_process(found, expected)


def assert_as_one_process(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind, (curve, losses, means, orders) in found.items():
        other, theirs, gradients, order = expected[kind]
        assert_same(curve, other)
        assert orders == order
        for mine, reference in zip(losses, theirs, strict=True):
            assert mine == pytest.approx(reference, rel=1e-5, abs=1e-6)
        largest = max(abs(gradient).max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            np.testing.assert_allclose(means[name], gradient, rtol=0, atol=1e-5 * largest)


def test_values_outside_all_slices_of_a_step_stay_and_others_move_as_ever() -> None:
    known, model = members(DENSE), Decoder(DENSE)
    initialize(model, 0)
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters, EngineOptions())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    usage = Usage(DENSE, parameters)
    tokens = torch.arange(24).view(2, 12)

    def train(*who: Member | None) -> None:
        usage.of(StepChoices(tuple((Term(member),) for member in who), ()))
        for member in who:
            model(tokens, tokens, mode="loss", member=member).objective.backward()

    train(None)
    optimizer.step()  # momentum everywhere
    optimizer.zero_grad()
    twin = copy.deepcopy((model, optimizer))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(known["half"], known["wide"])
    for parameter, other in zip(model.parameters(), twin[0].parameters(), strict=True):
        other.grad = parameter.grad.clone()
    step_within(optimizer, usage)
    twin[1].step()
    outside = 0
    for name, other in twin[0].named_parameters():
        used = usage.count(name)
        used = torch.as_tensor(used).expand(other.shape) > 0
        outside += int((~used).sum())
        torch.testing.assert_close(parameters[name][used], other[used], rtol=1e-6, atol=1e-8)
        assert torch.equal(parameters[name][~used], before[name][~used])
        assert used.all() or not torch.equal(other[~used], before[name][~used])
    assert outside > 10_000


def test_a_gradient_by_users_is_the_mean_over_the_shares_that_used_the_value() -> None:
    half, model = members(DENSE)["half"], Decoder(DENSE)
    initialize(model, 0)
    parameters = dict(model.named_parameters())
    tokens = torch.arange(24).view(2, 12)
    for member in (half, half, None, half):
        (model(tokens, tokens, mode="loss", member=member).objective / 4).backward()
    mean = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    shares = tuple((Term(member),) for member in (half, half, None, half))
    Usage(DENSE, parameters).of(StepChoices(shares, ())).by_users()
    down = "blocks.1.feed_forward.down_proj.weight"  # [stream 32, hidden 64 in 2 groups]
    ratio = torch.ones(32, 64) * 4
    ratio[:16, [*range(16), *range(32, 48)]] = 1
    torch.testing.assert_close(parameters[down].grad, mean[down] * ratio)
    norm = torch.ones(32).masked_fill(torch.arange(32) >= 16, 4)
    torch.testing.assert_close(parameters["norm.weight"].grad, mean["norm.weight"] * norm)


def test_a_kept_teacher_is_copied_first_and_changes_once_a_step() -> None:
    model, decoder = Decoder(DENSE), Decoder(DENSE)
    initialize(model, 0)
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))  # as memory without a value may be
    teacher = KeptTeacher(decoder, state_of(model))
    weight, own = model.norm.weight, decoder.norm.weight
    for student, update, expected in (
        (2.0, None, 1.0),  # what it was made from
        (2.0, TeacherUpdate(3, 0.5), 2.0),  # the first is a copy
        (6.0, TeacherUpdate(3, 0.5), 2.0),  # done already: a step that a checkpoint began again
        (6.0, TeacherUpdate(4, 0.75), 3.0),
        (7.0, TeacherUpdate(5, 0.0), 7.0),
    ):
        weight.data.fill_(student)
        teacher.follow(update)
        assert own.unique().tolist() == [expected]
    assert all(not parameter.requires_grad for parameter in decoder.parameters())


def test_the_loss_of_a_member_is_its_own() -> None:
    half = members(DENSE)["half"]
    choice = (Term(None, 0.5), Term(half, 0.5))
    labels = np.zeros((1, 4), dtype=np.int64)
    batch = Micro(labels.astype(np.int32), labels)
    tally = MemberTally(StepChoices((choice, choice), (None, "half")), [batch, batch], 4)
    for number, (large, small) in enumerate(((4.0, 8.0), (12.0, 16.0))):
        tally.add(number, choice[0], torch.tensor([large, 0.0]))
        tally.add(number, choice[1], torch.tensor([small, 0.0]))
    world = World(0, 1, 0, torch.device("cpu"), 1.0, None, None)  # type: ignore[arg-type]
    assert tally.losses(True, 1, world) == {None: 16.0 / 8, "half": 24.0 / 8}


ZERO = Layout(engine="deepspeed", dp_shard=2, micro_sequences=2)
FSDP = Layout(engine="accelerate", dp_shard=2, micro_sequences=2)
DDP = Layout(engine="accelerate", dp_replicate=2, micro_sequences=2)


@pytest.mark.parametrize(
    ("layout", "zero_stage", "kinds"),
    [
        pytest.param(ZERO, 1, ["turns"], id="zero-1"),
        pytest.param(ZERO, 2, ["follow"], id="zero-2"),
        pytest.param(ZERO, 3, ["turns", "follow"], id="zero-3"),
        pytest.param(FSDP, 2, ["depths", "follow"], id="accelerate-fsdp"),
        pytest.param(DDP, 2, ["depths", "follow"], id="accelerate-ddp"),
    ],
)
def test_slices_train_on_other_engines_as_in_one_process(
    layout: Layout, zero_stage: int, kinds: list[str]
) -> None:
    expected = one_process(2, DENSE)
    assert_as_one_process(
        run_ranks(2, all_losses, layout, DENSE, False, kinds, zero_stage)[0], expected
    )
