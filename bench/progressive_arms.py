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
from progressive_scales import Scale
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
        scale: how long sequences are, and how many a step has.
    """

    def __init__(self, path: Path, seed: int, scale: Scale) -> None:
        self.train, self.held = _sequences(path, scale.length, scale.held_out)
        self.seed, self.scale = seed, scale
        self._order = lru_cache(maxsize=2)(self._ordered)

    def batch(self, step: int) -> Rows:
        """Return the sequences of a step [sequences, length]."""
        n = self.scale.sequences
        places = np.arange(step * n, (step + 1) * n)
        found = [self._order(int(p) // len(self.train))[p % len(self.train)] for p in places]
        rows = self.train[found]
        return Rows(rows[:, :-1], rows[:, 1:].astype(np.int64))

    def _ordered(self, epoch: int) -> npt.NDArray[np.int64]:
        key = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return key.permutation(len(self.train))


@lru_cache(maxsize=1)
def _sequences(
    path: Path, length: int, held_out: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    parts: tuple[list[int], list[int]] = ([], [])
    for number, line in enumerate(path.open(encoding="utf-8")):
        parts[number % 10 == 9].extend([*json.loads(line)["text"].encode(), END_OF_DOCUMENT])
    cut = [len(part) // (length + 1) * (length + 1) for part in parts]
    train, held = (
        np.array(part[:n], dtype=np.int32).reshape(-1, length + 1)
        for part, n in zip(parts, cut, strict=True)
    )
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(held))
    return train, held[order[:held_out]]


class Run:
    """A model under training: its engine, the step, what it cost, and its losses along the way.

    Attributes:
        curve: [FLOPs so far, tokens so far, held-out loss in nats per byte], every so many
            steps.
    """

    def __init__(self, text: Text, world: World, config: ModelConfig) -> None:
        self.text, self.world, self.began = text, world, time.process_time()
        self.scale = text.scale
        self.at, self.flops = 0, 0.0
        self.curve: list[list[float]] = []
        self._become(config)

    def _become(self, config: ModelConfig) -> None:
        self.config = config
        options = EngineOptions(seed=self.text.seed, precision=self.scale.precision)
        layout = Layout(micro_sequences=self.scale.sequences)
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
        scale = self.scale
        each = training_flops_per_token(self.config, scale.length)
        per_step = each * scale.tokens * passes / 3
        for _ in range(steps):
            before = {name: self.engine.parameters[name].detach().clone() for name in self.new}
            lr = rate(self.at - self.grew_at)
            self.engine.step([self.text.batch(self.at)], lr, lambda *_: True, lambda: False)
            self._rewarm(before)
            self.at += 1
            self.flops += per_step
            if often and self.at % scale.every == 0:
                self.note()

    @torch.no_grad()
    def _rewarm(self, before: Mapping[str, Tensor]) -> None:
        """Give what is new a learning rate of its own: AdamW moves a weight in proportion to it."""
        if not before:
            return
        share = 1.3 * (self.at - self.grew_at + 1) / (2 * self.scale.rewarm)
        for name, old in before.items():
            now = self.engine.parameters[name]
            now.copy_(torch.where(self.new[name], old + (now - old) * share, now))
        if share >= 1.3:
            self.new = {}

    def note(self) -> None:
        """Note the loss on a part of what is held out."""
        tokens = self.at * self.scale.tokens
        self.curve.append([self.flops, tokens, self.loss(self.scale.held_out_often)])

    @torch.no_grad()
    def loss(self, sequences: int | None = None) -> float:
        """Return the held-out loss, nats per byte."""
        logprob_NV = self.logprobs(sequences)
        labels_N1 = torch.from_numpy(self.text.held[:sequences, 1:].astype(np.int64)).reshape(-1, 1)
        chosen_N1 = logprob_NV.gather(1, labels_N1.to(logprob_NV.device))
        return -float(chosen_N1.double().mean())

    @torch.no_grad()
    def logprobs(self, sequences: int | None = None) -> Tensor:
        """Return the log-probabilities of all bytes at every held-out place, [N, V]."""
        model = self.engine.decoders[0]
        held = self.text.held[:sequences, :-1].astype(np.int64)
        rows = torch.from_numpy(held).to(self.world.device)
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


def falling(lr: float, steps: int, scale: Scale) -> Rate:
    """A rate that is warmed up, stays, and falls to 0 at the end."""
    warmup, fall = max(1, min(scale.warmup, steps // 5)), round(scale.fall * steps)
    return lambda step: lr * min((step + 1) / warmup, 1.0, (steps - step) / (fall + 1))


def begun(text: Text, world: World, config: ModelConfig, lr: float, steps: int) -> Run:
    """Return a base after some steps."""
    run = Run(text, world, config)
    run.train(steps, constant(lr, text.scale.warmup))
    return run


def scratch(text: Text, world: World, lr: float) -> dict[str, Any]:
    """The whole model from the first step."""
    return begun(text, world, text.scale.whole, lr, text.scale.scratch).row()


def tuning(text: Text, world: World, lr: float) -> dict[str, Any]:
    """A shorter one, to choose the learning rate by."""
    return begun(text, world, text.scale.whole, lr, text.scale.tuning).row()


def grown(base: str, name: str, **options: Any) -> Callable[..., dict[str, Any]]:
    """A base of the scale, grown once."""

    def arm(text: Text, world: World, lr: float) -> dict[str, Any]:
        scale = text.scale
        run = begun(text, world, getattr(scale, base), lr, scale.base)
        growth = run.grow(scale.whole, name, **options)
        asymmetric = name == "sparkling"
        if asymmetric:  # what is old keeps its rate; what is new is warmed up beside it
            found = {one: growth.new_elements(one) for one in run.engine.parameters}
            run.new = {one: mask for one, mask in found.items() if mask is not None}
        run.train(scale.grown, constant(lr, 0 if asymmetric else scale.rewarm))
        return run.row()

    return arm


def vcycle(text: Text, world: World, lr: float) -> dict[str, Any]:
    """A little of the large model, a small one of it, and the large one blended with that."""
    scale, cycle = text.scale, text.scale.cycle
    run = begun(text, world, scale.whole, lr, int(cycle["large"]))
    large = run.state()
    known = digests(large.items())
    run.grow(scale.small, "coalesce")
    run.train(int(cycle["small"]), constant(lr, scale.rewarm))
    back = operator("decoalesce", seed=text.seed).growth(scale.small, scale.whole)
    states = blended(large.__getitem__, known, grow(back, run.state().items()), cycle["alpha"])
    run.take(scale.whole, states)
    run.train(int(cycle["grown"]), constant(lr, scale.rewarm))
    return run.row()


def incremental(text: Text, world: World, lr: float) -> dict[str, Any]:
    """Layers on top, alone and then with all others, then the whole model for a while."""
    scale = text.scale
    depths: Any = scale.increment["depths"]
    phase: Any = scale.increment["phase"]
    after: Any = scale.increment["after"]
    run = begun(text, world, replace(scale.whole, n_layers=depths[0]), lr, 2 * phase)
    for depth in depths[1:]:
        added = depth - run.config.n_layers
        growth = run.grow(replace(scale.whole, n_layers=depth), "incremental")
        run.engine.freeze(growth.frozen)
        # All layers run forward; backward ends below those that were added.
        share = _share(run.config, added, scale.length)
        run.train(phase, constant(lr, scale.rewarm), passes=1 + 2 * share)
        run.engine.freeze(frozenset())
        run.train(phase, constant(lr, scale.rewarm))
    run.train(after, constant(lr, 0))
    return run.row()


def _share(config: ModelConfig, added: int, length: int) -> float:
    """Return the share of the FLOPs that the added layers and the head have."""
    below = replace(config, n_layers=config.n_layers - added)
    head = training_flops_per_token(replace(config, n_layers=1), length) * 2
    head -= training_flops_per_token(replace(config, n_layers=2), length)
    total = training_flops_per_token(config, length)
    return (total - training_flops_per_token(below, length) + head) / total


def learned(name: str) -> Callable[..., dict[str, Any]]:
    """A base, maps learned on the next sequences, and the model that they make."""

    def arm(text: Text, world: World, lr: float) -> dict[str, Any]:
        scale, device = text.scale, world.device
        run = begun(text, world, scale.small, lr, scale.base)
        made = operator(name, seed=text.seed)
        growth: Any = made.growth(scale.small, scale.whole)
        state = run.state()
        weights = {key: one["weight"].to(device) for key, one in state.items()}
        batches = [text.batch(run.at + step) for step in range(scale.learn)]
        pairs = [
            (
                torch.from_numpy(b.tokens_BT.astype(np.int64)).to(device),
                torch.from_numpy(b.labels_BT).to(device),
            )
            for b in batches
        ]
        losses = learn(growth, weights, pairs, made.lr)  # type: ignore[attr-defined]
        run.at += scale.learn
        training = training_flops_per_token(scale.whole, scale.length) * scale.tokens
        each = training + map_flops(growth, state)
        run.flops += scale.learn * each
        run.take(scale.whole, grow(growth, state.items()))
        run.train(scale.grown - scale.learn, constant(lr, scale.rewarm))
        return run.row(map_losses=[losses[0], losses[-1]], map_flops=each * scale.learn)

    return arm


def map_flops(growth: LearnedGrowth, state: State) -> float:
    """Return the FLOPs of making all new weights once, and of the gradients of the maps."""
    with FlopCounterMode(display=False) as counter:
        values = growth.values(state.__getitem__)
        torch.stack([value.sum() for value in values.values()]).sum().backward()
    growth.maps.zero_grad()
    return float(counter.get_total_flops())


def family_of(scale: Scale, seed: int, peak: float, steps: int) -> ProgressiveFamily:
    """Return the family of preset yano2025, of a run of so many steps."""
    stages: list[dict[str, Any]] = [
        {"name": f"layers-{round(scale.whole.n_layers * Fraction(depth))}", "depth": depth}
        for depth in scale.depths
    ]
    family = ProgressiveFamily(scale.whole, {"preset": "yano2025", "stages": [*stages, {}]}, seed)
    n = scale.sequences
    family.fit(RunShape(steps, scale.length, lambda step: step * n, lambda _: peak, 0))
    return family


def member_steps(scale: Scale) -> list[int]:
    """Return the steps of every member alone: as many tokens for each parameter."""
    configs = [stage.config for stage in family_of(scale, 0, 1.0, scale.family).stages]
    sizes = [parameters_non_embedding(config) for config in configs]
    return [max(1, round(scale.family * size / sizes[-1])) for size in sizes]


def family_steps(scale: Scale) -> int:
    """Return the steps at which the family has cost what its largest member costs alone."""
    total, lengths = 0.0, member_steps(scale)
    stages = family_of(scale, 0, 1.0, scale.family).stages
    each = [training_flops_per_token(stage.config, scale.length) for stage in stages]
    for number, steps in enumerate(lengths):
        before = lengths[number - 1] * each[number - 1] if number else 0.0
        total += (steps * each[number] - before) / each[number]
    return round(total)


def family(text: Text, world: World, lr: float) -> dict[str, Any]:
    """All members in one run: each is kept, grows, and trains on."""
    made = family_of(text.scale, text.seed, lr, family_steps(text.scale))
    run, found, seen = Run(text, world, made.stages[0].config), Seen(), 0.0
    for number, stage in enumerate(made.stages):
        if number:
            growth = made.growth(number)
            run.take(stage.config, grow(growth, run.state().items()))
        steps = made.stop_of(number) - made.starts[number]
        run.train(steps, falling(made.peak_lr(number), steps, text.scale), often=False)
        found.add(stage.label, run)
        seen = run.flops
    return run.row(**found.told(), flops=seen, curve=[])


def alone(text: Text, world: World, lr: float) -> dict[str, Any]:
    """Each member by itself, at the same learning rate for its size."""
    made = family_of(text.scale, text.seed, lr, family_steps(text.scale))
    found, total, cpu_s = Seen(), 0.0, 0.0
    for number, (stage, steps) in enumerate(
        zip(made.stages, member_steps(text.scale), strict=True)
    ):
        run = Run(text, world, stage.config)
        run.train(steps, falling(made.peak_lr(number), steps, text.scale), often=False)
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
    "gstack": grown("shallow", "stack"),
    "interpolate": grown("shallow", "interpolate"),
    "hypercloning": grown("narrow", "hypercloning", noise=0.1),
    "sparkling": grown("narrow", "sparkling"),
    "bert2bert-aki": grown("narrow", "bert2bert-aki"),
    "vcycle": vcycle,
    "family": family,
    "family-alone": alone,
    "incremental": incremental,
    "bert2bert-fpi+stack": grown("small", "bert2bert-fpi+stack"),
    "ligo": learned("ligo"),
    "mango": learned("mango"),
}
"""In the order in which they train. `interpolate` is Apollo's growth without its sampled depths."""
