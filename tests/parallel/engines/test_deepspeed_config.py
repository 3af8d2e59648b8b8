"""Motet's settings as DeepSpeed's: what is made, what may be added, what contradicts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from motet.parallel.engines.deepspeed_config import deepspeed_config, library_problems, problems


def made(
    zero_stage: int = 2, offload: str = "none", extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    return deepspeed_config(
        zero_stage=zero_stage,
        offload=offload,
        clip_norm=0.5,
        micro_sequences=4,
        world_size=8,
        extra=extra or {},
    )


def test_the_configuration_is_the_one_our_settings_mean() -> None:
    assert made() == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2},
    }
    host = {"device": "cpu", "pin_memory": True}
    assert made(1, "optimizer")["zero_optimization"] == {"stage": 1, "offload_optimizer": host}
    assert made(3, "parameters")["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,
        "offload_optimizer": host,
        "offload_param": host,
    }


def test_what_the_user_adds_is_merged_key_by_key() -> None:
    extra = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 10, "offload_optimizer": {"pin_memory": False}},
    }
    assert problems(2, "optimizer", extra) == []
    config = made(2, "optimizer", extra)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 10,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert extra["zero_optimization"] == {
        "reduce_bucket_size": 10,
        "offload_optimizer": {"pin_memory": False},
    }, "the user's mapping stays as it was"


@pytest.mark.parametrize(
    ("extra", "path", "decided"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "batch.sequences"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu",
            "layout.micro_sequences",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "batch.sequences"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "training.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "training.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "training.schedule"),
        ({"bf16": {"enabled": True}}, "bf16", "training.precision"),
        ({"fp16": {"enabled": True}}, "fp16", "training.precision"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast", "training.precision"),
        (
            {"activation_checkpointing": {"number_checkpoints": 2}},
            "activation_checkpointing",
            "layout.recompute",
        ),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "layout.zero_stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
            "layout.offload",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm",
            "training.bad_steps",
        ),
        (
            {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
            "zero_optimization.zenflow",
            "training.bad_steps",
        ),
    ],
)
def test_what_our_settings_decide_may_not_be_added(
    extra: dict[str, Any], path: str, decided: str
) -> None:
    found = problems(2, "optimizer", extra)
    assert [setting for setting, _ in found] == [f"layout.deepspeed.{path}"]
    assert decided in found[0][1]


def test_every_contradiction_is_told_at_once() -> None:
    extra = {"fp16": {"enabled": True}, "zero_optimisation": {}, "optimizer": {}}
    settings = [setting for setting, _ in problems(2, "parameters", extra)]
    assert settings == [
        "layout.offload",
        "layout.deepspeed.fp16",
        "layout.deepspeed.optimizer",
        "layout.deepspeed.zero_optimisation",
    ]
    assert "did you mean 'zero_optimization'?" in problems(2, "none", extra)[-1][1]


def test_weights_are_offloaded_only_where_they_are_divided() -> None:
    for stage in (1, 2):
        ((setting, why),) = problems(stage, "parameters", {})
        assert setting == "layout.offload"
        assert "layout.zero_stage=3" in why
    assert problems(3, "parameters", {}) == []


def test_compiled_blocks_and_zero_3_exclude_each_other() -> None:
    assert [setting for setting, _ in problems(3, "none", {}, compiled=True)] == [
        "layout.zero_stage"
    ]
    assert problems(2, "none", {}, compiled=True) == []


def test_options_of_an_offload_that_is_off_are_refused() -> None:
    extra = {"zero_optimization": {"offload_param": {"pin_memory": False}}}
    ((setting, why),) = problems(3, "optimizer", extra)
    assert setting == "layout.deepspeed.zero_optimization.offload_param"
    assert "layout.offload=parameters" in why


def test_a_zero_section_that_is_no_mapping_is_refused() -> None:
    ((setting, _),) = problems(2, "none", {"zero_optimization": 3})
    assert setting == "layout.deepspeed.zero_optimization"


def test_deepspeed_itself_judges_the_zero_section() -> None:
    assert library_problems(made(3, "parameters")) == []
    extra = {"zero_optimization": {"sub_grup_size": 1, "reduce_bucket_size": -3}}
    found = dict(library_problems(made(2, "none", extra)))
    assert found["layout.deepspeed.zero_optimization.sub_grup_size"] == "is not read by DeepSpeed"
    assert "greater than 0" in found["layout.deepspeed.zero_optimization.reduce_bucket_size"]


def test_checking_leaves_the_environment_of_the_ranks_alone() -> None:
    """DeepSpeed is told to look for no GPU while it is imported to check; the ranks that start
    afterwards may use one.
    """
    code = (
        "import os, sys; os.environ.pop('DS_ACCELERATOR', None)\n"
        "from motet.parallel.engines.deepspeed_config import deepspeed_config, library_problems\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
        "library_problems({'zero_optimization': {'stage': 1}})\n"
        "print('deepspeed' in sys.modules, os.environ.get('DS_ACCELERATOR'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "None"]


def test_every_section_that_the_installed_deepspeed_reads_is_known() -> None:
    """A name that DeepSpeed reads and this list lacks would be refused; a new one must be put on
    one side or the other.
    """
    import re
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "runtime" / "config.py").read_text("utf-8")
    constants = (Path(spec.origin).parent / "runtime" / "constants.py").read_text("utf-8")
    values = dict(re.findall(r'^([A-Z_0-9]+) = "([a-z_0-9]+)"', constants, re.MULTILINE))
    read = set(re.findall(r"param_dict(?:, |\.get\(|\[)([A-Z][A-Z_0-9]+)", source))
    read |= set(re.findall(r"([A-Z][A-Z_0-9]+) in param_dict", source))
    nested = {"params", "type", "legacy_fusion", "dtype", "lower_precision_safe_modules"}
    top = {values[name] for name in read if name in values} - nested
    assert len(top) >= 20, "the pattern still finds them"
    unread = {name: why for name in top for _, why in problems(2, "none", {name: {}})}
    assert not [name for name, why in unread.items() if "not read" in why]
