"""Members of one nested run against models of the same sizes trained alone.

    python bench/nested.py --json            train what is missing, then print the table
    python bench/nested.py --summary --json  print the table from what is kept, train nothing

Bytes of presidents' speeches (`speeches.jsonl` under $MOTET_SHARED, 2.9 MB; every tenth speech is
held out), one process, one thread, float32. All arms of a seed read the same sequences in the same
order. Losses are nats per byte over the same held-out sequences.

    RECIPE        one nested run; its length is where its FLOPs reach those of all sizes trained
                  alone for `--steps` steps
    alone-MEMBER  that size alone. Equal FLOPs: `--steps` steps each. Equal tokens: as many steps
                  as the recipe has.

The learning rate is warmed up, constant, then falls to 0 over the last fifth of a run, so runs of
one size that differ in length share their first stretch, which is trained once: each length
branches off where its rate begins to fall, and is the run of that length to the last bit.

An arm that ends is rows of `--results`. FLOPs are those that ran: three passes for who learns, one
for a teacher that does not.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from poa_vit import ARMS as VIT_ARMS
from poa_vit import RESULTS as VIT_RESULTS
from poa_vit import kept_rows as vit_rows
from poa_vit import summary as vit_summary
from scipy import stats

from motet.core.files import write_json
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding, training_flops_per_token
from motet.models.family.base import (
    Choice,
    Family,
    Member,
    StepChoices,
    Term,
    choices,
    teacher_update_of,
)
from motet.models.family.costs import choice_flops
from motet.models.family.nested import NestedFamily
from motet.models.member import names_in
from motet.parallel.engines.native import NativeEngine
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, join, leave

SPEECHES = Path(os.environ.get("MOTET_SHARED", "/work/shared")) / "data" / "speeches.jsonl"
RESULTS = Path(__file__).parent / "results" / "nested.json"
END_OF_DOCUMENT = 256
WHOLE = ModelConfig(257, 96, 4, 4, 4, 256, tied_embeddings=True)
MEMBERS = {
    "small": {"n_layers": 2, "d_ffn": 0.25, "n_kv_heads": 0.5},
    "middle": {"n_layers": 3, "d_ffn": 0.5, "n_kv_heads": 0.5},
    "large": {"n_layers": 4, "d_ffn": 0.75},
}
SIZES = (*MEMBERS, "whole")
SEQUENCES, LENGTH = 16, 128
HELD_OUT = 384
LR, WARMUP_STEPS, FALL = 3e-3, 40, 0.2
AFTER_WARMUP = {"distill_from_step": WARMUP_STEPS, "distill_weight": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "sampled": {"sampler": "matformer"},
    "sortednet": {"sampler": "sortednet", "draws": 4},
    "sandwich": {"sampler": "sandwich"},
    "sandwich-distill": {"sampler": "sandwich", "loss": "distill", **AFTER_WARMUP},
    "joint": {"sampler": "joint"},
    "poa-lm": {"sampler": "poa"},
    # Phases of Once-for-All, which end at these shares of the run; the teacher is the whole model
    # as it was at the end of the first.
    "ofa": {
        "sampler": "shrinking",
        "draws": 4,
        "loss": "distill",
        "teacher": "frozen",
        "phases": [
            {"until_step": 0.4, "smallest": "whole"},
            {"until_step": 0.6, "smallest": "large"},
            {"until_step": 0.8, "smallest": "middle"},
            {"smallest": "small"},
        ],
    },
}


class Micro(NamedTuple):
    tokens_BT: npt.NDArray[np.int32]
    labels_BT: npt.NDArray[np.int64]
    document_ids_BT: None = None


@lru_cache(maxsize=1)
def text() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Sequences to train on and held out, each [N, LENGTH + 1]; they do not overlap."""
    parts: tuple[list[int], list[int]] = ([], [])
    for number, line in enumerate(SPEECHES.open(encoding="utf-8")):
        parts[number % 10 == 9].extend([*json.loads(line)["text"].encode(), END_OF_DOCUMENT])
    cut = [len(part) // (LENGTH + 1) * (LENGTH + 1) for part in parts]
    train, held = (
        np.array(part[:n], dtype=np.int32).reshape(-1, LENGTH + 1)
        for part, n in zip(parts, cut, strict=True)
    )
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(held))
    return train, held[np.sort(order[:HELD_OUT])]


