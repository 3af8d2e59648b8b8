"""Ring attention: what each rank computes, what it sends, and that the ranks together equal one
process.

B batch, T tokens, H heads, G key-value heads, K channels per head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from motet.models.attention import attend
from motet.parallel.runtime import context_parallel as ring
from motet.parallel.runtime.context_parallel import RingAttention
from motet.parallel.runtime.context_pieces import (
    causal_piece,
    chunk_order,
    context_join,
    context_slice,
    document_pieces,
    ring_bytes,
)
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 4
    width: int = 16
    length: int = 64
    batch: int = 2
    dtype: torch.dtype = torch.float32
    documents: tuple[tuple[int, ...], ...] = ()  # lengths, of each row
    kernel: str = ""  # "" = the one that would be chosen
    relative_error: float = 1e-6


PACKED = ((9, 1, 30, 2, 22), (40, 24))  # chunks are 16 tokens with 2 ranks and 8 with 4
CASES = {
    "plain": Case(),
    "grouped heads": Case(heads=6, kv_heads=2),
    "odd sizes": Case(heads=3, kv_heads=1, width=5, length=40, batch=3),
    "documents": Case(documents=PACKED),  # grouped in "tiles, documents" and "double"
    "documents of one token": Case(documents=((1,) * 64, (63, 1))),
    "all rows alike": Case(documents=((16, 20, 28),) * 2),
    "tiles": Case(heads=4, kv_heads=2, length=640, kernel="tiles"),
    "tiles, documents": Case(heads=4, kv_heads=2, width=7, documents=PACKED, kernel="tiles"),
    "double": Case(
        heads=4, kv_heads=2, width=9, documents=PACKED, dtype=torch.float64, relative_error=1e-14
    ),
}
COUNTED = {name: CASES[name] for name in ("plain", "documents")} | {
    "bfloat16": Case(dtype=torch.bfloat16)
}


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads, "slope": case.heads}
    return {
        name: torch.randn(
            case.batch, case.length, heads, case.width, generator=generator, dtype=torch.float64
        ).to(case.dtype)
        for name, heads in shape.items()
    }


def segments(case: Case) -> Tensor | None:
    """Return int64 [B, T] that differ between documents and never fall; some are left out."""
    if not case.documents:
        return None
    rows = (torch.tensor(row) for row in case.documents)
    return torch.stack([torch.arange(len(x)).mul(3).repeat_interleave(x) for x in rows])


def may_look(case: Case) -> Tensor:
    """Return bool [B, T, T]."""
    causal_TT = torch.ones(case.length, case.length, dtype=torch.bool).tril()
    ids_BT = segments(case)
    if ids_BT is None:
        return causal_TT.expand(case.batch, -1, -1)
    return causal_TT & (ids_BT[:, :, None] == ids_BT[:, None])


@cache
def one_process(case: Case) -> dict[str, Tensor]:
    """Return the output and the gradients by the definition, in fp64."""
    q, k, v, slope = (x.double().requires_grad_() for x in inputs(case).values())
    groups = case.heads // case.kv_heads
    k_BTHK, v_BTHK = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores_BHTT = torch.einsum("bqhk,bshk->bhqs", q, k_BTHK) * case.width**-0.5
    scores_BHTT = scores_BHTT.masked_fill(~may_look(case)[:, None], float("-inf"))
    out = torch.einsum("bhqs,bshk->bqhk", scores_BHTT.softmax(-1), v_BTHK)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), slope)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def counted(counts: Counter[str], phase: list[str]) -> Callable[[], None]:
    """Count the bytes that leave and the (query, key) pairs computed, by phase; return what ends
    it.
    """
    transfer, gather, kernels = dist.batch_isend_irecv, dist.all_gather, dict(ring.KERNELS)

    def batch(ops: list[dist.P2POp]) -> Any:
        sent = [x.tensor for x in ops if x.op is dist.isend]
        counts[f"{phase[0]} bytes"] += sum(x.numel() * x.element_size() for x in sent)
        return transfer(ops)

    def gathered(output: list[Tensor], sent: Tensor, group: dist.ProcessGroup) -> Any:
        others = group.size() - 1
        counts[f"{phase[0]} bytes"] += others * sent.numel() * sent.element_size()
        return gather(output, sent, group)

    def pairs(q: Tensor, k: Tensor, causal: bool) -> int:
        rows, columns = q.shape[2], k.shape[2]
        assert rows == columns or not causal
        return q.shape[0] * (rows * (rows + 1) // 2 if causal else rows * columns)

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        counts["forward pairs"] += pairs(q, k, causal)
        return kernels["cpu"].forward(q, k, v, causal)

    def backward(slope: Tensor, *saved: Tensor, causal: bool) -> Any:
        counts["backward pairs"] += pairs(saved[0], saved[1], causal)
        return kernels["cpu"].backward(slope, *saved, causal=causal)

    def end() -> None:
        dist.batch_isend_irecv, dist.all_gather = transfer, gather
        ring.KERNELS.update(kernels)

    dist.batch_isend_irecv, dist.all_gather = batch, gathered
    ring.KERNELS["cpu"] = ring.Kernel(forward, backward)
    return end


def share(case: Case, group: dist.ProcessGroup) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return this rank's q, k, v (leaves), the gradient of its output, and its segments."""
    rank, cp = group.rank(), group.size()
    q, k, v, slope = (context_slice(x, rank, cp) for x in inputs(case).values())
    ids_BT = segments(case)
    ids_BT = None if ids_BT is None else context_slice(ids_BT, rank, cp)
    return [x.requires_grad_() for x in (q, k, v)], slope, ids_BT


