"""What a nested family costs in time and memory, against plain models of its sizes.

    python bench/nested_cost.py --json            measure what is missing, then print the table
    python bench/nested_cost.py --summary --json  print the table from what is kept, measure nothing

Time: a step of `--draws` micro-batches, each with one of the family's sizes, every size equally
often, against steps of as many micro-batches of the plain model of each size. In each round every
arm makes one step, one after the other, so that what else the machine does reaches all alike. The
`ratio` of a round is the nested step over the mean of the plain ones, which is their mean over the
draw; the median over rounds is told. A plain model updates its own weights only: with few
micro-batches a nested step, which updates all, cannot be as cheap, so `ratio_of_passes` leaves the
update out of both.

Memory: each arm in a process of its own, the peak of its resident memory after two steps, less what
it was before the engine was made. `whole` trains the largest size alone; `sampled` one member per
micro-batch; `joint` and `distill` every member on each.

One process, one thread, fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from motet.core.files import write_json
from motet.models.config import ModelConfig
from motet.models.counts import parameters, training_flops_per_token
from motet.models.family.nested import NestedFamily
from motet.models.member import Choice, Member, StepChoices, Term
from motet.parallel.engines.native import NativeEngine
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, join, leave

RESULTS = Path(__file__).parent / "results" / "nested_cost.json"
SEQUENCES, LENGTH = 2, 256
WHOLE = ModelConfig(2048, 256, 8, 8, 8, 768)
MEMBERS = {
    "depth": {"n_layers": 4},
    "ffn": {"d_ffn": 0.5},
    "width": {"d_model": 0.5, "n_kv_heads": 0.5, "d_ffn": 0.5},
    "small": {"d_model": 0.5, "n_kv_heads": 0.5, "d_ffn": 0.5, "n_layers": 4},
}
GROUPS = {"prefix": 1, "groups-2": 2}
MEMORY = ("whole", "sampled", "joint", "distill")


@dataclass
class Micro:
    tokens_BT: npt.NDArray[np.int32]
    labels_BT: npt.NDArray[np.int64]
    document_ids_BT: None = None


def family(groups: int) -> list[Member | None]:
    """The sizes, the whole model last."""
    options = {"members": MEMBERS, "groups": groups, "monotone": False}
    return [*NestedFamily(WHOLE, options, 0).members(), None]


def micro_batches(step: int, n: int) -> list[Micro]:
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, WHOLE.vocabulary_size, (n, SEQUENCES, LENGTH + 1))
    return [Micro(one[:, :-1].astype(np.int32), one[:, 1:].astype(np.int64)) for one in tokens]


class Arm:
    """An engine, and who trains in its steps."""

    def __init__(self, config: ModelConfig, world: World, choices: list[Choice] | None) -> None:
        layout = Layout(micro_sequences=SEQUENCES)
        self.engine = NativeEngine(config, EngineOptions(), layout, world)
        self.choices, self.passes_s = choices, 0.0
        inner = self.engine._forward_backward

        def timed(*arguments: Any) -> torch.Tensor:
            start = time.perf_counter()
            found = inner(*arguments)
            self.passes_s = time.perf_counter() - start
            return found

        self.engine._forward_backward = timed  # type: ignore[method-assign]

    def step(self, number: int, draws: int) -> tuple[float, float]:
        """Make a step; return its seconds, and those of its passes alone."""
        batches = micro_batches(number, draws)
        who = None
        if self.choices is not None:
            names = tuple(
                dict.fromkeys(t.member and t.member.name for c in self.choices for t in c)
            )
            mine = tuple(self.choices[i % len(self.choices)] for i in range(draws))
            who = StepChoices(mine, names)
        start = time.perf_counter()
        self.engine.step(batches, 1e-4, lambda *_: True, lambda: False, who)
        return time.perf_counter() - start, self.passes_s


def sampled(sizes: list[Member | None]) -> list[Choice]:
    return [(Term(member),) for member in sizes]


def measure_time(world: World, groups: int, rounds: int, draws: int) -> dict[str, Any]:
    """Return seconds of a nested step and of plain steps, and the median of their ratios."""
    sizes = family(groups)
    names = [member.name if member else "whole" for member in sizes]
    plain = [Arm(WHOLE if m is None else m.config, world, None) for m in sizes]
    arms = [Arm(WHOLE, world, sampled(sizes)), *plain]
    seconds: list[list[tuple[float, float]]] = []
    for number in range(rounds + 1):
        order = arms if number % 2 == 0 else arms[::-1]
        found = {id(arm): arm.step(number, draws) for arm in order}
        if number:  # the first makes what is made once
            seconds.append([found[id(arm)] for arm in arms])
    array = np.array(seconds)  # [rounds, nested and plain, whole step and passes]
    ratios = array[:, 0] / array[:, 1:].mean(1)
    middle = np.median(array, 0)
    low, high = np.quantile(ratios[:, 0], [0.25, 0.75])
    flops = [training_flops_per_token(m.config if m else WHOLE, LENGTH) for m in sizes]
    return {
        "draws": draws,
        "rounds": rounds,
        "ratio": float(np.median(ratios[:, 0])),
        "ratio_quartiles": [float(low), float(high)],
        "ratio_of_passes": float(np.median(ratios[:, 1])),
        "nested_s": float(middle[0, 0]),
        "plain_s": dict(zip(names, middle[1:, 0].tolist(), strict=True)),
        "flops_share": dict(zip(names, [f / flops[-1] for f in flops], strict=True)),
    }


def measure_memory(world: World, arm: str, draws: int) -> dict[str, Any]:
    """Return the peak of resident memory over two steps, of this process alone."""
    sizes = family(1)
    each = 1.0 / len(sizes)
    follow = [Term(None, each), *(Term(m, each / 2, each / 2, None) for m in sizes[:-1])]
    choices: dict[str, list[Choice] | None] = {
        "whole": None,
        "sampled": sampled(sizes),
        "joint": [tuple(Term(member, each) for member in reversed(sizes))],
        "distill": [tuple(follow)],
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = Arm(WHOLE, world, choices[arm])
    for number in range(2):
        made.step(number, draws)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "weights_mib": parameters(WHOLE) * 4 / 2**20}


def summary(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, memory as a ratio to the largest size alone."""
    found: dict[str, Any] = {
        "time": {name: kept[f"time-{name}"] for name in GROUPS if f"time-{name}" in kept},
    }
    whole = kept.get("memory-whole", {}).get("mib")
    found["memory"] = {
        arm: {**kept[f"memory-{arm}"], "ratio": kept[f"memory-{arm}"]["mib"] / whole}
        for arm in MEMORY
        if whole and f"memory-{arm}" in kept
    }
    found["missing"] = [name for name in all_arms() if name not in kept]
    return found


