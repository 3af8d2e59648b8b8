"""`bench/nested.py`: what is compared costs the same, and the table says what the arms lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks

pytest.importorskip("sklearn")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import nested

    return nested


def test_recipes_cost_what_all_sizes_alone_cost(bench: Any) -> None:
    budget = sum(bench.alone_flops(20).values())
    for recipe in bench.RECIPES:
        steps = bench.steps_for(recipe, 1, 20)
        assert bench.run_flops(recipe, 1, steps) <= budget < bench.run_flops(recipe, 1, steps + 1)
    assert bench.steps_for("joint", 1, 20) == 20  # every size in every step, as alone


def test_the_rate_falls_in_the_last_fifth_and_lengths_share_what_is_before(bench: Any) -> None:
    short, long = ([bench.rate(step, n) for step in range(n)] for n in (100, 300))
    assert short[:80] == long[:80]
    assert long[80:240] == [bench.LR] * 160
    assert np.all(np.diff(short[79:]) < 0)
    assert short[-1] == pytest.approx(bench.LR / 21)


def lengths(world: World) -> tuple[list[Any], list[Any]]:
    """Losses of three lengths that share their beginning, and of each trained by itself."""
    import sys

    sys.path.insert(0, str(BENCH))
    import nested

    made = np.random.default_rng(0).integers(0, 257, (64, nested.LENGTH + 1)).astype(np.int32)
    nested.text = lambda: (made, made[:8])
    nested._order.cache_clear()
    torch.set_num_threads(1)
    together = [row["losses"] for row in nested.alone_rows("small", 0, [5, 7, 9], world)]
    each = [next(nested.alone_rows("small", 0, [n], world))["losses"] for n in (5, 7, 9)]
    return together, each


def test_a_run_that_branches_off_is_the_run_of_its_length(bench: Any) -> None:
    together, each = run_ranks(1, lengths)[0]
    assert together == each


def row(bench: Any, arm: str, seed: int, steps: int, losses: dict[str, float]) -> dict[str, Any]:
    told = {"arm": arm, "seed": seed, "steps": steps, "losses": losses, "flops": 1.0}
    return {"settings": bench.fingerprint(arm, 400), **told}


def test_the_table_compares_each_member_with_itself_alone_seed_by_seed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "text", lambda: (np.zeros((10, 1)), None))
    rows = []
    for seed, gap in ((0, 0.9), (1, 1.1)):
        rows.append(row(bench, "sampled", seed, 900, dict.fromkeys(bench.SIZES, 2.0 * gap)))
        for name in bench.SIZES:
            rows.append(row(bench, f"alone-{name}", seed, 400, {name: 2.0}))
            rows.append(row(bench, f"alone-{name}", seed, 900, {name: 1.6}))
    rows.append(row(bench, "sampled", 2, 950, dict.fromkeys(bench.SIZES, 9.0)))  # nothing alone yet
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows, {**rows[0], "settings": "older"}]))
    (line,) = bench.summary(bench.kept_rows(path, 400), 400, 3)
    assert (line["recipe"], line["seeds"]) == ("sampled", [0, 1])
    assert line["mean_gap_equal_flops"] == pytest.approx(0.0)
    assert line["interval"] == pytest.approx([-1.2706, 1.2706], abs=1e-3)  # t of one: 12.7
    assert line["largest_gap_equal_tokens"] == pytest.approx(0.25)
    assert line["members"]["small"]["gap_equal_tokens"]["mean"] == pytest.approx(0.25)
