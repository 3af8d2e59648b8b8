"""`bench/poa_vit.py`: arms are kept, a stopped one goes on, and the table says what they scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import poa_vit

    return poa_vit


def test_an_arm_that_is_stopped_ends_as_one_that_is_not(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "KEPT_EVERY_STEPS", 2)
    images = bench.digits()[0][: bench.TRAINED_ON]
    config = bench.arm_settings("poa", 0, 4)
    whole, _ = bench.train(config, images, tmp_path / "whole.pt")
    real, left = bench.SelfDistillation.train_step, [3]

    def stops(self: Any, *arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, *arguments)

    monkeypatch.setattr(bench.SelfDistillation, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        bench.train(config, images, tmp_path / "stopped.pt")
    left[0] = 2
    again, _ = bench.train(config, images, tmp_path / "stopped.pt")
    ours, theirs = whole.teacher.state_dict(), again.teacher.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def row(bench: Any, arm: str, seed: int, knn: dict[str, float]) -> dict[str, Any]:
    return {
        "settings": bench.fingerprint(1000),
        "arm": arm,
        "seed": seed,
        "knn": knn,
        "untrained": knn,
        "flops": 1.0,
    }


def test_the_table_compares_members_seed_by_seed(bench: Any, tmp_path: Path) -> None:
    rows = []
    for seed, gain in ((0, 0.1), (1, 0.2)):
        score = {"small": 0.5, "middle": 0.6, "large": 0.7}
        rows += [row(bench, f"alone-{name}", seed, {name: score[name]}) for name in score]
        rows[-1]["knn"] = {"small": 0.1, "middle": 0.2, "large": 0.7}
        rows.append(row(bench, "poa", seed, {name: value + gain for name, value in score.items()}))
    rows.append(row(bench, "poa", 2, {"small": 1.0, "middle": 1.0, "large": 1.0}))  # others missing
    path = tmp_path / "kept.json"
    path.write_text(json.dumps([*rows, {**rows[0], "settings": "others"}]))
    small, middle, large = bench.summary(bench.kept_rows(path, 1000))
    assert small["seeds"] == [0, 1]
    assert small["poa_minus_alone"]["mean"] == pytest.approx(0.15)
    assert small["poa_minus_alone"]["error"] == pytest.approx(0.05)
    assert middle["poa_minus_slice"]["values"] == pytest.approx([0.5, 0.6])
    assert large["knn_alone"]["mean"] == large["knn_slice"]["mean"] == 0.7
    assert list(bench.summary([])) == []


def test_the_elastic_student_costs_its_own_size(bench: Any) -> None:
    alone, poa = bench.arm_settings("alone-large", 0, 1000), bench.arm_settings("poa", 0, 1000)
    costs = [bench.flops(poa, step) - bench.flops(alone, step) for step in range(200, 280)]
    sizes = [poa.drawn(step, 0) for step in range(200, 280)]
    by_size = dict(zip(sizes, costs, strict=True))
    assert len(by_size) == 8
    assert all(by_size[size] == cost for size, cost in zip(sizes, costs, strict=True))
    assert by_size[bench.ViTSize(16, 2)] == min(costs)
    assert max(costs) < 3 / 4 * bench.flops(alone, 200)  # a student is 3 of the 4 passes
