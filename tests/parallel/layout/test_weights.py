"""What a rank holds is what the degrees of its layout promise, measured from tensors; logits split
over ranks are whole on none.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from motet.models.config import ModelConfig
from motet.models.counts import parameters
from motet.models.decoder import Decoder
from motet.parallel.engines.native import NativeEngine
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout import weights as weights_module
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import gathers_again, held_bytes, kept_bytes, weights
from motet.parallel.runtime.dtensors import local
from motet.parallel.runtime.mesh import World
from tests.parallel.layout.test_collectives import (
    CASES,
    DENSE,
    EXPERT_CASES,
    MOE,
    Case,
    batches,
    of_world,
)
from tests.parallel.ranks import run_ranks
from tests.parallel.training import assert_same, train

ALONE = {
    "uneven pp 2": Case(Layout(pp=2, stage_layers=(1, 2)), micro_batches=2),
    "pp 2 x fsdp 2 x tp 1": Case(Layout(pp=2, dp_shard=2), micro_batches=2),
    "replicas 2 x ep 2": Case(Layout(dp_replicate=2, dp_shard=2, ep=2), MOE),
    "cp 2 x fsdp 2, ep 4": Case(Layout(dp_shard=2, cp=2, ep=4), MOE),
}


def size(values: Any) -> int:
    return sum(local(v).numel() * local(v).element_size() for v in values)


def measure(world: World, cases: dict[str, Case]) -> dict[str, Any]:
    found = {}
    for name, case in cases.items():
        engine = build_engine(case.model, EngineOptions(), case.layout, world)
        assert isinstance(engine, NativeEngine)
        seen: dict[str, int] = {}

        def judge(
            loss: float, norm: float, engine: NativeEngine = engine, seen: dict[str, int] = seen
        ) -> bool:
            weights = engine.parameters.values()
            seen["parameters"] = size(weights)
            seen["gradients"] = size(p.grad for p in weights if p.grad is not None)
            seen["optimizer"] = size(v for p in weights for v in engine.optimizer.state[p].values())
            return True

        engine.step(batches(case, world.rank), 1e-3, judge, lambda: False)
        found[name] = seen, {name: local(p).numel() for name, p in engine.parameters.items()}
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_holds_what_the_degrees_promise(ranks: int) -> None:
    cases = of_world(ranks, CASES, EXPERT_CASES, ALONE)
    results = run_ranks(ranks, measure, cases)
    for name, case in cases.items():
        layout = case.layout
        for rank, result in enumerate(results):
            seen, numbers = result[name]
            stage, position = divmod(rank, layout.stage_ranks)
            assert seen == held_bytes(case.model, layout, stage, position), f"{name}, rank {rank}"
            assert list(numbers) == [w.name for w in weights(case.model, layout, stage)]


@pytest.mark.parametrize(
    "model",
    [
        DENSE,
        MOE,
        replace(DENSE, qk_norm="full", tied_embeddings=True, qkv_bias=True),
        replace(MOE, moe_every=2, n_dense_layers=0, shared_gate=False, n_shared_experts=0),
    ],
    ids=["dense", "experts", "tied, biased", "some experts"],
)
def test_the_list_of_weights_is_the_decoders_own(model: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(model)
    found = weights(model, Layout())
    assert [(w.name, w.shape) for w in found] == [
        (name, tuple(p.shape)) for name, p in decoder.named_parameters()
    ]
    assert sum(w.numel for w in found) == parameters(model)
    stages = Layout(pp=2, virtual_stages=1)
    if not model.tied_embeddings:
        split = [w.name for stage in range(2) for w in weights(model, stages, stage)]
        assert sorted(split) == sorted(w.name for w in found)


def test_twice_the_ranks_hold_half_of_a_large_model() -> None:
    """4,096 GPUs on a laptop: bytes per rank fall with the degrees that divide weights, and with no
    other.
    """
    model = ModelConfig(128_000, 8192, 64, 64, 8, 28672)
    base = Layout(dp_shard=64, tp=8)
    per_rank = held_bytes(model, base)["parameters"]
    assert per_rank == pytest.approx(parameters(model) * 4 / (64 * 8), rel=1e-3)
    for double in (replace(base, dp_shard=128), replace(base, cp=2)):
        assert held_bytes(model, double)["parameters"] == pytest.approx(per_rank / 2, rel=1e-3)
    assert held_bytes(model, replace(base, dp_replicate=8))["parameters"] == per_rank
    piped = replace(base, pp=4)
    assert sum(held_bytes(model, piped, s)["parameters"] for s in range(4)) == per_rank


# --- between micro-batches


def live_bytes() -> int:
    """Return the bytes of all tensors of this process, of gradients known to weights alone too."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, torch.nn.Parameter, DTensor) or thing.is_meta:
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and not isinstance(tensor, torch._subclasses.FakeTensor):
                storage = local(tensor).untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def between(world: World, cases: dict[str, Case]) -> dict[str, list[int]]:
    """Return the bytes that have come by the end of each micro-batch."""
    found = {}
    for name, case in cases.items():
        weights_module.KEPT_GATHERED_BYTES = case.keep_bytes
        engine = build_engine(
            case.model, EngineOptions(precision=case.precision), case.layout, world
        )
        assert isinstance(engine, NativeEngine)
        work, one = engine._forward_backward, engine._one_micro_batch
        seen: list[int] = []

        def start(*args: Any, seen: list[int] = seen, work: Any = work) -> Tensor:
            seen.append(live_bytes())
            return work(*args)

        def after(*args: Any, seen: list[int] = seen, one: Any = one) -> Tensor:
            sums = one(*args)
            seen.append(live_bytes())
            return sums

        engine.step(batches(case, world.rank), 1e-3, lambda loss, norm: True, lambda: False)
        engine._forward_backward, engine._one_micro_batch = start, after  # type: ignore[method-assign]
        engine.step(batches(case, world.rank), 1e-3, lambda loss, norm: True, lambda: False)
        found[name] = [x - seen[0] for x in seen[1:]]
    return found