def all_arms() -> list[str]:
    return ["time-prefix", *(f"memory-{arm}" for arm in MEMORY), "time-groups-2"]


def processor() -> str:
    """The kind of processor, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    known = [key for key in ("model name", "cpu family", "model") if key in facts]
    return ", ".join(f"{key} {facts[key]}" for key in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    parser.add_argument("--arm", choices=all_arms(), help="measure this one here, and print it")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=5, help="micro-batches of a step")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.draws % (len(MEMBERS) + 1):
        parser.error(f"--draws={options.draws} is no multiple of {len(MEMBERS) + 1} sizes")
    if options.arm:
        torch.set_num_threads(1)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        world = join("cpu")
        kind, _, name = options.arm.partition("-")
        if kind == "time":
            found = measure_time(world, GROUPS[name], options.rounds, options.draws)
        else:
            found = measure_memory(world, name, options.draws)
        leave()
        print(json.dumps({**found, "processor": processor()}))
        return
    kept = json.loads(options.results.read_text()) if options.results.exists() else {}
    for arm in () if options.summary else [arm for arm in all_arms() if arm not in kept]:
        same = ["--rounds", str(options.rounds), "--draws", str(options.draws)]
        command = [sys.executable, __file__, "--arm", arm, *same]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept[arm] = json.loads(done.stdout.splitlines()[-1])
        write_json(options.results, kept)
        print(arm, kept[arm], file=sys.stderr)
    print(json.dumps(summary(kept), indent=None if options.json else 2))


if __name__ == "__main__":
    main()
