"""Every layout trains the model that one process trains, on the same data."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.experiments.scoring.generation import Prompts, generate
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.probing import sum_over_ranks
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import problems
from motet.parallel.runtime.mesh import World, agree_any, build_meshes
from tests.parallel.ranks import SILENT_S, run_ranks
from tests.parallel.training import BATCH, DENSE, LENGTH, Curve, assert_same, one_step, train

STEPS = 3
MOE = ModelConfig(
    vocabulary_size=96,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=64,
    n_experts=4,
    experts_per_token=2,
    d_expert=16,
    n_shared_experts=1,
    balance_loss=0.01,
    router_z_loss=1e-3,
    bias_rate=1e-3,
    n_dense_layers=1,
)
# All that imported models have besides; the second without what the ring does not compute.
IMPORTED = replace(
    DENSE,
    norm_position="both",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    window=5,
    layer_windows=(True, False, True, True),
    window_rope_theta=100.0,
    layer_rope=(True, True, False, True),
    activation="gelu_tanh",
    attention_scale=0.5,
    attention_softcap=2.0,
    logit_softcap=5.0,
    embedding_scale=3.0,
    residual_scale=0.5,
    logits_divisor=0.5,
)
WITHOUT_BAND = replace(IMPORTED, window=LENGTH, attention_softcap=0.0)
ONE = Layout(micro_sequences=8)
DENSE_LAYOUTS = {
    "accumulation": Layout(micro_sequences=2),
    "fsdp 2": Layout(dp_shard=2, micro_sequences=4),
    "fsdp 8": Layout(dp_shard=8, micro_sequences=2),
    "replicas 2": Layout(dp_replicate=2, micro_sequences=4),
    "hsdp 2x2": Layout(dp_replicate=2, dp_shard=2, micro_sequences=2),
    "unequal replicas 3:1": Layout(dp_replicate=2, shares=(3, 1), micro_sequences=2),
    "unequal hsdp 3:1 x2": Layout(dp_replicate=2, dp_shard=2, shares=(3, 1), micro_sequences=2),
    "tp 2": Layout(tp=2, micro_sequences=8),
    "tp 2, stream whole": Layout(tp=2, sequence_parallel=False, micro_sequences=8),
    "tp 2, logits whole": Layout(tp=2, vocabulary_parallel=False, micro_sequences=8),
    "tp 2, both whole": Layout(
        tp=2, sequence_parallel=False, vocabulary_parallel=False, micro_sequences=8
    ),
    "cp 2": Layout(cp=2, micro_sequences=8),
    "cp 4": Layout(cp=4, micro_sequences=8),
    "pp 2": Layout(pp=2, micro_sequences=4),
    "pp 2, unequal stages": Layout(pp=2, stage_layers=(1, 3), micro_sequences=4),
    "pp 2, head alone": Layout(pp=2, stage_layers=(4, 0), micro_sequences=4),
    "pp 2, embedding alone": Layout(pp=2, stage_layers=(0, 4), micro_sequences=4),
    "pp 2, gpipe": Layout(pp=2, schedule="gpipe", micro_sequences=4),
    "pp 4": Layout(pp=4, micro_sequences=2),
    "pp 2, interleaved": Layout(
        pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_sequences=4
    ),
    "pp 2, zero bubble": Layout(
        pp=2, virtual_stages=2, schedule="interleaved_zero_bubble", micro_sequences=4
    ),
    "pp 2, zbv": Layout(pp=2, virtual_stages=2, schedule="zbv_zero_bubble", micro_sequences=4),
    "fsdp 2 x tp 2": Layout(dp_shard=2, tp=2, micro_sequences=4),
    "fsdp 2 x cp 2": Layout(dp_shard=2, cp=2, micro_sequences=4),
    "fsdp 2 x pp 2, interleaved": Layout(
        dp_shard=2, pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_sequences=2
    ),
    "tp 2 x pp 2": Layout(tp=2, pp=2, micro_sequences=4),
    "cp 2 x tp 2": Layout(cp=2, tp=2, micro_sequences=8),
    "cp 2 x pp 2": Layout(cp=2, pp=2, micro_sequences=4),
    "replicas 2 x pp 2, 3:1": Layout(dp_replicate=2, pp=2, shares=(3, 1), micro_sequences=2),
    "hsdp 2x2 x tp 2": Layout(dp_replicate=2, dp_shard=2, tp=2, micro_sequences=4),
    "fsdp 2 x tp 2 x pp 2": Layout(dp_shard=2, tp=2, pp=2, micro_sequences=2),
    "cp 2 x tp 2 x pp 2, zbv": Layout(
        cp=2, tp=2, pp=2, virtual_stages=2, schedule="zbv_zero_bubble", micro_sequences=4
    ),
    "fsdp 2 x tp 2, placed": Layout(dp_shard=2, tp=2, placement=(3, 1, 0, 2), micro_sequences=4),
}
EXPERT_LAYOUTS = {
    "experts, fsdp 2": Layout(dp_shard=2, micro_sequences=4),
    "ep 2": Layout(dp_shard=2, ep=2, micro_sequences=4),
    "ep 4": Layout(dp_shard=4, ep=4, micro_sequences=4),
    "etp 2": Layout(dp_shard=2, etp=2, micro_sequences=4),
    "ep 2 x edp 2": Layout(dp_shard=4, ep=2, micro_sequences=2),
    "ep 2 over tp 2": Layout(tp=2, ep=2, micro_sequences=8),
    "folded: tp 2 x fsdp 2, ep 4": Layout(dp_shard=2, tp=2, ep=4, micro_sequences=4),
    "folded: tp 2 x fsdp 2, ep 2 x etp 2": Layout(dp_shard=2, tp=2, ep=2, etp=2, micro_sequences=4),
    "folded: cp 2 x fsdp 2, ep 4": Layout(dp_shard=2, cp=2, ep=4, micro_sequences=4),
    "replicas 2 x ep 2": Layout(dp_replicate=2, dp_shard=2, ep=2, micro_sequences=2),
    "pp 2 x ep 2": Layout(pp=2, dp_shard=2, ep=2, micro_sequences=4),
    "folded: pp 2 x tp 2 x fsdp 2, ep 2": Layout(pp=2, tp=2, dp_shard=2, ep=2, micro_sequences=4),
}
_references: dict[Any, Curve] = {}


def reference(config: ModelConfig, masked: bool) -> Curve:
    key = (config, masked)
    if key not in _references:
        _references[key] = run_ranks(1, train, ONE, STEPS, masked, config)[0]
    return _references[key]


def check(layout: Layout, config: ModelConfig, masked: bool) -> None:
    expected = reference(config, masked)
    assert expected.steps[0][0] > expected.steps[-1][0], "it learns"
    found = run_ranks(
        layout.world_size, train, layout, STEPS, masked, config, placement=layout.placement
    )
    assert_same(found[0], expected)
    for curve in found:
        assert curve.steps == found[0].steps, "ranks report the same losses"
    for step in range(STEPS):
        rows = [
            row
            for rank, curve in enumerate(found)
            if layout.is_dp_leader(rank)
            for row in curve.rows[step]
        ]
        assert rows == list(range(BATCH)), "every sequence is read once, in order of dp_rank"


@pytest.mark.parametrize("name", DENSE_LAYOUTS)
def test_a_layout_trains_what_one_process_trains(name: str) -> None:
    check(DENSE_LAYOUTS[name], DENSE, masked=False)


@pytest.mark.parametrize("name", ["fsdp 8", "cp 4", "cp 2 x tp 2 x pp 2, zbv", "pp 2", "tp 2"])
def test_documents_and_unequal_numbers_of_labels_change_nothing(name: str) -> None:
    check(DENSE_LAYOUTS[name], DENSE, masked=True)


@pytest.mark.parametrize(
    "name",
    ["fsdp 2", "tp 2", "tp 2, both whole", "pp 2, interleaved", "fsdp 2 x tp 2 x pp 2"],
)
def test_the_parts_of_imported_models_train_the_same_under_every_layout(name: str) -> None:
    check(DENSE_LAYOUTS[name], IMPORTED, masked=name.startswith("fsdp"))


@pytest.mark.parametrize("name", ["cp 4", "cp 2 x tp 2"])
def test_context_ranks_train_what_has_no_band_and_no_cap(name: str) -> None:
    check(DENSE_LAYOUTS[name], WITHOUT_BAND, masked=name == "cp 4")
    found = problems(DENSE_LAYOUTS[name], IMPORTED, LENGTH, [BATCH], None)
    ((setting, why),) = found
    assert setting == "layout.cp"
    assert "a window of 5 tokens" in why
    assert "attention_softcap=2" in why


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_a_mixture_of_experts_trains_the_same_under_every_layout(name: str) -> None:
    check(EXPERT_LAYOUTS[name], MOE, masked=name.startswith("folded"))


@pytest.mark.parametrize("qk_norm", ["none", "full"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_other_shapes_of_model_split_too(qk_norm: Any, norm_position: Any) -> None:
    config = ModelConfig(
        96, 32, 2, 4, 2, 64, qk_norm=qk_norm, norm_position=norm_position, tied_embeddings=True
    )
    check(DENSE_LAYOUTS["fsdp 2 x tp 2"], config, masked=False)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["fsdp 2 x tp 2", "cp 2 x pp 2"])
def test_recomputation_changes_no_number(recompute: str, name: str) -> None:
    from dataclasses import replace

    check(replace(DENSE_LAYOUTS[name], recompute=recompute), DENSE, masked=False)
    moe = replace(EXPERT_LAYOUTS["folded: tp 2 x fsdp 2, ep 4"], recompute=recompute)
    check(moe, MOE, masked=False)


# --- checkpoints

LAYOUTS = {**DENSE_LAYOUTS, "one": ONE}
SAVED_AT, RESUMED_TO = 2, 4
PAIRS = [
    ("one", "fsdp 2 x tp 2"),
    ("one", "pp 2, zbv"),
    ("fsdp 2", "one"),
    ("fsdp 2", "tp 2"),
    ("fsdp 8", "pp 2, interleaved"),
    ("replicas 2", "cp 2"),
    ("hsdp 2x2", "tp 2 x pp 2"),
    ("tp 2", "fsdp 2"),
    ("tp 2", "unequal replicas 3:1"),
    ("cp 2", "pp 2, unequal stages"),
    ("pp 2, unequal stages", "pp 4"),
    ("pp 2, zbv", "hsdp 2x2 x tp 2"),
    ("fsdp 2 x tp 2 x pp 2", "one"),
    ("fsdp 2 x tp 2", "fsdp 2 x pp 2, interleaved"),
]
EXPERT_PAIRS = [
    ("one", "folded: tp 2 x fsdp 2, ep 4"),
    ("ep 4", "etp 2"),
    ("folded: pp 2 x tp 2 x fsdp 2, ep 2", "ep 2"),
    ("etp 2", "one"),
]


def saved(world: World, layout: Layout, config: ModelConfig, folder: Path) -> list[float]:
    engine = build_engine(config, EngineOptions(), layout, world)
    run = RunDir(folder)
    run.create()
    checkpoints = Checkpoints(run, world)
    losses = []
    for step in range(RESUMED_TO):
        if step == SAVED_AT:  # training goes on while it is written
            checkpoints.save(step, engine.tensors(), {"segment": 1})
        losses.append(one_step(engine, layout, world.rank, step).loss)
    checkpoints.close()
    return losses


def resumed(
    world: World, layout: Layout, config: ModelConfig, folder: Path
) -> tuple[list[float], dict[str, Any]]:
    engine = build_engine(config, EngineOptions(seed=99), layout, world)
    checkpoints = Checkpoints(RunDir(folder), world)
    tensors = engine.tensors()
    assert checkpoints.load(SAVED_AT, tensors)["segment"] == 1
    engine.restore(tensors)
    checkpoints.close()
    losses = [
        one_step(engine, layout, world.rank, step).loss for step in range(SAVED_AT, RESUMED_TO)
    ]
    return losses, {name: value.numpy() for name, value in engine.full_model().items()}


def resume(first: Layout, second: Layout, config: ModelConfig, folder: Path) -> None:
    losses = run_ranks(first.world_size, saved, first, config, folder)[0]
    found, weights = run_ranks(second.world_size, resumed, second, config, folder)[0]
    np.testing.assert_allclose(found, losses[SAVED_AT:], rtol=1e-5)
    for name, value in reference_after(config).weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-4, err_msg=name)


def reference_after(config: ModelConfig) -> Curve:
    key = (config, "plain")
    if key not in _references:
        _references[key] = run_ranks(1, train, ONE, RESUMED_TO, False, config, EngineOptions())[0]
    return _references[key]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_checkpoint_resumes_under_another_layout(first: str, second: str, tmp_path: Path) -> None:
    resume(LAYOUTS[first], LAYOUTS[second], DENSE, tmp_path)


@pytest.mark.parametrize(("first", "second"), EXPERT_PAIRS)
def test_a_checkpoint_of_experts_resumes_under_another_layout(
    first: str, second: str, tmp_path: Path
) -> None:
    layouts = {**EXPERT_LAYOUTS, "one": ONE}
    resume(layouts[first], layouts[second], MOE, tmp_path)


# --- shapes that do not divide evenly, and passes in an unusual order

ODD = ModelConfig(
    98, 36, 2, 4, 2, 50, head_dim=10, norm_position="post", qk_norm="full", qkv_bias=True
)
MOE_ZBV = Layout(
    pp=2, dp_shard=2, ep=2, virtual_stages=2, schedule="zbv_zero_bubble", micro_sequences=2
)


def test_weights_that_do_not_divide_evenly_train_the_same() -> None:
    check(DENSE_LAYOUTS["fsdp 2 x tp 2"], ODD, masked=False)


def test_experts_are_counted_once_when_the_backward_pass_comes_in_two_parts() -> None:
    from dataclasses import replace

    check(MOE_ZBV, replace(MOE, n_layers=4), masked=True)


def timeouts(world: World, layout: Layout) -> set[str]:
    meshes = build_meshes(layout, world, experts=True)
    groups = [group for mesh in (meshes.dense, meshes.experts) for group in mesh.get_all_groups()]
    backends = [g._get_backend(world.device) for g in [*groups, meshes.context, world.control]]
    return {str(backend.options._timeout) for backend in backends}


def test_every_group_waits_as_long_as_asked() -> None:
    found = run_ranks(4, timeouts, Layout(cp=2, tp=2, ep=2))
    assert found == [{str(timedelta(seconds=SILENT_S))}] * 4


# --- what stays the same


def initial(world: World, layout: Layout, config: ModelConfig) -> dict[str, Any]:
    engine = build_engine(config, EngineOptions(seed=5), layout, world)
    return {name: value.numpy() for name, value in engine.full_model().items()}


def test_the_same_seed_gives_bit_equal_weights_under_every_layout() -> None:
    for config, names in (
        (DENSE, ["hsdp 2x2 x tp 2", "pp 2, zbv"]),
        (MOE, list(EXPERT_LAYOUTS)[6:8]),
    ):
        expected = run_ranks(1, initial, ONE, config)[0]
        for name in names:
            layout = {**DENSE_LAYOUTS, **EXPERT_LAYOUTS}[name]
            found = run_ranks(layout.world_size, initial, layout, config)[0]
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[key], expected[key]) for key in expected), name


def scores(world: World, layout: Layout, config: ModelConfig) -> Any:
    engine = build_engine(config, EngineOptions(), layout, world)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 96, (6, 21)).astype(np.int64)
    labels = np.roll(tokens, -1, axis=1)
    labels[:, ::3] = -100
    before = engine.score(tokens, labels)
    written = write(engine, layout, world)
    engine.finish_scoring()
    losses = [one_step(engine, layout, world.rank, step).loss for step in range(2)]
    return before, losses, written


class Numbers:
    """A tokenizer whose words are numbers."""

    eod = 3

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def write(engine: Any, layout: Layout, world: World) -> list[list[int]]:
    """What greedy decoding writes after prompts of 1 to 40 tokens, dealt to data-parallel ranks."""
    generator = np.random.default_rng(1)
    tokens = tuple(generator.integers(0, 96, n).astype(np.int64) for n in (1, 5, 40, 9, 33))
    prompts = Prompts(np.arange(5), tokens, np.array([6, 6, 6, 2, 2]), 5)
    rank, ranks = layout.dp_rank(world.rank), layout.dp_size
    total = partial(sum_over_ranks, layout=layout, world=world)
    found = generate(
        prompts, engine.likeliest, Numbers(), 256, rank, ranks, total, partial(any_rank, world)
    )  # type: ignore[arg-type]
    return [ids.tolist() for ids in found.tokens]


def any_rank(world: World, mine: bool) -> bool:
    return mine if world.size == 1 else agree_any(mine, world)


@pytest.mark.parametrize(
    "name", ["tp 2", "tp 2, stream whole", "cp 2", "pp 2, zbv", "fsdp 2 x tp 2 x pp 2"]
)
def test_probes_score_the_same_on_all_ranks_of_every_layout(name: str) -> None:
    (logprob, greedy), losses, written = run_ranks(1, scores, ONE, DENSE)[0]
    assert [len(ids) for ids in written] == [6, 6, 6, 2, 2], "no row met its end by chance"
    layout = DENSE_LAYOUTS[name]
    everything = run_ranks(layout.world_size, scores, layout, DENSE)
    for (found, found_greedy), found_losses, found_written in everything:
        assert found_written == written
        np.testing.assert_allclose(found, logprob, atol=2e-6)
        assert np.array_equal(found_greedy, greedy)
        np.testing.assert_allclose(found_losses, losses, rtol=1e-5)


def refused(world: World, layout: Layout) -> Any:
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    one_step(engine, layout, world.rank, 0)
    before = {name: value.clone() for name, value in engine.tensors().items()}
    from tests.parallel.training import share

    batches, _ = share(layout, world.rank, 1, False)
    result = engine.step(batches, 1e-3, lambda loss, norm: False, lambda: world.rank == 1)
    same = all(
        torch.equal(local(value), local(before[name])) for name, value in engine.tensors().items()
    )
    return result.applied, result.stop, same


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


@pytest.mark.parametrize("name", ["fsdp 2", "tp 2 x pp 2"])
def test_a_refused_update_leaves_all_alone_and_a_stop_reaches_all(name: str) -> None:
    layout = DENSE_LAYOUTS[name]
    assert (
        run_ranks(layout.world_size, refused, layout) == [(False, True, True)] * layout.world_size
    )