def result(out: Tensor, leaves: list[Tensor]) -> Arrays:
    gradients = [x.grad for x in leaves if x.grad is not None]
    tensors = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))
    return {name: x.double().numpy() for name, x in tensors.items()}


def run_case(case: Case, group: dist.ProcessGroup) -> Arrays:
    leaves, slope, ids_BT = share(case, group)
    chosen = ring.choose_kernel
    if case.kernel:
        ring.choose_kernel = lambda *_: case.kernel
    out = RingAttention(group)(*leaves, ids_BT)
    out.backward(slope)
    ring.choose_kernel = chosen
    assert out.dtype == case.dtype
    return result(out, leaves)


def run_counted(case: Case, group: dist.ProcessGroup) -> Counter[str]:
    counts: Counter[str] = Counter()
    phase = ["forward"]
    end = counted(counts, phase)
    leaves, slope, ids_BT = share(case, group)
    out = RingAttention(group)(*leaves, ids_BT)
    phase[0] = "backward"
    out.backward(slope)
    end()
    return counts


def run_recomputed(case: Case, group: dist.ProcessGroup) -> Arrays:
    """Two layers that share a plan, the first recomputed in backward."""
    leaves, slope, ids_BT = share(case, group)
    attention = RingAttention(group)
    plan = attention.plan(ids_BT, slope.shape[1])
    first = checkpoint(attention, *leaves, plan, use_reentrant=False)
    assert isinstance(first, Tensor)
    out = attention(first, leaves[1], leaves[2], plan)
    out.backward(slope)
    return result(out, leaves)


def run_kept(case: Case, group: dist.ProcessGroup) -> Arrays:
    """The same two layers, nothing recomputed, each with its own exchange of segments."""
    leaves, slope, ids_BT = share(case, group)
    attention = RingAttention(group)
    out = attention(attention(*leaves, ids_BT), leaves[1], leaves[2], ids_BT)
    out.backward(slope)
    return result(out, leaves)


def run_strided(case: Case, group: dist.ProcessGroup) -> list[Arrays]:
    """Channels that lie apart in memory and a gradient that is one number seen many times; then the
    plain layout.
    """
    found = []
    for layout in (lambda x: x.mT.contiguous().mT, torch.clone):
        leaves, slope, _ = share(case, group)
        one = torch.ones(()).expand_as(slope)
        out = RingAttention(group)(*map(layout, leaves), None)
        out.backward(one if layout is not torch.clone else one.contiguous())
        found.append(result(out, leaves))
    return found


def run_autocast(group: dist.ProcessGroup, products: bool) -> tuple[Arrays, list[str]]:
    """Queries and keys in fp32, values in bfloat16, as a block under autocast makes them.

    `products`: whether the CPU passes for one that multiplies bfloat16.
    """
    ring.CPU_MULTIPLIES_BF16 = products
    leaves, slope, _ = share(CASES["plain"], group)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = RingAttention(group)(leaves[0], leaves[1], leaves[2].bfloat16(), None)
        (out * slope).sum().backward()
    types = [str(x.dtype) for x in (out, *(x.grad for x in leaves if x.grad is not None))]
    return result(out, leaves), types


def complaint(group: dist.ProcessGroup) -> str:
    case = Case(documents=((32, 32), (64,)))
    leaves, _, ids_BT = share(case, group)
    assert ids_BT is not None
    try:
        RingAttention(group)(*leaves, -ids_BT)
    except ValueError as error:
        return str(error)
    return ""


