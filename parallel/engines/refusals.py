"""Which layouts cannot train members of a family; torch-free, to be asked before a rank starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from motet.models.config import ModelConfig
from motet.models.family.space import part_order
from motet.models.member import Member, block_cuts
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.model_rules import model_problems

NEEDS = {
    "mask_update": "updates parts of weights",
    "normalize": "scales parts of gradients",
    "teacher": "keeps a second set of weights",
    "order_at_step": "moves channels of weights and of their moments",
    "loss=layerskip": "takes losses between blocks and leaves blocks out",
}
"""Options of a family, and what each does that only the native engine can."""
WITHOUT_STAGES = ("loss=layerskip", "teacher", "order_at_step")
"""Those that pipelines do not do here: losses between blocks, a second model beside each stage, and
an order that all stages share.
"""


def refusals(
    layout: Layout,
    config: ModelConfig,
    members: Sequence[Member] = (),
    needs: Sequence[str] = (),
) -> list[str]:
    """Return why a layout cannot train members of a family beside the whole model, in words.

    Args:
        needs: options of the family that ask more of an engine (`Family.needs`).
    """
    reasons: list[str] = []
    for need in needs:
        if layout.engine != "native":
            what = NEEDS[need]
            reasons.append(
                f"layout.engine={layout.engine}: family.options.{need} {what}, which a library "
                "that keeps passes, gradients and optimizer to itself does not allow; use native"
            )
        elif layout.pp > 1 and need in WITHOUT_STAGES:
            reasons.append(
                f"layout.pp={layout.pp}: family.options.{need} {NEEDS[need]}, which stages of a "
                "pipeline cannot; use pp=1"
            )
    reasons += _short_of_layers(layout, config, members)
    if len(set(layout.shares)) > 1:
        reasons.append("layout.shares: replicas must take equally many micro-batches")
    reasons += _out_of_step(layout, config, members)
    return reasons + list(dict.fromkeys(_cut_groups(layout, config, members)))


def stage_refusals(
    layouts: Sequence[Layout], members: Sequence[Member], sequence_length: int
) -> list[str]:
    """Return why layouts cannot train the models of a run that grows, one after the other.

    Args:
        layouts: of every stage in order; the last is that of the whole model.
    """
    if others := [layout.engine for layout in layouts if layout.engine != "native"]:
        return [
            f"layout.engine={others[0]}: a model that grows is handed over with its optimizer "
            "state between two engines of one process, which was shown for native alone; use native"
        ]
    found = []
    for layout, member in zip(layouts, members, strict=False):
        for setting, why in model_problems(layout, member.config, sequence_length):
            found.append(f"stage {member.name}: {setting}: {why}")
    return found


def _short_of_layers(
    layout: Layout, config: ModelConfig, members: Sequence[Member]
) -> Iterator[str]:
    """Say where DeepSpeed would move weights of layers that nobody ran."""
    if layout.engine != "deepspeed":
        return
    for member in members:
        if len(member.layers) < config.n_layers:
            yield (
                f"layout.engine=deepspeed: member {member.name!r} leaves out layers, and ZeRO "
                "updates all weights together, also those of layers that nobody ran in a step; "
                "use native or accelerate, or members of all layers"
            )


def _out_of_step(layout: Layout, config: ModelConfig, members: Sequence[Member]) -> Iterator[str]:
    """Say where a member leaves out more layers of one pipeline stage than of another."""
    if layout.pp == 1:
        return
    stages = layout.layers_of_stages(config)
    for member in members:
        left_out = _left_out(stages, member)
        if len(set(left_out)) > 1:
            yield (
                f"layout.pp={layout.pp}: member {member.name!r} leaves out "
                f"{', '.join(map(str, left_out))} layers of the {len(stages)} stages in order, "
                "and they would wait for each other; it must be equally many: "
                f"{_in_step(stages, config, member)}"
            )


def _left_out(stages: Sequence[range], member: Member) -> list[int]:
    return [len(stage) - len(set(stage) & set(member.layers)) for stage in stages]


def _in_step(stages: Sequence[range], config: ModelConfig, member: Member) -> str:
    """Say which layers would fit, of as many as there are or the nearest number, and whether equal
    stages would.
    """
    whole, n, ways = config.n_layers, len(stages), []
    fits = [out for out in range(1, min(len(stage) for stage in stages) + 1) if out * n < whole]
    if fits:
        out = min(fits, key=lambda out: abs(whole - out * n - len(member.layers)))
        kept = [part_order(stage, whole)[: len(stage) - out] for stage in stages]
        ways.append(f"layers {sorted(itertools.chain(*kept))}")
    equal = [range(at, at + whole // n) for at in range(0, whole // n * n, whole // n or 1)]
    if whole % n == 0 and len(set(_left_out(equal, member))) == 1:
        ways.append(f"layout.stage_layers={[whole // n] * n}")
    return f"{' or '.join(ways or ['pp=1'])} would fit"


def _cut_groups(layout: Layout, config: ModelConfig, members: Sequence[Member]) -> Iterator[str]:
    """Say where ranks would hold different shares of a member."""
    for member in members:
        for cuts in block_cuts(config, member):
            degrees = {
                "tp": layout.tp if cuts.heads or cuts.hidden else 1,
                "ep": layout.ep if cuts.experts else 1,
                "etp": layout.etp if cuts.expert else 1,
            }
            for name, degree in degrees.items():
                if member.groups % degree:
                    fits = [n for n in range(1, degree + 1) if member.groups % n == 0]
                    yield (
                        f"layout.{name}={degree} cuts a group of member {member.name!r}, whose "
                        f"heads, channels and experts lie in {member.groups}; use "
                        f"{name}={fits[-1]}, or groups={math.lcm(member.groups, degree)} in a new "
                        "run"
                    )


class Degrees(Protocol):
    """What decides: the engine's name and the degrees of a layout, or of the settings of one."""

    @property
    def engine(self) -> str: ...

    @property
    def tp(self) -> int: ...

    @property
    def pp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def ep(self) -> int: ...


def noise_refusal(layout: Degrees, has_experts: bool) -> str | None:
    """Return why no noise can be added under a layout, and what would work; None where it can."""
    if layout.engine != "native":
        return f"layout.engine={layout.engine}: a library keeps its passes to itself; use native"
    for name in ("tp", "pp", "cp", "ep"):
        if getattr(layout, name) > 1:
            return (
                f"layout.{name}={getattr(layout, name)}: embeddings of whole sequences are not on "
                f"every rank; use {name}=1, with data-parallel ranks (dp_shard, dp_replicate)"
            )
    return "the model is a mixture of experts, which counts its tokens" if has_experts else None