BETWEEN = {
    f"{name}, {precision}": replace(
        {**CASES, **EXPERT_CASES}[name], micro_batches=2, precision=precision
    )
    for name, precision in (
        ("fsdp 2", "fp32"),
        ("fsdp 2, gathered again", "fp32"),
        ("replicas 2", "bf16"),
        ("tp 2", "fp32"),
        ("ep 2", "bf16"),
    )
}
SUMS_BYTES = 64
"""The losses so far."""


def test_between_micro_batches_a_rank_keeps_what_was_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = run_ranks(2, between, BETWEEN)
    for name, case in BETWEEN.items():
        monkeypatch.setattr(weights_module, "KEPT_GATHERED_BYTES", case.keep_bytes)
        width = 2 if case.precision == "bf16" else 4
        promised = sum(kept_bytes(case.model, case.layout, 2, weight_bytes=width).values())
        gradients = held_bytes(case.model, case.layout)["gradients"]
        between_two, at_the_end = results[0][name]
        assert gradients <= at_the_end <= gradients + SUMS_BYTES, name
        if gathers_again(case.model, case.layout):
            assert promised == 0
            units = [w.unit for w in weights(case.model, case.layout)]
            largest = max(
                sum(w.numel for w in weights(case.model, case.layout) if w.unit == unit)
                for unit in units
            )
            # What FSDP2 sent last waits for the next: the whole gradient of one unit.
            assert gradients <= between_two <= gradients + largest * 4 + SUMS_BYTES, name
        else:
            assert promised <= between_two <= promised + SUMS_BYTES, name


def small_limit(world: World, layout: Layout) -> Any:
    weights_module.KEPT_GATHERED_BYTES = 0
    return train(world, layout, 3)


def test_weights_gathered_again_train_what_one_process_trains() -> None:
    expected = run_ranks(1, train, Layout(micro_sequences=8), 3)[0]
    for layout in (
        Layout(dp_replicate=2, dp_shard=2, micro_sequences=2),
        Layout(tp=2, dp_shard=2, micro_sequences=2),
    ):
        assert_same(run_ranks(4, small_limit, layout)[0], expected)


# --- logits


class Eye(TorchDispatchMode):
    """Sees every tensor that an operator makes; remembers the largest of a last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.most_rows = 0
        self.most_values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come here by themselves
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if type(tensor) is Tensor and not tensor.is_meta and tensor.ndim > 1:
                rows = tensor.numel() // max(tensor.shape[-1], 1)
                self.most_values = max(self.most_values, tensor.numel())
                if tensor.shape[-1] == self.width:
                    self.most_rows = max(self.most_rows, rows)
        return result


VOCABULARY = 1536  # no other size of the model, and no length of a rotary table
LOGIT_LAYOUTS = {
    2: {
        "tp 2": Layout(tp=2, micro_sequences=2),
        "tp 2, stream whole": Layout(tp=2, sequence_parallel=False, micro_sequences=2),
        "tp 2, logits whole": Layout(tp=2, vocabulary_parallel=False, micro_sequences=2),
    },
    4: {
        "tp 4": Layout(tp=4, micro_sequences=2),
        "fsdp 2 x tp 2": Layout(dp_shard=2, tp=2, micro_sequences=2),
        "pp 2 x tp 2": Layout(pp=2, tp=2, micro_sequences=2),
    },
}


def look(world: World, layouts: dict[str, Layout]) -> dict[str, tuple[int, int, int]]:
    """Return the most rows of whole logits, of this rank's part of them, and the largest tensor, in
    a step and a score.
    """
    found = {}
    for name, layout in layouts.items():
        model = replace(DENSE, vocabulary_size=VOCABULARY, n_kv_heads=4)
        engine = build_engine(model, EngineOptions(z_loss=1e-3), layout, world)
        case = Case(layout, model, micro_batches=2)
        rows = batches(case, world.rank)
        with Eye(VOCABULARY) as whole, Eye(VOCABULARY // layout.tp) as part:
            engine.step(rows, 1e-3, lambda loss, norm: True, lambda: False)
            engine.score(rows[0].tokens_BT.astype("int64"), rows[0].labels_BT)
        found[name] = whole.most_rows, part.most_rows, whole.most_values
    return found


@pytest.mark.parametrize("ranks", LOGIT_LAYOUTS)
def test_no_rank_ever_has_whole_logits_of_a_vocabulary_split_over_ranks(ranks: int) -> None:
    layouts = LOGIT_LAYOUTS[ranks]
    tokens = 2 * batches(Case(Layout()), 0)[0].tokens_BT.shape[1]
    for rank, seen in enumerate(run_ranks(ranks, look, layouts)):
        for name, (whole, part, largest) in seen.items():
            layout = layouts[name]
            where = f"{name}, rank {rank}"
            if not layout.vocabulary_parallel:
                assert whole == tokens, f"{where}: the same watch sees logits that are whole"
                continue
            assert whole == 0, where
            assert largest < tokens * VOCABULARY, where
            last_stage = layout.place(rank).pp == layout.pp - 1
            assert part == (tokens if last_stage else 0), f"{where}: its own part it has"