def batch(seed: int, step: int) -> npt.NDArray[np.int32]:
    """The sequences of a step [SEQUENCES, LENGTH + 1]: every epoch has an order of its own."""
    train, _ = text()
    places = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
    epochs = places // len(train)
    found = [_order(seed, int(e))[p % len(train)] for e, p in zip(epochs, places, strict=True)]
    return train[found]


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int) -> npt.NDArray[np.int64]:
    key = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return key.permutation(len(text()[0]))


def micro_batches(rows: npt.NDArray[np.int32], parts: int) -> list[Micro]:
    return [Micro(p[:, :-1], p[:, 1:].astype(np.int64)) for p in np.split(rows, parts)]


def family(recipe: str, seed: int, steps: int) -> NestedFamily:
    """The family of a recipe; phases that are written as shares end at steps of this run."""
    options = copy.deepcopy(RECIPES[recipe])
    for phase in options.get("phases", ()):
        if "until_step" in phase:
            phase["until_step"] = round(phase["until_step"] * steps)
    return NestedFamily(WHOLE, {"members": MEMBERS, **options}, seed)


def members() -> dict[str, Member]:
    return {member.name: member for member in family("sampled", 0, 0).members()}


def config_of(member: Member | None) -> ModelConfig:
    return WHOLE if member is None else member.config


def who_trains(made: NestedFamily, step: int) -> list[Choice]:
    """One choice for each share of a step."""
    draws = made.draws or 1
    known = {member.name: member for member in made.members()}
    return choices(made, known, step, draws) or [(Term(None),)] * draws


def run_flops(recipe: str, seed: int, steps: int) -> float:
    """FLOPs of a nested run of so many steps."""
    made = family(recipe, seed, steps)
    tokens = SEQUENCES * LENGTH
    return sum(
        choice_flops(choice, WHOLE, LENGTH) * tokens / len(shares)
        for shares in (who_trains(made, step) for step in range(steps))
        for choice in shares
    )


def alone_flops(steps: int) -> dict[str, float]:
    """FLOPs of every size trained alone."""
    known: dict[str, Member | None] = {**members(), "whole": None}
    tokens = SEQUENCES * LENGTH
    return {
        name: training_flops_per_token(config_of(known[name]), LENGTH) * tokens * steps
        for name in SIZES
    }


@lru_cache(maxsize=64)
def steps_for(recipe: str, seed: int, steps: int) -> int:
    """Steps at which a recipe has used what all sizes alone use in `steps` steps each."""
    budget, low, high = sum(alone_flops(steps).values()), 1, 8 * steps
    while low < high:
        middle = (low + high + 1) // 2
        if run_flops(recipe, seed, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def rate(step: int, steps: int) -> float:
    """Learning rate of a step in a run of so many."""
    fall = steps - falls_at(steps)
    return LR * min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / (fall + 1))


def falls_at(steps: int) -> int:
    return steps - round(FALL * steps)


