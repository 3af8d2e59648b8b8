"""What `bench/progressive.py` trains: one function an arm, each from a seed to a row.

An arm is a run of stages on one stream of sequences; nothing is read twice. It says what its
training cost, and its held-out loss along the way, so that two arms can be compared at one loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding, training_flops_per_token
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.stage_lengths import RunShape
from motet.models.growth.growth import Growth, grow
from motet.models.growth.learned import LearnedGrowth, learn
from motet.models.growth.multilevel import blended, digests
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState
from motet.parallel.engines.native import NativeEngine
from motet.parallel.engines.protocol import EngineOptions
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World

END_OF_DOCUMENT = 256
SEQUENCES, LENGTH = 16, 128
TOKENS = SEQUENCES * LENGTH
HELD_OUT, HELD_OUT_OFTEN, EVERY = 384, 96, 25
WHOLE = ModelConfig(257, 64, 8, 4, 4, 128)
SHALLOW = replace(WHOLE, n_layers=2)
HALF = {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "d_ffn": 64}
NARROW = replace(WHOLE, **HALF)  # type: ignore[arg-type]
SMALL = replace(NARROW, n_layers=4)
WARMUP_STEPS, REWARM_STEPS, FALL = 40, 20, 0.2
BASE_STEPS, GROWN_STEPS, SCRATCH_STEPS, TUNING_STEPS = 300, 400, 800, 300
LEARN_STEPS = 100
FAMILY_STEPS = 720
"""Of the largest member alone; smaller ones have as many tokens for each parameter."""
FAMILY_DEPTHS = ("1/8", "1/4", "1/2")
CYCLE = {"large": 60, "small": 300, "grown": 350, "alpha": 0.5}
INCREMENT = {"depths": (2, 4, 6, 8), "phase": 50, "after": 300}
State = dict[str, WeightState]
Rate = Callable[[int], float]


class Rows(NamedTuple):
    """One micro-batch."""

    tokens_BT: npt.NDArray[np.int32]
    labels_BT: npt.NDArray[np.int64]
    document_ids_BT: None = None


class Text:
    """Bytes of speeches in sequences; every tenth speech is held out.

    Args:
        path: JSON lines with "text".
        seed: of the order; every epoch has its own.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.train, self.held = _sequences(path)
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._ordered)

    def batch(self, step: int) -> Rows:
        """Return the sequences of a step [SEQUENCES, LENGTH]."""
        places = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
        found = [self._order(int(p) // len(self.train))[p % len(self.train)] for p in places]
        rows = self.train[found]
        return Rows(rows[:, :-1], rows[:, 1:].astype(np.int64))

    def _ordered(self, epoch: int) -> npt.NDArray[np.int64]:
        key = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return key.permutation(len(self.train))


@lru_cache(maxsize=1)
def _sequences(path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    parts: tuple[list[int], list[int]] = ([], [])
    for number, line in enumerate(path.open(encoding="utf-8")):
        parts[number % 10 == 9].extend([*json.loads(line)["text"].encode(), END_OF_DOCUMENT])
    cut = [len(part) // (LENGTH + 1) * (LENGTH + 1) for part in parts]
    train, held = (
        np.array(part[:n], dtype=np.int32).reshape(-1, LENGTH + 1)
        for part, n in zip(parts, cut, strict=True)
    )
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(held))
    return train, held[order[:HELD_OUT]]


class Run:
    """A model under training: its engine, the step, what it cost, and its losses along the way.

    Attributes:
        curve: [FLOPs so far, tokens so far, held-out loss in nats per byte], every 25 steps.
    """

    def __init__(self, text: Text, world: World, config: ModelConfig) -> None:
        self.text, self.world, self.began = text, world, time.process_time()
        self.at, self.flops = 0, 0.0
        self.curve: list[list[float]] = []
        self._become(config)

    def _become(self, config: ModelConfig) -> None:
        self.config = config
        options, layout = EngineOptions(seed=self.text.seed), Layout(micro_sequences=SEQUENCES)
        self.engine = NativeEngine(config, options, layout, self.world)
        self.grew_at, self.new = self.at, {}  # type: tuple[int, dict[str, Tensor]]

    def state(self) -> State:
        """Return weights and optimizer, by name."""
        return {name: _copied(state) for name, state in self.engine.export_state()}

    def take(self, config: ModelConfig, states: Iterable[tuple[str, WeightState]]) -> None:
        """Go on as another model."""
        self._become(config)
        self.engine.import_state(states)
        self.note()

    def grow(self, target: ModelConfig, name: str, **options: Any) -> Growth:
        """Grow by an operator, optimizer state as it says."""
        growth = operator(name, seed=self.text.seed, **options).growth(self.config, target)
        self.take(target, grow(growth, self.state().items()))
        return growth

    def train(self, steps: int, rate: Rate, passes: float = 3.0, often: bool = True) -> None:
        """Train some steps.

        Args:
            rate: learning rate of the n-th step since the model is what it is.
            passes: of three passes (forward, two backward) those that a step needs.
            often: note the loss on the way.
        """
        per_step = training_flops_per_token(self.config, LENGTH) * TOKENS * passes / 3
        for _ in range(steps):
            before = {name: self.engine.parameters[name].detach().clone() for name in self.new}
            lr = rate(self.at - self.grew_at)
            self.engine.step([self.text.batch(self.at)], lr, lambda *_: True, lambda: False)
            self._rewarm(before)
            self.at += 1
            self.flops += per_step
            if often and self.at % EVERY == 0:
                self.note()

    @torch.no_grad()
    def _rewarm(self, before: Mapping[str, Tensor]) -> None:
        """Give what is new a learning rate of its own: AdamW moves a weight in proportion to it."""
        if not before:
            return
        share = 1.3 * (self.at - self.grew_at + 1) / (2 * REWARM_STEPS)
        for name, old in before.items():
            now = self.engine.parameters[name]
            now.copy_(torch.where(self.new[name], old + (now - old) * share, now))
        if share >= 1.3:
            self.new = {}

    def note(self) -> None:
        """Note the loss on a part of what is held out."""
        self.curve.append([self.flops, self.at * TOKENS, self.loss(HELD_OUT_OFTEN)])

    @torch.no_grad()
    def loss(self, sequences: int = HELD_OUT) -> float:
        """Return the held-out loss, nats per byte."""
        logprob_NV = self.logprobs(sequences)
        labels_N1 = torch.from_numpy(self.text.held[:sequences, 1:].astype(np.int64)).reshape(-1, 1)
        return -float(logprob_NV.gather(1, labels_N1).double().mean())

    @torch.no_grad()
    def logprobs(self, sequences: int = HELD_OUT) -> Tensor:
        """Return the log-probabilities of all bytes at every held-out place, [N, V]."""
        model = self.engine.decoders[0]
        rows = torch.from_numpy(self.text.held[:sequences, :-1].astype(np.int64))
        parts = [functional.log_softmax(model(part), -1) for part in rows.split(48)]
        return torch.cat(parts).flatten(0, 1)

    def row(self, **more: Any) -> dict[str, Any]:
        """Return what is kept of an arm."""
        cpu_s = round(time.process_time() - self.began, 1)
        return {
            "loss": self.loss(),
            "flops": self.flops,
            "cpu_s": cpu_s,
            "curve": self.curve,
        } | more


def _copied(state: WeightState) -> WeightState:
    return {key: value.clone() for key, value in state.items()}


def constant(lr: float, warmup_steps: int) -> Rate:
    """A rate that is warmed up and stays, so that curves can be compared wherever they end."""
    return lambda step: lr * min(1.0, (step + 1) / warmup_steps) if warmup_steps else lr


def falling(lr: float, steps: int) -> Rate:
    """A rate that is warmed up, stays, and falls to 0 over the last fifth."""
    warmup, fall = min(WARMUP_STEPS, steps // 5), round(FALL * steps)
    return lambda step: lr * min((step + 1) / warmup, 1.0, (steps - step) / (fall + 1))


def begun(text: Text, world: World, config: ModelConfig, lr: float, steps: int) -> Run:
    """Return a base after some steps."""
    run = Run(text, world, config)
    run.train(steps, constant(lr, WARMUP_STEPS))
    return run


def scratch(text: Text, world: World, lr: float) -> dict[str, Any]:
    """The whole model from the first step."""
    return begun(text, world, WHOLE, lr, SCRATCH_STEPS).row()


def tuning(text: Text, world: World, lr: float) -> dict[str, Any]:
    """A shorter one, to choose the learning rate by."""
    return begun(text, world, WHOLE, lr, TUNING_STEPS).row()


def grown(base: ModelConfig, name: str, **options: Any) -> Callable[..., dict[str, Any]]:
    """A base, grown once."""

    def arm(text: Text, world: World, lr: float) -> dict[str, Any]:
        run = begun(text, world, base, lr, BASE_STEPS)
        growth = run.grow(WHOLE, name, **options)
        asymmetric = name == "sparkling"
        if asymmetric:  # what is old keeps its rate; what is new is warmed up beside it
            found = {one: growth.new_elements(one) for one in run.engine.parameters}
            run.new = {one: mask for one, mask in found.items() if mask is not None}
        run.train(GROWN_STEPS, constant(lr, 0 if asymmetric else REWARM_STEPS))
        return run.row()

    return arm


def vcycle(text: Text, world: World, lr: float) -> dict[str, Any]:
    """A little of the large model, a small one of it, and the large one blended with that."""
    run = begun(text, world, WHOLE, lr, int(CYCLE["large"]))
    large = run.state()
    known = digests(large.items())
    run.grow(SMALL, "coalesce")
    run.train(int(CYCLE["small"]), constant(lr, REWARM_STEPS))
    back = operator("decoalesce", seed=text.seed).growth(SMALL, WHOLE)
    states = blended(large.__getitem__, known, grow(back, run.state().items()), CYCLE["alpha"])
    run.take(WHOLE, states)
    run.train(int(CYCLE["grown"]), constant(lr, REWARM_STEPS))
    return run.row()


def incremental(text: Text, world: World, lr: float) -> dict[str, Any]:
    """Layers on top, alone and then with all others, then the whole model for a while."""
    depths: Any = INCREMENT["depths"]
    phase: Any = INCREMENT["phase"]
    after: Any = INCREMENT["after"]
    run = begun(text, world, replace(WHOLE, n_layers=depths[0]), lr, 2 * phase)
    for depth in depths[1:]:
        added = depth - run.config.n_layers
        growth = run.grow(replace(WHOLE, n_layers=depth), "incremental")
        run.engine.freeze(growth.frozen)
        # All layers run forward; backward ends below those that were added.
        run.train(phase, constant(lr, REWARM_STEPS), passes=1 + 2 * _share(run.config, added))
        run.engine.freeze(frozenset())
        run.train(phase, constant(lr, REWARM_STEPS))
    run.train(after, constant(lr, 0))
    return run.row()


def _share(config: ModelConfig, added: int) -> float:
    """Return the share of the FLOPs that the added layers and the head have."""
    below = replace(config, n_layers=config.n_layers - added)
    head = training_flops_per_token(replace(config, n_layers=1), LENGTH) * 2
    head -= training_flops_per_token(replace(config, n_layers=2), LENGTH)
    total = training_flops_per_token(config, LENGTH)
    return (total - training_flops_per_token(below, LENGTH) + head) / total


def learned(name: str) -> Callable[..., dict[str, Any]]:
    """A base, maps learned on the next sequences, and the model that they make."""

    def arm(text: Text, world: World, lr: float) -> dict[str, Any]:
        run = begun(text, world, SMALL, lr, BASE_STEPS)
        made = operator(name, seed=text.seed)
        growth: Any = made.growth(SMALL, WHOLE)
        state = run.state()
        weights = {key: one["weight"] for key, one in state.items()}
        batches = [text.batch(run.at + step) for step in range(LEARN_STEPS)]
        pairs = [
            (torch.from_numpy(b.tokens_BT.astype(np.int64)), torch.from_numpy(b.labels_BT))
            for b in batches
        ]
        losses = learn(growth, weights, pairs, made.lr)  # type: ignore[attr-defined]
        run.at += LEARN_STEPS
        each = training_flops_per_token(WHOLE, LENGTH) * TOKENS + map_flops(growth, state)
        run.flops += LEARN_STEPS * each
        run.take(WHOLE, grow(growth, state.items()))
        run.train(GROWN_STEPS - LEARN_STEPS, constant(lr, REWARM_STEPS))
        return run.row(map_losses=[losses[0], losses[-1]], map_flops=each * LEARN_STEPS)

    return arm


def map_flops(growth: LearnedGrowth, state: State) -> float:
    """Return the FLOPs of making all new weights once, and of the gradients of the maps."""
    with FlopCounterMode(display=False) as counter:
        values = growth.values(state.__getitem__)
        torch.stack([value.sum() for value in values.values()]).sum().backward()
    growth.maps.zero_grad()
    return float(counter.get_total_flops())


def family_of(seed: int, peak: float, steps: int) -> ProgressiveFamily:
    """Return the family of preset yano2025, of a run of so many steps."""
    stages: list[dict[str, Any]] = [
        {"name": f"layers-{round(WHOLE.n_layers * Fraction(depth))}", "depth": depth}
        for depth in FAMILY_DEPTHS
    ]
    family = ProgressiveFamily(WHOLE, {"preset": "yano2025", "stages": [*stages, {}]}, seed)
    family.fit(RunShape(steps, LENGTH, lambda step: step * SEQUENCES, lambda _: peak, 0))
    return family


def member_steps() -> list[int]:
    """Return the steps of every member alone: as many tokens for each parameter."""
    configs = [stage.config for stage in family_of(0, 1.0, FAMILY_STEPS).stages]
    sizes = [parameters_non_embedding(config) for config in configs]
    return [max(1, round(FAMILY_STEPS * size / sizes[-1])) for size in sizes]


def family_steps() -> int:
    """Return the steps at which the family has cost what its largest member costs alone."""
    total = 0.0
    for number, steps in enumerate(member_steps()):
        stages = family_of(0, 1.0, FAMILY_STEPS).stages
        each = [training_flops_per_token(stage.config, LENGTH) for stage in stages]
        before = member_steps()[number - 1] * each[number - 1] if number else 0.0
        total += (steps * each[number] - before) / each[number]
    return round(total)


def family(text: Text, world: World, lr: float) -> dict[str, Any]:
    """All members in one run: each is kept, grows, and trains on."""
    made = family_of(text.seed, lr, family_steps())
    run, found, seen = Run(text, world, made.stages[0].config), Seen(), 0.0
    for number, stage in enumerate(made.stages):
        if number:
            growth = made.growth(number)
            run.take(stage.config, grow(growth, run.state().items()))
        steps = made.stop_of(number) - made.starts[number]
        run.train(steps, falling(made.peak_lr(number), steps), often=False)
        found.add(stage.label, run)
        seen = run.flops
    return run.row(**found.told(), flops=seen, curve=[])


def alone(text: Text, world: World, lr: float) -> dict[str, Any]:
    """Each member by itself, at the same learning rate for its size."""
    made = family_of(text.seed, lr, family_steps())
    found, total, cpu_s = Seen(), 0.0, 0.0
    for number, (stage, steps) in enumerate(zip(made.stages, member_steps(), strict=True)):
        run = Run(text, world, stage.config)
        run.train(steps, falling(made.peak_lr(number), steps), often=False)
        found.add(stage.label, run)
        total += run.flops
        cpu_s += time.process_time() - run.began
    return found.told() | {"flops": total, "cpu_s": round(cpu_s, 1)}


class Seen:
    """Losses of members, and how they differ from the one before."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.flops: dict[str, float] = {}
        self.kl: list[float] = []
        self.before: Tensor | None = None

    def add(self, name: str, run: Run) -> None:
        """Note a member."""
        logprob_NV = run.logprobs()
        self.losses[name], self.flops[name] = run.loss(), run.flops
        if self.before is not None:
            each_N = (self.before.exp() * (self.before - logprob_NV)).sum(-1)
            self.kl.append(float(each_N.double().mean()))
        self.before = logprob_NV

    def told(self) -> dict[str, Any]:
        """Return what a row keeps: `kl` is KL(smaller || larger), nats per byte."""
        return {"members": self.losses, "member_flops": self.flops, "kl": self.kl}


ARMS: dict[str, Callable[..., dict[str, Any]]] = {
    "scratch": scratch,
    "gstack": grown(SHALLOW, "stack"),
    "interpolate": grown(SHALLOW, "interpolate"),
    "hypercloning": grown(NARROW, "hypercloning", noise=0.1),
    "sparkling": grown(NARROW, "sparkling"),
    "bert2bert-aki": grown(NARROW, "bert2bert-aki"),
    "vcycle": vcycle,
    "family": family,
    "family-alone": alone,
    "incremental": incremental,
    "bert2bert-fpi+stack": grown(SMALL, "bert2bert-fpi+stack"),
    "ligo": learned("ligo"),
    "mango": learned("mango"),
}
"""In the order in which they train. `interpolate` is Apollo's growth without its sampled depths."""