def on_a_rank(world: World) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    found: dict[str, Any] = {name: run_case(case, group) for name, case in CASES.items()}
    found["bytes"] = {name: run_counted(case, group) for name, case in COUNTED.items()}
    found["strides"] = run_strided(CASES["grouped heads"], group)
    found["alone"] = run_case(CASES["documents"], alone)
    found["alone bytes"] = run_counted(CASES["documents"], alone)
    found["recomputed"] = run_recomputed(CASES["documents"], group)
    found["kept"] = run_kept(CASES["documents"], group)
    found["autocast"] = [run_autocast(group, products) for products in (True, False)]
    found["complaint"] = complaint(group)
    if world.size == 4:
        apart = [dist.new_group([0, 2]), dist.new_group([1, 3])][world.rank % 2]
        found["apart"] = run_case(CASES["documents"], apart)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, on_a_rank)


def joined(parts: list[Arrays]) -> dict[str, Tensor]:
    tensors = {name: [torch.from_numpy(part[name]) for part in parts] for name in parts[0]}
    return {name: context_join(part, len(parts)) for name, part in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_together_compute_the_attention_and_gradients_of_one_process(
    ranks: list[dict[str, Any]], name: str
) -> None:
    case = CASES[name]
    together = joined([rank[name] for rank in ranks])
    wanted = one_process(case)
    errors = {x: relative_error(together[x], wanted[x]) for x in wanted}
    assert max(errors.values()) <= case.relative_error, errors


@pytest.mark.parametrize("name", COUNTED)
def test_the_bytes_that_leave_a_rank_are_those_of_the_formula(
    ranks: list[dict[str, Any]], name: str
) -> None:
    case, cp = COUNTED[name], len(ranks)
    tokens = case.batch * case.length // cp
    wanted = ring_bytes(
        tokens, case.kv_heads * case.width, case.dtype.itemsize, cp, bool(case.documents)
    )
    for rank in ranks:
        counts = rank["bytes"][name]
        assert {phase: counts[f"{phase} bytes"] for phase in wanted} == wanted


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_only_pairs_that_may_look_are_computed_and_ranks_compute_equally_many(
    ranks: list[dict[str, Any]], phase: str
) -> None:
    pairs = {name: [x["bytes"][name][f"{phase} pairs"] for x in ranks] for name in COUNTED}
    assert len(set(pairs["plain"])) == 1
    for name, computed in pairs.items():
        assert sum(computed) == may_look(COUNTED[name]).sum()


def test_a_ring_of_one_sends_nothing_and_is_plain_attention(ranks: list[dict[str, Any]]) -> None:
    wanted = one_process(CASES["documents"])
    for rank in ranks:
        assert rank["alone bytes"]["forward bytes"] == rank["alone bytes"]["backward bytes"] == 0
        alone = joined([rank["alone"]])
        assert max(relative_error(alone[x], wanted[x]) for x in wanted) <= 1e-6


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_two_rings_of_ranks_far_apart_run_side_by_side(ranks: list[dict[str, Any]]) -> None:
    wanted = one_process(CASES["documents"])
    for first, second in ((0, 2), (1, 3)):
        apart = joined([ranks[first]["apart"], ranks[second]["apart"]])
        assert max(relative_error(apart[x], wanted[x]) for x in wanted) <= 1e-6


def test_the_layout_in_memory_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for apart, plain in (rank["strides"] for rank in ranks):
        for name, array in plain.items():
            np.testing.assert_array_equal(apart[name], array)


def test_recomputation_and_a_shared_plan_change_no_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, kept in rank["kept"].items():
            np.testing.assert_array_equal(rank["recomputed"][name], kept)


def test_bfloat16_values_make_a_bfloat16_ring_as_exact_as_one_process(
    ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.models.attention.CPU_MULTIPLIES_BF16", True)
    case = CASES["plain"]
    q, k, v, slope = (x.requires_grad_() for x in inputs(case).values())
    out = attend(q, k, v.bfloat16(), None)
    (out * slope).sum().backward()
    alone = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    wanted = one_process(case)
    multiplied, emulated = (joined([rank["autocast"][way][0] for rank in ranks]) for way in (0, 1))
    for name, tensor in alone.items():
        assert tensor is not None
        error = relative_error(multiplied[name], wanted[name])
        assert error <= 1.1 * relative_error(tensor, wanted[name])  # measured: 0.95 to 1.06
        assert relative_error(emulated[name], wanted[name]) < error  # products in fp32 round less
    types = ["torch.bfloat16", "torch.float32", "torch.float32", "torch.float32"]
    assert all(kept == types for rank in ranks for _, kept in rank["autocast"])


def test_segment_numbers_that_fall_are_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert all("fall along a sequence" in rank["complaint"] for rank in ranks)


@given(cp=st.integers(1, 9), chunk=st.integers(1, 5), batch=st.integers(1, 3))
def test_slices_joined_are_the_sequence(cp: int, chunk: int, batch: int) -> None:
    x_BTK = torch.arange(batch * 2 * cp * chunk * 3).view(batch, -1, 3)
    parts = [context_slice(x_BTK, rank, cp) for rank in range(cp)]
    assert {part.shape for part in parts} == {(batch, 2 * chunk, 3)}
    assert torch.equal(context_join(parts, cp), x_BTK)


def test_a_rank_holds_one_chunk_of_the_head_and_its_mirror_of_the_tail() -> None:
    assert chunk_order(1) == [(0, 1)]
    assert chunk_order(3) == [(0, 5), (1, 4), (2, 3)]
    assert context_slice(torch.arange(12)[None], 1, 3).tolist() == [[2, 3, 8, 9]]


@pytest.mark.parametrize(("length", "nearest"), [(30, "32"), (0, "8"), (3, "8"), (4_001, "4,000")])
def test_a_length_that_does_not_split_is_refused(length: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"nearest is {nearest}$"):
        context_slice(torch.zeros(1, length), 0, 4)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_pieces_of_all_ranks_are_each_pair_that_may_look_exactly_once(data: Any) -> None:
    cp, chunk = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    length = 2 * cp * chunk
    bits = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids_BT = torch.tensor([data.draw(bits), data.draw(bits)]).cumsum(1)
    parts = [context_slice(ids_BT, rank, cp) for rank in range(cp)]
    places = [context_slice(torch.arange(length)[None], rank, cp)[0] for rank in range(cp)]
    times_BTT = torch.zeros(2, length, length, dtype=torch.int64)
    for rank in range(cp):
        for source in range(cp):
            whole = causal_piece(rank, source, 2 * chunk)
            for piece in document_pieces(whole, parts[rank], parts[source]):
                rows, columns = places[rank][piece.queries], places[source][piece.keys]
                block = torch.ones(len(rows), len(columns), dtype=torch.int64)
                for row in range(2)[piece.rows]:
                    times_BTT[row][rows[:, None], columns] += (
                        block.tril() if piece.causal else block
                    )
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(times_BTT, (causal_TT & (ids_BT[:, :, None] == ids_BT[:, None])).long())


def test_bytes_of_a_known_layer() -> None:
    """8,192 tokens, 8 key-value heads of 128 in bfloat16, 4 ranks: by hand."""
    keys_and_values = 8192 * 2 * 1024 * 2
    wanted = {
        "forward": 3 * (keys_and_values + 8192 * 8),
        "backward": 3 * (keys_and_values + 2 * keys_and_values),
    }
    assert ring_bytes(8192, 1024, 2, 4, segments=True) == wanted
    assert ring_bytes(8192, 1024, 2, 1, segments=True) == {"forward": 0, "backward": 0}


@pytest.mark.parametrize(
    ("queries", "keys"),
    [((2, 8, 4, 16), (2, 8, 3, 16)), ((2, 8, 4, 16), (2, 6, 4, 16)), ((2, 7, 4, 8), (2, 7, 4, 8))],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_sent(
    queries: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    group: Any = None  # touching it would fail
    with pytest.raises(ValueError, match="an even T and H a multiple of G"):
        RingAttention(group)(torch.zeros(queries), torch.zeros(keys), torch.zeros(keys), None)


@pytest.mark.parametrize("causal", [True, False])
def test_the_cuda_operators_take_what_they_are_given(causal: bool) -> None:
    """Signatures, shapes and types only: fake tensors compute nothing."""
    with FakeTensorMode():
        q = torch.empty(2, 32, 4, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        k = torch.empty(2, 32, 2, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        kernel = ring.KERNELS["cuda"]
        out, lse = kernel.forward(q, k, k, causal)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:-1]
        assert lse.dtype == torch.float32
        shapes = [x.shape for x in kernel.backward(q, q, k, k, out, lse, causal=causal)]
        assert shapes == [q.shape, k.shape, k.shape]
