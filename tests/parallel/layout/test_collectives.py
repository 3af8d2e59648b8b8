"""What a step says and moves is what `step_collectives` promises: all of real steps is counted."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from motet.models.config import ModelConfig
from motet.models.loss import CHUNK_ROWS
from motet.parallel.engines.native import NativeEngine
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout import weights
from motet.parallel.layout.collectives import (
    Transfer,
    ValueBytes,
    step_collectives,
)
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.context_pieces import ring_bytes
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import Micro

LENGTH = 32
DENSE = ModelConfig(
    vocabulary_size=96,
    d_model=40,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ffn=52,
    qk_norm="head",
)
MOE = replace(
    DENSE,
    n_experts=4,
    experts_per_token=2,
    d_expert=12,
    n_shared_experts=1,
    shared_gate=True,
    balance_loss=0.01,
    n_dense_layers=1,
)
BOTH = replace(DENSE, norm_position="both", qkv_bias=True, o_bias=True, mlp_bias=True, window=9)
KINDS = {
    "all_gather_into_tensor": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
SILENT = {"recv_", "wait_tensor", "_wrap_tensor_autograd", "all_gather_into_tensor_out"}
"""The other half of a send; and no collective at all.

A functional gather calls its `out` form only in compiled code.
"""

Heard = Counter[tuple[Any, str, int]]
"""(ranks, or "control"), kind, bytes."""


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, list | tuple) else []


class Ear(TorchDispatchMode):
    """Hears every collective of this process: c10d's own, and the functional ones of DTensor."""

    def __init__(self, control: str) -> None:
        super().__init__()
        self.control = control
        self.heard: Heard = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does inside comes here by itself
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional") and name not in SILENT:
            group = self._group([*args, *(kwargs or {}).values()])
            ranks: Any = tuple(dist.get_process_group_ranks(group))
            if group.group_name == self.control:
                ranks = "control"
            kind = KINDS[name]
            if len(ranks) > 1:
                self.heard[ranks, kind, self._bytes(kind, func.namespace, args, len(ranks))] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _group(args: list[Any]) -> dist.ProcessGroup:
        # An operator gets its group as an opaque object or by name; only private functions turn
        # those into groups.
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                return dist.ProcessGroup.unbox(arg)
        return torch.distributed.distributed_c10d._resolve_process_group(args[-1])

    @staticmethod
    def _bytes(kind: str, namespace: str, args: tuple, ranks: int) -> int:
        """See `Transfer.bytes`. c10d's gathers take the output first, its scatters and exchanges
        the input second.
        """
        found = [t.numel() * t.element_size() for t in tensors(args)]
        if namespace != "c10d":
            return found[0] * (ranks if kind == "all_gather" else 1)
        if kind == "all_gather":
            return sum(found[:-1])
        return found[1] if kind in ("reduce_scatter", "all_to_all") else found[0]


@dataclass(frozen=True)
class Case:
    layout: Layout
    model: ModelConfig = DENSE
    micro_batches: int = 1
    documents: bool = False
    precision: str = "fp32"
    length: int = LENGTH
    keep_bytes: int = weights.KEPT_GATHERED_BYTES


def batches(case: Case, rank: int) -> list[Micro]:
    generator = np.random.default_rng(case.layout.dp_rank(rank))
    shape = (case.layout.micro_sequences, case.length)
    made = []
    for _ in range(case.micro_batches):
        tokens = generator.integers(0, 96, shape).astype(np.int32)
        ids = np.cumsum(generator.random(shape) < 0.2, axis=1).astype(np.int32)
        made.append(Micro(tokens, tokens.astype(np.int64), ids if case.documents else None))
    return made


def ranks_of_groups(engine: NativeEngine) -> dict[str, Any]:
    """Return the ranks of every group by its name in `Transfer`; a test may find two names with the
    same ranks.
    """
    meshes, found = engine.meshes, {"control": "control"}
    for mesh, names in (
        (meshes.dense, ("pp", "dp_replicate", "fsdp", "tp")),
        (meshes.experts, ("edp", "ep", "etp")),
    ):
        for name in names if mesh is not None else ():
            found[name] = tuple(dist.get_process_group_ranks(mesh[name].get_group()))
    if meshes.context is not None:
        found["cp"] = tuple(dist.get_process_group_ranks(meshes.context))
    return found


def listen(world: World, cases: dict[str, Case]) -> dict[str, tuple[Heard, dict[str, Any]]]:
    """Return what one rank says in its second step of every case: the first prepares things."""
    found = {}
    for name, case in cases.items():
        weights.KEPT_GATHERED_BYTES = case.keep_bytes
        options = EngineOptions(precision=case.precision, z_loss=1e-3)
        engine = build_engine(case.model, options, case.layout, world)
        for _ in range(2):
            with Ear(world.control.group_name) as ear:
                engine.step(batches(case, world.rank), 1e-3, lambda loss, norm: True, lambda: False)
        found[name] = ear.heard, ranks_of_groups(engine)
    return found