class Trainer:
    """One model under training, and the processor time it took."""

    def __init__(
        self, config: ModelConfig, seed: int, world: World, made: Family | None = None
    ) -> None:
        self.family, draws = made, (made.draws or 1) if made else 1
        options = EngineOptions(seed=seed, teacher=made is not None and made.has_teacher)
        layout = Layout(micro_sequences=SEQUENCES // draws)
        self.engine = NativeEngine(config, options, layout, world)
        self.seed, self.seconds = seed, 0.0

    def step(self, step: int, lr: float, chosen: Sequence[Choice]) -> None:
        began = time.process_time()
        names = tuple(dict.fromkeys(name for choice in chosen for name in names_in(choice)))
        update = None if self.family is None else teacher_update_of(self.family, step)
        who = StepChoices(tuple(chosen), names, tuple(chosen), update)
        rows = micro_batches(batch(self.seed, step), len(chosen))
        self.engine.step(rows, lr, lambda *_: True, lambda: False, who)
        self.seconds += time.process_time() - began

    def kept(self) -> Any:
        """A copy of weights and optimizer, to come back to."""
        engine = self.engine
        return copy.deepcopy((engine.decoders[0].state_dict(), engine.optimizer.state_dict()))

    def go_back(self, kept: Any) -> None:
        model, optimizer = copy.deepcopy(kept)
        self.engine.decoders[0].load_state_dict(model)
        self.engine.optimizer.load_state_dict(optimizer)

    @torch.no_grad()
    def loss(self, member: Member | None) -> float:
        """Mean over the held-out sequences, nats per byte."""
        rows = torch.from_numpy(text()[1].astype(np.int64))
        model, total, labels = self.engine.decoders[0], 0.0, 0
        for part in rows.split(64):
            sums = model(part[:, :-1], part[:, 1:], mode="loss", member=member)
            total, labels = total + float(sums.cross_entropy), labels + part[:, 1:].numel()
        return total / labels


def nested_rows(recipe: str, seed: int, steps: int, world: World) -> list[dict[str, Any]]:
    """Train one recipe; its row."""
    length = steps_for(recipe, seed, steps)
    made = family(recipe, seed, length)
    assert made.problems(length) == []
    trainer = Trainer(WHOLE, seed, world, made)
    for step in range(length):
        trainer.step(step, rate(step, length), who_trains(made, step))
    known: dict[str, Member | None] = {**members(), "whole": None}
    row = {
        "arm": recipe,
        "steps": length,
        "losses": {name: trainer.loss(known[name]) for name in SIZES},
        "flops": run_flops(recipe, seed, length),
    }
    return [row | {"cpu_s": round(trainer.seconds, 1)}]


def alone_rows(
    member: str, seed: int, lengths: Sequence[int], world: World
) -> Iterator[dict[str, Any]]:
    """Train one size for several lengths that share their first stretch; a row for each."""
    known: dict[str, Member | None] = {**members(), "whole": None}
    trainer = Trainer(config_of(known[member]), seed, world)
    plain, at = [(Term(None),)], 0
    for length in sorted(lengths, key=falls_at):
        for step in range(at, at := falls_at(length)):
            trainer.step(step, rate(step, 2 * max(lengths)), plain)
        kept = trainer.kept()
        for step in range(at, length):
            trainer.step(step, rate(step, length), plain)
        yield {
            "arm": f"alone-{member}",
            "steps": length,
            "losses": {member: trainer.loss(None)},
            "flops": alone_flops(length)[member],
            "cpu_s": round(trainer.seconds, 1),
        }
        trainer.go_back(kept)


def fingerprint(arm: str, steps: int) -> str:
    """What a kept row must have been made with to count; fields that a config got later, and that
    are at their defaults here, change nothing.
    """
    whole = {f.name: getattr(WHOLE, f.name) for f in fields(WHOLE)}
    told: list[Any] = [{f.name: whole[f.name] for f in fields(WHOLE) if whole[f.name] != f.default}]
    told += [MEMBERS, SEQUENCES, LENGTH, HELD_OUT, LR, WARMUP_STEPS, FALL]
    told += [RECIPES.get(arm, arm), steps if arm in RECIPES else 0]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def kept_rows(results: Path, steps: int) -> list[dict[str, Any]]:
    rows = json.loads(results.read_text()) if results.exists() else []
    return [row for row in rows if row["settings"] == fingerprint(row["arm"], steps)]


def train_missing(results: Path, seeds: int, steps: int, recipes: Sequence[str]) -> None:
    """Train what the results file lacks, seed by seed."""
    results.parent.mkdir(parents=True, exist_ok=True)
    world = join("cpu")
    for seed in range(seeds):
        lengths = {steps, *(steps_for(recipe, seed, steps) for recipe in recipes)}
        for arm in (*recipes, *(f"alone-{name}" for name in SIZES)):
            rows = kept_rows(results, steps)
            there = {r["steps"] for r in rows if (r["arm"], r["seed"]) == (arm, seed)}
            if arm in RECIPES:
                made = iter(() if there else nested_rows(arm, seed, steps, world))
            else:
                missing = lengths - there
                name = arm.removeprefix("alone-")
                made = alone_rows(name, seed, sorted(missing), world) if missing else iter(())
            for row in made:
                told = {"settings": fingerprint(arm, steps), "seed": seed, **row}
                rows.append(told)
                write_json(results, rows)
                print(json.dumps(told), file=sys.stderr)
    leave()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval (Student's t; None for one seed)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "interval": None}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def summary(rows: Sequence[Mapping[str, Any]], steps: int, asked: int) -> Iterator[dict[str, Any]]:
    """One line per recipe over the seeds of which every arm is there; gaps are shares of the loss
    alone, negative is better.
    """
    by = {(row["arm"], row["seed"], row["steps"]): row for row in rows}
    known: dict[str, Member | None] = {**members(), "whole": None}
    for recipe in RECIPES:
        nested = {seed: row for (arm, seed, _), row in by.items() if arm == recipe}
        gaps: dict[str, dict[str, list[float]]] = {name: {} for name in SIZES}
        seeds = []
        for seed, row in sorted(nested.items()):
            lengths = {"flops": steps, "tokens": row["steps"]}
            alone = {
                (name, kind): by.get((f"alone-{name}", seed, length))
                for name, (kind, length) in itertools.product(SIZES, lengths.items())
            }
            if None in alone.values() or seed >= asked:
                continue
            seeds.append(seed)
            for (name, kind), other in alone.items():
                assert other is not None
                lost, without = row["losses"][name], other["losses"][name]
                gaps[name].setdefault(kind, []).append(lost / without - 1.0)
                gaps[name].setdefault("loss", []).append(lost)
                gaps[name].setdefault(f"loss_alone_{kind}", []).append(without)
        if not seeds:
            continue
        means = np.mean([gaps[name]["flops"] for name in SIZES], axis=0).tolist()
        mean = spread(means)
        largest = spread(gaps["whole"]["tokens"])
        yield {
            "recipe": recipe,
            "seeds": seeds,
            "members": {
                name: {
                    "parameters": parameters_non_embedding(config_of(known[name])),
                    "loss": float(np.mean(gaps[name]["loss"])),
                    "loss_alone_equal_flops": float(np.mean(gaps[name]["loss_alone_flops"])),
                    "loss_alone_equal_tokens": float(np.mean(gaps[name]["loss_alone_tokens"])),
                    "gap_equal_flops": spread(gaps[name]["flops"]),
                    "gap_equal_tokens": spread(gaps[name]["tokens"]),
                }
                for name in SIZES
            },
            "mean_gap_equal_flops": mean["mean"],
            "interval": mean["interval"],
            "largest_gap_equal_tokens": largest["mean"],
            "largest_interval": largest["interval"],
            "flops": float(np.mean([nested[seed]["flops"] for seed in seeds])),
            "flops_alone": sum(alone_flops(steps).values()),
            "tokens": float(np.mean([nested[seed]["steps"] for seed in seeds]))
            * SEQUENCES
            * LENGTH,
            "tokens_alone": steps * SEQUENCES * LENGTH,
            "epochs": float(np.mean([nested[s]["steps"] for s in seeds]))
            * SEQUENCES
            / len(text()[0]),
        }


def vit_lines(seeds: int) -> Iterator[dict[str, Any]]:
    """k-NN accuracy of members of the POA run of bench/poa_vit.py, and of sizes alone."""
    rows = [row for row in vit_rows(VIT_RESULTS, 1000) if row["arm"] in VIT_ARMS]
    for line in vit_summary(rows):
        yield {
            "member": line["member"],
            "knn": line["knn"]["mean"],
            "knn_alone": line["knn_alone"]["mean"],
            "seeds": line["seeds"],
            "poa_minus_alone": line["poa_minus_alone"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of every size alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if not asked.summary:
        train_missing(asked.results, asked.seeds, asked.steps, asked.recipes)
    rows = kept_rows(asked.results, asked.steps)
    lines = list(summary(rows, asked.steps, asked.seeds))
    if lacking := [r for r in asked.recipes if r not in {line["recipe"] for line in lines}]:
        print(f"not trained yet: {', '.join(lacking)}", file=sys.stderr)
    if asked.json:
        print(json.dumps([*lines, *vit_lines(asked.seeds)], indent=1))
        return
    for line in lines:
        where = line["interval"] or (float("nan"),) * 2
        print(
            f"{line['recipe']:18} {line['mean_gap_equal_flops']:+8.2%} "
            f"({where[0]:+.2%} to {where[1]:+.2%})  "
            f"largest at equal tokens {line['largest_gap_equal_tokens']:+.2%}"
        )


if __name__ == "__main__":
    main()
