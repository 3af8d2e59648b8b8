"""Accelerate trains what one process trains, under FSDP2 and DDP, and obeys the user's
configuration or says why not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from motet.parallel.engines.engine_accelerate import contradictions
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.engines.test_layouts import MOE
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, assert_same, train
from tests.parallel.visits import ONE, assert_like_one_process, visits

FSDP = Layout(engine="accelerate", dp_shard=2, micro_sequences=4)
DDP = Layout(engine="accelerate", dp_replicate=2, micro_sequences=4)
SINGLE = Layout(engine="accelerate", micro_sequences=8)
LAYOUTS = {"FSDP2": FSDP, "DDP": DDP, "one process": SINGLE}


@pytest.mark.parametrize("name", LAYOUTS)
def test_accelerate_trains_what_one_process_trains(name: str) -> None:
    assert_like_one_process(visits(LAYOUTS[name]), visits(ONE)[0])


@pytest.mark.parametrize("layout", [FSDP, DDP], ids=["FSDP2", "DDP"])
def test_experts_recomputed_and_compiled_change_nothing(layout: Layout) -> None:
    options = EngineOptions(z_loss=1e-3)
    expected = run_ranks(1, train, ONE, 3, True, MOE, options)[0]
    layout = replace(layout, recompute="full")
    assert_same(run_ranks(2, train, layout, 3, True, MOE, options)[0], expected)
    expected = run_ranks(1, train, ONE, 3, True, DENSE, options)[0]
    compiled = replace(options, compile=True)
    layout = replace(layout, recompute="none")
    assert_same(run_ranks(2, train, layout, 3, True, DENSE, compiled)[0], expected)


@pytest.mark.parametrize(
    ("layout", "native"),
    [(FSDP, Layout(dp_shard=2, micro_sequences=4)), (DDP, replace(ONE, micro_sequences=4))],
    ids=["FSDP2", "DDP"],
)
def test_bf16_is_the_bf16_of_the_native_engine(layout: Layout, native: Layout) -> None:
    low = EngineOptions(z_loss=1e-3, precision="bf16")
    expected = run_ranks(native.world_size, train, native, 3, True, DENSE, low)[0]
    plain = run_ranks(1, train, ONE, 1, True, DENSE, replace(low, precision="fp32"))[0]
    assert expected.steps[0][0] != plain.steps[0][0], "it does compute in bf16"
    assert_same(run_ranks(2, train, layout, 3, True, DENSE, low)[0], expected)


def launched(world: World, environment: dict[str, str], layout: Layout) -> Any:
    import os

    from motet.parallel.engines.protocol import build_engine

    os.environ |= environment
    engine: Any = build_engine(DENSE, EngineOptions(), layout, world)
    held = sum(value.to_local().numel() for value in sharded(engine.tensors()))
    return str(engine.accelerator.distributed_type), held


def sharded(tensors: dict[str, Any]) -> list[Any]:
    return [value for value in tensors.values() if hasattr(value, "to_local")]


def test_the_launcher_s_choice_goes_before_the_layout_s() -> None:
    """As `accelerate launch` leaves the environment for a file with `distributed_type: MULTI_GPU`,
    and for one with FSDP.
    """
    plain = {"ACCELERATE_MIXED_PRECISION": "no"}
    for kind, held in run_ranks(2, launched, plain, FSDP):
        assert "FSDP" not in kind
        assert held == 0
    fsdp = plain | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    fsdp |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    total = sum(held for _, held in run_ranks(2, launched, fsdp, DDP))
    # Weights and two moments, and nothing twice.
    assert total == 3 * sum(int(np.prod(v.shape)) for v in visits(ONE)[0].curve.weights.values())


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "layout.engine=deepspeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "layout.tp"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "layout.engine=native"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "training.precision"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "training.precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "batch.sequences"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "training.compile"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            "layout.recompute",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "layout.offload",
        ),
    ],
)
def test_what_accelerate_may_not_decide_is_refused(environment: dict[str, str], told: str) -> None:
    (found,) = contradictions(environment, "fp32")
    assert told in found


def test_what_accelerate_launch_sets_by_itself_is_no_contradiction() -> None:
    environment = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    assert contradictions(environment, "bf16") == []
    assert contradictions({**environment, "ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16") == []
