"""The bytes that the cost model prices are those that ranks move: of every group of ranks, but for
the differences that are named here.

Groups of ranks whose seconds are bytes, on devices that take no time, make the cost model say what
it prices. An all-reduce counts twice: it moves what a gather and a scatter of the same tensor move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from motet.models.architecture import Split, block_weights
from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Link, homogeneous
from motet.parallel.cost import memory
from motet.parallel.cost.links import CommGroup
from motet.parallel.cost.rank import RankCosts
from motet.parallel.cost.shapes import shapes_of
from motet.parallel.cost.stages import NATIVE, Training
from motet.parallel.cost.topology import StageGroups
from motet.parallel.layout import weights as weights_module
from motet.parallel.layout.collectives import ValueBytes, step_collectives
from motet.parallel.layout.layout import SCHEDULES, Layout
from motet.parallel.layout.rules import problems
from motet.parallel.layout.weights import Weight, weights

LENGTH = 64
GROUPS = ("tp", "cp", "pp", "fsdp", "edp", "dp_replicate", "ep", "etp")
SIZES = ValueBytes(activation=2, weight=2, reduce=4)  # of "bf16", where ranks share a stage
DENSE = ModelConfig(vocabulary_size=1024, d_model=64, n_layers=6, n_heads=8, n_kv_heads=4, d_ffn=96)
MOE = replace(DENSE, n_experts=8, d_expert=32, n_dense_layers=1)
MODELS = {
    "dense": DENSE,
    "OLMo-2": replace(DENSE, norm_position="post", qk_norm="full"),
    "Qwen": replace(DENSE, qkv_bias=True, qk_norm="head", tied_embeddings=True),
    "experts": MOE,
    "shared": replace(MOE, n_shared_experts=1, shared_gate=True, moe_every=2, n_kv_heads=8),
}


@dataclass(frozen=True)
class Case:
    """One pipeline rank of a layout, which runs `number` micro-batches."""

    model: ModelConfig
    layout: Layout
    number: int
    stage: int
    documents: bool = False

    @property
    def tokens(self) -> int:
        return self.layout.micro_sequences * LENGTH // self.layout.cp

    @property
    def stream(self) -> int:
        """Bytes of the residual stream of a micro-batch."""
        return self.tokens * self.model.d_model * SIZES.activation

    @property
    def layers(self) -> list[int]:
        held = self.layout.layers_of_stages(self.model)
        return [layer for number in self.layout.stages_of(self.stage) for layer in held[number]]

    @property
    def again(self) -> int:
        return int(self.layout.recompute != "none")

    @property
    def gathers_again(self) -> bool:
        return weights_module.gathers_again(self.model, self.layout)

    @property
    def weights(self) -> list[Weight]:
        return weights(self.model, self.layout, self.stage)

    def holds(self, end: int) -> bool:
        return end % self.layout.stages in self.layout.stages_of(self.stage)


def moved(case: Case) -> dict[str, float]:
    """Bytes that ranks move in a step, by group: exact, a test counts real steps against it."""
    found = dict.fromkeys(GROUPS, 0.0)
    for transfer in step_collectives(
        case.model, case.layout, LENGTH, case.number, stage=case.stage, sizes=SIZES,
        documents=case.documents,
    ):  # fmt: skip
        if transfer.group != "control":  # a few numbers between CPUs
            found[transfer.group] += transfer.total_bytes * (1 + (transfer.kind == "all_reduce"))
    return found


@dataclass(frozen=True)
class Scale(CommGroup):
    """Ranks whose transfers take a second per byte if they are the group that is listened to."""

    on: bool = False

    def gather_s(self, size: float, constants: Constants) -> float:
        return size if self.on and self.ranks > 1 else 0.0

    def reduce_s(self, size: float, constants: Constants) -> float:
        return 2 * self.gather_s(size, constants)

    exchange_s = send_s = gather_s


def priced(case: Case) -> dict[str, float]:
    """Bytes of a step that the cost model prices, by group."""
    layout, link = case.layout, Link(math.inf, 0.0, "free")
    cluster = homogeneous("h100", layout.world_size, 1)
    (group,) = cluster.groups
    device = replace(group.device, peak_tflops={"bf16": math.inf}, memory_gb_s=math.inf)
    cluster = replace(cluster, groups=(replace(group, device=device),))
    training = Training(case.number * layout.micro_sequences * layout.dp_size, LENGTH)
    constants = {device.kind: Constants(host_us=0.0)}
    found = {}
    for name in GROUPS:
        groups = {
            field: Scale(ranks, 1, ranks, link, link, on=field == FIELDS.get(name, name))
            for field, ranks in ranks_of(layout).items()
        }
        costs = RankCosts(case.model, cluster, training, NATIVE, constants)
        stage, shape = StageGroups((0,), **groups), shapes_of(layout, case.model)[case.stage]
        rank = costs.rank(layout, stage, shape, 0)
        each = rank.forward_s + rank.backward_s + sum(rank.gather_s) + rank.send_s
        found[name] = case.number * each + rank.sync_s
    return found


FIELDS = {"pp": "hop", "fsdp": "shard", "edp": "expert_data", "dp_replicate": "replicate"}


def ranks_of(layout: Layout) -> dict[str, int]:
    """Ranks of every group of a stage, by its name in `StageGroups`."""
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "ep": layout.ep,
        "etp": layout.etp,
        "data": layout.fsdp * layout.dp_replicate,
        "shard": layout.fsdp,
        "replicate": layout.dp_replicate,
        "expert_data": layout.edp,
        "expert_replicas": layout.edp * layout.dp_replicate,
        "hop": layout.pp,
    }


# --- what is priced, less what is moved: one function for each reason


def recomputation_stops_early(case: Case) -> float:
    """Priced: all of a block runs again. Moved: not the sum after its last product, of which the
    backward pass keeps nothing; a quarter of a dense block's second forward pass.
    """
    early = case.again and case.model.norm_position == "pre"
    dense = sum(not case.model.has_experts(layer) for layer in case.layers)
    each = case.stream * (1 if case.layout.sequence_parallel else 2)
    return each * dense * case.number if early else 0.0


def shared_blocks_divide_tokens(case: Case) -> float:
    """Priced: a shared block as Megatron-LM divides it, a gather before and a sum after it in every
    pass. Moved: nothing, Motet's engine divides its tokens; its weights' gradients are summed
    instead (`whole_weights_are_summed`).
    """
    if not case.model.shared_width:
        return 0.0
    mixtures = sum(case.model.has_experts(layer) for layer in case.layers)
    return 2 * case.stream * mixtures * (2 + case.again) * case.number


def norms_over_all_heads(case: Case) -> float:
    """Not priced: one number per token and norm, beside D of them."""
    if case.model.qk_norm != "full":
        return 0.0
    return -2.0 * 2 * case.tokens * 4 * len(case.layers) * (2 + case.again) * case.number


def losses_of_a_divided_vocabulary(case: Case) -> float:
    """Not priced: three numbers per token, beside D of them."""
    divided = case.layout.vocabulary_parallel and case.holds(-1)
    return -2.0 * 3 * case.tokens * 4 * case.number if divided else 0.0


def whole_tables(case: Case) -> float:
    """Priced: an embedding as if tensor parallelism divided its rows. Moved where it does not:
    parts of sequences are gathered once behind an embedding and once before a head. Few choose
    whole tables: they take tp times the memory.
    """
    if case.layout.vocabulary_parallel:
        return 0.0
    first, last = case.holds(0), case.holds(-1)
    gathered = (first + last) * case.layout.sequence_parallel
    return (2 * first - gathered) * case.stream * case.number


def whole_weights_are_summed(case: Case) -> float:
    """Not priced: gradients of norms, routers and shared blocks, which every tensor-parallel rank
    holds whole; once a step, or once a micro-batch where weights are gathered again.
    """
    together = not case.gathers_again and (case.number > 1 or case.layout.pp > 1)
    size = SIZES.reduce if together else SIZES.weight
    rounds = case.number if case.gathers_again else 1
    return -2.0 * rounds * size * sum(w.numel for w in case.weights if w.over_tp)


def segments(case: Case) -> float:
    """Not priced: the document of every token, once per stage and micro-batch."""
    stages = len(case.layout.stages_of(case.stage))
    each = case.layout.cp * case.tokens * 8
    return -each * stages * case.number if case.documents else 0.0


def ends_of_a_pipeline(case: Case) -> float:
    """Priced: every stage sends hidden states on and gradients back. The first and the last stage
    have one neighbour, and the arms of a V meet on one rank; what a pipeline waits for is its
    slowest rank, which has both.
    """
    sends, layout = 0, case.layout
    for number in layout.stages_of(case.stage):
        near = [n for n in (number - 1, number + 1) if 0 <= n < layout.stages]
        sends += 2 - sum(n % layout.stages not in layout.stages_of(case.stage) for n in near)
    over = layout.tp if layout.sequence_parallel else 1
    return sends * case.stream / over * case.number


def counts_of_rows(case: Case) -> float:
    """Not priced: how many rows every expert gets, one number each."""
    mixtures = sum(case.model.has_experts(layer) for layer in case.layers)
    return -8.0 * case.model.n_experts * mixtures * case.number * (1 + case.again)


def counts_of_rows_within_experts(case: Case) -> float:
    """Not priced: the same between the ranks of one expert."""
    return case.layout.etp * counts_of_rows(case)


def vectors_and_routers(case: Case) -> float:
    """Priced: all weights of a block over tp, and no final norm. Moved: norms, routers and shared
    blocks whole, the final norm, and what pads weights to equal parts.
    """
    layout, values = case.layout, 0.0
    for layer in case.layers:
        for spec in block_weights(case.model, layer):
            whole = spec.split in (Split.STREAM, Split.HEADS)
            values -= spec.numel * (1 - 1 / layout.tp) if whole else 0.0
    dense = [w for w in case.weights if not w.is_expert]
    values -= sum(layout.fsdp * w.divided(layout.fsdp) - w.numel for w in dense)
    return values - (case.model.d_model if case.holds(-1) else 0)


def dense_weights(case: Case) -> float:
    """`vectors_and_routers`, for gathers and scatters; and where weights are gathered again, those
    outside of blocks stay from the forward to the backward pass.
    """
    again, off = case.gathers_again, vectors_and_routers(case)
    rounds = case.number if again else 1
    each = (2 if again else 1) * SIZES.weight + SIZES.reduce
    found = rounds * each * off
    if again:
        root = [w for w in case.weights if w.unit.startswith("root")]
        gathered = sum(case.layout.fsdp * w.divided(case.layout.fsdp) for w in root)
        found += rounds * SIZES.weight * gathered
    return found


def dense_gradients(case: Case) -> float:
    """`vectors_and_routers`, for sums between replicas."""
    return 2 * SIZES.reduce * vectors_and_routers(case) / case.layout.fsdp


DIFFERENCES: dict[str, tuple[Callable[[Case], float], ...]] = {
    "tp": (
        recomputation_stops_early,
        shared_blocks_divide_tokens,
        norms_over_all_heads,
        losses_of_a_divided_vocabulary,
        whole_tables,
        whole_weights_are_summed,
    ),
    "cp": (segments,),
    "pp": (ends_of_a_pipeline,),
    "fsdp": (dense_weights,),
    "edp": (),
    "dp_replicate": (dense_gradients,),
    "ep": (counts_of_rows,),
    "etp": (counts_of_rows_within_experts,),
}


def compare(case: Case) -> None:
    exact, cost = moved(case), priced(case)
    ranks = {name: getattr(case.layout, name) for name in GROUPS}
    for name in GROUPS:
        if ranks[name] == 1:
            assert cost[name] == exact[name] == 0.0
            continue
        named = {reason.__name__: reason(case) for reason in DIFFERENCES[name]}
        assert cost[name] == pytest.approx(exact[name] + sum(named.values()), rel=1e-9), (
            name, exact[name], named,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    degree = st.sampled_from((1, 2, 4))
    schedule = draw(st.sampled_from(SCHEDULES))
    layout = Layout(
        dp_replicate=draw(st.sampled_from((1, 2))),
        dp_shard=draw(degree),
        tp=draw(degree),
        pp=draw(st.sampled_from((1, 2, 3))),
        cp=draw(st.sampled_from((1, 2))),
        ep=draw(degree),
        etp=draw(st.sampled_from((1, 2))),
        schedule=schedule,
        virtual_stages=1 if schedule in ("gpipe", "1f1b") else 2,
        micro_sequences=draw(st.sampled_from((1, 2))),
        recompute=draw(st.sampled_from(("none", "selective", "full"))),
        sequence_parallel=draw(st.booleans()),
        vocabulary_parallel=draw(st.booleans()),
    )
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    number = layout.pp * draw(st.sampled_from((1, 2)))
    sequences = number * layout.micro_sequences * layout.dp_size
    assume(not problems(layout, model, LENGTH, [sequences], None) and layout.stage_ranks > 1)
    return Case(model, layout, number, draw(st.integers(0, layout.pp - 1)), draw(st.booleans()))


MANY = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip


@given(case=cases())
@MANY
def test_priced_bytes_are_those_that_ranks_move(case: Case) -> None:
    compare(case)


@given(case=cases())
@MANY
def test_so_they_are_where_weights_are_gathered_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (weights_module, memory):
        monkeypatch.setattr(module, "KEPT_GATHERED_BYTES", 0)
    compare(case)


FOLDED = Layout(dp_replicate=2, dp_shard=2, tp=2, cp=2, ep=2, etp=2, recompute="full")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "layout", [FOLDED, replace(FOLDED, pp=2, etp=1, dp_replicate=1)], ids=["folded", "stages"]
)
def test_every_group_of_ranks_is_met(name: str, layout: Layout) -> None:
    model = MODELS[name]
    if model.n_experts == 0:
        layout = replace(layout, ep=1, etp=1)
    if layout.pp > 1:
        model = replace(model, tied_embeddings=False)
    for stage in range(layout.pp):
        case = Case(model, layout, 4, stage, documents=True)
        compare(case)
        used = {group for group, size in moved(case).items() if size}
        assert used >= {"tp", "cp", "fsdp"} | ({"ep", "edp"} if model.n_experts else set())