def promised(case: Case, stage: int) -> list[Transfer]:
    return step_collectives(
        case.model,
        case.layout,
        case.length,
        case.micro_batches,
        stage=stage,
        documents=case.documents,
        sizes=ValueBytes.of(case.precision, case.layout),
    )


def check(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every collective is promised, and every promise kept, to the byte; all cases have one number
    of ranks.
    """
    (world,) = {case.layout.world_size for case in cases.values()}
    results = run_ranks(world, listen, cases)
    for name, case in cases.items():
        monkeypatch.setattr(weights, "KEPT_GATHERED_BYTES", case.keep_bytes)
        for stage in range(case.layout.pp):
            promises = promised(case, stage)
            routed_bytes: Counter[str] = Counter()
            for rank in range(world):
                if case.layout.place(rank).pp == stage:
                    routed_bytes += kept(promises, *results[rank][name], f"{name}, rank {rank}")
            for group, total in routed_bytes.items():
                # What one rank sends another receives: over all ranks, balanced or not, the mean is
                # the promise.
                routed = [t for t in promises if t.group == group and t.routed]
                assert total == sum(t.total_bytes for t in routed) * case.layout.stage_ranks, name


def kept(promises: list[Transfer], heard: Heard, names: dict[str, Any], where: str) -> Counter[str]:
    """Compare one rank; return the bytes that routing decided, by group."""
    exact: Heard = Counter()
    for t in promises:
        if not t.routed:
            exact[names[t.group], t.kind, t.bytes] += t.count
    missing, rest = exact - heard, heard - exact
    assert not missing, f"{where}: not heard {missing}, instead {rest}"
    routed_bytes: Counter[str] = Counter()
    for group in ("ep", "etp"):
        routed = {k: n for k, n in rest.items() if k[:2] == (names.get(group), "all_to_all")}
        rest -= Counter(routed)
        count = sum(t.count for t in promises if t.group == group and t.routed)
        assert sum(routed.values()) == count, f"{where}: {group} carries rows {count} times"
        routed_bytes[group] += sum(size * n for (_, _, size), n in routed.items())
    assert not rest, f"{where}: not promised {rest}"
    return routed_bytes


CASES = {
    "fsdp 2": Case(Layout(dp_shard=2)),
    "fsdp 3, uneven rows": Case(Layout(dp_shard=3, micro_sequences=2), micro_batches=2),
    "fsdp 2, gathered again": Case(Layout(dp_shard=2), micro_batches=3, keep_bytes=0),
    "hsdp 2x2, gathered again": Case(
        Layout(dp_replicate=2, dp_shard=2), micro_batches=3, keep_bytes=0
    ),
    "fsdp 2 x tp 2, gathered again": Case(Layout(dp_shard=2, tp=2), micro_batches=2, keep_bytes=0),
    "hsdp 2x2": Case(Layout(dp_replicate=2, dp_shard=2), micro_batches=2),
    "replicas 2": Case(Layout(dp_replicate=2)),
    "tp 2": Case(Layout(tp=2, micro_sequences=2), micro_batches=2),
    "tp 2, loss in chunks": Case(Layout(tp=2, micro_sequences=3), length=2 * CHUNK_ROWS // 4),
    "tp 2, imported": Case(Layout(tp=2, dp_shard=2), BOTH, micro_batches=2),
    "tp 2, stream whole": Case(Layout(tp=2, sequence_parallel=False)),
    "tp 2, logits whole": Case(Layout(tp=2, vocabulary_parallel=False)),
    "tp 2, both whole": Case(Layout(tp=2, sequence_parallel=False, vocabulary_parallel=False)),
    "cp 2, documents": Case(Layout(cp=2, micro_sequences=2), micro_batches=2, documents=True),
    "cp 3": Case(Layout(cp=3), length=36),
    "pp 2": Case(Layout(pp=2, stage_layers=(2, 1)), micro_batches=3),
    "pp 3": Case(Layout(pp=3), micro_batches=3),
    "pp 2 x tp 2": Case(Layout(pp=2, tp=2), micro_batches=2),
    "pp 2 x fsdp 2, zbv": Case(
        Layout(pp=2, dp_shard=2, virtual_stages=2, schedule="zbv_zero_bubble"),
        replace(DENSE, n_layers=4),
        micro_batches=4,
    ),
    "fsdp 2 x tp 2": Case(Layout(dp_shard=2, tp=2), micro_batches=2),
    "cp 2 x tp 2, documents": Case(Layout(cp=2, tp=2), documents=True),
}
EXPERT_CASES = {
    "ep 2": Case(Layout(dp_shard=2, ep=2), MOE, micro_batches=2),
    "folded: tp 2 x fsdp 2, ep 4": Case(Layout(tp=2, dp_shard=2, ep=4), MOE),
    "folded, gathered again": Case(
        Layout(tp=2, dp_shard=2, ep=2), MOE, micro_batches=2, keep_bytes=0
    ),
    "folded: tp 2 x fsdp 2, ep 2": Case(Layout(tp=2, dp_shard=2, ep=2), MOE),
    "ep 2 x etp 2": Case(Layout(dp_shard=4, ep=2, etp=2), MOE),
    "pp 2 x etp 2": Case(Layout(pp=2, dp_shard=2, etp=2), MOE, micro_batches=2),
}
AGAIN = {
    f"{name}, {how}": replace(case, layout=replace(case.layout, recompute=how))
    for name, case in {**CASES, **EXPERT_CASES}.items()
    for how in ("selective", "full")
    if name
    in ("tp 2", "tp 2, stream whole", "cp 3", "fsdp 2, gathered again", "ep 2", "ep 2 x etp 2")
}
SHAPES = {
    f"{qk_norm} {norm_position}, {recompute}": Case(
        Layout(tp=2, recompute=recompute),
        replace(
            DENSE, qk_norm=qk_norm, norm_position=norm_position, tied_embeddings=True, qkv_bias=True
        ),
    )
    for qk_norm in ("none", "full")
    for norm_position in ("pre", "post")
    for recompute in ("none", "full")
}
BF16 = {
    f"{name}, bf16": replace({**CASES, **EXPERT_CASES}[name], precision="bf16")
    for name in (
        "fsdp 2, gathered again",
        "fsdp 2 x tp 2",
        "fsdp 2 x tp 2, gathered again",
        "tp 2, stream whole",
        "cp 3",
        "pp 2",
        "pp 2 x tp 2",
        "ep 2",
        "ep 2 x etp 2",
    )
}


def of_world(size: int, *many: dict[str, Case]) -> dict[str, Case]:
    return {
        n: case for cases in many for n, case in cases.items() if case.layout.world_size == size
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_step_says_what_was_promised(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of_world(ranks, CASES, EXPERT_CASES), monkeypatch)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_recomputation_says_again_what_was_promised(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(of_world(ranks, AGAIN, SHAPES), monkeypatch)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_low_precision_moves_fewer_bytes_as_promised(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(of_world(ranks, BF16), monkeypatch)


def compare_with_the_backend(world: World, cases: dict[str, Case]) -> dict[str, tuple[int, int]]:
    """Return how many collectives were heard, and how many gloo itself ran, in a step of every
    case.
    """
    found = {}
    for name, case in cases.items():
        engine = build_engine(case.model, EngineOptions(), case.layout, world)
        engine.step(batches(case, world.rank), 1e-3, lambda loss, norm: True, lambda: False)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            Ear(world.control.group_name) as ear,
        ):
            engine.step(batches(case, world.rank), 1e-3, lambda loss, norm: True, lambda: False)
        ran = Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))
        found[name] = sum(ear.heard.values()), sum(ran.values()) - ran["gloo:recv"]
    return found


def test_nothing_that_the_backend_runs_is_missed() -> None:
    names = ("cp 2 x tp 2, documents", "pp 2 x tp 2", "ep 2 x etp 2", "hsdp 2x2")
    cases = {name: {**CASES, **EXPERT_CASES}[name] for name in names}
    for rank in run_ranks(4, compare_with_the_backend, cases):
        for name, (heard, ran) in rank.items():
            assert heard == ran > 0, name


def test_numbers_repeated_here_are_those_of_the_modules_that_use_torch() -> None:
    assert inspect.signature(step_collectives).parameters["loss_rows"].default == CHUNK_ROWS
    case = Case(Layout(cp=4, micro_sequences=2), length=64)
    for precision in ("fp32", "bf16"):
        sizes = ValueBytes.of(precision, case.layout)
        promises = step_collectives(DENSE, case.layout, case.length, 1, sizes=sizes)
        ring = ring_bytes(2 * 16, DENSE.kv_width, sizes.activation, 4, False)
        moved = sum(t.total_bytes for t in promises if t.group == "cp")
        assert moved == DENSE.n_layers * sum(ring.values())


def test_a_thousand_gpus_are_priced_without_starting_one() -> None:
    """Llama 3 405B (arXiv:2407.21783, section 3.3.2): tp 8, pp 16, and the rest shards weights."""
    model = ModelConfig(128_256, 16384, 126, 128, 8, 53248)
    layout = Layout(dp_shard=128, tp=8, pp=16)
    sizes = ValueBytes.of("bf16", layout)
    found = step_collectives(model, layout, 8192, 16, stage=1, sizes=sizes)
    gathers = [t for t in found if (t.group, t.kind) == ("fsdp", "all_gather")]
    (block,) = gathers
    assert block.count == len(layout.layers_of_stages(model)[1])
    sends = [t for t in found if t.group == "pp"]
    assert [t.total_bytes for t in sends] == [2 * 16 * 8192 * 16384 * 2 // 8]
