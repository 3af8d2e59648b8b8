"""A run of self-distillation is a function of seed and step, and one run on any number of processes."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.core.errors import UserError
from motet.models.config import ModelError
from motet.models.poa import schedules
from motet.models.poa.config import CropConfig, HeadConfig, PoaConfig
from motet.models.poa.training import Replicas, SelfDistillation, batch_rows
from motet.models.vit import ViTConfig, ViTSize
from tests.parallel.ranks import run_ranks

CONFIG = PoaConfig(
    vit=ViTConfig(8, 4, 16, 3, head_dim=4, channels=1, layer_scale=0.5, drop_path=0.2),
    widths=(4, 8, 16),
    depths=(1, 2, 3),
    steps=12,
    images_per_step=8,
    groups=2,
    heads=HeadConfig((4, 6, 8, 10), 12, 6),
    crops=CropConfig(8, 4, 2, (0.5, 1.0), (0.3, 0.6), flip=False),
    temperature_warmup_steps=4,
    ibot_start_step=2,
    frozen_steps=2,
    warmup_steps=2,
)


def images() -> Tensor:
    return torch.rand(21, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def tensors(run: SelfDistillation) -> dict[str, Tensor]:
    """Every tensor that a run is made of."""
    found = {f"student.{name}": value for name, value in run.student.state_dict().items()}
    found |= {f"teacher.{name}": value for name, value in run.teacher.state_dict().items()}
    for at, state in run.optimizer.state_dict()["state"].items():
        found |= {f"{at}.{name}": value for name, value in state.items()}
    return {name: value.clone() for name, value in found.items()}


def trained(steps: int, config: PoaConfig = CONFIG) -> SelfDistillation:
    run = SelfDistillation(config)
    for _ in range(steps):
        run.train_step(images())
    return run


def equal(a: SelfDistillation, b: SelfDistillation) -> bool:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_resumes_goes_on_exactly_as_if_it_had_not_stopped() -> None:
    """Sizes, data order, crops, masks, dropped paths and schedules: across the start of the masked
    patches and into the second epoch of images.
    """
    whole, first = trained(6), trained(3)
    saved = copy.deepcopy(first.state_dict())
    torch.manual_seed(12345)  # whatever another process has drawn
    second = SelfDistillation(CONFIG)
    second.load_state_dict(saved)
    results = [second.train_step(images()) for _ in range(3)]
    assert [result.step for result in results] == [3, 4, 5]
    assert not any(result.skipped for result in results)
    assert equal(whole, second)


def test_a_step_draws_nothing_from_global_generators() -> None:
    run = trained(2)
    before = torch.get_rng_state()
    run.train_step(images())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_other_settings_is_refused_with_both_values() -> None:
    state = trained(1).state_dict()
    other = SelfDistillation(replace(CONFIG, steps=99, seed=5))
    with pytest.raises(ModelError, match=r"seed: 0 there, 5 here; steps: 12 there, 99 here"):
        other.load_state_dict(state)


def test_images_are_read_once_per_epoch_and_from_any_slot_on() -> None:
    rows = batch_rows(CONFIG, 21, range(63))
    epochs = [rows[at : at + 21] for at in (0, 21, 42)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_rows(CONFIG, 21, range(30, 50)) == rows[30:50]
    assert batch_rows(replace(CONFIG, seed=1), 21, range(21)) != epochs[0]


def test_groups_draw_sizes_of_their_own_and_never_the_intact_one() -> None:
    drawn = [[CONFIG.drawn(step, group) for step in range(96)] for group in (0, 1)]
    assert drawn[0] != drawn[1]
    assert CONFIG.vit.size not in drawn[0] + drawn[1]
    assert set(drawn[0]) == set(CONFIG.sizes) - {CONFIG.vit.size}
    single = replace(CONFIG, widths=(16,), depths=(3,))
    assert single.drawn(7, 0) is None


def moved(run: SelfDistillation, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in tensors(run).items() if not torch.equal(value, before[name])}


def test_last_layers_rest_first_and_the_teacher_follows_the_student() -> None:
    run = trained(1)  # step 0 has no learning rate
    before = tensors(run)
    run.train_step(images())
    changed = moved(run, before)
    assert "student.heads.heads.0.mlp0.weight" in changed
    assert not [name for name in changed if name.startswith("student") and "last_layer" in name]
    run.train_step(images())
    assert {f"student.heads.heads.{at}.last_layer.weight" for at in range(4)} <= moved(run, before)
    before = tensors(run)
    run.train_step(images())
    share = schedules.momentum(CONFIG, 3)
    after = tensors(run)
    for name in ("vit.blocks.1.mlp.fc1.weight", "heads.heads.3.mlp1.weight"):
        expected = share * before[f"teacher.{name}"] + (1 - share) * after[f"student.{name}"]
        torch.testing.assert_close(after[f"teacher.{name}"], expected)


def test_every_head_teaches_and_learns() -> None:
    run = trained(3)
    run.train_step(images())
    for head in run.student.heads.heads:
        assert all(weight.grad is not None and weight.grad.any() for weight in head.parameters())


def test_the_network_extracted_is_the_teachers() -> None:
    run = trained(4)
    size = ViTSize(8, 2)
    plain = run.extract(size)
    found = plain(images()).cls_BW
    torch.testing.assert_close(found, run.teacher.vit(images(), size).cls_BW, atol=1e-5, rtol=0)
    assert not torch.allclose(found, run.student.vit(images(), size).cls_BW, atol=1e-5)
    assert set(plain.state_dict()) == set(run.teacher.vit.state_dict()) - {
        name for name in run.teacher.vit.state_dict() if name.startswith("blocks.2.")
    }


def test_no_xformers_and_no_distributed_package_is_used() -> None:
    trained(1)
    assert "xformers" not in sys.modules


def test_a_step_without_a_number_changes_nothing_and_the_next_one_trains() -> None:
    run = trained(3)
    before = tensors(run)
    result = run.train_step(torch.full((21, 1, 8, 8), float("nan")))
    assert result.skipped
    assert moved(run, before) == set()
    assert not run.train_step(images()).skipped
    assert run.step == 5


Report = tuple[list[tuple[float, bool, tuple[Any, ...]]], dict[str, np.ndarray]]


def on_ranks(world: Any, config: PoaConfig, steps: int, broken: tuple[int, int]) -> Report:
    """Train on one of several processes; at a step, one of them reads images without a number."""
    import torch.distributed as dist

    replicas = Replicas(world.rank, dist.get_world_size(), dist.all_reduce)
    run = SelfDistillation(config)
    told = []
    for step in range(steps):
        bad = (world.rank, step) == broken
        result = run.train_step(images() * float("nan") if bad else images(), replicas)
        told.append((result.loss, result.skipped, result.sizes))
    # as arrays: a tensor in a queue lives in a process that may be gone when it is read
    return told, {name: value.numpy() for name, value in tensors(run).items()}


def test_two_processes_with_sizes_of_their_own_train_what_one_trains() -> None:
    """Widths and depths differ between the two in the same step; then a step in which one process
    alone sees no number is left out by both, and both go on.
    """
    steps, bad = 6, 4
    one = SelfDistillation(CONFIG)
    broken = images() * float("nan")
    told = [one.train_step(broken if step == bad else images()) for step in range(steps)]
    (first, left), (second, right) = run_ranks(2, on_ranks, CONFIG, steps, (1, bad))
    sizes = [[drawn for _, _, (drawn,) in rank] for rank in (first, second)]
    assert [result.sizes for result in told] == list(zip(*sizes, strict=True))
    assert any(a.width != b.width for a, b in zip(*sizes, strict=True))
    assert any(a.depth != b.depth for a, b in zip(*sizes, strict=True))
    assert [skipped for _, skipped, _ in first] == [step == bad for step in range(steps)]
    for (loss, skipped, _), (other, again, _), alone in zip(first, second, told, strict=True):
        assert skipped == again == alone.skipped
        if not skipped:
            assert loss == other == pytest.approx(alone.loss, rel=1e-5)
    expected = tensors(one)
    assert left.keys() == right.keys() == expected.keys()
    for name, value in left.items():
        assert np.array_equal(value, right[name]), name
        torch.testing.assert_close(
            torch.from_numpy(value), expected[name], rtol=1e-5, atol=1e-5, msg=name
        )


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    example = page.partition("## Self-distilled ViTs")[2].partition("```python")[2]
    names: dict[str, Any] = {}
    exec(example.partition("```")[0], names)
    assert names["features"].shape == (200, 16)
    assert not names["result"].skipped


def test_groups_that_cannot_be_dealt_are_told() -> None:
    with pytest.raises(ModelError, match=r"groups=2 cannot be dealt to 4 processes; 4 would work"):
        SelfDistillation(CONFIG).train_step(images(), Replicas(0, 4))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"widths": (4, 16, 8)}, r"widths=\[4, 16, 8\] must rise and end with .* 16"),
        ({"widths": (4, 8)}, "must rise and end with the intact network's, 16"),
        ({"widths": (6, 16)}, "6 is no multiple of head_dim=4; 4 would work"),
        ({"depths": (0, 3)}, "depths: 0 must be at least 1"),
        ({"images_per_step": 7}, "images_per_step=7 cannot be dealt to groups=2"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"crops": CropConfig(16, 4)}, "global_size=16 must be the network's image_size, 8"),
        ({"crops": CropConfig(8, 3)}, "local_size=3 is no multiple of patch_size=4"),
        ({"heads": HeadConfig(())}, r"prototypes=\[\] must each be at least 2"),
        ({"temperature": (0.01, 0.07)}, "must be at least 0.03"),
        ({"intact_share": 0.0}, "intact_share=0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_told(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(CONFIG, **changed)
